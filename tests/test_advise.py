"""The cost model: what it ranks, how it is kept, and that kernels follow it. Nothing is timed."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from format_cases import MAKERS, variants
from fresh_python import run_python

import spfmt
from spfmt import calibration, cost
from spfmt.cost import CostModel

kernels = cost._kernels
NAMES = tuple(kernels.default_cost_model())


def model(**units: float) -> CostModel:
    """Make a model: 1 us a call, 1 ns a multiply-add vector, the rest free; `units` override.

    Keywords are words of a coefficient's name: ``tokens_stream=...`` sets all that contain both.
    """
    made = dict.fromkeys(NAMES, 0.0) | {"l2_bytes": 2.0**20, "l3_bytes": 2.0**25}
    made |= {"efficiency": 0.8, "dense_efficiency": 0.8, "wake_seconds": 5e-6}
    made |= {n: 1e-6 for n in NAMES if n.endswith(".call")}
    made |= {n: 1e-9 for n in NAMES if n.endswith(".multiply")}
    for words, value in units.items():
        named = [n for n in NAMES if set(words.split("__")) <= set(n.split("."))]
        assert named, words
        made |= dict.fromkeys(named, value)
    return CostModel(made, "a CPU of this test", "2026-01-31", spfmt.dispatch.LEVELS)


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before = cost.cost_model()
    yield
    cost.use(before)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPFMT_CACHE_DIR", str(tmp_path / "spfmt"))
    return Path(kernels.cost_file())


def advise(*args: object, **kwargs: object) -> spfmt.Advice:
    return spfmt.advise(*args, calibrate=False, **kwargs)


# ---------------------------------------------------------------------------------- predictions


def test_sparse_wins_in_proportion_to_density() -> None:
    cost.use(model())
    speedups = [
        advise((4096, 4096), d, batch=256, formats=["shuffled_block"], threads=1).speedup
        for d in (0.5, 0.1, 0.01)
    ]
    np.testing.assert_allclose(speedups, [2, 10, 100], rtol=0.2)


def test_dense_wins_on_small_layers_and_where_it_computes_faster() -> None:
    cost.use(model(dense__call=0.2e-6))
    small = advise((128, 128), 0.5, batch=1, threads=1)
    assert (small.format, small.variant, small.speedup) == ("dense", "", 1.0)
    cost.use(model(dense__multiply=0.4e-9))
    assert advise((2048, 2048), 0.5, batch=256, threads=1).format == "dense"
    assert advise((2048, 2048), 0.1, batch=256, threads=1).format != "dense"


def test_ranking_is_by_time_and_dense_takes_part() -> None:
    cost.use(model(lists__multiply=4e-9))
    advice = advise((1024, 512), 0.1, batch=64)
    times = [c.seconds for c in advice.candidates]
    assert times == sorted(times)
    assert {c.format for c in advice.candidates} == {*MAKERS, "dense"}
    assert advice.format in ("shuffled_block", "hrbp")
    assert advice.best == advice.candidates[0]
    for c in advice.candidates:
        assert f"{c.format:<16}" in str(advice)
    only = advise((1024, 512), 0.1, batch=64, formats=["nm"])
    assert {c.format for c in only.candidates} == {"nm", "dense"}


def test_padding_costs_random_lists_but_not_n_of_m() -> None:
    cost.use(model(tokens__stream=1e-9))
    by = {c.format: c for c in advise((768, 768), 3 / 32, batch=1).candidates}
    assert by["nm"].variant == by["condensed"].variant == "tokens"
    assert by["condensed"].seconds > 1.3 * by["nm"].seconds


@pytest.mark.parametrize("op", spfmt.dispatch.OPS)
def test_predictions_grow_with_the_work(op: str) -> None:
    cost.use(model(operands=1e-10, stream=2e-10))
    for formats in (["csr"], ["shuffled_block"]):
        times = [
            [advise((512, 768), d, batch=b, formats=formats, op=op, threads=1) for d in (0.1, 0.4)]
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
    summary = kernels.summary(a.plan._compile(), "spmm")
    assert summary.octet_places == places
    terms = kernels.kernel_terms(model().coefficients, "octets", summary, 9)
    assert terms[3] == 2 * places


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_defaults_take_octets_where_avx2_would_look_up_for_each_sample(density: float) -> None:
    """AVX2 looks x up once per weight and sample; octets load each weight once for eight."""
    rng = np.random.default_rng(6)
    a = spfmt.CSR.from_dense((rng.random((768, 768)) < density).astype("float32"))
    summary = kernels.summary(a.plan._compile(), "spmm")
    cost.use(cost.CostModel(kernels.default_cost_model(), kernels.cpu_key()))
    for batch in (3, 4, 8):
        assert kernels.choose("avx2", "spmm", summary, batch, 1)[0] == "octets"


def test_samples_that_fill_a_vector_cost_like_others() -> None:
    summary = kernels.Summary("lists", 40, 24, 100, 10, 160)
    for variant, batches in (("octets", (1, 8)), ("panels", (1, 16)), ("panels", (17, 32))):
        few, full = (
            kernels.kernel_terms(model().coefficients, variant, summary, b)[1] for b in batches
        )
        assert few == full == 64 * batches[1] / 16


def test_weights_beyond_the_caches_cost_more() -> None:
    cost.use(model(beyond_l2=1e-9))
    for variant, size in (("tokens", 4), ("octets", 6), ("panels", 4)):  # bytes per nonzero
        terms = [
            kernels.kernel_terms(
                cost.cost_model().coefficients,
                variant,
                kernels.Summary("lists", n, n, n * n, n * n // 16, n * n),
                1,
            )
            for n in (256, 1024)
        ]
        assert terms[0][4] == 0
        assert terms[1][4] == size * 1024 * 1024
        assert [t[5] for t in terms] == [0, 0]


def test_a_sparse_tensor_is_compared_with_its_conversions() -> None:
    cost.use(model())
    a = spfmt.NM.from_scores(np.random.default_rng(0).random((64, 128), "float32"), n=2, m=8)
    advice = advise(a, batch=32)
    by = {c.format: c for c in advice.candidates}
    assert by["nm"].description == "as it is"
    assert by["csr"].description == "converted"
    assert by["csr"].density == a.density
    assert "shuffled_block" in dict(advice.excluded)
    assert "shuffled_block" in str(advice)


def test_a_dense_weight_counts_with_its_zeros_or_a_density() -> None:
    weight = np.eye(64, dtype="float32")
    (csr,) = [c for c in advise(weight, formats=["csr"]).candidates if c.format == "csr"]
    assert csr.density == 1 / 64
    (csr,) = [c for c in advise(weight, 0.25, formats=["csr"]).candidates if c.format == "csr"]
    assert csr.density == 0.25


@pytest.mark.parametrize("op", spfmt.dispatch.OPS)
def test_huge_shapes_need_little_memory(op: str) -> None:
    advice = advise((2**28, 2**30), 2.0**-26, batch=2, op=op)
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
        advise(*args, **kwargs)


# ------------------------------------------------------------------------------- what kernels do


def explained(a: spfmt.SparseTensor, batch: int, threads: int = 1, op: str = "spmm") -> str:
    found = re.search(r"kernel \w+, (\w+), ", a.plan.explain(batch, threads, op))
    assert found
    return found[1]


@pytest.mark.parametrize("op", spfmt.dispatch.OPS)
@pytest.mark.parametrize("name", MAKERS)
def test_the_cheaper_variant_runs(name: str, op: str, caplog: pytest.LogCaptureFixture) -> None:
    a = MAKERS[name]((40, 20), np.random.default_rng(3)).astype("float32")
    x = np.ones((5, a.matrix_shape[op != "spmm_t"]), "float32")
    dy = np.ones((5, 40), "float32")
    for variant in variants(name, op, 5):
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
    assert [explained(a, b) for b in (1, 16, 17, 300)] == ["tokens", "tokens", "panels", "panels"]


@pytest.mark.parametrize("op", ["spmm", "spmm_t"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("isa", spfmt.dispatch.LEVELS)
def test_a_forced_variant_runs_and_computes_the_product(isa: str, name: str, op: str) -> None:
    if isa not in spfmt.dispatch._available_levels():
        pytest.skip(f"this CPU lacks {isa}")
    rng = np.random.default_rng(4)
    for shape, batch in (((37, 70), 1), ((64, 33), 7), ((17, 100), 16)):
        a = MAKERS[name](shape, rng).astype("float32")
        x = rng.standard_normal((batch, shape[op == "spmm"]), np.float32)
        run = getattr(spfmt, op)
        dense = a.to_dense().astype("float64")
        dense = dense if op == "spmm_t" else dense.T
        bound = (max(shape) + 2) * np.finfo("f4").eps * (np.abs(x) @ np.abs(dense))
        for variant in variants(name, op, batch):
            with cost.forced(variant):
                assert explained(a, batch, op=op) == variant
                got = run(a, x, batch_first=True, backend=isa)
            assert (np.abs(got - x @ dense) <= bound).all(), variant


def test_threads_never_change_the_variant_or_a_bit() -> None:
    rng = np.random.default_rng(5)
    a = spfmt.Condensed.from_scores(rng.random((256, 256)), 0.2).astype("float32")
    cost.use(model(tokens__multiply=3e-9, wake_seconds=0.0))
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


# ------------------------------------------------------------------------------------- the file


def test_calibration_survives_a_round_trip(cache: Path) -> None:
    made = dict(kernels.default_cost_model()) | {"dense.call": 1.2345678901234567e-6}
    path = cost.save(CostModel(made, "", "2026-01-31", ("avx2",)))
    assert Path(path) == cache
    assert os.listdir(cache.parent) == [cache.name]
    found = cost.load()
    assert found.coefficients == made == kernels.cost_model()
    assert (found.date, found.levels, found.path) == ("2026-01-31", ("avx2",), path)
    assert f"calibrated 2026-01-31 at avx2, {path}" in spfmt.show_config()
    assert "dense" in str(found)


def _replaced(old: str, new: str) -> object:
    return lambda text: text.replace(old, new, 1)


def _one_less(text: str) -> str:
    count = re.search(r"\nend (\d+)", text)
    assert count
    return text.replace("\ndense.call 1\n", "\n").replace(count[0], f"\nend {int(count[1]) - 1}")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_coefficients_are_finite_and_not_negative(value: float) -> None:
    made = dict(kernels.default_cost_model()) | {"dense.call": value}
    with pytest.raises(ValueError, match=r"dense\.call is negative or no number"):
        cost.use(CostModel(made, ""))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: "", "no calibration of spfmt"),
        (lambda text: "\x00\xff" * 5000, "no calibration of spfmt"),
        (lambda text: text[: len(text) // 2], r"cut short|no number|without a value"),
        (lambda text: text + "x" * 100_000, None),
        (_replaced("spfmt-cost 3", "spfmt-cost 0"), "other kernels"),
        (_replaced("spfmt-cost 3", "spfmt-cost \xff"), "other kernels"),
        (_replaced("\ncpu ", "\ncpu Not "), "another CPU"),
        (_replaced("dense.call ", "dense.call -"), "no number of at least 0"),
        (_replaced("dense.call ", "dense.call nan"), "no number of at least 0"),
        (_replaced("dense.call ", "dense.tea "), "unknown or repeated key"),
        (_replaced("dense.call ", "dense.stream "), "unknown or repeated key"),
        (_replaced("\nend ", "\nend 1"), "cut short, or changed"),
        (_one_less, "no coefficient dense.call"),
        (_replaced("l3_bytes", "l3_bytes 7\nl2"), "no number|without a value|unknown"),
    ],
)
def test_unsound_files_are_ignored_with_a_reason(
    cache: Path, change: object, reason: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    cost.save(CostModel(dict.fromkeys(NAMES, 1.0), "", "2026-01-31", ("avx2",)))
    cache.write_bytes(change(cache.read_text()).encode("latin-1"))  # type: ignore[operator]
    caplog.clear()
    found = cost.load()
    if reason is None:  # what stands behind the end does not count
        assert found.date
        return
    assert found.coefficients == kernels.default_cost_model()
    assert not found.date
    assert re.search(reason, caplog.text), caplog.text
    assert "spfmt.calibrate()" in caplog.text


def test_unreadable_places_are_no_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("SPFMT_CACHE_DIR", str(in_the_way))
    assert not cost.load().date
    with pytest.raises(OSError, match="file"):
        cost.save(model())
    monkeypatch.setenv("SPFMT_CACHE_DIR", str(tmp_path))
    Path(kernels.cost_file()).mkdir()  # a folder opens, and reads as nothing
    assert not cost.load().date
    for name in ("SPFMT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert kernels.cost_file() == ""
    assert not cost.load().date
    with pytest.raises(OSError, match="no cache directory"):
        cost.save(model())


def test_folders_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPFMT_CACHE_DIR", os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert not cost.load().date
    path = cost.save(CostModel(dict.fromkeys(NAMES, 1.0), "", "2026-01-31", ("avx2",)))
    assert (cost.load().date, cost.load().path) == ("2026-01-31", path)


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("SPFMT_CACHE_DIR", str(tmp_path / "own"))
    folders = []
    for name in ("SPFMT_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        folders.append(str(Path(kernels.cost_file()).parent.relative_to(tmp_path)))
        monkeypatch.delenv(name)
    assert folders == ["own", "xdg/spfmt", "home/.cache/spfmt"]


def test_another_process_reads_it_and_products_write_nothing(tmp_path: Path) -> None:
    code = (
        "import numpy as np, spfmt\n"
        "a = spfmt.CSR.from_dense(np.eye(8, dtype='float32'))\n"
        "a @ np.ones((8, 3), 'float32')\n"
        "print(spfmt.cost_model().date, a.plan.explain(1, 1).split(', ')[2])"
    )
    folder = tmp_path / "spfmt"
    assert run_python(code, SPFMT_CACHE_DIR=str(folder)).stdout.split() == ["tokens"]
    assert not folder.exists()
    folder.mkdir()
    name = Path(kernels.cost_file()).name
    levels = " ".join(spfmt.dispatch.LEVELS)
    text = kernels.format_calibration(
        dict(model(tokens__call=1.0, octets__call=1.0).coefficients), "2026-01-31", levels
    )
    (folder / name).write_text(text)
    result = run_python(code, SPFMT_CACHE_DIR=str(folder))
    assert result.stdout.split() == ["2026-01-31", "panels"], result.stderr


# --------------------------------------------------------------------------------- calibration


def test_fit_recovers_coefficients() -> None:
    rng = np.random.default_rng(0)
    terms = 10.0 ** rng.uniform(-2, 3, (40, 4))
    want = np.array([1e-6, 0.0, 3e-9, 2e-8])
    seconds = terms @ want
    np.testing.assert_allclose(
        calibration.fit_relative(terms, seconds, seconds), want, rtol=1e-6, atol=1e-18
    )


def test_fit_is_never_negative() -> None:
    terms = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    seconds = np.array([3.0, 2.0, 1.0])
    got = calibration.fit_relative(terms, seconds, seconds)
    assert (got >= 0).all()
    assert got[1] == 0


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid too small to be accurate, so that the tests are quick."""
    monkeypatch.setattr(calibration, "_GRID", ((32, 64, 0.3, 16), (64, 48, 0.2, 4)))
    monkeypatch.setattr(calibration, "_DENSE_GRID", ((32, 64),))
    batches = {"tokens": (1, 4), "octets": (1, 4), "panels": (16,)}
    monkeypatch.setattr(calibration, "_BATCHES", batches)
    monkeypatch.setattr(calibration, "_SECONDS_PER_POINT", 1e-4)
    monkeypatch.setattr(calibration, "_THREADED", (256, 128, 0.1))


@pytest.mark.usefixtures("_quick")
def test_calibrate_measures_the_active_level_and_keeps_it(cache: Path) -> None:
    isa = spfmt.dispatch.active_isa()
    before = spfmt.get_num_threads()
    found = spfmt.calibrate(threads=2)
    assert spfmt.get_num_threads() == before
    assert found is spfmt.cost_model()
    assert found.levels == (isa,)
    assert Path(found.path) == cache
    default = kernels.default_cost_model()
    changed = {n.split(".")[0] for n in NAMES if found.coefficients[n] != default[n]}
    assert {isa, "dense"} <= changed
    assert not changed & (set(spfmt.dispatch.LEVELS) - {isa})
    again = cost.load()
    assert again.coefficients == pytest.approx(found.coefficients)


@pytest.mark.usefixtures("_quick")
def test_advise_calibrates_once(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost.load()
    with caplog.at_level(logging.INFO, logger="spfmt"):
        first = spfmt.advise((64, 64), 0.5)
        spfmt.advise((64, 64), 0.5)
    assert caplog.text.count("calibrating the cost model") == 1
    assert cache.exists()
    assert f"{cache}" in first.model
    assert f"{cache}" in str(first)


@pytest.mark.usefixtures("_quick")
def test_a_calibration_that_cannot_be_kept_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPFMT_CACHE_DIR", str(tmp_path / "file"))
    found = spfmt.calibrate(threads=1)
    assert found.date
    assert not found.path
    assert "not saved" in found.origin
    assert "could not be saved" in caplog.text


def test_calibrate_refuses_no_threads() -> None:
    with pytest.raises(spfmt.FormatError, match="threads=0"):
        spfmt.calibrate(threads=0)


def test_defaults_name_every_coefficient() -> None:
    default = kernels.default_cost_model()
    calls = [default[n] for n in NAMES if n.endswith(".call")]
    assert min(calls) > 0
    for row in {n.rpartition(".")[0] for n in NAMES if n.count(".")}:
        assert sum(default[n] > 0 for n in NAMES if n.startswith(f"{row}.")) >= 3, row
