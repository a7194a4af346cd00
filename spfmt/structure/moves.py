"""Where the values of a structure lie, and where they were before a change of topology."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import format_error
from . import _positions
from ._checks import Int32Array, Int64Array, as_int

__all__ = ["RowRuns", "flat_indices", "gather", "packed_mask", "scatter", "sources"]


class RowRuns(NamedTuple):
    """Columns and places of the values, row by row: what all kernel layouts have in common.

    Value j of row ``rows[i]`` belongs to column ``col_indices[begin[i] + j]`` and lies at place
    ``first[i] + j * step[i]`` of the values, for j below ``length[i]``. The arrays are legal by
    construction: layouts make them.

    Attributes
    ----------
    shape : tuple of int
        (R, C) of the matrix.
    rows : ndarray of int32, shape (R,)
        Every row once.
    runs : ndarray of int64, shape (4, R)
        begin, length, first and step of every row in the order of `rows`.
    col_indices : ndarray of int32
    """

    shape: tuple[int, int]
    rows: Int32Array
    runs: Int64Array
    col_indices: Int32Array

    @property
    def nnz(self) -> int:
        """Number of values."""
        return int(self.runs[1].sum())


def flat_indices(positions: RowRuns) -> Int64Array:
    """Row-major flat index of every value, in the order of the values."""
    flat = np.empty(positions.nnz, np.int64)
    _positions.flat_indices(
        positions.rows, positions.runs, positions.col_indices, positions.shape[1], flat
    )
    return flat


def packed_mask(positions: RowRuns) -> npt.NDArray[np.uint8]:
    """Return one bit per position of the matrix, row-major as by `numpy.packbits`, set for values.

    No more memory than the bits is taken: a thirty-second of a float32 matrix.
    """
    bits = np.zeros(-(-positions.shape[0] * positions.shape[1] // 8), np.uint8)
    _positions.mark(positions.rows, positions.runs, positions.col_indices, positions.shape[1], bits)
    return bits


def gather(positions: RowRuns, dense: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    """Write the elements of a dense matrix at the positions into the first of `out`.

    Parameters
    ----------
    positions : RowRuns
    dense : ndarray of int16, int32 or int64, shape (R * C,)
        Elements of any type, as integers of its size.
    out : ndarray of the same dtype, shape (at least nnz,)
    """
    _positions.gather(
        positions.rows, positions.runs, positions.col_indices, positions.shape[1], dense, out
    )


def scatter(positions: RowRuns, values: npt.NDArray[Any], dense: npt.NDArray[Any]) -> None:
    """Write values to their positions in a dense matrix: the way back of `gather`."""
    _positions.scatter(
        positions.rows, positions.runs, positions.col_indices, positions.shape[1], values, dense
    )


def sources(old: RowRuns, new: RowRuns, capacity: int | None = None) -> Int64Array:
    """For every value of `new` the place in `old` of the value at its position, -1 without one.

    Parameters
    ----------
    old, new : RowRuns
        Positions of two structures of one shape.
    capacity : int, optional
        Length of the result, new.nnz by default; places behind the values get -1.

    Returns
    -------
    ndarray of int64, shape (capacity,)

    Raises
    ------
    FormatError
        If the shapes differ, or for a capacity below new.nnz.
    """
    nnz = new.nnz
    capacity = as_int("capacity", nnz if capacity is None else capacity, nnz, 2**62)
    if old.shape != new.shape:
        raise format_error(
            f"structures of shapes {old.shape} and {new.shape}", "one shape", "move within a layer"
        )
    place = np.empty(old.rows.size, np.int64)
    place[old.rows] = np.arange(old.rows.size)
    runs = np.ascontiguousarray(old.runs[:, place[new.rows]])
    found = np.empty(capacity, np.int64)
    found[nnz:] = -1
    _positions.sources(
        new.rows, new.runs, new.col_indices, runs, old.col_indices, new.shape[1], found
    )
    return found
