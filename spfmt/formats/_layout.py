"""The two layouts that kernels understand; every format lowers to one of them.

``Lists`` is a list of columns per row (Condensed, NM, CSR)::

    values of row r = values[indptr[r]:indptr[r+1]], at columns col_indices[same range]

``Groups`` is row groups with a common list of columns, cut into bands (ShuffledBlock, HRBP)::

    band t: rows row_perm[row_ptr[t]:row_ptr[t+1]]        1..16 of them
            cols col_indices[col_begin[t]:col_end[t]]     bands may share a list
            values[value_ptr[t] + j * n_rows(t) + i]      i-th row, j-th column

This is the *interchange order*: values of groups lie in bands of at most 16 rows, column after
column, in tensors, layers, files and ONNX models alike. AVX-512, NEON and tensor cores all read it
as it is: one broadcast input meets one contiguous load of weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from spfmt.structure.moves import RowRuns, flat_indices

__all__ = ["BAND", "Groups", "Layout", "Lists", "group_bands", "lower_groups"]

BAND = 16
"""Most rows of a band. A constant of the interchange order, not the width of any register."""

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


class _Positions:
    """What both layouts tell of their positions."""

    cols: int

    def _row_runs(self) -> RowRuns:
        raise NotImplementedError

    @functools.cached_property
    def _runs(self) -> RowRuns:
        return self._row_runs()

    def row_runs(self) -> RowRuns:
        """The columns and places of every row's values, made once."""
        return self._runs

    def flat_indices(self) -> Int64s:
        """Row-major flat index of every stored position, in the order of the values."""
        return flat_indices(self.row_runs())

    def coordinates(self) -> tuple[Int64s, Int64s]:
        """Row and column of every stored position, in the order of the values."""
        flat = self.flat_indices()
        rows = flat // max(1, self.cols)
        return rows, flat - rows * self.cols


@dataclass(frozen=True, eq=False)
class Lists(_Positions):
    """A list of ascending columns per row.

    Attributes
    ----------
    rows, cols : int
        Shape of the matrix.
    indptr : ndarray of int64, shape (rows + 1,)
    col_indices : ndarray of int32, shape (nnz,)
    """

    name: ClassVar[str] = "lists"

    rows: int
    cols: int
    indptr: Int64s
    col_indices: Int32s

    @property
    def nnz(self) -> int:
        """Number of stored positions."""
        return int(self.col_indices.size)

    def _row_runs(self) -> RowRuns:
        rows, begin = np.arange(self.rows, dtype=np.int32), self.indptr[:-1]
        runs = np.stack([begin, np.diff(self.indptr), begin, np.ones_like(begin)])
        return RowRuns((self.rows, self.cols), rows, runs, self.col_indices)


@dataclass(frozen=True, eq=False)
class Groups(_Positions):
    """Bands of at most `BAND` rows that share their columns.

    Attributes
    ----------
    rows, cols : int
        Shape of the matrix.
    row_perm : ndarray of int32, shape (rows,)
        The rows, band after band; each row exactly once.
    row_ptr : ndarray of int64, shape (T + 1,)
    col_begin, col_end : ndarray of int64, shape (T,)
    col_indices : ndarray of int32
    value_ptr : ndarray of int64, shape (T + 1,)
    """

    name: ClassVar[str] = "groups"

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

    def _row_runs(self) -> RowRuns:
        heights = np.diff(self.row_ptr)
        band = np.repeat(np.arange(heights.size), heights)
        lane = np.arange(self.rows, dtype=np.int64) - self.row_ptr[band]
        begin = self.col_begin[band]
        runs = np.stack(
            [begin, self.col_end[band] - begin, self.value_ptr[band] + lane, heights[band]]
        )
        return RowRuns((self.rows, self.cols), self.row_perm, runs, self.col_indices)


Layout = Lists | Groups


def group_bands(group_ptr: npt.NDArray[Any]) -> tuple[Int64s, Int64s]:
    """Cut row groups into bands of at most `BAND` consecutive rows.

    Parameters
    ----------
    group_ptr : ndarray of int64, shape (G + 1,)
        Group g owns the places ``group_ptr[g]:group_ptr[g+1]`` of the row permutation.

    Returns
    -------
    row_ptr : ndarray of int64, shape (T + 1,)
    group_of_band : ndarray of int64, shape (T,)
    """
    bands = -(-np.diff(group_ptr) // BAND)
    group = np.repeat(np.arange(bands.size, dtype=np.int64), bands)
    nth = np.arange(group.size, dtype=np.int64) - np.repeat(np.cumsum(bands) - bands, bands)
    row_ptr = np.append(group_ptr[:-1][group] + nth * BAND, group_ptr[-1])
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
    row_ptr, group = group_bands(group_ptr)
    begin, end = col_ptr[:-1][group], col_ptr[1:][group]
    value_ptr = np.zeros(row_ptr.size, np.int64)
    np.cumsum(np.diff(row_ptr) * (end - begin), out=value_ptr[1:])
    rows, cols = shape
    return Groups(rows, cols, row_perm, row_ptr, begin, end, col_indices, value_ptr)
