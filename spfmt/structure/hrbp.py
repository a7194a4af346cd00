"""HRBP: regrouping into dense blocks that survive the backward pass of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import format_error
from . import _hrbp
from ._checks import (
    BoolArray,
    FloatArray,
    Int32Array,
    Int64Array,
    as_density,
    as_int,
    as_mask,
    as_row_perm,
    as_scores,
    bounded,
)
from .rows import order_rows
from .unstructured import topk_mask

__all__ = ["hrbp_block_density", "hrbp_structure"]


def hrbp_structure(
    mask: npt.ArrayLike,
    scores: npt.ArrayLike,
    shape: Sequence[int],
    density: float,
    block_density: float | None = None,
    groups: int | None = None,
    *,
    method: str = "paper",
    row_perm: npt.ArrayLike | None = None,
    seed: int = 0,
) -> tuple[Int32Array, Int64Array, Int32Array, Int32Array]:
    """Row groups, their input channels and their kernel pattern (HRBP, section 4.1).

    1. The block density s is legal and at least r = density, see `hrbp_block_density`.
    2. The fraction r/s of the kernels with the most nonzeros forms the kernel mask m'.
    3. The rows of m' are clustered by Jaccard similarity and cut into t groups of equal size, the
       first C_out mod t with a row more.
    4. Each group keeps the round(r/s*C_in) channels, at least one, with the most kernels of m'
       (ties: with the most nonzeros of m).
    5. Each group keeps the s*Kh*Kw kernel cells with the most nonzeros of m over its kernels.

    Ties that are left go to the larger sum of the scores. What ties in step 2 even then is decided
    by a seeded shuffle (by index it would skew the mask: the first rows would hold most kernels),
    in the other steps by the lower index.

    Parameters
    ----------
    mask : array_like, shape (C_out, C_in*Kh*Kw)
        The unstructured mask m.
    scores : array_like, shape (C_out, C_in*Kh*Kw), any real dtype
        Importance of the weights, larger is better; only breaks ties.
    shape : sequence of 2 or 4 ints
        (C_out, C_in) or (C_out, C_in, Kh, Kw). A depthwise layer has C_in = 1.
    density : float
        r, the density of the result, in [0, 1]. The result's own density is
        n_channels*n_cells / (C_in*Kh*Kw), the nearest that whole channels can hold, of two equally
        near ones that with an even number of channels.
    block_density : float, optional
        s in (0, 1]; a multiple of 1/(Kh*Kw). A layer of one cell (linear, 1x1) keeps it, s = 1,
        whatever is given.
    groups : int, optional
        t, 1 <= t <= C_out; min(8, C_out // 8) and at least 1 by default, so that a group has at
        least 8 rows.
    method : {"paper", "fast"}
        How rows are ordered, see `order_rows`.
    row_perm : array_like of int, shape (C_out,), optional
        An order of the rows to cut into groups; step 3 is left out then.
    seed : int, default 0
        Of the shuffle in step 2.

    Returns
    -------
    row_perm : ndarray of int32, shape (C_out,)
        Rows, group after group, ascending in a group.
    row_ptr : ndarray of int64, shape (t + 1,)
        Group g owns row_perm[row_ptr[g]:row_ptr[g + 1]]; sizes differ by at most one.
    channel_indices : ndarray of int32, shape (t, n_channels)
        Ascending.
    pattern_indices : ndarray of int32, shape (t, n_cells)
        Cells kh*Kw + kw, ascending.

    Raises
    ------
    FormatError
        Shapes that do not fit together, NaN in scores, an illegal block density or number of
        groups.
    """
    m, plain, out, channels, cells = _check_layer(mask, scores, shape)
    r = as_density(density)
    if out == 0 or channels * cells == 0 or r == 0.0:
        return _nothing(out, groups, row_perm)
    s_cells = _pattern_cells(r, shape, block_density)
    fraction = min(1.0, r * cells / s_cells)
    kernel_mask = _kernel_mask(m, plain, fraction, cells, np.random.default_rng(seed))
    order, row_ptr = _row_groups(kernel_mask, groups, method, row_perm)
    n_channels = max(1, _nearest(fraction * channels))
    kept_channels = np.empty((row_ptr.size - 1, n_channels), np.int32)
    patterns = np.empty((row_ptr.size - 1, s_cells), np.int32)
    for g in range(row_ptr.size - 1):
        rows = order[row_ptr[g] : row_ptr[g + 1]]
        _choose_block(kernel_mask, m, plain, rows, kept_channels[g], patterns[g])
    return order, row_ptr, kept_channels, patterns


def hrbp_blocks(
    mask: npt.ArrayLike,
    scores: npt.ArrayLike,
    shape: Sequence[int],
    row_perm: npt.ArrayLike,
    row_ptr: npt.ArrayLike,
    n_channels: int,
    n_cells: int,
    *,
    seed: int = 0,
) -> tuple[Int32Array, Int32Array]:
    """Input channels and pattern of row groups that stay as they are (HRBP, section 4.2).

    Steps 2, 4 and 5 of `hrbp_structure` inside each group: its fraction n_channels/C_in of kernels
    with the most nonzeros forms its kernel mask, and its block follows from that.

    Parameters
    ----------
    mask, scores, shape
        As for `hrbp_structure`.
    row_perm : array_like of int, shape (C_out,)
        Rows, group after group.
    row_ptr : array_like of int, shape (t + 1,)
        Group g owns row_perm[row_ptr[g]:row_ptr[g + 1]].
    n_channels, n_cells : int
        What every group keeps, 1 <= n_channels <= C_in and 1 <= n_cells <= Kh*Kw.
    seed : int, default 0
        Of the shuffles in step 2, one group after the other.

    Returns
    -------
    channel_indices : ndarray of int32, shape (t, n_channels)
        Ascending.
    pattern_indices : ndarray of int32, shape (t, n_cells)
        Cells kh*Kw + kw, ascending.

    Raises
    ------
    FormatError
        Shapes that do not fit together, NaN in scores, row_perm not a permutation, an empty group,
        or numbers of channels or cells out of range.
    """
    m, plain, out, channels, cells = _check_layer(mask, scores, shape)
    perm, pointer = as_row_perm(row_perm, out), _as_group_ptr(row_ptr, out)
    n_channels = as_int("n_channels", n_channels, 1, channels)
    n_cells = as_int("n_cells", n_cells, 1, cells)
    kept_channels = np.empty((pointer.size - 1, n_channels), np.int32)
    patterns = np.empty((pointer.size - 1, n_cells), np.int32)
    kernel_mask = np.zeros((out, channels), np.bool_)
    rng = np.random.default_rng(seed)
    for g in range(pointer.size - 1):
        rows = np.sort(perm[pointer[g] : pointer[g + 1]])
        kernel_mask[rows] = _kernel_mask(m[rows], plain[rows], n_channels / channels, cells, rng)
        _choose_block(kernel_mask, m, plain, rows, kept_channels[g], patterns[g])
    return kept_channels, patterns


def _choose_block(
    kernel_mask: BoolArray,
    m: BoolArray,
    scores: FloatArray,
    rows: Int32Array,
    channels: Int32Array,
    pattern: Int32Array,
) -> None:
    """Fill in the channels and the cells that a group of rows keeps."""
    count = kernel_mask.shape[1]
    cells = m.shape[1] // count
    counts, sums = np.zeros((2, count), np.int64), np.zeros(count, np.float64)
    _hrbp.channel_totals(
        kernel_mask.view(np.uint8), m.view(np.uint8), scores, rows, cells, counts, sums
    )
    channels[:] = np.flatnonzero(_most(channels.size, *counts, sums))
    pattern[:] = _pattern(m, scores, rows, channels, cells, pattern.size)


def hrbp_block_density(
    density: float, shape: Sequence[int], block_density: float | None = None
) -> float:
    """The block density s that HRBP uses for a layer, a multiple of 1/(Kh*Kw).

    Default 4/9 for 3x3 kernels (HRBP, section 5.1) and 1 for all others, raised to the smallest
    legal value >= r where it is below the density r. Where it would leave less than one input
    channel (depthwise layers: C_in = 1) the smallest legal s >= r is taken, so that the pattern
    alone carries the sparsity.

    Parameters
    ----------
    density : float
        r, in [0, 1].
    shape : sequence of 2 or 4 ints
        (C_out, C_in) or (C_out, C_in, Kh, Kw).
    block_density : float, optional
        s in (0, 1] to start from instead of the default. A layer of one cell (linear, 1x1) keeps
        that cell whatever s is: its channels alone carry the sparsity.

    Returns
    -------
    float
        s, in (0, 1].

    Raises
    ------
    FormatError
        block_density is out of (0, 1], or not a multiple of 1/(Kh*Kw) where there are several
        cells; or a bad shape.
    """
    cells = _layer_shape(shape)[2]
    return _pattern_cells(as_density(density), shape, block_density) / max(1, cells)


def _pattern_cells(r: float, shape: Sequence[int], block_density: float | None) -> int:
    """s*Kh*Kw, see `hrbp_block_density`."""
    channels, cells = shape[1], max(1, math.prod(shape[2:]))
    smallest = max(1, math.ceil(r * cells - 1e-9))
    if block_density is None:
        wanted = 4 if tuple(shape[2:]) == (3, 3) else cells
    else:
        exact = as_density(block_density, "block_density") * cells
        # A model of 3x3 kernels has 1x1 ones and matrices, too.
        wanted = 1 if cells == 1 and exact > 0.0 else _nearest(exact)
        if wanted < 1 or (cells > 1 and abs(exact - wanted) > 1e-6 * cells):
            raise format_error(
                f"block_density = {block_density!r} for {cells} kernel cells",
                f"i/{cells} with a whole i from 1 to {cells}",
                f"pass block_density={max(1, wanted)}/{cells}",
            )
    wanted = max(wanted, smallest)
    return smallest if r * cells * channels < wanted else wanted


def _nearest(value: float) -> int:
    """Round, halves to even; what is a half but for the last bits counts as one."""
    return round(round(value, 9))


def _kernel_mask(
    m: BoolArray, scores: FloatArray, fraction: float, cells: int, rng: np.random.Generator
) -> BoolArray:
    """The fraction of the kernels with the most nonzeros, ties to the larger sum of scores."""
    per_kernel: npt.NDArray[Any] = m.view(np.uint8)
    if cells > 1:
        per_kernel = np.empty((m.shape[0], m.shape[1] // cells), np.int32)
        _hrbp.kernel_counts(m.view(np.uint8), cells, per_kernel)
    count, bound = _nearest(fraction * per_kernel.size), int(per_kernel.max())
    while np.count_nonzero(per_kernel >= bound) < count:  # there are few numbers of nonzeros
        bound -= 1
    kept: BoolArray = per_kernel >= bound
    excess = int(np.count_nonzero(kept)) - count
    if excess:
        ties = np.flatnonzero(per_kernel == bound)
        sums = np.empty(ties.size, np.float64)
        _hrbp.kernel_sums(scores, cells, ties, sums)
        shuffled = rng.permutation(ties.size)  # what ties in both is drawn
        chosen = topk_mask(sums[shuffled], ties.size - excess)
        kept.reshape(-1)[ties[shuffled[~chosen]]] = False
    return kept


def _most(count: int, *keys: npt.NDArray[Any]) -> BoolArray:
    """Mask of the largest by the first key, ties by the next ones, then by index."""
    ranked = np.lexsort([np.arange(keys[0].size), *(-key for key in reversed(keys))])
    chosen = np.zeros(keys[0].size, np.bool_)
    chosen[ranked[:count]] = True
    return chosen


def _row_groups(
    kernel_mask: BoolArray, groups: int | None, method: str, row_perm: npt.ArrayLike | None
) -> tuple[Int32Array, Int64Array]:
    """Leaf order of the rows cut into t groups whose sizes differ by at most one."""
    row_ptr = group_ptr(kernel_mask.shape[0], groups)
    if row_perm is not None:
        order = as_row_perm(row_perm, kernel_mask.shape[0]).copy()
    else:  # DSB's fraction q is not part of HRBP: every row that shares a channel is clustered
        order = order_rows(
            kernel_mask, min_overlap=0.0, method=method, group_size=max(1, int(row_ptr[1]))
        )
    for g in range(row_ptr.size - 1):
        order[row_ptr[g] : row_ptr[g + 1]].sort()
    return order, row_ptr


def group_ptr(out: int, groups: int | None) -> Int64Array:
    """Bounds of t groups whose sizes differ by at most one, the larger ones first."""
    t = max(1, min(8, out // 8)) if groups is None else as_int("groups", groups, 1, out)
    base, longer = divmod(out, t)
    row_ptr = np.zeros(t + 1, np.int64)
    np.cumsum(base + (np.arange(t) < longer), out=row_ptr[1:])
    return row_ptr


def _as_group_ptr(row_ptr: npt.ArrayLike, out: int) -> Int64Array:
    """`row_ptr` as int64, from 0 to all rows, every group with a row."""
    pointer = np.asarray(row_ptr, np.int64)
    ends = pointer.ndim == 1 and pointer.size and (pointer[0], pointer[-1]) == (0, out)
    if not ends or (np.diff(pointer) < 1).any():
        raise format_error(
            f"row_ptr = {pointer.tolist()}",
            f"ascending bounds of groups, from 0 to {out}",
            "pass those of hrbp_structure",
        )
    return pointer


def _pattern(
    m: BoolArray, scores: FloatArray, rows: Int32Array, channels: Int32Array, cells: int, keep: int
) -> Int64Array:
    """The cells with the most nonzeros over the group's kept kernels, ascending (Fig. 3)."""
    if keep == cells:
        return np.arange(cells)
    counts = np.zeros(cells, np.int64)
    sums = np.zeros(cells, np.float64)
    _hrbp.cell_counts(m.view(np.uint8), scores, rows, channels, counts, sums)
    return np.flatnonzero(_most(keep, counts, sums))


def _nothing(
    out: int, groups: int | None, row_perm: npt.ArrayLike | None
) -> tuple[Int32Array, Int64Array, Int32Array, Int32Array]:
    """Groups without a weight; no group where there is no row."""
    row_ptr = group_ptr(out, groups) if out else np.zeros(1, np.int64)
    empty = np.empty((row_ptr.size - 1, 0), np.int32)
    perm = np.arange(out, dtype=np.int32) if row_perm is None else as_row_perm(row_perm, out)
    return perm, row_ptr, empty, empty.copy()


def _layer_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(C_out, C_in, Kh*Kw)."""
    sizes = [as_int("a size of shape", size, 0) for size in shape]
    if len(sizes) not in (2, 4):
        raise format_error(
            f"shape = {tuple(sizes)}",
            "(C_out, C_in) or (C_out, C_in, Kh, Kw)",
            "add kernel sizes of 1 where they are missing",
        )
    return sizes[0], sizes[1], math.prod(sizes[2:])


def _check_layer(
    mask: npt.ArrayLike, scores: npt.ArrayLike, shape: Sequence[int]
) -> tuple[BoolArray, FloatArray, int, int, int]:
    out, channels, cells = _layer_shape(shape)
    m = as_mask(mask)
    plain = bounded(as_scores(scores, ndim=2))
    if m.shape != (out, channels * cells) or plain.shape != m.shape:
        raise format_error(
            f"mask {m.shape} and scores {plain.shape} for a layer of shape {tuple(shape)}",
            f"both of shape {(out, channels * cells)}",
            "reshape the weight to (C_out, C_in*Kh*Kw)",
        )
    return m, plain, out, channels, cells
