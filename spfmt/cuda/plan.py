"""Structures as the CUDA kernels want them: 32-bit indices, tiles of rows, transposed lists.

A convolution's tiles say of every column which channel of which neighbour it sees. Where that lies
depends on padding and dilation, so they are made for a structure and a convolution.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spfmt.errors import KernelNotFound
from spfmt.formats import Groups, Lists
from spfmt.formats._layout import BAND

if TYPE_CHECKING:
    from spfmt.convolution import Convolution

__all__ = [
    "PIECE",
    "TAP",
    "TILE",
    "DeviceLists",
    "DeviceTiles",
    "conv_tiles",
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
    [
        *((name, TILE[name]) for name in TILE.names or ()),
        *((name, "i4") for name in ("first", "count", "down", "across")),
    ]
)
"""The struct Piece of cuda/api.h."""

TAP = np.dtype([("channel", "i4"), ("down", "i2"), ("across", "i2")])
"""The struct Tap of cuda/api.h."""

CHUNK = 192
"""Columns, or channels, that a block of the transposed product owns: as many as all devices allow.

It wants 48 KiB of shared memory, and 256 bytes for each of them. 256 let two blocks share a
multiprocessor of those that have 228 KiB. The more, the less is read twice.
"""

PIECE_COLS = 64
"""Most columns of a piece."""


@dataclass(frozen=True, eq=False)
class DeviceTiles:
    """Groups, cut into tiles of rows with one column list; cuda/api.h has the order of values.

    Attributes
    ----------
    rows, cols : int
        Shape of the matrix; channels of Y and X of a convolution.
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
        Of a convolution there are such chunks for every pixel of dX modulo the strides.
    tap : ndarray of TAP, or None
        Of a convolution: what the columns of `col_indices` see.
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
    tap: npt.NDArray[np.void] | None = None


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


def device_tiles(groups: Groups, most_rows: int, chunk: int = CHUNK) -> DeviceTiles:
    """Merge bands of a group into tiles of at most `most_rows` rows.

    Parameters
    ----------
    groups : Groups
    most_rows : int
        16, 64 or 128.
    chunk : int
        Columns that a block of the transposed product owns.

    Raises
    ------
    KernelNotFound
        For lists of 2³¹ columns and more together.
    """
    columns = np.arange(groups.cols)
    nowhere = np.zeros_like(columns)
    targets = _Targets(columns, columns // chunk, nowhere, nowhere, nowhere)
    return _device_tiles(groups, most_rows, groups.cols, chunk, -(-groups.cols // chunk), targets)


def conv_tiles(groups: Groups, most_rows: int, how: Convolution, chunk: int = CHUNK) -> DeviceTiles:
    """Merge bands of a convolution's weight, (C_out, C_in · Kh · Kw), into tiles.

    Parameters
    ----------
    groups, most_rows
        As for `device_tiles`.
    how : spfmt.convolution.Convolution
        In one group.
    chunk : int
        Channels that a block of the gradient of the input owns.

    Raises
    ------
    KernelNotFound
        As for `device_tiles`, for kernels that reach further than 2¹⁵ pixels, and for strides of
        more than 4096 pixels (along y times along x): dX takes a launch for each remainder.
    """
    height, width = how.kernel
    channels, cells = groups.cols // (height * width), height * width
    channel, cell = np.divmod(np.arange(groups.cols), cells)
    steps = (np.asarray(cell // width), np.asarray(cell % width))
    reach = [step * d - p for step, d, p in zip(steps, how.dilation, how.padding, strict=False)]
    if any(np.abs(r).max(initial=0) >= 2**15 for r in reach):
        raise KernelNotFound(
            f"got a kernel of {height} x {width}, padding {how.padding} and dilation "
            f"{how.dilation}; CUDA kernels reach 32767 pixels; fix: use the CPU"
        )
    if how.stride[0] * how.stride[1] > 4096:
        raise KernelNotFound(
            f"got stride {how.stride}; CUDA kernels take strides of 4096 pixels together; fix: use "
            "the CPU"
        )
    down, across = reach
    # Pixel h of dX gets something from pixel (h - reach) / stride of dY where that is whole.
    chunks = -(-channels // chunk)
    phase = down % how.stride[0] * how.stride[1] + across % how.stride[1]
    targets = _Targets(
        channel, phase * chunks + channel // chunk, cell,
        -(down // how.stride[0]), -(across // how.stride[1]),
    )  # fmt: skip
    blocks = how.stride[0] * how.stride[1] * chunks
    made = _device_tiles(groups, most_rows, channels, chunk, blocks, targets)
    tap = np.zeros(groups.col_indices.size, TAP)
    for name, of_column in (("channel", channel), ("down", down), ("across", across)):
        tap[name] = of_column[groups.col_indices]
    return replace(made, tap=tap)


@dataclass(frozen=True, eq=False)
class _Targets:
    """Of every column: the row of dX it adds to, whose block that is, and which of dY's pixels.

    Attributes
    ----------
    row, block, cell, down, across : ndarray of int64, shape (cols,)
    """

    row: Int64s
    block: Int64s
    cell: Int64s
    down: Int64s
    across: Int64s


def _device_tiles(
    groups: Groups, most_rows: int, cols: int, chunk: int, blocks: int, targets: _Targets
) -> DeviceTiles:
    _check_count(groups.col_indices.size)
    tile = _tiles(groups, most_rows)
    ascending, sorted_cols, piece, piece_ptr = _pieces(groups, tile, blocks, targets)
    return DeviceTiles(
        groups.rows, cols, most_rows, int(tile["cols"].max(initial=0)), chunk, tile,
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
    groups: Groups, tile: npt.NDArray[np.void], blocks: int, targets: _Targets
) -> tuple[Int32s, Int32s, npt.NDArray[np.void], Int32s]:
    """Return the lists by ascending target, and what each tile has for each block."""
    key = tile["col"].astype(np.int64) << 32 | tile["cols"]
    _, example, list_of_tile = np.unique(key, return_index=True, return_inverse=True)
    begin, length = tile["col"][example], tile["cols"][example]
    owner = np.repeat(np.arange(length.size), length)
    place = _count_up(length)
    columns = groups.col_indices[begin[owner] + place]
    order = np.lexsort((targets.row[columns], targets.cell[columns], targets.block[columns], owner))
    ascending, columns = place[order].astype(np.int32), columns[order]
    sorted_cols = targets.row[columns].astype(np.int32)

    # Of every list: a run for each block and cell, cut after PIECE_COLS columns.
    block, cell = targets.block[columns], targets.cell[columns]
    breaks = (np.diff(owner) != 0) | (np.diff(block) != 0) | (np.diff(cell) != 0)
    run = np.flatnonzero(np.append(True, breaks)[: owner.size])
    nth = _count_up(np.diff(run, append=owner.size))
    first = np.flatnonzero(nth % PIECE_COLS == 0)
    count = np.diff(first, append=owner.size)

    # A tile has those of its list.
    of_list = np.searchsorted(owner[first], np.arange(length.size + 1))
    pieces_of_tile = np.diff(of_list)[list_of_tile]
    which_tile = np.repeat(np.arange(tile.size), pieces_of_tile)
    which = of_list[list_of_tile[which_tile]] + _count_up(pieces_of_tile)
    by_block = np.argsort(block[first][which], kind="stable")
    which, which_tile = which[by_block], which_tile[by_block]
    piece = np.zeros(which.size, PIECE)
    for name in TILE.names or ():
        piece[name] = tile[name][which_tile]
    piece["first"], piece["count"] = first[which], count[which]
    example = columns[first][which]
    piece["down"], piece["across"] = targets.down[example], targets.across[example]
    piece_ptr = np.searchsorted(block[first][which], np.arange(blocks + 1))
    return ascending, sorted_cols, piece, piece_ptr.astype(np.int32)


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
