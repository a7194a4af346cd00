"""Structures as the CUDA kernels want them: 32-bit indices, tiles of rows, transposed lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spfmt.errors import KernelNotFound
from spfmt.formats import Groups, Lists
from spfmt.formats._layout import BAND

__all__ = [
    "PIECE",
    "TILE",
    "DeviceLists",
    "DeviceTiles",
    "device_lists",
    "device_tiles",
    "tile_rows",
    "transposed_lists",
]

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

TILE = np.dtype([("value", "i8"), ("row", "i4"), ("rows", "i4"), ("col", "i4"), ("cols", "i4")])
"""The struct Tile of cuda/api.h."""

PIECE = np.dtype(
    [*((name, TILE[name]) for name in TILE.names or ()), ("first", "i4"), ("count", "i4")]
)
"""The struct Piece of cuda/api.h."""

PIECE_COLS = 64
"""Most columns of a piece."""


@dataclass(frozen=True, eq=False)
class DeviceTiles:
    """Groups, cut into tiles of rows with one column list; cuda/api.h has the order of values.

    Attributes
    ----------
    rows, cols : int
        Shape of the matrix.
    most_rows, most_cols : int
        Of a tile.
    chunk : int
        Columns that one block of the transposed product owns.
    tile : ndarray of TILE, shape (T,)
    row_perm : ndarray of int32, shape (rows,)
    col_indices : ndarray of int32
    ascending, sorted_cols : ndarray of int32
        Of each list its places by ascending column, and these columns.
    piece : ndarray of PIECE, shape (P,)
        What tiles have in the chunks of columns: chunk after chunk, and in each by tile.
    piece_ptr : ndarray of int32, shape (ceil(cols / chunk) + 1,)
    """

    rows: int
    cols: int
    most_rows: int
    most_cols: int
    chunk: int
    tile: npt.NDArray[np.void]
    row_perm: Int32s
    col_indices: Int32s
    ascending: Int32s
    sorted_cols: Int32s
    piece: npt.NDArray[np.void]
    piece_ptr: Int32s


@dataclass(frozen=True, eq=False)
class DeviceLists:
    """Lists, or the transpose of some: then position p holds value ``source[p]``.

    Attributes
    ----------
    rows, cols : int
    indptr : ndarray of int32, shape (rows + 1,)
    col_indices : ndarray of int32, shape (nnz,)
    source : ndarray of int32, shape (nnz,), or None
    """

    rows: int
    cols: int
    indptr: Int32s
    col_indices: Int32s
    source: Int32s | None = None


def device_tiles(groups: Groups, most_rows: int, chunk: int = 192) -> DeviceTiles:
    """Merge bands of a group into tiles of at most `most_rows` rows.

    Parameters
    ----------
    groups : Groups
    most_rows : int
        16, 64 or 128.
    chunk : int
        Columns that a block of the transposed product owns. It wants 48 KiB of shared memory, and
        256 bytes for each: 192 is what every device has room for, 256 lets two blocks share a
        multiprocessor of those that have 228 KiB. The more, the less is read twice.

    Raises
    ------
    KernelNotFound
        For lists of 2³¹ columns and more together.
    """
    _check_count(groups.col_indices.size)
    tile = _tiles(groups, most_rows)
    ascending, sorted_cols, piece, piece_ptr = _pieces(groups, tile, chunk)
    return DeviceTiles(
        groups.rows, groups.cols, most_rows, int(tile["cols"].max(initial=0)), chunk, tile,
        groups.row_perm, groups.col_indices, ascending, sorted_cols, piece, piece_ptr,
    )  # fmt: skip


def tile_rows(groups: Groups) -> int:
    """Return how many rows tiles had best have, 16, 64 or 128, by the median row's group."""
    rows = np.diff(groups.row_ptr)
    if not rows.size:
        return BAND
    heights = np.sort(np.bincount(_runs(groups) - 1, weights=rows))
    median = heights[np.searchsorted(np.cumsum(heights), heights.sum() / 2)]
    return BAND if median <= BAND else 64 if median < 128 else 128


def _runs(groups: Groups) -> Int64s:
    """Return for each band the number, from 1 on, of the run of bands that share its list."""
    rows, begin, end = np.diff(groups.row_ptr), groups.col_begin, groups.col_end
    # A band goes on where the one before it is full and has the same list.
    joins = (rows[:-1] == BAND) & (begin[:-1] == begin[1:]) & (end[:-1] == end[1:])
    runs: Int64s = np.cumsum(np.append(True, ~joins)[: rows.size])
    return runs


def _tiles(groups: Groups, most_rows: int) -> npt.NDArray[np.void]:
    rows, begin, end = np.diff(groups.row_ptr), groups.col_begin, groups.col_end
    run = _runs(groups)
    first_of_run = np.searchsorted(run, run)
    nth = (np.arange(rows.size) - first_of_run) % (most_rows // BAND)
    first = np.flatnonzero(nth == 0)
    tile = np.zeros(first.size, TILE)
    tile["value"] = groups.value_ptr[first]
    tile["row"] = groups.row_ptr[first]
    tile["rows"] = np.add.reduceat(rows, first) if first.size else 0
    tile["col"], tile["cols"] = begin[first], (end - begin)[first]
    return tile


def _pieces(
    groups: Groups, tile: npt.NDArray[np.void], chunk: int
) -> tuple[Int32s, Int32s, npt.NDArray[np.void], Int32s]:
    """Return the lists by ascending column, and what each tile has in each chunk of columns."""
    key = tile["col"].astype(np.int64) << 32 | tile["cols"]
    _, example, list_of_tile = np.unique(key, return_index=True, return_inverse=True)
    begin, length = tile["col"][example], tile["cols"][example]
    owner = np.repeat(np.arange(length.size), length)
    place = _count_up(length)
    columns = groups.col_indices[begin[owner] + place]
    order = np.lexsort((columns, owner))
    ascending, columns = place[order].astype(np.int32), columns[order]

    # Of every list: a run for each chunk, cut after PIECE_COLS columns.
    chunk_of = columns // chunk
    starts = np.append(True, (np.diff(owner) != 0) | (np.diff(chunk_of) != 0))[: owner.size]
    run = np.flatnonzero(starts)
    nth = _count_up(np.diff(run, append=owner.size))
    first = np.flatnonzero(nth % PIECE_COLS == 0)
    count = np.diff(first, append=owner.size)

    # A tile has those of its list.
    of_list = np.searchsorted(owner[first], np.arange(length.size + 1))
    pieces_of_tile = np.diff(of_list)[list_of_tile]
    which_tile = np.repeat(np.arange(tile.size), pieces_of_tile)
    which = of_list[list_of_tile[which_tile]] + _count_up(pieces_of_tile)
    by_chunk = np.argsort(chunk_of[first][which], kind="stable")
    which, which_tile = which[by_chunk], which_tile[by_chunk]
    piece = np.zeros(which.size, PIECE)
    for name in TILE.names or ():
        piece[name] = tile[name][which_tile]
    piece["first"], piece["count"] = first[which], count[which]
    chunks = np.arange(-(-groups.cols // chunk) + 1)
    piece_ptr = np.searchsorted(chunk_of[first][which], chunks)
    return ascending, columns, piece, piece_ptr.astype(np.int32)


def _count_up(counts: npt.NDArray[np.integer[Any]]) -> Int64s:
    """Return 0 .. counts[0] - 1, 0 .. counts[1] - 1 and so on."""
    begin = np.repeat(np.cumsum(counts, dtype=np.int64) - counts, counts)
    counted: Int64s = np.arange(begin.size, dtype=np.int64) - begin
    return counted


def device_lists(lists: Lists) -> DeviceLists:
    """Narrow the pointers of lists.

    Raises
    ------
    KernelNotFound
        For 2³¹ values and more.
    """
    _check_count(lists.nnz)
    return DeviceLists(lists.rows, lists.cols, lists.indptr.astype(np.int32), lists.col_indices)


def transposed_lists(lists: Lists) -> DeviceLists:
    """Return the lists of the transposed matrix, rows ascending in each.

    Raises
    ------
    KernelNotFound
        For 2³¹ values and more.
    """
    _check_count(lists.nnz)
    order = np.argsort(lists.col_indices, kind="stable").astype(np.int32)
    row = np.repeat(np.arange(lists.rows, dtype=np.int32), np.diff(lists.indptr))
    counts = np.bincount(lists.col_indices, minlength=lists.cols)
    indptr = np.append(0, np.cumsum(counts)).astype(np.int32)
    return DeviceLists(lists.cols, lists.rows, indptr, row[order], order)


def _check_count(count: int) -> None:
    if count >= 2**31:
        raise KernelNotFound(
            f"got {count} indices; CUDA kernels count with 32 bits; fix: split the layer, or use "
            "the CPU"
        )
