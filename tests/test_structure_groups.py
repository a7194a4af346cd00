"""Search of row groups, shuffled blocks and HRBP, by hand and by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster import hierarchy

from spfmt.structure import (
    hrbp_block_density,
    hrbp_structure,
    order_rows,
    rows,
    select_blocks,
    topk_mask,
)
from spfmt.structure.hrbp import _kernel_mask


def mask_of(columns: np.ndarray, cols: int) -> np.ndarray:
    mask = np.zeros((len(columns), cols), bool)
    np.put_along_axis(mask, columns.astype(np.int64), True, axis=1)
    return mask


def planted(rng: np.random.Generator, groups: int, group_size: int, cols: int, width: int):
    """Rows of `groups` groups with `width` own columns each, shuffled; returns mask and labels."""
    label = rng.permutation(np.repeat(np.arange(groups), group_size))
    owned = np.array([rng.choice(cols, width, replace=False) for _ in range(groups)])
    return mask_of(owned[label], cols), label


# ---- row order -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"linkage": "complete"}])
def test_rows_of_the_paper_figure_are_paired(options):
    # DSB, Fig. 4: rows 0 and 2 are alike, and rows 1 and 3.
    mask = np.array([[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 0, 1, 0, 0], [0, 1, 0, 1, 1]])
    order = order_rows(mask, **options)
    assert order.dtype == np.int32
    assert {frozenset(order[:2].tolist()), frozenset(order[2:].tolist())} == {
        frozenset({0, 2}),
        frozenset({1, 3}),
    }


def test_leaf_order_is_the_dendrogram_by_hand():
    # Distances: 0-2 equal rows, 1 shares two of four columns with them, 3 one of five with 1.
    mask = np.array(
        [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    )
    order = order_rows(mask, min_overlap=0.0).tolist()
    assert order in ([3, 1, 0, 2], [3, 0, 2, 1], [1, 0, 2, 3], [0, 2, 1, 3])


def test_rows_without_similar_rows_keep_their_order_at_the_end():
    # Rows 0, 4 share nothing, 3 is empty, 5 shares 1 of its 5 columns: exactly q, not more.
    mask = np.zeros((6, 20), bool)
    mask[0, [0, 1]] = mask[4, [2, 3]] = True
    mask[1, 4:8] = mask[2, 4:8] = True
    mask[5, [7, 10, 11, 12, 13]] = True
    assert order_rows(mask).tolist() == [1, 2, 0, 3, 4, 5]
    assert order_rows(mask, min_overlap=0.19).tolist()[-3:] == [0, 3, 4]
    assert order_rows(mask, min_overlap=1.0).tolist() == list(range(6))


@pytest.mark.parametrize("method", ["paper", "fast", "densest"])
@pytest.mark.parametrize("metric", ["jaccard", "cosine"])
@pytest.mark.parametrize("group_size", [2, 5, 16])
def test_planted_groups_are_found(method, metric, group_size):
    rng = np.random.default_rng(group_size)
    mask, label = planted(rng, 9, group_size, 130, 13)
    mask &= rng.random(mask.shape) < 0.9
    order = order_rows(mask, method=method, metric=metric, group_size=group_size)
    assert sorted(order.tolist()) == list(range(len(mask)))
    assert (label[order][::group_size] == label[order].reshape(9, group_size).T).all()
    again = order_rows(mask, method=method, metric=metric, group_size=group_size)
    np.testing.assert_array_equal(order, again)


@pytest.mark.parametrize("method", ["paper", "fast", "densest"])
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (1, 70), (2, 64), (7, 65)])
@pytest.mark.parametrize("value", [0, 1])
def test_degenerate_masks_are_permuted(method, shape, value):
    order = order_rows(np.full(shape, value), method=method)
    assert order.dtype == np.int32
    assert sorted(order.tolist()) == list(range(shape[0]))


@pytest.mark.parametrize("method", ["paper", "fast", "densest"])
def test_many_rows_are_ordered_in_chunks_of_similar_rows(method, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_ROWS", 64)
    monkeypatch.setattr(rows, "FAST_CHUNK_ROWS", 64)
    monkeypatch.setattr(rows, "COMPONENT_ROWS", 32)
    rng = np.random.default_rng(8)
    mask, label = planted(rng, 40, 8, 300, 20)
    mask &= rng.random(mask.shape) < 0.9
    mask[[3, 77]] = False
    order = order_rows(mask, method=method, group_size=8)
    assert sorted(order.tolist()) == list(range(320))
    assert {3, 77} <= set(order[-8:].tolist())  # nothing in common with any row
    together = (label[order][1:] == label[order][:-1]).mean()
    assert together > 0.8  # 7/8 at best
    np.testing.assert_array_equal(order, order_rows(mask, method=method, group_size=8))


def test_no_matrix_of_all_pairs_above_the_limit(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_ROWS", 50)
    seen = []
    original = rows._rows.row_distances

    class Spy:
        def __getattr__(self, name):
            return getattr(original_module, name)

        def row_distances(self, bits, counts, chosen, cosine, out):
            seen.append(out.shape[0])
            original(bits, counts, chosen, cosine, out)

    original_module = rows._rows
    monkeypatch.setattr(rows, "_rows", Spy())
    order_rows(np.random.default_rng(9).random((400, 40)) < 0.3, min_overlap=0.0)
    assert seen
    assert max(seen) <= 50


@pytest.mark.parametrize("kind", ["random", "blocks"])
def test_the_fast_route_keeps_the_mass_of_the_paper_route(kind):
    rng = np.random.default_rng(10)
    weights = rng.random((384, 256)).astype(np.float32)
    mask = rng.random(weights.shape) < 0.1
    if kind == "blocks":
        mask = planted(rng, 24, 16, 256, 32)[0] & (rng.random(weights.shape) < 0.7) | (
            mask & (rng.random(weights.shape) < 0.3)
        )
    scores = weights * mask

    fast = kept_mass(scores, order_rows(mask, method="fast"))
    assert fast >= 0.99 * kept_mass(scores, order_rows(mask))


def kept_mass(scores: np.ndarray, order: np.ndarray) -> float:
    """l1 norm of the best tenth in blocks of 16 x 16."""
    n_blocks = -(-round(0.1 * scores.size) // 256)
    pointer, columns = select_blocks(scores, order, (16, 16), n_blocks)
    groups = order.reshape(-1, 16)
    return sum(
        float(scores[np.ix_(group, columns[begin:end])].sum())
        for group, begin, end in zip(groups, pointer, pointer[1:], strict=False)
    )


@pytest.mark.parametrize("dropped", [0.0, 0.1, 0.2, 0.4])
def test_from_the_densest_down_grown_columns_are_kept(dropped):
    """Blocks that lost some weights, and rows that got columns in common across blocks (DSB)."""
    rng = np.random.default_rng(12)
    mask, _ = planted(rng, 24, 16, 256, 26)
    weights = rng.random(mask.shape) * (mask & (rng.random(mask.shape) >= dropped))
    rows, columns = rng.permutation(384).reshape(24, 16), rng.permutation(256)
    for _ in range(int(max(dropped, 0.2) * mask.sum() / 16)):  # the first groups get the most
        weights[rows[int(4 * rng.random() ** 2)], columns[rng.integers(128)]] = weights.max()
    paper, fast, densest = (
        kept_mass(weights, order_rows(weights > 0, method=method))
        for method in ("paper", "fast", "densest")
    )
    assert densest >= 0.99 * paper
    if not dropped:  # whole groups lack one row each, and take back the rows that grew
        assert densest > 1.02 * fast


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_rows_that_overlap_another_are_found(fraction):
    mask = np.random.default_rng(7).random((300, 70)) < 0.1
    common, counts = mask.astype(int) @ mask.T.astype(int), mask.sum(axis=1)
    np.fill_diagonal(common, 0)
    similar = (common.max(axis=1) > fraction * counts) & (counts > 0)
    order = order_rows(mask, min_overlap=fraction)
    rest = np.flatnonzero(~similar)
    np.testing.assert_array_equal(order[order.size - rest.size :], rest)


@pytest.mark.parametrize("linkage", ["average", "complete"])
@pytest.mark.parametrize("metric", ["jaccard", "cosine"])
@pytest.mark.parametrize(("n_rows", "cols"), [(3, 9), (60, 12), (150, 70)])
def test_leaves_are_those_of_scipys_dendrogram(linkage, metric, n_rows, cols):
    mask = np.random.default_rng(n_rows).random((n_rows, cols)) < 0.4
    mask[:, 0] = True  # every row shares a column
    m = mask.astype(float)
    common, counts = m @ m.T, mask.sum(axis=1)
    both = np.sqrt(np.outer(counts, counts)) if metric == "cosine" else (
        np.add.outer(counts, counts) - common)  # fmt: skip
    condensed = (1 - common / both)[np.triu_indices(n_rows, 1)]
    want = hierarchy.leaves_list(hierarchy.linkage(condensed, method=linkage))
    got = order_rows(mask, metric=metric, linkage=linkage, min_overlap=0.0)
    np.testing.assert_array_equal(got, want)


# ---- shuffled blocks -------------------------------------------------------------------------


def paper_blocks(scores, perm, block_shape, n_blocks):
    """DSB section 4 word by word: repeatedly the best block of the columns that are left."""
    (s1, s2), (n_rows, cols) = block_shape, scores.shape
    groups = [perm[i : i + s1] for i in range(0, n_rows, s1)]
    norm = np.array([np.abs(scores[g]).sum(axis=0) for g in groups])
    left = [list(range(cols)) for _ in groups]
    taken: list[list[int]] = [[] for _ in groups]
    for _ in range(n_blocks):
        best, total = -1, -1.0
        for g, free in enumerate(left):
            block = sorted(free, key=lambda c, g=g: (-norm[g, c], c))[:s2]
            if free and norm[g, block].sum() > total:
                best, total = g, norm[g, block].sum()
        block = sorted(left[best], key=lambda c: (-norm[best, c], c))[:s2]
        taken[best] += sorted(block)
        left[best] = [c for c in left[best] if c not in block]
    return taken


@pytest.mark.parametrize("block_shape", [(1, 1), (2, 2), (2, 3), (4, 1), (3, 4), (7, 8), (20, 20)])
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_blocks_follow_the_papers_procedure(block_shape, levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(-levels, levels + 1, (7, 9)).astype(np.float32)
    scores *= rng.random((7, 9)) < 0.6
    perm = rng.permutation(7)
    groups, per_group = -(-7 // block_shape[0]), -(-9 // block_shape[1])
    for n_blocks in range(groups * per_group + 1):
        pointer, columns = select_blocks(scores, perm, block_shape, n_blocks)
        assert pointer.dtype == np.int64
        assert columns.dtype == np.int32
        got = [columns[a:b].tolist() for a, b in itertools.pairwise(pointer)]
        assert got == paper_blocks(scores, perm, block_shape, n_blocks)


@pytest.mark.parametrize("block_shape", [(1, 1), (2, 3), (3, 4), (8, 9)])
def test_signed_blocks_rank_by_the_sum(block_shape):
    rng = np.random.default_rng(1)
    scores = rng.integers(-9, 10, (8, 9)) * 1.0
    scores[rng.random(scores.shape) < 0.3] = 0.0
    perm = rng.permutation(8)
    shifted = scores + 20.0  # positive, and the same order among columns of equal height
    for n_blocks in range(8 // block_shape[0] + 1):
        if 8 % block_shape[0] == 0 and 9 % block_shape[1] == 0:
            got = select_blocks(scores, perm, block_shape, n_blocks, signed=True)
            want = select_blocks(shifted, perm, block_shape, n_blocks)
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)
        pointer, columns = select_blocks(scores, perm, block_shape, n_blocks, signed=True)
        assert pointer[-1] == columns.size
        for g, (a, b) in enumerate(itertools.pairwise(pointer)):
            sums = scores[perm[g * block_shape[0] : (g + 1) * block_shape[0]]].sum(0)
            assert set(columns[a:b]) == set(np.argsort(-sums, kind="stable")[: b - a])


def test_one_group_may_take_all_blocks():
    scores = np.random.default_rng(0).random((16, 64))
    scores[8:12] += 10
    pointer, columns = select_blocks(scores, np.arange(16), (4, 2), 20)
    assert pointer.tolist() == [0, 0, 0, 40, 40]
    best = np.sort(np.argsort(-scores[8:12].sum(0), kind="stable")[:40])
    np.testing.assert_array_equal(np.sort(columns), best)


def test_blocks_by_hand():
    scores = np.array([[5, 0, 1, 0], [0, 0, 9, 2], [4, 0, 1, 0], [0, 1, 8, 3]])
    pointer, columns = select_blocks(scores, [0, 2, 1, 3], (2, 2), 2)
    assert pointer.tolist() == [0, 2, 4]
    assert columns.tolist() == [0, 2, 2, 3]  # norms 9, 2 and 17, 5


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_blocks_of_empty_matrices(shape):
    pointer, columns = select_blocks(np.empty(shape), np.arange(shape[0]), (2, 2), 0)
    assert pointer.tolist() == [0] * (-(-shape[0] // 2) + 1)
    assert columns.size == 0


# ---- HRBP ------------------------------------------------------------------------------------


def test_pattern_of_the_papers_figure():
    # HRBP, Fig. 3: six 2 x 2 kernels with 5, 4, 5, 2 nonzeros per cell; s = 3/4 keeps cells 0 1 2.
    cells = np.array(
        [[1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 1], [0, 1, 1, 0]]
    )
    assert cells.sum(axis=0).tolist() == [5, 4, 5, 2]
    mask = cells.reshape(2, 12)
    got = hrbp_structure(mask, mask, (2, 3, 2, 2), 0.75, block_density=0.75, groups=1)
    row_perm, row_ptr, channels, pattern = (a.tolist() for a in got)
    assert (row_perm, row_ptr) == ([0, 1], [0, 2])
    assert channels == [[0, 1, 2]]
    assert pattern == [[0, 1, 2]]


def test_groups_channels_and_patterns_are_recovered():
    # Rows 0, 2 use channels 0, 1 and cells 0, 1; rows 1, 3 use channels 2, 3 and cells 2, 3.
    mask = np.zeros((4, 4, 4), bool)
    mask[[0, 2], :2, :2] = True
    mask[[1, 3], 2:, 2:] = True
    got = hrbp_structure(mask.reshape(4, 16), mask.reshape(4, 16), (4, 4, 2, 2), 0.25, 0.5, 2)
    found = {
        tuple(got[0][a:b].tolist()): (got[2][g].tolist(), got[3][g].tolist())
        for g, (a, b) in enumerate(itertools.pairwise(got[1]))
    }
    assert found == {(0, 2): ([0, 1], [0, 1]), (1, 3): ([2, 3], [2, 3])}


@pytest.mark.parametrize(
    ("density", "shape", "given", "want"),
    [
        (0.1, (8, 16, 3, 3), None, 4 / 9),
        (0.5, (8, 16, 3, 3), None, 5 / 9),
        (4 / 9, (8, 16, 3, 3), None, 4 / 9),
        (1.0, (8, 16, 3, 3), None, 1.0),
        (0.1, (8, 16), None, 1.0),
        (0.1, (8, 16, 1, 1), None, 1.0),
        (0.1, (8, 16, 5, 5), None, 1.0),  # 4/9 is for 3 x 3
        (0.1, (8, 16, 1, 9), None, 1.0),
        (0.1, (8, 16), 1 / 9, 1.0),  # one cell: no choice
        (0.1, (8, 16, 3, 3), 1 / 9, 1 / 9),
        (0.2, (8, 16, 3, 3), 1 / 9, 2 / 9),
        (0.1, (8, 1, 3, 3), None, 1 / 9),  # depthwise: the pattern alone
        (0.3, (8, 1, 3, 3), None, 3 / 9),
        (0.1, (8, 2, 3, 3), None, 1 / 9),  # 0.45 channels at 4/9
        (0.0, (8, 16, 3, 3), None, 1 / 9),
    ],
)
def test_block_density_rules(density, shape, given, want):
    assert hrbp_block_density(density, shape, given) == pytest.approx(want)


@pytest.mark.parametrize("method", ["paper", "fast"])
@pytest.mark.parametrize(
    ("shape", "density"),
    [
        ((64, 32, 3, 3), 0.1),
        ((30, 5, 3, 3), 0.3),
        ((7, 6), 0.4),
        ((100, 40), 0.1),
        ((24, 1, 3, 3), 0.2),
        ((16, 3, 5, 5), 1.0),
        ((9, 4, 1, 1), 0.01),
    ],
)
def test_hrbp_is_legal_and_meets_its_budget(method, shape, density):
    out, channels, cells = shape[0], shape[1], math.prod(shape[2:])
    scores = np.random.default_rng(11).random((out, channels * cells))
    mask = topk_mask(scores, round(density * scores.size))
    row_perm, row_ptr, kept, pattern = hrbp_structure(mask, scores, shape, density, method=method)
    t = max(1, min(8, out // 8))
    assert (row_perm.dtype, row_ptr.dtype, kept.dtype, pattern.dtype) == (
        np.int32,
        np.int64,
        np.int32,
        np.int32,
    )
    assert sorted(row_perm.tolist()) == list(range(out))
    assert len(row_ptr) == t + 1
    assert np.ptp(np.diff(row_ptr)) <= 1
    s = hrbp_block_density(density, shape)
    assert pattern.shape == (t, round(s * cells))
    assert kept.shape == (t, max(1, round(round(density / s * channels, 9))))
    for lists, high in ((kept, channels), (pattern, cells)):
        assert (np.diff(lists, axis=1) > 0).all()
        assert lists.min() >= 0
        assert lists.max() < high


@pytest.mark.parametrize(
    ("density", "channels", "kept"),
    [(0.5, 5, 2), (0.5, 7, 4), (0.1, 5, 1), (0.3, 5, 2), (0.7, 5, 4), (0.26, 10, 3)],
)
def test_halves_of_channels_round_to_even(density, channels, kept):
    """2.5 and 3.5 channels are 2 and 4; 0.5, at least one; 1.5 and 3.5 whatever their last bits."""
    mask = np.random.default_rng(0).random((4, channels)) < density
    assert hrbp_structure(mask, mask, (4, channels), density)[2].shape[1] == kept


def test_hrbp_ties_go_to_the_scores_and_then_to_a_shuffle():
    mask = np.ones((2, 4), bool)
    scores = np.array([[1.0, 2, 2, 0], [1, 2, 2, 0]])
    assert hrbp_structure(mask, scores, (2, 4), 0.5)[2].tolist() == [[1, 2]]
    found = {tuple(hrbp_structure(mask, mask, (2, 4), 0.5, seed=i)[2][0]) for i in range(30)}
    assert len(found) > 3  # all six pairs are as good
    one, same = (hrbp_structure(mask, mask, (2, 4), 0.5, seed=7)[2] for _ in range(2))
    np.testing.assert_array_equal(one, same)


def test_ties_do_not_favour_the_first_rows():
    """A mask of density 0.05 without scores: by index row 0 would keep 24 kernels and row 63 5."""
    rng = np.random.default_rng(0)
    mask = rng.random((64, 64 * 9)) < 0.05
    kernels = _kernel_mask(mask, mask.astype(np.float32), 0.05 * 9 / 4, 9, rng).sum(1)
    assert kernels.sum() == round(0.05 * 9 / 4 * 64 * 64)
    assert abs(kernels[:16].mean() - kernels[-16:].mean()) < 2


def hrbp_by_loops(mask, scores, shape, density, s, groups, seed):
    """Section 4.1 with METHODS' ties, in plain loops; the order of the rows is `order_rows`'."""
    out, channels, cells = shape[0], shape[1], math.prod(shape[2:])
    m, score = mask.reshape(out, channels, cells), scores.reshape(out, channels, cells)
    share = min(1.0, density / s)
    kernels = [(o, i) for o in range(out) for i in range(channels)]
    wanted = round(round(share * len(kernels), 9))
    counts = sorted((int(m[k].sum()) for k in kernels), reverse=True)
    kernel_mask = np.zeros((out, channels), bool)
    if wanted:
        least = counts[wanted - 1]
        for k in kernels:
            kernel_mask[k] = m[k].sum() > least
        ties = [k for k in kernels if m[k].sum() == least]
        missing = wanted - int(kernel_mask.sum())
        if missing < len(ties):
            ties = [ties[i] for i in np.random.default_rng(seed).permutation(len(ties))]
        for k in sorted(ties, key=lambda k: -score[k].sum())[:missing]:  # stable
            kernel_mask[k] = True
    order = order_rows(kernel_mask, min_overlap=0.0)
    t = max(1, min(8, out // 8)) if groups is None else groups
    found, first = [], 0
    for g in range(t):
        size = out // t + (g < out % t)
        rows = sorted(int(r) for r in order[first : first + size])
        first += size
        number = max(1, round(round(share * channels, 9)))

        def channel(i, rows=rows):
            keys = (kernel_mask[rows, i].sum(), m[rows, i].sum(), score[rows, i].sum())
            return [-float(key) for key in keys]

        chosen = sorted(sorted(range(channels), key=channel)[:number])
        inside = m[rows][:, chosen], score[rows][:, chosen]

        def cell(j, inside=inside):
            return [-float(part[:, :, j].sum()) for part in inside]

        found.append((rows, chosen, sorted(sorted(range(cells), key=cell)[: round(s * cells)])))
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 20),
    channels=st.integers(1, 6),
    kernel=st.sampled_from([(), (1, 1), (2, 2), (3, 3)]),
    density=st.floats(0.02, 1.0),
    cells=st.none() | st.integers(1, 9),
    groups=st.none() | st.integers(1, 3),
    scored=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_hrbp_is_that_of_plain_loops(out, channels, kernel, density, cells, groups, scored, seed):
    """Whole numbers for scores, or none but the mask: sums are exact, and many tie."""
    rng = np.random.default_rng(seed)
    shape = out, channels, *kernel
    mask = rng.random((out, channels * math.prod(kernel))) < density
    scores = (rng.integers(0, 3, mask.shape) if scored else mask).astype(np.float32)
    groups = groups and min(groups, out)
    given_s = None if cells is None else min(cells, math.prod(kernel)) / math.prod(kernel)
    s = hrbp_block_density(density, shape, given_s)
    got = hrbp_structure(mask, scores, shape, density, given_s, groups, seed=seed)
    want = hrbp_by_loops(mask, scores, shape, density, s, groups, seed)
    for g, (rows_of_group, chosen, pattern) in enumerate(want):
        assert got[0][got[1][g] : got[1][g + 1]].tolist() == rows_of_group
        assert got[2][g].tolist() == chosen
        assert got[3][g].tolist() == pattern


@pytest.mark.parametrize(
    ("shape", "density"), [((0, 4), 0.5), ((4, 0), 0.0), ((4, 4), 0.0), ((4, 2, 0, 3), 0.0)]
)
def test_hrbp_without_weights(shape, density):
    empty = np.zeros((shape[0], math.prod(shape[1:])))
    row_perm, row_ptr, kept, pattern = hrbp_structure(empty, empty, shape, density)
    assert row_perm.tolist() == list(range(shape[0]))
    assert row_ptr.tolist() == ([0, shape[0]] if shape[0] else [0])
    assert kept.size == 0
    assert pattern.size == 0
