"""`Condensed`: constant fan-in with ablated rows (SRigL, "condensed" representation)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spfmt.errors import format_error
from spfmt.formats._base import SparseTensor, scores_budget
from spfmt.formats._checks import Array, Shape, check_ascending, matrix_shape
from spfmt.formats._coords import Coordinates, fill_short_lists
from spfmt.formats._layout import Lists
from spfmt.formats._registry import register
from spfmt.formats._structure import Structure
from spfmt.structure._checks import as_density, as_int, check_range, plain_array

__all__ = ["Condensed"]


@register
class Condensed(SparseTensor):
    """Every active row holds exactly `fan_in` values; the other rows are ablated.

    An ablated row yields its bias and nothing else. Which rows are active is part of the
    structure, never read off the values: a trained zero is an ordinary value.

    Parameters
    ----------
    shape : tuple of int
        (R, C) or (C_out, C_in, Kh, Kw).
    row_indices : array_like of int, shape (n_active,)
        Active rows, strictly ascending.
    col_indices : array_like of int, shape (n_active, fan_in)
        Columns, strictly ascending in a row.
    values : array_like of float, shape (n_active, fan_in)

    Raises
    ------
    FormatError
        Names the first row whose columns are out of range, unsorted or duplicate.
    """

    __slots__ = ()
    format = "condensed"
    STRUCTURE = ("row_indices", "col_indices")
    NDIMS = (1, 2)
    PARAMS = ("fan_in",)

    def __init__(self, shape: Any, row_indices: Any, col_indices: Any, values: Any) -> None:
        lists = plain_array("col_indices", col_indices)
        fan_in = lists.shape[1] if lists.ndim == 2 else 0
        arrays = {"row_indices": row_indices, "col_indices": col_indices}
        self._init(shape, arrays, {"fan_in": fan_in}, values)

    @property
    def row_indices(self) -> Array:
        """int32 (n_active,): active rows."""
        return self._structure["row_indices"]

    @property
    def col_indices(self) -> Array:
        """int32 (n_active, fan_in): columns of each active row."""
        return self._structure["col_indices"]

    @property
    def fan_in(self) -> int:
        """Values per active row."""
        return self._structure.params["fan_in"]

    @classmethod
    def _check(cls, s: Structure) -> None:
        rows, cols = s.matrix_shape
        expected = (s["row_indices"].size, s.params["fan_in"])
        if s["col_indices"].shape != expected:
            raise format_error(
                f"col_indices of shape {s['col_indices'].shape}",
                f"shape {expected}: (active rows, fan_in)",
                "give one list of fan_in columns per active row",
            )
        if not expected[0]:  # without a row, no column is out of range
            as_int("fan_in", expected[1], 0, cols)
        check_range("row_indices", s["row_indices"], rows, "rows")
        check_ascending("row_indices", s["row_indices"], "row")
        check_range("col_indices", s["col_indices"], cols, "columns")
        check_ascending("col_indices", s["col_indices"], "active row")

    @classmethod
    def _values_shape(cls, s: Structure) -> Shape:
        return s["col_indices"].shape

    @classmethod
    def _lower(cls, s: Structure) -> Lists:
        rows, cols = s.matrix_shape
        indptr = np.zeros(rows + 1, np.int64)
        indptr[s["row_indices"].astype(np.int64) + 1] = s.params["fan_in"]
        return Lists(rows, cols, np.cumsum(indptr), s["col_indices"].reshape(-1))

    @classmethod
    def _most_words(cls, shape: Shape, nnz: int, params: Mapping[str, int]) -> int:
        return matrix_shape(shape)[0] + nnz

    @classmethod
    def _least_nnz(cls, coords: Coordinates) -> int:
        counts = coords.row_counts
        return counts.size * int(counts.max(initial=0))

    @classmethod
    def _from_coordinates(cls, coords: Coordinates, fan_in: Any = None) -> Condensed:
        rows, cols = coords.matrix_shape
        counts = np.bincount(coords.rows, minlength=rows)
        most = int(counts.max(initial=0))
        k = most if fan_in is None else as_int("fan_in", fan_in, 0, cols)
        if most > k:
            row = int(np.flatnonzero(counts > k)[0])
            raise format_error(
                f"row {row} with {int(counts[row])} nonzeros",
                f"at most fan_in={k} in every row",
                f"raise fan_in to {most}, or prune with {cls.__name__}.project(scores, density)",
            )
        active = np.flatnonzero(counts)
        rank = np.cumsum(counts > 0) - 1
        lists, added = fill_short_lists(rank[coords.rows], coords.cols, np.full(active.size, k))
        keys = coords.merged_keys(active[lists], added)
        columns = (keys % max(1, cols)).reshape(active.size, k)
        return cls._fill(coords, {"row_indices": active, "col_indices": columns}, {"fan_in": k})

    @classmethod
    def from_dense(cls, w: Any, mask: Any = None, *, fan_in: int | None = None) -> Condensed:
        """Keep the nonzeros of `w`, or the positions of `mask`.

        Rows without any are ablated; rows with fewer than `fan_in` get stored zeros at their
        smallest free columns.

        Parameters
        ----------
        w : array_like of float, shape (R, C) or (C_out, C_in, Kh, Kw)
            A NaN is a nonzero.
        mask : array_like of bool, same shape, optional
        fan_in : int, optional
            Values per active row; the fullest row's count by default.

        Raises
        ------
        FormatError
            Names the first row with more than `fan_in` nonzeros.
        """
        return cls._from_coordinates(Coordinates.of_dense(w, mask), fan_in=fan_in)

    @classmethod
    def from_scores(
        cls, scores: Any, density: float, *, fan_in: int | None = None, values: Any = None
    ) -> Condensed:
        """Keep the largest scores of each row, the same number in all rows (exact optimum).

        Parameters
        ----------
        scores : array_like, shape (R, C) or (C_out, C_in, Kh, Kw)
        density : float
            The fan-in is N // R with N = round(density * R * C), at least one unless N is 0.
        fan_in : int, optional
            Sets the fan-in itself; `density` is then only checked to lie in 0..1.
        values : array_like of the same shape, optional
            Dense array to take the values from; zeros by default.

        Notes
        -----
        All rows are active. Which rows to ablate is a training method's decision (SRigL, step 3).
        """
        from spfmt.structure.fan_in import constant_fan_in

        matrix, shape, budget = scores_budget(scores, density)
        if fan_in is not None:
            budget = as_int("fan_in", fan_in, 0, matrix.shape[1]) * matrix.shape[0]
        rows, columns = constant_fan_in(matrix, budget)
        arrays = {"row_indices": rows, "col_indices": columns}
        return cls._found(matrix, shape, arrays, {"fan_in": columns.shape[1]}, values)

    @classmethod
    def random(  # type: ignore[override]  # it refuses other keywords, as from_scores does
        cls,
        shape: Sequence[int],
        density: float,
        rng: np.random.Generator,
        *,
        fan_in: int | None = None,
    ) -> Condensed:
        """Draw a tensor row by row, in memory for its nonzeros only; see `SparseTensor.random`."""
        from spfmt.structure.fan_in import random_columns

        rows, cols = shape[0], math.prod(shape[1:])
        budget = round(as_density(density) * rows * cols)
        if fan_in is None:
            fan_in = max(1, budget // rows) if budget else 0
        columns = random_columns(rng, rows, cols, as_int("fan_in", fan_in, 0, cols))
        values = rng.standard_normal(columns.shape, dtype=np.float32)
        return cls(shape, np.arange(rows), columns, values)

    def caption(self) -> str:
        """How many values a row holds."""
        return f"{self.fan_in} anywhere in each row"

    def _summary(self) -> str:
        active = f"active {self.row_indices.size}/{self.matrix_shape[0]}"
        return f"fan_in={self.fan_in}, {active}"
