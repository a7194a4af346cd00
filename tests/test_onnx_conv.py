"""ONNX convolutions: one file, three runtimes, one answer; folding is exact or left alone."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_cases import LAYOUTS, MAKERS

from spfmt.activations import ACTIVATIONS, apply_activation
from spfmt.convolution import Convolution, conv2d
from spfmt.errors import FormatError, SpfmtError
from spfmt.formats import FORMATS, SparseTensor

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from onnx import helper, inliner, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx_cases import Array, bias_of, run_everywhere  # noqa: E402
from torch import nn  # noqa: E402

import spfmt.onnx as sonnx  # noqa: E402
from spfmt.onnx.functions import SPARSE_NODES  # noqa: E402
from spfmt.torch import SparseConv1d, SparseConv2d, SparseLinear  # noqa: E402

# shape of the weight, options of Convolution.of, (H, W)
GEOMETRIES: list[tuple[tuple[int, ...], dict[str, Any], tuple[int, int]]] = [
    ((8, 6, 3, 3), {"padding": 1}, (7, 9)),
    ((8, 6, 1, 1), {}, (5, 4)),
    ((20, 4, 3, 2), {"stride": (2, 3), "padding": (1, 0, 2, 1)}, (8, 11)),
    ((12, 4, 3, 3), {"dilation": (2, 1), "padding": "same"}, (6, 6)),
    ((8, 6, 2, 4), {"padding": "same"}, (6, 6)),  # one more at the end
    ((12, 2, 3, 3), {"groups": 4, "padding": 1, "stride": 2}, (9, 8)),
    ((16, 1, 3, 3), {"groups": 16, "padding": 1}, (6, 7)),
    ((8, 4, 5, 5), {}, (5, 5)),
    ((8, 4, 1, 7), {"padding": (0, 3)}, (1, 12)),
]


def make(format: str, shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 1) -> Any:
    """A weight of a format, or of the least regular one of a layout."""
    return MAKERS[LAYOUTS.get(format, format)](shape, np.random.default_rng(seed)).astype(dtype)


def one_conv(
    tensor: SparseTensor,
    bias: Array,
    how: Convolution,
    *,
    sizes: tuple[Any, ...] = ("n", None, "h", "w"),
    opset: int = sonnx.MIN_OPSET,
    activation: str | None = None,
    change: Any = None,
    free: str | None = None,
    rank_known: bool = True,
) -> Any:
    """A model of one convolution; `change` damages its arrays and node, `free` is no constant."""
    node, tensors = sonnx.make_node(
        tensor, "x", "bias", "y", name="layer", activation=activation, convolution=how
    )
    arrays = {t.name: numpy_helper.to_array(t) for t in tensors} | {"bias": bias}
    if change is not None:
        change(arrays, node)
    kind = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    info = helper.make_tensor_value_info
    shape = [sizes[0], tensor.shape[1] * how.groups, *sizes[2:]]
    inputs = [info("x", kind, shape if rank_known else None)]
    if free:
        array = arrays.pop(free)
        inputs.append(info(free, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape))
    stored = [numpy_helper.from_array(np.ascontiguousarray(a), n) for n, a in arrays.items()]
    output = info("y", kind, ["n", tensor.shape[0], "p", "q"] if rank_known else None)
    graph = helper.make_graph([node], "one_conv", inputs, [output], stored)
    layout = tensor.layout().name
    bodies = [sonnx.function(layout, opset, convolution=True)]
    if activation:
        bodies.append(sonnx.function(layout, opset, activation, convolution=True))
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(sonnx.DOMAIN, sonnx.VERSION)]
    return helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=8)


def images(tensor: SparseTensor, how: Convolution, n: int, size: tuple[int, int]) -> Array:
    rng = np.random.default_rng(3)
    return rng.standard_normal((n, tensor.shape[1] * how.groups, *size)).astype(tensor.dtype)


def check(got: Array, tensor: SparseTensor, how: Convolution, x: Array, bias: Array) -> None:
    """Compare with float64; the bound is that of a sum of as many products in any order."""
    options: dict[str, Any] = {
        "stride": how.stride, "padding": how.padding, "dilation": how.dilation,
        "groups": how.groups, "backend": "reference",
    }  # fmt: skip
    wide, x, bias = tensor.astype(np.float64), x.astype(np.float64), bias.astype(np.float64)
    expected = conv2d(wide, x, bias=bias, **options)
    sums = conv2d(wide.with_values(abs(wide.values)), abs(x), bias=abs(bias), **options)
    terms = tensor.matrix_shape[1] + 2
    assert got.dtype == tensor.dtype
    assert got.shape == expected.shape
    assert (np.abs(got - expected) <= terms * np.finfo(tensor.dtype).eps * sums).all()


# ------------------------------------------------------------------------------- products


@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
@pytest.mark.parametrize("format", FORMATS)
def test_the_same_file_gives_the_same_answer(format: str, case: int) -> None:
    shape, options, size = GEOMETRIES[case]
    tensor, how = make(format, shape), Convolution.of(shape, **options)
    bias = bias_of(tensor)
    model = one_conv(tensor, bias, how)
    onnx.checker.check_model(model, full_check=True)
    node = model.graph.node[0]
    assert node.op_type == sonnx.CONVOLUTIONS[tensor.layout().name].op_type
    assert node.doc_string == repr(tensor)
    for n in (1, 3):
        x = images(tensor, how, n, size)
        for got in run_everywhere(model, x).values():
            check(got, tensor, how, x, bias)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_has_kernels(layout: str) -> None:
    shape, options, size = GEOMETRIES[0]
    tensor, how = make(layout, shape, np.float64), Convolution.of(shape, **options)
    bias, x = bias_of(tensor), images(tensor, how, 2, size)
    model = one_conv(tensor, bias, how)
    check(ReferenceEvaluator(model).run(None, {"x": x})[0], tensor, how, x, bias)
    data = model.SerializeToString()
    check(sonnx.session(data).run(None, {"x": x})[0], tensor, how, x, bias)


@pytest.mark.parametrize("opset", [18, 20, 21, 23])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bodies_hold_in_later_opsets(layout: str, opset: int) -> None:
    shape, options, size = GEOMETRIES[5]
    tensor, how = make(layout, shape), Convolution.of(shape, **options)
    bias, x = bias_of(tensor), images(tensor, how, 2, size)
    for got in run_everywhere(one_conv(tensor, bias, how, opset=opset), x).values():
        check(got, tensor, how, x, bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations(layout: str, activation: str) -> None:
    shape, options, size = GEOMETRIES[0]
    tensor, how = make(layout, shape), Convolution.of(shape, **options)
    bias, x = bias_of(tensor), images(tensor, how, 2, size)
    model = one_conv(tensor, bias, how, activation=activation)
    onnx.checker.check_model(model, full_check=True)
    want = apply_activation(activation, conv2d(tensor, x, bias=bias, **options))
    for got in run_everywhere(model, x).values():
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    (run,) = sonnx.kernels_run(model.SerializeToString(), {"x": x})
    assert run.op_type == model.graph.node[0].op_type
    assert run.kernel.split(", ")[1] in ("images", "rows")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_images_and_sizes_that_change(layout: str) -> None:
    shape, options, _ = GEOMETRIES[2]
    tensor, how = make(layout, shape), Convolution.of(shape, **options)
    bias = bias_of(tensor)
    session = sonnx.session(one_conv(tensor, bias, how).SerializeToString())
    for n, size in [(0, (8, 11)), (1, (3, 2)), (17, (8, 11)), (2, (40, 3)), (1, (3, 2))]:
        x = images(tensor, how, n, size)
        check(session.run(None, {"x": x})[0], tensor, how, x, bias)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_body_folds_to_one_dense_convolution(
    layout: str, activation: str | None, tmp_path: Path
) -> None:
    shape, options, size = GEOMETRIES[0]
    tensor, how = make(layout, shape), Convolution.of(shape, **options)
    model = one_conv(tensor, bias_of(tensor), how, activation=activation).SerializeToString()
    runs = sonnx.kernels_run(model, {"x": images(tensor, how, 2, size)}, library=False)
    assert len([run for run in runs if "Reorder" not in run.op_type]) == 1
    settings = ort.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "folded.onnx")
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    sonnx.session(model, library=False, session_options=settings)
    (node,) = onnx.load(tmp_path / "folded.onnx").graph.node
    assert node.op_type == ("FusedConv" if activation else "Conv")


# -------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_a_bit(layout: str, n: int) -> None:
    shape = (64, 32, 3, 3)
    tensor, how = make(layout, shape), Convolution.of(shape, padding=1)
    model = one_conv(tensor, bias_of(tensor), how).SerializeToString()
    x = images(tensor, how, n, (14, 14))
    one, two = (sonnx.session(model, threads=t).run(None, {"x": x})[0] for t in (1, 2))
    assert np.array_equal(one, two)


def test_one_session_serves_many_threads() -> None:
    shape = (24, 12, 3, 3)
    tensor, how = make("csr", shape), Convolution.of(shape, padding=1)
    session = sonnx.session(one_conv(tensor, bias_of(tensor), how).SerializeToString())
    batches = [images(tensor, how, 1 + i % 5, (4 + i % 7, 9)) for i in range(60)]
    alone = [session.run(None, {"x": x})[0] for x in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: session.run(None, {"x": x})[0], batches))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


# --------------------------------------------------------------------------------- shapes


def inferred(options: dict[str, Any], sizes: tuple[Any, ...], rank_known: bool = True) -> Any:
    shape = (8, 6, 3, 3)
    tensor, how = make("csr", shape), Convolution.of(shape, **options)
    model = one_conv(tensor, bias_of(tensor), how, sizes=sizes, rank_known=rank_known)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return sonnx.session(model.SerializeToString()).get_outputs()[0].shape


def test_shapes_are_inferred() -> None:
    assert inferred({"padding": 1}, ("n", None, "h", "w")) == ["n", 8, "h", "w"]
    got = inferred({"padding": (1, 0, 0, 0), "stride": (2, 1)}, ("n", None, "h", 9))
    assert got[:2] == ["n", 8]
    assert got[3] == 7
    assert got[2] not in ("h", 8)
    got = inferred({"padding": 1, "stride": 2, "dilation": 2}, (5, None, 7, 8))
    assert got == [5, 8, 3, 3]
    assert inferred({}, ("n", None, 3, 3), rank_known=False)[1] == 8


def test_sizes_that_nobody_named_are_no_numbers(capfd: pytest.CaptureFixture[str]) -> None:
    tensor, how = make("csr", (8, 6, 3, 3)), Convolution((3, 3), stride=(2, 1))
    model = one_conv(tensor, bias_of(tensor), how, sizes=(None,) * 4)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    session = sonnx.session(model.SerializeToString())
    names = session.get_outputs()[0].shape
    assert names[1] == 8
    assert len({str(name) for name in names}) == 4
    session.run(None, {"x": images(tensor, how, 3, (5, 6))})
    assert capfd.readouterr() == ("", "")  # ONNX Runtime has nothing to warn of


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 6, 6), r"expected images \(N, 6, H, W\)"),
        ((2, 6, 6), r"expected images"),
        ((2, 6, 6, 6, 1), r"expected images"),
        ((2, 6, 2, 6), "height of 2, expected at least 3"),
        ((2, 6, 6, 0), "width of 0, expected at least 3"),
    ],
)
def test_wrong_images_are_refused_when_they_come(shape: tuple[int, ...], message: str) -> None:
    tensor, how = make("csr", (8, 6, 3, 3)), Convolution((3, 3))
    model = one_conv(tensor, bias_of(tensor), how, rank_known=False).SerializeToString()
    session = sonnx.session(model)
    with pytest.raises(Exception, match=message):
        session.run(None, {"x": np.zeros(shape, np.float32)})
    x = images(tensor, how, 1, (4, 4))
    check(session.run(None, {"x": x})[0], tensor, how, x, bias_of(tensor))


# --------------------------------------------------------------------------- broken files


def set_attribute(name: str, value: Any) -> Any:
    def change(arrays: dict[str, Array], node: Any) -> None:
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))

    return change


def put(name: str, value: int) -> Any:
    def change(arrays: dict[str, Array], node: Any) -> None:
        array = arrays[f"layer.{name}"]
        array = array.astype(np.int32 if value < 0 else array.dtype)
        array[min(1, array.size - 1)] = value
        arrays[f"layer.{name}"] = array

    return change


BROKEN = [
    *((set_attribute(name, None), f"{name}") for name in sonnx.CONVOLUTIONS["lists"].attributes),
    (set_attribute("kernel_shape", [3]), "kernel_shape: expected an attribute of 2 integers"),
    (set_attribute("kernel_shape", [3, 3, 3]), "kernel_shape: expected an attribute of 2 integers"),
    (set_attribute("kernel_shape", 3), "kernel_shape: expected an attribute of 2 integers"),
    (set_attribute("kernel_shape", [0, 3]), "kernel_shape: got 0"),
    (set_attribute("kernel_shape", [2, 2]), "outside .0, 24"),
    (set_attribute("kernel_shape", [2**30, 2**30]), "fewer than 2.31 weights"),
    (set_attribute("kernel_shape", [2**62, 2]), "kernel_shape: got"),
    (set_attribute("strides", [0, 1]), "strides: got 0"),
    (set_attribute("strides", [1, -2]), "strides: got -2"),
    (set_attribute("dilations", [1, 0]), "dilations: got 0"),
    (set_attribute("dilations", [1, 2**30]), "dilations: expected a kernel"),
    (set_attribute("pads", [1, 1]), "pads: expected an attribute of 4 integers"),
    (set_attribute("pads", [0, -1, 0, 0]), "pads: got -1"),
    (set_attribute("pads", [2**63 - 1] * 4), "pads: got"),
    (set_attribute("group", 0), "group: got 0"),
    (set_attribute("group", 5), "group: got 5, expected a divisor"),
    (set_attribute("in_channels", -6), "in_channels: got -6"),
    (set_attribute("in_channels", 2), "outside .0, 18"),
    (set_attribute("out_channels", 9), "bias: expected 9"),
    (set_attribute("out_channels", 2**40), "out_channels: got"),
    (put("col_indices", 54), "outside .0, 54"),
    (put("col_indices", -1), "outside .0, 54"),
]


@pytest.mark.parametrize("case", range(len(BROKEN)))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_broken_nodes_are_refused(layout: str, case: int) -> None:
    change, message = BROKEN[case]
    tensor, how = make(layout, (8, 6, 3, 3)), Convolution((3, 3))
    model = one_conv(tensor, bias_of(tensor), how, change=change).SerializeToString()
    with pytest.raises(SpfmtError, match=message):
        sonnx.session(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_must_be_constant(layout: str) -> None:
    tensor, how = make(layout, (8, 6, 3, 3)), Convolution((3, 3))
    for name in (*(f"layer.{n}" for n in sonnx.CONVOLUTIONS[layout].inputs), "bias"):
        model = one_conv(tensor, bias_of(tensor), how, free=name).SerializeToString()
        with pytest.raises(SpfmtError, match="expected a constant"):
            sonnx.session(model)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_numbers_are_refused_or_harmless(layout: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensor, how = make(layout, (8, 6, 3, 3)), Convolution((3, 3), padding=(1, 1, 1, 1))

    def change(arrays: dict[str, Array], node: Any) -> None:
        names = [n for n, a in arrays.items() if a.dtype.kind in "iu" and a.size]
        name = names[rng.integers(len(names))]
        array = arrays[name].copy()
        limits = np.iinfo(array.dtype)
        array[rng.integers(array.size)] = rng.choice([0, 1, 7, 8, 53, limits.max, limits.min])
        arrays[name] = array

    model = one_conv(tensor, bias_of(tensor), how, change=change).SerializeToString()
    try:
        session = sonnx.session(model)
    except SpfmtError:
        return
    feeds = {"x": images(tensor, how, 2, (5, 5))}
    body = sonnx.session(model, library=False).run(None, feeds)[0]
    np.testing.assert_allclose(session.run(None, feeds)[0], body, rtol=1e-4, atol=1e-4)


def test_weights_and_geometries_that_do_not_fit() -> None:
    tensor = make("csr", (8, 6, 3, 3))
    with pytest.raises(FormatError, match="the same kernel"):
        sonnx.make_node(tensor, "x", "b", "y", name="n", convolution=Convolution((3, 2)))
    with pytest.raises(FormatError, match="groups that divide"):
        sonnx.make_node(tensor, "x", "b", "y", name="n", convolution=Convolution((3, 3), groups=3))
    matrix = make("csr", (8, 6))
    with pytest.raises(FormatError, match="leave it out"):
        sonnx.make_node(matrix, "x", "b", "y", name="n", convolution=Convolution((3, 3)))
    node, _ = sonnx.make_node(tensor, "x", "b", "y", name="n")
    assert {a.name: list(a.ints) for a in node.attribute}["pads"] == [0, 0, 0, 0]


# ---------------------------------------------------------------------------- whole networks


def settled(model: Any, *shape: int) -> Any:
    """A model in evaluation whose batch norms have seen something and differ per channel."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(*shape) + 0.5)
    return model.eval()


def compare(path: Path, model: Any, *batches: Any) -> None:
    """Compare all runtimes with torch."""
    proto = onnx.load(path)
    runners = [sonnx.session(path), ReferenceEvaluator(proto)]
    if batches[0].dtype == torch.float32:  # ONNX Runtime has no convolution in float64
        runners.append(sonnx.session(path, library=False))
    tolerance = 1e-4 if batches[0].dtype == torch.float32 else 1e-11
    for x in batches:
        want = model(x).detach().numpy()
        for runner in runners:
            (got,) = runner.run(None, {proto.graph.input[0].name: x.numpy()})
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def exported(model: Any, x: Any, path: Path, **options: Any) -> list[str]:
    """Export, compare, and return the operators in the file."""
    sonnx.export(model, (x,), path, **options)
    compare(path, model, x, torch.cat([x, -x, x]))
    return [node.op_type for node in onnx.load(path).graph.node]


def conv(*args: Any, **options: Any) -> Any:
    return SparseConv2d(*args, **{"format": "csr", "density": 0.5, **options})


class Network(nn.Module):
    """A little of everything: batch norms, a residual sum, depthwise, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        block = {"format": "shuffled_block", "density": 0.3, "block_shape": (4, 2)}
        self.stem = conv(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.one = conv(16, 16, 3, padding="same", **block)
        self.norm_one = nn.BatchNorm2d(16)
        self.depthwise = conv(16, 16, 3, padding=1, groups=16, bias=False)
        self.wide = conv(16, 24, 1, stride=2, **block)
        self.norm_wide = nn.BatchNorm2d(24)
        self.head = SparseLinear(24, 10, format="csr", density=0.4)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm_one(self.one(x)))
        x = nn.functional.silu(self.norm_wide(self.wide(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


def test_a_network_of_any_size(tmp_path: Path) -> None:
    model = settled(Network(), 4, 3, 12, 12)
    path = tmp_path / "net.onnx"
    shapes = ({0: "batch", 2: "height", 3: "width"},)
    ops = exported(model, torch.randn(2, 3, 12, 14), path, dynamic_shapes=shapes)
    assert [op for op in ops if "Conv" in op or "Linear" in op] == [
        "ListsConvRelu", "GroupsConvAddRelu", "ListsConv", "GroupsConvSilu", "ListsLinear",
    ]  # fmt: skip
    assert "BatchNormalization" not in ops
    compare(path, model, torch.randn(3, 3, 9, 17))
    feeds = {onnx.load(path).graph.input[0].name: np.zeros((1, 3, 12, 12), np.float32)}
    runs = sonnx.kernels_run(path, feeds)
    ran = {run.op_type: run.kernel for run in runs if run.kernel}
    assert set(ran) == {op for op in ops if op.startswith(("Lists", "Groups"))}
    # All of it folds: nothing of the bodies is left to run.
    dense = {run.op_type for run in sonnx.kernels_run(path, feeds, library=False)}
    assert not dense & {"ScatterND", "Expand", "CumSum", "Gather"}


def small() -> Any:
    model = nn.Sequential(conv(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return settled(model, 4, 3, 6, 6)


def test_a_model_in_training_is_exported_as_in_evaluation(tmp_path: Path) -> None:
    model, path = small(), tmp_path / "net.onnx"
    before = copy.deepcopy(model.state_dict())
    model.train()
    sonnx.export(model, torch.randn(2, 3, 6, 6), path)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    compare(path, model.eval(), torch.randn(3, 3, 6, 6))  # opened without a warning
    dense = inliner.inline_local_functions(onnx.load(path)).SerializeToString()
    with pytest.warns(UserWarning, match="exported with 1 sparse layers and has none"):
        sonnx.session(dense)


def test_inlined_files_are_plain(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    ops = exported(small(), torch.randn(2, 3, 6, 6), path, inline=True)
    assert ops[-2:] == ["Conv", "Relu"]
    assert not onnx.load(path).functions


def test_a_network_in_float64(tmp_path: Path) -> None:
    ops = exported(
        small().double(), torch.randn(2, 3, 6, 6).double(), tmp_path / "net.onnx", opset=20
    )
    assert ops == ["ListsConvRelu"]


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_sound_file_is_taken_for_a_dense_one(layout: str, activation: str | None) -> None:
    tensor, how = make(layout, (8, 6, 3, 3)), Convolution((3, 3))
    model = one_conv(tensor, bias_of(tensor), how, activation=activation)
    helper.set_model_props(model, {SPARSE_NODES: "1"})
    sonnx.session(model.SerializeToString())  # no warning, whatever the length of the name


def test_sequences_are_images_of_one_row(tmp_path: Path) -> None:
    model = nn.Sequential(
        SparseConv1d(4, 12, 5, padding="same", format="nm", n=1, m=2),
        nn.BatchNorm1d(12),
        nn.GELU(),
        SparseConv1d(12, 6, 3, stride=2, dilation=2, groups=2, format="csr", density=0.5),
        nn.BatchNorm1d(6),
        SparseConv1d(6, 6, 2, format="csr", density=0.6),
    )
    ops = exported(settled(model, 4, 4, 20), torch.randn(2, 4, 20), tmp_path / "net.onnx")
    assert [op for op in ops if op not in ("Squeeze", "Unsqueeze")] == [
        "ListsConvGelu", "ListsConv", "ListsConv",
    ]  # fmt: skip


def test_other_paddings_are_torchs_own(tmp_path: Path) -> None:
    modes = ("reflect", "circular", "replicate")
    layers = [conv(4, 4, 3, padding=(2, 1), padding_mode=mode) for mode in modes]
    model = nn.Sequential(*layers, nn.BatchNorm2d(4), nn.ReLU())
    ops = exported(settled(model, 4, 4, 8, 9), torch.randn(2, 4, 8, 9), tmp_path / "net.onnx")
    assert [op for op in ops if "Conv" in op] == ["ListsConv", "ListsConv", "ListsConvRelu"]
    assert "BatchNormalization" not in ops


class Twice(nn.Module):
    """One weight between different batch norms, and with different strides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4, 3, padding=1)
        self.one, self.two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        x = self.two(self.conv(torch.relu(self.one(self.conv(x)))))
        x = nn.functional.max_pool2d(self.conv(x.sin()), 2, ceil_mode=True)
        self.conv.stride = (2, 1)
        x = self.conv(x)
        self.conv.stride = (1, 1)
        return x


def test_one_weight_in_several_places(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    ops = exported(settled(Twice(), 4, 4, 7, 7), torch.randn(2, 4, 7, 7), path)
    assert ops == ["ListsConvRelu", "ListsConv", "Sin", "ListsConv", "MaxPool", "ListsConv"]
    # Two that were folded, and one for the other two places.
    names = [t.name for t in onnx.load(path).graph.initializer]
    assert sum(name.endswith("sparse.values") for name in names) == 3
