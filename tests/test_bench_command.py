"""The command `spfmt bench` of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fresh_python import run_python
from test_bench import CONV

from spfmt.bench.record import read_record, select
from spfmt.cli import main


def test_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    code = main([
        "bench", "--shape", "48x64,32x16", "--format", "condensed,nm:2:4", "--sparsity", "0.5,0.75",
        "--batch", "1,3", "--op", "spmm,sddmm", "--layout", "both", "--seconds", "0",
        "--json", str(path),
    ])  # fmt: skip
    assert code == 0
    rows = read_record(path)["results"]
    sparse = [r for r in rows if r["kind"] == "sparse"]
    assert {tuple(r["shape"]) for r in sparse} == {(48, 64), (32, 16)}
    assert {r["asked"] for r in sparse} == {0.5, 0.25}
    assert {(r["op"], r["batch"]) for r in sparse} == {
        (op, batch) for op in ("spmm", "sddmm") for batch in (1, 3)
    }
    assert {r["name"] for r in sparse} == {"condensed", "nm 2:4"}
    assert f"wrote {path}" in capsys.readouterr().out


def test_command_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "figures"
    code = main([
        "bench", "--shape", "48x64", "--format", "csr", "--sparsity", "0.5,0.75", "--batch", "1,3",
        "--seconds", "0", "--figures", str(folder),
    ])  # fmt: skip
    assert code == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {"sparsity-48x64.png", "roofline-48x64.png"}


def test_weights_without_nonzeros_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = ["--shape", "4x4", "--format", "csr", "--sparsity", "0.99999999", "--batch", "1"]
    assert main(["bench", *arguments, "--seconds", "0", "--json", str(path)]) == 0
    (row,) = select(read_record(path)["results"], name="csr")
    assert (row["density"], row["gflops"], row["asked"]) == (0, 0, 1e-8)
    assert row["roof"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "768"], "expected outputs x inputs"),
        (["--shape", "0x5"], "whole number from 1"),
        (["--shape", "4x4,5x-1"], "whole number from 1"),
        (["--format", "dense"], "expected condensed, csr"),
        (["--format", "nm:5:4"], "N <= M"),
        (["--sparsity", "90"], "between 0 and 1"),
        (["--sparsity", "0.5,nan"], "between 0 and 1"),
        (["--batch", "0"], "whole number from 1"),
        (["--batch", "1,,2"], "whole number from 1"),
        (["--threads", "100000"], "whole number from 1 to"),
        (["--op", "conv"], "spmm, spmm_t, sddmm, conv2d"),
        (["--layout", "hwcn"], "invalid choice"),
        (["--layout", "nchw"], "expected bc, cb or both"),
        (["--op", "conv2d"], "choose --op spmm"),
        (["--map", "8x8"], "add --conv"),
        (["--groups", "2"], "add --conv"),
        ([*CONV[:2]], "add --map"),
        ([*CONV, "--shape", "4x4"], "not allowed with"),
        ([*CONV, "--op", "spmm"], "choose --op conv2d"),
        ([*CONV, "--layout", "cb"], "expected nchw, nhwc or both"),
        ([*CONV, "--stride", "0"], "whole number from 1"),
        ([*CONV, "--padding", "-1"], "whole number from 0"),
        ([*CONV, "--groups", "5"], "a divisor of 8"),
        (["--conv", "8x8x3", "--map", "8x8"], "expected outputs x inputs x height x width"),
        (["--conv", "8x8x3x1", "--map", "8x8"], "add --padding"),
        (["--conv", "8x8x9x9", "--map", "2x2", "--padding", "0"], "no smaller than the kernel"),
        (["--conv", "8x8x3x3", "--map", "8"], "expected height x width"),
        (["--conv", "8x8x3x3", "--map", "999999x999999"], "choose a smaller shape"),
        (["--seconds", "-1"], "from 0 to 3600"),
        (["--shape", "9999999x9999999"], "choose a smaller shape"),
        (["--json", "/nowhere/out.json"], "existing directory"),
        (["--json", "/"], "existing directory"),
        (["--figures", "/proc/figures"], "error: "),
    ],
)
def test_command_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["bench", *arguments])
    except SystemExit as exit:
        code = exit.code  # type: ignore[assignment]
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


WITHOUT = """if True:
    import sys
    for name in {names!r}:
        sys.modules[name] = None
    from spfmt.cli import main
    sys.exit(main({arguments!r}))
    """


def _without(names: list[str], *arguments: str) -> Any:
    call = ["bench", "--shape", "32x48", "--batch", "2", "--seconds", "0", *arguments]
    return run_python(WITHOUT.format(names=names, arguments=call))


def test_numpy_is_the_dense_layer_where_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    names = ["torch", "onnx", "onnxruntime", "scipy", "matplotlib"]
    result = _without(names, "--baselines", "--json", str(path))
    assert result.returncode == 0, result.stderr
    for name in ("torch", "onnxruntime", "scipy"):
        assert f"absent: {name} (" in result.stdout
    record = read_record(path)
    assert {r["name"] for r in record["results"] if r["kind"] == "dense"} == {"numpy dense"}
    assert {"torch", "onnxruntime", "scipy"} <= set(record["absent"])
    assert all(r["speedup"] for r in record["results"])
    assert not [r for r in record["results"] if r["kind"] == "baseline"]
    assert any(what.startswith("torch CSR") for what in record["skipped"])


def test_command_names_packages_that_it_needs(tmp_path: Path) -> None:
    result = _without(["torch"], "--op", "layer")
    assert result.returncode == 2
    assert "pip install 'spfmt[torch]'" in result.stderr
    result = _without(["matplotlib"], "--figures", str(tmp_path))
    assert result.returncode == 2
    assert "without matplotlib" in result.stderr
