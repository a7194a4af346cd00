"""N:M selection along the columns, and transposable N:M masks."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import numpy.typing as npt

from ..errors import format_error
from . import _selection
from ._checks import BoolArray, FloatArray, Int32Array, as_int, as_scores, check_finite

__all__ = [
    "nm_columns",
    "transposable_nm_columns",
    "transposable_nm_mask",
    "transposable_patterns",
]


def nm_columns(
    scores: npt.ArrayLike, n: int, m: int, cells: int = 1, *, signed: bool = True
) -> Int32Array:
    """Best n of every group of m columns, row by row: the exact optimum of each group.

    Parameters
    ----------
    scores : array_like, shape (R, C), any real dtype
        Larger is better. For a convolution C = C_in*cells.
    n, m : int
        Every full group of m keeps exactly n, a short last group of length L keeps min(n, L).
        0 <= n <= m, m >= 1 (m >= C means one group, that is constant fan-in).
    cells : int, default 1
        Kh*Kw of a convolution. Groups then run along C_in at a fixed cell: group members are
        `cells` columns apart (HRBP paper, Appendix H; Advances in sparse training, App. E.2).
    signed : bool, default True
        False ranks by magnitude.

    Returns
    -------
    ndarray of int32, shape (R, K)
        Kept matrix columns, ascending in each row; equal scores go to the lowest column.

    Raises
    ------
    FormatError
        NaN in scores, not two-dimensional, n or m out of range, C not divisible by cells.

    Examples
    --------
    >>> nm_columns([[4, 1, 3, 2, 9, 8]], 2, 4).tolist()
    [[0, 2, 4, 5]]
    """
    plain = as_scores(scores, ndim=2)
    return columns_of_groups(plain, *_check_groups(plain, n, m, cells), signed)


def columns_of_groups(
    plain: FloatArray, n: int, m: int, cells: int, signed: bool = True
) -> Int32Array:
    """`nm_columns` of scores and numbers that were checked."""
    channels = plain.shape[1] // cells
    whole, rest = divmod(channels, m)
    columns = np.empty((plain.shape[0], (whole * n + min(n, rest)) * cells), np.int32)
    if not signed and plain.dtype == np.float32 and m == 4 and cells == 1:
        _selection.fours_of_magnitudes(plain, n, columns)
    else:
        ranked = plain if signed else np.abs(plain)
        _selection.nm_columns(ranked, n, min(m, max(1, channels)), cells, columns)
    return columns


def transposable_nm_mask(scores: npt.ArrayLike, n: int, m: int, cells: int = 1) -> BoolArray:
    """Mask with n of every m along the columns *and* along the rows, of the largest total score.

    Exact for every n and m. 2:4 looks through the 90 patterns of a 4 x 4 tile, equal totals going
    to the first one (Advances in sparse training, App. E.2). Otherwise every tile is solved as a
    transportation problem (each row supplies n, each column takes n, an edge carries at most 1)
    by shortest augmenting paths; Hubara et al. 2021 state the same problem as a min-cost flow and
    fall back to a 2-approximation where it is too slow, which it is not here.

    Parameters
    ----------
    scores : array_like, shape (R, C), any real dtype
        Larger is better, finite. For a convolution C = C_in*cells.
    n, m : int
        0 <= n <= m, m >= 1. Tiles are m rows by m columns.
    cells : int, default 1
        Kh*Kw of a convolution: tiles then span (C_out, C_in) at a fixed cell.

    Returns
    -------
    ndarray of bool, shape (R, C)
        Rows and columns beyond the last whole tile are not promised to be transposable: they are
        plain n:m along the columns, and a short last group of length L keeps min(n, L).

    Raises
    ------
    FormatError
        NaN or infinity in scores, not two-dimensional, n or m out of range, C not divisible by
        cells.
    """
    plain = as_scores(scores, ndim=2)
    n, m, cells = _check_groups(plain, n, m, cells)
    check_finite(plain, "a transposable mask")
    mask = np.zeros(plain.shape, np.uint8)
    tile_rows = plain.shape[0] // m * m
    tile_cols = plain.shape[1] // cells // m * m * cells
    if n and tile_rows and tile_cols:
        if (n, m) == (2, 4):
            _selection.transposable_2_4(plain, cells, _pair_patterns(), mask)
        else:
            _selection.transposable_tiles(plain, n, m, cells, mask)
    else:
        tile_rows = 0
    _fill_plain(plain[:tile_rows, tile_cols:], n, m, cells, mask[:tile_rows, tile_cols:])
    _fill_plain(plain[tile_rows:], n, m, cells, mask[tile_rows:])
    return mask.view(np.bool_)


def transposable_nm_columns(scores: npt.ArrayLike, n: int, m: int, cells: int = 1) -> Int32Array:
    """The columns of `transposable_nm_mask`, ascending in each row, as those of `nm_columns`."""
    mask = transposable_nm_mask(scores, n, m, cells)
    whole, rest = divmod(mask.shape[1] // cells, m)
    columns = np.empty((mask.shape[0], (whole * n + min(n, rest)) * cells), np.int32)
    _selection.mask_columns(mask.view(np.uint8), columns)
    return columns


def column_counts(columns: Int32Array, cols: int, m: int) -> Int32Array:
    """How often each m consecutive rows list each column; rows beyond the last m are left out.

    Parameters
    ----------
    columns : ndarray of int32, shape (R, K)
        In 0..cols-1.
    cols, m : int

    Returns
    -------
    ndarray of int32, shape (R // m, cols)
    """
    counts = np.zeros((len(columns) // m, cols), np.int32)
    _selection.column_counts(np.ascontiguousarray(columns), m, counts)
    return counts


@cache
def transposable_patterns(n: int, m: int) -> BoolArray:
    """Every m x m mask with n per row and per column, in lexicographic order of the rows' columns.

    Meant for small m: there are 90 for 2:4 and 116 963 796 250 for 4:8.

    Parameters
    ----------
    n, m : int
        0 <= n <= m.

    Returns
    -------
    ndarray of bool, shape (count, m, m)
        Read-only.
    """
    choices = list(itertools.combinations(range(m), n))
    found = []
    for rows in itertools.product(choices, repeat=m):
        tile = np.zeros((m, m), np.bool_)
        for i, columns in enumerate(rows):
            tile[i, list(columns)] = True
        if (tile.sum(axis=0) == n).all():
            found.append(tile)
    patterns = np.array(found)
    patterns.flags.writeable = False
    return patterns


@cache
def _pair_patterns() -> Int32Array:
    """The 90 patterns as, per row, the index of its pair among 01, 02, 03, 12, 13, 23."""
    pairs = [list(pair) for pair in itertools.combinations(range(4), 2)]
    index = [
        [pairs.index(np.flatnonzero(r).tolist()) for r in p] for p in transposable_patterns(2, 4)
    ]
    return np.array(index, np.int32)


def _fill_plain(
    scores: FloatArray, n: int, m: int, cells: int, mask: npt.NDArray[np.uint8]
) -> None:
    columns = nm_columns(scores, n, m, cells)
    np.put_along_axis(mask, columns.astype(np.int64), 1, axis=1)


def _check_groups(scores: FloatArray, n: int, m: int, cells: int) -> tuple[int, int, int]:
    m = as_int("m", m, 1)
    n = as_int("n", n, 0, m)
    cells = as_int("cells", cells, 1)
    if scores.shape[1] % cells:
        raise format_error(
            f"{scores.shape[1]} columns for {cells} cells per kernel",
            "C = C_in*cells",
            "pass cells = Kh*Kw of the layer, or 1 for a matrix",
        )
    return n, m, cells
