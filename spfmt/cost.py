"""The cost model: what a product will take on this machine, and where its numbers come from.

The model itself is C++ (``cpp/cost.h``), because the kernels choose their variant by it, also
inside ONNX Runtime. Here it is read, written and shown. Its coefficients are compiled in until
:func:`spfmt.calibrate` measures this CPU and keeps the result in the cache directory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import spfmt._kernels as _kernels

from ._files import replace_file

__all__ = ["VARIANTS", "Choice", "CostModel", "cost_model", "duration"]

VARIANTS: dict[str, list[tuple[str, tuple[str, ...], int]]] = {"lists": [], "groups": []}
"""The kernel variants of each layout: name, products, and the largest batch that it takes."""
for _name, _layout, _ops, _most in _kernels.variants():
    VARIANTS[_layout].append((_name, tuple(_ops), _most))

logger = logging.getLogger("spfmt")


class Choice(NamedTuple):
    """How a product would run.

    Attributes
    ----------
    variant : str
        Of lists ``"lookup"`` (lanes over rows), ``"octets"`` (over eight samples) or ``"panels"``
        (over up to 64); of groups ``"bands"`` (over rows) or ``"panels"``. It never depends on the
        number of threads.
    threads : int
        1 where waking others costs more than it saves.
    seconds : float
        Predicted time of a call from numpy, the values packed already.
    """

    variant: str
    threads: int
    seconds: float


@dataclass(frozen=True)
class CostModel:
    """Coefficients of the model in use, and where they come from.

    Attributes
    ----------
    coefficients : mapping of str to float
        Seconds per unit, by names such as ``"avx512.lists.spmm.lookup.stream"``; cache sizes in
        bytes; `docs/advise.md` explains them.
    cpu : str
        The CPU that they are used on.
    date : str
        Day of the calibration, empty for the defaults.
    levels : tuple of str
        Instruction-set levels that were measured; the others hold the defaults.
    path : str
        The calibration's file, empty if none is in use.
    """

    coefficients: Mapping[str, float]
    cpu: str
    date: str = ""
    levels: tuple[str, ...] = ()
    path: str = ""

    @property
    def origin(self) -> str:
        """One line: defaults, or calibrated when."""
        if not self.date:
            return "defaults (spfmt.calibrate() measures this CPU)"
        where = f", {self.path}" if self.path else ", not saved"
        return f"calibrated {self.date} at {', '.join(self.levels)}{where}"

    def __str__(self) -> str:
        rows: dict[str, list[str]] = {}
        lines = [f"cost model: {self.origin}", f"CPU: {self.cpu}"]
        for name, value in self.coefficients.items():
            row, _, term = name.rpartition(".")
            if row:
                rows.setdefault(row, []).append(f"{term} {value:.3g}")
            else:
                lines.append(f"{name} {value:.6g}")
        lines += [f"{row:<34}{'  '.join(terms)}" for row, terms in rows.items()]
        return "\n".join(lines)


_lock = threading.Lock()
_current: CostModel | None = None


def cost_model() -> CostModel:
    """Return the model in use, reading this CPU's calibration at the first call.

    A file that is corrupt, unreadable, or measured on another CPU or with other kernels is ignored
    with a warning in the log. The directory is ``$SPFMT_CACHE_DIR``, ``$XDG_CACHE_HOME/spfmt`` or
    ``~/.cache/spfmt``.
    """
    return _current or load()


def load() -> CostModel:
    """Read this CPU's calibration (again) and use it, or the defaults where there is none."""
    global _current
    with _lock:
        path = str(_kernels.cost_file())
        found = _kernels.read_calibration(os.fsencode(path))
        if found["ignored"]:
            logger.warning(
                "calibration %s is ignored: %s; the default cost model is used. Delete the file, "
                "or run spfmt.calibrate()", path, found["ignored"],
            )  # fmt: skip
        _kernels.set_cost_model(found["coefficients"])
        _current = CostModel(
            found["coefficients"],
            _kernels.cpu_key(),
            found["date"],
            tuple(found["levels"].split()),
            path if found["date"] else "",
        )
    return _current


def use(model: CostModel) -> None:
    """Let every product that begins from now on be chosen by `model`."""
    global _current
    with _lock:
        _kernels.set_cost_model(dict(model.coefficients))
        _current = model


def save(model: CostModel) -> str:
    """Write a calibration to the cache directory, whole or not at all, and return its path.

    Raises
    ------
    OSError
        Where there is no cache directory or it cannot be written.
    """
    path = str(_kernels.cost_file())
    if not path:
        raise OSError("no cache directory: set SPFMT_CACHE_DIR, XDG_CACHE_HOME or HOME")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    text = _kernels.format_calibration(dict(model.coefficients), model.date, " ".join(model.levels))
    replace_file(path, text.encode())
    return path


@contextlib.contextmanager
def forced(variant: str | None) -> Iterator[None]:
    """Run one variant in every product that this thread calls, wherever it exists."""
    _kernels.force_variant(variant or "")
    try:
        yield
    finally:
        _kernels.force_variant("")


def choose(
    isa: str, op: str, summary: Any, batch: int, threads: int, dtype: str = "float32"
) -> Choice:
    """Return how a product would run under the model in use."""
    cost_model()
    return Choice(*_kernels.choose(isa, op, summary, batch, dtype, threads))


def duration(seconds: float) -> str:
    """Write a time with three digits, in microseconds or milliseconds.

    >>> duration(2.5e-5), duration(0.0123)
    ('25.0 us', '12.3 ms')
    """
    scaled, unit = (seconds * 1e6, "us") if seconds < 1e-3 else (seconds * 1e3, "ms")
    digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
    return f"{scaled:.{digits}f} {unit}"
