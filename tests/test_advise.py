"""The cost model: what it ranks, and that kernels follow it. Nothing is timed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from itertools import product as product_of

import numpy as np
import pytest
from format_cases import LAYOUTS, MAKERS, variants

import spfmt
from spfmt import cost
from spfmt.cost import CostModel

kernels = cost._kernels
NAMES = tuple(kernels.default_cost_model())


def model(**units: float) -> CostModel:
    """Make a model: 1 us a call, 1 ns a multiply-add vector, the rest free; `units` override.

    Keywords are words of a coefficient's name: ``lookup__stream=...`` sets all that contain both.
    """
    made = dict.fromkeys(NAMES, 0.0) | {"l2_bytes": 2.0**20, "l3_bytes": 2.0**25}
    made |= {"efficiency": 0.8, "dense_efficiency": 0.8, "wake_seconds": 5e-6}
    made |= {n: 1e-6 for n in NAMES if n.endswith(".call")}
    made |= {n: 1e-9 for n in NAMES if n.endswith(".multiply")}
    for words, value in units.items():
        named = [n for n in NAMES if set(words.split("__")) <= set(n.split("."))]
        assert named, words
        made |= dict.fromkeys(named, value)
    return CostModel(made)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = cost.cost_model()
    yield
    cost.use(before)


# ---------------------------------------------------------------------------------- predictions


def test_sparse_wins_in_proportion_to_density() -> None:
    cost.use(model())
    speedups = [
        spfmt.advise((4096, 4096), d, batch=256, formats=["shuffled_block"], threads=1).speedup
        for d in (0.5, 0.1, 0.01)
    ]
    np.testing.assert_allclose(speedups, [2, 10, 100], rtol=0.2)


def test_dense_wins_on_small_layers_and_where_it_computes_faster() -> None:
    cost.use(model(dense__call=0.2e-6))
    small = spfmt.advise((128, 128), 0.5, batch=1, threads=1)
    assert (small.format, small.variant, small.speedup) == ("dense", "", 1.0)
    cost.use(model(dense__multiply=0.4e-9))
    assert spfmt.advise((2048, 2048), 0.5, batch=256, threads=1).format == "dense"
    assert spfmt.advise((2048, 2048), 0.1, batch=256, threads=1).format != "dense"


def test_ranking_is_by_time_and_dense_takes_part() -> None:
    cost.use(model(lists__multiply=4e-9))
    advice = spfmt.advise((1024, 512), 0.1, batch=64)
    times = [c.seconds for c in advice.candidates]
    assert times == sorted(times)
    assert {c.format for c in advice.candidates} == {*MAKERS, "dense"}
    assert advice.format in ("shuffled_block", "hrbp")
    assert advice.best == advice.candidates[0]
    for c in advice.candidates:
        assert f"{c.format:<16}" in str(advice)
    only = spfmt.advise((1024, 512), 0.1, batch=64, formats=["nm"])
    assert {c.format for c in only.candidates} == {"nm", "dense"}


def test_padding_costs_random_lists_but_not_n_of_m() -> None:
    cost.use(model(lookup__stream=1e-9))
    by = {c.format: c for c in spfmt.advise((768, 768), 3 / 32, batch=1).candidates}
    assert by["nm"].variant == by["condensed"].variant == "lookup"
    assert by["condensed"].seconds > 1.3 * by["nm"].seconds


@pytest.mark.parametrize("op", spfmt.dispatch.OPS)
def test_predictions_grow_with_the_work(op: str) -> None:
    cost.use(model(operands=1e-10, stream=2e-10))
    for formats in (["csr"], ["shuffled_block"]):
        times = [
            [
                spfmt.advise((512, 768), d, batch=b, formats=formats, op=op, threads=1)
                for d in (0.1, 0.4)
            ]
            for b in (1, 4, 16, 17, 64, 200)
        ]
        found = np.array([
            [next(c.seconds for c in a.candidates if c.format == formats[0]) for a in row]
            for row in times
        ])  # fmt: skip
        assert (np.diff(found, axis=0) >= 0).all()
        assert (np.diff(found, axis=1) > 0).all()


@pytest.mark.parametrize(
    ("shape", "fan_in", "places"),
    [
        ((8, 50), 0, 0),  # nothing, and no padding of it
        ((8, 50), 4, 32),
        ((8, 50), 1, 32),  # a row fills a step of four nonzeros
        ((1, 50), 1, 16),  # and a quad of four rows
        ((300, 50), 5, 300 * 8),  # over three chunks, quads of which are full
        ((4, 9000), 1, 16),  # wider than 16-bit offsets reach: two tiles, all in the first
    ],
)
def test_octets_count_their_padding(shape: tuple[int, int], fan_in: int, places: int) -> None:
    indptr = np.arange(shape[0] + 1) * fan_in
    columns = np.tile(np.arange(fan_in, dtype="int32"), shape[0])
    a = spfmt.CSR(shape, indptr, columns, np.ones(columns.size, "float32"))
    summary = kernels.summary(a.plan.compiled, "spmm")
    assert summary.octet_places == places
    terms = kernels.kernel_terms(model().coefficients, "octets", summary, "spmm", 9, "float32")
    assert terms[3] == 2 * places


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_defaults_take_octets_where_avx2_would_look_up_for_each_sample(density: float) -> None:
    """AVX2 looks x up once per weight and sample; octets load each weight once for eight."""
    rng = np.random.default_rng(6)
    a = spfmt.CSR.from_dense((rng.random((768, 768)) < density).astype("float32"))
    summary = kernels.summary(a.plan.compiled, "spmm")
    cost.use(cost.CostModel(kernels.default_cost_model()))
    for batch in (3, 4, 8):
        assert kernels.choose("avx2", "spmm", summary, batch, "float32", 1)[0] == "octets"


def test_samples_that_fill_a_vector_cost_like_others() -> None:
    summary = kernels.Summary("lists", 40, 24, 100, 10, 160)
    for variant, batches in (("octets", (1, 8)), ("panels", (1, 16)), ("panels", (17, 32))):
        few, full = (
            kernels.kernel_terms(model().coefficients, variant, summary, "spmm", b, "float32")[1]
            for b in batches
        )
        assert few == full == 64 * batches[1] / 16


def test_weights_beyond_the_caches_cost_more() -> None:
    cost.use(model(beyond_l2=1e-9))
    for variant, size in (("lookup", 4), ("octets", 6), ("panels", 4)):  # bytes per nonzero
        terms = [
            kernels.kernel_terms(
                cost.cost_model().coefficients,
                variant,
                kernels.Summary("lists", n, n, n * n, n * n // 16, n * n),
                "spmm",
                1,
                "float32",
            )
            for n in (256, 1024)
        ]
        assert terms[0][4] == 0
        assert terms[1][4] == size * 1024 * 1024
        assert [t[5] for t in terms] == [0, 0]


def test_a_sparse_tensor_is_compared_with_its_conversions() -> None:
    cost.use(model())
    a = spfmt.NM.from_scores(np.random.default_rng(0).random((64, 128), "float32"), n=2, m=8)
    advice = spfmt.advise(a, batch=32)
    by = {c.format: c for c in advice.candidates}
    assert by["nm"].description == "as it is"
    assert by["csr"].description == "converted"
    assert by["csr"].density == a.density
    assert "shuffled_block" in dict(advice.excluded)
    assert "shuffled_block" in str(advice)


def test_a_dense_weight_counts_with_its_zeros_or_a_density() -> None:
    weight = np.eye(64, dtype="float32")
    (csr,) = [c for c in spfmt.advise(weight, formats=["csr"]).candidates if c.format == "csr"]
    assert csr.density == 1 / 64
    (csr,) = [
        c for c in spfmt.advise(weight, 0.25, formats=["csr"]).candidates if c.format == "csr"
    ]
    assert csr.density == 0.25


@pytest.mark.parametrize("op", spfmt.dispatch.OPS)
def test_huge_shapes_need_little_memory(op: str) -> None:
    advice = spfmt.advise((2**28, 2**30), 2.0**-26, batch=2, op=op)
    assert advice.candidates[0].seconds < advice.candidates[-1].seconds


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (((3, 4),), {}, "density=None"),
        (((3, 4), 0.0), {}, "density=0.0"),
        (((3, 4), 1.5), {}, "density=1.5"),
        (((3, 4), "much"), {}, "density='much'"),
        (((3,), 0.5), {}, r"shape \(3,\)"),
        (((3, 0), 0.5), {}, r"shape \(3, 0\)"),
        (((3, 2.5), 0.5), {}, r"shape \(3, 2.5\)"),
        (("weights", None), {}, "type str"),
        (((3, 4), 0.5), {"batch": 0}, "batch=0"),
        (((3, 4), 0.5), {"batch": 2.0}, r"batch=2\.0"),
        (((3, 4), 0.5), {"threads": 0}, "threads=0"),
        (((3, 4), 0.5), {"batch": 2**31}, "batch=2147483648"),
        (((3, 4), 0.5), {"threads": True}, "threads=True"),
        (((3, 4), 0.5), {"threads": 1025}, "threads=1025"),
        (((3, 4), 0.5), {"formats": 5}, "formats=5"),
        (((3, 4), 0.5), {"formats": [["csr"]]}, "formats=.*csr"),
        (((3, 4), 0.5), {"formats": ["coo"]}, "coo"),
        (((3, 4), 0.5), {"formats": "csr"}, "formats='csr'"),
        (((3, 4), 0.5), {"op": "gemm"}, "op 'gemm'"),
        ((spfmt.CSR.from_dense(np.eye(3)), 0.5), {}, "beside a sparse tensor"),
    ],
)
def test_bad_questions_are_refused(
    args: tuple[object, ...], kwargs: dict[str, object], message: str
) -> None:
    with pytest.raises(spfmt.FormatError, match=message):
        spfmt.advise(*args, **kwargs)


def test_of_gpus_nothing_is_predicted() -> None:
    with pytest.raises(spfmt.KernelNotFound, match=r"device='cuda'.*docs/cuda\.md"):
        spfmt.advise((64, 64), 0.1, device="cuda")


# ------------------------------------------------------------------------------- what kernels do


def explained(a: spfmt.SparseTensor, batch: int, threads: int = 1, op: str = "spmm") -> str:
    found = re.search(r"kernel \w+, (\w+), ", a.plan.explain(batch, threads, op))
    assert found
    return found[1]


@pytest.mark.parametrize("op", spfmt.dispatch.OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cheaper_variant_runs(layout: str, op: str, caplog: pytest.LogCaptureFixture) -> None:
    a = MAKERS[LAYOUTS[layout]]((40, 20), np.random.default_rng(3)).astype("float32")
    x = np.ones((5, a.matrix_shape[op != "spmm_t"]), "float32")
    dy = np.ones((5, 40), "float32")
    for variant in variants(layout, op, 5):
        cost.use(model(call=1.0, **{f"{variant}__call": 0.0}))
        assert explained(a, 5, op=op) == variant
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="spfmt"):
            if op == "sddmm":
                spfmt.sddmm(a, dy, x, batch_first=True)
            else:
                getattr(spfmt, op)(a, x, batch_first=True)
        assert f"{variant}, " in caplog.text


def test_many_samples_always_run_in_panels() -> None:
    cost.use(model(panels__call=1.0, octets__call=1.0))
    a = spfmt.CSR.from_dense(np.eye(20, dtype="float32"))
    assert [explained(a, b) for b in (1, 16, 17, 300)] == ["lookup", "lookup", "panels", "panels"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolutions_have_variants_of_their_own(layout: str) -> None:
    """They take every product of images of any batch, and none of matrices."""
    a = MAKERS[LAYOUTS[layout]]((40, 20), np.random.default_rng(3)).astype("float32")
    names = variants(layout, "conv2d", 1)
    assert "images" in names
    for op, convolution in zip(spfmt.dispatch.OPS, spfmt.dispatch.CONVOLUTIONS, strict=True):
        assert variants(layout, convolution, 2**40) == names
        matrices = variants(layout, op, 5)
        assert not set(names) & set(matrices)
        cost.use(model(call=1.0, **{f"{name}__call": 0.0 for name in names}))
        assert explained(a, 5, op=op) in matrices
        for name in names:
            with cost.forced(name):
                assert explained(a, 5, op=op) in matrices


def test_convolutions_have_coefficients_at_every_level() -> None:
    for isa, layout in product_of(spfmt.dispatch.LEVELS, LAYOUTS):
        for name in variants(layout, "conv2d", 1):
            for op in spfmt.dispatch.CONVOLUTIONS:
                assert f"{isa}.{layout}.{op}.{name}.multiply" in NAMES


@pytest.mark.parametrize("op", ["spmm", "spmm_t"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("isa", spfmt.dispatch.LEVELS)
def test_a_forced_variant_runs_and_computes_the_product(isa: str, layout: str, op: str) -> None:
    if isa not in spfmt.dispatch._available_levels():
        pytest.skip(f"this CPU lacks {isa}")
    rng = np.random.default_rng(4)
    for shape, batch in (((37, 70), 1), ((64, 33), 7), ((17, 100), 16)):
        a = MAKERS[LAYOUTS[layout]](shape, rng).astype("float32")
        x = rng.standard_normal((batch, shape[op == "spmm"]), np.float32)
        run = getattr(spfmt, op)
        dense = a.to_dense().astype("float64")
        dense = dense if op == "spmm_t" else dense.T
        bound = (max(shape) + 2) * np.finfo("f4").eps * (np.abs(x) @ np.abs(dense))
        for variant in variants(layout, op, batch):
            with cost.forced(variant):
                assert explained(a, batch, op=op) == variant
                got = run(a, x, batch_first=True, backend=isa)
            assert (np.abs(got - x @ dense) <= bound).all(), variant


def test_threads_never_change_the_variant_or_a_bit() -> None:
    rng = np.random.default_rng(5)
    a = spfmt.Condensed.from_scores(rng.random((256, 256)), 0.2).astype("float32")
    cost.use(model(lookup__multiply=3e-9, wake_seconds=0.0))
    for batch in (1, 4, 12, 16, 40):
        x = rng.standard_normal((batch, 256), np.float32)
        results, chosen = [], set()
        for threads in (1, 2, 3):
            chosen.add(explained(a, batch, threads))
            spfmt.set_num_threads(threads)
            results.append(spfmt.spmm(a, x, batch_first=True))
        spfmt.set_num_threads(None)
        assert len(chosen) == 1
        for other in results[1:]:
            np.testing.assert_array_equal(results[0], other)


def test_threads_are_woken_only_where_it_pays() -> None:
    cost.use(model(wake_seconds=20e-6))
    a = spfmt.CSR.from_dense(np.ones((512, 512), "float32"))
    assert ", 1 of 4 threads, " in a.plan.explain(1, 4)
    assert ", 4 of 4 threads, " in a.plan.explain(256, 4)


def test_the_choice_does_not_depend_on_what_was_built_before() -> None:
    rng = np.random.default_rng(6)
    a = spfmt.CSR.from_dense((rng.random((200, 300)) < 0.1).astype("float32"))
    before = [a.plan.explain(b, 1) for b in (1, 8, 64)]
    for b in (1, 8, 64):
        spfmt.spmm(a, np.ones((300, b), "float32"))
    assert [a.plan.explain(b, 1) for b in (1, 8, 64)] == before


def test_explain_refuses_what_does_not_exist() -> None:
    plan = spfmt.CSR.from_dense(np.eye(3, dtype="float32")).plan
    with pytest.raises(spfmt.FormatError, match="batch=0"):
        plan.explain(0)
    with pytest.raises(spfmt.FormatError, match="op 'conv'"):
        plan.explain(1, op="conv")
    with pytest.raises(spfmt.KernelNotFound, match="float16"):
        plan.explain(1, dtype="float16")


def test_sparse_linear_explains_itself() -> None:
    torch = pytest.importorskip("torch")
    from spfmt.torch import SparseLinear

    layer = SparseLinear(64, 32, format="nm", n=1, m=4)
    assert layer.explain(8, 1) == layer.tensor().plan.explain(8, 1)
    assert "dtype" not in layer.extra_repr()
    assert "float64" in layer.to(torch.float64).explain(1, op="spmm_t")


# ------------------------------------------------------------------------------- coefficients


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_coefficients_are_finite_and_not_negative(value: float) -> None:
    made = dict(kernels.default_cost_model()) | {"dense.call": value}
    with pytest.raises(ValueError, match=r"dense\.call is negative or no number"):
        cost.use(CostModel(made))


def test_defaults_name_every_coefficient() -> None:
    default = kernels.default_cost_model()
    calls = [default[n] for n in NAMES if n.endswith(".call")]
    assert min(calls) > 0
    for row in {n.rpartition(".")[0] for n in NAMES if n.count(".")}:
        assert sum(default[n] > 0 for n in NAMES if n.startswith(f"{row}.")) >= 3, row
