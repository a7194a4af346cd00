"""What convolutions keep between calls, and memory that they must leave alone."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product as product_of
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conv_cases import ROWS, Case, Kernel, Operands, check, make_operands, operands
from format_cases import LAYOUTS
from fresh_python import run_python

import spfmt
from spfmt.convolution import Convolution, convolve, convolve_sampled
from spfmt.cost import forced
from spfmt.dispatch import CONVOLUTIONS

KEPT = 16
"""Geometries of which a plan keeps what it made."""

PRODUCTS = [p for p in ROWS if p.values[0].op != "conv2d_weight"]


@pytest.fixture(autouse=True)
def _default_threads() -> Iterator[None]:
    yield
    spfmt.set_num_threads(None)


def of_size(size: tuple[int, int], batch: int = 1) -> Case:
    return Case("3x3", 18, 4, (3, 3), size, batch, padding=1)


def same_weight(case: Case, weight: spfmt.SparseTensor) -> Operands:
    """Random images of a case for one weight."""
    found = make_operands(weight.format, case)
    return Operands(case, weight, found.x, found.dy, found.bias)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_keeps_few_geometries(layout: str) -> None:
    """Old ones go and are made anew when they come back: what is kept does not grow."""
    a = make_operands(LAYOUTS[layout], of_size((5, 5))).weight
    assert a.plan.compiled.shapes == 0
    sizes = [(1 + i % 7, 2 + i // 3) for i in range(40)]
    for repeat, size in product_of(range(2), sizes):
        found = same_weight(of_size(size, 1 + repeat), a)
        for op in CONVOLUTIONS:
            check(found.by(op, "float32"), found.wanted(op))
            assert 1 <= a.plan.compiled.shapes <= KEPT
    assert a.plan.compiled.shapes == KEPT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept_is_counted_and_bounded(layout: str) -> None:
    a = make_operands(LAYOUTS[layout], of_size((5, 5))).weight
    sizes = [a.plan.compiled.nbytes]
    for i in range(3 * KEPT):
        same_weight(of_size((4, 4 + i)), a).by("conv2d", "float32")
        sizes.append(a.plan.nbytes)
    grown = np.diff(sizes)
    assert (grown[:KEPT] > 0).all()
    assert (grown[KEPT:] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_geometry_is_kept_once(layout: str) -> None:
    found = make_operands(LAYOUTS[layout], of_size((5, 5), 3))
    plan = found.weight.plan.compiled
    with forced("images"):
        for _ in range(3):
            found.by("conv2d", "float32")
            found.by("conv2d", "float32", x=found.x[:1])
        assert plan.shapes == 1
        found.by("conv2d_weight", "float32")  # meets the same frames of X
        assert plan.shapes == 1
        found.by("conv2d_input", "float32")
        assert plan.shapes == 2
        found.by("conv2d", "float64")  # whose strips are others
        assert plan.shapes == 3


def test_geometries_that_differ_in_one_number_are_told_apart() -> None:
    first = Case("", 18, 2, (2, 2), (8, 8), 2, (2, 2, 2, 2), 2, 2, 3)
    a = make_operands("csr", first).weight
    others: list[dict[str, Any]] = [
        {}, {"size": (9, 8)}, {"size": (8, 9)}, {"padding": (1, 2, 2, 2)},
        {"padding": (2, 1, 2, 2)}, {"padding": (2, 2, 4, 2)}, {"padding": (2, 2, 2, 4)},
        {"stride": (1, 2)}, {"stride": (2, 1)}, {"dilation": (1, 2)}, {"dilation": (2, 1)},
        {"groups": 1}, {"groups": 9}, {"batch": 17},
    ]  # fmt: skip
    for _ in range(2):
        for other in others:
            found = same_weight(Case(**{**vars(first), **other}), a)
            for op in CONVOLUTIONS:
                check(found.by(op, "float32"), found.wanted(op))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes_of_one_geometry_do_not_meet(layout: str) -> None:
    """A strip has fewer rows of float64 than of float32, whichever is first."""
    case = Case("", 3, 30, (3, 3), (60, 500), 1, padding=1)
    found = make_operands(LAYOUTS[layout], case)
    plan = found.weight.plan
    how = Convolution.of(case.shape, **case.how)
    gradients: list[Any] = []
    for dtype in ("float32", "float64", "float32"):
        x, values = found.x.astype(dtype), found.weight.values.reshape(-1).astype(dtype)
        out = np.full(case.y_shape, np.nan, dtype)
        convolve(plan, how, values, x, found.bias.astype(dtype), None, out)
        check(out, found.wanted("conv2d"))
        gradient = np.full(plan.nnz, np.nan, dtype)
        convolve_sampled(plan, how, found.dy.astype(dtype), x, gradient)
        check(gradient.reshape(found.weight.values.shape), found.wanted("conv2d_weight"))
        gradients.append(gradient)
    alone = make_operands(LAYOUTS[layout], case).weight.plan
    assert alone is not plan
    first = np.full(plan.nnz, np.nan)
    convolve_sampled(alone, how, found.dy.astype("float64"), found.x.astype("float64"), first)
    assert np.array_equal(first, gradients[1])
    assert np.array_equal(gradients[0], gradients[2])


@pytest.mark.parametrize("name", ["3x3", "3x3-of-2x2-together"])
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_changing_values_are_multiplied_as_they_are(kernel: Kernel, name: str) -> None:
    """Whoever writes them, and however little: every single one, between any two products."""
    found = operands(LAYOUTS[kernel.layout], name)
    case, a = found.case, found.weight
    how, turned = Convolution.of(case.shape, **case.how), kernel.op == "conv2d_input"
    values = a.values.astype(kernel.dtype).reshape(-1).copy()
    images = np.ones(case.y_shape if turned else case.x_shape, kernel.dtype)

    def product() -> np.ndarray:
        out = np.empty(found.out_shape(kernel.op), kernel.dtype)
        with forced(kernel.variant):
            convolve(a.plan, how, values, images, None, None, out, kernel.isa, turned)
        return out

    before = product()
    rows, cols = a.layout().coordinates()
    cells = case.kernel[0] * case.kernel[1]
    for spot in range(0, a.nnz, max(1, a.nnz // 12)):
        old = values[spot]
        values[spot] = old + 64
        after = product()
        values[spot] = old
        changed = (abs(after - before) > 32).any(axis=(0, 2, 3))
        where = int(cols[spot]) // cells if turned else int(rows[spot])
        np.testing.assert_array_equal(np.flatnonzero(changed), where)
    np.testing.assert_array_equal(product(), before)


@pytest.mark.parametrize("kernel", ROWS)
def test_values_may_have_spare_capacity(kernel: Kernel) -> None:
    """What lies behind them is not read, and zero in a gradient."""
    for name in ("3x3", "1x1-pixels-together"):
        found = operands(LAYOUTS[kernel.layout], name)
        case, a = found.case, found.weight.astype(kernel.dtype)
        how = Convolution.of(case.shape, **case.how)
        x, dy = found.x.astype(kernel.dtype), found.dy.astype(kernel.dtype)
        if kernel.op == "conv2d_weight":
            gradient = np.full(a.nnz + 9, np.nan, kernel.dtype)
            with forced(kernel.variant):
                convolve_sampled(a.plan, how, dy, x, gradient, kernel.isa)
            want = found.run(kernel).reshape(-1)
            np.testing.assert_array_equal(gradient[: a.nnz], want)
            assert (gradient[a.nnz :] == 0).all()
            continue
        longer = np.append(a.values.reshape(-1), np.full(9, np.nan, kernel.dtype))
        turned = kernel.op == "conv2d_input"
        out = np.empty(found.out_shape(kernel.op), kernel.dtype)
        with forced(kernel.variant):
            convolve(a.plan, how, longer, dy if turned else x, None, None, out, kernel.isa, turned)
        more = {} if turned else {"bias": None}
        np.testing.assert_array_equal(out, found.run(kernel, **more))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_plan_from_many_threads(layout: str) -> None:
    """More geometries than a plan keeps, at once: none is taken away while it is used."""
    a = make_operands(LAYOUTS[layout], of_size((5, 5))).weight
    cases = [same_weight(of_size((3 + i % 5, 4 + i)), a) for i in range(2 * KEPT)]
    want = [[found.by(op, "float32") for op in CONVOLUTIONS] for found in cases]

    def work(first: int) -> bool:
        equal = True
        for i in range(60):
            which = (7 * first + 5 * i) % len(cases)
            found = [cases[which].by(op, "float32") for op in CONVOLUTIONS]
            equal &= all(map(np.array_equal, found, want[which]))
        return equal

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert a.plan.compiled.shapes <= KEPT


# ------------------------------------------------------------------------- memory beside operands

GUARD_PAGES = """
import ctypes, mmap
import numpy as np, spfmt
from conv_cases import kernels, operands
from format_cases import LAYOUTS
from spfmt.convolution import Convolution, convolve, convolve_sampled
from spfmt.cost import forced

libc = ctypes.CDLL(None, use_errno=True)
NAMES = [
    "1x1", "1x1-in-place", "1x1-one-row", "1x1-one-column", "1x1-pixels-together", "1x1-stride-2",
    "1x1-padded", "3x3", "3x3-same", "3x3-wide", "3x3-14x14", "3x3-stride-2", "3x3-of-3x3-together",
    "3x3-of-3x3-nine", "3x3-of-8x19-together-stride-2-3", "2x2-patches", "2x2-stride-5",
    "2-groups-in-one-band", "depthwise", "one-weight",
]

def guarded(a, before):
    # A copy of `a` with a page right behind it, or before it, that can be neither read nor written.
    pages = -(-a.nbytes // mmap.PAGESIZE) + 2
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    held.append(memory)
    at = mmap.PAGESIZE if before else (pages - 1) * mmap.PAGESIZE - a.nbytes
    copy = np.frombuffer(memory, a.dtype, a.size, at).reshape(a.shape)
    copy[...] = a
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages - 1):
        where = ctypes.c_void_p(start + page * mmap.PAGESIZE)
        assert libc.mprotect(where, mmap.PAGESIZE, 0) == 0
    return copy

def images(a, before, last):
    if not last:
        return guarded(a, before)
    return guarded(a.transpose(0, 2, 3, 1), before).transpose(0, 3, 1, 2)

held = []
for kernel, name in ((k, name) for k in kernels() if k.available for name in NAMES):
    with forced(kernel.variant):
        found = operands(LAYOUTS[kernel.layout], name)
        how = Convolution.of(found.case.shape, **found.case.how)
        plan, t = found.weight.plan, kernel.dtype
        values = found.weight.values.astype(t).reshape(-1)
        for before, last in ((False, False), (True, False), (False, True), (True, True)):
            v, bias = guarded(values, before), guarded(found.bias.astype(t), before)
            x, dy = (images(a.astype(t), before, last) for a in (found.x, found.dy))
            if kernel.op == "conv2d":
                convolve(plan, how, v, x, bias, "silu", dy, kernel.isa)
            elif kernel.op == "conv2d_input":
                convolve(plan, how, v, dy, None, None, x, kernel.isa, True)
            else:
                convolve_sampled(plan, how, dy, x, v, kernel.isa)
            del v, bias, x, dy
            held.clear()
print("done")
"""


def test_nothing_beside_an_operand_is_touched() -> None:
    """Neither behind its end nor before its start: a look there would end the process."""
    path = str(Path(__file__).parent)
    result = run_python(f"import sys; sys.path.insert(0, {path!r})\n" + GUARD_PAGES)
    assert result.stdout.strip() == "done", (result.returncode, result.stderr[-2000:])


def test_memory_that_runs_out_inside_a_thread_is_an_error() -> None:
    """Frames are allocated by each thread: no exception may leave an OpenMP region."""
    code = """if True:
        import resource, numpy as np, spfmt
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
        x = np.broadcast_to(np.float32(1), (8, 500, 1, 1_000_000))
        weight = np.zeros((1, 500, 1, 3), "float32")
        weight[0, 7, 0, 1] = 1
        for a in (spfmt.CSR.from_dense(weight), spfmt.ShuffledBlock.from_dense(weight)):
            for threads in (1, 2):
                spfmt.set_num_threads(threads)
                try:
                    spfmt.conv2d(a, x, stride=(1, 500_000), padding=(0, 1))
                    print("fits")
                except MemoryError:
                    print("MemoryError")
        """
    result = run_python(code)
    assert result.stdout.split() == ["MemoryError"] * 4, result.stderr


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forked_child_convolves_after_a_parallel_parent(layout: str) -> None:
    found = operands(LAYOUTS[layout], "3x3")
    spfmt.set_num_threads(2)
    want = found.by("conv2d", "float32")  # starts threads that the child does not inherit
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, found))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), want)
    child.join(60)
    assert child.exitcode == 0


def _in_child(queue: Any, found: Operands) -> None:
    queue.put(found.by("conv2d", "float32"))


def test_the_log_names_the_kernel(caplog: pytest.LogCaptureFixture) -> None:
    found = operands("csr", "3x3")
    with caplog.at_level(logging.DEBUG, logger="spfmt"):
        for op in CONVOLUTIONS:
            found.by(op, "float32", "scalar")
    for op in CONVOLUTIONS:
        assert f"{op} lists float32: kernel scalar" in caplog.text
