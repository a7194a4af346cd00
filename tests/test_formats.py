"""The formats: definition, checks, dense forms, equality, copies."""

from __future__ import annotations

import copy
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from format_cases import W, built, oracle_dense, positions, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from spfmt.errors import FormatError
from spfmt.formats import (
    CSR,
    FORMATS,
    HRBP,
    NM,
    Condensed,
    Groups,
    ShuffledBlock,
    SparseTensor,
)

NAMES = sorted(FORMATS)
RNG = np.random.default_rng(7)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


# ---- definition --------------------------------------------------------------------------------


@given(tensors())
@settings(max_examples=150, deadline=None)
def test_dense_forms_follow_the_definition(a: SparseTensor) -> None:
    places = positions(a)
    rows, cols = a.layout().coordinates()
    assert places == list(zip(rows.tolist(), cols.tolist(), strict=True))
    dense = a.to_dense()
    assert dense.dtype == a.dtype
    np.testing.assert_array_equal(dense, oracle_dense(a))
    mask = np.zeros(a.matrix_shape, bool)
    mask[rows, cols] = True
    np.testing.assert_array_equal(a.mask(), mask.reshape(a.shape))
    assert a.nnz == len(places) == a.mask().sum() == a.layout().nnz
    np.testing.assert_array_equal(a.dense_gather(dense), a.values)
    np.testing.assert_array_equal(dense.reshape(-1)[a.flat_indices()], a.values.reshape(-1))
    a.validate()


@given(tensors())
@settings(max_examples=100, deadline=None)
def test_layout_of_groups_is_made_of_small_bands(a: SparseTensor) -> None:
    layout = a.layout()
    if isinstance(layout, Groups):
        heights = np.diff(layout.row_ptr)
        assert heights.size == 0 or (heights.min() >= 1 and heights.max() <= 16)
        assert sorted(layout.row_perm) == list(range(layout.rows))
        widths = layout.col_end - layout.col_begin
        np.testing.assert_array_equal(np.diff(layout.value_ptr), heights * widths)


def test_condensed_by_hand() -> None:
    a = Condensed((3, 4), [0, 2], [[0, 3], [1, 2]], ones(2, 2) * [[1, 2], [3, 4]])
    np.testing.assert_array_equal(a.to_dense(), [[1, 0, 0, 2], [0, 0, 0, 0], [0, 3, 4, 0]])
    assert (a.fan_in, a.nnz, a.density) == (2, 4, 4 / 12)
    assert repr(a) == "Condensed(3x4, fan_in=2, active 2/3, density 0.3333, float64)"


def test_nm_with_a_short_last_group_by_hand() -> None:
    a = NM((2, 5), 2, 3, [[0, 2, 3, 4], [1, 2, 3, 4]], np.arange(1.0, 9).reshape(2, 4))
    np.testing.assert_array_equal(a.to_dense(), [[1, 0, 2, 3, 4], [0, 5, 6, 7, 8]])
    assert "2:3" in repr(a)


def test_nm_groups_of_a_convolution_run_along_channels() -> None:
    # 4 channels, 1x2 cells, 1:2: columns c*2 + cell; cell 0 keeps channels 0 and 3, cell 1: 1, 2.
    a = NM((1, 4, 1, 2), 1, 2, [[0, 3, 5, 6]], [[1.0, 2, 3, 4]])
    assert a.to_dense()[0, :, 0].tolist() == [[1, 0], [0, 2], [0, 3], [4, 0]]
    with pytest.raises(FormatError, match=r"row 0, group 0 .*kernel cell 0"):
        NM((1, 4, 1, 2), 1, 2, [[0, 2, 5, 6]], [[1.0, 2, 3, 4]])


def test_shuffled_block_by_hand() -> None:
    a = ShuffledBlock(
        (3, 4), (2, 2), [2, 0, 1], [0, 3, 4], [3, 0, 1, 2], np.arange(1, 8, dtype=np.float32)
    )
    np.testing.assert_array_equal(a.to_dense(), [[4, 6, 0, 2], [0, 0, 7, 0], [3, 5, 0, 1]])
    blocks = list(a.blocks())
    assert [b[2].tolist() for b in blocks] == [[[1, 3], [2, 4]], [[5], [6]], [[7]]]
    assert [b[1].tolist() for b in blocks] == [[3, 0], [1], [2]]
    assert a.n_blocks == 3


def test_hrbp_by_hand() -> None:
    a = HRBP((2, 2, 1, 3), [1, 0], [0, 1, 2], [[0], [1]], [[0, 2], [1, 2]], [1.0, 2, 3, 4])
    assert a.to_dense()[:, :, 0].tolist() == [[[0, 0, 0], [0, 3, 4]], [[1, 0, 2], [0, 0, 0]]]
    assert a.groups == 2


@given(tensors("shuffled_block"))
@settings(max_examples=40, deadline=None)
def test_blocks_cover_the_tensor(a: ShuffledBlock) -> None:
    dense = np.zeros(a.matrix_shape, a.dtype)
    for rows, cols, block in a.blocks():
        assert block.shape == (rows.size, cols.size)
        assert rows.size <= a.block_shape[0]
        assert cols.size <= a.block_shape[1]
        dense[np.ix_(rows, cols)] = block
    np.testing.assert_array_equal(dense.reshape(a.shape), a.to_dense())
    assert len(list(a.blocks())) == a.n_blocks


# ---- from_dense --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_round_trip_of_a_dense_weight(name: str, data: st.DataObject) -> None:
    rows, channels = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 9))
    kernel = data.draw(st.sampled_from([(), (1, 1), (2, 3), (0, 1)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = (rows, channels, *kernel)
    w = np.where(rng.random(shape) < rng.random(), rng.standard_normal(shape), 0)
    a = built(name, w)
    np.testing.assert_array_equal(a.to_dense(), w)
    assert a.dtype == w.dtype
    assert not (a.mask() < (w != 0)).any()


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_pattern_of_a_tensor_is_recovered_without_padding(
    name: str, data: st.DataObject
) -> None:
    a: Any = data.draw(tensors(name))
    options: dict[str, Any] = {}
    if name == "nm":
        options = {"n": a.n, "m": a.m}
    elif name == "shuffled_block":
        options = {"block_shape": a.block_shape, "row_perm": a.row_perm}
    b = type(a).from_dense(a.to_dense(), a.mask(), **options)
    np.testing.assert_array_equal(b.to_dense(), a.to_dense())
    np.testing.assert_array_equal(b.mask(), a.mask())
    if name == "csr" or (name in ("condensed", "nm") and a.nnz):
        assert b == a


def test_shuffled_groups_are_found_again() -> None:
    cols = np.concatenate([RNG.permutation(24)[:5] for _ in range(4)])
    values = np.arange(1, 16 * 5 + 1, dtype=np.float32)
    a = ShuffledBlock((16, 24), (4, 2), RNG.permutation(16), np.arange(5) * 5, cols, values)
    b = ShuffledBlock.from_dense(a.to_dense(), block_shape=(4, 2))
    assert b.nnz == a.nnz
    np.testing.assert_array_equal(b.to_dense(), a.to_dense())


def test_hrbp_groups_are_found_again() -> None:
    for t in (1, 2, 3, 5):
        rng = np.random.default_rng(t)
        pointer = np.arange(t + 1) * 11 // t
        channels = np.array([np.sort(rng.permutation(9)[:4]) for _ in range(t)])
        pattern = np.array([np.sort(rng.permutation(6)[:3]) for _ in range(t)])
        a = HRBP((11, 9, 2, 3), rng.permutation(11), pointer, channels, pattern, np.ones(11 * 12))
        for groups in (t, None):
            b = HRBP.from_dense(a.to_dense(), groups=groups)
            np.testing.assert_array_equal(b.mask(), a.mask())
            assert b.groups == t


def test_condensed_pads_at_the_smallest_free_columns() -> None:
    a = Condensed.from_dense(np.array([[0, 5.0, 0, 6], [0, 0, 0, 0], [7, 0, 0, 0]]))
    assert a.row_indices.tolist() == [0, 2]
    assert a.col_indices.tolist() == [[1, 3], [0, 1]]
    assert a.values.tolist() == [[5, 6], [7, 0]]
    wide = Condensed.from_dense(np.array([[0, 5.0, 0, 6]]), fan_in=3)
    assert wide.col_indices.tolist() == [[0, 1, 3]]
    with pytest.raises(FormatError, match=r"row 0 with 2 nonzeros.*fan_in=1.*project"):
        Condensed.from_dense(np.array([[0, 5.0, 0, 6]]), fan_in=1)


def test_nm_names_the_first_group_that_is_too_full() -> None:
    w = np.zeros((4, 8))
    w[2, 5:8] = 1
    with pytest.raises(FormatError, match=r"row 2, group 1 \(input 4 on\), with 3.*n=2.*project"):
        NM.from_dense(w, n=2, m=4)
    assert NM.from_dense(w, m=4).n == 3


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_are_kept(name: str) -> None:
    w = W.copy()
    w[1, 2], w[3, 4], w[5, 6] = np.nan, np.inf, -np.inf
    a = built(name, w)
    np.testing.assert_array_equal(a.to_dense(), w)
    assert a == a.copy()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
def test_dtype_is_kept(name: str, dtype: Any) -> None:
    a = built(name, W.astype(dtype))
    assert a.dtype == dtype
    assert a.to_dense().dtype == dtype
    np.testing.assert_array_equal(a.to_dense(), W.astype(dtype))
    assert a.astype("float32").dtype == np.float32
    assert a == a.copy()


@pytest.mark.parametrize("name", NAMES)
def test_strided_and_foreign_order_input_is_not_misread(name: str) -> None:
    base = np.zeros((20, 36), np.float32)
    base[::2, ::3] = W
    for w in (base[::2, ::3], np.asfortranarray(W), W[::-1][::-1], W.astype(">f4")):
        np.testing.assert_array_equal(built(name, w).to_dense(), W)
    a = built(name)
    parts = {k: np.repeat(v, 2, axis=-1)[..., ::2] for k, v in a.structure().items()}
    values = np.repeat(a.values, 2, axis=-1)[..., ::2]
    assert type(a)._from_parts(a.shape, parts, a.params(), values) == a


def test_mask_chooses_the_pattern() -> None:
    mask = W == 0
    a = CSR.from_dense(W, mask)
    assert a.nnz == mask.sum()
    assert not a.to_dense().any()


# ---- bad input ---------------------------------------------------------------------------------

CSR_OK: dict[str, Any] = {
    "shape": (2, 3),
    "indptr": [0, 2, 3],
    "col_indices": [0, 2, 1],
    "values": ones(3),
}
CONDENSED_OK: dict[str, Any] = {
    "shape": (3, 4),
    "row_indices": [0, 2],
    "col_indices": [[0, 3], [1, 2]],
    "values": ones(2, 2),
}
NM_OK: dict[str, Any] = {
    "shape": (2, 4),
    "n": 1,
    "m": 2,
    "col_indices": [[0, 3], [1, 2]],
    "values": ones(2, 2),
}
BLOCK_OK: dict[str, Any] = {
    "shape": (3, 4),
    "block_shape": (2, 2),
    "row_perm": [2, 0, 1],
    "group_ptr": [0, 3, 4],
    "col_indices": [3, 0, 1, 2],
    "values": ones(7),
}
HRBP_OK: dict[str, Any] = {
    "shape": (3, 2, 1, 3),
    "row_perm": [1, 0, 2],
    "row_ptr": [0, 2, 3],
    "channel_indices": [[0], [1]],
    "pattern_indices": [[0, 2], [1, 2]],
    "values": ones(6),
}

BAD: list[tuple[type[SparseTensor], dict[str, Any], dict[str, Any], str]] = [
    (CSR, CSR_OK, {"shape": (2, 3, 1)}, "rank 3"),
    (CSR, CSR_OK, {"shape": (2,)}, "rank 1"),
    (CSR, CSR_OK, {"shape": 5}, "sequence of 2 or 4"),
    (CSR, CSR_OK, {"shape": (2, -3)}, "sizes >= 0"),
    (CSR, CSR_OK, {"shape": (2, 2.5)}, "integers"),
    (CSR, CSR_OK, {"shape": (2, 2**31)}, "32 bits"),
    (CSR, CSR_OK, {"shape": (2, 2**16, 2**8, 2**8)}, "32 bits"),
    (CSR, CSR_OK, {"shape": (2, 2**40, 0, 1)}, "32 bits"),
    (CSR, CSR_OK, {"values": ones(2)}, r"values of shape \(2,\)"),
    (CSR, CSR_OK, {"values": ones(3, 1)}, r"values of shape \(3, 1\)"),
    (CSR, CSR_OK, {"values": np.arange(3)}, "values of dtype int64"),
    (CSR, CSR_OK, {"values": np.ones(3, complex)}, "dtype complex128"),
    (CSR, CSR_OK, {"values": np.ones(3, object)}, "dtype object"),
    (CSR, CSR_OK, {"values": [[1.0], [1.0, 2.0]]}, "rectangular"),
    (CSR, CSR_OK, {"values": np.ma.masked_array(ones(3), [1, 0, 0])}, "masked"),
    (CSR, CSR_OK, {"col_indices": [0.0, 2.0, 1.0]}, "col_indices of dtype float64"),
    (CSR, CSR_OK, {"col_indices": [True, False, True]}, "dtype bool"),
    (CSR, CSR_OK, {"col_indices": [[0, 2, 1]]}, "1 axes"),
    (CSR, CSR_OK, {"col_indices": [0, 3, 1]}, r"col_indices\[1\] = 3"),
    (CSR, CSR_OK, {"col_indices": [0, -1, 1]}, r"col_indices\[1\] = -1"),
    (CSR, CSR_OK, {"col_indices": [0, 2**32, 1]}, "fit int32"),
    (CSR, CSR_OK, {"col_indices": np.array([0, 2**63, 1], np.uint64)}, "fit int32"),
    (CSR, CSR_OK, {"col_indices": [2, 0, 1]}, r"2 before 0 in row 0 \(unsorted\)"),
    (CSR, CSR_OK, {"indptr": [0, 1, 3], "col_indices": [0, 1, 1]}, r"in row 1 \(a duplicate\)"),
    (CSR, CSR_OK, {"indptr": [0, 3]}, "indptr of length 2"),
    (CSR, CSR_OK, {"indptr": [1, 2, 3]}, r"indptr\[0\] = 1"),
    (CSR, CSR_OK, {"indptr": [0, 4, 3]}, "a fall at 1"),
    (CSR, CSR_OK, {"indptr": [0, 2, 4]}, "ends at 4"),
    (Condensed, CONDENSED_OK, {"row_indices": [0, 3]}, r"row_indices\[1\] = 3"),
    (Condensed, CONDENSED_OK, {"row_indices": [2, 0]}, "2 before 0"),
    (Condensed, CONDENSED_OK, {"row_indices": [2, 2]}, "duplicate"),
    (Condensed, CONDENSED_OK, {"row_indices": [0]}, r"col_indices of shape \(2, 2\)"),
    (Condensed, CONDENSED_OK, {"col_indices": [0, 1]}, "2 axes"),
    (Condensed, CONDENSED_OK, {"col_indices": [[0, 3], [2, 1]]}, "in active row 1"),
    (Condensed, CONDENSED_OK, {"col_indices": [[0, 3], [1, 4]]}, r"col_indices\[1, 1\] = 4"),
    (Condensed, CONDENSED_OK, {"values": ones(4)}, r"values of shape \(4,\)"),
    (Condensed, CONDENSED_OK, {"col_indices": [[0], [1, 2]]}, "col_indices that numpy cannot"),
    (
        Condensed,
        CONDENSED_OK,
        {"row_indices": [], "col_indices": np.zeros((0, 5), int), "values": np.zeros((0, 5))},
        "fan_in=5",
    ),
    (NM, NM_OK, {"n": 3}, "n=3"),
    (NM, NM_OK, {"m": 0}, "m=0"),
    (NM, NM_OK, {"n": -1}, "n=-1"),
    (NM, NM_OK, {"n": 1.5}, "an integer"),
    (NM, NM_OK, {"transposable": 2}, "transposable=2"),
    (NM, NM_OK, {"col_indices": [[0, 1], [1, 2]]}, "row 0, group 0"),
    (NM, NM_OK, {"col_indices": [[0, 3], [2, 3]]}, "row 1, group 0"),
    (NM, NM_OK, {"col_indices": [[0, 3, 4]] * 2}, r"shape \(2, 3\)"),
    (NM, NM_OK, {"col_indices": [[3, 0], [1, 2]]}, "unsorted"),
    (NM, NM_OK, {"col_indices": [[0, 4], [1, 2]]}, "= 4"),
    (NM, NM_OK, {"col_indices": [[0, 3], [0, 2]], "transposable": 1}, "column 0 of rows 0 to 1"),
    (ShuffledBlock, BLOCK_OK, {"block_shape": (0, 2)}, "block_rows=0"),
    (ShuffledBlock, BLOCK_OK, {"block_shape": 4}, r"two integers \(S1, S2\)"),
    (ShuffledBlock, BLOCK_OK, {"row_perm": [2, 0, 0]}, "row 0 2 times"),
    (ShuffledBlock, BLOCK_OK, {"row_perm": [2, 0]}, r"row_perm of shape \(2,\)"),
    (ShuffledBlock, BLOCK_OK, {"row_perm": [2, 0, 3]}, r"row_perm\[2\] = 3"),
    (ShuffledBlock, BLOCK_OK, {"group_ptr": [0, 4]}, "group_ptr of length 2"),
    (ShuffledBlock, BLOCK_OK, {"group_ptr": [0, 5, 4]}, "a fall"),
    (ShuffledBlock, BLOCK_OK, {"col_indices": [3, 0, 3, 2]}, "column 3 twice in group 0"),
    (ShuffledBlock, BLOCK_OK, {"col_indices": [3, 0, 4, 2]}, "= 4"),
    (ShuffledBlock, BLOCK_OK, {"values": ones(8)}, r"values of shape \(8,\)"),
    (HRBP, HRBP_OK, {"row_ptr": [0, 3, 3]}, "group 1 with 0 rows"),
    (HRBP, HRBP_OK, {"row_ptr": [0, 2, 2]}, "ends at 2"),
    (HRBP, HRBP_OK, {"row_ptr": []}, "row_ptr of length 0"),
    (HRBP, HRBP_OK, {"row_ptr": [[0], [1, 2]]}, "row_ptr that numpy cannot read"),
    (HRBP, HRBP_OK, {"row_ptr": [[0, 2, 3]]}, "1 axes"),
    (
        HRBP,
        HRBP_OK,
        {
            "shape": (0, 2, 1, 3),
            "row_perm": [],
            "row_ptr": [0],
            "channel_indices": np.zeros((0, 3), int),
            "pattern_indices": np.zeros((0, 3), int),
            "values": [],
        },
        "channels per group=3",
    ),
    (HRBP, HRBP_OK, {"row_perm": [1, 1, 2]}, "row 1 2 times"),
    (HRBP, HRBP_OK, {"channel_indices": [[0], [2]]}, "input channels"),
    (HRBP, HRBP_OK, {"channel_indices": [[0]]}, "one row for each of 2 groups"),
    (HRBP, HRBP_OK, {"pattern_indices": [[0, 3], [1, 2]]}, "kernel cells"),
    (HRBP, HRBP_OK, {"pattern_indices": [[0, 2], [2, 1]]}, "in group 1"),
    (HRBP, HRBP_OK, {"pattern_indices": np.zeros((2, 0), int)}, "both empty or neither"),
]


@pytest.mark.parametrize(("cls", "good", "change", "message"), BAD)
def test_bad_parts_are_refused(
    cls: Any, good: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    cls(**good).validate()
    before = copy.deepcopy(change)
    with pytest.raises(FormatError, match=message) as caught:
        cls(**{**good, **change})
    assert all(word in str(caught.value) for word in ("got ", "expected ", "fix: "))
    assert repr(before) == repr(change)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("w", "message"),
    [
        (np.ones(3, np.float32), "rank 1"),
        (np.ones((2, 3, 4), np.float32), "rank 3"),
        (np.ones((2, 3), np.int32), "w of dtype int32"),
        (np.ones((2, 3), bool), "w of dtype bool"),
        (np.ones((2, 3), complex), "w of dtype complex128"),
        (np.ma.masked_array(np.ones((2, 3)), np.eye(2, 3)), "masked"),
        (None, "dtype object"),
    ],
)
def test_bad_dense_weights_are_refused(name: str, w: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        FORMATS[name].from_dense(w)


@pytest.mark.parametrize("name", NAMES)
def test_bad_masks_are_refused(name: str) -> None:
    with pytest.raises(FormatError, match="mask of dtype float32"):
        FORMATS[name].from_dense(W, W)
    with pytest.raises(FormatError, match=r"mask of shape \(12, 10\)"):
        FORMATS[name].from_dense(W, W.T != 0)


@pytest.mark.parametrize(
    ("row_perm", "message"),
    [
        (np.arange(10.0), "row_perm of dtype float64"),
        (np.arange(10).reshape(2, 5), r"row_perm of shape \(2, 5\)"),
        (np.ma.masked_array(np.arange(10), np.arange(10) == 3), "masked"),
        (np.zeros(10, int), "row 0 10 times"),
        (np.arange(9), r"row_perm of shape \(9,\)"),
        (np.arange(10) - 1, r"row_perm\[0\] = -1"),
    ],
)
def test_bad_row_orders_are_refused(row_perm: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        ShuffledBlock.from_dense(W, row_perm=row_perm)
    with pytest.raises(FormatError, match=message):
        ShuffledBlock.from_scores(np.abs(W), 0.5, row_perm=row_perm)


def test_indices_may_be_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    a = HRBP(**{k: v if k == "shape" else torch.tensor(v) for k, v in HRBP_OK.items()})
    assert a == HRBP(**HRBP_OK)
    c = Condensed(**{k: v if k == "shape" else torch.tensor(v) for k, v in CONDENSED_OK.items()})
    assert c == Condensed(**CONDENSED_OK)


def test_parts_must_be_complete() -> None:
    a = built("csr")
    with pytest.raises(FormatError, match="arrays"):
        CSR._from_parts(a.shape, {"indptr": [0]}, {}, a.values)
    with pytest.raises(FormatError, match="parameters"):
        CSR._from_parts(a.shape, a.structure(), {"n": 1}, a.values)
    c = built("condensed")
    with pytest.raises(FormatError, match="fan_in"):
        Condensed._from_parts(c.shape, c.structure(), {"fan_in": 1}, c.values)


def test_huge_shapes_are_legal_until_made_dense() -> None:
    rows, cols = 2**20, 2**31 - 1
    a = CSR((rows, cols), np.zeros(rows + 1, int), np.zeros(0, int), np.zeros(0))
    assert a.nnz == 0
    b = Condensed((2**31 - 1, 2**31 - 1), [2**31 - 2], [[0, 2**31 - 2]], [[1.0, 2.0]])
    assert b.nnz == 2
    with pytest.raises(FormatError, match="can be addressed"):
        b.to_dense()


# ---- empty -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape", [(0, 0), (0, 5), (5, 0), (4, 6), (0, 2, 3, 3), (4, 0, 3, 3), (4, 2, 0, 3)]
)
def test_empty_weights_are_legal(name: str, shape: tuple[int, ...]) -> None:
    a = FORMATS[name].from_dense(np.zeros(shape, np.float32))
    assert (a.nnz, a.density, a.shape) == (0, 0.0, shape)
    assert a.to_dense().shape == a.mask().shape == shape
    assert a.layout().nnz == 0
    assert a.copy() == a
    assert type(a).__name__ in repr(a)
    a.validate()
