"""A results directory: who owns it, its metrics, and its files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spfmt._files import replace_file
from spfmt.errors import FormatError, format_error
from spfmt.recipes.recipe import Recipe, differences, load_recipe

__all__ = [
    "Metrics",
    "claimed",
    "file_checksum",
    "read_metrics",
    "seed_folder",
    "settle",
    "write_text",
]

RECIPE, METRICS = "recipe.toml", "metrics.jsonl"
_LOCK = ".spfmt-lock"
_REMNANT = ".spfmt-*.tmp"  # what a killed process had begun to write, see replace_file


def seed_folder(out: Path, seed: int) -> Path:
    """Return where the results of a seed are."""
    return out / f"seed-{seed}"


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    replace_file(os.path.realpath(path), text.encode())


def file_checksum(path: Path) -> int | None:
    """Return a number that tells whether a file is what was written; None where there is none."""
    return zlib.crc32(path.read_bytes()) if path.is_file() else None


@contextlib.contextmanager
def claimed(out: Path, recipe: Recipe, resume: bool) -> Iterator[None]:
    """Hold a results directory, which is made if need be, for one run.

    Raises
    ------
    FormatError
        Where it holds the results of another recipe, or of this one without `resume`, or files of
        something else, or where another process trains there.
    """
    if out.exists() and not out.is_dir():
        raise format_error(f"--out {out}, which is a file", "a folder", "name another one")
    out.mkdir(parents=True, exist_ok=True)
    _check_foreign(out)
    with (out / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however
        except OSError:
            raise format_error(
                f"{out}, in which another process trains", "a directory of its own", "wait for it"
            ) from None
        if (out / RECIPE).exists():
            _check_recipe(out, recipe, resume)
        for remnant in out.rglob(_REMNANT):
            remnant.unlink()
        yield


def settle(out: Path, recipe: Recipe) -> None:
    """Write the recipe into its results directory, once it is known that it can run."""
    if not (out / RECIPE).exists():
        write_text(out / RECIPE, recipe.to_toml())


def _check_foreign(out: Path) -> None:
    ours = {_LOCK, *(p.name for p in out.glob(_REMNANT))}
    others = sorted(p.name for p in out.iterdir() if p.name not in ours)
    if others and RECIPE not in others:
        raise format_error(
            f"{out}, which holds {others[0]} and no {RECIPE}",
            "an empty directory or one of results",
            "name another --out",
        )


def _check_recipe(out: Path, recipe: Recipe, resume: bool) -> None:
    changed = differences(recipe, _recipe_in(out))
    if changed:
        raise format_error(
            f"another recipe than that of the results in {out}: {', '.join(changed)}",
            "the same recipe",
            "name another --out, or undo the change",
        )
    if not resume:
        raise format_error(
            f"{out}, which holds results of this recipe", "a new directory", "add --resume to go on"
        )


def _recipe_in(out: Path) -> Recipe:
    try:
        return load_recipe(out / RECIPE)
    except FormatError as error:
        raise format_error(
            f"a damaged {out / RECIPE}: {error}", "what a run wrote there", "name another --out"
        ) from None


class Metrics:
    """A file of JSON lines that goes on exactly where a checkpoint was taken, at `size` bytes.

    What a killed run wrote after that is taken away, for it will come again. A file that is shorter
    is a FormatError.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._file = path.open("ab")
        there = self._file.tell()
        if there < size:
            self._file.close()
            raise format_error(
                f"{path} of {there} bytes",
                f"the {size} that the checkpoint knows",
                f"restore it, or remove {path.parent}: the seed is trained again",
            )
        self._file.truncate(size)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a line, which others can read at once."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Flush the file to the disk and return its size."""
        os.fsync(self._file.fileno())
        return self._file.tell()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file; a FormatError where one is damaged."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise format_error(
                f"a damaged line {number} of {path} ({error})",
                "what a run wrote",
                f"restore it, or remove {path.parent}: the seed is trained again",
            ) from None
    return found
