"""`ShuffledBlock`: dense blocks on shuffled rows and columns (DSB, section 3)."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from spfmt.errors import format_error
from spfmt.formats._base import SparseTensor, scores_budget
from spfmt.formats._checks import Array, Shape, check_pointer, check_shape, matrix_shape
from spfmt.formats._coords import Coordinates, group_by_support
from spfmt.formats._layout import Groups, lower_groups
from spfmt.formats._registry import register
from spfmt.formats._structure import Structure
from spfmt.structure import _selection
from spfmt.structure._checks import (
    as_density,
    as_int,
    as_pair,
    as_row_perm,
    as_scores,
    bounded,
    check_permutation,
    check_range,
    plain_array,
)
from spfmt.structure.unstructured import topk_mask

__all__ = ["ShuffledBlock"]

# Of a block's two sizes: in formulas, and as parameters.
_NAMES = (("S1", "S2"), ("block_rows", "block_cols"))

BLOCK_SHAPE = (16, 16)


@register
class ShuffledBlock(SparseTensor):
    """Blocks of S1 shuffled rows by S2 shuffled columns.

    A permutation cuts the rows into groups of S1 (the last may be short); blocks of a group share
    its rows, and a column occurs at most once per group.

    Parameters
    ----------
    shape : tuple of int
        (R, C) or (C_out, C_in, Kh, Kw).
    block_shape : tuple of int
        (S1, S2), both at least 1.
    row_perm : array_like of int, shape (R,)
        Group g owns the rows ``row_perm[g*S1:(g+1)*S1]``.
    group_ptr : array_like of int, shape (ceil(R / S1) + 1,)
        Group g owns the columns ``col_indices[group_ptr[g]:group_ptr[g+1]]``; consecutive runs of
        S2 are its blocks, the last run may be short.
    col_indices : array_like of int, shape (T,)
    values : array_like of float, shape (nnz,)
        Each group is cut into bands of at most 16 consecutive rows; band after band, and in a band
        column after column.

    Raises
    ------
    FormatError
        Names the first group with a bad column, or the first row that the permutation lacks.
    """

    __slots__ = ()
    format = "shuffled_block"
    STRUCTURE = ("row_perm", "group_ptr", "col_indices")
    NDIMS = (1, 1, 1)
    POINTERS = ("group_ptr",)
    PARAMS = ("block_rows", "block_cols")

    def __init__(
        self,
        shape: Any,
        block_shape: Any,
        row_perm: Any,
        group_ptr: Any,
        col_indices: Any,
        values: Any,
    ) -> None:
        block_rows, block_cols = as_pair("block_shape", block_shape, *_NAMES)
        arrays = {"row_perm": row_perm, "group_ptr": group_ptr, "col_indices": col_indices}
        self._init(shape, arrays, {"block_rows": block_rows, "block_cols": block_cols}, values)

    @property
    def block_shape(self) -> tuple[int, int]:
        """(S1, S2)."""
        params = self._structure.params
        return params["block_rows"], params["block_cols"]

    @property
    def row_perm(self) -> Array:
        """int32 (R,): rows, group after group."""
        return self._structure["row_perm"]

    @property
    def group_ptr(self) -> Array:
        """int64 (G + 1,): where each group's columns start."""
        return self._structure["group_ptr"]

    @property
    def col_indices(self) -> Array:
        """int32 (T,): columns, group after group."""
        return self._structure["col_indices"]

    @property
    def n_blocks(self) -> int:
        """Number of blocks, short ones included."""
        return int((-(-np.diff(self.group_ptr) // self.block_shape[1])).sum())

    def blocks(self) -> Iterator[tuple[Array, Array, Array]]:
        """Yield (row_indices, col_indices, block) for every block, group after group.

        A block is an array of shape (len(row_indices), len(col_indices)): S1 x S2, or smaller in a
        short group or at the end of a group's columns.
        """
        layout = self.layout()
        assert isinstance(layout, Groups)
        flat, width = self.values, self.block_shape[1]
        band = 0
        for group, begin in enumerate(self.group_ptr[:-1]):
            columns = self.col_indices[begin : self.group_ptr[group + 1]]
            rows = self.row_perm[group * self.block_shape[0] :][: self.block_shape[0]]
            parts, placed = [], 0
            while placed < rows.size:
                part = flat[layout.value_ptr[band] : layout.value_ptr[band + 1]]
                height = int(layout.row_ptr[band + 1] - layout.row_ptr[band])
                parts.append(part.reshape(columns.size, height).T)
                placed, band = placed + height, band + 1
            dense = np.concatenate(parts)
            for start in range(0, columns.size, width):
                run = slice(start, start + width)
                yield rows, columns[run], dense[:, run]

    @classmethod
    def _check(cls, s: Structure) -> None:
        rows, cols = s.matrix_shape
        block_rows, _ = as_pair(
            "block_shape", (s.params["block_rows"], s.params["block_cols"]), *_NAMES
        )
        columns, pointer = s["col_indices"], s["group_ptr"]
        check_permutation("row_perm", s["row_perm"], rows)
        check_pointer("group_ptr", pointer, -(-rows // block_rows), columns.size)
        check_range("col_indices", columns, cols, "columns")
        group = np.repeat(np.arange(pointer.size - 1, dtype=np.int64), np.diff(pointer))
        keys = np.sort(group * cols + columns)
        twice = np.flatnonzero(keys[1:] == keys[:-1])
        if twice.size:
            where, col = divmod(int(keys[twice[0]]), cols)
            raise format_error(
                f"column {col} twice in group {where} (a duplicate)",
                "each column at most once in a group",
                "merge the two columns and their values",
            )

    @classmethod
    def _values_shape(cls, s: Structure) -> Shape:
        heights = np.diff(_group_rows(s.matrix_shape[0], s.params["block_rows"]))
        return (int((heights * np.diff(s["group_ptr"])).sum()),)

    @classmethod
    def _lower(cls, s: Structure) -> Groups:
        groups = _group_rows(s.matrix_shape[0], s.params["block_rows"])
        return lower_groups(s.matrix_shape, s["row_perm"], groups, s["group_ptr"], s["col_indices"])

    @classmethod
    def _most_words(cls, shape: Shape, nnz: int, params: Mapping[str, int]) -> int:
        rows, cols = matrix_shape(shape)
        block_rows = params.get("block_rows", 1)
        groups = -(-rows // block_rows)
        # Columns of full groups cost S1 values each; those of a short last group are at most C.
        columns = min(nnz // block_rows + cols, groups * cols, nnz)
        return rows + groups + columns

    def unit_of_rows(self) -> tuple[str, Array]:
        group = np.empty(self.row_perm.size, np.int64)
        group[self.row_perm] = np.arange(self.row_perm.size) // self.block_shape[0]
        return "group", group

    def most_nnz(self, density: float) -> int:
        rows, cols = self.matrix_shape
        height, width = (min(pair) for pair in zip(self.block_shape, (rows, cols), strict=True))
        if height == 0 or width == 0 or (rows % height == 0 and cols % width == 0):
            return self.nnz
        # The fewest blocks that hold a budget hold less than a block more than that.
        size = rows * cols
        return max(self.nnz, min(size, round(density * size) + height * width - 1))

    def same_groups(self) -> dict[str, Any]:
        return {"row_perm": self.row_perm}

    @classmethod
    def _from_coordinates(
        cls, coords: Coordinates, *, block_shape: Any = BLOCK_SHAPE, row_perm: Any = None
    ) -> ShuffledBlock:
        block_rows, block_cols = as_pair("block_shape", block_shape, *_NAMES)
        rows, cols = coords.matrix_shape
        if row_perm is None:
            perm = _rows_by_support(coords, block_rows)
        else:
            perm = as_row_perm(row_perm, rows)
        group = np.empty(rows, np.int64)
        group[perm] = np.arange(rows) // block_rows
        # A group's columns are the union of its rows' columns.
        keys = np.unique(group[coords.rows] * cols + coords.cols)
        pointer = np.searchsorted(keys, np.arange(-(-rows // block_rows) + 1) * cols)
        arrays = {"row_perm": perm, "group_ptr": pointer, "col_indices": keys % max(1, cols)}
        params = {"block_rows": block_rows, "block_cols": block_cols}
        return cls._fill(coords, arrays, params)

    @classmethod
    def from_dense(
        cls,
        w: Any,
        mask: Any = None,
        *,
        block_shape: tuple[int, int] = BLOCK_SHAPE,
        row_perm: Any = None,
    ) -> ShuffledBlock:
        """Cover the nonzeros of `w`, or the positions of `mask`, with blocks.

        Rows with equal column sets are grouped first, so a pattern of whole groups is recovered
        without padding; the other rows are grouped by likeness (DSB, section 4). A group stores
        the union of its rows' columns, zeros where a row lacks one.

        Parameters
        ----------
        w : array_like of float, shape (R, C) or (C_out, C_in, Kh, Kw)
            A NaN is a nonzero.
        mask : array_like of bool, same shape, optional
        block_shape : tuple of int
            (S1, S2).
        row_perm : array_like of int, shape (R,), optional
            Row groups to use instead of searching them.
        """
        coords = Coordinates.of_dense(w, mask)
        return cls._from_coordinates(coords, block_shape=block_shape, row_perm=row_perm)

    @classmethod
    def from_scores(
        cls,
        scores: Any,
        density: float,
        *,
        block_shape: tuple[int, int] = BLOCK_SHAPE,
        row_perm: Any = None,
        row_groups: int | None = None,
        aligned: bool = False,
        norm: float = 1.0,
        values: Any = None,
        method: str = "paper",
        metric: str = "jaccard",
        linkage: str = "average",
        min_overlap: float = 0.2,
    ) -> ShuffledBlock:
        """Choose row groups and blocks by the shuffled blocking procedure (DSB, section 4).

        The best round(density * R * C) scores make a mask, its rows are ordered by likeness and
        cut into groups of S1; in each group columns are sorted by score and cut into chunks of S2,
        and the globally best ceil(budget / (S1 * S2)) chunks win. Where S1 or S2 does not divide
        the matrix, chunks win until they hold the budget.

        Parameters
        ----------
        scores : array_like, shape (R, C) or (C_out, C_in, Kh, Kw)
        density : float
        block_shape : tuple of int
            (S1, S2).
        row_perm : array_like of int, shape (R,), optional
            Row groups to use instead of searching them.
        row_groups : int, optional
            In how many groups the rows are cut, of at least 8 rows each: S1 follows. Columns then
            rank by how many weights of the mask they hold, ties by their scores. With
            ``block_shape=(1, 1), min_overlap=0`` this is vanilla regrouping, one dense block per
            group (HRBP, section 3.2).
        aligned : bool
            True shuffles nothing: blocks lie on the grid of S1 x S2, and the best of the grid win
            (the paper's baseline DNSB).
        norm : float
            Of aligned blocks: their score is the p-norm of their scores for this p, at least 1,
            ``math.inf`` for the largest (Advances in sparse training, appendix E.1). At 1 it is the
            sum, where negative scores speak against a block; else magnitudes count.
        values : array_like of the same shape, optional
            Dense array to take the values from; zeros by default.
        method, metric, linkage, min_overlap
            How rows are ordered, see `spfmt.structure.rows.order_rows`; `row_perm` replaces them.
        """
        matrix, shape, budget = scores_budget(scores, density)
        block = _block(block_shape, row_groups, matrix.shape[0])
        how = {"method": method, "metric": metric, "linkage": linkage, "min_overlap": min_overlap}
        perm, dtype = _check_order(row_perm, aligned, matrix.shape[0]), matrix.dtype
        if perm is None or row_groups is not None:
            mask = topk_mask(matrix, budget)
            perm = _order(mask, block, how) if perm is None else perm
            matrix = matrix if row_groups is None else _counted(mask, matrix)
        if not aligned:
            pointer, columns = _best_blocks(matrix, perm, block, budget)
        else:
            norms = _grid_norms(matrix, block, _check_norm(norm))
            pointer, columns = _best_of_grid(norms, matrix.shape, block, budget)
        return cls._blocks(shape, block, perm, pointer, columns, dtype, values)

    @classmethod
    def from_magnitudes(
        cls, weights: Any, density: float | None = None, **params: Any
    ) -> ShuffledBlock:
        """Keep the blocks of largest magnitude; see `SparseTensor.from_magnitudes`."""
        known = {"aligned": True, "norm": np.inf, "block_shape": BLOCK_SHAPE}
        fused = all(params.get(name) == known[name] for name in ("aligned", "norm"))
        single = getattr(weights, "dtype", None) == np.float32
        if not (fused and single and params.keys() <= known.keys()):
            return super().from_magnitudes(weights, density, **params)
        shape = check_shape(weights.shape)
        rows, cols = matrix_shape(shape)
        block = as_pair("block_shape", params.get("block_shape", BLOCK_SHAPE), *_NAMES)
        norms = np.empty((-(-rows // block[0]), -(-cols // block[1])), np.float32)
        matrix = np.ascontiguousarray(plain_array("weights", weights)).reshape(rows, cols)
        _selection.grid_magnitudes(matrix, *block, norms)
        if np.isnan(norms).any():  # to say where
            return super().from_magnitudes(weights, density, **params)
        budget = round(as_density(density) * (rows * cols))
        found = _best_of_grid(norms, (rows, cols), block, budget)
        return cls._blocks(shape, block, np.arange(rows, dtype=np.int32), *found, np.float32)

    @classmethod
    def from_weights(
        cls,
        shape: Sequence[int],
        positions: Any,
        magnitudes: Any,
        density: float,
        *,
        block_shape: tuple[int, int] = BLOCK_SHAPE,
        row_perm: Any = None,
        row_groups: int | None = None,
        aligned: bool = False,
        **how: Any,
    ) -> ShuffledBlock:
        """Shuffle sparse weights into blocks: `from_scores` without an array of R x C scores.

        All the weights given make the mask by which rows are ordered (DSB, section 4), also where
        they are more than the density asks for. Values are zero.

        Parameters
        ----------
        shape : sequence of int
            (R, C) or (C_out, C_in, Kh, Kw).
        positions : ndarray of int64, shape (n,)
            Flat index of every weight, each at most once.
        magnitudes : ndarray of float, shape (n,)
            Not negative.
        density, block_shape, row_perm, row_groups, aligned, **how
            As for `from_scores`, but that columns rank by their weights; `how` are method, metric,
            linkage and min_overlap.

        Raises
        ------
        FormatError
            As `from_scores`, and for positions that are no whole numbers in 0..R*C-1 or not as
            many as magnitudes.
        """
        shape = check_shape(shape)
        rows, cols = matrix_shape(shape)
        block = _block(block_shape, row_groups, rows)
        positions, weights = _check_weights(positions, magnitudes, rows * cols)
        budget = round(as_density(density) * (rows * cols))
        perm = _check_order(row_perm, aligned, rows)
        if perm is None:
            mask = np.zeros(rows * cols, np.bool_)
            mask[positions] = True
            perm = _order(mask.reshape(rows, cols), block, how)
        group = np.empty(rows, np.int64)
        group[perm] = np.arange(rows) // block[0]
        groups = -(-rows // block[0])
        keys = positions // max(1, cols)  # in place from here: fresh memory costs more than sums
        np.take((group - np.arange(rows)) * cols, keys, out=keys, mode="clip")
        keys += positions
        sums = np.bincount(keys, weights, groups * cols).reshape(groups, cols)
        if aligned:
            norms = _over_columns(np.add, sums, block[1])
            found = _best_of_grid(norms, (rows, cols), block, budget)
        else:
            found = _best_of_groups(sums, rows, block, budget)
        return cls._blocks(shape, block, perm, *found, np.dtype(np.float32))

    @classmethod
    def _blocks(
        cls,
        shape: Shape,
        block: tuple[int, int],
        perm: Array,
        pointer: Array,
        columns: Array,
        dtype: Any,
        values: Any = None,
    ) -> ShuffledBlock:
        arrays = {"row_perm": perm, "group_ptr": pointer, "col_indices": columns}
        params = {"block_rows": block[0], "block_cols": block[1]}
        return cls._found(np.empty(0, dtype), shape, arrays, params, values)

    # Rewiring at every step leaves no time to shuffle (Advances in sparse training, App. E.1).
    PARTICIPATING: ClassVar[Mapping[str, Any]] = {"aligned": True, "norm": math.inf}

    SPECS = ("ROWSxCOLS",)

    def label(self) -> str:
        """``shuffled_block 16x16``."""
        return "{} {}x{}".format(self.format, *self.block_shape)

    @classmethod
    def parse_spec(cls, text: str) -> dict[str, Any] | None:
        """Read ``ROWSxCOLS``; 16x16 where nothing is written."""
        match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text or "16x16")
        return None if match is None else {"block_shape": (int(match[1]), int(match[2]))}

    @classmethod
    def random(
        cls, shape: Sequence[int], density: float, rng: np.random.Generator, **params: Any
    ) -> ShuffledBlock:
        """Draw blocks on shuffled rows, which are not searched; see `SparseTensor.random`."""
        scores = rng.random(shape, dtype=np.float32)
        values = rng.standard_normal(shape, dtype=np.float32)
        if not params.get("aligned"):
            params["row_perm"] = rng.permutation(shape[0])
        return cls.from_scores(scores, density, values=values, **params)

    def caption(self) -> str:
        """How many rows a group has."""
        return f"{self.block_shape[0]} rows share each block's columns"

    def _summary(self) -> str:
        block_rows, block_cols = self.block_shape
        return f"block_shape=({block_rows}, {block_cols}), blocks {self.n_blocks}"


def _block(block_shape: Any, row_groups: Any, rows: int) -> tuple[int, int]:
    """(S1, S2), S1 of the number of groups where that is given."""
    block = as_pair("block_shape", block_shape, *_NAMES)
    if row_groups is None:
        return block
    groups = min(as_int("row_groups", row_groups, 1), max(1, rows // 8))
    return max(1, -(-rows // groups)), block[1]


def _counted(mask: Array, scores: Array) -> Array:
    """Scores whose sums over rows rank by how many weights of the mask there are, ties by score."""
    if not scores.size:
        return scores
    plain = bounded(scores).astype(np.float64)
    low, high = plain.min(), plain.max()
    below_half: Array = (plain - low) / (2.0 * (len(plain) + 1) * max(high - low, 1e-30))
    return mask + below_half


def _group_rows(rows: int, block_rows: int) -> Array:
    """Pointer to each group's rows: every S1 places, the last group may be short."""
    starts = np.arange(-(-rows // block_rows) + 1, dtype=np.int64) * block_rows
    return np.minimum(starts, rows)


def _check_order(row_perm: Any, aligned: bool, rows: int) -> Array | None:
    """The order of the rows, None where it is to be found."""
    if not aligned:
        return None if row_perm is None else as_row_perm(row_perm, rows)
    if row_perm is not None:
        raise format_error(
            "row_perm together with aligned=True", "one of them", "leave out row_perm"
        )
    return np.arange(rows, dtype=np.int32)


def _check_weights(positions: Any, magnitudes: Any, size: int) -> tuple[Array, Array]:
    places, weights = plain_array("positions", positions), as_scores(magnitudes, ndim=1)
    if places.dtype.kind not in "iu" or places.shape != weights.shape:
        raise format_error(
            f"positions of shape {places.shape} and {places.dtype}",
            f"integers of shape {weights.shape}, one per magnitude",
            "pass the flat index of every weight",
        )
    check_range("positions", places, size, "positions")
    return places.astype(np.int64, copy=False), bounded(weights)


def _order(mask: Array, block_shape: tuple[int, int], how: Mapping[str, Any]) -> Array:
    from spfmt.structure.rows import order_rows

    return order_rows(mask, group_size=block_shape[0], **how)


def _best_blocks(
    scores: Array, perm: Array, block_shape: tuple[int, int], budget: int
) -> tuple[Array, Array]:
    """Fewest of the best blocks that hold at least `budget` values."""
    from spfmt.structure.blocks import select_blocks

    (rows, cols), scores = scores.shape, bounded(scores)

    def select(count: int) -> tuple[Array, Array]:
        return select_blocks(scores, perm, block_shape, count, signed=True)

    return select(_count(select, (rows, cols), block_shape, budget))


def _best_of_groups(
    sums: Array, rows: int, block_shape: tuple[int, int], budget: int
) -> tuple[Array, Array]:
    """`_best_blocks` of sums over the rows of each group, (G, C)."""
    from spfmt.structure.blocks import select_blocks

    perm = np.arange(len(sums))

    def select(count: int) -> tuple[Array, Array]:
        return select_blocks(sums, perm, (1, block_shape[1]), count, signed=True)

    return select(_count(select, (rows, sums.shape[1]), block_shape, budget))


def _count(
    select: Callable[[int], tuple[Array, Array]],
    shape: tuple[int, int],
    block_shape: tuple[int, int],
    budget: int,
) -> int:
    """How many blocks hold at least `budget` values; short ones hold less."""
    (rows, cols), (block_rows, block_cols) = shape, block_shape
    n_blocks = -(-budget // (block_rows * block_cols))
    if rows % block_rows == 0 and cols % block_cols == 0:
        return n_blocks
    heights = np.diff(_group_rows(rows, block_rows))

    def held(count: int) -> int:
        return int((heights * np.diff(select(count)[0])).sum())

    most = heights.size * -(-cols // block_cols)
    return n_blocks + bisect_left(range(n_blocks, most), budget, key=held)


def _check_norm(norm: float) -> float:
    if not norm >= 1.0:
        raise format_error(f"norm={norm}", "at least 1, or math.inf", "1 sums magnitudes")
    return float(norm)


def _grid_norms(scores: Array, block_shape: tuple[int, int], norm: float) -> Array:
    """Score of every block of the grid, (G, ceil(C / S2))."""
    scores = bounded(scores)
    ufunc: np.ufunc = np.add
    if norm == np.inf:
        ufunc, scores = np.maximum, np.abs(scores)
    elif norm > 1.0:  # of the largest, so that no power overflows; the root changes no order
        scale = max(np.abs(scores).max(initial=0.0), np.finfo(scores.dtype).tiny)
        scores = (np.abs(scores) / scale).astype(np.float64) ** norm
    dtype = scores.dtype if norm == np.inf else np.dtype(np.float64)
    return _over_columns(ufunc, _over_rows(ufunc, scores, dtype, block_shape[0]), block_shape[1])


def _over_rows(ufunc: np.ufunc, scores: Array, dtype: np.dtype[Any], block_rows: int) -> Array:
    """Reduce every `block_rows` consecutive rows, (G, C)."""
    starts = range(0, len(scores), block_rows)
    reduced = [ufunc.reduce(scores[i : i + block_rows], axis=0, dtype=dtype) for i in starts]
    return np.array(reduced, dtype).reshape(len(starts), scores.shape[1])


def _over_columns(ufunc: np.ufunc, scores: Array, block_cols: int) -> Array:
    """Reduce every `block_cols` consecutive columns."""
    left = np.arange(0, scores.shape[1], block_cols)
    return np.asarray(ufunc.reduceat(scores, left, axis=1) if scores.size else scores)


def _best_of_grid(
    norms: Array, shape: tuple[int, int], block_shape: tuple[int, int], budget: int
) -> tuple[Array, Array]:
    """Fewest of the best blocks of the grid that hold at least `budget` values."""
    (rows, cols), (block_rows, block_cols) = shape, block_shape
    if not norms.size:
        return np.zeros(len(norms) + 1, np.int64), np.empty(0, np.int32)
    if rows % block_rows == 0 and cols % block_cols == 0:
        kept = topk_mask(norms, -(-budget // (block_rows * block_cols)))
        columns = np.flatnonzero(kept)[:, None] % norms.shape[1] * block_cols
        pointer = np.append(0, np.cumsum(kept.sum(axis=1) * block_cols))
        return pointer, (columns + np.arange(block_cols)).astype(np.int32).reshape(-1)
    left = np.arange(0, cols, block_cols)
    heights, widths = np.diff(_group_rows(rows, block_rows)), np.diff(left, append=cols)
    best = np.argsort(-norms, axis=None, kind="stable")
    held = np.cumsum(np.outer(heights, widths).reshape(-1)[best])
    kept = np.zeros(norms.shape, np.bool_)
    kept.reshape(-1)[best[: np.searchsorted(held, budget) + 1 if budget else 0]] = True
    taken = np.repeat(kept, widths, axis=1)  # (G, C)
    pointer = np.append(0, np.cumsum(taken.sum(axis=1)))
    return pointer, np.nonzero(taken)[1]


def _rows_by_support(coords: Coordinates, block_rows: int) -> Array:
    """Permutation whose groups are rows with equal columns first, then like rows."""
    label = group_by_support(coords)
    order = np.argsort(label, kind="stable")
    sizes = np.bincount(label)
    place = np.arange(order.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    whole = place < np.repeat(sizes // block_rows * block_rows, sizes)
    rest = np.sort(order[~whole])
    if rest.size > block_rows:
        from spfmt.structure.rows import order_rows

        rest = rest[order_rows(coords.support(rest), method="fast", group_size=block_rows)]
    return np.concatenate([order[whole], rest])
