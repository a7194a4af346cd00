"""Coordinates of a weight: the form through which every conversion goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spfmt.errors import format_error
from spfmt.formats._checks import Array, Shape, bool_mask, matrix_shape, weight_array
from spfmt.structure._checks import check_range

__all__ = ["Coordinates", "fill_short_lists", "group_by_support"]

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Stored positions of a weight in row-major order, each once.

    Attributes
    ----------
    shape : tuple of int
        Shape of the weight, rank 2 or 4; rows and columns are those of its matrix.
    rows, cols : ndarray of int64, shape (nnz,)
    values : ndarray, shape (nnz,)
    """

    shape: Shape
    rows: Int64s
    cols: Int64s
    values: Array

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(R, C) of the weight's matrix."""
        return matrix_shape(self.shape)

    @property
    def nnz(self) -> int:
        """Number of stored positions."""
        return int(self.rows.size)

    @property
    def keys(self) -> Int64s:
        """Row-major flat index of every position, ascending."""
        return self.rows * self.matrix_shape[1] + self.cols

    @property
    def row_counts(self) -> Int64s:
        """Number of stored positions of every row that has any, shape (n_nonempty,)."""
        return np.unique(self.rows, return_counts=True)[1].astype(np.int64)

    @classmethod
    def of_dense(cls, w: Any, mask: Any = None) -> Coordinates:
        """Positions where `mask` is set, or where `w` is not zero (a NaN is not zero)."""
        dense = weight_array("w", w)
        keep = dense != 0 if mask is None else bool_mask("mask", mask, dense.shape)
        flat = np.flatnonzero(keep)
        rows, cols = np.divmod(flat, max(1, matrix_shape(dense.shape)[1]))
        return cls(dense.shape, rows, cols, dense.reshape(-1)[flat])

    @classmethod
    def of_unsorted(cls, shape: Shape, rows: Array, cols: Array, values: Array) -> Coordinates:
        """Check and sort positions that come from elsewhere."""
        size = matrix_shape(shape)
        check_range("row indices", rows, size[0], "rows")
        check_range("column indices", cols, size[1], "columns")
        rows, cols = rows.astype(np.int64), cols.astype(np.int64)
        keys = rows * size[1] + cols
        steps = np.diff(keys)
        if not (steps > 0).all():
            order = np.argsort(keys, kind="stable")
            rows, cols, values = rows[order], cols[order], values[order]
            twice = np.flatnonzero(np.diff(keys[order]) == 0)
            if twice.size:
                row, col = int(rows[twice[0]]), int(cols[twice[0]])
                raise format_error(
                    f"two entries at row {row}, column {col}",
                    "each position once",
                    "merge duplicates first",
                )
        return cls(shape, rows, cols, values)

    def merged_keys(self, rows: Array, cols: Array) -> Int64s:
        """Ascending flat indices of these positions together with others."""
        if not rows.size:
            return self.keys
        return np.sort(np.concatenate([self.keys, rows * self.matrix_shape[1] + cols]))

    def support(self, rows: Array) -> npt.NDArray[np.bool_]:
        """Bool mask of the listed rows, shape (len(rows), C)."""
        n_rows, n_cols = self.matrix_shape
        place = np.full(n_rows, -1, np.int64)
        place[rows] = np.arange(rows.size)
        mine = place[self.rows] >= 0
        mask = np.zeros((rows.size, n_cols), np.bool_)
        mask[place[self.rows[mine]], self.cols[mine]] = True
        return mask


def fill_short_lists(lists: Array, positions: Array, quotas: Array) -> tuple[Int64s, Int64s]:
    """Smallest free positions that bring every list up to its quota.

    Parameters
    ----------
    lists, positions : ndarray of int, shape (n,)
        Occupied positions: position ``positions[i]`` of list ``lists[i]``, each pair once.
    quotas : ndarray of int, shape (n_lists,)
        Wanted number of occupied positions of each list; no list is longer than its quota.

    Returns
    -------
    lists, positions : ndarray of int64
        The positions to add.
    """
    missing = quotas - np.bincount(lists, minlength=quotas.size)
    short = np.flatnonzero(missing > 0)
    if not short.size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # At most `count` of the first `quota` positions are taken: the free ones wanted are among them.
    window = int(quotas[short].max())
    place = np.full(quotas.size, -1, np.int64)
    place[short] = np.arange(short.size)
    near = (place[lists] >= 0) & (positions < window)
    free = np.ones((short.size, window), np.bool_)
    free[place[lists[near]], positions[near]] = False
    chosen = free & (np.cumsum(free, axis=1, dtype=np.int32) <= missing[short][:, None])
    added, added_positions = np.nonzero(chosen)
    return short[added], added_positions


def _hashed(indices: Int64s) -> npt.NDArray[np.uint64]:
    """The SplitMix64 hash of every index (Steele et al. 2014), with no table as long as a row."""
    x = (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), np.uint64)


def group_by_support(coords: Coordinates) -> Int64s:
    """Label rows so that rows with the same set of columns share a label.

    Labels count from 0 in the order of first occurrence. Sets are compared by a 64-bit sum of
    hashed columns; a collision would cost padding, never a wrong value.
    """
    n_rows = coords.matrix_shape[0]
    sums = np.zeros(coords.nnz + 1, np.uint64)
    np.cumsum(_hashed(coords.cols), out=sums[1:])
    ends = np.searchsorted(coords.rows, np.arange(n_rows + 1))
    prints = sums[ends[1:]] - sums[ends[:-1]]
    _, first, inverse = np.unique(prints, return_index=True, return_inverse=True)
    rank = np.empty(first.size, np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(first.size)
    return np.asarray(rank[inverse.reshape(-1)], np.int64)
