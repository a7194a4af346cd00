"""How much a product has to do at least: the numbers that a roofline needs.

Bytes are what any kernel must read or write once: values, indices, and both dense operands. Not
counted is what a cache may or may not save (padding, a second pass, a line read before it is
written), so a kernel can only look slower by doing more. An index takes

- with rows that list their columns: one byte for each stored weight where columns of a row lie at
  most 256 apart on average (their distance says it), else two;
- with rows that share columns: two bytes for each column of a group (four beyond 65,536 columns),
  and as much for each row's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from spfmt.formats import SparseTensor
from spfmt.formats._layout import Lists

__all__ = ["Work", "dense_work", "image_work", "index_bytes", "sparse_work"]

_FLOAT = 4


@dataclass(frozen=True)
class Work:
    """Floating-point operations, and bytes that have to be touched at least once."""

    flops: float
    nbytes: float

    def times(self, n: int) -> Work:
        """Return `n` times this work."""
        return Work(n * self.flops, n * self.nbytes)


def index_bytes(a: SparseTensor) -> int:
    """Return bytes that a structure takes at least; see the module's text."""
    layout = a.plan.layout
    wide = 2 if max(layout.rows, layout.cols) <= 1 << 16 else 4
    if not isinstance(layout, Lists):
        return wide * (int(layout.col_indices.size) + layout.rows)
    near = layout.rows * layout.cols <= 256 * layout.nnz
    return layout.nnz * (1 if near else 2)


def sparse_work(a: SparseTensor, batch: int) -> Work:
    """Return the work of any one of the three products of a float32 weight.

    Parameters
    ----------
    a : SparseTensor
        (R, C).
    batch : int
        Samples B: 2 nnz B operations on nnz weights, (C, B) and (R, B).
    """
    rows, cols = a.matrix_shape
    nbytes = _FLOAT * (a.nnz + (rows + cols) * batch) + index_bytes(a)
    return Work(2.0 * a.nnz * batch, float(nbytes))


def dense_work(rows: int, cols: int, batch: int) -> Work:
    """Return the work of the same product with a dense weight (R, C)."""
    nbytes = _FLOAT * (rows * cols + (rows + cols) * batch)
    return Work(2.0 * rows * cols * batch, float(nbytes))


def image_work(weight: SparseTensor | npt.NDArray[Any], pixels: int, cells: int) -> Work:
    """Return the work of any one of the three products of a convolution with a weight.

    Parameters
    ----------
    weight : SparseTensor or ndarray
        (C_out, C_in / groups, Kh, Kw).
    pixels : int
        Of all maps of Y together: 2 nnz operations for each, those on padding included.
    cells : int
        Numbers in X and dY together.
    """
    if isinstance(weight, SparseTensor):
        nnz, index = weight.nnz, index_bytes(weight)
    else:
        nnz, index = weight.size, 0
    return Work(2.0 * nnz * pixels, float(_FLOAT * (nnz + cells) + index))
