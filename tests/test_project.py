"""from_scores and project: what is kept, budgets, ties, and bad scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spfmt.errors import FormatError
from spfmt.formats import CSR, FORMATS, HRBP, NM, Condensed, ShuffledBlock, words_capacity

NAMES = sorted(FORMATS)
EMPTY = [(0, 0), (0, 5), (5, 0), (0, 2, 3, 3), (4, 0, 3, 3), (4, 2, 0, 3)]


def scores_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_found_structure_is_legal_and_holds_the_values(name: str, data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    kernel = data.draw(st.sampled_from([(), (3, 3), (1, 2)]))
    density = data.draw(st.sampled_from([0, 0.05, 0.3, 0.5, 1]))
    scores = scores_of((rows, cols, *kernel), data.draw(st.integers(0, 99)))
    a = FORMATS[name].from_scores(scores, density, values=scores)
    a.validate()
    mask = FORMATS[name].project(scores, density)
    assert mask.shape == scores.shape
    np.testing.assert_array_equal(mask, a.mask())
    np.testing.assert_array_equal(a.to_dense(), np.where(mask, scores, 0))
    assert density or not mask.any()
    assert density < 1 or mask.all()
    zeros = FORMATS[name].from_scores(scores, density)
    assert not zeros.values.any()
    assert a.encode().size <= words_capacity(name, a.shape, a.nnz, a.params())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", EMPTY)
def test_empty_scores_are_legal(name: str, shape: tuple[int, ...]) -> None:
    a = FORMATS[name].from_scores(np.zeros(shape), 0.5)
    assert a.shape == shape
    assert a.nnz == 0


def test_unstructured_keeps_the_largest() -> None:
    scores = np.array([[1.0, 5, 2], [4, 4, 4]])
    assert CSR.project(scores, 0.5).tolist() == [[0, 1, 0], [1, 1, 0]]
    scores = scores_of((20, 30))
    mask = CSR.project(scores, 0.123)
    assert mask.sum() == round(0.123 * 600)
    assert scores[mask].min() > scores[~mask].max()


def test_constant_fan_in_is_exact_per_row() -> None:
    scores = scores_of((7, 30))
    fan_ins = {0.1: 3, 0.117: 3, 0.1309: 3, 0.1334: 4, 0.01: 1, 0.001: 0, 0: 0}
    for density, fan_in in fan_ins.items():  # N // 7 with N = round(210 * density)
        mask = Condensed.project(scores, density)
        assert (mask.sum(1) == fan_in).all()
        kept = np.sort(scores, axis=1)[:, 30 - fan_in :]
        np.testing.assert_allclose(np.sort(np.where(mask, scores, 0).sum(1)), np.sort(kept.sum(1)))
    assert Condensed.from_scores(scores, 0.1, fan_in=12).fan_in == 12
    with pytest.raises(FormatError, match="fan_in=31"):
        Condensed.from_scores(scores, 0.1, fan_in=31)


@pytest.mark.parametrize("kernel", [(), (2, 2)])
def test_nm_is_exact_per_group(kernel: tuple[int, ...]) -> None:
    scores = scores_of((5, 10, *kernel))
    mask = NM.project(scores, n=2, m=4)
    grouped = np.moveaxis(scores.reshape(5, 10, -1), 1, 2)
    kept = np.moveaxis(mask.reshape(5, 10, -1), 1, 2)
    for first in (0, 4, 8):
        group, chosen = grouped[..., first : first + 4], kept[..., first : first + 4]
        best = np.sort(group, axis=-1)[..., -2:].sum(-1)
        assert (chosen.sum(-1) == 2).all()
        np.testing.assert_allclose(np.where(chosen, group, 0).sum(-1), best)


def test_n_is_the_nearest_to_the_density() -> None:
    scores = scores_of((3, 64))
    assert NM.from_scores(scores, 0.1).n == 3
    assert NM.from_scores(scores, 0.1, m=16).n == 2
    assert NM.from_scores(scores, 0.01).n == 1
    assert NM.from_scores(scores, 0.1, n=3, m=32).n == 3
    # The short last group counts: 40 columns as 32 + 8, n = 14 keeps 14 + 8 of 40.
    assert NM.from_scores(scores[:, :40], 0.55).n == 14
    with pytest.raises(FormatError, match=r"n=3, m=32 with density 0\.5"):
        NM.from_scores(scores, 0.5, n=3)
    with pytest.raises(FormatError, match="neither density nor n"):
        NM.from_scores(scores)


def test_transposable_tiles() -> None:
    scores = np.abs(scores_of((9, 10)))
    a = NM.from_scores(scores, n=2, m=4, transposable=1)
    assert a.transposable
    assert "transposable 2:4" in repr(a)
    tiles = a.mask()[:8, :8].reshape(2, 4, 2, 4)
    assert (tiles.sum(1) == 2).all()
    assert (tiles.sum(3) == 2).all()
    assert (a.mask()[:, 8:].sum(1) == 2).all()
    again = NM.from_dense(a.mask() * scores, n=2, m=4, transposable=1)
    np.testing.assert_array_equal(again.mask(), a.mask())
    # A part of a legal pattern is completed; a pattern without a completion is refused.
    part = a.mask() & (np.random.default_rng(0).random((9, 10)) < 0.7)
    completed = NM.from_dense(part.astype(float), n=2, m=4, transposable=1)
    assert (completed.mask() >= part).all()
    assert completed.transposable
    column = np.zeros((4, 4))
    column[:3, 1] = 1
    with pytest.raises(FormatError, match=r"row \d, column 1 has no transposable completion"):
        NM.from_dense(column, n=2, m=4, transposable=1)
    assert a.remark() == "the last 1 rows and 2 columns are not transposable"
    assert not NM.from_scores(scores, n=2, m=4).remark()
    assert not NM.from_scores(scores[:8, :8], n=2, m=4, transposable=1).remark()
    conv = NM.from_scores(np.abs(scores_of((4, 8, 2, 1))), n=1, m=4, transposable=1)
    assert (conv.mask().sum(0).reshape(2, 4, 2).sum(1) == 4).all()


@pytest.mark.parametrize("method", ["paper", "fast"])
def test_shuffled_blocks_find_a_hidden_structure(method: str) -> None:
    rng = np.random.default_rng(3)
    cols = np.concatenate([rng.permutation(40)[:4] for _ in range(5)])
    hidden = ShuffledBlock(
        (20, 40), (4, 4), rng.permutation(20), np.arange(6) * 4, cols, np.ones(80)
    )
    scores = hidden.to_dense() + 1e-3 * rng.random((20, 40))
    a = ShuffledBlock.from_scores(scores, 0.1, block_shape=(4, 4), method=method)
    assert a.n_blocks == 5
    np.testing.assert_array_equal(a.mask(), hidden.mask())


def test_vanilla_regrouping_makes_one_block_per_group() -> None:
    """HRBP, section 3.2: similar rows, and of their columns those with the most weights."""
    rng = np.random.default_rng(0)
    label = rng.permutation(np.repeat([0, 1], 8))
    mask = np.zeros((16, 4, 9), bool)
    mask[label == 0, 0, :5] = True
    mask[label == 1, 2, 3:9] = True
    lone = np.flatnonzero(label == 0)[2]
    mask[lone, 3, [0, 4, 7]] = True  # weights that no other row of the group has are left
    mask[np.flatnonzero(label == 1)[3], 2, 8] = False
    scores = (mask + rng.random(mask.shape) / 2).reshape(16, 4, 3, 3)
    scores[lone, 3, 1, 1] = 50  # one weight, whatever its score
    how = {"row_groups": 8, "block_shape": (1, 1), "min_overlap": 0.0}
    a = ShuffledBlock.from_scores(scores, (88 / 576), **how)
    assert a.block_shape == (8, 1)
    found = {}
    for g in range(2):
        rows = a.row_perm[8 * g : 8 * g + 8]
        found[int(label[rows][0])] = set(a.col_indices[a.group_ptr[g] : a.group_ptr[g + 1]])
        assert len(set(label[rows])) == 1
    assert found == {0: set(range(5)), 1: set(range(21, 27))}
    assert ShuffledBlock.from_scores(scores[:7], 0.2, **how).block_shape == (7, 1)
    with pytest.raises(FormatError, match="row_groups=0"):
        ShuffledBlock.from_scores(scores, 0.2, row_groups=0)


def test_random_channels_are_whole_rows() -> None:
    """HRBP's baseline RC: blocks of one row as wide as the matrix, on their own places."""
    scores = np.random.default_rng(0).random((20, 5, 3, 3))
    a = ShuffledBlock.from_scores(scores, 0.26, block_shape=(1, 2**31 - 1), aligned=True)
    kept = a.mask().reshape(20, -1)
    assert kept.all(1).sum() == kept.any(1).sum() == 6  # 5.2 rows: blocks until N is held
    best = np.argsort(-scores.sum((1, 2, 3)))[:6]
    assert set(np.flatnonzero(kept.any(1))) == set(best)


def test_the_number_of_blocks_holds_the_budget() -> None:
    scores = np.abs(scores_of((64, 64)))
    for density in (0.05, 0.1, 0.33, 1):
        a = ShuffledBlock.from_scores(scores, density, block_shape=(16, 4))
        assert a.n_blocks == -(-round(density * 4096) // 64)
        assert a.nnz == a.n_blocks * 64
    # Neither size divides the matrix: whole blocks until the budget is held, and no more.
    scores = np.abs(scores_of((21, 37)))
    for density in (0.1, 0.4, 0.9, 1):
        a = ShuffledBlock.from_scores(scores, density, block_shape=(8, 5))
        budget = round(density * 21 * 37)
        assert budget <= a.nnz < budget + 40
    kept = ShuffledBlock.from_scores(scores, 0.4, block_shape=(8, 5), row_perm=np.arange(21))
    assert kept.row_perm.tolist() == list(range(21))
    with pytest.raises(FormatError, match="row_perm"):
        ShuffledBlock.from_scores(scores, 0.4, row_perm=np.zeros(21, int))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), cols=st.integers(1, 30), density=st.floats(0, 1))
def test_budgets_are_exact(rows: int, cols: int, density: float) -> None:
    """N = round(d R C), halves to even, or the legal number that a format's method names."""
    scores, n = scores_of((rows, cols)), round(density * (rows * cols))
    assert CSR.from_scores(scores, density).nnz == n
    assert Condensed.from_scores(scores, density).nnz == (max(1, n // rows) * rows if n else 0)
    groups, rest = divmod(cols, 4)
    legal = [rows * (groups * k + min(k, rest)) for k in range(min(4, cols) + 1)]
    near = min(legal[1:], key=lambda k: abs(k - n)) if n else 0
    assert NM.from_scores(scores, density, m=4).nnz == near
    order = np.arange(rows)
    a = ShuffledBlock.from_scores(scores, density, block_shape=(3, 5), row_perm=order)
    if rows % 3 == 0 and cols % 5 == 0:
        assert a.n_blocks == -(-n // 15)
    blocks = sorted(block.size for _, _, block in a.blocks())
    assert a.nnz >= n
    assert not n or a.nnz - blocks[-1] < n
    if n:
        channels = max(1, round(round(density * cols, 9)))
        assert HRBP.from_scores(scores, density, row_perm=order).nnz == rows * channels


@settings(max_examples=30, deadline=None, derandomize=True)
@given(rows=st.integers(1, 20), cols=st.integers(1, 15), k=st.integers(1, 15), seed=st.integers(0))
def test_the_formats_are_one_family(rows: int, cols: int, k: int, seed: int) -> None:
    """N:M with M = C is constant fan-in, a block of 1 x 1 unstructured, HRBP of one cell blocks."""
    scores, k = scores_of((rows, cols), seed % 2**32), min(k, cols)
    fan_in = Condensed.project(scores, k / cols, fan_in=k)
    np.testing.assert_array_equal(NM.project(scores, n=k, m=cols), fan_in)
    density = k / cols
    single = ShuffledBlock.project(scores, density, block_shape=(1, 1), row_perm=np.arange(rows))
    np.testing.assert_array_equal(single, CSR.project(scores, density))
    a = HRBP.from_scores(scores.reshape(rows, cols, 1, 1), density, groups=1)
    b = ShuffledBlock.from_dense(a.mask() * 1.0, block_shape=(rows, a.channel_indices.shape[1]))
    assert (b.nnz, b.n_blocks) == (a.nnz, 1)


def test_the_remainder_of_transposable_tiles_is_reported() -> None:
    torch = pytest.importorskip("torch")
    from spfmt.torch import sparsify

    model = torch.nn.Sequential(torch.nn.Linear(10, 9), torch.nn.Linear(8, 8))
    report = sparsify(model, "nm", n=2, m=4, transposable=1)
    assert "not transposable" in report["0"].reason
    assert not report["1"].reason


def test_hrbp_options() -> None:
    scores = np.abs(scores_of((16, 6, 3, 3)))
    a = HRBP.from_scores(scores, 0.2, groups=4, block_density=3 / 9)
    assert (a.groups, a.pattern_indices.shape[1]) == (4, 3)
    assert HRBP.from_scores(scores, 0.2).groups == 2
    with pytest.raises(FormatError, match="groups=17"):
        HRBP.from_scores(scores, 0.2, groups=17)
    with pytest.raises(FormatError, match="block_density"):
        HRBP.from_scores(scores, 0.2, block_density=0.4)


@pytest.mark.parametrize("name", NAMES)
def test_low_scores_are_avoided_however_large_they_are(name: str) -> None:
    options: dict[str, Any] = {"block_shape": (16, 8)} if name == "shuffled_block" else {}
    scores = np.ones((32, 32))
    for low in (-5, -np.inf):
        scores[:, :16] = low
        assert FORMATS[name].project(scores, 0.25, **options)[:, 16:].sum() == 256
    scores[:, 16:24] = np.inf
    assert FORMATS[name].project(scores, 0.25, **options)[:, 16:24].sum() == 256


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_blocks_keeps_more(seed: int) -> None:
    scores = scores_of((4, 6), seed)
    kept = ShuffledBlock.project(scores, 0.5, block_shape=(2, 1), row_perm=[2, 0, 3, 1])
    blocks = np.concatenate([scores[[2, 0]].sum(0), scores[[3, 1]].sum(0)])
    best = np.sort(blocks)[-6:].sum()
    assert scores[kept].sum() == pytest.approx(best)


@pytest.mark.parametrize("name", ["condensed", "nm"])
@pytest.mark.parametrize("seed", range(5))
def test_no_legal_mask_of_the_budget_keeps_more(name: str, seed: int) -> None:
    scores = scores_of((2, 4), seed)
    options = {"m": 2} if name == "nm" else {}
    mask = FORMATS[name].project(scores, 0.5, **options)
    totals = []
    for code in range(2**8):
        other = (code >> np.arange(8) & 1).astype(bool).reshape(2, 4)
        groups = other.reshape(2, -1, 2) if name == "nm" else other.reshape(2, 1, 4)
        if (groups.sum(-1) == groups.shape[-1] // 2).all():
            totals.append(scores[other].sum())
    assert scores[mask].sum() == pytest.approx(max(totals))


def test_groups_wider_than_the_matrix_are_cut_off() -> None:
    scores = scores_of((8, 8))
    assert NM.from_scores(scores, 0.5, m=2**31 - 1).n == 4
    assert NM.from_scores(scores, 0.5, n=4, m=64).nnz == 32
    with pytest.raises(FormatError, match="n=4, m=64"):
        NM.from_scores(scores, 0.25, n=4, m=64)


def test_misspelt_options_are_refused() -> None:
    with pytest.raises(TypeError, match="metod"):
        ShuffledBlock.from_scores(scores_of((4, 6)), 0.5, row_perm=np.arange(4), metod="fast")


@pytest.mark.parametrize("name", NAMES)
def test_bad_scores_are_refused(name: str) -> None:
    cls = FORMATS[name]
    nan = scores_of((4, 6))
    nan[2, 3] = np.nan
    bad: list[tuple[Any, Any, str]] = [
        (nan, 0.5, r"NaN in scores at \(2, 3\)"),
        (scores_of((4,)), 0.5, "rank 1"),
        (scores_of((4, 4)) * 1j, 0.5, "complex128"),
        (np.array([["a", "b"]]), 0.5, "real numbers"),
        (scores_of((4, 6)), 1.5, "density=1.5"),
        (scores_of((4, 6)), -0.1, "density=-0.1"),
        (scores_of((4, 6)), float("nan"), "density=nan"),
        (scores_of((4, 6)), "many", "density='many'"),
        (scores_of((4, 6)), "0.5", "density='0.5'"),
    ]
    for scores, density, message in bad:
        with pytest.raises(FormatError, match=message):
            cls.project(scores, density)
    with pytest.raises(FormatError, match="a dense array of shape"):
        cls.from_scores(scores_of((4, 6)), 0.5, values=np.zeros((6, 4)))
    with pytest.raises(FormatError, match="values of dtype int64"):
        cls.from_scores(scores_of((4, 6)), 0.5, values=np.zeros((4, 6), int))


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_any_real_dtype_and_stride(name: str) -> None:
    cls = FORMATS[name]
    base = np.round(scores_of((12, 10)) * 50)
    expected = cls.project(base, 0.3)
    for scores in (
        base.astype(np.int32),
        base.astype("float16"),
        np.asfortranarray(base),
        np.repeat(base, 2, axis=1)[:, ::2],
        base.astype(">f8"),
    ):
        before = scores.copy()
        np.testing.assert_array_equal(cls.project(scores, 0.3), expected)
        np.testing.assert_array_equal(scores, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("density", [0.0, 0.25])
@pytest.mark.parametrize("shape", [(37, 40), (10, 6, 3, 3)])
def test_another_structure_keeps_the_groups_of_rows(
    name: str, density: float, shape: tuple[int, ...]
) -> None:
    old = FORMATS[name].from_scores(scores_of(shape), density)
    found = FORMATS[name].from_scores(scores_of(shape, 1), density, **old.same_groups())
    # Which rows share a unit is the same; units may be numbered anew.
    (kind, before), (_, after) = old.unit_of_rows(), found.unit_of_rows()
    assert bool(old.same_groups()) == (kind == "group")
    assert len({*zip(before.tolist(), after.tolist(), strict=True)}) == len({*before.tolist()})
    assert len({*after.tolist()}) == len({*before.tolist()})


def test_hrbp_takes_an_order_of_its_rows() -> None:
    perm = np.random.default_rng(0).permutation(10)
    a = HRBP.from_scores(scores_of((10, 8)), 0.5, groups=3, row_perm=perm)
    assert np.diff(a.row_ptr).tolist() == [4, 3, 3]
    assert [sorted(perm[:4]), sorted(perm[4:7]), sorted(perm[7:])] == [
        a.row_perm[i:j].tolist() for i, j in zip(a.row_ptr, a.row_ptr[1:], strict=False)
    ]
    larger_last = HRBP((5, 2), [0, 1, 2, 3, 4], [0, 2, 5], [[0], [1]], [[0], [0]], np.ones(5))
    assert larger_last.same_groups()["row_perm"].tolist() == [2, 3, 4, 0, 1]
    for bad in ([0] * 10, range(9), np.arange(10.0)):
        with pytest.raises(FormatError, match="row_perm"):
            HRBP.from_scores(scores_of((10, 8)), 0.5, row_perm=bad)
