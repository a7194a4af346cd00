"""The benchmark: ceilings, float64 checks, timing, records, figures, and ``spfmt bench``."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import spfmt
from spfmt.bench import (
    BATCH_FIRST,
    FEATURES_FIRST,
    LAYER,
    Case,
    Session,
    Spec,
    WrongResult,
    machine,
    parse_spec,
    random_weight,
)
from spfmt.bench import baselines as baselines_module
from spfmt.bench.contenders import Contender, Setting, ours
from spfmt.bench.core import Core, this_core
from spfmt.bench.exact import product
from spfmt.bench.record import make_record, read_record, select, write_record
from spfmt.bench.timing import _Sample, _timings, interleave
from spfmt.bench.work import dense_work, index_bytes, sparse_work
from spfmt.formats import FORMATS
from spfmt.structure import fan_in
from spfmt.structure.fan_in import random_columns

SMALL = (48, 64)
ALL = [parse_spec(name) for name in FORMATS]
CONV = ("--conv", "8x8x3x3", "--map", "6x5")


# ----------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("text", "format", "params"),
    [
        ("condensed", "condensed", {}),
        (" csr ", "csr", {}),
        ("nm", "nm", {"m": 32}),
        ("nm:16", "nm", {"m": 16}),
        ("nm:2:4", "nm", {"n": 2, "m": 4}),
        ("shuffled_block", "shuffled_block", {"block_shape": (16, 16)}),
        ("shuffled_block:8x32", "shuffled_block", {"block_shape": (8, 32)}),
    ],
)
def test_formats_as_text(text: str, format: str, params: dict[str, int]) -> None:
    assert parse_spec(text) == Spec(format, params)


@pytest.mark.parametrize(
    "text", ["", "dense", "nm:", "nm:0:4", "nm:5:4", "nm:x", "csr:4", "shuffled_block:16", "hrbp:"]
)
def test_formats_that_are_none(text: str) -> None:
    with pytest.raises(spfmt.FormatError, match="expected condensed, csr"):
        parse_spec(text)


@pytest.mark.parametrize("spec", ALL, ids=FORMATS)
def test_random_weights_have_the_density_and_repeat(spec: Spec) -> None:
    a = random_weight(spec, (96, 256), 0.125)
    a.validate()
    assert a.density == pytest.approx(0.125, rel=0.1)
    assert a.dtype == np.float32
    assert a == random_weight(spec, (96, 256), 0.125)
    assert a != random_weight(spec, (96, 256), 0.125, seed=1)


@pytest.mark.parametrize("shape", [(32, 64, 3, 3), (32, 64, 1, 1), (24, 32, 2, 5)])
@pytest.mark.parametrize("spec", ALL, ids=FORMATS)
def test_random_weights_of_convolutions(spec: Spec, shape: tuple[int, ...]) -> None:
    a = random_weight(spec, shape, 0.25)
    a.validate()
    assert a.shape == shape
    assert a.density == pytest.approx(0.25, rel=0.15)


def test_fixed_ratios_override_the_density() -> None:
    a = random_weight(parse_spec("nm:2:4"), (8, 16), 0.9)
    assert a.density == 0.5
    assert a.label() == "nm 2:4"
    assert random_weight(parse_spec("shuffled_block:4x8"), (8, 16), 0.5).label() == (
        "shuffled_block 4x8"
    )


def test_random_columns_are_distinct_in_every_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fan_in, "_STRIP", 64)
    columns = random_columns(np.random.default_rng(0), 101, 20, 7)
    assert columns.shape == (101, 7)
    assert (np.diff(columns, axis=1) > 0).all()
    assert set(columns.ravel()) == set(range(20))
    full = random_columns(np.random.default_rng(0), 3, 5, 5)
    np.testing.assert_array_equal(full, [range(5)] * 3)


# -------------------------------------------------------------------------------------- work


def test_work_of_a_product_by_hand() -> None:
    csr = spfmt.CSR.from_dense(np.ones((4, 8), "float32"))
    assert sparse_work(csr, 3).flops == 2 * 32 * 3
    assert sparse_work(csr, 3).nbytes == 4 * (32 + (4 + 8) * 3) + 32  # a byte for each index
    assert dense_work(4, 8, 3).flops == 2 * 32 * 3
    assert dense_work(4, 8, 3).nbytes == 4 * (32 + (4 + 8) * 3)
    assert sparse_work(csr, 3).times(3).flops == 3 * 2 * 32 * 3


def test_index_bytes_follow_the_structure() -> None:
    block = random_weight(parse_spec("shuffled_block:16x16"), (32, 64), 0.5)
    columns = sum(c.size for _, c, _ in block.blocks()) // 1
    assert index_bytes(block) == 2 * (len(block.col_indices) + 32)
    assert columns == len(block.col_indices)
    far = spfmt.CSR((2, 100_000), [0, 1, 2], [5, 99_999], np.ones(2, "float32"))
    assert index_bytes(far) == 2 * 2


# ------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("spec", ALL, ids=FORMATS)
@pytest.mark.parametrize("strip", [1 << 23, 100])
def test_float64_products(spec: Spec, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of rows, any order of values, and the dense way agree with numpy."""
    monkeypatch.setattr("spfmt.bench.exact._STRIP_CELLS", strip)
    a = random_weight(spec, SMALL, 0.25)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, SMALL[1]), dtype="float32")
    dy = rng.standard_normal((5, SMALL[0]), dtype="float32")
    dense = a.to_dense().astype("float64")
    for weight in (a, a.to_dense()):
        np.testing.assert_allclose(product("spmm", weight, x, dy).value, x @ dense.T)
        np.testing.assert_allclose(product("spmm_t", weight, x, dy).value, dy @ dense)
    full = dy.T.astype("float64") @ x
    np.testing.assert_allclose(product("sddmm", dense, x, dy).value, full)
    want = full[a.plan.layout.coordinates()]
    np.testing.assert_allclose(product("sddmm", a, x, dy).value, want)


def test_wrong_results_are_refused() -> None:
    x = np.ones((2, 8), "float32")
    exact = product("spmm", np.ones((3, 8), "float32"), x, np.ones((2, 3), "float32"))
    np.testing.assert_allclose(exact.bound, 10 * np.finfo("float32").eps * 8)
    right = exact.value.astype("float32")
    exact.require("it", right)
    exact.require("it", right + exact.bound)
    for bad in (exact.bound[0, 0] * 1.01, np.nan, np.inf):
        wrong = right.astype("float64")
        wrong[1, 2] += bad
        with pytest.raises(WrongResult, match=r"it: got .* at \(1, 2\).*1 of 6 elements"):
            exact.require("it", wrong)
    with pytest.raises(WrongResult, match="shape"):
        exact.require("it", right.T)


def _broken(setting: Setting) -> list[Contender]:
    weight = random_weight(parse_spec("csr"), SMALL, 0.5)
    good = ours(setting, weight)
    return [replace(good, name="broken", call=lambda: good.call() + np.float32(0.01))]


def test_nothing_is_timed_after_a_wrong_result() -> None:
    session = Session(0.0)
    with pytest.raises(WrongResult, match=r"broken, \(B, C\)"):
        session.measure(Case(SMALL, 0.5, 4), ALL, extra=_broken)
    assert session.rows == []


# ------------------------------------------------------------------------------------ timing


def test_contenders_take_turns() -> None:
    log: list[str] = []
    calls = [lambda: log.append("a"), lambda: log.append("b")]
    before = [lambda: log.append("A"), lambda: log.append("B")]
    timings = interleave(calls, 0.0, before=before)
    assert [t.samples for t in timings] == [5, 5]
    order = "".join(log)
    assert order.replace("aa", "a").count("A") == 5
    pieces = [piece for piece in order.split("A") if piece]
    assert len(pieces) == 5
    for piece in pieces:  # A a...a B b...b: an untimed call and at least one timed
        first, second = piece.split("B")
        assert set(first) == {"a"}
        assert set(second) == {"b"}
        assert min(len(first), len(second)) >= 2
    for t in timings:
        assert 0 < t.low <= t.median <= t.high
        assert 0 <= t.waited <= 1
        assert 0 <= t.shared <= 1


@pytest.mark.parametrize(("alone", "median", "samples"), [(5, 10.0, 5), (4, 20.0, 9)])
def test_samples_of_a_shared_core_are_left_out(alone: int, median: float, samples: int) -> None:
    """Unless too few are left, of any contender: five are the least a median needs."""
    core = cast("Core", SimpleNamespace(shared=lambda pace: pace > 1.15))
    steady = [_Sample(wall=10.0, own=9.0, pace=1.0)] * 9
    disturbed = steady[:alone] + [_Sample(wall=20.0, own=20.0, pace=1.5)] * (9 - alone)
    first, second = _timings([steady, disturbed], core)
    assert (second.median, second.samples, second.left_out) == (median, samples, alone == 5)
    assert second.shared == pytest.approx(1 - alone / 9)
    assert (first.median, first.samples, first.shared) == (10.0, 9, 0.0)
    assert first.waited == pytest.approx(0.1)


def test_a_core_is_shared_when_its_loads_take_longer() -> None:
    core = Core()
    assert 0 < core.best <= core.pace()
    assert not core.shared(1.1 * core.best)
    assert core.shared(1.5 * core.best)
    assert this_core() is this_core()


def test_untimed_calls_last_for_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 1 ms at each look: a call takes 1 ms, five rounds are the least."""
    clock = itertools.count(step=1e-3)
    monkeypatch.setattr(
        "spfmt.bench.timing.time", SimpleNamespace(perf_counter=clock.__next__, process_time=float)
    )
    count: list[int] = []
    interleave([lambda: count.append(1)], 0.0)
    assert len(count) == 5 * (3 + 1)  # untimed ones until 5 ms are over, then the timed one


def test_timing_restores_the_garbage_collector() -> None:
    import gc

    def fail() -> None:
        assert not gc.isenabled()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        interleave([fail], 0.0)
    assert gc.isenabled()


# ----------------------------------------------------------------------------------- session


@pytest.fixture(scope="module")
def session() -> Session:
    """A tiny run of every product and both layouts."""
    lines: list[str] = []
    session = Session(0.0, lines.append)
    for op in ("spmm", "spmm_t", "sddmm"):
        session.measure(Case(SMALL, 0.25, 4, op=op), ALL, suite="tiny")
    session.measure(Case(SMALL, 0.25, 1, 2), ALL, suite="threads")
    session.lines = lines  # type: ignore[attr-defined]
    return session


def test_a_repository_around_an_installation_is_not_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a virtual environment inside the clone of another project."""
    (tmp_path / ".git").mkdir()
    package = tmp_path / "venv" / "spfmt"
    package.mkdir(parents=True)
    asked: list[object] = []
    monkeypatch.setattr(machine.subprocess, "run", lambda *a, **k: asked.append(a))
    monkeypatch.setattr(spfmt, "__file__", str(package / "__init__.py"))
    assert machine.commit() == ""
    assert not asked


def test_rows_say_what_was_measured(session: Session) -> None:
    rows = [row for row in session.rows if row.op == "spmm" and row.suite == "tiny"]
    sparse = [row for row in rows if row.kind == "sparse"]
    assert {row.layout for row in sparse} == {BATCH_FIRST, FEATURES_FIRST}
    assert {row.name.split()[0] for row in sparse} == set(FORMATS)
    best = min(row.us for row in rows if row.kind == "dense")
    for row in rows:
        assert row.speedup == pytest.approx(best / row.us)
        assert row.gflops == pytest.approx(2 * row.density * 48 * 64 * 4 / row.us / 1e3)
        assert row.roof > 0
        assert row.level == "L1" or row.kind == "dense"
    one = [row for row in session.rows if row.suite == "threads"]
    assert {row.layout for row in one} == {BATCH_FIRST}
    assert {row.threads for row in one} == {2}
    assert {c.threads for c in session.ceilings} == {1, 2}


def test_tables_grow_as_they_are_measured(session: Session) -> None:
    text = "\n".join(session.lines)  # type: ignore[attr-defined]
    assert "64 -> 48, sddmm, batch 4, 1 thread" in text
    assert "ceilings, " in text
    assert "shuffled_block 16x16, (C, B)" in text


def test_cases_taken_together_keep_their_own_dense_layer() -> None:
    session = Session(0.0)
    cases = [Case(SMALL, 0.25, 2, 1, op) for op in ("spmm", "spmm_t")]
    rows = session.measure(cases, ALL[:2], layouts=(FEATURES_FIRST,))
    assert [row.op for row in rows if row.kind == "sparse"] == ["spmm"] * 2 + ["spmm_t"] * 2
    for op in ("spmm", "spmm_t"):
        own = [row for row in rows if row.op == op]
        best = min(row.us for row in own if row.kind == "dense")
        assert all(row.speedup == pytest.approx(best / row.us) for row in own)
    assert len({row.samples for row in rows}) == 1


def test_threads_are_left_as_they_were() -> None:
    spfmt.set_num_threads(3)
    try:
        Session(0.0).measure(Case(SMALL, 0.5, 1, 1), ALL[:1])
        assert spfmt.get_num_threads() == 3
    finally:
        spfmt.set_num_threads(None)


def test_levels_have_roofs_of_their_own() -> None:
    session = Session(0.0)
    rows = session.measure(
        Case(SMALL, 0.5, 1), [parse_spec("shuffled_block")], backends=("scalar",), dense=False
    )
    assert [(row.name, row.isa, row.speedup) for row in rows] == [
        ("shuffled_block 16x16 [scalar]", "scalar", None)
    ]
    assert [c.isa for c in session.ceilings] == ["scalar"]


def test_dense_layers_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines_module, "available_memory", lambda: 8 * 4 * 48 * 64 - 1)
    session = Session(0.0)
    rows = session.measure(Case(SMALL, 0.5, 1), ALL[:1])
    assert not [row for row in rows if row.name == "onnxruntime dense"]  # it takes four copies
    monkeypatch.setattr(baselines_module, "available_memory", lambda: 100)
    rows = session.measure(Case(SMALL, 0.5, 1), ALL[:1])
    assert [(row.kind, row.speedup) for row in rows] == [("sparse", None)]
    assert any("copies of the weight would take" in why for why in session.skipped.values())


def test_layer_passes_and_their_gradients_are_checked() -> None:
    pytest.importorskip("torch")
    session = Session(0.0)
    rows = session.measure(Case(SMALL, 0.25, 6, op=LAYER), ALL)
    assert [row.name.split()[0] for row in rows] == ["torch", *FORMATS]
    flops = 3 * 2 * 48 * 64 * 6
    assert rows[0].gflops * rows[0].us * 1e3 == pytest.approx(flops)


@pytest.mark.parametrize("name", list(baselines_module.BASELINES))
def test_baselines_compute_the_product_or_say_why_not(name: str) -> None:
    session = Session(0.0)
    rows = session.measure(Case((64, 96), 0.25, 3), compare=[name], layouts=())
    found = [row for row in rows if row.kind == "baseline"]
    missing = [why for what, why in session.skipped.items() if what.startswith(name)]
    assert len(found) + len(missing) == 1
    assert all(missing)


@pytest.mark.parametrize(
    ("case", "name", "reason"),
    [
        (Case((64, 96), 0.25, 3, op="sddmm"), "scipy CSR", "has no sddmm"),
        (Case((60, 96), 0.25, 3), "scipy BSR", "is not made of 16 x 16 blocks"),
        (Case((64, 96), 0.25, 3, 2), "scipy CSR", "thread pool|no scipy"),
        (Case((64, 96), 0.25, 1 << 17), "torch gather", "would gather 0.8 GB"),
    ],
)
def test_baselines_say_why_they_do_not_take_part(case: Case, name: str, reason: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("scipy")
    format, make = baselines_module.BASELINES[name]
    with pytest.raises(baselines_module.NotMeasured, match=reason):
        make(Setting(case), random_weight(Spec(format), case.shape, case.density))


# ------------------------------------------------------------------------ records and figures


def test_records_survive_a_file(session: Session, tmp_path: Path) -> None:
    record = make_record(session, suites=["tiny"])
    path = tmp_path / "record.json"
    write_record(record, path)
    again = read_record(path)
    assert again == json.loads(json.dumps(record))
    assert again["suites"] == ["tiny"]
    assert {"cpu", "cores", "isa", "caches", "system", "commit"} <= set(again["machine"])
    assert again["versions"]["numpy"] == np.__version__
    assert again["ceilings"][0]["levels"][-1]["capacity"] is None
    row = select(again["results"], name="condensed", layout=BATCH_FIRST, op="sddmm")[0]
    assert row["shape"] == [48, 64]
    assert set(row) == set(session.rows[0].as_json())
    lines = path.read_text().splitlines()
    assert sum('"op": "sddmm"' in line for line in lines) == len(
        select(again["results"], op="sddmm")
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 2}'])
def test_foreign_records_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(spfmt.FormatError, match="results of spfmt bench, schema 1"):
        read_record(path)


def test_records_of_another_schema_are_refused(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record({**make_record(session), "schema": 99}, path)
    with pytest.raises(spfmt.FormatError, match="schema 99"):
        read_record(path)


def _small_record() -> dict[str, Any]:
    """Two densities, batches and numbers of threads, with times that follow a rule."""
    rows = []
    for name, kind, share in [("onnxruntime dense", "dense", 1.0), ("csr", "sparse", 0.0)]:
        for asked in (0.5, 0.1):
            for batch in (1, 64):
                for threads in (1, 2):
                    density = share or asked
                    us = 100 * density * batch / threads
                    rows.append({
                        "suite": "x", "name": name, "kind": kind, "layout": "(B, C)",
                        "source": "", "shape": [64, 48], "asked": asked, "density": density,
                        "batch": batch, "threads": threads, "op": "spmm", "us": us,
                        "gflops": 2 * batch, "gbytes": 3.0, "roof": 0.5, "waited": 0.0,
                        "speedup": 1 / density,
                    })  # fmt: skip
    levels = [{"name": "L1", "capacity": 1e5, "bandwidth": 100.0},
              {"name": "DRAM", "capacity": None, "bandwidth": 20.0}]  # fmt: skip
    return {
        "schema": 1, "date": "2000-01-01", "machine": {"cpu": "a CPU", "isa": "avx2"},
        "versions": {}, "absent": {}, "skipped": {}, "results": rows,
        "ceilings": [{"isa": "avx2", "threads": 1, "gflops": 150.0, "levels": levels}],
    }  # fmt: skip


def test_figures_of_a_record_are_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from spfmt.bench.figures import draw_all

    drawn = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths = draw_all(_small_record(), tmp_path / name)
        drawn.append({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()})
        assert [p.name for p in paths] == [
            "sparsity-64x48.png", "roofline-64x48.png", "threads.png",
        ]  # fmt: skip
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 3
    assert all(content.startswith(b"\x89PNG") for content in drawn[0].values())


def test_speed_ups_are_drawn_where_they_are() -> None:
    pytest.importorskip("matplotlib")
    from spfmt.bench.figures import draw_sparsity, draw_threads

    record = _small_record()
    single = [r for r in record["results"] if r["threads"] == 1]
    axes = draw_sparsity(single, "here").axes
    assert [a.get_title(loc="left") for a in axes] == ["batch 1", "batch 64"]
    line = next(line for line in axes[0].lines if line.get_label() == "csr")
    np.testing.assert_allclose(sorted(zip(*line.get_data(), strict=True)), [(2, 2), (10, 10)])
    threads = draw_threads([r for r in record["results"] if r["asked"] == 0.1], "here").axes[0]
    points = [line for line in threads.lines if line.get_label() == "csr"]
    assert [p.get_xdata()[0] for p in points] == [2.0, 2.0]
