"""`NM`: n of every m consecutive columns, optionally transposable."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spfmt.errors import FormatError, format_error
from spfmt.formats._base import SparseTensor, scores_budget
from spfmt.formats._checks import Array, Shape, check_ascending, kernel_cells
from spfmt.formats._coords import Coordinates, fill_short_lists
from spfmt.formats._layout import Lists
from spfmt.formats._registry import register
from spfmt.formats._structure import Structure
from spfmt.structure._checks import as_int, check_range

__all__ = ["NM"]


@register
class NM(SparseTensor):
    """Every group of `m` columns holds exactly `n` values in every row.

    Groups run along the columns of a matrix, and along the input channels at a fixed cell
    (kh, kw) of a convolution (HRBP Appendix H, Advances E.2). A short last group of length L
    holds min(n, L). ``m >= C`` makes one group: constant fan-in.

    Parameters
    ----------
    shape : tuple of int
        (R, C) or (C_out, C_in, Kh, Kw).
    n, m : int
        0 <= n <= m, m >= 1.
    col_indices : array_like of int, shape (R, K)
        Columns of the matrix, strictly ascending in a row; K follows from n, m and the shape.
    values : array_like of float, shape (R, K)
    transposable : int
        1 promises that the columns of every full m x m tile hold exactly n values as well.

    Raises
    ------
    FormatError
        Names the first row and group with a wrong count, or the first bad index.
    """

    __slots__ = ()
    format = "nm"
    STRUCTURE = ("col_indices",)
    NDIMS = (2,)
    PARAMS = ("n", "m", "transposable")

    def __init__(
        self, shape: Any, n: int, m: int, col_indices: Any, values: Any, transposable: int = 0
    ) -> None:
        params = {"n": n, "m": m, "transposable": transposable}
        self._init(shape, {"col_indices": col_indices}, params, values)

    @property
    def n(self) -> int:
        """Values per group."""
        return self._structure.params["n"]

    @property
    def m(self) -> int:
        """Columns per group."""
        return self._structure.params["m"]

    @property
    def transposable(self) -> bool:
        """Whether full m x m tiles hold n values per column as well."""
        return bool(self._structure.params["transposable"])

    @property
    def col_indices(self) -> Array:
        """int32 (R, K): columns of each row."""
        return self._structure["col_indices"]

    @classmethod
    def _check(cls, s: Structure) -> None:
        rows, cols = s.matrix_shape
        n, m = _check_nm(s.params)
        per_group = _quotas(cols // max(1, s.cells), n, m)
        expected = (rows, int(per_group.sum()) * s.cells)
        columns = s["col_indices"]
        if columns.shape != expected:
            raise format_error(
                f"col_indices of shape {columns.shape}",
                f"shape {expected} for {n}:{m} on {s.shape}",
                f"keep exactly {n} of every {m} columns in every row",
            )
        check_range("col_indices", columns, cols, "columns")
        check_ascending("col_indices", columns, "row")
        _check_counts(columns, per_group, s.cells, n, m)
        if s.params["transposable"]:
            _check_tiles(columns, s.matrix_shape, s.cells, n, m)

    @classmethod
    def _values_shape(cls, s: Structure) -> Shape:
        return s["col_indices"].shape

    @classmethod
    def _lower(cls, s: Structure) -> Lists:
        rows, cols = s.matrix_shape
        indptr = np.arange(rows + 1, dtype=np.int64) * s["col_indices"].shape[1]
        return Lists(rows, cols, indptr, s["col_indices"].reshape(-1))

    @classmethod
    def _most_words(cls, shape: Shape, nnz: int, params: Mapping[str, int]) -> int:
        return nnz

    @classmethod
    def _from_coordinates(
        cls, coords: Coordinates, *, m: Any = 32, n: Any = None, transposable: Any = 0
    ) -> NM:
        cells = kernel_cells(coords.shape)
        m = as_int("m", m, 1)
        length = coords.matrix_shape[1] // max(1, cells)
        channel, cell = np.divmod(coords.cols, max(1, cells))
        groups = _quotas(length, 1, m).size
        lists = (coords.rows * groups + channel // m) * cells + cell
        counts = np.bincount(lists, minlength=coords.matrix_shape[0] * groups * cells)
        most = int(counts.max(initial=0))
        n = most if n is None else as_int("n", n, 0, m)
        if most > n:
            raise _too_full(counts, groups, cells, n, m)
        params = {"n": n, "m": m, "transposable": as_int("transposable", transposable, 0, 1)}
        if transposable:
            columns = _complete_tiles(coords, cells, n, m)
        else:
            quotas = np.tile(np.repeat(_quotas(length, n, m), cells), coords.matrix_shape[0])
            added, position = fill_short_lists(lists, channel % m, quotas)
            row, group = np.divmod(added // max(1, cells), max(1, groups))
            extra = (group * m + position) * cells + added % max(1, cells)
            keys = coords.merged_keys(row, extra)
            columns = keys % max(1, coords.matrix_shape[1])
        per_row = int(_quotas(length, n, m).sum()) * cells
        columns = columns.reshape(coords.matrix_shape[0], per_row)
        return cls._fill(coords, {"col_indices": columns}, params)

    @classmethod
    def from_dense(
        cls,
        w: Any,
        mask: Any = None,
        *,
        m: int = 32,
        n: int | None = None,
        transposable: int = 0,
    ) -> NM:
        """Keep the nonzeros of `w`, or the positions of `mask`.

        Groups with fewer than `n` get stored zeros at their smallest free columns (for a
        transposable pattern: where a legal tile has room).

        Parameters
        ----------
        w : array_like of float, shape (R, C) or (C_out, C_in, Kh, Kw)
            A NaN is a nonzero.
        mask : array_like of bool, same shape, optional
        m : int
            Columns per group.
        n : int, optional
            Values per group; the fullest group's count by default.
        transposable : int
            1 asks for n values per column of every full m x m tile as well.

        Raises
        ------
        FormatError
            Names the first row and group with more than `n` nonzeros.
        """
        coords = Coordinates.of_dense(w, mask)
        return cls._from_coordinates(coords, m=m, n=n, transposable=transposable)

    @classmethod
    def from_scores(
        cls,
        scores: Any,
        density: float | None = None,
        *,
        m: int = 32,
        n: int | None = None,
        transposable: int = 0,
        values: Any = None,
    ) -> NM:
        """Keep the n largest scores of every group (exact optimum, ties to the lowest index).

        Parameters
        ----------
        scores : array_like, shape (R, C) or (C_out, C_in, Kh, Kw)
        density : float, optional
            Picks the `n` whose number of values is nearest to round(density * R * C), at least 1
            unless that is 0. Needed unless `n` is given; must agree with `n` within one per group.
        m, n, transposable : int
            As in `from_dense`. Transposable tiles keep the most score over rows and columns
            together (Advances in sparse training, "2:4 2D").
        values : array_like of the same shape, optional
            Dense array to take the values from; zeros by default.
        """
        return cls._best(scores, density, m, n, transposable, True, values)

    @classmethod
    def from_magnitudes(  # type: ignore[override]
        cls,
        weights: Any,
        density: float | None = None,
        *,
        m: int = 32,
        n: int | None = None,
        transposable: int = 0,
    ) -> NM:
        """Keep the largest magnitudes of every group; see `SparseTensor.from_magnitudes`."""
        return cls._best(weights, density, m, n, transposable, False, None)

    @classmethod
    def _best(
        cls,
        scores: Any,
        density: float | None,
        m: int,
        n: int | None,
        transposable: int,
        signed: bool,
        values: Any,
    ) -> NM:
        from spfmt.structure.nm import columns_of_groups, transposable_nm_columns

        matrix, shape, budget = scores_budget(scores, 0.0 if density is None else density)
        cells = kernel_cells(shape)
        m = as_int("m", m, 1)
        density = None if density is None else float(density)
        n = _choose_n(shape, density, n, m, budget)
        params = {"n": n, "m": m, "transposable": as_int("transposable", transposable, 0, 1)}
        if transposable:
            ranked = matrix if signed else np.abs(matrix)
            columns = transposable_nm_columns(ranked, n, m, max(1, cells))
        else:
            columns = columns_of_groups(matrix, n, m, max(1, cells), signed)
        return cls._found(matrix, shape, {"col_indices": columns}, params, values)

    SPECS = ("M", "N:M with N <= M")

    def label(self) -> str:
        """``nm 3:32``."""
        return f"{self.format} {self.n}:{self.m}"

    @classmethod
    def parse_spec(cls, text: str) -> dict[str, Any] | None:
        """Read ``M`` or ``N:M``; 32 columns a group where nothing is written."""
        if not text:
            return {"m": 32}
        match = re.fullmatch(r"(?:([1-9]\d{0,3}):)?([1-9]\d{0,3})", text)
        if match is None or int(match[1] or 0) > int(match[2]):
            return None
        return {"n": int(match[1]), "m": int(match[2])} if match[1] else {"m": int(match[2])}

    @classmethod
    def random(
        cls, shape: Sequence[int], density: float, rng: np.random.Generator, **params: Any
    ) -> NM:
        """Draw n of every m, n by the density unless it is given; see `SparseTensor.random`."""
        scores = rng.random(shape, dtype=np.float32)
        found = cls.from_scores(scores, None if "n" in params else density, **params)
        return found.with_values(rng.standard_normal(found.values.shape, dtype=np.float32))

    def caption(self) -> str:
        """What every group holds."""
        return f"{self.n} in each {self.m} columns of a row"

    def remark(self) -> str:
        """Rows and input channels behind the last whole tile, which are n:m along rows alone."""
        channels = self.matrix_shape[1] // max(1, kernel_cells(self.shape))
        rest = self.matrix_shape[0] % self.m, channels % self.m
        if not self.transposable or not any(rest):
            return ""
        return f"the last {rest[0]} rows and {rest[1]} columns are not transposable"

    def _summary(self) -> str:
        kind = "transposable " if self.transposable else ""
        return f"{kind}{self.n}:{self.m}"


def _quotas(length: int, n: int, m: int) -> Array:
    """Values of each group of `length` columns (channels): n, and min(n, L) of a short last one."""
    groups = -(-length // m)
    quotas = np.full(groups, n, np.int64)
    if groups and length % m:
        quotas[-1] = min(n, length % m)
    return quotas


def _check_nm(params: Mapping[str, int]) -> tuple[int, int]:
    m = as_int("m", params["m"], 1)
    as_int("transposable", params["transposable"], 0, 1)
    return as_int("n", params["n"], 0, m), m


def _check_counts(columns: Array, per_group: Array, cells: int, n: int, m: int) -> None:
    """Every slot must lie in its group, and every cell of a group must fill its quota."""
    if not columns.size:
        return
    groups = per_group.size
    channel, cell = np.divmod(columns, cells) if cells > 1 else (columns, 0)
    expected = np.repeat(np.arange(groups), per_group * cells)
    good = bool((channel // m == expected).all())
    if good and cells == 1:
        return
    row = np.arange(columns.shape[0], dtype=np.int64)[:, None]
    lists = ((row * groups + channel // m) * cells + cell).reshape(-1)
    counts = np.bincount(lists, minlength=columns.shape[0] * groups * cells)
    wrong = counts.reshape(-1, groups, cells) != per_group[:, None]
    if wrong.any():
        first = np.unravel_index(int(np.flatnonzero(wrong)[0]), wrong.shape)
        raise _wrong_group(tuple(map(int, first)), int(counts.reshape(wrong.shape)[first]), n, m)


def _wrong_group(place: tuple[int, ...], count: int, n: int, m: int) -> FormatError:
    row, group, cell = place
    where = f"row {row}, group {group} (input {group * m} on), kernel cell {cell}"
    return format_error(
        f"{count} values in {where}",
        f"exactly {n} in every group of {m} (fewer only where the last group is shorter)",
        "make the pattern with NM.project(scores, density)",
    )


def _too_full(counts: Array, groups: int, cells: int, n: int, m: int) -> FormatError:
    """The error of the first group with more than n nonzeros."""
    first = int(np.flatnonzero(counts > n)[0])
    row, rest = divmod(first, groups * cells)
    group, cell = divmod(rest, cells)
    where = f"row {row}, group {group} (input {group * m} on)"
    where += f", kernel cell {cell}" if cells > 1 else ""
    return format_error(
        f"{where}, with {int(counts[first])} nonzeros",
        f"at most n={n} in every group of m={m}",
        f"raise n to {int(counts.max())}, or prune with NM.project(scores, density, n={n}, m={m})",
    )


def _check_tiles(columns: Array, shape: tuple[int, int], cells: int, n: int, m: int) -> None:
    """Columns of every full m x m tile must hold n values; rows do so already."""
    from spfmt.structure.nm import column_counts

    full_cols = shape[1] // cells // m * m * cells if cells else 0
    counts = column_counts(columns, shape[1], m)[:, :full_cols]
    wrong = counts != n
    if wrong.any():
        tile, col = np.unravel_index(int(np.flatnonzero(wrong)[0]), wrong.shape)
        count = int(counts[tile, col])
        first = int(tile) * m
        raise format_error(
            f"{count} values in column {int(col)} of rows {first} to {first + m - 1}",
            f"exactly {n} per column of a transposable {m} x {m} tile",
            "make the pattern with NM.project(scores, density, transposable=1)",
        )


def _choose_n(shape: Shape, density: float | None, n: Any, m: int, budget: int) -> int:
    """The n given, or the one whose number of values is nearest to the budget."""
    length = shape[1]
    # A group wider than the matrix is cut off at its end.
    most = min(m, max(1, length))
    if n is not None:
        n = as_int("n", n, 0, m)
        if density is not None and abs(density * most - min(n, most)) >= 1:
            raise format_error(
                f"n={n}, m={m} with density {density}",
                "a density within one value per group of n / m",
                "pass only one of them",
            )
        return int(n)
    if density is None:
        raise format_error("neither density nor n", "one of them", "pass density=0.1, for example")
    full, rest = divmod(length, m)
    choices = np.arange(most + 1)
    kept = full * choices + np.minimum(choices, rest)
    # A layer that should keep something must not vanish because its groups are small.
    lowest = 1 if budget else 0
    lists = shape[0] * max(1, kernel_cells(shape))
    return lowest + int(np.argmin(np.abs(kept[lowest:] * lists - budget)))


def _complete_tiles(coords: Coordinates, cells: int, n: int, m: int) -> Array:
    """Columns of a transposable pattern that covers `coords`."""
    from spfmt.structure.nm import transposable_nm_columns

    wanted = coords.support(np.arange(coords.matrix_shape[0]))
    columns = transposable_nm_columns(wanted.astype(np.float32), n, m, max(1, cells))
    covered = np.zeros_like(wanted)
    covered[np.arange(wanted.shape[0])[:, None], columns] = True
    lost = np.flatnonzero(wanted & ~covered)
    if lost.size:
        row, col = divmod(int(lost[0]), wanted.shape[1])
        raise format_error(
            f"a pattern whose tile around row {row}, column {col} has no transposable completion",
            f"at most {n} values per row and column of every {m} x {m} tile",
            "drop transposable, or prune with NM.project(scores, density, transposable=1)",
        )
    return columns
