"""The CUDA kernels of lists, emulated: every operator and dtype against float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda_cases import CODES, DTYPES, ORDERS, Result, aligned, call, emulate, operand
from format_cases import MAKERS

from spfmt.cuda import library
from spfmt.cuda.plan import DeviceLists, device_lists, transposed_lists
from spfmt.formats._layout import Lists

Array = Any
UNIT = {"f32": 0.0, "bf16": 2.0**-8, "f16": 2.0**-11}  # of rounding a float32 sum
LEAST = {"f32": 0.0, "bf16": 2.0**-134, "f16": 2.0**-25}  # half of the smallest number
SHARED = 227 << 10  # bytes of a block's shared memory, in the emulation


# ------------------------------------------------------------------------------------- structures


def lists(cols: int, lengths: Any, seed: int = 0) -> Lists:
    rng = np.random.default_rng([seed, cols, len(lengths)])
    chosen = [np.sort(rng.permutation(cols)[:k]) for k in lengths]
    indptr = np.append(0, np.cumsum(lengths)).astype(np.int64)
    return Lists(len(lengths), cols, indptr, np.concatenate([[], *chosen]).astype(np.int32))


def of_format(name: str, shape: tuple[int, int], seed: int) -> Lists:
    layout = MAKERS[name](shape, np.random.default_rng(seed)).layout()
    assert isinstance(layout, Lists)
    return layout


STRUCTURES: dict[str, Callable[[], Lists]] = {
    "one": lambda: lists(1, [1]),
    "one-row": lambda: lists(150, [131]),
    "no-columns": lambda: lists(0, [0] * 5),
    "empty": lambda: lists(9, [0] * 41),
    "short": lambda: lists(33, np.arange(67) % 11),  # teams of eight lanes, with empty rows
    "long": lambda: lists(257, [0, 257, 1, 127, 128, 129, 31, 33, 63, 0, 65, 2, 3, 4, 5, 255]),
    "many": lambda: lists(99, [65 + i % 31 for i in range(0, 9 * 101, 9)]),  # more than warps
    "skewed": lambda: lists(300, [300, *[1] * 50, 299]),
    "nm": lambda: of_format("nm", (45, 64), 3),
    "condensed": lambda: of_format("condensed", (37, 96), 2),
    "csr": lambda: of_format("csr", (50, 83), 1),
}


def indices(numbers: Any, offset: int) -> Array:
    """Return 32-bit indices, and behind them some that lead out of the address space."""
    out = aligned((numbers.size + 8,), np.int32, offset)
    out[:] = 2**31 - 1
    out[: numbers.size] = numbers
    return out


class Weight:
    """Lists with values in a dtype, as a kernel wants them, and their matrix in float64."""

    def __init__(self, a: Lists, dtype: str, transposed: bool = False, offset: int = 0) -> None:
        plan: DeviceLists = transposed_lists(a) if transposed else device_lists(a)
        rng = np.random.default_rng(a.nnz)
        numbers = operand(rng.standard_normal((1, a.nnz)), dtype, a.nnz + 5, offset)
        self.values, self.nnz = numbers[0], a.nnz
        self.dense = np.zeros((a.rows, a.cols))
        self.dense[a.coordinates()] = self.values.astype(np.float64)
        self.dense = self.dense.T if transposed else self.dense
        self.at = a.coordinates()
        self.rows, self.cols = plan.rows, plan.cols
        self.fan_in = int(np.diff(plan.indptr).max(initial=0))
        arrays = [plan.indptr, plan.col_indices, *([] if plan.source is None else [plan.source])]
        self._arrays = [indices(array, offset) for array in arrays]
        pointers = [array.ctypes.data for array in self._arrays]
        self._struct = library.Lists(plan.rows, plan.cols, *pointers)

    @property
    def struct(self) -> Any:
        return ctypes.byref(self._struct)


# ---------------------------------------------------------------------------------------- products


def spmm(
    w: Weight, dtype: str, n: int, *, small: bool, bias: bool = True, offset: int = 0, more: int = 3
) -> bytes:
    """Run a product and check it."""
    rng = np.random.default_rng([n, w.cols])
    x = rng.standard_normal((n, w.cols) if small else (w.cols, n))
    x = operand(x, dtype, x.shape[1] + more, offset)
    b = rng.standard_normal(w.rows).astype(np.float32) if bias else None
    y = Result(*((n, w.rows) if small else (w.rows, n)), dtype, offset, more)
    call(
        "lists_small" if small else "lists_spmm",
        CODES[dtype], w.struct, w.values, x, x.strides[0] // x.itemsize, n, b, y.array, y.stride,
        None,
    )  # fmt: skip
    y.check_frame()
    got = (y.array.T if small else y.array).astype(np.float64)
    features = (x.T if small else x).astype(np.float64)
    shift = np.zeros((w.rows, 1)) if b is None else b[:, None].astype(np.float64)
    want = w.dense @ features + shift
    size = np.abs(w.dense) @ np.abs(features) + np.abs(shift)
    check(got, want, size, w.fan_in + 2, dtype)
    return y.array.tobytes()


def check(got: Array, want: Array, size: Array, roundings: int, dtype: str) -> None:
    """Check sums in float32, of numbers that went through so many roundings, and one to a dtype."""
    gamma = roundings * 2.0**-24 / (1 - roundings * 2.0**-24)
    bound = gamma * size + UNIT[dtype] * (np.abs(want) + gamma * size) + LEAST[dtype]
    assert got.shape == want.shape
    excess = np.abs(got - want) - bound
    assert (excess <= 0).all(), f"beyond its bound by {excess.max()}"


def sddmm(w: Weight, dtype: str, n: int, offset: int = 0, more: tuple[int, int] = (3, 5)) -> bytes:
    """Run a product and check it."""
    rng = np.random.default_rng([n, w.cols])
    dy = operand(rng.standard_normal((w.rows, n)), dtype, n + more[0], offset)
    x = operand(rng.standard_normal((w.cols, n)), dtype, n + more[1], offset)
    out = Result(1, w.nnz, "f32")
    strides = [m.strides[0] // m.itemsize if m.size else n for m in (dy, x)]
    call(
        "lists_sddmm", CODES[dtype], w.struct, dy, strides[0], x, strides[1], n, out.array, None
    )  # fmt: skip
    out.check_frame()
    left, right = dy.astype(np.float64), x.astype(np.float64)
    want, size = (left @ right.T)[w.at], (np.abs(left) @ np.abs(right).T)[w.at]
    check(out.array[0].astype(np.float64), want, size, n + 1, "f32")
    return out.array.tobytes()


# ------------------------------------------------------------------------------------------- tests


@pytest.fixture(autouse=True)
def plainly() -> None:
    emulate()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_small(name: str, dtype: str) -> None:
    for offset, transposed in ((0, False), (1, False), (0, True), (3, True)):
        w = Weight(STRUCTURES[name](), dtype, transposed, offset)
        for n in (0, 1, 2, 3, 7, 8, 16) if offset == 0 else (1, 5):
            spmm(w, dtype, n, small=True, bias=n % 2 == 1, offset=offset, more=n % 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_spmm(name: str, dtype: str) -> None:
    for offset, transposed in ((0, False), (1, False), (0, True), (2, True)):
        w = Weight(STRUCTURES[name](), dtype, transposed, offset)
        for n in (0, 1, 7, 31, 33, 63, 65, 130) if offset == 0 else (5, 64):
            # Strides that are multiples of 4, of 2, and odd.
            more = -n % 4 if n % 4 != 2 else 2 - n % 4
            spmm(w, dtype, n, small=False, bias=n % 2 == 1, offset=offset, more=more)
        spmm(w, dtype, 33, small=False, offset=offset, more=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_sddmm(name: str, dtype: str) -> None:
    for offset in (0, 1, 2):
        w = Weight(STRUCTURES[name](), dtype, offset=offset)
        for n in (0, 1, 7, 31, 33, 63, 65, 130) if offset == 0 else (5, 64):
            sddmm(w, dtype, n, offset, (-n % 4, -n % 4 if n % 4 != 2 else 2))
        sddmm(w, dtype, 33, offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_beyond_shared_memory(dtype: str) -> None:
    of_one = SHARED // DTYPES[dtype].itemsize  # columns of one sample that just fit
    for cols, n in ((of_one // 16 + 1, 16), (of_one // 8, 9), (of_one, 2), (of_one + 1, 7)):
        for lengths in ([3, 0, 9, 5], [cols // 40] * 4):
            spmm(Weight(lists(cols, lengths), dtype), dtype, n, small=True, more=1)
    few, many = lists(of_one // 8, [5] * 40), lists(of_one // 8 + 1, [5] * 40)
    for a in (few, many):  # the first has eight samples in shared memory
        spmm(Weight(a, dtype), dtype, 17, small=False)


def test_no_rows() -> None:
    w = Weight(lists(7, []), "f32")
    spmm(w, "f32", 3, small=True)
    spmm(w, "f32", 3, small=False)
    sddmm(w, "f32", 3)


def everything(dtype: str) -> list[Any]:
    """Return what the three kernels compute for some structures."""
    out = []
    for name in ("short", "long", "nm"):
        w = Weight(STRUCTURES[name](), dtype)
        wt = Weight(STRUCTURES[name](), dtype, transposed=True)
        out += [spmm(w, dtype, n, small=True) for n in (3, 16)]
        out += [spmm(w, dtype, n, small=False) for n in (7, 33)]
        out += [spmm(wt, dtype, n, small=small) for n, small in ((33, False), (1, True))]
        out += [sddmm(w, dtype, n) for n in (7, 65)]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_order_of_threads_shows(dtype: str) -> None:
    want = everything(dtype)
    for order, late in ORDERS[1:]:
        emulate(order, late)
        assert everything(dtype) == want, order
    emulate(hosts=2)
    assert everything(dtype) == want


@pytest.mark.parametrize("small", [True, False], ids=["small", "spmm"])
@pytest.mark.parametrize("n", [1, 3, 12])
@pytest.mark.parametrize("lengths", [[3] * 40, [90] * 40, [9] * 5], ids=["short", "long", "few"])
def test_infinity_goes_where_it_belongs(lengths: list[int], n: int, small: bool) -> None:
    a = lists(100, lengths)
    row, col = a.coordinates()
    w = Weight(a, "f32")
    w.values[:: max(1, a.nnz // 30)] = 0
    x = np.ones((n, 100) if small else (100, n), np.float32)
    column = int(col[0])  # its first value is zero: 0 * inf is NaN there
    (x.T if small else x)[column] = np.inf
    y = Result(*((n, a.rows) if small else (a.rows, n)), "f32")
    call(
        "lists_small" if small else "lists_spmm",
        CODES["f32"], w.struct, w.values, x, x.shape[1], n, None, y.array, y.stride, None,
    )  # fmt: skip
    met = w.values[: a.nnz][col == column]
    want = np.zeros(a.rows)
    with np.errstate(invalid="ignore"):
        want[row[col == column]] = met * np.float32(np.inf)
    assert np.isnan(want).any()
    got = y.array if small else y.array.T
    for sample in got:
        np.testing.assert_array_equal(np.where(np.isfinite(sample), 0, sample), want)


def test_samples_that_are_infinite_stay_alone() -> None:
    w = Weight(STRUCTURES["many"](), "f32")
    for n, ill in ((5, 4), (33, 32), (130, 65)):
        x = np.ones((w.cols, n), np.float32)
        x[:, ill] = np.nan
        y = Result(w.rows, n, "f32")
        call("lists_spmm", CODES["f32"], w.struct, w.values, x, n, n, None, y.array, y.stride, None)
        assert (np.isnan(y.array).all(0) == (np.arange(n) == ill)).all()
        assert np.isfinite(np.delete(y.array, ill, 1)).all()
