"""The cost model: what a product is predicted to take.

The model itself is C++ (``cpp/cost/cost.h``), because the kernels choose their variant by it, also
inside ONNX Runtime. Here it is read and shown. Its coefficients are compiled in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import spfmt._kernels as _kernels

from . import threads as _threads
from .errors import format_error

__all__ = ["VARIANTS", "Choice", "CostModel", "Geometry", "cost_model", "duration"]

OPS = ("spmm", "spmm_t", "sddmm")
CONVOLUTIONS = ("conv2d", "conv2d_input", "conv2d_weight")

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
        (over up to 64); of groups ``"bands"`` (over rows) or ``"panels"``; of both ``"images"``
        where they convolve, of groups also ``"rows"``, as lists do. It never depends on the number
        of threads.
    threads : int
        1 where waking others costs more than it saves.
    seconds : float
        Predicted time of a call from numpy, the values packed already.
    """

    variant: str
    threads: int
    seconds: float


class Geometry(NamedTuple):
    """A convolution on maps of one size; `spfmt.convolution.Convolution.geometry` makes it.

    Attributes
    ----------
    y, x : tuple of int
        Along each axis: size of the maps of X, size of those of Y, kernel, stride, padding in
        front, dilation.
    groups : int
    """

    y: tuple[int, int, int, int, int, int]
    x: tuple[int, int, int, int, int, int]
    groups: int

    def numbers(self) -> tuple[int, ...]:
        """Return what the compiled model takes."""
        return (*self.y, *self.x, self.groups)


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
    isa: str,
    op: str,
    summary: Any,
    batch: int,
    threads: int,
    dtype: str = "float32",
    geometry: Geometry | None = None,
) -> Choice:
    """Return how a product would run under the model in use; with a geometry one of images."""
    numbers = None if geometry is None else geometry.numbers()
    return Choice(*_kernels.choose(isa, op, summary, batch, dtype, threads, numbers))


def dense_image_seconds(
    op: str, shape: tuple[int, int], batch: int, threads: int, geometry: Geometry
) -> float:
    """Return the time of a dense convolution's product at this CPU's best level, forced or not."""
    isa = _kernels.best_level()
    numbers = geometry.numbers()
    return float(_kernels.dense_image_seconds(isa, op, *shape, batch, numbers, threads))


def check_geometry(geometry: Any, shape: tuple[int, int]) -> None:
    """Raise FormatError where a matrix of this shape is no weight of the convolution."""
    if not isinstance(geometry, Geometry):
        raise format_error(
            f"a geometry of type {type(geometry).__name__}",
            "a spfmt.cost.Geometry",
            "call geometry(height, width) of a Convolution",
        )
    cells = geometry.y[2] * geometry.x[2]
    if shape[0] % geometry.groups or shape[1] % cells:
        raise format_error(
            f"a geometry of {geometry.groups} group(s) and {cells} cells for a weight of {shape}",
            "rows that the groups divide, and columns that the cells divide",
            "make the geometry of the weight's own shape",
        )


def check_workload(
    batch: int, threads: int | None, op: str, ops: tuple[str, ...] = OPS
) -> tuple[int, int]:
    """Check what a prediction is asked for; return the batch and the threads that it means."""
    used = _threads.get_num_threads() if threads is None else threads
    for name, value, most in (("batch", batch, 2**31 - 1), ("threads", used, 1024)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not 1 <= value <= most:
            raise format_error(f"{name}={value!r}", f"an int from 1 to {most}", f"pass {name}=1")
    if op not in ops:
        raise format_error(f"op {op!r}", f"one of {ops}", f"{ops[0]} is the forward product")
    return int(batch), int(used)


def duration(seconds: float) -> str:
    """Write a time with three digits, in microseconds or milliseconds.

    >>> duration(2.5e-5), duration(0.0123)
    ('25.0 us', '12.3 ms')
    """
    scaled, unit = (seconds * 1e6, "us") if seconds < 1e-3 else (seconds * 1e3, "ms")
    digits = 2 if scaled < 10 else 1 if scaled < 100 else 0
    return f"{scaled:.{digits}f} {unit}"
