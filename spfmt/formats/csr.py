"""`CSR`: unstructured weights, as pruned models and as RigL and SET leave them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from spfmt.formats._base import SparseTensor, scores_budget
from spfmt.formats._checks import Array, Shape, check_pointer, matrix_shape, unsorted
from spfmt.formats._coords import Coordinates
from spfmt.formats._layout import Lists
from spfmt.formats._registry import register
from spfmt.formats._structure import Structure
from spfmt.structure._checks import check_range

__all__ = ["CSR"]


@register
class CSR(SparseTensor):
    """Any pattern, row after row.

    Parameters
    ----------
    shape : tuple of int
        (R, C) or (C_out, C_in, Kh, Kw).
    indptr : array_like of int, shape (R + 1,)
        Row r owns the places ``indptr[r]:indptr[r+1]``.
    col_indices : array_like of int, shape (nnz,)
        Columns, strictly ascending in a row.
    values : array_like of float, shape (nnz,)

    Raises
    ------
    FormatError
        Names the first row whose columns are out of range, unsorted or duplicate.
    """

    __slots__ = ()
    format = "csr"
    STRUCTURE = ("indptr", "col_indices")
    NDIMS = (1, 1)
    POINTERS = ("indptr",)

    def __init__(self, shape: Any, indptr: Any, col_indices: Any, values: Any) -> None:
        self._init(shape, {"indptr": indptr, "col_indices": col_indices}, {}, values)

    @property
    def indptr(self) -> Array:
        """int64 (R + 1,): where each row starts."""
        return self._structure["indptr"]

    @property
    def col_indices(self) -> Array:
        """int32 (nnz,): columns, row after row."""
        return self._structure["col_indices"]

    @classmethod
    def _check(cls, s: Structure) -> None:
        rows, cols = s.matrix_shape
        indptr, columns = s["indptr"], s["col_indices"]
        check_pointer("indptr", indptr, rows, columns.size)
        check_range("col_indices", columns, cols, "columns")
        bad = columns[1:] <= columns[:-1]
        starts = indptr[1:-1]
        bad[starts[(starts > 0) & (starts < columns.size)] - 1] = False
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            row = int(np.searchsorted(indptr, first, side="right")) - 1
            raise unsorted(
                "col_indices", int(columns[first]), int(columns[first + 1]), f" in row {row}"
            )

    @classmethod
    def _values_shape(cls, s: Structure) -> Shape:
        return (s["col_indices"].size,)

    @classmethod
    def _lower(cls, s: Structure) -> Lists:
        return Lists(*s.matrix_shape, s["indptr"], s["col_indices"])

    @classmethod
    def _most_words(cls, shape: Shape, nnz: int, params: Mapping[str, int]) -> int:
        return matrix_shape(shape)[0] + nnz

    @classmethod
    def _from_coordinates(cls, coords: Coordinates) -> CSR:
        rows = coords.matrix_shape[0]
        indptr = np.searchsorted(coords.rows, np.arange(rows + 1)).astype(np.int64)
        arrays = {"indptr": indptr, "col_indices": coords.cols}
        return cls._from_parts(coords.shape, arrays, {}, coords.values, copy=False)

    @classmethod
    def from_dense(cls, w: Any, mask: Any = None) -> CSR:
        """Keep the nonzeros of `w`, or the positions of `mask`.

        Parameters
        ----------
        w : array_like of float, shape (R, C) or (C_out, C_in, Kh, Kw)
            A NaN is a nonzero.
        mask : array_like of bool, same shape, optional
        """
        return cls._from_coordinates(Coordinates.of_dense(w, mask))

    @classmethod
    def from_scores(cls, scores: Any, density: float, *, values: Any = None) -> CSR:
        """Keep the round(density * R * C) largest scores; ties go to the lowest flat index.

        Parameters
        ----------
        scores : array_like, shape (R, C) or (C_out, C_in, Kh, Kw)
        density : float
        values : array_like of the same shape, optional
            Dense array to take the values from; zeros by default.
        """
        return cls._largest(scores, density, True, values)

    @classmethod
    def from_magnitudes(cls, weights: Any, density: float) -> CSR:  # type: ignore[override]
        """Keep the weights of largest magnitude; see `SparseTensor.from_magnitudes`."""
        return cls._largest(weights, density, False, None)

    @classmethod
    def _largest(cls, scores: Any, density: float, signed: bool, values: Any) -> CSR:
        from spfmt.structure.unstructured import columns_of_largest

        matrix, shape, budget = scores_budget(scores, density)
        indptr, columns = columns_of_largest(matrix, budget, signed)
        return cls._found(matrix, shape, {"indptr": indptr, "col_indices": columns}, {}, values)

    def caption(self) -> str:
        """Anywhere."""
        return "anywhere in the matrix"

    def _summary(self) -> str:
        return f"nnz={self.nnz}"
