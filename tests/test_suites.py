"""The suites of ``python -m benchmarks.linear``, ``benchmarks.conv`` and ``benchmarks.models``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from spfmt.bench import (
    CONVOLUTIONS,
    Case,
    ImageGeometry,
    Session,
    WrongResult,
    parse_spec,
    random_weight,
)
from spfmt.bench.conv import output_size
from spfmt.bench.record import make_record, read_record, write_record
from spfmt.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_suites_are_chosen_by_name(
    benchmarks: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    linear = benchmarks("linear")
    command = benchmarks("command")
    assert command._names("all", linear.NAMES) == list(linear.NAMES)
    assert command._names("real,layers", linear.NAMES) == ["layers", "real"]
    with pytest.raises(SystemExit) as exit:
        linear.main(["--suite", "layers,speed"])
    assert exit.value.code == 2
    assert "got speed; expected layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "/nowhere/out.json"], "existing directory"),
        (["--json", "/"], "existing directory"),
        (["--seconds", "nan"], "seconds from 0 to 3600"),
        (["--seconds", "-1"], "seconds from 0 to 3600"),
        (["--seconds", "long"], "invalid"),
    ],
)
def test_suites_refuse_before_they_measure(
    benchmarks: Callable[[str], ModuleType],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit:
        benchmarks("linear").main(["--suite", "real", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_suite_without_its_data_says_so(
    benchmarks: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SPFMT_DATA", raising=False)
    linear = benchmarks("linear")
    path = tmp_path / "out.json"
    assert linear.main(["--suite", "real", "--json", str(path)]) == 0
    assert "names a directory" in read_record(path)["skipped"]["suite real"]
    assert linear.main(["--suite", "real", "--data", str(tmp_path), "--json", str(path)]) == 0
    assert len(read_record(path)["skipped"]) == 2
    capsys.readouterr()


def test_real_patterns_are_measured_in_every_format(
    benchmarks: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suites = benchmarks("suites")
    a = random_weight(parse_spec("csr"), (64, 96), 0.1)
    arrays = {"l/indptr": a.indptr, "l/indices": a.col_indices, "l/shape": np.array([64, 96])}
    np.savez(tmp_path / "dlmc_net_x.npz", **arrays)
    monkeypatch.setattr(suites, "REAL", {"dlmc_net_x": ("l",)})
    session = Session(0.0)
    suites.real(session, tmp_path)
    assert {row.source for row in session.rows} == {"net/l"}
    assert {row.name.split()[0] for row in session.rows if row.kind == "sparse"} == set(FORMATS)


# ------------------------------------------------------------------------------ convolutions


def test_suites_of_convolutions_ask_for_what_exists(
    benchmarks: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = benchmarks("conv")
    asked: list[tuple[str, Case]] = []

    def measure(self: Session, cases: Any, *args: Any, suite: str, **options: Any) -> None:
        asked.extend((suite, c) for c in ([cases] if isinstance(cases, Case) else cases))

    monkeypatch.setattr(Session, "measure", measure)
    monkeypatch.setattr(conv, "active_isa", lambda: "avx512")
    assert conv.main(["--suite", "all"]) == 0
    assert {suite for suite, _ in asked} == set(conv.SUITES)
    for _, case in asked:
        assert case.geometry is not None
        assert case.op in CONVOLUTIONS
        size = case.geometry.size[0]
        assert output_size(case) == (size // case.geometry.stride,) * 2
    shapes = {c.shape for suite, c in asked if suite == "training" and c.source == "VGG-19"}
    assert len(shapes) == 7
    assert len({c.density for suite, c in asked if suite == "blocks"}) == 6


def test_the_page_of_convolutions(
    benchmarks: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    page = importlib.import_module("convolutions")
    assert page.section(None, None) == page.NOTHING
    session = Session(0.0)
    for suite, op in (("training", "forward+backward"), ("blocks", "conv2d"), ("levels", "conv2d")):
        case = Case((8, 8, 3, 3), 0.5, 2, 1, op, "VGG-19", ImageGeometry((4, 4), 1, 1))
        kinds = [parse_spec("shuffled_block:4x4"), parse_spec("nm:2:4")]
        session.measure(case, kinds, suite=suite, dense=suite != "levels")
    path = tmp_path / "conv-here.json"
    write_record(make_record(session), path)
    record = read_record(path)
    text = page.section((path.name, record), None)
    assert "| layer | batch | fastest dense | shuffled_block 4x4 | nm |" in text
    assert "| 8 → 8, 3x3, 4x4 | 2 |" in text
    assert "## Where dense wins" in text
    page.draw(record, tmp_path)
    assert {p.name for p in tmp_path.glob("*.png")} == {"conv-layers.png", "conv-blocks.png"}


# ---------------------------------------------------------------------------------- networks


def test_steps_of_networks_are_measured(
    benchmarks: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    models, parts = benchmarks("models"), benchmarks("steps").PARTS
    rows: list[Any] = []
    session = Session(0.0, print, only="csr")
    models.step(session, "resnet20", 2, rows)
    assert [(r.name, r.layout) for r in rows] == [
        ("dense", "NCHW"), ("dense", "NHWC"), ("csr", "NCHW"), ("csr, ERK", "NCHW"),
    ]  # fmt: skip
    for row in rows[2:]:
        assert row.density == pytest.approx(0.1, abs=0.01)
    for row in rows:
        record = row.as_json()
        assert tuple(record["parts"]) == parts
        assert all(record["parts"][part] > 0 for part in parts)
        assert record["speedup"] == pytest.approx(min(r.us for r in rows[:2]) / row.us, rel=1e-3)
    assert "resnet20, one step of training, batch 2" in capsys.readouterr().out


def test_networks_that_differ_are_not_timed(
    benchmarks: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    models = benchmarks("models")
    monkeypatch.setattr(benchmarks("steps"), "_WORSE", 0)
    rows: list[Any] = []
    with pytest.raises(WrongResult, match=r"resnet20, csr: got .* away from float64"):
        models.step(Session(0.0, only="csr"), "resnet20", 2, rows)
    assert not rows


def test_networks_that_cannot_be_exported_are_skipped(
    benchmarks: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torch")
    from spfmt.errors import SpfmtError

    def fail(*args: Any) -> None:
        raise SpfmtError("no translation")

    monkeypatch.setattr(benchmarks("steps"), "in_onnxruntime", fail)
    session = Session(0.0, only="hrbp")
    rows: list[Any] = []
    benchmarks("models").inference(session, "resnet20", rows)
    assert rows == []
    assert "no translation" in session.skipped["resnet20, hrbp, in ONNX Runtime"]
