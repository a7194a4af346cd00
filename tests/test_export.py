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

from onnx.reference import ReferenceEvaluator  # noqa: E402
from onnx_cases import (  # noqa: E402
    OP_TYPES,
    bias_of,
    weight,
)
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
    assert {f.name for f in proto.functions} == set(OP_TYPES.values())
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
    assert ran >= set(OP_TYPES.values())


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
    assert sum(sizes.values()) == 2 * tensor.nnz + 35 + 37
    assert not proto.graph.metadata_props
    assert not any(node.metadata_props for node in proto.graph.node)


def test_layers_that_share_a_weight_share_it_in_the_file(tmp_path: Path) -> None:
    proto = onnx.load(sonnx.export(network(), torch.zeros(2, 21), tmp_path / "net.onnx"))
    used = [node.input[1:] for node in proto.graph.node if node.op_type == "CSRLinear"]
    assert len(used) == 2
    assert used[0] == used[1]


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
        self.one, self.two = layer("nm", 13, 21), layer("csr", 13, 21)

    def forward(self, x: Any) -> Any:
        return torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.two(x), (x,))


def test_layers_inside_branches(tmp_path: Path) -> None:
    path = sonnx.export(Branches(), torch.randn(2, 21), tmp_path / "net.onnx")
    for sign, op_type in [(1, "NMLinear"), (-1, "CSRLinear")]:
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
        return torch.ops.spfmt.spmm(values, self.inner.structure, x, None, [13, 21], "nm")


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
