"""Float64 results with rounding bounds: nothing is timed before it is right.

A float32 sum of n products differs from the exact one by at most (n + 2) eps sum |a||x|, in
whatever order it is added (Higham 2002, section 3.1); that bound is the only tolerance here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spfmt.errors import SpfmtError
from spfmt.formats import SparseTensor

__all__ = ["Exact", "WrongResult", "product"]

Array = npt.NDArray[Any]
_STRIP_CELLS = 1 << 23
_EPS = float(np.finfo(np.float32).eps)


class WrongResult(SpfmtError):
    """A contender's result is outside the rounding bound; no time is reported for it."""


@dataclass(frozen=True)
class Exact:
    """A result in float64, and how far a float32 computation may be from it.

    Attributes
    ----------
    value, bound : ndarray of float64, of one shape
    """

    value: Array
    bound: Array

    def require(self, name: str, got: Any) -> None:
        """Compare a result with the exact one.

        Raises
        ------
        WrongResult
            Where the shape differs or an element is out of bounds; NaN always is.
        """
        got = np.asarray(got)
        if got.shape != self.value.shape:
            raise WrongResult(
                f"{name}: got a result of shape {got.shape}; expected {self.value.shape}; "
                "no time is reported for it"
            )
        wrong = ~(np.abs(got - self.value) <= self.bound)
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise WrongResult(
                f"{name}: got {got[place]} at {place}; expected {self.value[place]} within "
                f"{self.bound[place]:.1e} ({int(wrong.sum())} of {wrong.size} elements are wrong); "
                "no time is reported for it"
            )


def product(op: str, a: SparseTensor | Array, x: Array, dy: Array) -> Exact:
    """Compute one of the three products of a sparse or dense weight in float64.

    Parameters
    ----------
    op : {"spmm", "spmm_t", "sddmm"}
    a : SparseTensor or ndarray, (R, C)
    x : ndarray, (B, C)
        Used by spmm and sddmm.
    dy : ndarray, (B, R)
        Used by spmm_t and sddmm.

    Returns
    -------
    Exact
        Y (B, R), dX (B, C), or the gradient: (nnz,) of a sparse weight and (R, C) of a dense one.

    Notes
    -----
    The weight is made dense strip by strip of rows, so memory stays bounded for any number of
    rows.
    """
    matrix = _Matrix(a)
    if op == "sddmm":
        return _gradient(matrix, x, dy)
    rows, cols = matrix.shape
    value = np.zeros((x.shape[0], rows if op == "spmm" else cols))
    size = np.zeros_like(value, dtype=np.float32)
    terms = np.zeros(cols, np.int64)
    x64, dy64 = x.astype(np.float64), dy.astype(np.float64)
    for first, last, strip in matrix.strips():
        share = np.abs(strip).astype(np.float32)
        if op == "spmm":
            value[:, first:last] = x64 @ strip.T
            size[:, first:last] = np.abs(x) @ share.T
        else:
            value += dy64[:, first:last] @ strip
            size += np.abs(dy[:, first:last]) @ share
            terms += np.count_nonzero(strip, axis=0)
    most = matrix.fullest_row if op == "spmm" else int(terms.max(initial=0))
    return Exact(value, (most + 2) * _EPS * size.astype(np.float64))


def _gradient(matrix: _Matrix, x: Array, dy: Array) -> Exact:
    values, sizes = [], []
    x64, dy64 = x.astype(np.float64), dy.astype(np.float64)
    for first, last, _ in matrix.strips():
        values.append(matrix.pick(dy64[:, first:last].T @ x64, first, last))
        share = np.abs(dy[:, first:last]).T @ np.abs(x)
        sizes.append(matrix.pick(share, first, last))
    factor = (x.shape[0] + 2) * _EPS
    return Exact(matrix.restore(values), factor * matrix.restore(sizes).astype(np.float64))


class _Matrix:
    """A weight as strips of dense rows, and the positions that its values stand for."""

    def __init__(self, a: SparseTensor | Array) -> None:
        self.dense = None if isinstance(a, SparseTensor) else a
        if isinstance(a, SparseTensor):
            self.shape: tuple[int, int] = a.matrix_shape
            rows, self.cols = a.plan.layout.coordinates()
            self.values = np.asarray(a.values).reshape(-1)
            # Row lists are sorted already; tiles of shuffled rows are not.
            self.order = None if (rows[1:] >= rows[:-1]).all() else np.argsort(rows, kind="stable")
            counts = np.bincount(rows, minlength=self.shape[0])
            self.starts = np.concatenate([[0], np.cumsum(counts)])
            self.fullest_row = int(counts.max(initial=0))
        else:
            self.shape = a.shape[0], a.shape[1]
            self.fullest_row = self.shape[1]

    def strips(self) -> Iterator[tuple[int, int, Array]]:
        """Yield first row, last row and their float64 matrix."""
        rows, cols = self.shape
        step = max(1, _STRIP_CELLS // max(1, cols))
        for first in range(0, rows, step):
            last = min(rows, first + step)
            if self.dense is not None:
                yield first, last, self.dense[first:last].astype(np.float64)
                continue
            strip = np.zeros((last - first, cols))
            row, place = self._places(first, last)
            strip[row, self.cols[place]] = self.values[place]
            yield first, last, strip

    def _places(self, first: int, last: int) -> tuple[Array, Any]:
        """Rows (from `first`) and places among the values of what a strip holds."""
        begin, end = self.starts[first], self.starts[last]
        row = np.repeat(np.arange(last - first), np.diff(self.starts[first : last + 1]))
        return row, slice(begin, end) if self.order is None else self.order[begin:end]

    def pick(self, full: Array, first: int, last: int) -> Array:
        """Return what a strip of a dense gradient holds at the structure."""
        if self.dense is not None:
            return full
        row, place = self._places(first, last)
        picked: Array = full[row, self.cols[place]]
        return picked

    def restore(self, parts: list[Array]) -> Array:
        """Join strips' parts, in the order of the values."""
        joined = np.concatenate(parts)
        if self.dense is not None or self.order is None:
            return joined
        result = np.empty_like(joined)
        result[self.order] = joined
        return result
