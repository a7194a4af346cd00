"""The cost model on convolutions: what it counts, what it ranks, who asks it. Nothing is timed."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from format_cases import MAKERS
from test_advise import model

import spfmt
from spfmt import cost
from spfmt.convolution import Convolution
from spfmt.cost import CostModel

kernels = cost._kernels
SHAPE = (64, 32, 3, 3)
LAYOUTS = {"lists": "csr", "groups": "shuffled_block"}


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = cost.cost_model()
    yield
    cost.use(before)


def seconds(advice: spfmt.Advice, name: str) -> float:
    return next(c.seconds for c in advice.candidates if c.format == name)


def terms(layout: str, op: str, batch: int, size: int = 8, **options: int) -> list[float]:
    """Count a product of a 16 x 4 x 3 x 3 weight with 96 nonzeros, in 6 vectors."""
    geometry = Convolution.of((16, 4, 3, 3), **options).geometry(size, size)
    summary = kernels.Summary(layout, 16, 36, 96, 6)
    found: list[float] = kernels.kernel_terms(
        model().coefficients, "images", summary, op, batch, "float32", geometry.numbers()
    )
    return found


# ------------------------------------------------------------------------------------ what counts


def test_groups_count_vectors_for_every_output() -> None:
    call, operands, stream, multiply, *_ = terms("groups", "conv2d", 5, padding=1)
    assert (call, stream, multiply) == (1, 6 * 5, 6 * 64 * 5)
    assert operands == 5 * (4 * 10 * 10 + 16 * 64) / 16
    assert terms("groups", "conv2d_weight", 5, padding=1)[3] == multiply
    # Strided: outputs of Y; of dX those of a phase, each of the four with its share of weights.
    assert terms("groups", "conv2d", 1, padding=1, stride=2)[3] == 6 * 16
    assert terms("groups", "conv2d_input", 1, padding=1, stride=2)[3] == 6 * 16


def test_bands_are_visited_once_for_every_group_of_the_convolution() -> None:
    one = terms("groups", "conv2d", 1, padding=1)
    four = terms("groups", "conv2d", 1, padding=1, groups=4)
    assert four[3] == 4 * one[3]
    assert terms("groups", "conv2d", 1, padding=1, groups=16)[3] == 16 * one[3]
    assert four[1] > one[1]  # as many channels of X for each group


def test_lists_count_sixteen_images_at_once() -> None:
    few = [terms("lists", "conv2d", n, padding=1)[3] for n in (8, 9, 16)]
    assert few == [96 * 64] * 3  # vectors: images side by side, eight fill half of one
    assert terms("lists", "conv2d", 17, padding=1)[3] == 96 * (64 + math.ceil((7 * 10 + 8) / 16))
    # Alone, vectors run over rows and the padding between them.
    assert terms("lists", "conv2d", 1, padding=1)[3] == 96 * math.ceil((7 * 10 + 8) / 16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", cost.CONVOLUTIONS)
def test_predictions_grow_with_the_work(layout: str, op: str) -> None:
    cost.use(CostModel(kernels.default_cost_model()))
    by_size = [terms(layout, op, 16, size, padding=1) for size in (4, 8, 16, 32)]
    assert (np.diff(by_size, axis=0)[:, [1, 3]] > 0).all()
    name = LAYOUTS[layout]
    found = [
        [
            seconds(
                spfmt.advise(SHAPE, d, batch=b, size=14, op=op, formats=[name], threads=1), name
            )
            for d in (0.1, 0.4)
        ]
        for b in (16, 32, 256)
    ]
    assert (np.diff(found, axis=0) > 0).all()
    assert (np.diff(found, axis=1) > 0).all()


def test_dense_takes_winograds_way_at_the_level_that_has_it() -> None:
    cost.use(model(dense__call=0.0))

    def dense(isa: str, op: str = "conv2d", **options: int) -> float:
        kernel = options.pop("kernel", 3)
        shape = (64, 64 // options.get("groups", 1), kernel, kernel)
        geometry = Convolution.of(shape, **options).geometry(16, 16)
        area = geometry.y[1] * geometry.x[1]
        found = kernels.dense_image_seconds(
            isa, op, 64, math.prod(shape[1:]), 1, geometry.numbers(), 1
        )
        return float(found / (math.prod(shape) / 16 * area * 1e-9))

    for op in cost.CONVOLUTIONS:
        assert dense("avx512", op) == pytest.approx(1 / 2.25)
        assert dense("avx2", op) == pytest.approx(1)
    for options in ({"stride": 2}, {"dilation": 2}, {"kernel": 5}, {"kernel": 1}, {"groups": 4}):
        assert dense("avx512", **options) == pytest.approx(1)


def test_a_forced_level_does_not_slow_dense_down(monkeypatch: pytest.MonkeyPatch) -> None:
    times = []
    for isa in ("scalar", None):
        monkeypatch.setenv("SPFMT_ISA", isa) if isa else monkeypatch.delenv("SPFMT_ISA")
        advice = spfmt.advise(SHAPE, 0.1, batch=8, size=14, threads=1)
        times.append((seconds(advice, "dense"), seconds(advice, "csr")))
    assert times[0][0] == times[1][0]
    assert times[0][1] > times[1][1] or spfmt.dispatch.active_isa() == "scalar"


# ------------------------------------------------------------------------------------ what wins


def test_sparse_wins_in_proportion_to_density_and_dense_where_it_is_faster() -> None:
    cost.use(model(winograd__call=1.0))  # with AVX-512 dense may multiply less than it has
    given = {"batch": 16, "size": (16, 16), "padding": 1, "formats": ["shuffled_block"]}
    speedups = [spfmt.advise(SHAPE, d, threads=1, **given).speedup for d in (0.5, 0.1, 0.05)]
    np.testing.assert_allclose(speedups, [2, 10, 20], rtol=0.25)
    cost.use(model(winograd__call=1.0, dense__multiply=0.2e-9))
    advice = spfmt.advise(SHAPE, 0.5, threads=1, **given)
    assert (advice.format, advice.variant, advice.speedup) == ("dense", "", 1.0)
    text = str(advice).splitlines()
    assert text[0].startswith("conv2d with a 64 x 32 x 3 x 3 weight on maps of 16 x 16, batch 16")
    assert text[0].endswith(": dense")
    assert text[2].startswith("dense ")
    assert "0.40x" in text[3]


def test_training_is_all_three_products() -> None:
    given = {"density": 0.2, "batch": 8, "size": 14, "threads": 1}
    parts = [spfmt.advise(SHAPE, op=op, **given) for op in cost.CONVOLUTIONS]
    whole = spfmt.advise(SHAPE, op="training", **given)
    assert {c.format for c in whole.candidates} == {*MAKERS, "dense"}
    for c in whole.candidates:
        assert c.seconds == pytest.approx(sum(seconds(part, c.format) for part in parts))
        used = set(c.variant.split("+"))
        assert used == {""} if c.format == "dense" else used <= {"images", "rows"}
    assert str(whole).startswith("training with a 64 x 32 x 3 x 3 weight on maps of 14 x 14")


def test_a_sparse_tensor_keeps_its_shape_through_conversions() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(SHAPE, np.float32)
    a = spfmt.NM.from_scores(scores, n=2, m=8, values=scores)
    advice = spfmt.advise(a, batch=4, size=9, stride=2)
    by = {c.format: c for c in advice.candidates}
    assert by["nm"].description == "as it is"
    assert by["csr"].description == "converted"
    assert advice.shape == SHAPE
    assert advice.geometry == Convolution.of(SHAPE, 2).geometry(9, 9)
    (csr,) = [c for c in spfmt.advise(a.to_dense(), size=9, formats=["csr"]).candidates
              if c.format == "csr"]  # fmt: skip
    assert csr.density == a.density


@pytest.mark.parametrize("op", [*cost.CONVOLUTIONS, "training"])
def test_large_and_odd_convolutions_need_little_memory(op: str) -> None:
    advice = spfmt.advise((2**20, 2**20 // 8, 3, 3), 2.0**-12, batch=2, size=1, padding=1, op=op)
    assert 0 < advice.candidates[0].seconds < advice.candidates[-1].seconds
    depthwise = spfmt.advise((64, 1, 3, 3), 0.3, batch=4, size=8, groups=64, op=op)
    assert depthwise.format in {*MAKERS, "dense"}
    spfmt.advise((16, 1, 256, 256), 0.01, size=256, op=op)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((SHAPE, 0.1), {}, r"shape \(64, 32, 3, 3\).*size=\(H, W\)"),
        (((64, 32), 0.1), {"size": 8}, r"shape \(64, 32\) with a size of maps"),
        (((64, 32, 3), 0.1), {"size": 8}, "with a size of maps"),
        (((64, 0, 3, 3), 0.1), {"size": 8}, "with a size of maps"),
        (((64, 2**31, 3, 3), 0.1), {"size": 8}, "with a size of maps"),
        (((8, 1, 512, 512), 0.1), {"size": 512}, "65536 cells"),
        (((64, 32), 0.1), {"stride": 2}, "without a size"),
        (((64, 32), 0.1), {"padding": "same"}, "without a size"),
        ((SHAPE, 0.1), {"size": 2}, "no smaller than the kernel"),
        ((SHAPE, 0.1), {"size": 0}, "size"),
        ((SHAPE, 0.1), {"size": 8.5}, "size"),
        ((SHAPE, 0.1), {"size": (8, 8, 8)}, "size"),
        ((SHAPE, 0.1), {"size": "big"}, "size"),
        ((SHAPE, 0.1), {"size": 8, "groups": 7}, "groups=7"),
        ((SHAPE, 0.1), {"size": 8, "stride": 0}, "stride=0"),
        ((SHAPE, 0.1), {"size": 8, "op": "spmm"}, "op 'spmm'.*conv2d is the forward product"),
        (((64, 32), 0.1), {"op": "training"}, "op 'training'"),
        ((SHAPE, None), {"size": 8}, "density=None"),
        ((spfmt.CSR.from_dense(np.eye(3)),), {"size": 8}, "with a size of maps"),
        ((np.ones((4, 4), "float32"),), {"size": 8}, "with a size of maps"),
    ],
)
def test_bad_questions_are_refused(
    args: tuple[object, ...], kwargs: dict[str, object], message: str
) -> None:
    with pytest.raises(spfmt.FormatError, match=message):
        spfmt.advise(*args, **kwargs)


def test_groups_convolve_narrow_bands_and_shared_ones_row_by_row() -> None:
    cost.use(CostModel(kernels.default_cost_model()))
    for block, groups, wanted in ((16, 1, "images"), (2, 1, "rows"), (16, 64, "rows")):
        shape = (64, 64 // groups, 3, 3)
        scores = np.random.default_rng(2).random(shape, np.float32)
        a = spfmt.ShuffledBlock.from_scores(
            scores, 0.25, block_shape=(block, 1), row_perm=np.arange(64)
        )
        geometry = Convolution.of(shape, padding=1, groups=groups).geometry(16, 16)
        assert f", {wanted}, " in a.plan.explain(16, 1, geometry=geometry)


@pytest.mark.parametrize("op", cost.CONVOLUTIONS)
def test_the_cheaper_variant_runs(op: str) -> None:
    rng = np.random.default_rng(3)
    a = MAKERS["shuffled_block"]((12, 6, 3, 3), rng).astype("float32")
    geometry = Convolution.of(a.shape).geometry(8, 8)
    x, dy = (rng.standard_normal((2, n, m, m), np.float32) for n, m in ((6, 8), (12, 6)))
    given = {"conv2d": (x,), "conv2d_input": (dy, (8, 8)), "conv2d_weight": (dy, x)}[op]
    found = []
    for variant in ("rows", "images"):
        cost.use(model(call=1.0, **{f"{variant}__call": 0.0}))
        assert f", {variant}, " in a.plan.explain(2, 1, op, geometry=geometry)
        found.append(getattr(spfmt, op)(a, *given))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------ who asks


@pytest.mark.parametrize("name", MAKERS)
def test_plans_explain_convolutions(name: str) -> None:
    a = MAKERS[name]((12, 6, 3, 3), np.random.default_rng(1))
    geometry = Convolution.of(a.shape, padding=1, groups=2).geometry(16, 20)
    for op in cost.CONVOLUTIONS:
        text = a.plan.explain(4, 2, op, geometry=geometry)
        assert text.startswith(f"{op} {a.layout().name} float32, batch 4 of 16 x 20 maps: kernel ")
        assert re.search(", (images|rows), ", text)
        assert "of 2 threads" in text
        assert text.endswith("predicted")
    assert a.plan.explain(4, geometry=geometry).startswith("conv2d ")
    assert "kernel scalar" in a.plan.explain(4, dtype="float64", geometry=geometry)


def test_threads_are_woken_only_where_it_pays() -> None:
    cost.use(model(wake_seconds=50e-6))
    a = spfmt.CSR.from_dense(np.ones((16, 16, 3, 3), "float32"))
    few, many = (Convolution.of(a.shape, padding=1).geometry(n, n) for n in (2, 32))
    assert ", 1 of 4 threads, " in a.plan.explain(1, 4, geometry=few)
    assert ", 4 of 4 threads, " in a.plan.explain(1, 4, geometry=many)


def test_plans_refuse_what_is_no_convolution_of_theirs() -> None:
    plan = spfmt.CSR.from_dense(np.ones((6, 4, 3, 3), "float32")).plan
    geometry = Convolution.of((6, 4, 3, 3)).geometry(8, 8)
    with pytest.raises(spfmt.FormatError, match="op 'spmm'"):
        plan.explain(1, op="spmm", geometry=geometry)
    with pytest.raises(spfmt.FormatError, match="op 'conv2d'"):
        plan.explain(1, op="conv2d")
    for other in (Convolution.of((6, 4, 5, 5)), Convolution.of((8, 4, 3, 3), groups=4)):
        with pytest.raises(spfmt.FormatError, match=r"for a weight of \(6, 36\)"):
            plan.explain(1, geometry=other.geometry(8, 8))
    with pytest.raises(spfmt.FormatError, match="type Convolution"):
        plan.explain(1, geometry=Convolution.of((6, 4, 3, 3)))
    with pytest.raises(spfmt.KernelNotFound, match="float16"):
        plan.explain(1, dtype="float16", geometry=geometry)
    with pytest.raises(spfmt.FormatError, match="size"):
        Convolution.of((6, 4, 3, 3)).geometry(8, -1)


def test_the_compiled_model_refuses_what_would_divide_by_zero() -> None:
    summary = kernels.Summary("lists", 16, 36, 96, 6)
    for place in (1, 2, 3, 5, 8, 12):
        numbers = [8, 6, 3, 1, 0, 1, 8, 6, 3, 1, 0, 1, 1]
        numbers[place] = 0
        with pytest.raises(ValueError, match="a geometry without outputs or cells"):
            kernels.choose("scalar", "conv2d", summary, 1, "float32", 1, tuple(numbers))
    with pytest.raises(ValueError, match="unknown product conv2d"):
        kernels.choose("scalar", "conv2d", summary, 1, "float32", 1)
    with pytest.raises(ValueError, match="images does no spmm"):
        kernels.kernel_terms(model().coefficients, "images", summary, "spmm", 1, "float32")


def test_layers_explain_themselves() -> None:
    torch = pytest.importorskip("torch")
    from spfmt.torch import SparseConv1d, SparseConv2d, SparseLinear

    layer = SparseConv2d(8, 16, 3, stride=2, padding=1, format="csr", density=0.2)
    geometry = Convolution.of(layer.shape, 2, 1).geometry(14, 14)
    assert layer.explain(8, 1, size=14) == layer.tensor().plan.explain(8, 1, geometry=geometry)
    assert "14 x 20 maps" in layer.explain(8, 1, "conv2d_weight", size=(14, 20))
    assert "float64" in layer.to(torch.float64).explain(1, op="conv2d_input", size=[9, 9])
    same = SparseConv2d(4, 4, (3, 2), padding="same", format="csr", density=0.5)
    for size in ((1, 1), (5, 9), np.array([32, 32]), torch.Size([4, 4])):
        same.explain(1, size=size)
    for mode in ("circular", "replicate"):  # torch pads first: the kernel sees larger maps
        padded = SparseConv2d(4, 4, 3, padding=(1, 2), padding_mode=mode, format="csr", density=0.5)
        assert "of 10 x 13 maps" in padded.explain(1, size=(8, 9))
        with pytest.raises(spfmt.FormatError, match="size"):
            padded.explain(1, size="wide")
    line = SparseConv1d(4, 8, 5, padding=2, format="csr", density=0.5)
    assert "of 1 x 30 maps" in line.explain(2, size=30)
    assert line.explain(2, size=(30,)) == line.explain(2, size=30)
    for wrong, message in ((None, "2 size"), ((4, 4, 4), "2 size"), (0, "size"), (1.5, "size")):
        with pytest.raises(spfmt.FormatError, match=message):
            layer.explain(1, size=wrong)
    with pytest.raises(spfmt.FormatError, match="no maps"):
        SparseLinear(4, 4, density=0.5).explain(1, size=4)


# ------------------------------------------------------------------------------------ the fit


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("torch")
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    return importlib.import_module("benchmarks.fit")


def test_the_fit_finds_what_made_the_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: ModuleType
) -> None:

    true = np.array([2e-5, 1e-8, 2e-9, 3e-10, 0.0, 0.0])
    rng = np.random.default_rng(0)
    points = [
        fit.Point("avx2.lists.conv2d.images", list(counts), lambda: None, "", counts @ true)
        for counts in np.c_[np.ones(60), rng.random((60, 5)) * 1e5]
    ]
    units, ratios = fit.solve(points)
    np.testing.assert_allclose(units, true, rtol=1e-6, atol=1e-16)
    np.testing.assert_allclose(ratios, 1)
    missing = fit.scaled({"avx2.lists.conv2d.images": units})
    assert missing["avx512.lists.conv2d.images"][3] == pytest.approx(1.5e-10)
    copy = tmp_path / "defaults.cpp"
    copy.write_text(fit.DEFAULTS.read_text())
    monkeypatch.setattr(fit, "DEFAULTS", copy)
    fit.write({**missing, "avx2.lists.conv2d.images": units})
    text = copy.read_text()
    assert '{"avx2.lists.conv2d.images", {2e-05, 1e-08, 2e-09, 3e-10, 0, 2.5e-11}},' in text
    assert '{"avx512.lists.conv2d.images", {2e-05, 5e-09, 1e-09, 1.5e-10, 0, 2.5e-11}},' in text
    with pytest.raises(SystemExit, match=r"0 rows avx2\.none"):
        fit.write({"avx2.none": units})


def test_the_fit_measures_every_row_that_it_writes(fit: ModuleType) -> None:
    layer = fit.Layer(4, 8, 5, 3)
    found = [*fit.sparse_points(layer, 2, "scalar"), *fit.dense_points(layer, 2, "scalar")]
    rows = {row.rpartition(".")[0] for row in kernels.default_cost_model()}
    assert {p.row for p in found} == {
        row for row in rows if row.startswith("scalar.") and "conv2d" in row
    }
    for point in found:
        point.measure(0.0)
        assert 0 < point.seconds < math.inf
