"""Structure search against hand-made cases and against brute force on tiny matrices."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from format_cases import MAKERS

from spfmt.errors import FormatError
from spfmt.structure import (
    constant_fan_in,
    erk_densities,
    hrbp_block_density,
    hrbp_structure,
    moves,
    nm_columns,
    order_rows,
    order_rows_fast,
    per_row_topk,
    select_blocks,
    topk_columns,
    topk_mask,
    transposable_nm_columns,
    transposable_nm_mask,
    transposable_patterns,
    uniform_densities,
    unstructured,
)

REAL_DTYPES = ["f2", "f4", "f8", ">f4", "i2", "u1", "?"]


def mask_of(columns: np.ndarray, cols: int) -> np.ndarray:
    mask = np.zeros((len(columns), cols), bool)
    np.put_along_axis(mask, columns.astype(np.int64), True, axis=1)
    return mask


# ---- inputs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_every_real_dtype_and_stride_is_read_alike(dtype):
    wide = np.random.default_rng(0).integers(0, 2 if dtype == "?" else 50, (12, 16))
    scores = wide.astype(dtype)[::-2, ::2]
    plain = wide[::-2, ::2].astype(np.float64)
    assert not scores.flags.c_contiguous
    np.testing.assert_array_equal(topk_mask(scores, 13), topk_mask(plain, 13))
    np.testing.assert_array_equal(per_row_topk(scores, 3), per_row_topk(plain, 3))
    np.testing.assert_array_equal(nm_columns(scores, 2, 4), nm_columns(plain, 2, 4))
    np.testing.assert_array_equal(
        transposable_nm_mask(scores, 1, 3), transposable_nm_mask(plain, 1, 3)
    )
    perm = np.arange(6)
    for got, want in zip(
        select_blocks(scores, perm, (2, 2), 5), select_blocks(plain, perm, (2, 2), 5), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_read_only_scores_are_accepted_and_untouched():
    scores = np.random.default_rng(0).random((8, 8))
    before = scores.copy()
    scores.flags.writeable = False
    topk_mask(scores, 5)
    per_row_topk(scores, 2)
    nm_columns(scores, 2, 4)
    transposable_nm_mask(scores, 2, 4)
    select_blocks(scores, np.arange(8), (2, 2), 3)
    hrbp_structure(scores > 0.5, scores, (8, 8), 0.5, method="fast")
    np.testing.assert_array_equal(scores, before)


def test_bfloat16_scores():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    scores = np.array([[1, 3, 2]], ml_dtypes.bfloat16)
    assert per_row_topk(scores, 2).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "call",
    [
        lambda s: topk_mask(s, 1),
        lambda s: topk_columns(s, 1),
        lambda s: per_row_topk(s, 1),
        lambda s: constant_fan_in(s, 2),
        lambda s: nm_columns(s, 1, 2),
        lambda s: transposable_nm_mask(s, 1, 2),
        lambda s: transposable_nm_columns(s, 1, 2),
        lambda s: select_blocks(s, np.arange(4), (2, 2), 1),
        lambda s: hrbp_structure(np.ones((4, 4)), s, (4, 4), 0.5),
    ],
)
def test_nan_scores_are_refused(call):
    scores = np.ones((4, 4))
    scores[2, 3] = np.nan
    with pytest.raises(FormatError, match=r"got NaN in scores at \(2, 3\); expected .*; fix: "):
        call(scores)
    with pytest.raises(FormatError, match="got scores of dtype"):
        call(np.ones((4, 4), complex))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk_mask(np.ma.masked_array(np.ones(3), [1, 0, 0]), 1), "scores as a numpy mas"),
        (lambda: order_rows(np.ma.masked_array(np.eye(3), np.eye(3))), "mask as a numpy masked"),
        (lambda: topk_mask([[1], [1, 2]], 1), "scores that numpy cannot read"),
        (lambda: order_rows(np.eye(3), min_overlap="0.2"), "min_overlap='0.2'"),
        (lambda: nm_columns(np.eye(3), 2**70, 2**70), "m=1180591620717411303424"),
        (lambda: order_rows_fast(np.eye(3), group_size=2**70), "group_size=11"),
        (lambda: select_blocks(np.eye(3), range(3), (2**70, 1), 1), "block rows S1=11"),
        (lambda: topk_mask(np.ones(3), 4), "got n=4; expected an integer from 0 to 3"),
        (lambda: topk_mask(np.ones(3), -1), "got n=-1"),
        (lambda: topk_mask(np.ones(3), 1.5), "got n=1.5"),
        (lambda: topk_columns(np.ones((1, 3)), 4), "got n=4"),
        (lambda: topk_columns(np.ones(3), 1), "expected 2 dimensions"),
        (lambda: per_row_topk(np.ones((2, 3)), 4), "got k=4"),
        (lambda: per_row_topk(np.ones(3), 1), r"got scores of shape \(3,\); expected 2 dimensions"),
        (lambda: constant_fan_in(np.ones((2, 3)), 7), "got n_nonzeros=7"),
        (lambda: nm_columns(np.ones((2, 4)), 3, 2), "got n=3"),
        (lambda: nm_columns(np.ones((2, 4)), 0, 0), "got m=0"),
        (lambda: nm_columns(np.ones((2, 4)), 1, 2, 3), "4 columns for 3 cells"),
        (lambda: transposable_nm_mask(np.full((2, 2), np.inf), 1, 2), "an infinite score at"),
        (lambda: select_blocks(np.ones((2, 2)), [0, 0], (1, 1), 1), "row_perm"),
        (lambda: select_blocks(np.ones((2, 2)), [0, 2], (1, 1), 1), "row_perm"),
        (lambda: select_blocks(np.ones((2, 2)), [0.0, 1.0], (1, 1), 1), "row_perm"),
        (lambda: select_blocks(np.ones((2, 2)), [0, 1], (0, 1), 1), "block rows S1=0"),
        (lambda: select_blocks(np.ones((2, 2)), [0, 1], 2, 1), "block_shape = 2"),
        (lambda: select_blocks(np.ones((2, 2)), [0, 1], (1, 1), 5), "n_blocks=5"),
        (lambda: select_blocks(np.full((1, 1), -np.inf), [0], (1, 1), 1), "-inf in scores"),
        (lambda: order_rows(np.ones((2, 2)), metric="hamming"), "metric='hamming'"),
        (lambda: order_rows(np.ones((2, 2)), linkage="single"), "linkage='single'"),
        (lambda: order_rows(np.ones((2, 2)), method="best"), "method='best'"),
        (lambda: order_rows(np.ones((2, 2)), min_overlap=2), "min_overlap=2"),
        (lambda: order_rows(np.ones(4)), "mask of shape"),
        (lambda: order_rows_fast(np.ones((2, 2)), group_size=0), "group_size=0"),
        (lambda: hrbp_structure(np.ones((2, 4)), np.ones((2, 4)), (2, 5), 0.5), "a layer of shape"),
        (lambda: hrbp_structure(np.ones((2, 4)), np.ones((2, 4)), (2, 4, 1), 0.5), "shape ="),
        (lambda: hrbp_block_density(0.1, (2, 4, 3, 3), 0.5), "block_density = 0.5"),
        (lambda: hrbp_block_density(0.1, (2, 4), 3), "block_density=3"),  # a linear layer, too
        (lambda: hrbp_block_density(0.1, (2, 4), 0), "block_density = 0"),
        (lambda: hrbp_structure(np.ones((2, 2)), np.ones((2, 2)), (2, 2), 0.5, groups=3), "groups"),
        (lambda: erk_densities([(2, 2)], 1.5), "density=1.5"),
        (lambda: erk_densities([(2, 2)], math.nan), "density=nan"),
        (lambda: erk_densities([(2,)], 0.5), "a weight shape"),
        (lambda: erk_densities([(2, 2)], 0.5, [1]), "an excluded index=1"),
        (lambda: erk_densities([(9, 9), (9, 9)], 0.3, [0], count_excluded=True), "excluded"),
    ],
)
def test_bad_arguments_say_got_expected_fix(call, message):
    with pytest.raises(FormatError, match=message) as error:
        call()
    assert all(word in str(error.value) for word in ("got ", "expected ", "fix: "))


# ---- selection -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (5, 9), (2, 3, 3, 3), (0,), (3, 0)])
def test_topk_mask_is_exact_with_ties_to_the_lowest_index(shape):
    scores = np.random.default_rng(1).integers(-3, 4, shape).astype(np.float32)
    order = np.argsort(-scores.ravel(), kind="stable")
    for n in range(scores.size + 1):
        want = np.zeros(scores.size, bool)
        want[order[:n]] = True
        got = topk_mask(scores, n)
        assert got.dtype == np.bool_
        np.testing.assert_array_equal(got, want.reshape(shape))


def test_infinite_scores_rank_first_and_last():
    scores = np.array([[0.0, -np.inf, np.inf, 1.0]])
    assert topk_mask(scores, 1).tolist() == [[False, False, True, False]]
    assert per_row_topk(scores, 3).tolist() == [[0, 2, 3]]


@pytest.mark.parametrize("cols", [0, 1, 5, 40, 700])
@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_per_row_topk_equals_a_stable_sort(cols, levels):
    scores = np.random.default_rng(cols).integers(0, levels, (6, cols)).astype(np.float64)
    order = np.argsort(-scores, axis=1, kind="stable")
    for k in {0, 1, cols // 10, cols // 2, max(0, cols - 1), cols} & set(range(cols + 1)):
        got = per_row_topk(scores, k)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, np.sort(order[:, :k], axis=1))


@pytest.mark.parametrize("k", [1, 9, 40, 299])
def test_rows_of_unlike_scales_are_selected_one_by_one(k):
    rng = np.random.default_rng(k)
    scores = rng.standard_normal((60, 300)) * 10.0 ** rng.integers(-3, 4, (60, 1))
    scores[::7] = np.round(scores[::7])  # many ties, most of them zero
    scores[3, ::2] = -0.0  # equals 0
    want = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1)
    np.testing.assert_array_equal(per_row_topk(scores, k), want)
    np.testing.assert_array_equal(nm_columns(scores, k, 300), want)
    best = np.sort(np.argsort(-scores.ravel(), kind="stable")[: 60 * k])
    np.testing.assert_array_equal(np.flatnonzero(topk_mask(scores, 60 * k)), best)
    indptr, columns = topk_columns(scores, 60 * k)
    np.testing.assert_array_equal(np.repeat(np.arange(60), np.diff(indptr)) * 300 + columns, best)


def test_a_misleading_sample_costs_nothing_but_time():
    # The places that `_sample_bracket` in bindings/selection.pyx looks at hold the lowest scores.
    scores, state = np.random.default_rng(0).random(60000), 0x9E3779B97F4A7C15
    for _ in range(8192):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        scores[(state >> 20) % scores.size] -= 100
    for n in (1, 30000, 59000):
        best = np.sort(np.argsort(-scores, kind="stable")[:n])
        np.testing.assert_array_equal(np.flatnonzero(topk_mask(scores.reshape(200, 300), n)), best)


@pytest.fixture
def flushed_denormals():
    torch = pytest.importorskip("torch")
    if not torch.set_flush_denormal(True):
        pytest.skip("a processor that does not flush denormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("signed", [True, False])
def test_denormal_scores_tie_with_zero_where_the_processor_takes_them_for_it(
    flushed_denormals, signed
):
    scores = np.zeros((64, 70), np.float32)
    scores[::9, 1::3] = np.linspace(0.5, 2.0, scores[::9, 1::3].size).reshape(8, 23)
    scores[::4, ::2] = np.uint32(7).view(np.float32)
    order = np.argsort(-np.where(scores < 0.5, 0, scores).ravel(), kind="stable")
    for n in (100, scores[::9].size, 4000, scores.size):
        indptr, columns = topk_columns(scores, n, signed=signed)
        got = np.repeat(np.arange(64), np.diff(indptr)) * 70 + columns
        np.testing.assert_array_equal(got, np.sort(order[:n]))
        np.testing.assert_array_equal(np.flatnonzero(topk_mask(scores, n)), got)


def test_scores_that_change_while_they_are_ranked_are_an_error(monkeypatch):
    monkeypatch.setattr(unstructured._selection, "top_columns", lambda *args: None)
    with pytest.raises(FormatError, match="scores that changed while they were ranked"):
        topk_columns(np.ones((2, 2)), 3)


@pytest.mark.parametrize("pattern", ["ascending", "descending", "organ pipe", "sawtooth"])
def test_selection_handles_ordered_rows(pattern):
    n = np.arange(3000)
    row = {
        "ascending": n,
        "descending": -n,
        "organ pipe": np.minimum(n, 3000 - n),
        "sawtooth": n % 7,
    }[pattern].astype(np.float32)[None]
    want = np.sort(np.argsort(-row[0], kind="stable")[:301])
    np.testing.assert_array_equal(per_row_topk(row, 301)[0], want)


@pytest.mark.parametrize(
    ("n", "fan_in"), [(0, 0), (1, 1), (5, 1), (6, 1), (7, 1), (8, 2), (15, 3), (16, 4)]
)
def test_constant_fan_in_is_the_budget_over_the_rows_rounded_down(n, fan_in):
    scores = np.random.default_rng(2).random((4, 4))
    row_indices, columns = constant_fan_in(scores, n)
    assert columns.shape == ((4, fan_in) if n else (0, 0))
    assert row_indices.tolist() == (list(range(4)) if n else [])
    if n:
        np.testing.assert_array_equal(columns, per_row_topk(scores, fan_in))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_constant_fan_in_of_empty_matrices(shape):
    row_indices, columns = constant_fan_in(np.empty(shape), 0)
    assert row_indices.size == columns.size == 0


# ---- n:m -------------------------------------------------------------------------------------


def best_group(values: np.ndarray, n: int) -> list[int]:
    """Brute force: first of the best n-subsets in lexicographic order."""
    subsets = list(itertools.combinations(range(len(values)), min(n, len(values))))
    return list(subsets[int(np.argmax([values[list(s)].sum() for s in subsets]))])


@pytest.mark.parametrize("cells", [1, 4])
@pytest.mark.parametrize(("n", "m"), [(0, 3), (1, 2), (2, 4), (3, 5), (4, 4), (2, 7), (3, 100)])
def test_nm_columns_are_the_optimum_of_each_group(n, m, cells):
    channels = 10
    scores = np.random.default_rng(n).integers(-4, 5, (3, channels * cells)).astype(np.float32)
    got = nm_columns(scores, n, m, cells)
    want = []
    for row in scores:
        columns = []
        for begin in range(0, channels, m):
            group = np.arange(begin, min(channels, begin + m))
            for cell in range(cells):
                columns += [
                    int(group[i]) * cells + cell for i in best_group(row[group * cells + cell], n)
                ]
        want.append(sorted(columns))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, np.array(want, np.int32).reshape(got.shape))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_nm_of_empty_matrices(shape):
    assert nm_columns(np.empty(shape), 2, 4).size == 0
    assert transposable_nm_mask(np.empty(shape), 2, 4).shape == shape


def test_there_are_90_patterns_and_the_first_wins_ties():
    patterns = transposable_patterns(2, 4)
    assert patterns.shape == (90, 4, 4)
    assert len({p.tobytes() for p in patterns}) == 90
    assert patterns[0].astype(int).tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    ]
    np.testing.assert_array_equal(transposable_nm_mask(np.zeros((4, 4)), 2, 4), patterns[0])
    assert len(transposable_patterns(1, 3)) == 6
    assert len(transposable_patterns(2, 3)) == 6
    assert len(transposable_patterns(0, 2)) == len(transposable_patterns(2, 2)) == 1


def test_transposable_2_4_is_the_first_best_of_the_90_patterns():
    rng = np.random.default_rng(3)
    patterns = transposable_patterns(2, 4)
    for scores in (rng.random((8, 12), np.float32), rng.integers(0, 3, (8, 12)).astype(float)):
        got = transposable_nm_mask(scores, 2, 4)
        for r, c in itertools.product(range(0, 8, 4), range(0, 12, 4)):
            tile = scores[r : r + 4, c : c + 4].astype(float)
            totals = (patterns * tile).sum(axis=(1, 2))
            best = int(np.flatnonzero(totals >= totals.max() - 1e-12)[0])
            np.testing.assert_array_equal(got[r : r + 4, c : c + 4], patterns[best])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (1, 3), (2, 3), (1, 4), (3, 4), (1, 5)])
@pytest.mark.parametrize("levels", [2, 1000])
def test_transposable_tiles_are_optimal_by_brute_force(n, m, levels):
    patterns = transposable_patterns(n, m)
    scores = np.random.default_rng(m).integers(-levels, levels, (4 * m, 5 * m)).astype(np.float64)
    got = transposable_nm_mask(scores, n, m)
    tiles = got.reshape(4, m, 5, m)
    assert (tiles.sum(axis=1) == n).all()
    columns = transposable_nm_columns(scores, n, m)
    np.testing.assert_array_equal(mask_of(columns, scores.shape[1]), got)
    assert (tiles.sum(axis=3) == n).all()
    values = scores.reshape(4, m, 5, m).transpose(0, 2, 1, 3)
    best = np.einsum("abij,pij->abp", values, patterns.astype(float)).max(axis=2)
    np.testing.assert_allclose((values * tiles.transpose(0, 2, 1, 3)).sum(axis=(2, 3)), best)


@pytest.mark.parametrize(("n", "m"), [(4, 8), (5, 16), (16, 32)])
def test_transposable_tiles_are_optimal_by_linear_programming(n, m):
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(n)
    scores = rng.standard_normal((m, m)) * (rng.random((m, m)) < 0.5)
    got = transposable_nm_mask(scores, n, m)
    assert (got.sum(axis=0) == n).all()
    assert (got.sum(axis=1) == n).all()
    lines = np.vstack([np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))])
    best = optimize.linprog(-scores.ravel(), A_eq=lines, b_eq=np.full(2 * m, n), bounds=(0, 1))
    assert scores[got].sum() == pytest.approx(-best.fun, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8)])
def test_transposable_convolution_groups_run_along_the_channels(n, m):
    cells, rng = 9, np.random.default_rng(4)
    scores = rng.random((2 * m, 3 * m * cells))
    got = transposable_nm_mask(scores, n, m, cells).reshape(2 * m, 3 * m, cells)
    for cell in range(cells):
        alone = transposable_nm_mask(scores.reshape(2 * m, 3 * m, cells)[:, :, cell], n, m)
        np.testing.assert_array_equal(got[:, :, cell], alone)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (2, 5)])
@pytest.mark.parametrize(("more_rows", "more_cols"), [(0, 1), (1, 0), (3, 2)])
def test_transposable_rest_is_plain_nm(n, m, more_rows, more_cols):
    scores = np.random.default_rng(5).random((2 * m + more_rows, 3 * m + more_cols))
    got = transposable_nm_mask(scores, n, m)
    np.testing.assert_array_equal(
        got[: 2 * m, : 3 * m], transposable_nm_mask(scores[: 2 * m, : 3 * m], n, m)
    )
    plain = mask_of(nm_columns(scores, n, m), scores.shape[1])
    np.testing.assert_array_equal(got[2 * m :], plain[2 * m :])
    np.testing.assert_array_equal(got[:, 3 * m :], plain[:, 3 * m :])


def test_a_matrix_smaller_than_a_tile_is_plain_nm():
    scores = np.random.default_rng(6).random((3, 10))
    plain = mask_of(nm_columns(scores, 2, 8), 10)
    np.testing.assert_array_equal(transposable_nm_mask(scores, 2, 8), plain)


# ---- layer densities -------------------------------------------------------------------------


def weights_of(shapes, densities):
    sizes = [math.prod(s) for s in shapes]
    counts = [round(d * size) for d, size in zip(densities, sizes, strict=True)]
    assert [c / size if size else 0.0 for c, size in zip(counts, sizes, strict=True)] == densities
    return counts


def test_erk_by_hand():
    # Raw densities (4+4)/16 and (8+8)/64: 8 and 16 weights times 40/24.
    assert weights_of([(4, 4), (8, 8)], erk_densities([(4, 4), (8, 8)], 0.5)) == [13, 27]
    # A kernel's sizes count: (2+2+3+3) to (10+10) of 45 weights.
    shapes = [(2, 2, 3, 3), (10, 10)]
    assert weights_of(shapes, erk_densities(shapes, 45 / 136)) == [15, 30]


def test_erk_caps_dense_layers_and_solves_again():
    # 66 weights: 8/24 of them exceed the 16 of the first layer, which leaves 50 of 64.
    assert weights_of([(4, 4), (8, 8)], erk_densities([(4, 4), (8, 8)], 66 / 80)) == [16, 50]
    # Two caps in a row: shares of 90 are 4.3, 8.6, 77.1 over sizes 4, 16, 1296.
    shapes = [(2, 2), (4, 4), (36, 36)]
    assert weights_of(shapes, erk_densities(shapes, 400 / 1316)) == [4, 16, 380]


@pytest.mark.parametrize("distribution", [erk_densities, uniform_densities])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 1 / 3, 0.9, 1.0])
def test_budgets_are_exact(distribution, density):
    rng = np.random.default_rng(12)
    shapes = [tuple(int(v) for v in rng.integers(1, 40, rng.choice([2, 4]))) for _ in range(12)]
    shapes.append((5, 0))
    densities = distribution(shapes, density)
    total = sum(math.prod(s) for s in shapes)
    assert sum(weights_of(shapes, densities)) == math.floor(density * total + 0.5)
    assert all(0.0 <= d <= 1.0 for d in densities)


def test_erk_densities_are_proportional_below_the_cap():
    shapes = [(300, 200), (512, 512), (64, 64, 3, 3)]
    densities = erk_densities(shapes, 0.02)
    raw = [sum(s) / math.prod(s) for s in shapes]
    scale = [d / r for d, r in zip(densities, raw, strict=True)]
    np.testing.assert_allclose(scale, scale[0], rtol=1e-3)


@pytest.mark.parametrize("distribution", [erk_densities, uniform_densities])
def test_excluded_layers_are_dense(distribution):
    shapes = [(10, 10), (50, 50), (50, 20)]
    outside = distribution(shapes, 0.2, [0])
    assert outside[0] == 1.0
    assert weights_of(shapes, outside)[1:] == weights_of(shapes[1:], distribution(shapes[1:], 0.2))
    inside = distribution(shapes, 0.2, {0}, count_excluded=True)
    assert inside[0] == 1.0
    assert sum(weights_of(shapes, inside)) == round(0.2 * 3600)
    assert distribution(shapes, 0.1, range(3)) == [1.0, 1.0, 1.0]
    assert distribution([], 0.1) == []


def test_uniform_densities_are_uniform():
    assert uniform_densities([(10, 10), (50, 50)], 0.2) == [0.2, 0.2]
    assert weights_of([(3, 3)] * 3, uniform_densities([(3, 3)] * 3, 0.5)) == [5, 5, 4]


# ---- moves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_sources_are_the_old_places_of_equal_positions(name):
    rng = np.random.default_rng(0)
    for shape in [(0, 5), (5, 0), (1, 1), (7, 9), (40, 33), (6, 4, 3, 3)]:
        old, new = (MAKERS[name](shape, rng)._structure for _ in range(2))
        places = {int(flat): place for place, flat in enumerate(old.flat_indices())}
        want = [places.get(int(flat), -1) for flat in new.flat_indices()]
        assert new.sources(old).tolist() == want
        assert new.sources(old, new.nnz + 2).tolist() == [*want, -1, -1]
        assert old.sources(old).tolist() == list(range(old.nnz))


def test_positions_move_between_layouts_of_one_shape_only():
    rng = np.random.default_rng(1)
    lists, groups = MAKERS["csr"]((20, 30), rng), MAKERS["hrbp"]((20, 30), rng)
    found = moves.sources(groups.layout().row_runs(), lists.layout().row_runs())
    at = found >= 0
    np.testing.assert_array_equal(groups.flat_indices()[found[at]], lists.flat_indices()[at])
    assert not set(lists.flat_indices()[~at]) & set(groups.flat_indices())
    with pytest.raises(FormatError, match=r"capacity"):
        lists._structure.sources(groups._structure, lists.nnz - 1)
    other = MAKERS["csr"]((30, 20), rng)
    with pytest.raises(FormatError, match=r"one shape"):
        moves.sources(groups.layout().row_runs(), other.layout().row_runs())
