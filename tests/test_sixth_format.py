"""A format in one file works everywhere: this is one, and nothing else knows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spfmt
from spfmt.formats import FORMATS, Lists, SparseTensor, Structure, register

torch = pytest.importorskip("torch")

from spfmt.torch import SparseLinear, sparsify  # noqa: E402
from spfmt.train import SET  # noqa: E402

# torch.compile imports parts of torch that use its own deprecated torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Banded(SparseTensor):
    """Every row holds a run of `width` columns around its own place on the diagonal."""

    __slots__ = ()
    format = "banded"
    STRUCTURE = ("first",)
    NDIMS = (1,)
    PARAMS = ("width",)

    def __init__(self, shape: Any, width: int, first: Any, values: Any) -> None:
        self._init(shape, {"first": first}, {"width": width}, values)

    @classmethod
    def _check(cls, s: Structure) -> None:
        rows, cols = s.matrix_shape
        first, width = s["first"], s.params["width"]
        if first.size != rows or (rows and (first.min() < 0 or first.max() + width > cols)):
            raise spfmt.FormatError("got a run outside; expected runs inside; fix: move it")

    @classmethod
    def _values_shape(cls, s: Structure) -> tuple[int, ...]:
        return s.matrix_shape[0], s.params["width"]

    @classmethod
    def _lower(cls, s: Structure) -> Lists:
        width = s.params["width"]
        columns = s["first"][:, None] + np.arange(width, dtype=np.int32)
        indptr = np.arange(s.matrix_shape[0] + 1, dtype=np.int64) * width
        return Lists(*s.matrix_shape, indptr, columns.reshape(-1).astype(np.int32))

    @classmethod
    def _most_words(cls, shape: Any, nnz: int, params: Mapping[str, int]) -> int:
        return int(shape[0])

    @classmethod
    def _from_coordinates(cls, coords: Any, *, width: int | None = None) -> Banded:
        rows, cols = coords.matrix_shape
        low, high = np.full(rows, cols), np.zeros(rows, int)
        np.minimum.at(low, coords.rows, coords.cols)
        np.maximum.at(high, coords.rows, coords.cols + 1)
        wide = int((high - np.minimum(low, high)).max(initial=0)) if width is None else width
        first = np.clip(np.minimum(low, cols), 0, max(0, cols - wide))
        return cls._fill(coords, {"first": first}, {"width": wide})

    @classmethod
    def from_dense(cls, w: Any, mask: Any = None, *, width: int | None = None) -> Banded:
        from spfmt.formats import Coordinates

        return cls._from_coordinates(Coordinates.of_dense(w, mask), width=width)

    @classmethod
    def from_scores(cls, scores: Any, density: float, *, values: Any = None) -> Banded:
        matrix = np.asarray(scores, np.float64)
        rows, cols = matrix.shape
        width = max(1, round(density * cols))
        sums = np.cumsum(np.pad(matrix, ((0, 0), (1, 0))), axis=1)
        first = np.argmax(sums[:, width:] - sums[:, :-width], axis=1)
        return cls._found(matrix, (rows, cols), {"first": first}, {"width": width}, values)

    def _summary(self) -> str:
        return f"width={self._structure.params['width']}"


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    register(Banded)
    yield
    del FORMATS["banded"]


@pytest.fixture
def a() -> Banded:
    scores = np.random.default_rng(0).standard_normal((40, 32)).astype("float32")
    return Banded.from_scores(abs(scores), 0.2, values=scores)


def test_products_files_and_conversions(a: Banded, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((32, 7)).astype("float32")
    np.testing.assert_allclose(a @ x, a.to_dense() @ x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        spfmt.spmm(a, x), spfmt.spmm(a, x, backend="reference"), rtol=1e-4, atol=1e-5
    )
    a.save(tmp_path / "a.safetensors")
    assert spfmt.load(tmp_path / "a.safetensors") == a
    assert spfmt.formats.decode_structure(a.encode()).same_as(a._structure)
    assert spfmt.convert(spfmt.convert(a, "csr"), "banded") == a


def test_layers_train_move_compile_and_save() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 40), torch.nn.ReLU(), torch.nn.Linear(40, 8))
    report = sparsify(model, "banded", density=0.2, scores="random", reset=True)
    assert len(report.taken) == 2
    assert "banded" in str(report)
    optimizer = torch.optim.AdamW(model.parameters())
    method = SET(model, optimizer, delta_t=1, total_steps=8)
    x = torch.randn(16, 32)
    moved = []
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        moved.append(method.step())
    assert any(moved)
    assert "banded" in str(method.summary())
    y = model(x).detach()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x).detach(), y)
    dense = torch.nn.functional.linear(x, torch.from_numpy(model[0].tensor().to_dense()))
    torch.testing.assert_close(model[0](x) - model[0].bias, dense, rtol=1e-4, atol=1e-5)
    fresh = SparseLinear(32, 40, format="banded", density=0.2)
    fresh.load_state_dict(model[0].state_dict())
    torch.testing.assert_close(fresh(x), model[0](x))


def test_export_to_onnx(a: Banded, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    layer = SparseLinear.from_tensor(a)
    x = torch.randn(5, 32)
    path = spfmt.onnx.export(layer, (x,), tmp_path / "a.onnx")
    feeds = {"x": x.numpy()}
    (run,) = spfmt.onnx.kernels_run(path, feeds)
    assert run.op_type == "ListsLinear"
    got = spfmt.onnx.session(path).run(None, feeds)[0]
    np.testing.assert_allclose(got, layer(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_advice(a: Banded) -> None:
    by = {c.format: c for c in spfmt.advise(a, batch=8).candidates}
    assert by["banded"].description == "as it is"
    assert "banded" in str(spfmt.advise((64, 64), 0.1, formats=["banded"]))


def test_command_line(a: Banded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from spfmt.cli import main

    a.save(tmp_path / "a.safetensors")
    main(["inspect", str(tmp_path / "a.safetensors")])
    assert "Banded" in capsys.readouterr().out


def test_bench() -> None:
    from spfmt.bench import Case, Session, parse_spec

    session = Session(0.0)
    rows = session.measure(Case((40, 32), 0.25, 3), [parse_spec("banded")], dense=False)
    assert {row.name for row in rows} == {"banded"}
    assert {row.density for row in rows} == {0.25}
    with pytest.raises(spfmt.FormatError, match="banded:3"):
        parse_spec("banded:3")


def test_figures_draw_it() -> None:
    pytest.importorskip("matplotlib")
    from spfmt.bench.figures import _style

    assert _style()["banded"][2] == "banded"
