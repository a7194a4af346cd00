"""convert: exact between all forms, or an error; never lossy in silence."""

from __future__ import annotations

import itertools
import logging
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from format_cases import tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from spfmt import FormatError, convert
from spfmt.formats import CSR, FORMATS, HRBP, NM, Condensed, ShuffledBlock, SparseTensor

NEIGHBOURS = [
    "dense",
    "scipy_csr",
    "scipy_bsr",
    "scipy_coo",
    "torch_dense",
    "torch_csr",
    "torch_bsr",
    "torch_coo",
]
FORMS = [*FORMATS, *NEIGHBOURS]
SPARSE = [form for form in NEIGHBOURS if not form.endswith("dense")]
OPTIONS: dict[str, dict[str, Any]] = {"nm": {"m": 4}, "shuffled_block": {"block_shape": (1, 2)}}


def dense(a: Any) -> np.ndarray:
    """Dense matrix of any form, without convert."""
    if isinstance(a, torch.Tensor):
        return a.to_dense().numpy()
    if isinstance(a, SparseTensor):
        return a.to_dense()
    return a.toarray() if sp.issparse(a) else a


def weight(rows: int, cols: int, seed: int = 0, density: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, cols)) * (rng.random((rows, cols)) < density)
    return w.astype(np.float32)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FORMS, FORMS)))
def test_all_pairs_keep_every_value(source: str, target: str) -> None:
    for rows, cols in ((6, 9), (1, 1), (0, 4), (4, 0), (8, 5)):
        w = weight(rows, cols)
        a = convert(w, source, max_padding=None, **OPTIONS.get(source, {}))
        b, report = convert(
            a, target, max_padding=None, return_report=True, **OPTIONS.get(target, {})
        )
        np.testing.assert_array_equal(dense(b), w)
        assert (report.source, report.target) == (source, target)
        assert report.padding >= 0
        np.testing.assert_array_equal(convert(b, "dense"), w)


@given(a=tensors(), target=st.sampled_from(FORMS))
@settings(max_examples=120, deadline=None)
def test_any_tensor_to_any_form_and_back(a: SparseTensor, target: str) -> None:
    if target.startswith("scipy") and a.dtype == np.float16:
        a = a.astype("float32")
    options = dict(OPTIONS.get(target, {}))
    b, report = convert(a, target, max_padding=None, return_report=True, **options)
    back = convert(b, "csr", shape=a.shape)
    assert report.nnz_in == a.nnz
    np.testing.assert_array_equal(back.to_dense(), a.to_dense())
    if target in SPARSE:
        assert report.padding == 0
        np.testing.assert_array_equal(back.mask(), a.mask())  # stored zeros survive
    elif target in FORMATS:
        assert b.nnz == report.nnz_out
        assert not (b.mask() < a.mask()).any()


@pytest.mark.parametrize("form", ["csr", *SPARSE])
def test_stored_zeros_are_part_of_the_pattern(form: str) -> None:
    a = CSR((2, 4), [0, 2, 3], [0, 3, 1], np.array([0.0, 1.0, 0.0], np.float32))
    b = convert(a, form)
    assert convert(b, CSR) == a
    condensed = convert(b, "condensed")
    assert condensed.row_indices.tolist() == [0, 1]
    assert condensed.mask()[a.mask()].all()


def test_blocks_of_bsr_are_the_pattern() -> None:
    w = np.zeros((4, 6), np.float32)
    w[1, 2] = 1
    for form in ("scipy_bsr", "torch_bsr"):
        b, report = convert(w, form, blocksize=(2, 3), max_padding=5, return_report=True)
        assert report.padding == 5
        assert b.values().shape[1:] == (2, 3) if form == "torch_bsr" else b.blocksize == (2, 3)
        assert convert(b, "csr").nnz == 6
        with pytest.raises(FormatError, match=r"blocksize \(3, 3\).*divides"):
            convert(w, form, blocksize=(3, 3))
        with pytest.raises(FormatError, match="5 padding zeros"):
            convert(w, form, blocksize=(2, 3))
        for bad in (3, (0, 1), (1, 2, 3), (1.5, 2)):
            with pytest.raises(FormatError, match="blocksize"):
                convert(w, form, blocksize=bad)


def test_more_scipy_and_torch_layouts_are_read() -> None:
    w = weight(6, 8)
    for kind in ("csc", "lil", "dok", "csr", "coo", "bsr"):
        np.testing.assert_array_equal(convert(sp.csr_matrix(w).asformat(kind), "csr").to_dense(), w)
        array = sp.csr_array(w).asformat(kind)
        np.testing.assert_array_equal(convert(array, "csr").to_dense(), w)
    tensor = torch.from_numpy(w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        others = [
            tensor.to_sparse_csc(),
            tensor.to_sparse_bsc((2, 4)),
            tensor.to_sparse_bsr((3, 2)),
        ]
    for other in others:
        np.testing.assert_array_equal(convert(other, "csr").to_dense(), w)
    np.testing.assert_array_equal(convert(tensor.T, "csr").to_dense(), w.T)
    parameter = torch.nn.Parameter(tensor)
    np.testing.assert_array_equal(convert(parameter, "csr").to_dense(), w)


def test_duplicates_and_unsorted_indices_of_scipy_and_torch() -> None:
    rows, cols = np.array([1, 0, 1]), np.array([2, 1, 2])
    values = np.array([1.0, 2.0, 3.0], np.float32)
    expected = np.array([[0, 2, 0], [0, 0, 4]], np.float32)
    coo = sp.coo_array((values, (rows, cols)), shape=(2, 3))
    np.testing.assert_array_equal(convert(coo, "csr").to_dense(), expected)
    assert coo.nnz == 3
    tensor = torch.sparse_coo_tensor(
        torch.tensor(np.stack([rows, cols])), torch.tensor(values), (2, 3), check_invariants=True
    )
    np.testing.assert_array_equal(convert(tensor, "csr").to_dense(), expected)
    unsorted = sp.csr_array((values, [2, 0, 1], [0, 2, 3]), shape=(2, 3))
    np.testing.assert_array_equal(convert(unsorted, "csr").to_dense(), [[2, 0, 1], [0, 3, 0]])
    assert unsorted.indices.tolist() == [2, 0, 1]


def buffers(a: Any) -> list[np.ndarray]:
    """Arrays that hold the values of any form."""
    if isinstance(a, SparseTensor):
        return [a.values]
    if isinstance(a, torch.Tensor):
        return [(a if a.layout == torch.strided else a.values()).numpy()]
    return [a.data if sp.issparse(a) else a]


@pytest.mark.parametrize(("source", "target"), list(itertools.product(FORMS, FORMS)))
def test_no_result_changes_with_its_source(source: str, target: str) -> None:
    a = convert(weight(5, 6), source, max_padding=None, **OPTIONS.get(source, {}))
    b = convert(a, target, max_padding=None, **OPTIONS.get(target, {}))
    if isinstance(a, SparseTensor) and isinstance(b, SparseTensor):
        return  # immutable, so they may share
    assert not any(np.shares_memory(x, y) for x in buffers(a) for y in buffers(b))


def test_a_list_becomes_an_array_and_a_parameter_a_plain_tensor() -> None:
    assert convert([[1.0, 0.0]], "dense").tolist() == [[1.0, 0.0]]
    plain = convert(torch.nn.Parameter(torch.eye(2)), "torch_dense")
    assert not plain.requires_grad
    assert convert(torch.eye(4)[::2, ::2].requires_grad_(), "csr").nnz == 2


# ---- exact where it can be, else an error ------------------------------------------------------


def test_errors_name_the_place_and_the_way_out() -> None:
    w = np.zeros((6, 8), np.float32)
    w[3, 4:7] = 1
    with pytest.raises(FormatError, match=r"row 3, group 1.*fix: .*project"):
        convert(w, "nm", n=2, m=4)
    with pytest.raises(FormatError, match=r"row 3 with 3 nonzeros.*project"):
        convert(w, "condensed", fan_in=2)
    with pytest.raises(FormatError, match=r"9 padding zeros for 3.*\(9\) in group 0.*project"):
        convert(w, "shuffled_block", block_shape=(4, 2), row_perm=[0, 1, 2, 3, 4, 5])
    with pytest.raises(FormatError, match=r"30 padding zeros for 6.*in group 0.*project"):
        convert(np.eye(6), "hrbp", groups=1)


def test_padding_is_reported_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    w = np.array([[1.0, 2, 0], [0, 3, 0]])
    with caplog.at_level(logging.INFO, logger="spfmt"):
        a, report = convert(w, Condensed, return_report=True)
    assert (report.nnz_in, report.nnz_out, report.padding) == (3, 4, 1)
    assert "dense to condensed: 1 stored zeros added" in caplog.text
    np.testing.assert_array_equal(a.to_dense(), w)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="spfmt"):
        assert convert(w, CSR, return_report=True)[1].padding == 0
    assert not caplog.records
    with pytest.raises(FormatError, match=r"1 padding zeros.*in row 1"):
        convert(w, Condensed, max_padding=0.1)


def test_structured_weights_convert_without_padding() -> None:
    rng = np.random.default_rng(5)
    cols = np.concatenate([rng.permutation(20)[:6] for _ in range(3)])
    block = ShuffledBlock((12, 20), (4, 2), rng.permutation(12), [0, 6, 12, 18], cols, np.ones(72))
    for target in ("condensed", "csr", "hrbp", "shuffled_block", "scipy_coo"):
        options = {"block_shape": (4, 2)} if target == "shuffled_block" else {}
        b, report = convert(block, target, max_padding=0, return_report=True, **options)
        assert report.padding == 0
        np.testing.assert_array_equal(dense(b), block.to_dense())
    hrbp = convert(block, HRBP)
    assert hrbp.groups == 3
    assert convert(hrbp, "shuffled_block", block_shape=(2, 3), max_padding=0).nnz == 72
    full = convert(convert(block, "condensed"), NM, m=20, max_padding=0)
    assert (full.n, full.m) == (6, 20)


def test_the_same_format_is_returned_as_it_is() -> None:
    a = CSR.from_dense(weight(4, 5))
    assert convert(a, "csr") is a
    assert convert(a, CSR, return_report=True)[1].padding == 0


def test_shape_reads_a_matrix_as_a_convolution() -> None:
    w = weight(4, 18).reshape(4, 2, 3, 3)
    a = convert(w, "csr")
    matrix = convert(a, "scipy_csr")
    assert matrix.shape == (4, 18)
    b = convert(matrix, "hrbp", shape=w.shape, max_padding=None)
    np.testing.assert_array_equal(b.to_dense(), w)
    assert convert(a, "csr", shape=(4, 18)).shape == (4, 18)
    assert convert(a, "torch_dense").shape == w.shape
    with pytest.raises(FormatError, match="a matrix of"):
        convert(a, "csr", shape=(4, 3, 3, 3))


# ---- dtypes and bad input ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype: str) -> None:
    resolved = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    w = weight(4, 6).astype(resolved)
    for form in ("torch_dense", "torch_csr", "torch_coo", "torch_bsr"):
        tensor = convert(w, form)
        assert tensor.dtype == getattr(torch, dtype)
        back = convert(tensor, "csr")
        assert back.dtype == resolved
        np.testing.assert_array_equal(back.to_dense(), w)
    for form in ("scipy_csr", "scipy_coo", "scipy_bsr"):
        if dtype in ("float32", "float64"):
            assert convert(w, form).dtype == resolved
        else:
            with pytest.raises(FormatError, match=f"dtype {dtype}.*astype"):
                convert(w, form)


def test_nan_and_infinity_survive() -> None:
    w = weight(4, 6)
    w[0, 0], w[1, 1] = np.nan, -np.inf
    for form in FORMS:
        a = convert(w, form, max_padding=None, **OPTIONS.get(form, {}))
        np.testing.assert_array_equal(convert(a, "dense"), w)


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (np.ones((2, 2), int), "dtype int64"),
        (sp.csr_array(np.ones((2, 2), int)), "dtype int64"),
        (torch.ones(2, 2, dtype=torch.int32), "dtype int32"),
        (torch.ones(2, 2, dtype=torch.bool), "dtype bool"),
        (torch.ones(2, 2, dtype=torch.complex64), "dtype complex64"),
        (torch.ones(3), "rank 1"),
        (np.ones((2, 2, 2)), "rank 3"),
        (torch.ones(2, 2, 2).to_sparse(), "rank 3"),
        (torch.ones(2, 2).to_sparse(1), "1 sparse axes"),
        (torch.ones(2, 3, 2, 2).to_sparse(2), "2 dense ones"),
        (torch.ones(2, 2, device="meta"), "on the meta device"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "dtype float8"),
        (torch.ones(2, 2).to_mkldnn(), "layout strided"),
        (sp.coo_array(np.ones(3)), "two axes"),
        ("text", "dtype <U4"),
    ],
)
def test_bad_sources_are_refused(a: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        convert(a, "csr")


def test_broken_scipy_arrays_are_refused() -> None:
    a = sp.csr_array(weight(3, 4))
    a.indices[0] = 9
    with pytest.raises(FormatError, match="broken scipy csr"):
        convert(a, "csr")
    b = sp.coo_array(weight(3, 4))
    b.coords[1][0] = 9
    with pytest.raises(FormatError, match="broken scipy coo"):
        convert(b, "csr")


def raw(layout: str, pointer: Any, plain: Any, values: Any, shape: Any) -> torch.Tensor:
    """A compressed torch tensor whose indices nobody has checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_compressed_tensor(
            torch.tensor(pointer),
            torch.tensor(plain, dtype=torch.int64),
            values,
            shape,
            layout=getattr(torch, layout),
            check_invariants=False,
        )


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("sparse_csr", [0, 1, 1], [2], torch.ones(1), (2, 2)), r"plain indices\[0\] = 2"),
        (("sparse_csr", [0, 1, 1], [-1], torch.ones(1), (2, 2)), r"plain indices\[0\] = -1"),
        (("sparse_csr", [0, 5, 1], [0], torch.ones(1), (2, 2)), "a fall at 1"),
        (("sparse_csr", [0, 1, 1], [0], torch.ones(3), (2, 2)), "3 values or blocks for 1"),
        (("sparse_csr", [0, 2, 2], [1, 1], torch.ones(2), (2, 2)), "two entries at row 0"),
        (("sparse_csc", [0, 1, 1], [7], torch.ones(1), (5, 2)), r"plain indices\[0\] = 7"),
        # 4 columns per block times this block index is 0 modulo 2**64.
        (("sparse_bsr", [0, 1, 1], [2**62], torch.ones(1, 2, 4), (4, 8)), "number of blocks"),
        (("sparse_bsr", [0, 1, 1], [0], torch.ones(1, 2, 4), (5, 8)), "divides the matrix"),
        (("sparse_bsr", [0, 0], [], torch.ones(0, 0, 4), (0, 8)), "divides the matrix"),
    ],
)
def test_broken_torch_tensors_are_refused(parts: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        convert(raw(*parts), "csr")


def test_coalescing_hides_no_index_out_of_range() -> None:
    # Flattened in a matrix of three columns, (1, -1) is (0, 2).
    indices, values = torch.tensor([[1, 0], [-1, 2]]), torch.ones(2)
    a = torch.sparse_coo_tensor(indices, values, (2, 3), check_invariants=False)
    with pytest.raises(FormatError, match=r"column indices\[0\] = -1"):
        convert(a, "csr")


def test_the_limit_of_padding_is_a_number() -> None:
    for bad in ("a", -1, float("nan"), [1]):
        with pytest.raises(FormatError, match="max_padding"):
            convert(weight(3, 4), "csr", max_padding=bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["condensed", "hrbp"])
def test_one_long_row_is_named_before_it_takes_all_memory(target: str) -> None:
    size, long = 2**20, 77
    rows = np.sort(np.append(np.arange(size), np.full(size - 1, long)))
    indptr = np.searchsorted(rows, np.arange(size + 1))
    cols = np.where(rows == long, np.cumsum(rows == long) - 1, 0)
    a = CSR((size, size), indptr, cols, np.ones(rows.size, np.float32))
    with pytest.raises(FormatError, match=rf"padding zeros.*\(row {long} is the longest\)"):
        convert(a, target)


def test_rows_of_millions_of_columns_are_grouped_without_a_table() -> None:
    a = CSR((2, 2**31 - 1), [0, 1, 2], [5, 2**31 - 2], np.ones(2))
    b = convert(a, "shuffled_block", block_shape=(1, 1))
    assert b.col_indices.tolist() == [5, 2**31 - 2]


def test_bad_targets_and_parameters_are_refused() -> None:
    w = weight(3, 4)
    with pytest.raises(FormatError, match=r"'ell'.*condensed.*torch_coo"):
        convert(w, "ell")
    with pytest.raises(FormatError, match="format 3"):
        convert(w, 3)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="'fan_in' for csr"):
        convert(w, "csr", fan_in=3)
    with pytest.raises(FormatError, match="'blocksize' for dense"):
        convert(w, "dense", blocksize=(1, 1))
    with pytest.raises(FormatError, match="rank 3"):
        convert(w, "csr", shape=(3, 4, 1))


@pytest.mark.parametrize("kernel", [(), (2, 3)])
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 40), s1=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_arbitrary_patterns_are_covered_by_groups(
    kernel: tuple[int, ...], seed: int, rows: int, s1: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (rows, 7, *kernel)
    w = np.where(rng.random(shape) < 0.2, rng.standard_normal(shape), 0)
    targets: list[tuple[str, dict[str, Any]]] = [
        ("shuffled_block", {"block_shape": (s1, 3)}),
        ("hrbp", {}),
        ("hrbp", {"groups": int(rng.integers(1, rows + 1))}),
    ]
    for target, options in targets:
        b = convert(w, target, max_padding=None, **options)
        np.testing.assert_array_equal(b.to_dense(), w)
