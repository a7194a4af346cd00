"""The benchmark of the CUDA kernels on their emulation: what it measures, keeps and refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch_cuda_cases import Place  # noqa: E402

from spfmt.cuda import library  # noqa: E402

_path = Path(__file__).resolve().parent.parent / "benchmarks" / "cuda.py"
_spec = importlib.util.spec_from_file_location("benchmarks_cuda", _path)
assert _spec is not None
assert _spec.loader is not None
cuda: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = cuda  # where dataclasses look their annotations up
_spec.loader.exec_module(cuda)

LINEAR = cuda.Case((64, 64), 0.5, 3, "float32")
CONV = cuda.Case((16, 32, 3, 1, 4), 0.75, 2, "float32")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "ROUNDS", 2)


def run(path: Path, cases: list[cuda.Case], **options: Any) -> dict[str, Any]:
    with Place("cpu").on():
        return cuda.run(cases, path, cuda.Wall(), "cpu", **options)


def test_rows_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cuda.json"
    record = run(path, [LINEAR])
    times = record["rows"][LINEAR.name]["forward_us"]
    assert {"dense", *cuda.FORMATS} <= set(times)
    assert all(t > 0 for t in times.values())
    assert record["rows"][LINEAR.name]["density"]["csr"] == pytest.approx(0.5, abs=0.01)
    assert json.loads(path.read_text()) == record
    monkeypatch.setattr(cuda, "TRAINED", 1)
    again = run(path, [LINEAR, CONV])
    assert again["rows"][LINEAR.name] == record["rows"][LINEAR.name], "not measured again"
    conv = again["rows"][CONV.name]
    groups = {name for name in cuda.FORMATS if name.startswith("shuffled_block")}
    assert set(conv["forward_us"]) == set(conv["backward_us"]) == {"dense", *groups}
    assert again["ceilings"] == record["ceilings"]


def test_runs_stop_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(tmp_path / "cuda.json", [LINEAR], seconds=0)
    assert record["rows"] == {}
    assert "run again to go on" in capsys.readouterr().out


def test_wrong_products_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cuda.json"
    monkeypatch.setattr(cuda.SparseLinear, "forward", lambda self, x: x.new_ones(len(x), 64))
    record = run(path, [LINEAR])
    row = record["rows"][LINEAR.name]
    assert row["left_out"]["csr"].startswith("WRONG: csr is off by")
    assert "csr" not in row["forward_us"]
    assert cuda.wrong(record) == [LINEAR.name]


def test_what_cannot_run_is_left_out_with_its_reason() -> None:
    def fails() -> Any:
        raise RuntimeError("no such kernel\nand more")

    left_out: dict[str, str] = {}
    assert cuda._that_run({"one": fails, "two": lambda: fails}, left_out) == {}
    assert left_out == {"one": "no such kernel", "two": "no such kernel"}


def test_records_of_other_code_are_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "cuda.json"
    record = run(path, [])
    path.write_text(json.dumps({**record, "commit": "another"}))
    with pytest.raises(SystemExit, match="begun elsewhere, or by other code"):
        run(path, [])


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in cuda.cases()]
    assert len(set(names)) == len(names) > 200


def test_command_without_a_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_found", lambda: (None, "not here; fix: there"))
    monkeypatch.setattr("sys.argv", ["cuda", "--json", str(tmp_path / "record.json")])
    assert cuda.main() == 2
    assert "not here; fix: there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
