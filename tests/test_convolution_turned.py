"""dX is a convolution with the same dense blocks, turned: HRBP, section 3.1 and Appendix F."""

from __future__ import annotations

import numpy as np
import pytest
from conv_cases import FORMATS, ROWS, Case, Kernel, Operands, check, make_operands, of_weight

import spfmt

BACKWARD = [p for p in ROWS if p.values[0].op == "conv2d_input"]
GROUPS = [p for p in BACKWARD if p.values[0].layout == "groups"]


def turned(dense: np.ndarray) -> np.ndarray:
    """W' of (C_in, C_out, Kh, Kw): every kernel turned by 180 degrees, in and out exchanged."""
    return np.ascontiguousarray(dense[:, :, ::-1, ::-1].transpose(1, 0, 2, 3))


def blocks(a: spfmt.HRBP) -> list[tuple[set[int], set[int], set[int], np.ndarray]]:
    """Rows, channels, cells and values (rows, channels, cells) of every dense block."""
    dense = a.to_dense().reshape(*a.shape[:2], -1)
    found = []
    for g in range(a.groups):
        rows = a.row_perm[a.row_ptr[g] : a.row_ptr[g + 1]]
        channels, cells = a.channel_indices[g], a.pattern_indices[g]
        values = dense[np.ix_(rows, channels, cells)]
        found.append((*(set(i.tolist()) for i in (rows, channels, cells)), values))
    return found


def full_padding(case: Case) -> tuple[int, int]:
    """What makes the convolution of dY full: d (k - 1) - p along each axis, at stride 1."""
    padding = (case.padding, case.padding) if isinstance(case.padding, int) else case.padding
    dilation = (case.dilation, case.dilation) if isinstance(case.dilation, int) else case.dilation
    y, x = (d * (k - 1) - p for k, d, p in zip(case.kernel, dilation, padding, strict=True))
    return y, x


CASES = [
    Case("2x2", 24, 6, (2, 2), (5, 7), 2),
    Case("3x3", 37, 9, (3, 3), (6, 5), 3, padding=1),
    Case("3x3-dilated", 20, 5, (3, 3), (9, 8), 2, padding=(1, 2), dilation=2),
    Case("1x3", 18, 4, (1, 3), (3, 3), 17, padding=(0, 1)),
    Case("5x5", 33, 3, (5, 5), (7, 6), 1, padding=2),
]


def hrbp(case: Case, groups: int, seed: int = 0) -> spfmt.HRBP:
    """A weight of random scores by the paper's own steps, with about half of the cells."""
    scores = np.random.default_rng(seed).random(case.shape)
    cells = case.kernel[0] * case.kernel[1]
    a = spfmt.HRBP.from_scores(
        scores, 0.3, groups=groups, block_density=-(-cells // 2) / cells, values=scores - 0.5
    )
    assert a.groups == groups
    return a.astype("float32")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_turned_weight_has_the_same_blocks(case: Case) -> None:
    """The nonzeros of W' are one dense block per group of rows, its pattern mirrored."""
    for groups in (1, 2, 5):
        a = hrbp(case, groups)
        rows, channels = case.rows, case.channels
        cells = case.kernel[0] * case.kernel[1]
        found = turned(a.to_dense()).reshape(channels, rows, cells)
        pattern = np.zeros(found.shape, bool)
        for of_rows, of_channels, of_cells, values in blocks(a):
            mirrored = [cells - 1 - cell for cell in sorted(of_cells)]
            at = np.ix_(sorted(of_channels), sorted(of_rows), mirrored)
            assert not pattern[at].any(), "blocks overlap"
            pattern[at] = True
            np.testing.assert_array_equal(np.sort(found[at], None), np.sort(values, None))
        np.testing.assert_array_equal(pattern, turned(a.mask()).reshape(pattern.shape))
        np.testing.assert_array_equal(np.sort(found[pattern]), np.sort(a.values, None))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("kernel", BACKWARD)
def test_the_gradient_is_a_convolution_with_the_turned_weight(kernel: Kernel, case: Case) -> None:
    """With full padding dX = W' * dY: nothing else enters than the same values."""
    back = Case(
        "", case.channels, case.rows, case.kernel, case.out_size, case.batch, full_padding(case), 1,
        case.dilation,
    )  # fmt: skip
    for format in FORMATS[kernel.layout]:
        found = make_operands(format, case)
        if format == "hrbp":
            found = Operands(case, hrbp(case, 3), found.x, found.dy, found.bias)
        mirror = spfmt.CSR.from_dense(
            turned(found.weight.to_dense()), turned(found.weight.mask())
        ).astype("float32")
        no_bias = np.zeros(case.channels, "float32")
        other = Operands(back, mirror, found.dy, found.x, no_bias)
        assert other.case.out_size == case.size
        got = found.run(kernel)
        check(got, found.wanted(kernel.op))
        check(got, other.wanted("conv2d"))
        check(other.by("conv2d", kernel.dtype, kernel.isa), found.wanted(kernel.op))


@pytest.mark.parametrize("kernel", GROUPS)
def test_blocks_that_part_the_channels_are_an_hrbp_weight_again(kernel: Kernel) -> None:
    """Where no channel is in two groups W' is HRBP, of the same values in another order."""
    shape, sizes = (12, 6, 3, 3), [0, 4, 8, 12]
    rng = np.random.default_rng(1)
    rows, channels = rng.permutation(12), np.sort(rng.permutation(6).reshape(3, 2), axis=1)
    cells = np.array([[0, 2, 5], [1, 4, 8], [0, 3, 6]])
    values = rng.standard_normal(12 * 2 * 3).astype("float32")
    a = spfmt.HRBP(shape, rows, sizes, channels, cells, values)
    groups_of_rows = np.sort(rows.reshape(3, 4), axis=1)
    mirrored = np.sort(8 - cells, axis=1)
    b = spfmt.HRBP(
        (6, 12, 3, 3), channels.reshape(-1), [0, 2, 4, 6], groups_of_rows, mirrored, values
    )
    b = b.with_values(b.dense_gather(turned(a.to_dense())))
    np.testing.assert_array_equal(b.to_dense(), turned(a.to_dense()))
    np.testing.assert_array_equal(np.sort(b.values), np.sort(a.values))
    for (r, c, p, v), (r2, c2, p2, v2) in zip(blocks(a), blocks(b), strict=True):
        assert (r2, c2, p2) == (c, r, {8 - cell for cell in p})
        np.testing.assert_array_equal(np.sort(v, None), np.sort(v2, None))
    case = Case("", 12, 6, (3, 3), (6, 7), 2, padding=1)
    found = of_weight(case, a, rng)
    back = Operands(Case("", 6, 12, (3, 3), (6, 7), 2, 1), b, found.dy, found.x, np.zeros(6, "f4"))
    want = found.wanted("conv2d_input")
    check(found.run(kernel), want)
    check(back.by("conv2d", kernel.dtype, kernel.isa), want)


def test_the_turned_weight_is_not_the_transposed_one() -> None:
    """Fig. 1: kernels are turned and exchanged, cell by cell; W transposed is another matrix."""
    kernels = np.arange(1, 9, dtype="float32").reshape(2, 1, 2, 2)
    assert turned(kernels).reshape(1, 8).tolist() == [[4, 3, 2, 1, 8, 7, 6, 5]]
    a = spfmt.HRBP.from_dense(kernels, groups=1)
    dy = np.zeros((1, 2, 1, 1), "float32")
    for row in (0, 1):
        dy[:] = 0
        dy[0, row] = 1  # one output: its kernel is what every number of X counts with
        np.testing.assert_array_equal(spfmt.conv2d_input(a, dy, (2, 2))[0, 0], kernels[row, 0])


@pytest.mark.parametrize("format", sorted(FORMATS["lists"] + FORMATS["groups"]))
@pytest.mark.parametrize("memory", ["nchw", "nhwc"])
def test_the_papers_example(format: str, memory: str) -> None:
    """Appendix F: maps of 3 x 3, a kernel of 2 x 2; its equations, one number each."""
    a0, a1, a2, a3 = kernel = 1.0, 10.0, 100.0, 1000.0
    weight = np.array(kernel, "float32").reshape(1, 1, 2, 2)
    options = {"m": 1, "n": 1} if format == "nm" else {}
    a = spfmt.convert(weight, format, **options)
    i = np.arange(1.0, 10.0, dtype="float32")
    o = np.array([2.0, 3.0, 5.0, 7.0], "float32")

    def images(numbers: np.ndarray, size: int) -> np.ndarray:
        shape = (1, size, size, 1) if memory == "nhwc" else (1, 1, size, size)
        found = numbers.reshape(shape)
        return found.transpose(0, 3, 1, 2) if memory == "nhwc" else found

    y = [
        i[0] * a0 + i[1] * a1 + i[3] * a2 + i[4] * a3,
        i[1] * a0 + i[2] * a1 + i[4] * a2 + i[5] * a3,
        i[3] * a0 + i[4] * a1 + i[6] * a2 + i[7] * a3,
        i[4] * a0 + i[5] * a1 + i[7] * a2 + i[8] * a3,
    ]
    np.testing.assert_array_equal(spfmt.conv2d(a, images(i, 3)).reshape(-1), y)
    dx = [
        o[0] * a0,
        o[0] * a1 + o[1] * a0,
        o[1] * a1,
        o[0] * a2 + o[2] * a0,
        o[0] * a3 + o[1] * a2 + o[2] * a1 + o[3] * a0,
        o[1] * a3 + o[3] * a1,
        o[2] * a2,
        o[2] * a3 + o[3] * a2,
        o[3] * a3,
    ]
    np.testing.assert_array_equal(spfmt.conv2d_input(a, images(o, 2), (3, 3)).reshape(-1), dx)
    dw = [
        sum(o[2 * y + x] * i[3 * (y + ky) + x + kx] for y in range(2) for x in range(2))
        for ky in range(2)
        for kx in range(2)
    ]
    gradient = spfmt.conv2d_weight(a, images(o, 2), images(i, 3))
    np.testing.assert_array_equal(gradient.reshape(-1), dw)
