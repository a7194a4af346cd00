"""Greedy row grouping: which rows share a slice of 16 lanes in the packed layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import spfmt._kernels as _kernels
from spfmt.errors import format_error

__all__ = ["group_rows", "slice_padding"]

LANES = 16


def group_rows(counts: Any) -> npt.NDArray[np.int32]:
    """Order rows so that every 16 consecutive ones have like counts.

    A slice of 16 rows takes, per chunk of columns, as many steps as its fullest row. Greedy: a
    slice starts with the fullest row left and takes, fifteen times, the row that adds the fewest
    steps. Chunks may overlap: plans count windows of 48 columns every 16, because their slices let
    a row that is behind in one window catch up in the next (``cpp/row_slices.h``). The loop is C++
    (``cpp/row_grouping.cpp``), because the ONNX Runtime library packs without Python.

    Parameters
    ----------
    counts : array_like of int, shape (rows, chunks), 0 to 255
        Nonzeros of each row in each chunk of columns.

    Returns
    -------
    ndarray of int32, shape (rows,)
        A permutation; ties go to the row that comes first.

    Raises
    ------
    FormatError
        If `counts` is not a matrix of whole numbers from 0 to 255.
    """
    order: npt.NDArray[np.int32] = _kernels.group_rows_by_counts(_counts(counts))
    return order


def slice_padding(counts: Any, order: Any = None) -> float:
    """Return packed positions per nonzero: 1 without padding.

    Parameters
    ----------
    counts : array_like of int, shape (rows, chunks)
    order : array_like of int, shape (rows,), optional
        Order of the rows; as they are by default.

    Raises
    ------
    FormatError
        As `group_rows`, and for an order that is no permutation of the rows.
    """
    table = _counts(counts)
    rows, chunks = table.shape
    places = np.arange(rows) if order is None else np.asarray(order)
    if not np.array_equal(np.sort(places), np.arange(rows)):
        raise format_error("an order that is no permutation", f"each of 0 to {rows - 1} once",
                           "pass the result of group_rows")  # fmt: skip
    padded = np.zeros((-(-rows // LANES) * LANES, chunks), np.int64)
    padded[:rows] = table[places]
    steps = padded.reshape(-1, LANES, chunks).max(1).sum()
    total = int(table.sum())
    return float(LANES * steps / total) if total else 1.0


def _counts(counts: Any) -> npt.NDArray[np.uint8]:
    table = np.asarray(counts)
    whole = table.ndim == 2 and (table.dtype.kind in "iu" or table.size == 0)
    if not whole or (table.size and (table.min() < 0 or table.max() > 255)):
        raise format_error(
            f"counts of shape {table.shape} and dtype {table.dtype}",
            "a matrix of whole numbers from 0 to 255",
            "count the nonzeros of each row per chunk of at most 255 columns",
        )
    return np.ascontiguousarray(table, np.uint8)
