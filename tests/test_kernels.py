"""Every row of the kernel table against float64, at odd sizes, strides and batches."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product as product_of
from pathlib import Path

import numpy as np
import pytest
from format_cases import LAYOUTS, MAKERS, variants
from fresh_python import run_python

import spfmt
from spfmt.cost import forced
from spfmt.dispatch import CONVOLUTIONS, OPS

SHAPES = [(1, 1), (15, 31), (16, 32), (17, 33), (5, 70), (100, 257), (33, 300), (0, 5), (5, 0)]
CONV_SHAPES = [(7, 5, 3, 3), (20, 33, 1, 2)]
BATCHES = [0, 1, 2, 3, 5, 15, 16, 17, 48, 63, 65, 130, 530]  # the last needs two strips
FORMATS = sorted(MAKERS)

ROWS = [
    pytest.param(
        k,
        id=f"{k.op}-{k.layout}-{k.dtype}-{k.isa}",
        marks=[] if k.available else pytest.mark.skip(reason=k.reason),
    )
    for k in spfmt.kernels()
    if k.op in OPS
]


def tensor(name: str, shape: tuple[int, ...], dtype: str, seed: int = 0) -> spfmt.SparseTensor:
    rng = np.random.default_rng([seed, *shape])
    return MAKERS[LAYOUTS.get(name, name)](shape, rng).astype(dtype)


def guarded(rows: int, cols: int, order: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """A NaN-filled frame and the (rows, cols) window in it that a kernel may write."""
    if order == "batch_first":
        frame = np.full((cols + 2, rows + 2), np.nan, dtype)
        return frame, frame[1:-1, 1:-1].T
    if order == "features_first":
        frame = np.full((rows + 2, cols + 2), np.nan, dtype)
        return frame, frame[1:-1, 1:-1]
    frame = np.full((2 * rows + 1, 2 * cols + 1), np.nan, dtype)
    window = frame[: 2 * rows : 2, : 2 * cols : 2]
    return frame, window[::-1] if order == "reversed" else window


def operand(rows: int, cols: int, order: str, dtype: str, rng: np.random.Generator) -> np.ndarray:
    _, window = guarded(rows, cols, order, dtype)
    window[...] = rng.standard_normal((rows, cols))
    return window


def check(got: np.ndarray, want: np.ndarray, size: np.ndarray, terms: int) -> None:
    """|got - want| within the rounding bound of a sum of `terms` products of total size `size`."""
    bound = (terms + 2) * np.finfo(got.dtype).eps * size
    assert (np.abs(got - want) <= bound).all()
    assert got.shape == want.shape


ORDERS = ["features_first", "batch_first", "strided", "reversed"]
Case = tuple[int, str, str]


def compare(kernel: spfmt.Kernel, shape: tuple[int, ...], cases: Iterable[Case]) -> None:
    """The kernel's products, by every variant, for (batch, order, order of the output)."""
    a = tensor(kernel.layout, shape, kernel.dtype)
    dense = a.to_dense().reshape(a.matrix_shape).astype(np.float64)
    rng = np.random.default_rng(1)
    for batch, order, out_order in cases:
        x = operand(dense.shape[1], batch, order, kernel.dtype, rng)
        dy = operand(dense.shape[0], batch, order, kernel.dtype, rng)
        if kernel.op == "sddmm":
            got = spfmt.sddmm(a, dy, x, backend=kernel.isa).reshape(-1)
            at = a.layout().coordinates()
            want, size = (dy.astype(float) @ x.T.astype(float))[at], (abs(dy) @ abs(x).T)[at]
            check(got, want, size, batch)
            continue
        weight, right = (dense, x) if kernel.op == "spmm" else (dense.T, dy)
        product = spfmt.spmm if kernel.op == "spmm" else spfmt.spmm_t
        for variant in variants(kernel.layout, kernel.op, batch):
            frame, out = guarded(weight.shape[0], batch, out_order, kernel.dtype)
            with forced(variant):
                assert product(a, right, out=out, backend=kernel.isa) is out
            check(out, weight @ right, abs(weight) @ abs(right), weight.shape[1])
            assert np.isnan(frame).sum() == frame.size - out.size, "wrote outside of the output"


@pytest.mark.parametrize("shape", [*SHAPES, *CONV_SHAPES], ids=str)
@pytest.mark.parametrize("kernel", ROWS)
def test_against_float64(kernel: spfmt.Kernel, shape: tuple[int, ...]) -> None:
    orders = [(ORDERS[i % 4], ORDERS[(i + i // 4) % 4]) for i in range(len(BATCHES))]
    compare(kernel, shape, [(b, *pair) for b, pair in zip(BATCHES, orders, strict=True)])


@pytest.mark.full
@pytest.mark.parametrize("shape", [*SHAPES, *CONV_SHAPES, (257, 530), (64, 4200)], ids=str)
@pytest.mark.parametrize("kernel", ROWS)
def test_every_batch_and_order(kernel: spfmt.Kernel, shape: tuple[int, ...]) -> None:
    pairs = product_of([*range(67), 130, 530], range(4))
    compare(kernel, shape, [(b, ORDERS[i], ORDERS[(i + b) % 4]) for b, i in pairs])


@pytest.mark.parametrize("kernel", [p for p in ROWS if p.values[0].op == "spmm"])
def test_bias_vector_and_batch_first(kernel: spfmt.Kernel) -> None:
    a = tensor(kernel.layout, (37, 45), kernel.dtype, 3)
    rng = np.random.default_rng(2)
    bias = rng.standard_normal(37).astype(kernel.dtype)
    for batch in (1, 4, 20, 70):
        x = rng.standard_normal((batch, 45)).astype(kernel.dtype)
        want = spfmt.spmm(a, x.T, bias=bias, backend="reference").T
        got = spfmt.spmm(a, x, bias=bias, batch_first=True, backend=kernel.isa)
        assert got.flags.c_contiguous
        size = abs(x) @ abs(a.to_dense()).T + abs(bias)
        check(got, want, size, 46)
        single = spfmt.spmm(a, x[0], bias=bias, backend=kernel.isa)
        check(single, want[0], size[0], 46)


@pytest.mark.parametrize("kernel", [p for p in ROWS if p.values[0].dtype == "float32"])
def test_threads_do_not_change_a_bit(kernel: spfmt.Kernel) -> None:
    a = tensor(kernel.layout, (300, 280), "float32", 4)
    rng = np.random.default_rng(5)
    for batch in (3, 6, 40, 150, 700):
        x = rng.standard_normal((batch, 280)).astype("float32")
        dy = rng.standard_normal((batch, 300)).astype("float32")
        results = []
        for n in (1, 2, 3, 8):
            spfmt.set_num_threads(n)
            if kernel.op == "sddmm":
                results.append(spfmt.sddmm(a, dy, x, batch_first=True, backend=kernel.isa))
            else:
                product, right = (
                    (spfmt.spmm, x) if kernel.op == "spmm" else (spfmt.spmm_t, dy)
                )  # fmt: skip
                found = []
                for variant in variants(kernel.layout, kernel.op, batch):
                    with forced(variant):
                        found.append(product(a, right, batch_first=True, backend=kernel.isa))
                results.append(np.stack(found))
        for other in results[1:]:
            np.testing.assert_array_equal(results[0], other)


@pytest.fixture(autouse=True)
def _default_threads():
    yield
    spfmt.set_num_threads(None)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kernel", [p for p in ROWS if p.values[0].op != "sddmm"])
def test_padding_never_meets_infinities(kernel: spfmt.Kernel, value: float) -> None:
    """An output depends only on the inputs that its structure names: 0 * inf must not appear."""
    a = tensor(kernel.layout, (50, 90), kernel.dtype, 6)
    mask = a.mask() if kernel.op == "spmm" else a.mask().T
    product = spfmt.spmm if kernel.op == "spmm" else spfmt.spmm_t
    for batch, feature in product_of((1, 3, 20), (0, 7, 32, mask.shape[1] - 1)):
        x = np.ones((mask.shape[1], batch), kernel.dtype)
        x[feature, 0] = value  # padding looks at the first feature of its chunk of 32
        for variant in variants(kernel.layout, kernel.op, batch):
            with forced(variant):
                got = product(a, x, backend=kernel.isa)
            np.testing.assert_array_equal(np.isfinite(got[:, 0]), ~mask[:, feature])
            assert np.isfinite(got[:, 1:]).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_may_have_spare_capacity(name: str) -> None:
    a = tensor(name, (40, 30), "float32", 7)
    rng = np.random.default_rng(8)
    x, dy = (rng.standard_normal((n, 5)).astype("float32") for n in (30, 40))
    longer = np.append(a.values.reshape(-1), np.full(9, np.nan, "float32"))
    np.testing.assert_array_equal(a.plan.spmm(longer, x), spfmt.spmm(a, x))
    np.testing.assert_array_equal(a.plan.spmm_t(longer, dy), spfmt.spmm_t(a, dy))
    gradient = a.plan.sddmm(dy, x, out=np.full(a.nnz + 9, np.nan, "float32"))
    np.testing.assert_array_equal(gradient[: a.nnz], spfmt.sddmm(a, dy, x).reshape(-1))
    assert (gradient[a.nnz :] == 0).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_new_values_on_the_same_structure(name: str) -> None:
    """Packed copies of values belong to the tensor they were made from."""
    a = tensor(name, (40, 30), "float32", 9)
    b = a.with_values(2 * a.values)
    x, dy = np.ones((30, 2), "float32"), np.ones((40, 2), "float32")
    for _ in range(2):
        np.testing.assert_array_equal(2 * spfmt.spmm(a, x), spfmt.spmm(b, x))
        np.testing.assert_array_equal(2 * spfmt.spmm_t(a, dy), spfmt.spmm_t(b, dy))


@pytest.mark.parametrize("name", LAYOUTS)
def test_changing_values_are_multiplied_as_they_are(name: str) -> None:
    """Whoever writes them, and however little: every single one, between any two products."""
    a = tensor(name, (40, 30), "float32", 9)
    values = a.values.copy().reshape(-1)
    for batch, op in product_of((1, 2, 20), ("spmm", "spmm_t")):
        x = np.ones((30 if op == "spmm" else 40, batch), "float32")
        dense = a.to_dense() if op == "spmm" else a.to_dense().T
        for variant in variants(name, op, batch):
            with forced(variant):
                product = getattr(a.plan, op)
                before = product(values, x)
                for place in range(0, a.nnz, 7):
                    values[place] += 64.0
                    after = product(values, x)
                    values[place] -= 64.0
                    row, col = (int(i[place]) for i in a.layout().coordinates())
                    changed = np.flatnonzero(abs(after[:, 0] - before[:, 0]) > 1)
                    np.testing.assert_array_equal(changed, row if op == "spmm" else col)
                check(product(values, x), dense @ x, abs(dense) @ abs(x), dense.shape[1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_promise_of_constant_values_is_taken_at_its_word(name: str) -> None:
    a = tensor(name, (40, 30), "float32", 9)
    values, x = a.values.copy().reshape(-1), np.ones((30, 2), "float32")
    first = spfmt.formats.new_version()
    one = a.plan.spmm(values, x, constant=first)
    np.testing.assert_array_equal(a.plan.spmm(values, x, constant=first), one)
    values *= 2
    second = a.plan.spmm(values, x, constant=spfmt.formats.new_version())
    np.testing.assert_array_equal(second, 2 * one)
    np.testing.assert_array_equal(a.plan.spmm(values, x), 2 * one)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_lowers_to_a_layout_that_kernels_read(name: str) -> None:
    a = tensor(name, (37, 45), "float32", 3)
    x = np.random.default_rng(4).standard_normal((45, 6)).astype("float32")
    dense = a.to_dense().astype(float)
    check(spfmt.spmm(a, x), dense @ x, abs(dense) @ abs(x), 45)


def csr(mask: np.ndarray, dtype: str) -> spfmt.CSR:
    rng = np.random.default_rng(12)
    return spfmt.CSR.from_dense(rng.standard_normal(mask.shape).astype(dtype), mask)


BLOCK_PRODUCTS = [
    p for p in ROWS if p.values[0].layout == "groups" and p.values[0].op in ("spmm", "spmm_t")
]


@pytest.mark.parametrize(("block_rows", "cols"), [(4, 90), (8, 90), (13, 90), (24, 2000)])
@pytest.mark.parametrize("kernel", [p for p in BLOCK_PRODUCTS if p.values[0].op == "spmm"])
def test_blocks_of_every_small_batch(kernel: spfmt.Kernel, block_rows: int, cols: int) -> None:
    """1 to 16 samples from and to every layout: rows go out one by one or four samples wide.

    Several samples of 2000 features do not fit L1 and are copied side by side first.
    """
    rng = np.random.default_rng(block_rows)
    scores = rng.random((71, cols))
    a = spfmt.ShuffledBlock.from_scores(
        scores,
        0.3,
        block_shape=(block_rows, 3),
        row_perm=rng.permutation(71),
        values=scores - 0.5,
    ).astype(kernel.dtype)
    dense = a.to_dense().astype(float)
    bias = rng.standard_normal(71).astype(kernel.dtype)
    for batch, i in product_of(range(1, 17), range(4)):
        order, out_order = ORDERS[(i + batch // 4) % 4], ORDERS[i]
        x = operand(cols, batch, order, kernel.dtype, rng)
        frame, out = guarded(71, batch, out_order, kernel.dtype)
        with forced("bands"):
            spfmt.spmm(a, x, bias=bias, out=out, backend=kernel.isa)
            active = spfmt.spmm(a, x, bias=bias, activation="relu", backend=kernel.isa)
        np.testing.assert_array_equal(active, np.maximum(out, 0))
        shift = bias[:, None].astype(float)
        check(out, dense @ x + shift, abs(dense) @ abs(x) + abs(shift), cols + 1)
        assert np.isnan(frame).sum() == frame.size - out.size, "wrote outside of the output"


@pytest.mark.parametrize("cols", [95, 97, 1000, 4200])
@pytest.mark.parametrize("kernel", BLOCK_PRODUCTS)
def test_bands_take_many_columns_in_parts(kernel: spfmt.Kernel, cols: int) -> None:
    """Wide bands are split where L1 would not hold them; 64 samples of 4200 columns exceed L2."""
    rng = np.random.default_rng(cols)
    widths = [cols, 0, cols * 2 // 3]
    pointer = np.append(0, np.cumsum(widths))
    columns = np.concatenate([rng.permutation(cols)[:n] for n in widths])
    values = rng.standard_normal(np.dot([16, 16, 5], widths)).astype(kernel.dtype)
    a = spfmt.ShuffledBlock((37, cols), (16, 1), rng.permutation(37), pointer, columns, values)
    forward = kernel.op == "spmm"
    dense = a.to_dense().astype(float) if forward else a.to_dense().astype(float).T
    for batch, order in product_of((16, 40, 64, 130), ("features_first", "batch_first")):
        x = operand(dense.shape[1], batch, order, kernel.dtype, rng)
        frame, out = guarded(dense.shape[0], batch, order, kernel.dtype)
        bias = rng.standard_normal(37).astype(kernel.dtype) if forward else None
        with forced("panels"):
            if forward:
                spfmt.spmm(a, x, bias=bias, out=out, backend=kernel.isa)
            else:
                spfmt.spmm_t(a, x, out=out, backend=kernel.isa)
        shift = 0 if bias is None else bias[:, None].astype(float)
        check(out, dense @ x + shift, abs(dense) @ abs(x) + abs(shift), dense.shape[1])
        assert np.isnan(frame).sum() == frame.size - out.size, "wrote outside of the output"


LISTS_SPMM = [p for p in ROWS if (p.values[0].op, p.values[0].layout) == ("spmm", "lists")]


@pytest.mark.parametrize("regular", [False, True])
@pytest.mark.parametrize("per_window", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel", LISTS_SPMM)
def test_every_small_batch(kernel: spfmt.Kernel, per_window: int, regular: bool) -> None:
    """1 to 16 samples meet every number of steps per record and of samples per pass."""
    rng = np.random.default_rng(per_window)
    scores = rng.random((39, 210))  # 210 columns: the last window is cut short
    if regular:
        a = spfmt.NM.from_scores(scores, n=per_window, m=32, values=scores - 0.5)
    else:
        mask = scores < per_window / 32
        mask[[3, 20]] = [[False], [True]]  # an empty row beside a full one
        a = csr(mask, "float64")
    a = a.astype(kernel.dtype)
    dense = a.to_dense().astype(np.float64)
    for batch, variant in product_of(range(1, 17), variants("lists", "spmm", 1)):
        order = ORDERS[batch % 4]
        x = operand(210, batch, order, kernel.dtype, rng)
        frame, out = guarded(39, batch, ORDERS[batch // 5], kernel.dtype)
        bias = rng.standard_normal(39).astype(kernel.dtype) if batch % 2 else None
        with forced(variant):
            spfmt.spmm(a, x, bias=bias, out=out, backend=kernel.isa)
        shift = 0 if bias is None else bias[:, None].astype(np.float64)
        check(out, dense @ x + shift, abs(dense) @ abs(x) + abs(shift), 211)
        assert np.isnan(frame).sum() == frame.size - out.size, "wrote outside of the output"


def test_structure_too_large_for_caches() -> None:
    """More than two million nonzeros take wide windows where the level has them."""
    rows, cols, fan_in = 70_000, 300, 32
    rng = np.random.default_rng(16)
    # At random: columns at equal distances fill windows of 32 so evenly that none of 64 would pay.
    order = rng.random((rows, cols), dtype=np.float32).argpartition(fan_in, axis=1)
    columns = np.sort(order[:, :fan_in], axis=1)
    values = rng.standard_normal((rows, fan_in)).astype("float32")
    a = spfmt.Condensed((rows, cols), np.arange(rows), columns, values)
    for kernel in spfmt.kernels(op="spmm", layout="lists", dtype="float32"):
        for batch in (1, 2, 3, 8) if kernel.available else ():
            x = rng.standard_normal((batch, cols)).astype("float32")
            terms = values.astype(np.float64) * x[:, columns]
            with forced("lookup"):
                got = spfmt.spmm(a, x, batch_first=True, backend=kernel.isa)
            check(got, terms.sum(2), abs(terms).sum(2), fan_in)
        x = np.ones(cols, "float32")
        x[[0, 40, 299]] = np.inf, -np.inf, np.nan
        if kernel.available:
            finite = np.isfinite(x[columns]).all(1)
            with forced("lookup"):
                got = spfmt.spmm(a, x, backend=kernel.isa)
            np.testing.assert_array_equal(np.isfinite(got), finite)


@pytest.mark.parametrize("kernel", LISTS_SPMM)
def test_octets_cut_long_rows_into_tiles(kernel: spfmt.Kernel) -> None:
    """Rows of all lengths, over three tiles of columns and two chunks of rows, and infinite x."""
    rng = np.random.default_rng(14)
    mask = rng.random((150, 2000)) < rng.random((150, 1)) / 3
    mask[[0, 149]], mask[:, 700:1400] = False, mask[:, 700:1400] & (rng.random((150, 1)) < 0.5)
    a = csr(mask, kernel.dtype)
    dense = a.to_dense().astype(float)
    x = rng.standard_normal((2000, 11)).astype(kernel.dtype)
    with forced("octets"):
        assert "octets" in a.plan.explain(11)
        check(spfmt.spmm(a, x, backend=kernel.isa), dense @ x, abs(dense) @ abs(x), 2000)
        for feature in (0, 699, 1999):
            x[feature] = np.inf
            got = spfmt.spmm(a, x, backend=kernel.isa)
            np.testing.assert_array_equal(np.isfinite(got).all(1), ~mask[:, feature])
            x[feature] = 1.0


@pytest.mark.parametrize("kernel", LISTS_SPMM)
def test_rows_that_miss_whole_tiles_of_columns(kernel: spfmt.Kernel) -> None:
    mask = np.zeros((70, 1100), bool)
    for r in range(70):  # full, empty and in between, each somewhere else
        mask[r, 13 * r : 13 * r + (r % 7) * 170] = True
    a = csr(mask, kernel.dtype)
    x = np.random.default_rng(13).standard_normal((1100, 20)).astype(kernel.dtype)
    dense = a.to_dense().astype(float)
    check(spfmt.spmm(a, x, backend=kernel.isa), dense @ x, abs(dense) @ abs(x), 1100)


@pytest.mark.parametrize("kernel", LISTS_SPMM)
def test_rows_longer_than_sixteen_bits_count(kernel: spfmt.Kernel) -> None:
    cols = 2**16 + 70
    rng = np.random.default_rng(14)
    values = rng.standard_normal(cols).astype(kernel.dtype)
    for rows in (1, 9000):  # beside enough empty rows, tiles are as wide as they may be
        indptr = np.append(0, np.full(rows, cols))
        a = spfmt.CSR((rows, cols), indptr, np.arange(cols), values)
        for batch in (1, 16):
            x = rng.standard_normal((cols, batch)).astype(kernel.dtype)
            got = spfmt.spmm(a, x, backend=kernel.isa)
            check(got[0], values.astype(float) @ x, abs(values) @ abs(x), cols)
            assert (got[1:] == 0).all()


def test_layouts_of_wide_matrices_grow_with_the_nonzeros() -> None:
    rows, cols = 2000, 1_000_000
    columns = np.random.default_rng(15).integers(0, cols, rows)
    a = spfmt.CSR((rows, cols), np.arange(rows + 1), columns, np.ones(rows, "float32"))
    for batch in (1, 16):
        spfmt.spmm(a, np.broadcast_to(np.float32(1), (cols, batch)))
    assert a.plan.nbytes < 250 * rows


GUARD_PAGES = """
import ctypes, mmap
import numpy as np, spfmt
from format_cases import LAYOUTS, MAKERS

libc = ctypes.CDLL(None, use_errno=True)

def at_page_end(a):  # a copy of `a`; the page right behind it can be neither read nor written
    pages = -(-a.nbytes // mmap.PAGESIZE) + 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    held.append(memory)
    end = (pages - 1) * mmap.PAGESIZE
    copy = np.frombuffer(memory, a.dtype, a.size, end - a.nbytes).reshape(a.shape)
    copy[...] = a
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + end), mmap.PAGESIZE, 0) == 0
    return copy

held = []
rng = np.random.default_rng(0)
for kernel in spfmt.kernels():
    if not kernel.available or kernel.op not in spfmt.dispatch.OPS:
        continue
    for shape in [(3, 5), (17, 33), (37, 50)]:
        a = MAKERS[LAYOUTS[kernel.layout]](shape, np.random.default_rng(3)).astype(kernel.dtype)
        values = at_page_end(a.values.reshape(-1))
        for batch in (1, 3, 17, 32, 70):
            for flip in (False, True):
                dy, x = (
                    at_page_end(np.ones((batch, n) if flip else (n, batch), kernel.dtype))
                    for n in shape
                )
                how = {"batch_first": flip, "backend": kernel.isa}
                if kernel.op == "sddmm":
                    a.plan.sddmm(dy, x, out=values, **how)
                elif kernel.op == "spmm":
                    bias = at_page_end(np.ones(shape[0], kernel.dtype))
                    how["activation"] = "silu"
                    a.plan.spmm(values, x, bias=bias, out=at_page_end(dy), **how)
                else:
                    a.plan.spmm_t(values, dy, out=at_page_end(x), **how)
print("done")
"""


def test_nothing_behind_an_operand_is_touched() -> None:
    """Masked tails, not whole vectors: a kernel that looked further would end the process."""
    path = str(Path(__file__).parent)
    result = run_python(f"import sys; sys.path.insert(0, {path!r})\n" + GUARD_PAGES)
    assert result.stdout.strip() == "done", (result.returncode, result.stderr)


@pytest.mark.parametrize("name", LAYOUTS)
def test_operators(name: str) -> None:
    a = tensor(name, (40, 30), "float64", 10)
    rng = np.random.default_rng(11)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((40, 4))
    np.testing.assert_array_equal(a @ x, spfmt.spmm(a, x))
    np.testing.assert_array_equal(a.T @ y, spfmt.spmm_t(a, y))
    np.testing.assert_array_equal(x.T @ a.T, spfmt.spmm(a, x.T, batch_first=True))


def test_every_layout_has_every_product_at_every_level() -> None:
    assert len(spfmt.kernels()) == 48
    rows = {(k.layout, k.op, k.isa) for k in spfmt.kernels(dtype="float32")}
    levels = ("scalar", "avx2", "avx512")
    assert rows == set(product_of(LAYOUTS, (*OPS, *CONVOLUTIONS), levels))
