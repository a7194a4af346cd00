"""``spfmt demo``: the main job, from training to ONNX Runtime, on real data."""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from spfmt.errors import MissingDependency, format_error

__all__ = ["demo"]

_NEEDS = ("torch", "sklearn", "onnx", "onnxscript", "onnxruntime", "rich", "matplotlib")


def demo(out: Path | None, *, density: float = 0.1, seed: int = 0, quick: bool = False) -> None:
    """Train, convert, save, export, check and time; print one table.

    Parameters
    ----------
    out : Path, optional
        Folder for models, ``results.json`` and ``demo.png``; nothing is kept without it.
    density : float
        Share of the hidden weights that stays.
    seed : int
    quick : bool
        A tiny network and few rounds: shows that everything works, not how well.

    Raises
    ------
    MissingDependency
        Names what is not installed and the pip command.
    FormatError
        Where `out` is no folder.
    OSError
        Where `out` cannot be made or written.
    Mismatch
        Where two ways to compute the same answer disagree.
    """
    _check_installed()
    with _folder(out) as folder:
        # Only now: without the demo's extras these modules cannot even be imported.
        from spfmt.cli._network import Settings
        from spfmt.cli._results import show
        from spfmt.cli._run import run

        settings = Settings(density=density, seed=seed)
        if quick:
            settings = replace(settings, width=128, epochs=2, rounds=3, channels=32, conv_epochs=2)
        results = run(settings, folder, keep=out is not None)
        show(results)
    if out is not None:
        print(f"Models, results.json and demo.png are in {out}.")


def _check_installed() -> None:
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"got no module {', '.join(missing)}; spfmt demo needs it; run: "
            "pip install 'spfmt[demo]'"
        )


@contextlib.contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Yield the folder of the results, known to be writable, or a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="spfmt-demo-") as folder:
            yield Path(folder)
        return
    if out.exists() and not out.is_dir():
        raise format_error(f"--out {out}, which is a file", "a folder", "name another one")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out):  # says now, not after a minute, that it cannot be written
        pass
    yield out
