"""The suites of ``python -m benchmarks.linear``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from spfmt.bench import (
    Session,
    parse_spec,
    random_weight,
)
from spfmt.bench.record import read_record
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
