"""What is added to a convolution's result goes into its node, where it is the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_cases import LAYOUTS, MAKERS

from spfmt.activations import ACTIVATIONS, apply_activation
from spfmt.convolution import Convolution, conv2d

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from fresh_python import run_python  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402
from onnx_cases import bias_of, run_everywhere  # noqa: E402
from torch import nn  # noqa: E402

import spfmt.onnx as sonnx  # noqa: E402
from spfmt.onnx.functions import op_type  # noqa: E402
from spfmt.torch import SparseConv2d  # noqa: E402

# shape of the weight, options, batch, (H, W): pixels and images as lanes, strips, small maps
CASES: list[tuple[tuple[int, ...], dict[str, Any], int, tuple[int, int]]] = [
    ((18, 5, 3, 3), {"padding": 1}, 3, (7, 9)),
    ((33, 4, 3, 3), {"padding": 1, "stride": 2}, 18, (6, 7)),
    ((20, 7, 3, 3), {"padding": 1}, 25, (2, 2)),
    ((17, 8, 1, 1), {}, 2, (4, 8)),
    ((16, 2, 3, 3), {"groups": 4, "padding": 1}, 2, (5, 6)),
    ((4, 30, 3, 3), {"padding": 1}, 1, (40, 900)),
]


def residual(
    layout: str, case: int, activation: str | None = None, dtype: Any = np.float32
) -> tuple[Any, dict[str, Any], Any]:
    """A model ``f(conv(x) + z)``, its inputs, and what separate operations give."""
    shape, options, batch, size = CASES[case]
    rng = np.random.default_rng(case)
    tensor = MAKERS[LAYOUTS[layout]](shape, rng).astype(dtype)
    how, bias = Convolution.of(shape, **options), bias_of(tensor)
    x = rng.standard_normal((batch, shape[1] * how.groups, *size)).astype(dtype)
    y = conv2d(tensor, x, bias=bias, **options)
    z = rng.standard_normal(y.shape).astype(dtype)
    want = y + z if activation is None else apply_activation(activation, y + z)
    node, tensors = sonnx.make_node(tensor, "x", "bias", "y", name="layer", convolution=how)
    node.op_type = op_type(layout, activation, convolution=True, adds=True)
    node.input.append("z")
    kind = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    info = helper.make_tensor_value_info
    inputs = [info("x", kind, ["n", *x.shape[1:]]), info("z", kind, ["n", *z.shape[1:]])]
    graph = helper.make_graph(
        [node], "residual", inputs, [info("y", kind, ["n", *z.shape[1:]])],
        [*tensors, numpy_helper.from_array(bias, "bias")],
    )  # fmt: skip
    bodies = [sonnx.function(layout, convolution=True)]
    bodies.append(sonnx.function(layout, convolution=True, adds=True))
    if activation:
        bodies.append(sonnx.function(layout, activation=activation, convolution=True, adds=True))
    opsets = [
        helper.make_opsetid("", sonnx.MIN_OPSET),
        helper.make_opsetid(sonnx.DOMAIN, sonnx.VERSION),
    ]
    model = helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=8)
    return model, {"x": x, "z": z}, want


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_those_of_separate_operations_to_the_bit(layout: str, case: int) -> None:
    for dtype in (np.float32, np.float64):
        for activation in (None, "relu"):
            model, inputs, want = residual(layout, case, activation, dtype)
            for threads in (1, 2):
                session = sonnx.session(model.SerializeToString(), threads=threads)
                np.testing.assert_array_equal(session.run(None, inputs)[0], want)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_runtime_agrees(layout: str, activation: str | None) -> None:
    model, inputs, want = residual(layout, 0, activation)
    onnx.checker.check_model(model, full_check=True)
    for got in run_everywhere(model, **inputs).values():
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_level_adds(layout: str) -> None:
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import numpy as np, spfmt.onnx as sonnx
        from test_onnx_residual import CASES, residual
        for case in range(len(CASES)):
            for activation in (None, "relu", "silu"):
                model, inputs, want = residual({layout!r}, case, activation)
                got = sonnx.session(model.SerializeToString()).run(None, inputs)[0]
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        """
    import spfmt.dispatch as dispatch

    for level in dispatch.LEVELS[: dispatch.LEVELS.index(dispatch.active_isa()) + 1]:
        result = run_python(code, SPFMT_ISA=level)
        assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_addend_of_another_shape_is_refused(layout: str) -> None:
    model, inputs, _ = residual(layout, 0)
    del model.graph.input[1].type.tensor_type.shape.dim[:]
    model.graph.input[1].type.tensor_type.ClearField("shape")
    session = sonnx.session(model.SerializeToString())
    with pytest.raises(Exception, match="addend: expected the shape of Y"):
        session.run(None, {"x": inputs["x"], "z": inputs["z"][:, :, :1]})


# --------------------------------------------------------------------------------- export


class Block(nn.Module):
    """A residual block; `how` says what is added, and who else looks."""

    def __init__(self, how: str = "identity", format: str = "csr") -> None:
        super().__init__()
        torch.manual_seed(3)
        options: dict[str, Any] = {"padding": 1, "format": format, "density": 0.4}
        self.how = how
        self.conv1, self.bn1 = SparseConv2d(16, 16, 3, **options), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = SparseConv2d(16, 16, 3, **options), nn.BatchNorm2d(16)
        self.shortcut = SparseConv2d(16, 16, 1, format=format, density=0.4)
        self.scale = nn.Parameter(torch.randn(16, 1, 1))
        self.relu = nn.ReLU()
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x: Any) -> Any:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.how == "identity":
            return self.relu(y + x)
        if self.how == "turned":
            return self.relu(x + y)
        if self.how == "two convolutions":
            return self.relu(y + self.shortcut(x))
        if self.how == "broadcast":
            return self.relu(y + self.scale)
        if self.how == "itself":
            return self.relu(y + y)
        if self.how == "activated first":
            return self.relu(y) + x
        return self.relu(y + x), y  # read twice


def exported(block: Block, path: Path) -> tuple[list[str], Any]:
    """Operators of the file; its answer is compared with torch's."""
    block.eval()
    x = torch.randn(3, 16, 6, 7)
    sonnx.export(block, (x,), path)
    with torch.no_grad():
        want = block(x)
    for library in (True, False):
        got = sonnx.session(path, library=library).run(None, {"x": x.numpy()})
        for a, b in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
            np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-4)
    model = onnx.load(path)
    return [node.op_type for node in model.graph.node], model


@pytest.mark.parametrize("format", ["csr", "shuffled_block"])
@pytest.mark.parametrize("how", ["identity", "turned"])
def test_a_residual_block_is_two_nodes(how: str, format: str, tmp_path: Path) -> None:
    ops, model = exported(Block(how, format), tmp_path / "block.onnx")
    prefix = "Lists" if format == "csr" else "Groups"
    assert ops == [f"{prefix}ConvRelu", f"{prefix}ConvAddRelu"]
    assert model.graph.node[1].input[-1] == model.graph.input[0].name


def test_of_two_convolutions_the_later_one_adds(tmp_path: Path) -> None:
    ops, _ = exported(Block("two convolutions"), tmp_path / "block.onnx")
    assert sorted(ops) == ["ListsConv", "ListsConvAddRelu", "ListsConvRelu"]


@pytest.mark.parametrize("how", ["broadcast", "itself", "activated first", "read twice"])
def test_other_sums_stay_nodes(how: str, tmp_path: Path) -> None:
    ops, _ = exported(Block(how), tmp_path / "block.onnx")
    assert "Add" in ops
    assert not any("ConvAdd" in op for op in ops)


def test_plain_runtimes_fold_a_residual_as_they_do_dense_ones(tmp_path: Path) -> None:
    block = Block().eval()
    sonnx.export(block, (torch.randn(2, 16, 6, 7),), tmp_path / "block.onnx")
    settings = ort.SessionOptions()
    settings.optimized_model_filepath = str(tmp_path / "folded.onnx")
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    sonnx.session(tmp_path / "block.onnx", library=False, session_options=settings)
    folded = [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node]
    assert folded.count("FusedConv") + folded.count("Conv") == 2
    assert not any("Scatter" in op for op in folded)
