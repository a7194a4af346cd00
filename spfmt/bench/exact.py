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

__all__ = ["Exact", "WrongResult", "convolution", "product"]

Array = npt.NDArray[Any]
_STRIP_CELLS = 1 << 23
_ENDS = 8
_EPS = float(np.finfo(np.float32).eps)


class WrongResult(SpfmtError):
    """A contender's result is outside the rounding bound; no time is reported for it."""


@dataclass(frozen=True)
class Exact:
    """A result in float64, and how far a float32 computation may be from it.

    Attributes
    ----------
    value, bound : ndarray of float64, of one shape
    images : int
        Of a result of this many images, `value` is of the first and the last eight; 0 is all.
    """

    value: Array
    bound: Array
    images: int = 0

    def require(self, name: str, got: Any) -> None:
        """Compare a result with the exact one.

        Raises
        ------
        WrongResult
            Where the shape differs or an element is out of bounds; NaN always is.
        """
        got = np.asarray(got)
        shape = (self.images or len(self.value), *self.value.shape[1:])
        if got.shape != shape:
            raise WrongResult(
                f"{name}: got a result of shape {got.shape}; expected {shape}; "
                "no time is reported for it"
            )
        got = _ends(got) if self.images else got
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


def convolution(
    op: str, a: SparseTensor | Array, x: Array, dy: Array, stride: int, padding: int, groups: int
) -> Exact:
    """Compute one of the three products of a convolution in float64, strip by strip of images.

    Of many images Y and dX are computed of the first and the last eight: all of them would take
    longer than what is measured.

    Parameters
    ----------
    op : {"conv2d", "conv2d_input", "conv2d_weight"}
    a : SparseTensor or ndarray, (C_out, C_in / groups, Kh, Kw)
    x : ndarray, (N, C_in, H, W)
    dy : ndarray, (N, C_out, Ho, Wo)
    stride, padding, groups : int

    Returns
    -------
    Exact
        Y, dX, or the gradient: (nnz,) of a sparse weight, of the weight's shape of a dense one.
    """
    weight = a.to_dense() if isinstance(a, SparseTensor) else a
    images = 0
    if op != "conv2d_weight" and len(x) > 2 * _ENDS:
        images, x, dy = len(x), _ends(x), _ends(dy)
    how = _Sliding(op, weight.shape, stride, padding, groups)
    w = weight.reshape(groups, weight.shape[0] // groups, -1)
    step = max(1, _STRIP_CELLS // max(1, w.shape[2] * groups * dy.shape[2] * dy.shape[3]))
    values, sizes = [], []
    for first in range(0, len(x), step):
        part = x[first : first + step], dy[first : first + step]
        values.append(how.compute(w.astype(np.float64), *(p.astype(np.float64) for p in part)))
        sizes.append(how.compute(np.abs(w), *(np.abs(p) for p in part)))
    terms = {
        "conv2d": np.count_nonzero(w, axis=2),
        "conv2d_input": np.count_nonzero(w.reshape(*w.shape[:2], weight.shape[1], -1), axis=(1, 3)),
        "conv2d_weight": np.array(dy.size // dy.shape[1]),
    }
    factor = (int(terms[op].max(initial=0)) + 2) * _EPS
    if op != "conv2d_weight":
        bound = factor * np.concatenate(sizes).astype(np.float64)
        return Exact(np.concatenate(values), bound, images)
    return Exact(_picked(a, sum(values)), factor * _picked(a, sum(sizes)).astype(np.float64))


def _ends(x: Array) -> Array:
    """Return the first and the last images."""
    return np.concatenate([x[:_ENDS], x[-_ENDS:]])


def _picked(a: SparseTensor | Array, full: Any) -> Array:
    """Gradient of a weight, by groups, as the weight has its values."""
    if not isinstance(a, SparseTensor):
        return np.asarray(full).reshape(a.shape)
    found: Array = full.reshape(a.matrix_shape)[a.plan.layout.coordinates()]
    return found


@dataclass(frozen=True)
class _Sliding:
    """A convolution's product of some images, in the dtype of its operands, by unfolding them."""

    op: str
    shape: tuple[int, ...]
    stride: int
    padding: int
    groups: int

    def compute(self, w: Array, x: Array, dy: Array) -> Array:
        """Return Y or dX of these images, or their share of the gradient (groups, R, C Kh Kw)."""
        by_groups = np.moveaxis(dy, 1, 0).reshape(self.groups, w.shape[1], -1)
        if self.op == "conv2d_input":
            return self._fold(w.swapaxes(1, 2) @ by_groups, x, dy.shape[2:])
        columns = self._unfold(x, dy.shape[2:])
        if self.op == "conv2d_weight":
            return np.asarray(by_groups @ columns.swapaxes(1, 2))
        y = (w @ columns).reshape(dy.shape[1], len(x), *dy.shape[2:])
        return np.moveaxis(y, 0, 1)

    def _cells(self, x: Array, size: Any) -> tuple[Array, list[Array]]:
        """Zeros for the padded maps (C_in, N, ...), and their windows for every kernel cell."""
        p, s, (height, width) = self.padding, self.stride, size
        padded = np.zeros(
            (x.shape[1], len(x), x.shape[2] + 2 * p, x.shape[3] + 2 * p), dtype=x.dtype
        )
        return padded, [
            padded[:, :, ky : ky + s * (height - 1) + 1 : s, kx : kx + s * (width - 1) + 1 : s]
            for ky in range(self.shape[2])
            for kx in range(self.shape[3])
        ]

    def _maps(self, padded: Array) -> Array:
        """The maps within their padding, as (N, C_in, H, W)."""
        p = self.padding
        inner = padded[:, :, p : padded.shape[2] - p, p : padded.shape[3] - p]
        return inner.swapaxes(0, 1)

    def _unfold(self, x: Array, size: Any) -> Array:
        padded, windows = self._cells(x, size)
        self._maps(padded)[...] = x
        return np.stack(windows, axis=1).reshape(self.groups, -1, len(x) * size[0] * size[1])

    def _fold(self, columns: Array, x: Array, size: Any) -> Array:
        padded, windows = self._cells(x, size)
        shares = columns.reshape(x.shape[1], len(windows), len(x), *size)
        for cell, window in enumerate(windows):
            window += shares[:, cell]
        return self._maps(padded)


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
