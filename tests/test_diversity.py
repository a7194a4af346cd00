"""Mask diversity: the paper's table, and counts by listing every mask."""

from __future__ import annotations

from itertools import combinations, permutations, product

import numpy as np
import pytest

from spfmt.errors import FormatError
from spfmt.structure.diversity import (
    aligned_block_masks,
    constant_fan_in_masks,
    nm_masks,
    shuffled_block_masks,
    transposable_nm_masks,
    transposable_tiles,
    unstructured_masks,
)


@pytest.mark.parametrize(
    ("size", "block", "want"), [(8, 2, 1.2e18), (8, 4, 3.1e11), (16, 4, 3.7e48), (16, 8, 1.3e29)]
)
def test_table_1_of_dsb(size: int, block: int, want: float) -> None:
    """At 50 %, as the paper prints it."""
    got = shuffled_block_masks((size, size), (block, block), 0.5)
    assert 10 ** (got - np.floor(got)) == pytest.approx(want / 10 ** np.floor(np.log10(want)), 0.05)
    assert np.floor(got) == np.floor(np.log10(want))


def count(log: float) -> int:
    return round(10**log)


def test_structures_are_counted_by_listing_them() -> None:
    masks = [np.reshape(bits, (2, 4)) for bits in product((0, 1), repeat=8)]
    assert count(unstructured_masks((2, 4), 0.5)) == sum(m.sum() == 4 for m in masks)
    rows_of_one = sum((m.sum(1) == 1).all() for m in masks)
    assert count(constant_fan_in_masks((2, 4), 1)) == rows_of_one
    pairs = sum((m.reshape(2, 2, 2).sum(2) == 1).all() for m in masks)
    assert count(nm_masks((2, 4), 1, 2)) == pairs
    assert count(aligned_block_masks((2, 4), (2, 2), 0.5)) == 2


@pytest.mark.parametrize(("n", "m"), [(0, 3), (1, 3), (2, 3), (3, 3), (1, 4), (2, 4), (1, 5)])
def test_transposable_tiles_are_counted_by_listing_them(n: int, m: int) -> None:
    rows = [np.isin(range(m), kept) for kept in combinations(range(m), n)]
    found = sum((np.sum(tile, 0) == n).all() for tile in product(rows, repeat=m))
    assert transposable_tiles(n, m) == found
    assert transposable_nm_masks((m, m), n, m) >= np.log10(found) - 1e-9
    assert transposable_nm_masks((2 * m, 3 * m), n, m) == pytest.approx(
        6 * transposable_nm_masks((m, m), n, m)
    )


def test_known_numbers_of_tiles() -> None:
    assert transposable_tiles(2, 4) == 90
    assert transposable_tiles(4, 8) == 116_963_796_250


def test_the_tight_bound_holds_for_all_masks_of_a_small_layer() -> None:
    """Shuffled blocks of 2 x 1 in 4 x 3: every pair of rows, every choice of columns."""
    seen = set()
    for perm in permutations(range(4)):
        for kept in combinations(range(6), 3):  # three of the columns of two groups
            mask = np.zeros((4, 3), int)
            for k in kept:
                mask[list(perm[2 * (k // 3) : 2 * (k // 3) + 2]), k % 3] = 1
            seen.add(mask.tobytes())
    tight = shuffled_block_masks((4, 3), (2, 1), 0.5, tight=True)
    assert np.log10(len(seen)) <= tight + 1e-9
    assert tight <= shuffled_block_masks((4, 3), (2, 1), 0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: unstructured_masks((4,), 0.5),
        lambda: unstructured_masks((4, 4), 1.5),
        lambda: constant_fan_in_masks((4, 4), 5),
        lambda: nm_masks((4, 6), 2, 4),
        lambda: nm_masks((4, 8), 5, 4),
        lambda: transposable_nm_masks((6, 8), 2, 4),
        lambda: transposable_tiles(2, 9),
        lambda: shuffled_block_masks((6, 8), (4, 4), 0.5),
        lambda: aligned_block_masks((4, 8), (4, 3), 0.5),
    ],
)
def test_bad_input(call) -> None:
    with pytest.raises(FormatError, match="expected"):
        call()
