"""Export from torch: what is in the file, what it computes, and what is refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spfmt
from spfmt.errors import FormatError, SpfmtError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from format_cases import LAYOUTS  # noqa: E402
from onnx import inliner  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx_cases import bias_of, weight  # noqa: E402
from torch import nn  # noqa: E402

import spfmt.onnx as sonnx  # noqa: E402
from spfmt.torch import SparseLinear  # noqa: E402


def layer(format: str, rows: int, cols: int, *, bias: bool = True, spare: int = 0) -> Any:
    tensor = weight(format, rows, cols)
    offset = torch.from_numpy(bias_of(tensor)) if bias else None
    return SparseLinear.from_tensor(tensor, offset, capacity=tensor.nnz + spare)


def network() -> Any:
    shared = layer("csr", 19, 19, bias=False)
    return nn.Sequential(
        layer("condensed", 19, 21),
        nn.ReLU(),
        shared,
        nn.LayerNorm(19),
        nn.Dropout(),
        shared,
        layer("nm", 24, 19, bias=False),
        nn.GELU(),
        layer("shuffled_block", 33, 24),
        nn.Linear(33, 19),
        layer("hrbp", 10, 19),
    )


def only_input(path: Path) -> str:
    return str(onnx.load(path).graph.input[0].name)


@pytest.mark.parametrize("example", [(1, 21), (4, 21), (3, 5, 21)])
def test_export_of_a_whole_network(example: tuple[int, ...], tmp_path: Path) -> None:
    model = network()
    path = sonnx.export(model, torch.zeros(example), tmp_path / "net.onnx")
    assert path == tmp_path / "net.onnx"
    assert model.training
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    fused = {"ListsLinearRelu", "ListsLinearGelu"}
    assert {f.name for f in proto.functions} == {"ListsLinear", "GroupsLinear", *fused}
    model.eval()
    for batch in (0, 1, 17):
        x = torch.randn(batch, *example[1:])
        feeds = {only_input(path): x.numpy()}
        expected = model(x).detach().numpy()
        runs = [
            sonnx.session(path).run(None, feeds)[0],
            sonnx.session(path, library=False).run(None, feeds)[0],
            ReferenceEvaluator(proto).run(None, feeds)[0] if batch else expected,
        ]
        for got in runs:
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    ran = {run.op_type for run in sonnx.kernels_run(path, feeds)}
    assert ran >= {"ListsLinear", "GroupsLinear", *fused}


def test_export_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sonnx.export(network(), torch.zeros(2, 21), tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")


def test_training_data_stays_out_of_the_file(tmp_path: Path) -> None:
    model = layer("condensed", 37, 19, spare=10_000)
    with torch.no_grad():
        model.values[-10_000:] = 7.0  # whatever a tail holds, it is not part of the weight
    proto = onnx.load(sonnx.export(model, torch.zeros(2, 19), tmp_path / "net.onnx"))
    sizes = {t.name: int(np.prod(t.dims)) for t in proto.graph.initializer}
    tensor = weight("condensed", 37, 19)
    assert sum(sizes.values()) == 2 * tensor.nnz + 38 + 37
    assert not proto.graph.metadata_props
    assert not any(node.metadata_props for node in proto.graph.node)


def test_layers_that_share_a_weight_share_it_in_the_file(tmp_path: Path) -> None:
    proto = onnx.load(sonnx.export(network(), torch.zeros(2, 21), tmp_path / "net.onnx"))
    used = [node.input[1:] for node in proto.graph.node if node.op_type == "ListsLinear"]
    assert len(used) > len({tuple(inputs) for inputs in used})


def test_export_of_float64(tmp_path: Path) -> None:
    model = nn.Sequential(layer("condensed", 19, 21), nn.ReLU(), layer("hrbp", 10, 19)).double()
    path = sonnx.export(model, torch.zeros(2, 21, dtype=torch.float64), tmp_path / "net.onnx")
    x = torch.randn(5, 21, dtype=torch.float64)
    got = sonnx.session(path).run(None, {only_input(path): x.numpy()})[0]
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-12, atol=1e-12)


def test_export_of_half_precision_is_refused(tmp_path: Path) -> None:
    model = layer("csr", 13, 21).half()
    with pytest.raises(SpfmtError):
        sonnx.export(model, torch.zeros(2, 21, dtype=torch.float16), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_inlined_files_are_plain(tmp_path: Path) -> None:
    model = network().eval()
    path = sonnx.export(model, torch.zeros(2, 21), tmp_path / "net.onnx", inline=True)
    proto = onnx.load(path)
    assert not proto.functions
    used = {name for node in proto.graph.node for name in node.input}
    assert all(used.intersection(n.output) for n in proto.graph.node if n.op_type == "Constant")
    assert {opset.domain for opset in proto.opset_import} == {""}
    x = torch.randn(5, 21)
    got = sonnx.session(path, library=False).run(None, {only_input(path): x.numpy()})[0]
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_fixed_batch_and_names(tmp_path: Path) -> None:
    path = sonnx.export(
        layer("nm", 13, 21),
        torch.zeros(3, 21),
        tmp_path / "net.onnx",
        dynamic_batch=False,
        input_names=["pixels"],
        output_names=["logits"],
        opset=20,
    )
    session = sonnx.session(path)
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("pixels", [3, 21])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", [3, 13])]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = layer("nm", 13, 21), layer("csr", 13, 19)

    def forward(self, left: Any, *, right: Any) -> Any:
        return self.one(left) + self.two(right)


def test_keyword_inputs(tmp_path: Path) -> None:
    model = TwoInputs()
    path = sonnx.export(
        model, torch.zeros(1, 21), tmp_path / "net.onnx", kwargs={"right": torch.zeros(1, 19)}
    )
    left, right = torch.randn(6, 21), torch.randn(6, 19)
    feeds = {"left": left.numpy(), "right": right.numpy()}
    got = sonnx.session(path).run(None, feeds)[0]
    expected = model(left, right=right).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = layer("nm", 13, 21), layer("hrbp", 13, 21)

    def forward(self, x: Any) -> Any:
        return torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.two(x), (x,))


def test_layers_inside_branches(tmp_path: Path) -> None:
    path = sonnx.export(Branches(), torch.randn(2, 21), tmp_path / "net.onnx")
    for sign, op_type in [(1, "ListsLinear"), (-1, "GroupsLinear")]:
        feeds = {only_input(path): np.full((3, 21), sign, np.float32)}
        assert op_type in {run.op_type for run in sonnx.kernels_run(path, feeds)}
        fast, body = (sonnx.session(path, library=lib).run(None, feeds)[0] for lib in (True, False))
        np.testing.assert_allclose(fast, body, rtol=1e-5, atol=1e-5)


class Untranslatable(nn.Module):
    def forward(self, x: Any) -> Any:
        return x if x.sum() > 0 else -x  # a branch that only running the model tells


def test_a_module_that_cannot_be_exported(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"what was there")
    model = nn.Sequential(layer("nm", 13, 21), Untranslatable())
    with pytest.raises(sonnx.ExportError, match="cannot translate") as caught:
        sonnx.export(model, torch.zeros(2, 21), path)
    assert "\x1b" not in str(caught.value)
    assert "GuardOnDataDependentSymNode" in str(caught.value)[:150]  # the cause comes first
    assert path.read_bytes() == b"what was there"
    assert model.training


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = layer("nm", 13, 21)

    def forward(self, x: Any) -> Any:
        values = self.inner.values * x.sum()
        return torch.ops.spfmt.spmm(values, self.inner.structure, x, None, [13, 21])


def test_computed_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(sonnx.ExportError, match="whose weight the graph computes"):
        sonnx.export(Computed(), torch.zeros(2, 21), tmp_path / "net.onnx")


def test_an_opset_that_is_too_old_or_too_new(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="opset=17"):
        sonnx.export(network(), torch.zeros(2, 21), tmp_path / "net.onnx", opset=17)
    with pytest.raises(FormatError, match="opset=99"):
        sonnx.export(network(), torch.zeros(2, 21), tmp_path / "net.onnx", opset=99)


def test_a_path_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["spfmt.onnx.export"], "_translate", None)  # is not reached
    with pytest.raises(FileNotFoundError, match=r"make '.*missing' first"):
        sonnx.export(network(), torch.zeros(2, 21), tmp_path / "missing" / "net.onnx")
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(IsADirectoryError, match=r"net\.onnx', a folder"):
        sonnx.export(network(), torch.zeros(2, 21), tmp_path / "net.onnx")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="writable"):
        sonnx.export(network(), torch.zeros(2, 21), tmp_path / "other.onnx")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        sonnx.export(layer("nm", 13, 21), torch.zeros(2, 21), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_names_that_do_not_fit(tmp_path: Path) -> None:
    model, x, path = layer("nm", 13, 21), torch.zeros(2, 21), tmp_path / "net.onnx"
    with pytest.raises(FormatError, match="input_names='x'"):
        sonnx.export(model, x, path, input_names="x")
    with pytest.raises(FormatError, match="output_names"):
        sonnx.export(model, x, path, output_names=["y", "z"])


def test_a_compiled_model(tmp_path: Path) -> None:
    model = layer("nm", 13, 21)
    path = sonnx.export(
        torch.compile(model, backend="eager"), torch.zeros(1, 21), tmp_path / "net.onnx"
    )
    assert sonnx.session(path).get_inputs()[0].shape == ["batch", 21]


class FromDictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = layer("nm", 13, 21)

    def forward(self, inputs: Any) -> Any:
        return self.inner(inputs["left"]) - self.inner(inputs["right"])


def test_a_dictionary_of_inputs(tmp_path: Path) -> None:
    example = {"left": torch.zeros(1, 21), "right": torch.zeros(1, 21)}
    path = sonnx.export(FromDictionary(), (example,), tmp_path / "net.onnx")
    assert [i.shape for i in sonnx.session(path).get_inputs()] == [["batch", 21]] * 2


def test_public_names() -> None:
    assert spfmt.onnx is sonnx
    for name in sonnx.__all__:
        assert hasattr(sonnx, name)


ACTIVATIONS = {
    "Relu": (nn.ReLU(), torch.nn.functional.relu),
    "Gelu": (nn.GELU(), torch.nn.functional.gelu),
    "GeluTanh": (
        nn.GELU(approximate="tanh"),
        lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    ),
    "Silu": (nn.SiLU(), torch.nn.functional.silu),
}


class Calls(nn.Module):
    """An activation as a function instead of a module."""

    def __init__(self, inner: Any, function: Any) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: Any) -> Any:
        return self.function(self.inner(x))


def op_types(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def check_file(path: Path, model: Any, x: Any, rtol: float) -> None:
    """The file computes what the model does: with our kernels, without, and in onnx's reference."""
    feeds = {only_input(path): x.numpy()}
    expected = model(x).detach().numpy()
    for got in (
        sonnx.session(path).run(None, feeds)[0],
        sonnx.session(path, library=False).run(None, feeds)[0],
        ReferenceEvaluator(onnx.load(path)).run(None, feeds)[0],
    ):
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("suffix", ACTIVATIONS)
@pytest.mark.parametrize("format", LAYOUTS.values())
def test_activations_join_the_product(format: str, suffix: str, tmp_path: Path) -> None:
    module, _ = ACTIVATIONS[suffix]
    model = nn.Sequential(layer(format, 24, 21), module)
    path = sonnx.export(model, torch.zeros(2, 21), tmp_path / "net.onnx")
    tensor_layout = model[0].tensor().layout().name
    fused = sonnx.OPERATORS[tensor_layout].op_type + suffix
    assert op_types(path) == [fused]
    for batch in (1, 17):
        x = torch.randn(batch, 21)
        check_file(path, model, x, 1e-5)
    feeds = {only_input(path): x.numpy()}
    assert [run.op_type for run in sonnx.kernels_run(path, feeds)] == [fused]


@pytest.mark.parametrize("suffix", ACTIVATIONS)
def test_activations_in_float64_and_later_opsets(suffix: str, tmp_path: Path) -> None:
    module, _ = ACTIVATIONS[suffix]
    model = nn.Sequential(layer("csr", 24, 21), module).double()
    example = torch.zeros(2, 21, dtype=torch.float64)
    path = sonnx.export(model, example, tmp_path / "net.onnx", opset=21)
    assert op_types(path) == ["ListsLinear" + suffix]
    x = torch.randn(17, 21, dtype=torch.float64)
    if suffix != "Gelu":
        check_file(path, model, x, 1e-12)
        return
    # ONNX Runtime itself has no Erf in float64, fused or not.
    got = sonnx.session(path).run(None, {only_input(path): x.numpy()})[0]
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-12, atol=1e-12)
    with pytest.raises(SpfmtError, match="Erf"):
        sonnx.session(path, library=False)


@pytest.mark.parametrize("suffix", ACTIVATIONS)
def test_activations_join_through_reshapes_and_calls(suffix: str, tmp_path: Path) -> None:
    _, function = ACTIVATIONS[suffix]
    model = Calls(layer("nm", 24, 21), function)
    path = sonnx.export(model, torch.zeros(2, 3, 21), tmp_path / "net.onnx")
    assert op_types(path) == ["Reshape", "ListsLinear" + suffix, "Reshape"]
    check_file(path, model, torch.randn(5, 3, 21), 1e-5)
    plain = sonnx.export(model, torch.zeros(2, 3, 21), tmp_path / "plain.onnx", inline=True)
    assert not onnx.load(plain).functions
    check_file(plain, model, torch.randn(5, 3, 21), 1e-5)


@pytest.mark.parametrize("suffix", ACTIVATIONS)
def test_activations_stay_apart_where_the_sum_is_read_again(suffix: str, tmp_path: Path) -> None:
    module, function = ACTIVATIONS[suffix]
    model = Calls(layer("nm", 24, 21), lambda z: z + function(z))
    path = sonnx.export(model, torch.zeros(2, 21), tmp_path / "net.onnx")
    assert op_types(path)[0] == "ListsLinear"
    assert len(op_types(path)) > 2
    check_file(path, model, torch.randn(5, 21), 1e-5)
    dense = nn.Sequential(nn.Linear(21, 21), module, layer("nm", 24, 21), nn.LayerNorm(24), module)
    path = sonnx.export(dense, torch.zeros(2, 21), tmp_path / "dense.onnx")
    assert [name for name in op_types(path) if "Linear" in name] == ["ListsLinear"]
    assert {f.name for f in onnx.load(path).functions} == {"ListsLinear"}
    check_file(path, dense, torch.randn(5, 21), 1e-5)


def test_activations_of_outputs_and_chains(tmp_path: Path) -> None:
    """The product is an output itself; a second activation has no product left to join."""
    model = Calls(layer("csr", 24, 21), lambda z: (z, torch.relu(z)))
    path = sonnx.export(model, torch.zeros(2, 21), tmp_path / "net.onnx")
    assert op_types(path) == ["ListsLinear", "Relu"]
    model = Calls(layer("csr", 24, 21), lambda z: torch.relu(torch.nn.functional.silu(z)))
    path = sonnx.export(model, torch.zeros(2, 21), tmp_path / "chain.onnx")
    assert op_types(path) == ["ListsLinearSilu", "Relu"]
    check_file(path, model, torch.randn(5, 21), 1e-5)


class BranchesWithActivations(Branches):
    def forward(self, x: Any) -> Any:
        one = lambda x: torch.relu(self.one(x))  # noqa: E731
        return torch.cond(x.sum() > 0, one, lambda x: self.two(x), (x,))


def test_activations_inside_branches(tmp_path: Path) -> None:
    model = BranchesWithActivations()
    path = sonnx.export(model, torch.randn(2, 21), tmp_path / "net.onnx")
    for sign, op_type in [(1, "ListsLinearRelu"), (-1, "GroupsLinear")]:
        feeds = {only_input(path): np.full((3, 21), sign, np.float32)}
        assert op_type in {run.op_type for run in sonnx.kernels_run(path, feeds)}
        fast, body = (sonnx.session(path, library=lib).run(None, feeds)[0] for lib in (True, False))
        np.testing.assert_allclose(fast, body, rtol=1e-5, atol=1e-5)


def test_fused_calls_are_exported_fused(tmp_path: Path) -> None:
    model = Calls(layer("hrbp", 24, 21), lambda z: z)
    model.forward = lambda x: model.inner(x, activation="gelu")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    path = sonnx.export(model, torch.zeros(2, 21), tmp_path / "net.onnx")
    assert op_types(path) == ["GroupsLinearGelu"]
    check_file(path, model, torch.randn(5, 21), 1e-5)


# ------------------------------------------------------------------------------- other tools


def test_wrappers_that_take_any_arguments_have_a_dynamic_batch(tmp_path: Path) -> None:
    model = torch.optim.swa_utils.AveragedModel(nn.Sequential(layer("csr", 24, 21)))
    path = sonnx.export(model, (torch.zeros(4, 21),), tmp_path / "net.onnx")
    check_file(path, model.eval(), torch.randn(9, 21), 1e-5)


def test_an_input_without_a_batch_is_explained(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer("csr", 24, 21)

        def forward(self, x: Any, mask: Any) -> Any:
            return self.inner(x) * mask

    inputs = (torch.randn(4, 7, 21), torch.randn(7, 24))
    with pytest.raises(sonnx.ExportError, match="dynamic_shapes"):
        sonnx.export(Masked(), inputs, tmp_path / "net.onnx")
    shapes = ({0: "batch"}, None)
    sonnx.export(Masked(), inputs, tmp_path / "net.onnx", dynamic_shapes=shapes)


def test_the_dense_rest_can_be_quantized(tmp_path: Path) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    model = nn.Sequential(layer("csr", 24, 21), nn.ReLU(), nn.Linear(24, 8))
    path = sonnx.export(model, torch.zeros(2, 21), tmp_path / "net.onnx")
    quantization.quantize_dynamic(path, tmp_path / "quantized.onnx")
    assert {"ListsLinearRelu", "MatMulInteger"} <= set(op_types(tmp_path / "quantized.onnx"))
    sonnx.session(tmp_path / "quantized.onnx")


def test_a_file_that_a_tool_made_dense_is_noticed(tmp_path: Path) -> None:
    path = sonnx.export(layer("csr", 24, 21), torch.zeros(2, 21), tmp_path / "net.onnx")
    sonnx.session(path)  # no warning
    dense = inliner.inline_local_functions(onnx.load(path))
    onnx.save(dense, tmp_path / "dense.onnx")
    with pytest.warns(UserWarning, match=r"exported with 1 sparse layers and has none"):
        sonnx.session(tmp_path / "dense.onnx")
    with pytest.warns(UserWarning, match="none any more"):
        sonnx.session((tmp_path / "dense.onnx").read_bytes())
    sonnx.session(tmp_path / "dense.onnx", library=False)


def test_options_on_which_the_library_is_registered_are_explained(tmp_path: Path) -> None:
    path = sonnx.export(layer("csr", 24, 21), torch.zeros(2, 21), tmp_path / "net.onnx")
    options = ort.SessionOptions()
    options.register_custom_ops_library(sonnx.library_path())
    with pytest.raises(SpfmtError, match=r"spfmt\.onnx\.register\(options\)"):
        sonnx.session(path, session_options=options)


def test_files_in_float16_are_explained(tmp_path: Path) -> None:
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    path = sonnx.export(layer("csr", 24, 21), torch.zeros(2, 21), tmp_path / "net.onnx")
    convert = float16.convert_float_to_float16
    onnx.save(convert(onnx.load(path), keep_io_types=True), tmp_path / "half.onnx")
    with pytest.raises(SpfmtError, match="op_block_list"):
        sonnx.session(tmp_path / "half.onnx")
    kept = convert(onnx.load(path), keep_io_types=True, op_block_list=[*sonnx.OP_TYPES])
    onnx.save(kept, tmp_path / "kept.onnx")
    sonnx.session(tmp_path / "kept.onnx")
