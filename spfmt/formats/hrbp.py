"""`HRBP`: Hardware-friendly Regrouping towards Block-based Pruning (HRBP, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spfmt.errors import format_error
from spfmt.formats._base import SparseTensor, scores_budget
from spfmt.formats._checks import (
    Array,
    Shape,
    check_ascending,
    check_pointer,
    kernel_cells,
    matrix_shape,
)
from spfmt.formats._coords import Coordinates, fill_short_lists, group_by_support
from spfmt.formats._layout import Groups, lower_groups
from spfmt.formats._registry import register
from spfmt.formats._structure import Structure
from spfmt.structure._checks import (
    INT32_MAX,
    as_density,
    as_int,
    check_permutation,
    check_range,
    plain_array,
)

__all__ = ["HRBP"]


@register
class HRBP(SparseTensor):
    """One dense block per row group: its input channels times its pattern of kernel cells.

    Sizes of the groups differ by at most one; all groups keep the same number of channels and of
    cells. A matrix has one cell, so its groups are plain lists of columns.

    Parameters
    ----------
    shape : tuple of int
        (R, C) or (C_out, C_in, Kh, Kw).
    row_perm : array_like of int, shape (R,)
    row_ptr : array_like of int, shape (t + 1,)
        Group g owns the rows ``row_perm[row_ptr[g]:row_ptr[g+1]]``.
    channel_indices : array_like of int, shape (t, n_channels)
        Input channels of each group, strictly ascending.
    pattern_indices : array_like of int, shape (t, n_cells)
        Kernel cells ``kh * Kw + kw`` of each group, strictly ascending; zeros of shape (t, 1) for
        a matrix. Channels and cells are both empty, or neither is.
    values : array_like of float, shape (nnz,)
        Each group is cut into bands of at most 16 consecutive rows; band after band, and in a band
        column after column (channel-major).

    Raises
    ------
    FormatError
        Names the first group with a bad channel or cell, or the first row that is lacking.
    """

    __slots__ = ()
    format = "hrbp"
    STRUCTURE = ("row_perm", "row_ptr", "channel_indices", "pattern_indices")
    NDIMS = (1, 1, 2, 2)
    POINTERS = ("row_ptr",)
    PARAMS = ("groups",)

    def __init__(
        self,
        shape: Any,
        row_perm: Any,
        row_ptr: Any,
        channel_indices: Any,
        pattern_indices: Any,
        values: Any,
    ) -> None:
        arrays = {
            "row_perm": row_perm,
            "row_ptr": row_ptr,
            "channel_indices": channel_indices,
            "pattern_indices": pattern_indices,
        }
        groups = max(0, plain_array("row_ptr", row_ptr).size - 1)
        self._init(shape, arrays, {"groups": groups}, values)

    @property
    def row_perm(self) -> Array:
        """int32 (R,): rows, group after group."""
        return self._structure["row_perm"]

    @property
    def row_ptr(self) -> Array:
        """int64 (t + 1,): where each group's rows start."""
        return self._structure["row_ptr"]

    @property
    def channel_indices(self) -> Array:
        """int32 (t, n_channels): input channels of each group."""
        return self._structure["channel_indices"]

    @property
    def pattern_indices(self) -> Array:
        """int32 (t, n_cells): kernel cells of each group."""
        return self._structure["pattern_indices"]

    @property
    def groups(self) -> int:
        """Number of row groups."""
        return self._structure.params["groups"]

    @classmethod
    def _check(cls, s: Structure) -> None:
        rows, cols = s.matrix_shape
        pointer, channels, cells = s["row_ptr"], s["channel_indices"], s["pattern_indices"]
        groups = s.params["groups"]
        check_permutation("row_perm", s["row_perm"], rows)
        check_pointer("row_ptr", pointer, groups, rows)
        _check_group_sizes(np.diff(pointer))
        if {channels.shape[0], cells.shape[0]} != {groups} or (channels.size > 0) != (
            cells.size > 0
        ):
            raise format_error(
                f"channel_indices of shape {channels.shape} and pattern_indices of {cells.shape}",
                f"one row for each of {groups} groups in both, and both empty or neither",
                "give every group its channels and its cells",
            )
        if not groups:  # without a group, no channel is out of range
            as_int("channels per group", channels.shape[1], 0, cols // max(1, s.cells))
            as_int("cells per group", cells.shape[1], 0, s.cells)
        check_range("channel_indices", channels, cols // max(1, s.cells), "input channels")
        check_range("pattern_indices", cells, s.cells, "kernel cells")
        check_ascending("channel_indices", channels, "group")
        check_ascending("pattern_indices", cells, "group")

    @classmethod
    def _values_shape(cls, s: Structure) -> Shape:
        width = s["channel_indices"].shape[1] * s["pattern_indices"].shape[1]
        return (s.matrix_shape[0] * width,)

    @classmethod
    def _lower(cls, s: Structure) -> Groups:
        channels, cells = s["channel_indices"], s["pattern_indices"]
        columns = channels[:, :, None] * np.int32(s.cells) + cells[:, None, :]
        width = channels.shape[1] * cells.shape[1]
        col_ptr = np.arange(channels.shape[0] + 1, dtype=np.int64) * width
        return lower_groups(
            s.matrix_shape, s["row_perm"], s["row_ptr"], col_ptr, columns.reshape(-1)
        )

    @classmethod
    def _most_words(cls, shape: Shape, nnz: int, params: Mapping[str, int]) -> int:
        rows, cols = matrix_shape(shape)
        cells = kernel_cells(shape)
        if rows == 0:  # at most one group, whose lists stand for nothing
            return 1 + cols + cells
        # Every row holds n_channels * n_cells values, both at least one.
        groups, per_row = params.get("groups", rows), nnz // rows
        lists = min(per_row, cols // max(1, cells)) + min(per_row, cells)
        return rows + groups * (1 + lists)

    def unit_of_rows(self) -> tuple[str, Array]:
        group = np.empty(self.row_perm.size, np.int64)
        group[self.row_perm] = np.repeat(np.arange(self.groups), np.diff(self.row_ptr))
        return "group", group

    def same_groups(self) -> dict[str, Any]:
        sizes = np.diff(self.row_ptr)
        groups = np.repeat(np.arange(self.groups), sizes)
        larger_first = np.lexsort([groups, -np.repeat(sizes, sizes)])
        return {"groups": self.groups, "row_perm": self.row_perm[larger_first]}

    @classmethod
    def _least_nnz(cls, coords: Coordinates) -> int:
        return coords.matrix_shape[0] * int(coords.row_counts.max(initial=0))

    @classmethod
    def _from_coordinates(cls, coords: Coordinates, *, groups: Any = None) -> HRBP:
        rows = coords.matrix_shape[0]
        perm, pointer = _row_groups(coords, groups)
        group = np.empty(rows, np.int64)
        group[perm] = np.repeat(np.arange(pointer.size - 1), np.diff(pointer))
        cells = kernel_cells(coords.shape)
        channel, cell = np.divmod(coords.cols, max(1, cells))
        mine = group[coords.rows]
        length = coords.matrix_shape[1] // max(1, cells)
        arrays = {
            "row_perm": perm,
            "row_ptr": pointer,
            "channel_indices": _union(mine, channel, pointer.size - 1, length),
            "pattern_indices": _union(mine, cell, pointer.size - 1, cells),
        }
        return cls._fill(coords, arrays, {"groups": pointer.size - 1})

    @classmethod
    def from_dense(cls, w: Any, mask: Any = None, *, groups: int | None = None) -> HRBP:
        """Cover the nonzeros of `w`, or the positions of `mask`, with one block per group.

        Rows with equal column sets share a group where sizes allow it, so the structure of an
        HRBP weight is recovered without padding; else rows are grouped by likeness. All groups get
        as many channels and cells as the largest needs, stored zeros where a row lacks one.

        Parameters
        ----------
        w : array_like of float, shape (R, C) or (C_out, C_in, Kh, Kw)
            A NaN is a nonzero.
        mask : array_like of bool, same shape, optional
        groups : int, optional
            Number of groups; by default the smallest number that needs no mixed group.
        """
        return cls._from_coordinates(Coordinates.of_dense(w, mask), groups=groups)

    @classmethod
    def from_scores(
        cls,
        scores: Any,
        density: float,
        *,
        block_density: float | None = None,
        groups: int | None = None,
        method: str = "paper",
        row_perm: Any = None,
        seed: int = 0,
        values: Any = None,
    ) -> HRBP:
        """Choose groups, channels and patterns by the paper's procedure (HRBP, section 4.1).

        Parameters
        ----------
        scores : array_like, shape (R, C) or (C_out, C_in, Kh, Kw)
            The best round(density * R * C) make the unstructured mask m that the procedure counts.
            Where m is given, pass it: ``from_scores(m, m.mean())``.
        density : float
        block_density : float, optional
            Share s of kernel cells that a pattern keeps, in (0, 1]: 4/9 for 3x3 kernels and 1
            otherwise; raised where the density needs it, and 1 where there is one cell (linear
            layers), see `spfmt.structure.hrbp.hrbp_block_density`.
        groups : int, optional
            Number of row groups; min(8, R // 8) and at least 1 by default.
        method : {"paper", "fast"}
            How rows are clustered, see `spfmt.structure.rows.order_rows`.
        row_perm : array_like of int, shape (R,), optional
            Rows, group after group, the larger groups first; by default they are clustered.
        seed : int
            Of the shuffle that decides between kernels of equally many nonzeros and equal scores.
        values : array_like of the same shape, optional
            Dense array to take the values from; zeros by default.
        """
        from spfmt.structure.hrbp import hrbp_structure
        from spfmt.structure.unstructured import topk_mask

        matrix, shape, budget = scores_budget(scores, density)
        if groups is not None:
            groups = as_int("groups", groups, 1, max(1, shape[0]))
        mask = topk_mask(matrix, budget)
        found = hrbp_structure(
            mask,
            matrix,
            shape,
            float(density),
            block_density=block_density,
            groups=groups,
            method=method,
            row_perm=row_perm,
            seed=seed,
        )
        arrays: dict[str, Array] = dict(zip(cls.STRUCTURE, found, strict=True))
        params = {"groups": arrays["channel_indices"].shape[0]}
        return cls._found(matrix, shape, arrays, params, values)

    @classmethod
    def random(
        cls, shape: Sequence[int], density: float, rng: np.random.Generator, **params: Any
    ) -> HRBP:
        """Draw a tensor group by group, in memory for its nonzeros; see `SparseTensor.random`."""
        from spfmt.structure.fan_in import random_columns
        from spfmt.structure.hrbp import group_ptr, hrbp_block_density

        if unknown := params.keys() - {"block_density", "groups", "method", "row_perm", "seed"}:
            raise TypeError(f"HRBP.random() got unexpected keywords: {', '.join(sorted(unknown))}")
        if as_density(density) == 0.0 or math.prod(shape) == 0:
            return cls.from_scores(np.zeros(shape, np.float32), density, **params)
        rows, cols, cells = shape[0], shape[1], math.prod(shape[2:])
        starts = group_ptr(rows, params.get("groups"))
        share = hrbp_block_density(density, shape, params.get("block_density"))
        groups = starts.size - 1
        channels = random_columns(rng, groups, cols, max(1, round(density / share * cols)))
        kept = round(share * cells)
        values = rng.standard_normal(rows * channels.shape[1] * kept, dtype=np.float32)
        order = rng.permutation(rows)
        pattern = random_columns(rng, groups, cells, kept)
        return cls(shape, order, starts, channels, pattern, values)

    def caption(self) -> str:
        """How many rows a group has."""
        return f"{self.matrix_shape[0] // max(1, self.groups)} rows share all their columns"

    def _summary(self) -> str:
        channels, cells = self.channel_indices.shape[1], self.pattern_indices.shape[1]
        return f"groups={self.groups}, channels={channels}, cells={cells}"


def _check_group_sizes(sizes: Array) -> None:
    low, high = int(sizes.min(initial=INT32_MAX)), int(sizes.max(initial=0))
    # A matrix without rows may have one group without rows.
    if sizes.size > 1 and (high - low > 1 or low == 0):
        group = int(sizes.argmin())
        raise format_error(
            f"group {group} with {low} rows and another with {high}",
            "groups of at least one row whose sizes differ by at most one",
            "spread the rows evenly over the groups",
        )


def _union(group: Array, item: Array, groups: int, length: int) -> Array:
    """Ascending items of each group, filled up with the smallest free ones to one number."""
    keys = np.unique(group * max(1, length) + item)
    owner, items = np.divmod(keys, max(1, length))
    most = int(np.bincount(owner, minlength=groups).max(initial=0))
    added, extra = fill_short_lists(owner, items, np.full(groups, most))
    keys = np.sort(np.concatenate([keys, added * max(1, length) + extra]))
    return (keys % max(1, length)).reshape(groups, most)


def _row_groups(coords: Coordinates, groups: Any) -> tuple[Array, Array]:
    """Row permutation and group pointer: groups of equal rows if they exist, else of like rows."""
    rows = coords.matrix_shape[0]
    label = group_by_support(coords)
    sizes = np.bincount(label)
    if groups is None:
        count, pieces = _fewest_exact(sizes)
    else:
        count = as_int("groups", groups, 1 if rows else 0, max(1, rows))
        pieces = _pieces(sizes, count)
    base, larger = divmod(rows, max(1, count))
    if pieces is None:
        from spfmt.structure.rows import order_rows

        support = coords.support(np.arange(rows))
        order: Array = order_rows(support, method="fast", group_size=max(1, base))
        heights = base + (np.arange(count) < larger)
    else:
        order = np.argsort(label, kind="stable")
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        heights = base + (nth < np.repeat(sizes - pieces * base, pieces))
    pointer = np.zeros(count + 1, np.int64)
    np.cumsum(heights, out=pointer[1:])
    return order, pointer


def _pieces(sizes: Array, count: int) -> Array | None:
    """Number of groups that each set of equal rows is cut into, None if mixed groups are needed.

    A set of b rows makes q groups of ``base`` or ``base + 1`` rows iff
    ``q * base <= b <= q * (base + 1)``; the q must add up to `count`.
    """
    base = int(sizes.sum()) // max(1, count)
    if base == 0:
        return None if count else np.zeros(0, np.int64)
    low, high = -(-sizes // (base + 1)), sizes // base
    if (low > high).any() or not low.sum() <= count <= high.sum():
        return None
    spare = count - int(low.sum())
    room = high - low
    before = np.cumsum(room) - room
    return np.asarray(low + np.clip(spare - before, 0, room), np.int64)


def _fewest_exact(sizes: Array) -> tuple[int, Array | None]:
    """The smallest number of groups of equal rows, and how the sets are cut."""
    rows = int(sizes.sum())
    # Every group has at least `base` rows, so no base beyond the smallest set can work; for each
    # base the counts form a range.
    for base in range(int(sizes.min(initial=rows)), 0, -1):
        low, high = -(-sizes // (base + 1)), sizes // base
        if (low > high).any():
            continue
        first = max(int(low.sum()), rows // (base + 1) + 1)
        if first <= min(int(high.sum()), rows // base):
            return first, _pieces(sizes, first)
    return 0, _pieces(sizes, 0)
