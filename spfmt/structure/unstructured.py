"""Unstructured and per-row selection by score."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import format_error
from . import _selection
from ._checks import BoolArray, FloatArray, Int32Array, Int64Array, as_int, as_scores

__all__ = ["columns_of_largest", "per_row_topk", "topk_columns", "topk_mask"]


def topk_columns(
    scores: npt.ArrayLike, n: int, *, signed: bool = True
) -> tuple[Int64Array, Int32Array]:
    """Columns of the n largest scores of a whole matrix, row after row.

    Parameters
    ----------
    scores : array_like, shape (R, C), any real dtype
        Larger is better.
    n : int
        How many positions to keep, 0 <= n <= R*C.
    signed : bool, default True
        False ranks by magnitude.

    Returns
    -------
    indptr : ndarray of int64, shape (R + 1,)
    col_indices : ndarray of int32, shape (n,)
        Ascending in each row; equal scores go to the lowest flat index.

    Raises
    ------
    FormatError
        NaN in scores, not two-dimensional, or n out of range.

    Examples
    --------
    >>> indptr, columns = topk_columns([[1, 3], [3, 2]], 2)
    >>> indptr.tolist(), columns.tolist()
    ([0, 1, 2], [1, 0])
    """
    plain = as_scores(scores, ndim=2)
    return columns_of_largest(plain, as_int("n", n, 0, plain.size), signed)


def columns_of_largest(
    plain: FloatArray, n: int, signed: bool = True
) -> tuple[Int64Array, Int32Array]:
    """`topk_columns` of scores and a number that were checked."""
    indptr, columns = np.zeros(len(plain) + 1, np.int64), np.empty(n, np.int32)
    if n:
        fused = not signed and plain.dtype == np.float32
        search = _selection.top_magnitudes if fused else _selection.top_columns
        ranked = plain if signed or fused else np.abs(plain)
        search(ranked, n, indptr, columns, np.empty((0, 0), np.uint8))
        if indptr[-1] != n:
            raise format_error(
                "scores that changed while they were ranked",
                "scores that nobody writes meanwhile",
                "wait for the threads that train these weights, or rank a copy of them",
            )
    return indptr, columns


def topk_mask(scores: npt.ArrayLike, n: int) -> BoolArray:
    """Mask of the n largest scores of a whole layer.

    Parameters
    ----------
    scores : array_like, any shape, any real dtype
        Larger is better.
    n : int
        How many positions to keep, 0 <= n <= scores.size.

    Returns
    -------
    ndarray of bool, the shape of scores
        Exactly n positions; equal scores go to the lowest flat index.

    Raises
    ------
    FormatError
        NaN in scores, or n out of range.

    Examples
    --------
    >>> topk_mask([[1, 3], [3, 2]], 1).tolist()
    [[False, True], [False, False]]
    """
    plain = as_scores(scores)
    n = as_int("n", n, 0, plain.size)
    keep = np.zeros(plain.shape, np.bool_)
    if n:
        cols = plain.shape[-1] if plain.ndim > 1 else plain.size
        matrix = plain.reshape(-1, cols)
        _selection.top_columns(
            matrix, n, np.empty(0, np.int64), np.empty(0, np.int32),
            keep.view(np.uint8).reshape(matrix.shape),
        )  # fmt: skip
    return keep


def per_row_topk(scores: npt.ArrayLike, k: int) -> Int32Array:
    """Columns of the k largest scores of each row.

    Parameters
    ----------
    scores : array_like, shape (R, C), any real dtype
        Larger is better.
    k : int
        Columns to keep in each row, 0 <= k <= C.

    Returns
    -------
    ndarray of int32, shape (R, k)
        Ascending in each row; equal scores go to the lowest column.

    Raises
    ------
    FormatError
        NaN in scores, not two-dimensional, or k out of range.

    Examples
    --------
    >>> per_row_topk([[1, 3, 3], [0, 0, 0]], 2).tolist()
    [[1, 2], [0, 1]]
    """
    plain = as_scores(scores, ndim=2)
    k = as_int("k", k, 0, plain.shape[1])
    columns = np.empty((plain.shape[0], k), np.int32)
    _selection.nm_columns(plain, k, max(1, plain.shape[1]), 1, columns)
    return columns
