"""The cost model: what a product is predicted to take.

The model itself is C++ (``cpp/cost/cost.h``), because the kernels choose their variant by it, also
inside ONNX Runtime. Here it is read and shown. Its coefficients are compiled in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import spfmt._kernels as _kernels

__all__ = ["VARIANTS", "Choice", "CostModel", "cost_model", "duration"]

VARIANTS: dict[str, list[tuple[str, tuple[str, ...], int]]] = {"lists": [], "groups": []}
"""The kernel variants of each layout: name, products, and the largest batch that it takes."""
for _name, _layout, _ops, _most in _kernels.variants():
    VARIANTS[_layout].append((_name, tuple(_ops), _most))


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
    """Coefficients of the model in use; print it for a table.

    Attributes
    ----------
    coefficients : mapping of str to float
        Seconds per unit, by names such as ``"avx512.lists.spmm.lookup.stream"``; cache sizes in
        bytes; `docs/advise.md` explains them.
    """

    coefficients: Mapping[str, float]

    def __str__(self) -> str:
        rows: dict[str, list[str]] = {}
        lines = []
        for name, value in self.coefficients.items():
            row, _, term = name.rpartition(".")
            if row:
                rows.setdefault(row, []).append(f"{term} {value:.3g}")
            else:
                lines.append(f"{name} {value:.6g}")
        return "\n".join([*lines, *(f"{row:<34}{'  '.join(terms)}" for row, terms in rows.items())])


def cost_model() -> CostModel:
    """Return the model in use: the compiled-in coefficients, unless `use` has set others."""
    return CostModel(_kernels.cost_model())


def use(model: CostModel) -> None:
    """Let every product that begins from now on be chosen by `model`: for tests and comparisons."""
    _kernels.set_cost_model(dict(model.coefficients))


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
    return Choice(*_kernels.choose(isa, op, summary, batch, dtype, threads))


def duration(seconds: float) -> str:
    """Write a time with three digits, in microseconds or milliseconds.

    >>> duration(2.5e-5), duration(0.0123)
    ('25.0 us', '12.3 ms')
    """
    scaled, unit = (seconds * 1e6, "us") if seconds < 1e-3 else (seconds * 1e3, "ms")
    digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
    return f"{scaled:.{digits}f} {unit}"
