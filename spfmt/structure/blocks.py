"""Choice of shuffled blocks (DSB, NeurIPS 2022, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import format_error
from . import _selection
from ._checks import FloatArray, Int32Array, Int64Array, as_int, as_pair, as_row_perm, as_scores
from .unstructured import topk_mask

__all__ = ["select_blocks"]


def select_blocks(
    scores: npt.ArrayLike,
    row_perm: npt.ArrayLike,
    block_shape: Sequence[int],
    n_blocks: int,
    *,
    signed: bool = False,
) -> tuple[Int64Array, Int32Array]:
    """Blocks of largest l1 norm over row groups that are already ordered.

    Rows row_perm[g*S1:(g+1)*S1] form group g (the last may be short). In a group the columns are
    sorted by the l1 norm of their scores over the group's rows and cut into runs of S2; the runs
    of largest norm in the whole layer win. DSB, section 4: always the column of largest norm in a
    group, and the block of largest norm among the groups, until there are enough.

    Parameters
    ----------
    scores : array_like, shape (R, C), any real dtype
        Their absolute values count; 0 where a weight is not active.
    row_perm : array_like of int, shape (R,)
        A permutation of the rows, see `order_rows`.
    block_shape : (int, int)
        S1 rows by S2 columns, both at least 1.
    n_blocks : int
        How many blocks to take, 0 <= n_blocks <= ceil(R/S1) * ceil(C/S2). A group's last block is
        short where S2 does not divide C, and so are the blocks of a short last group.
    signed : bool, default False
        Rank by the sum of the scores instead of the l1 norm: a negative score then speaks against
        its position.

    Returns
    -------
    group_ptr : ndarray of int64, shape (G + 1,)
        Group g owns col_indices[group_ptr[g]:group_ptr[g + 1]].
    col_indices : ndarray of int32, shape (T,)
        Unique in a group; consecutive runs of S2 are its blocks, of largest norm first, ascending
        inside a block. Equal columns go to the lowest index, equal blocks to the first group.

    Raises
    ------
    FormatError
        NaN or -inf in scores, not two-dimensional, row_perm not a permutation, or a bad block
        shape or number of blocks.
    """
    plain = as_scores(scores, ndim=2)
    rows, cols = plain.shape
    perm = as_row_perm(row_perm, rows)
    block_rows, block_cols = as_pair(
        "block_shape", block_shape, ("block rows S1", "block columns S2")
    )
    if plain.size and plain.min() == -np.inf:
        raise format_error(
            "-inf in scores", "scores whose l1 norm ranks columns", "use 0 for positions to avoid"
        )
    if not signed and plain.size and plain.min() < 0:
        plain = np.abs(plain)
    groups = -(-rows // block_rows)
    per_group = -(-cols // block_cols)
    n_blocks = as_int("n_blocks", n_blocks, 0, groups * per_group)
    # Most groups keep about their share: few columns beyond it have to be ranked.
    ranked = min(per_group, 2 + 2 * -(-n_blocks // max(1, groups)))
    order, kept = _ranked_blocks(plain, perm, (block_rows, block_cols), n_blocks, ranked)
    widths = np.minimum(kept * block_cols, cols)
    group_ptr = np.zeros(groups + 1, np.int64)
    np.cumsum(widths, out=group_ptr[1:])
    columns: Int32Array = order[np.arange(order.shape[1]) < widths[:, None]]
    return group_ptr, _ascending_in_blocks(columns, group_ptr, block_cols, cols)


def _ranked_blocks(
    scores: FloatArray, perm: Int32Array, block_shape: tuple[int, int], n_blocks: int, ranked: int
) -> tuple[Int32Array, Int64Array]:
    """Columns of the first `ranked` blocks of every group, or of all, and how many are kept."""
    (rows, cols), (block_rows, block_cols) = scores.shape, block_shape
    per_group = -(-cols // block_cols)
    order, norms = _rank(scores, perm, block_shape, ranked)
    # Norms fall along a group, so what is kept of a group is always its first blocks; the one
    # exception, a short last block of a better negative sum, gets no other treatment.
    kept = topk_mask(norms, n_blocks).sum(axis=1)
    more = np.flatnonzero(kept == ranked)
    if ranked == per_group or not (more.size or norms.min(initial=0) < 0):
        return order, kept
    if norms.min() < 0 or (rows % block_rows and more[-1] == len(kept) - 1):
        return _ranked_blocks(scores, perm, block_shape, n_blocks, per_group)
    # Few groups may want more than were ranked; only theirs are ranked to the end.
    places = (more[:, None] * block_rows + np.arange(block_rows)).reshape(-1)
    whole_order = np.zeros((len(kept), cols), np.int32)
    whole_norms = np.full((len(kept), per_group), -np.inf)
    whole_order[:, : order.shape[1]], whole_norms[:, :ranked] = order, norms
    whole_order[more], whole_norms[more] = _rank(scores, perm[places], block_shape, per_group)
    return whole_order, topk_mask(whole_norms, n_blocks).sum(axis=1)


def _rank(
    scores: FloatArray, perm: Int32Array, block_shape: tuple[int, int], ranked: int
) -> tuple[Int32Array, npt.NDArray[np.float64]]:
    """Columns and norms of the first `ranked` blocks of every group, best first."""
    block_rows, block_cols = block_shape
    groups = -(-perm.size // block_rows)
    order = np.empty((groups, min(scores.shape[1], ranked * block_cols)), np.int32)
    norms = np.empty((groups, ranked), np.float64)
    _selection.block_norms(scores, perm, block_rows, block_cols, order, norms)
    return order, norms


def _ascending_in_blocks(
    columns: Int32Array, group_ptr: Int64Array, block_cols: int, cols: int
) -> Int32Array:
    """Sort every block's columns; the blocks stay in place."""
    widths = np.diff(group_ptr)
    group = np.repeat(np.arange(widths.size), widths)
    in_group = np.arange(columns.size) - group_ptr[:-1][group]
    block = group * -(-cols // block_cols) + in_group // block_cols
    key = np.sort(block * cols + columns) if cols else block
    ascending: Int32Array = (key - block * cols).astype(np.int32)
    return ascending
