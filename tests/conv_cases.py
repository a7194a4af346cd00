"""Convolutions to test with: geometries, images in memory of every kind, and float64 results."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from format_cases import MAKERS, variants
from numpy.typing import NDArray

import spfmt
from spfmt.convolution import Convolution
from spfmt.cost import forced
from spfmt.dispatch import CONVOLUTIONS

Array = NDArray[Any]
Pair = int | tuple[int, int]


@dataclass(frozen=True)
class Kernel(spfmt.Kernel):
    """A row of the kernel table that convolves, in one of its ways."""

    variant: str


def kernels(op: str | None = None, layout: str | None = None) -> list[Kernel]:
    """Every way to convolve, whatever a cost model would choose."""
    return [
        Kernel(**vars(k), variant=variant)
        for k in spfmt.kernels(op, layout)
        if k.op in CONVOLUTIONS
        for variant in variants(k.layout, k.op, 1)
    ]


ROWS = [
    pytest.param(
        k,
        id=f"{k.op}-{k.layout}-{k.dtype}-{k.isa}-{k.variant}",
        marks=[] if k.available else pytest.mark.skip(reason=k.reason),
    )
    for k in kernels()
]

FORMATS: dict[str, list[str]] = {"lists": [], "groups": []}
"""The formats of each layout."""
for _name, _make in MAKERS.items():
    FORMATS[_make((4, 4), np.random.default_rng(0)).layout().name].append(_name)


@dataclass(frozen=True)
class Case:
    """A weight of (rows, channels, *kernel), and `batch` maps of `size` that it moves over."""

    name: str
    rows: int
    channels: int  # of X, in each group
    kernel: tuple[int, int]
    size: tuple[int, int]
    batch: int = 2
    padding: Any = 0
    stride: Pair = 1
    dilation: Pair = 1
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.rows, self.channels, *self.kernel

    @property
    def how(self) -> dict[str, Any]:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names}

    @property
    def out_size(self) -> tuple[int, int]:
        return Convolution.of(self.shape, **self.how).sizes(*self.size)

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels * self.groups, *self.size

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.rows, *self.out_size


CASES = [
    Case("1x1", 19, 5, (1, 1), (7, 9), 3),
    Case("1x1-in-place", 17, 8, (1, 1), (4, 8)),
    Case("1x1-one-row", 33, 3, (1, 1), (1, 37)),
    Case("1x1-one-column", 5, 7, (1, 1), (37, 1)),
    Case("1x1-pixel", 20, 6, (1, 1), (1, 1), 5),
    Case("1x1-pixels-together", 20, 6, (1, 1), (1, 1), 25),
    Case("1x1-stride-2", 19, 5, (1, 1), (7, 9), 3, stride=2),
    Case("1x1-stride-2-3", 16, 4, (1, 1), (8, 10), stride=(2, 3)),
    Case("1x1-padded", 7, 4, (1, 1), (5, 6), padding=1),
    Case("1x1-padded-stride-2", 18, 4, (1, 1), (5, 6), padding=1, stride=2),
    Case("3x3", 18, 4, (3, 3), (6, 7), 3),
    Case("3x3-same", 33, 5, (3, 3), (7, 7), padding="same"),
    Case("3x3-wide", 7, 3, (3, 3), (5, 61), 1, padding=1),
    Case("3x3-14x14", 16, 16, (3, 3), (14, 14), 1, padding=1),
    Case("3x3-stride-2", 16, 5, (3, 3), (9, 8), padding=1, stride=2),
    Case("3x3-stride-2-3", 19, 4, (3, 3), (11, 13), padding=(1, 2), stride=(2, 3)),
    Case("3x3-dilated", 17, 4, (3, 3), (9, 11), padding=2, dilation=2),
    Case("3x3-dilated-stride", 5, 6, (3, 3), (12, 13), 2, (1, 3), (3, 2), (2, 3)),
    Case("3x3-uneven-padding", 18, 3, (3, 3), (6, 5), padding=(0, 1, 2, 3)),
    Case("3x3-uneven-padding-stride", 18, 3, (3, 3), (7, 8), padding=(2, 0, 1, 4), stride=2),
    Case("3x3-pixel", 20, 7, (3, 3), (1, 1), 3, padding=1),
    Case("3x3-pixels-together", 20, 7, (3, 3), (1, 1), 19, padding=1),
    Case("3x3-of-2x2-together", 20, 7, (3, 3), (2, 2), 24, padding=1),
    Case("3x3-of-3x3-together", 35, 6, (3, 3), (3, 3), 25, padding=1),
    Case("3x3-of-3x3-seven", 18, 5, (3, 3), (3, 3), 7, padding=1),
    Case("3x3-of-3x3-nine", 18, 5, (3, 3), (3, 3), 9, padding=1),
    Case("3x3-of-5x6-together-stride-2", 18, 5, (3, 3), (5, 6), 17, padding=1, stride=2),
    Case("3x3-of-4x21-together", 6, 3, (3, 3), (4, 21), 17, padding=1),
    Case("3x3-of-8x19-together-stride-2-3", 6, 3, (3, 3), (8, 19), 24, 1, (2, 3)),
    Case("1x3", 17, 5, (1, 3), (6, 9), padding=(0, 1)),
    Case("3x1-stride-2", 17, 5, (3, 1), (9, 6), padding=(1, 0), stride=2),
    Case("2x2-same", 18, 4, (2, 2), (6, 7), padding="same"),
    Case("2x2-patches", 19, 3, (2, 2), (8, 10), stride=2),
    Case("2x2-same-dilated", 9, 4, (2, 2), (7, 8), padding="same", dilation=3),
    Case("4x2-same", 9, 4, (4, 2), (5, 6), padding="same"),
    Case("2x2-stride-5", 17, 3, (2, 2), (12, 13), stride=5),
    Case("2x2-stride-beyond-the-map", 17, 3, (2, 2), (3, 3), padding=1, stride=7),
    Case("5x5", 16, 3, (5, 5), (9, 10), padding=2),
    Case("5x5-whole-map", 18, 5, (5, 5), (5, 5), 3),
    Case("5x5-far-padding", 9, 3, (5, 5), (4, 3), padding=(9, 7)),
    Case("5x5-far-padding-stride-3", 9, 3, (5, 5), (4, 3), padding=(9, 7), stride=3),
    Case("7x7-stem", 16, 3, (7, 7), (15, 15), 1, padding=3, stride=2),
    Case("2-groups-in-one-band", 20, 3, (3, 3), (6, 7), padding=1, groups=2),
    Case("5-groups-stride-2", 40, 2, (3, 3), (7, 6), padding=1, stride=2, groups=5),
    Case("4-groups-together", 20, 3, (3, 3), (3, 3), 24, padding=1, groups=4),
    Case("3-groups-1x1", 24, 3, (1, 1), (4, 8), groups=3),
    Case("depthwise", 21, 1, (3, 3), (7, 8), padding=1, groups=21),
    Case("depthwise-two-each", 26, 1, (3, 3), (5, 6), padding=1, stride=2, groups=13),
    Case("depthwise-together", 18, 1, (5, 5), (3, 3), 16, padding=2, groups=18),
    Case("many-rows", 100, 2, (3, 3), (5, 6), padding=1),
    Case("many-rows-together", 75, 2, (2, 2), (3, 4), 19),
    Case("many-channels", 35, 70, (1, 1), (6, 7)),
    Case("one-weight", 1, 1, (1, 1), (1, 1), 1),
    Case("no-images", 17, 3, (3, 3), (5, 5), 0, padding=1),
    Case("empty-maps-0x4", 17, 3, (2, 3), (0, 4), padding=1),
    Case("empty-maps-3x0", 17, 3, (1, 1), (3, 0), 17, padding=1),
    Case("no-channels", 5, 0, (3, 3), (4, 5), padding=1),
    Case("no-rows", 0, 4, (3, 3), (4, 5), padding=1),
]
BY_NAME = {case.name: case for case in CASES}


# ---------------------------------------------------------------------------------------- memory

MEMORY = ["dense", "channels_last", "window", "channels_last_window", "spread", "reversed", "mixed"]
"""Ways in which images lie in memory; NaN surrounds all but the first two."""


def place(shape: tuple[int, ...], memory: str, dtype: str) -> tuple[Array, Array]:
    """A NaN-filled frame, and the images of `shape` in it that a kernel may read or write."""
    n, c, h, w = shape
    if memory == "dense":
        frame = np.full(shape, np.nan, dtype)
        return frame, frame
    if memory == "channels_last":
        frame = np.full((n, h, w, c), np.nan, dtype)
        return frame, frame.transpose(0, 3, 1, 2)
    if memory == "channels_last_window":
        frame = np.full((n + 2, h + 2, w + 2, c + 2), np.nan, dtype)
        return frame, frame[1:-1, 1:-1, 1:-1, 1:-1].transpose(0, 3, 1, 2)
    if memory == "mixed":  # columns, channels, images, rows
        frame = np.full((w + 1, c + 1, n + 1, h + 1), np.nan, dtype)
        return frame, frame[:-1, :-1, 1:, 1:].transpose(2, 1, 3, 0)
    if memory == "spread":
        frame = np.full([2 * i + 1 for i in shape], np.nan, dtype)
        return frame, frame[1::2, 1::2, 1::2, 1::2]
    frame = np.full([i + 2 for i in shape], np.nan, dtype)
    window = frame[1:-1, 1:-1, 1:-1, 1:-1]
    return frame, window[::-1, ::-1, ::-1, ::-1] if memory == "reversed" else window


def put(images: Array, memory: str, dtype: str) -> Array:
    """A copy of images that lies in memory like that."""
    _, window = place(images.shape, memory, dtype)
    window[...] = images
    return window


# --------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Wanted:
    """What a convolution computes, and what bounds its rounding."""

    result: Array  # in float64
    size: Array  # the sum of the absolute products of each result
    terms: int  # of a sum


@dataclass(frozen=True)
class Operands:
    """A weight and images whose numbers float32 holds, and what they give."""

    case: Case
    weight: spfmt.SparseTensor
    x: Array
    dy: Array
    bias: Array

    def run(self, kernel: Kernel, **more: Any) -> Array:
        """The product of a kernel, of these operands or of those in `more`."""
        with forced(kernel.variant):
            return self.by(kernel.op, kernel.dtype, kernel.isa, **more)

    def by(self, op: str, dtype: str, backend: str = "auto", **more: Any) -> Array:
        """One of the three products, by any backend."""
        a = more.pop("weight", self.weight).astype(dtype)
        x, dy = (more.pop(name, getattr(self, name)) for name in ("x", "dy"))
        options = {"backend": backend, **self.case.how, **more}
        if op == "conv2d":
            options.setdefault("bias", self.bias.astype(dtype))
            return spfmt.conv2d(a, x.astype(dtype, copy=False), **options)
        if op == "conv2d_input":
            return spfmt.conv2d_input(a, dy.astype(dtype, copy=False), self.case.size, **options)
        dy, x = dy.astype(dtype, copy=False), x.astype(dtype, copy=False)
        return spfmt.conv2d_weight(a, dy, x, **options)

    def operand(self, op: str) -> str:
        """The name of the images that a product reads."""
        return "dy" if op == "conv2d_input" else "x"

    def out_shape(self, op: str) -> tuple[int, ...]:
        return self.case.x_shape if op == "conv2d_input" else self.case.y_shape

    def wanted(self, op: str) -> Wanted:
        return wanted(self, op)

    def absolute(self) -> Operands:
        a = self.weight
        values = a.with_values(abs(a.values))
        return Operands(self.case, values, abs(self.x), abs(self.dy), abs(self.bias))


def wanted(operands: Operands, op: str) -> Wanted:
    """The reference in float64 and the sizes of its sums."""
    case = operands.case
    cells = case.kernel[0] * case.kernel[1]
    summands = {
        "conv2d": case.channels * cells + 1,
        "conv2d_input": case.rows // case.groups * cells,
        "conv2d_weight": case.batch * case.out_size[0] * case.out_size[1],
    }
    result = operands.by(op, "float64", "reference")
    size = operands.absolute().by(op, "float64", "reference")
    return Wanted(result, size, summands[op])


def make_operands(format: str, case: Case) -> Operands:
    """Random operands that depend on the names alone."""
    rng = np.random.default_rng(zlib.crc32(f"{format} {case.name}".encode()))
    weight = MAKERS[format](case.shape, rng).astype("float32")
    return of_weight(case, weight, rng)


def of_weight(case: Case, weight: spfmt.SparseTensor, rng: np.random.Generator) -> Operands:
    """Random images for a weight."""
    x, dy, bias = (
        rng.standard_normal(shape, np.float32) for shape in (case.x_shape, case.y_shape, case.rows)
    )
    return Operands(case, weight, x, dy, bias)


@functools.cache
def operands(format: str, name: str) -> Operands:
    """The operands of a case by its name."""
    return make_operands(format, BY_NAME[name])


@functools.cache
def known(format: str, name: str, op: str) -> Wanted:
    """What they give, computed once for all levels."""
    return operands(format, name).wanted(op)


def check(got: Array, want: Wanted) -> None:
    """|got - want| within the rounding bound of sums of so many products of such sizes."""
    bound = (want.terms + 2) * np.finfo(got.dtype).eps * want.size
    assert got.shape == want.result.shape
    assert (np.abs(got - want.result) <= bound).all()
