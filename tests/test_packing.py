"""Greedy row grouping against hand-made tables and its own promise."""

from __future__ import annotations

import numpy as np
import pytest

import spfmt
from spfmt import FormatError
from spfmt.structure.packing import group_rows, slice_padding


def test_two_kinds_of_rows_are_told_apart() -> None:
    kinds = np.array([[5, 0], [0, 5]])[np.tile([0, 1], 16)]
    assert slice_padding(kinds) == 2.0
    order = group_rows(kinds)
    assert order.tolist() == [*range(0, 32, 2), *range(1, 32, 2)]
    assert slice_padding(kinds, order) == 1.0


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 100, 3000])
def test_order_is_a_permutation_that_pads_no_more(rows: int) -> None:
    counts = np.random.default_rng(rows).binomial(32, 0.1, (rows, 24))
    order = group_rows(counts)
    assert np.array_equal(np.sort(order), np.arange(rows))
    assert slice_padding(counts, order) <= slice_padding(counts)


def test_constant_fan_in_at_a_real_size() -> None:
    columns = np.random.default_rng(0).random((3072, 768)).argsort(1)[:, :77]
    counts = np.stack([np.bincount(row // 32, minlength=24) for row in columns])
    assert slice_padding(counts) > 1.9
    assert slice_padding(counts, group_rows(counts)) < 1.65


def test_padding_of_plans() -> None:
    """What small batches multiply by zero: nothing in n:m, half as much again if random."""
    scores = np.random.default_rng(1).random((3072, 768))
    assert spfmt.NM.from_scores(scores, n=3, m=32).plan.padding == 1.0
    assert spfmt.NM.from_scores(scores, n=2, m=4).plan.padding == 1.0
    assert spfmt.ShuffledBlock.from_scores(scores, 0.1).plan.padding == 1.0
    assert 1.0 < spfmt.Condensed.from_scores(scores, 0.1).plan.padding < 1.51
    assert 1.0 < spfmt.CSR.from_scores(scores, 0.1).plan.padding < 1.53
    assert spfmt.CSR((5, 7), np.zeros(6, int), [], []).plan.padding == 1.0


@pytest.mark.parametrize(
    "counts", [np.zeros(3, int), np.zeros((2, 2)), np.full((2, 2), 256), np.full((2, 2), -1)]
)
def test_bad_counts(counts: np.ndarray) -> None:
    with pytest.raises(FormatError, match="whole numbers from 0 to 255"):
        group_rows(counts)
    with pytest.raises(FormatError, match="no permutation"):
        slice_padding(np.ones((3, 2), int), [0, 1, 1])
