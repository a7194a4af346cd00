"""The two layouts that kernels understand; every format lowers to one of them.

``Lists`` is a list of columns per row (Condensed, NM, CSR)::

    values of row r = values[indptr[r]:indptr[r+1]], at columns col_indices[same range]

``Groups`` is a dense tile per small group of rows (ShuffledBlock, HRBP)::

    tile t: rows row_perm[row_ptr[t]:row_ptr[t+1]]        1..16 of them
            cols col_indices[col_begin[t]:col_end[t]]     tiles may share a list
            values[value_ptr[t] + j * n_rows(t) + i]      i-th row, j-th column

Tiles are stored column after column: the rows of a tile are the lanes of a vector register, so
that one broadcast input meets one contiguous load of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ROW_TILE", "Layout", "Groups", "Lists", "group_tiles", "lower_groups"]

ROW_TILE = 16
"""Most rows of a tile: the lanes of a 512-bit register in float32."""

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Lists:
    """A list of ascending columns per row.

    Attributes
    ----------
    rows, cols : int
        Shape of the matrix.
    indptr : ndarray of int64, shape (rows + 1,)
    col_indices : ndarray of int32, shape (nnz,)
    """

    rows: int
    cols: int
    indptr: Int64s
    col_indices: Int32s

    @property
    def nnz(self) -> int:
        """Number of stored positions."""
        return int(self.col_indices.size)

    def coordinates(self) -> tuple[Int64s, Int64s]:
        """Row and column of every stored position, in the order of the values."""
        rows = np.repeat(np.arange(self.rows, dtype=np.int64), np.diff(self.indptr))
        return rows, self.col_indices.astype(np.int64)


@dataclass(frozen=True, eq=False)
class Groups:
    """Dense tiles of at most `ROW_TILE` rows.

    Attributes
    ----------
    rows, cols : int
        Shape of the matrix.
    row_perm : ndarray of int32, shape (rows,)
        The rows, tile after tile; each row exactly once.
    row_ptr : ndarray of int64, shape (T + 1,)
    col_begin, col_end : ndarray of int64, shape (T,)
    col_indices : ndarray of int32
    value_ptr : ndarray of int64, shape (T + 1,)
    """

    rows: int
    cols: int
    row_perm: Int32s
    row_ptr: Int64s
    col_begin: Int64s
    col_end: Int64s
    col_indices: Int32s
    value_ptr: Int64s

    @property
    def nnz(self) -> int:
        """Number of stored positions."""
        return int(self.value_ptr[-1])

    def coordinates(self) -> tuple[Int64s, Int64s]:
        """Row and column of every stored position, in the order of the values."""
        # One entry per (tile, column) first: it is ROW_TILE times shorter than the values.
        heights = np.diff(self.row_ptr)
        widths = self.col_end - self.col_begin
        columns = np.repeat(heights, widths)
        starts = np.cumsum(columns) - columns
        lane = np.arange(self.nnz, dtype=np.int64) - np.repeat(starts, columns)
        rows = self.row_perm[np.repeat(np.repeat(self.row_ptr[:-1], widths), columns) + lane]
        first = np.cumsum(widths) - widths
        j = np.arange(columns.size, dtype=np.int64) - np.repeat(first, widths)
        cols = self.col_indices[np.repeat(self.col_begin, widths) + j]
        return rows.astype(np.int64), np.repeat(cols.astype(np.int64), columns)


Layout = Lists | Groups


def group_tiles(group_ptr: npt.NDArray[Any]) -> tuple[Int64s, Int64s]:
    """Cut row groups into tiles of at most `ROW_TILE` consecutive rows.

    Parameters
    ----------
    group_ptr : ndarray of int64, shape (G + 1,)
        Group g owns the places ``group_ptr[g]:group_ptr[g+1]`` of the row permutation.

    Returns
    -------
    row_ptr : ndarray of int64, shape (T + 1,)
    group_of_tile : ndarray of int64, shape (T,)
    """
    tiles = -(-np.diff(group_ptr) // ROW_TILE)
    group = np.repeat(np.arange(tiles.size, dtype=np.int64), tiles)
    nth = np.arange(group.size, dtype=np.int64) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    row_ptr = np.append(group_ptr[:-1][group] + nth * ROW_TILE, group_ptr[-1])
    return row_ptr.astype(np.int64), group


def lower_groups(
    shape: tuple[int, int],
    row_perm: Int32s,
    group_ptr: npt.NDArray[Any],
    col_ptr: npt.NDArray[Any],
    col_indices: Int32s,
) -> Groups:
    """`Groups` of row groups with one column list each.

    Parameters
    ----------
    shape : tuple of int
        (rows, cols) of the matrix.
    row_perm : ndarray of int32, shape (rows,)
    group_ptr : ndarray of int64, shape (G + 1,)
        Rows of a group, as places of `row_perm`.
    col_ptr : ndarray of int64, shape (G + 1,)
        Columns of a group, as places of `col_indices`.
    col_indices : ndarray of int32
    """
    row_ptr, group = group_tiles(group_ptr)
    begin, end = col_ptr[:-1][group], col_ptr[1:][group]
    value_ptr = np.zeros(row_ptr.size, np.int64)
    np.cumsum(np.diff(row_ptr) * (end - begin), out=value_ptr[1:])
    rows, cols = shape
    return Groups(rows, cols, row_perm, row_ptr, begin, end, col_indices, value_ptr)
