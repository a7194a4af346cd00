"""The command line: what it prints, what it keeps, and how it refuses."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import spfmt
from spfmt.cli import main

NEEDS = ("torch", "sklearn", "onnx", "onnxscript", "onnxruntime", "rich", "matplotlib")
FORMATS = ["dense", *spfmt.formats.FORMATS]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    scores = np.random.default_rng(0).random((16, 64), dtype="float32")
    path = tmp_path / "weight.safetensors"
    spfmt.NM.from_scores(scores, n=2, m=8, values=scores).save(path, metadata={"layer": "fc1"})
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Run a command that must fail; return its one line on stderr."""
    try:
        got = main(arguments)
    except SystemExit as exit:
        got = exit.code
    assert got == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "error: " in printed.err
    return printed.err


# ------------------------------------------------------------------------- info and inspect


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"spfmt {spfmt.__version__}\n"


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert capsys.readouterr().out == spfmt.show_config() + "\n"


def test_info_explains_a_bad_level(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad() -> str:
        raise spfmt.FormatError("got SPFMT_ISA='mmx';\n  expected a level")

    monkeypatch.setattr(spfmt, "show_config", bad)
    assert "got SPFMT_ISA='mmx'; expected a level" in refused(capsys, "info")


def test_inspect(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    assert main(["inspect", str(saved)]) == 0
    out = capsys.readouterr().out
    for part in (
        "NM(16x64, 2:8",
        "16 x 64",
        "256 (25.00 %)",
        "int32 16 x 16",
        "float32",
        "layer: fc1",
    ):
        assert part in out


def test_inspect_refuses_what_it_cannot_read(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
) -> None:
    assert "No such file" in refused(capsys, "inspect", str(tmp_path / "missing"))
    assert "Is a directory" in refused(capsys, "inspect", str(tmp_path))
    saved.write_bytes(saved.read_bytes()[:-3])
    assert "weight.safetensors" in refused(capsys, "inspect", str(saved))


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "90", "nan", "half", ""])
@pytest.mark.parametrize("option", ["--density", "--sparsity"])
def test_demo_refuses_shares(capsys: pytest.CaptureFixture[str], option: str, share: str) -> None:
    assert "expected a number between 0 and 1" in refused(capsys, "demo", f"{option}={share}")


def test_demo_refuses_contradictions(capsys: pytest.CaptureFixture[str]) -> None:
    assert "not allowed with" in refused(capsys, "demo", "--density=0.1", "--sparsity=0.9")
    assert "whole number" in refused(capsys, "demo", "--seed=-1")
    assert "--help" in refused(capsys)
    assert "invalid choice" in refused(capsys, "demon")


def test_demo_refuses_folders_that_cannot_be(
    capsys: pytest.CaptureFixture[str], saved: Path
) -> None:
    for module in NEEDS:
        pytest.importorskip(module)
    assert "which is a file" in refused(capsys, "demo", "--out", str(saved))
    assert "Not a directory" in refused(capsys, "demo", "--out", str(saved / "below"))
    # /proc exists and takes no files, for any user.
    assert "error: " in refused(capsys, "demo", "--out", "/proc")


def test_demo_names_missing_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import spfmt.cli.demo as demo

    find = demo.importlib.util.find_spec
    monkeypatch.setattr(
        demo.importlib.util, "find_spec", lambda n: None if n in {"rich", "torch"} else find(n)
    )
    message = refused(capsys, "demo")
    assert "rich" in message
    assert "torch" in message
    assert "sklearn" not in message
    assert "pip install 'spfmt[demo]'" in message


def test_command_line_needs_no_extras(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    real = builtins.__import__

    def without_extras(name: str, *rest: object, **kwargs: object) -> object:
        assert name.partition(".")[0] not in NEEDS, f"{name} imported"
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_extras)
    for module in [name for name in sys.modules if name.startswith("spfmt.cli.")]:
        monkeypatch.delitem(sys.modules, module)
    assert main(["info"]) == main(["inspect", str(saved)]) == 0


# ------------------------------------------------------------------------------------- demo


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A quick run of the demo: its folder, stdout and stderr."""
    for module in NEEDS:
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main(["demo", "--quick", "--sparsity=0.8", "--out", str(folder)]) == 0
    return folder, out.getvalue(), err.getvalue()


def test_demo_prints_one_table(run: tuple[Path, str, str]) -> None:
    folder, out, err = run
    for part in ("dense", "shuffled_block 16x16", "hrbp", "nm 6:32", "condensed", "csr"):
        assert part in out
    for kernel, formats in (("Lists", 3), ("Groups", 2)):
        assert out.count(f"{kernel}LinearRelu x2") == formats
    assert "1 thread" in out
    assert str(folder) in out
    assert "give the same answers" in err
    assert "sparse convolutions give the answers of dense ones" in err
    assert "Exported to ONNX too" in out
    assert "Traceback" not in err


def test_demo_keeps_models(run: tuple[Path, str, str]) -> None:
    import onnx

    folder = run[0]
    for name in FORMATS:
        onnx.checker.check_model(onnx.load(folder / f"{name}.onnx"), full_check=True)
    for name in FORMATS[1:]:
        for layer in ("hidden1", "hidden2", "conv.conv1", "conv.conv2"):
            tensor = spfmt.load(folder / f"{name}.{layer}.safetensors")
            assert tensor.format == name
            conv = layer.startswith("conv")
            assert len(tensor.shape) == (4 if conv else 2)
            assert tensor.density == pytest.approx(0.2, abs=0.06 if conv else 0.03)
    assert (folder / "demo.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_demo_writes_json(run: tuple[Path, str, str]) -> None:
    content = json.loads((run[0] / "results.json").read_text())
    assert [row["format"] for row in content["rows"]] == FORMATS
    assert content["settings"]["density"] == pytest.approx(0.2)
    assert content["machine"]["threads"] == 1
    assert {"cpu", "isa", "cores"} < set(content["machine"])
    assert {"spfmt", "torch", "onnxruntime", "python"} < set(content["versions"])
    dense = content["rows"][0]
    for row in content["rows"]:
        assert row["onnx_bytes"] == (run[0] / f"{row['format']}.onnx").stat().st_size
        assert 0.3 < row["accuracy"] <= 1
        assert row["difference"] < 1e-4
        for batch in ("1", "256"):
            latency = row["latency"][batch]
            assert 0 < latency["low"] <= latency["median"] <= latency["high"]
            ratio = dense["latency"][batch]["median"] / latency["median"]
            assert row["speed_up"][batch] == pytest.approx(ratio)


def test_demo_trains_convolutions(run: tuple[Path, str, str]) -> None:
    content = json.loads((run[0] / "results.json").read_text())
    rows = content["convolutions"]
    assert [row["format"] for row in rows] == FORMATS
    assert content["sparse_convolutions"] == ["conv1", "conv2"]
    for row in rows:
        assert 0 < row["accuracy"] <= 1
        assert row["difference"] < 1e-4
        assert row["train_seconds"] > 0
        assert row["milliseconds"] > 0
        assert (row["weights_bytes"] > 0) == (row["format"] != "dense")
    for name, key in (("train", "train_seconds"), ("answer", "milliseconds")):
        slower = any(rows[0][key] / row[key] < 0.95 for row in rows[1:])
        assert (f"Dense convolutions {name} faster at this size" in run[1]) == slower


def test_convolutions_are_compared_with_dense_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    for module in NEEDS:
        pytest.importorskip(module)
    from spfmt.bench.timing import Timing
    from spfmt.cli import _cnn
    from spfmt.cli._deploy import Mismatch, deploy
    from spfmt.cli._network import Digits, Settings

    model = _cnn.build(Settings(channels=8), "csr").eval()
    x, y = torch.rand(4, 64), torch.zeros(4, dtype=torch.int64)
    deployed = deploy(model, "csr", tmp_path, _cnn.CONVOLUTIONS)
    given = deployed, 1.0, Timing(5e3, 1, 1, 1, 0, False, 0)
    data = Digits(x, y, x, y)
    row = _cnn._row("csr", *given, data)
    assert row.milliseconds == 5
    assert row.kernels == {"ListsConvRelu": 2}

    def wrong(twin: torch.nn.Module) -> None:
        twin.conv1 = torch.nn.Conv2d(4, 8, 3, padding=1)

    monkeypatch.setattr(_cnn, "densify", wrong)
    with pytest.raises(Mismatch, match="csr: got logits of convolutions"):
        _cnn._row("csr", *given, data)


def test_table_says_where_dense_is_faster(run: tuple[Path, str, str]) -> None:
    content = json.loads((run[0] / "results.json").read_text())
    slower = any(v < 0.95 for row in content["rows"] for v in row["speed_up"].values())
    assert ("dense is faster at this size" in run[1]) == slower


def test_demo_reports_a_wrong_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in NEEDS:
        pytest.importorskip(module)
    from spfmt.cli import _run
    from spfmt.cli._deploy import Mismatch

    def wrong(*args: object) -> None:
        raise Mismatch("got logits that differ")

    monkeypatch.setattr(_run, "load_digits", wrong)
    assert "logits that differ" in refused(capsys, "demo", "--quick", code=1)


def test_answers_are_compared() -> None:
    torch = pytest.importorskip("torch")
    for module in NEEDS:
        pytest.importorskip(module)
    from spfmt.cli._deploy import Deployed, Mismatch
    from spfmt.cli._measure import answers

    class Opened:
        def __init__(self, error: float) -> None:
            self.error = error

        def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [next(iter(feeds.values())) * np.float32(1 + self.error)]

    model = Deployed(torch.nn.Sequential(torch.nn.Identity()), Path("none"), (), ())
    x = np.arange(12, dtype="float32").reshape(3, 4)
    good = {("nm", False): Opened(0.0), ("nm", True): Opened(1e-6)}
    logits, difference = answers(model, good, "nm", x)
    assert difference == pytest.approx(1e-6, rel=0.1)
    np.testing.assert_allclose(logits, x, rtol=1e-5)
    for bad in (1e-3, float("nan")):
        with pytest.raises(Mismatch, match="nm: got logits"):
            answers(model, {**good, ("nm", True): Opened(bad)}, "nm", x)
