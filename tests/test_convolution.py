"""Every kernel that convolves against float64: geometries, memory, batches, threads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product as product_of
from typing import Any

import numpy as np
import pytest
from conv_cases import (
    BY_NAME,
    FORMATS,
    MEMORY,
    ROWS,
    Case,
    Kernel,
    Operands,
    check,
    kernels,
    known,
    make_operands,
    of_weight,
    operands,
    place,
    put,
)
from format_cases import LAYOUTS

import spfmt
from spfmt import cost
from spfmt.activations import ACTIVATIONS
from spfmt.dispatch import CONVOLUTIONS

PRODUCTS = [p for p in ROWS if p.values[0].op != "conv2d_weight"]
FORWARD = [p for p in ROWS if p.values[0].op == "conv2d"]
FLOAT32 = [p for p in ROWS if p.values[0].dtype == "float32"]


@pytest.fixture(autouse=True)
def _default_threads() -> Iterator[None]:
    yield
    spfmt.set_num_threads(None)


@pytest.fixture
def _all_threads() -> Iterator[None]:
    """Threads cost nothing, so that the smallest product takes as many as it may."""
    model = cost.cost_model()
    cost.use(cost.CostModel({**model.coefficients, "wake_seconds": 0.0}))
    yield
    cost.use(model)


def compare(kernel: Kernel, format: str, name: str, memory: str, out_memory: str) -> None:
    """A product of images that lie like that, into a part of NaN that is all it may write."""
    found, want = operands(format, name), known(format, name, kernel.op)
    images = {n: put(getattr(found, n), memory, kernel.dtype) for n in ("x", "dy")}
    if kernel.op == "conv2d_weight":
        check(found.run(kernel, **images), want)
        return
    frame, out = place(found.out_shape(kernel.op), out_memory, kernel.dtype)
    assert found.run(kernel, out=out, **images) is out
    check(out, want)
    assert np.isnan(frame).sum() == frame.size - out.size, "wrote outside of the output"


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("kernel", ROWS)
def test_against_float64(kernel: Kernel, name: str) -> None:
    number, formats = list(BY_NAME).index(name), FORMATS[kernel.layout]
    format = formats[number % len(formats)]
    out_memory = MEMORY[(number + number // len(MEMORY) + 2) % len(MEMORY)]
    compare(kernel, format, name, MEMORY[number % len(MEMORY)], out_memory)


KINDS = [
    "1x1-in-place",
    "1x1-pixels-together",
    "3x3-same",
    "3x3-stride-2-3",
    "3x3-of-2x2-together",
    "3x3-of-8x19-together-stride-2-3",
    "2-groups-in-one-band",
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kernel", ROWS)
def test_memory_of_every_kind(kernel: Kernel, name: str) -> None:
    for i, memory in enumerate(MEMORY):
        for out_memory in (memory, MEMORY[i - 3]):
            compare(kernel, LAYOUTS[kernel.layout], name, memory, out_memory)


@pytest.mark.full
@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("kernel", ROWS)
def test_every_format_and_memory(kernel: Kernel, name: str) -> None:
    outs = MEMORY[: 1 if "weight" in kernel.op else None]
    for format, memory, out_memory in product_of(FORMATS[kernel.layout], MEMORY, outs):
        compare(kernel, format, name, memory, out_memory)


GRID = [
    Case(f"{kernel}-{size}", 18, 3, kernel, size, batch, padding, stride, dilation, groups)
    for kernel, size, batch, padding, stride, dilation, groups in product_of(
        [(1, 1), (2, 3), (3, 3)],
        [(1, 1), (2, 3), (3, 3), (4, 17), (9, 8)],
        [1, 8, 17, 24],
        [0, (1, 2), (4, 0, 3, 5)],
        [1, 2, (3, 1)],
        [1, (2, 1)],
        [1, 3],
    )
]


@pytest.mark.full
@pytest.mark.parametrize("part", range(20))
def test_grid_of_geometries(part: int) -> None:
    for case, format in product_of(GRID[part::20], LAYOUTS.values()):
        try:
            assert case.out_size
        except spfmt.FormatError:
            continue  # the kernel is larger than the padded maps
        found = make_operands(format, case)
        for op in CONVOLUTIONS:
            want = found.wanted(op)
            for kernel in kernels(op, found.weight.layout().name):
                if kernel.available:
                    check(found.run(kernel), want)


STRIPS = [
    Case("forward", 2, 30, (3, 3), (40, 900), 1, padding=1),
    Case("forward-stride-2", 2, 30, (3, 3), (120, 330), 1, padding=1, stride=2),
    Case("turned", 70, 1, (3, 3), (36, 430), 1, padding=1),
    Case("turned-stride-2-3", 70, 1, (3, 3), (240, 330), 1, padding=1, stride=(2, 3)),
    Case("together", 2, 8, (3, 3), (64, 132), 16, padding=1),
    Case("groups", 4, 15, (3, 3), (40, 900), 1, padding=1, groups=2),
    Case("1x1", 3, 50, (1, 1), (61, 371), 2),
    Case("1x1-whole-vectors", 3, 50, (1, 1), (90, 248), 2),
    Case("1x1-narrow", 70, 2, (1, 1), (8000, 2), 1),
    Case("1x1-stride-2", 3, 50, (1, 1), (151, 161), 2, stride=2),
    Case("far-dilation", 3, 50, (3, 3), (30, 300), 1, padding=9, dilation=9),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", STRIPS, ids=lambda case: case.name)
def test_images_larger_than_caches_are_cut_into_strips(case: Case, layout: str) -> None:
    """Rows of zeros, or of a neighbour, meet at the seams."""
    found = make_operands(LAYOUTS[layout], case)
    for op in CONVOLUTIONS:
        want = found.wanted(op)
        for kernel in kernels(op, layout):
            if kernel.available and kernel.dtype == "float32":
                check(found.run(kernel), want)


@pytest.mark.parametrize("kernel", [p for p in ROWS if p.values[0].layout == "lists"])
def test_lists_of_all_lengths(kernel: Kernel) -> None:
    """Rows are sorted by length, 32 at a time: where one run ends, a longer row may follow."""
    turned = kernel.op == "conv2d_input"  # its lists are those of the channels
    case = Case("", 1 if turned else 70, 70 if turned else 1, (3, 3), (3, 4), 2)
    rng = np.random.default_rng(18)
    lengths = np.full((13, 70), 1)
    for i, (first, second) in enumerate(product_of((0, 1, 2), (0, 1, 2, 3))):
        lengths[i] = i % 2
        lengths[i, 16 : 16 + first] = lengths[i, 32 : 32 + second] = 3 + i % 3
    lengths[-1] = rng.integers(0, 10, 70)
    for length in lengths:
        order = rng.permuted(np.tile(np.arange(9), (70, 1)), axis=1)
        weight = rng.standard_normal(order.shape) * (order < length[:, None])
        a = spfmt.CSR.from_dense(weight.astype(np.float32).reshape(case.shape))
        found = of_weight(case, a, rng)
        check(found.run(kernel), found.wanted(kernel.op))


# ------------------------------------------------------------------- the same bits, whatever else

SAME = [
    "1x1-in-place",
    "1x1-pixels-together",
    "3x3",
    "3x3-stride-2-3",
    "3x3-of-2x2-together",
    "3x3-of-4x21-together",
    "5-groups-stride-2",
    "depthwise",
]


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("kernel", FLOAT32)
@pytest.mark.usefixtures("_all_threads")
def test_threads_do_not_change_a_bit(kernel: Kernel, name: str) -> None:
    for batch in (1, 5, 18):
        case = Case(**{**vars(BY_NAME[name]), "batch": batch})
        found = make_operands(LAYOUTS[kernel.layout], case)
        results = []
        for threads in (1, 3, 16):
            spfmt.set_num_threads(threads)
            results.append(found.run(kernel))
        for other in results[1:]:
            np.testing.assert_array_equal(results[0], other)


@pytest.mark.usefixtures("_all_threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [STRIPS[i] for i in (0, 3, 4, 5, 6, 9)], ids=lambda c: c.name)
def test_threads_do_not_change_a_bit_of_strips(case: Case, layout: str) -> None:
    found = make_operands(LAYOUTS[layout], case)
    for op in CONVOLUTIONS:
        results = []
        for threads in (1, 2, 9):
            spfmt.set_num_threads(threads)
            results.append(found.by(op, "float32"))
        for other in results[1:]:
            np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("kernel", FORWARD)
def test_an_image_is_the_same_alone_and_in_a_batch(kernel: Kernel, name: str) -> None:
    for batch in (3, 9, 16, 25):
        case = Case(**{**vars(BY_NAME[name]), "batch": batch})
        found = make_operands(LAYOUTS[kernel.layout], case)
        whole = found.run(kernel)
        for i in (0, batch // 2, batch - 2, batch - 1):
            one = found.run(kernel, x=found.x[i : i + 1])
            np.testing.assert_array_equal(one[0], whole[i])


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_memory_does_not_change_a_bit(kernel: Kernel, name: str) -> None:
    found = operands(LAYOUTS[kernel.layout], name)
    want = found.run(kernel)
    for memory in MEMORY:
        images = {n: put(getattr(found, n), memory, kernel.dtype) for n in ("x", "dy")}
        got = found.run(kernel, **images)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kernel", ROWS)
def test_images_that_share_memory(kernel: Kernel) -> None:
    """One channel, row or number in the place of many: strides of zero."""
    for name in ("1x1-in-place", "3x3-same", "3x3-of-2x2-together"):
        found = operands(LAYOUTS[kernel.layout], name)
        for axis in range(4):
            few = {n: getattr(found, n).take([0], axis) for n in ("x", "dy")}
            many = {n: np.broadcast_to(few[n], getattr(found, n).shape) for n in few}
            got = found.run(kernel, **many)
            copies = {n: many[n].copy() for n in many}
            want = found.run(kernel, **copies)
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("memory", ["dense", "channels_last"])
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_results_lie_like_their_images(kernel: Kernel, memory: str) -> None:
    found = operands(LAYOUTS[kernel.layout], "3x3")
    images = {n: put(getattr(found, n), memory, kernel.dtype) for n in ("x", "dy")}
    got = found.run(kernel, **images)
    assert got.flags.c_contiguous == (memory == "dense")
    assert got.transpose(0, 2, 3, 1).flags.c_contiguous == (memory == "channels_last")
    check(got, known(LAYOUTS[kernel.layout], "3x3", kernel.op))


# ---------------------------------------------------------------------------- infinities and NaN


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_an_image_does_not_leak_into_others(kernel: Kernel, name: str) -> None:
    for batch, memory in ((3, "channels_last"), (9, "dense"), (18, "channels_last")):
        case = Case(**{**vars(BY_NAME[name]), "batch": batch})
        found = make_operands(LAYOUTS[kernel.layout], case)
        what = found.operand(kernel.op)
        images = put(getattr(found, what), memory, kernel.dtype)
        clean = found.run(kernel, **{what: images})
        for bad, value in ((0, np.inf), (batch // 2, np.nan), (batch - 1, np.inf)):
            spoiled = images.copy(order="K")
            spoiled[bad] = value
            got = found.run(kernel, **{what: spoiled})
            others = np.arange(batch) != bad
            np.testing.assert_array_equal(got[others], clean[others])


def reached(found: Operands, op: str, at: tuple[int, ...]) -> np.ndarray:
    """Which results depend on one number of the images, by the structure alone."""
    a = found.weight
    mark = np.zeros_like(getattr(found, found.operand(op)))
    mark[at] = 1
    options: dict[str, Any] = {found.operand(op): mark}
    if op == "conv2d_weight":
        options["dy"] = np.ones_like(found.dy)
    elif op == "conv2d":
        options["bias"] = None
    ones = a.with_values(np.ones_like(a.values))
    return found.by(op, "float64", "reference", weight=ones, **options) != 0


def check_reach(kernel: Kernel, name: str) -> None:
    found = operands(LAYOUTS[kernel.layout], name)
    what = found.operand(kernel.op)
    images = getattr(found, what)
    last = tuple(n - 1 for n in images.shape)
    middle = tuple(n // 2 for n in images.shape)
    for at, value in product_of(((0, 0, 0, 0), last, middle), (np.inf, np.nan)):
        spoiled = images.copy()
        spoiled[at] = value
        got = found.run(kernel, **{what: spoiled})
        np.testing.assert_array_equal(~np.isfinite(got), reached(found, kernel.op, at))


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_results_depend_on_what_the_structure_names(kernel: Kernel, name: str) -> None:
    """0 * inf must not appear: neither of what pads a tile, nor of neighbouring rows."""
    check_reach(kernel, name)


@pytest.mark.parametrize("kernel", [p for p in ROWS if p.values[0].op == "conv2d_weight"])
def test_gradients_depend_on_what_they_meet(kernel: Kernel) -> None:
    """A cell that never meets a number of X, at an edge or under a stride, has no share of it."""
    for name in ("1x1-in-place", "3x3-of-2x2-together", "3x3", "3x3-stride-2-3"):
        check_reach(kernel, name)


@pytest.mark.parametrize("kernel", PRODUCTS)
def test_infinite_weights_stay_in_their_rows(kernel: Kernel) -> None:
    """Also where a band holds rows of several groups of the convolution."""
    for name in ("3x3", "2-groups-in-one-band", "5-groups-stride-2", "depthwise"):
        found = operands(LAYOUTS[kernel.layout], name)
        a, case = found.weight, found.case
        rows, cols = a.layout().coordinates()
        values = a.values.copy()
        place_of_it = a.nnz // 2
        values.reshape(-1)[place_of_it] = np.inf
        got = found.run(kernel, weight=a.with_values(values))
        row = int(rows[place_of_it])
        if kernel.op == "conv2d":
            may = {row}
        else:
            channel = int(cols[place_of_it]) // (case.kernel[0] * case.kernel[1])
            may = {row // (case.rows // case.groups) * case.channels + channel}
        bad = np.flatnonzero(~np.isfinite(got).all(axis=(0, 2, 3)))
        assert set(bad.tolist()) == may


# ------------------------------------------------------------------------------- weights and bias


@pytest.mark.parametrize("kernel", ROWS)
def test_rows_without_weights_and_weights_without_rows(kernel: Kernel) -> None:
    """Empty rows are their bias; nothing at all is a legal weight."""
    case = BY_NAME["3x3-same"]
    rng = np.random.default_rng(6)
    scores = rng.standard_normal(case.shape)
    scores[[0, 7, 8, 32]] = 0
    nothing = np.zeros(case.shape, np.float32)
    for format in FORMATS[kernel.layout]:
        options: dict[str, Any] = {}
        if format == "shuffled_block":
            options = {"block_shape": (3, 2), "row_perm": np.arange(case.rows)}
        if format == "nm":
            options = {"m": 5}
        weights = [spfmt.convert(nothing, format, max_padding=None, **options)]
        if format != "nm":  # N:M has no empty rows beside others
            dense = scores.astype(np.float32)
            weights.append(spfmt.convert(dense, format, max_padding=None, **options))
        for a in weights:
            found = of_weight(case, a, rng)
            check(found.run(kernel), found.wanted(kernel.op))
        assert weights[0].nnz == 0 or format == "hrbp"
        if kernel.op == "conv2d":
            found = of_weight(case, weights[0], rng)
            got = found.run(kernel)
            assert (got == found.bias.astype(kernel.dtype)[:, None, None]).all()


@pytest.mark.parametrize("kernel", FORWARD)
def test_a_bias_is_optional(kernel: Kernel) -> None:
    for name in ("3x3", "3x3-of-2x2-together"):
        found = operands(LAYOUTS[kernel.layout], name)
        without = found.run(kernel, bias=None)
        zeros = np.zeros(found.case.rows, kernel.dtype)
        np.testing.assert_array_equal(without, found.run(kernel, bias=zeros))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", FORWARD)
def test_activations_are_those_of_matrices(kernel: Kernel, activation: str) -> None:
    """The same bits as an activation of the result; tests/test_activations.py tells how good."""
    one = spfmt.CSR((1, 1), [0, 1], [0], np.ones(1, kernel.dtype))
    for name, memory in product_of(SAME, ("dense", "channels_last", "spread")):
        found = operands(LAYOUTS[kernel.layout], name)
        y = found.run(kernel)
        want = spfmt.spmm(one, y.reshape(1, -1), activation=activation, backend=kernel.isa)
        frame, out = place(y.shape, memory, kernel.dtype)
        found.run(kernel, activation=activation, out=out)
        np.testing.assert_array_equal(out, want.reshape(y.shape))
        assert np.isnan(frame).sum() == frame.size - out.size


@pytest.mark.parametrize("kernel", ROWS)
def test_a_kernel_of_one_cell_is_a_matrix(kernel: Kernel) -> None:
    """Its convolution is a product with (C, H * W) samples."""
    case = Case("", 37, 21, (1, 1), (5, 7), 3)
    found = make_operands(LAYOUTS[kernel.layout], case)
    want = found.wanted(kernel.op)
    check(found.run(kernel), want)
    a = found.weight.astype(kernel.dtype)
    x, dy = (
        images.transpose(1, 0, 2, 3).reshape(images.shape[1], -1).astype(kernel.dtype)
        for images in (found.x, found.dy)
    )
    if kernel.op == "conv2d_weight":
        check(spfmt.sddmm(a, dy, x), want)
        return
    bias = found.bias.astype(kernel.dtype)
    y = spfmt.spmm(a, x, bias=bias) if kernel.op == "conv2d" else spfmt.spmm_t(a, dy)
    check(y.reshape(-1, 3, 5, 7).transpose(1, 0, 2, 3), want)
