"""The CUDA convolutions of groups on the CPU: against float64 of unfolded images, within bounds."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from cuda_cases import CODES, DTYPES, ORDERS, PRECISIONS, Result, call, emulate, operand
from test_cuda_groups import KINDS, Case, Problem, Tiles

from spfmt.convolution import Convolution
from spfmt.cuda.library import Maps, Stride
from spfmt.cuda.plan import conv_tiles
from spfmt.errors import KernelNotFound
from spfmt.formats import HRBP, Groups, ShuffledBlock

OPS = ("spmm", "spmm_t", "sddmm")


@dataclass(frozen=True)
class Conv:
    """A convolution of random groups.

    Attributes
    ----------
    channels : (int, int)
        Of Y and X.
    size : (int, int)
        Of the maps of X.
    batch : int
        Multiples of eight are copied sixteen bytes at once, and so are others from eight on.
    last : bool
        Whether channels lie side by side before they are transposed.
    """

    channels: tuple[int, int]
    size: tuple[int, int]
    batch: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, ...] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    height: int | tuple[int, ...] = 16
    most_rows: int = 16
    density: float = 0.3
    chunk: int = 192
    parts: int = 1
    last: bool = True
    offset: int = 0
    bias: bool = True

    def how(self) -> Convolution:
        shape = (*self.channels, *self.kernel)
        return Convolution.of(shape, self.stride, self.padding, self.dilation)

    def groups(self) -> Groups:
        rows, cols = self.channels[0], self.channels[1] * self.kernel[0] * self.kernel[1]
        case = Case(rows, cols, 1, self.height, self.density)
        return case.groups(np.random.default_rng(1))


CASES = (
    Conv((1, 1), (1, 1), 1, kernel=(1, 1), padding=(0, 0), density=1),
    Conv((16, 8), (5, 4), 8),
    Conv((20, 9), (6, 5), 1, density=0.4, parts=2),
    Conv((33, 7), (4, 7), 12, height=24, last=False, bias=False),
    Conv((70, 24), (7, 6), 16, stride=(2, 2), height=64, most_rows=64, parts=3),
    Conv((70, 24), (7, 6), 5, stride=(2, 1), height=64, most_rows=64, parts=2, chunk=10),
    Conv((130, 12), (5, 5), 8, height=128, most_rows=128, density=0.6, chunk=5),
    Conv((40, 10), (9, 8), 3, kernel=(5, 3), padding=(2, 0, 1, 3), dilation=(1, 2), chunk=4),
    Conv((24, 6), (8, 9), 9, kernel=(2, 3), stride=(3, 2), padding=(0, 1), dilation=(2, 1)),
    Conv((32, 40), (4, 4), 8, kernel=(1, 1), stride=(2, 2), padding=(0, 0), height=8),
    Conv((32, 80), (3, 3), 8, kernel=(1, 1), padding=(0, 0), density=1, last=False, parts=9),
    Conv((17, 5), (3, 3), 8, padding=(1, 1), offset=1, last=False),
    Conv((48, 16), (4, 4), 8, height=(24, 16, 8), density=0.5, stride=(1, 2)),
    Conv((16, 4), (2, 3), 4, kernel=(3, 3), density=0),
)


class Unfolded(Problem):
    """A convolution and, in float64, the matrices that it would be of unfolded images."""

    def __init__(self, conv: Conv, dtype: str, precision: str, values: Any = None) -> None:
        self.conv, self.how = conv, conv.how()
        super().__init__(
            conv.groups() if values is None else values.layout(), dtype, precision, 1,
            conv.most_rows, offset=conv.offset, bias=conv.bias,
            values=None if values is None else np.asarray(values.values).ravel(),
        )  # fmt: skip
        rng = np.random.default_rng(3)
        self.plan = conv_tiles(self.groups, conv.most_rows, self.how, conv.chunk)
        self.tiles = Tiles.of(self.plan)
        self.out = self.how.sizes(*conv.size)
        chunk = 16 // DTYPES[dtype].itemsize
        self.stride = -(-conv.batch // chunk) * chunk if conv.batch >= chunk else conv.batch
        self.x_maps, self.x, x = self._images(rng, conv.channels[1], conv.size)
        self.dy_maps, self.dy, dy = self._images(rng, conv.channels[0], self.out)
        self.dy64 = dy.reshape(len(dy), -1)
        self.cells = list(self._cells())
        self.x64 = self._unfold(x)
        self.n = self.dy64.shape[1]

    def _maps(self, channels: int, size: tuple[int, int]) -> Maps:
        height, width = size
        strides = (1, width * channels, channels) if self.conv.last else (height * width, width, 1)
        return Maps(channels, height, width, self.conv.batch, *strides, self.stride)

    def _images(self, rng: Any, channels: int, size: tuple[int, int]) -> tuple[Maps, Any, Any]:
        """Return maps (C, H, W, N) as a kernel wants them, and as they are, in float64."""
        numbers = rng.standard_normal((channels, *size, self.conv.batch))
        order = numbers.transpose(1, 2, 0, 3) if self.conv.last else numbers
        given = operand(
            order.reshape(-1, self.conv.batch), self.dtype, self.stride, self.conv.offset
        )
        return self._maps(channels, size), given, numbers.astype(DTYPES[self.dtype]).astype(float)

    def _in_order(self, found: Any, channels: int, size: tuple[int, int]) -> Any:
        if not self.conv.last:
            return found.reshape(channels, *size, -1)
        return found.reshape(*size, channels, -1).transpose(2, 0, 1, 3)

    def _cells(self) -> Any:
        """Yield of each cell of the kernel the pixels of Y that it has, and those of X."""
        (top, left), (height, width) = self.how.padding[:2], self.conv.size
        for a in range(self.how.kernel[0]):
            for b in range(self.how.kernel[1]):
                h = np.arange(self.out[0]) * self.how.stride[0] + a * self.how.dilation[0] - top
                w = np.arange(self.out[1]) * self.how.stride[1] + b * self.how.dilation[1] - left
                rows, columns = (h >= 0) & (h < height), (w >= 0) & (w < width)
                inside = np.ix_(np.flatnonzero(rows), np.flatnonzero(columns))
                yield inside, np.ix_(h[rows], w[columns])

    def _unfold(self, x: Any) -> Any:
        unfolded = np.zeros((x.shape[0], len(self.cells), *self.out, x.shape[-1]))
        for cell, (of_y, of_x) in enumerate(self.cells):
            unfolded[:, cell, of_y[0], of_y[1]] = x[:, of_x[0], of_x[1]]
        return unfolded.reshape(unfolded.shape[0] * len(self.cells), -1)

    def _fold(self, columns: Any) -> Any:
        channels = self.conv.channels[1]
        columns = columns.reshape(channels, len(self.cells), *self.out, -1)
        folded = np.zeros((channels, *self.conv.size, columns.shape[-1]))
        for cell, (of_y, of_x) in enumerate(self.cells):
            folded[:, of_x[0], of_x[1]] += columns[:, cell, of_y[0], of_y[1]]
        return folded.reshape(channels, -1)

    def _spmm_t(self) -> tuple[Any, Any, Any]:
        want, size, terms = super()._spmm_t()
        count = np.broadcast_to(terms, want.shape)
        return self._fold(want), self._fold(size), self._fold(count)

    def run(self, op: str) -> Any:
        """Return the result of a product as a matrix; nothing beside it was written."""
        before = CODES[self.dtype], PRECISIONS[self.precision], ctypes.byref(self.tiles)
        x, dy = ((a, ctypes.byref(m)) for a, m in ((self.x, self.x_maps), (self.dy, self.dy_maps)))
        steps = Stride(*self.how.stride)
        if op == "sddmm":
            result = Result(self.conv.parts, self.groups.nnz, "f32", self.conv.offset, 0)
            rest = (*dy, *x, steps, self.conv.parts, self.groups.nnz, result.array, None)
            call("groups_conv_sampled", *before, *rest)
            result.check_frame()
            return result.array.sum(0, keepdims=True)
        more = self.stride - self.conv.batch
        of = 1 if op == "spmm_t" else 0
        channels, size = self.conv.channels[of], (self.out, self.conv.size)[of]
        shape = channels * size[0] * size[1], self.conv.batch
        result = Result(*shape, self.dtype, self.conv.offset, more)
        maps = ctypes.byref(self._maps(channels, size))
        if op == "spmm_t":
            rest = (*dy, steps, result.array, maps, None)
        else:
            rest = (*x, steps, self.bias, result.array, maps, None)
        names = {"spmm": "groups_conv", "spmm_t": "groups_conv_t", "spmm_sm90": "groups_conv_sm90"}
        call(names[op], *before, self.values, *rest)
        result.check_frame()
        return self._in_order(result.array, channels, size).reshape(channels, -1)


@pytest.fixture(autouse=True)
def _forward() -> Any:
    emulate()
    yield
    emulate()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_products_are_within_their_bounds(case: Conv, kind: tuple[str, str]) -> None:
    problem = Unfolded(case, *kind)
    for op in OPS:
        problem.check(op)
    if case.most_rows > 16 and kind in KINDS[:2]:
        problem.check("spmm_sm90")


@pytest.mark.parametrize("case", [CASES[3], CASES[4], CASES[5]], ids=str)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids="-".join)
def test_every_order_gives_the_same_bits(case: Conv, kind: tuple[str, str]) -> None:
    problem = Unfolded(case, *kind)
    for op in OPS:
        emulate()
        want = problem.run(op).tobytes()
        for order, late in ORDERS:
            emulate(order, late)
            assert problem.run(op).tobytes() == want, (op, order)
        emulate("1", 1, hosts=2)
        assert problem.run(op).tobytes() == want, (op, "two hosts")


def test_formats_arrive_as_they_are() -> None:
    rng = np.random.default_rng(0)
    shape = (40, 12, 3, 3)
    for tensor in (
        ShuffledBlock.random(shape, 0.3, rng, block_shape=(16, 4)),
        HRBP.random(shape, 0.3, rng, groups=2),
    ):
        problem = Unfolded(Conv((40, 12), (5, 4), 8, most_rows=64), "f32", "float32", tensor)
        assert (problem.dense == tensor.to_dense().reshape(40, -1)).all()
        for op in OPS:
            problem.check(op)


def check_not_finite(op: str) -> None:
    """Fail if NaN in a channel of a pixel reaches what has no part in it."""
    if op == "sddmm":
        return  # every sample has a part in every value
    problem = Unfolded(Conv((33, 9), (4, 5), 8, density=0.2, most_rows=64), "bf16", "tf32")
    given, maps = (problem.x, problem.x_maps) if op == "spmm" else (problem.dy, problem.dy_maps)
    want = problem.run(op)
    ones = np.zeros_like(given, np.float64)
    for row in (0, 7):
        given[row], ones[row] = np.nan, 1
    ones = problem._in_order(ones, maps.channels, (maps.height, maps.width))
    weight = (problem.dense != 0).astype(float)
    if op == "spmm":
        reached = weight @ problem._unfold(ones)
    else:
        reached = problem._fold(weight.T @ ones.reshape(maps.channels, -1))
    got = problem.run(op)
    assert 0 < (reached > 0).sum() < reached.size
    hit = np.isnan(got.astype(np.float32))
    assert ((reached > 0) == hit).all(), "NaN where no operand is, or none where one is"
    assert (got == want)[~hit].all()


@pytest.mark.parametrize("op", OPS[:2])
def test_what_is_not_finite_reaches_only_its_products(op: str) -> None:
    check_not_finite(op)


def test_what_kernels_cannot_count_is_an_error() -> None:
    problem = Unfolded(CASES[1], "f32", "tf32")
    for field, value in (("height", 2**15), ("width", 2**15), ("stride", 2**30)):
        for op, maps in (("spmm", problem.x_maps), ("spmm_t", problem.dy_maps)):
            before = getattr(maps, field)
            setattr(maps, field, value)
            with pytest.raises(RuntimeError, match="invalid argument"):
                problem.run(op)
            setattr(maps, field, before)
    far = Convolution.of((16, 4, 3, 3), dilation=2**14, padding=2**15)
    with pytest.raises(KernelNotFound, match="reach 32767 pixels"):
        conv_tiles(Case(16, 36, 1).groups(np.random.default_rng(0)), 16, far)


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_pieces_hold_every_column_of_every_tile_once(stride: tuple[int, int]) -> None:
    how = Convolution.of((100, 11, 3, 2), stride, padding=(1, 2), dilation=(2, 1))
    groups = Case(100, 66, 1, height=(64, 36), density=0.5).groups(np.random.default_rng(0))
    plan = conv_tiles(groups, 64, how, chunk=4)
    found = []
    for owner, (begin, end) in enumerate(zip(plan.piece_ptr, plan.piece_ptr[1:], strict=False)):
        phase, chunk = divmod(owner, 3)
        for piece in plan.piece[begin:end]:
            for entry in range(piece["first"], piece["first"] + piece["count"]):
                at = piece["col"] + plan.ascending[entry]
                column, channel = plan.col_indices[at], plan.sorted_cols[entry]
                a, b = divmod(int(column) % 6, 2)
                assert plan.tap[at].tolist() == (channel, 2 * a - 1, b - 2)
                assert column // 6 == channel
                assert channel // 4 == chunk
                # Pixel s i + phase of dX is the pixel i + down of dY, where the cell adds to it.
                for cell, s, p, shift, of in ((2 * a - 1, stride[0], phase // stride[1],
                                               piece["down"], how.padding),
                                              (b - 2, stride[1], phase % stride[1],
                                               piece["across"], how.padding)):  # fmt: skip
                    assert s * shift + cell == p, of
                found.append((int(piece["row"]), int(column)))
    want = [
        (int(tile["row"]), int(c))
        for tile in plan.tile
        for c in plan.col_indices[tile["col"] : tile["col"] + tile["cols"]]
    ]
    assert sorted(found) == sorted(want)
