"""Constant fan-in: every row keeps the same number of weights (SRigL, ICLR 2024)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ._checks import Int32Array, as_int, as_scores
from .unstructured import per_row_topk

__all__ = ["constant_fan_in", "random_columns", "row_strips"]

_STRIP = 1 << 20  # scores drawn at a time


def constant_fan_in(scores: npt.ArrayLike, n_nonzeros: int) -> tuple[Int32Array, Int32Array]:
    """Best constant fan-in structure for a budget, all rows active.

    The fan-in is k = N // R, at least 1 where the budget is not 0 (SRigL, whose k0 it is). Given k,
    the choice is the exact optimum.

    Parameters
    ----------
    scores : array_like, shape (R, C), any real dtype
        Larger is better.
    n_nonzeros : int
        The budget N, 0 <= N <= R*C.

    Returns
    -------
    row_indices : ndarray of int32, shape (n_active,)
        range(R), or nothing where k = 0.
    col_indices : ndarray of int32, shape (n_active, k)
        Ascending in each row; equal scores go to the lowest column.

    Raises
    ------
    FormatError
        NaN in scores, not two-dimensional, or a budget out of range.

    Examples
    --------
    >>> rows, columns = constant_fan_in([[1, 2, 3], [5, 4, 0]], 4)
    >>> columns.tolist()
    [[1, 2], [0, 1]]
    """
    plain = as_scores(scores, ndim=2)
    rows = plain.shape[0]
    n_nonzeros = as_int("n_nonzeros", n_nonzeros, 0, plain.size)
    if n_nonzeros == 0:
        return np.empty(0, np.int32), np.empty((0, 0), np.int32)
    columns = per_row_topk(plain, max(1, n_nonzeros // rows))
    return np.arange(rows, dtype=np.int32), columns


def random_columns(
    rng: np.random.Generator, lists: int, limit: int, k: int
) -> npt.NDArray[np.int32]:
    """Return `lists` ascending lists of k distinct columns below `limit`, (lists, k)."""
    columns = np.empty((lists, k), np.int32)
    for strip in row_strips(lists, limit):
        scores = rng.random((strip.stop - strip.start, limit), dtype=np.float32)
        columns[strip] = per_row_topk(scores, k)
    return columns


def row_strips(rows: int, width: int) -> Iterator[slice]:
    """Cut rows into slices of a million positions at most, or one row."""
    step = max(1, _STRIP // max(1, width))
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))
