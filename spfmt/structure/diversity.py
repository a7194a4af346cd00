"""How many masks a structure allows: DSB's mask diversity (NeurIPS 2022, Table 1 and eq. 2).

The more masks, the closer one comes to what unstructured sparsity would keep. Numbers are decimal
logarithms: those of real layers have millions of digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from ..errors import format_error
from ._checks import as_density, as_int, as_pair

__all__ = [
    "aligned_block_masks",
    "constant_fan_in_masks",
    "nm_masks",
    "shuffled_block_masks",
    "transposable_nm_masks",
    "transposable_tiles",
    "unstructured_masks",
]


def unstructured_masks(shape: Sequence[int], density: float) -> float:
    """log10 of C(RC, N), the masks of N = round(density R C) positions.

    Parameters
    ----------
    shape : (int, int)
        R rows, C columns.
    density : float
        In [0, 1].

    Examples
    --------
    >>> round(10 ** unstructured_masks((2, 2), 0.5))
    6
    """
    rows, cols = as_pair("shape", shape, ("rows", "columns"))
    return _log_binomial(rows * cols, round(as_density(density) * rows * cols))


def constant_fan_in_masks(shape: Sequence[int], fan_in: int) -> float:
    """log10 of C(C, k)^R, the masks of k positions in every row.

    Parameters
    ----------
    shape : (int, int)
    fan_in : int
        0 <= k <= C.
    """
    rows, cols = as_pair("shape", shape, ("rows", "columns"))
    return rows * _log_binomial(cols, as_int("fan_in", fan_in, 0, cols))


def nm_masks(shape: Sequence[int], n: int, m: int) -> float:
    """log10 of C(M, N)^(RC/M), the masks of N in every M neighbours of a row (DSB, Table 1).

    Parameters
    ----------
    shape : (int, int)
        C a multiple of M.
    n, m : int
        0 <= N <= M.
    """
    rows, cols = as_pair("shape", shape, ("rows", "columns"))
    n, m = _n_of_m(n, m)
    return rows * _parts("columns", cols, m) * _log_binomial(m, n)


def transposable_nm_masks(shape: Sequence[int], n: int, m: int) -> float:
    """log10 of (M! (M-1)! ... (M-N+1)!)^(RC/M²), DSB's upper bound of transposable N:M masks.

    `transposable_tiles` counts those of one tile.

    Parameters
    ----------
    shape : (int, int)
        R and C multiples of M.
    n, m : int
        0 <= N <= M.
    """
    rows, cols = as_pair("shape", shape, ("rows", "columns"))
    n, m = _n_of_m(n, m)
    tiles = _parts("rows", rows, m) * _parts("columns", cols, m)
    return tiles * sum(_log_factorial(m - i) for i in range(n))


def transposable_tiles(n: int, m: int) -> int:
    """Count the M x M tiles with N positions in every row and every column, exactly.

    Parameters
    ----------
    n, m : int
        0 <= N <= M <= 8.

    Examples
    --------
    >>> transposable_tiles(2, 4), transposable_tiles(4, 8)
    (90, 116963796250)
    """
    n, m = _n_of_m(n, m)
    as_int("m", m, 1, 8)

    # Columns with the same number of free places are alike: one choice of N stands for many.
    @cache
    def fill(free: tuple[int, ...], rows: int) -> int:
        if rows == 0:
            return 1
        return sum(ways * fill(left, rows - 1) for left, ways in _takes(free, n))

    return fill((0,) * n + (m,), m)


def _takes(free: tuple[int, ...], n: int) -> list[tuple[tuple[int, ...], int]]:
    """Take one place from each of n columns; free[k] columns have k places left."""
    found = [((0,) * len(free), 1, n)]
    for k, count in enumerate(free):
        found = [
            (_moved(left, k, count, taken), ways * math.comb(count, taken), rest - taken)
            for left, ways, rest in found
            for taken in range(min(count, rest) + 1 if k else 1)
        ]
    return [(left, ways) for left, ways, rest in found if rest == 0]


def _moved(left: tuple[int, ...], k: int, count: int, taken: int) -> tuple[int, ...]:
    moved = list(left)
    moved[k] += count - taken
    if taken:
        moved[k - 1] += taken
    return tuple(moved)


def aligned_block_masks(shape: Sequence[int], block_shape: Sequence[int], density: float) -> float:
    """log10 of the masks of blocks on a grid, C(RC/(S1 S2), blocks).

    Parameters
    ----------
    shape, block_shape : (int, int)
        R a multiple of S1, C of S2.
    density : float
        Of the blocks, in [0, 1].
    """
    rows, cols = as_pair("shape", shape, ("rows", "columns"))
    block_rows, block_cols = as_pair("block_shape", block_shape, ("S1", "S2"))
    grid = _parts("rows", rows, block_rows) * _parts("columns", cols, block_cols)
    return _log_binomial(grid, round(as_density(density) * grid))


def shuffled_block_masks(
    shape: Sequence[int], block_shape: Sequence[int], density: float, *, tight: bool = False
) -> float:
    """log10 of the masks of shuffled blocks (DSB, eq. 2).

    The paper's R!/(S1!)^(R/S1) · C(RC, RC(1-s)/S2) counts groups of rows as if they had an order,
    and offers every group the columns of all. `tight` divides by (R/S1)! and chooses among RC/S1
    columns of groups, RC(1-s)/S1 of them: a smaller upper bound.

    Parameters
    ----------
    shape, block_shape : (int, int)
        R a multiple of S1.
    density : float
        1 - s, in [0, 1].
    tight : bool

    Examples
    --------
    >>> [f"{10 ** shuffled_block_masks((8, 8), (s, s), 0.5):.1e}" for s in (2, 4)]
    ['1.2e+18', '3.1e+11']
    """
    rows, cols = as_pair("shape", shape, ("rows", "columns"))
    block_rows, block_cols = as_pair("block_shape", block_shape, ("S1", "S2"))
    groups = _parts("rows", rows, block_rows)
    weights = as_density(density) * rows * cols
    partitions = _log_factorial(rows) - groups * _log_factorial(block_rows)
    if not tight:
        return partitions + _log_binomial(rows * cols, round(weights / block_cols))
    columns = _log_binomial(groups * cols, round(weights / block_rows))
    return partitions - _log_factorial(groups) + columns


def _n_of_m(n: int, m: int) -> tuple[int, int]:
    m = as_int("m", m, 1)
    return as_int("n", n, 0, m), m


def _parts(name: str, size: int, part: int) -> int:
    if size % part:
        raise format_error(f"{size} {name}", f"a multiple of {part}", "count a shape that divides")
    return size // part


def _log_factorial(n: int) -> float:
    return math.lgamma(n + 1) / math.log(10)


def _log_binomial(n: int, k: int) -> float:
    if k > n:
        raise format_error(f"{k} of {n}", "no more than there are", "lower the density")
    return _log_factorial(n) - _log_factorial(k) - _log_factorial(n - k)
