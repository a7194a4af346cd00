"""The CUDA kernels of groups, and the transposition, on the CPU: against float64, within bounds.

Structures, operands and results are such that a kernel that reads or writes what it must not is
found: NaN lies between the rows of operands, and results have a frame.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_cases import CODES, DTYPES, ORDERS, PRECISIONS, Result, call, emulate, library, operand

from spfmt.cuda import library as plain
from spfmt.cuda.plan import DeviceTiles, device_tiles
from spfmt.formats import HRBP, Groups, ShuffledBlock
from spfmt.formats._layout import lower_groups

KINDS = (("bf16", "tf32"), ("f16", "tf32"), ("f32", "tf32"), ("f32", "float32"))
OPS = ("spmm", "spmm_t", "sddmm")


class Tiles(plain.Tiles):
    """The struct Tiles of cuda/api.h, on arrays of numpy."""

    @classmethod
    def of(cls, tiles: DeviceTiles) -> Tiles:
        """Point to the arrays, which the caller keeps."""
        count = tiles.tile.size
        numbers = {
            n: getattr(tiles, n) for n in ("rows", "cols", "most_rows", "most_cols", "chunk")
        }
        pointers = {
            n: getattr(tiles, n).ctypes.data
            for n, t in cls._fields_
            if t is ctypes.c_void_p and getattr(tiles, n) is not None
        }
        return cls(count=count, **numbers, **pointers)


@dataclass(frozen=True)
class Case:
    """A structure and the samples of a product.

    Attributes
    ----------
    height : int or tuple of int
        Of the row groups: all, or one after the other.
    stride, offset : int
        Elements that rows of the operands have beyond `n`, and that lie before the first.
    """

    rows: int
    cols: int
    n: int
    height: int | tuple[int, ...] = 16
    density: float = 0.3
    most_rows: int = 64
    stride: int = 0
    offset: int = 0
    chunk: int = 192
    bias: bool = True
    parts: int = 1

    def groups(self, rng: np.random.Generator) -> Groups:
        """Draw lists in any order; the second of several has no columns."""
        heights = self.height
        if isinstance(heights, int):
            heights = (heights,) * -(-self.rows // heights)
        group_ptr = np.minimum(np.append(0, np.cumsum(heights)), self.rows)
        most = round(self.density * self.cols)
        counts = np.clip(most + rng.integers(-2, 3, len(heights)), 0, self.cols)
        if self.density in (0, 1):
            counts[:] = most
        elif len(heights) > 2:
            counts[1] = 0
        lists = [rng.permutation(self.cols)[:count] for count in counts]
        return lower_groups(
            (self.rows, self.cols), rng.permutation(self.rows).astype(np.int32), group_ptr,
            np.append(0, np.cumsum(counts)), np.concatenate(lists).astype(np.int32),
        )  # fmt: skip


CASES = (
    Case(1, 1, 1, density=1, most_rows=16),
    Case(1, 3, 7, density=1, most_rows=64),
    Case(16, 16, 8, density=1, most_rows=16, bias=False),
    Case(64, 96, 64, height=64, density=0.5),
    Case(67, 101, 63, height=16, most_rows=16),
    Case(67, 101, 65, height=16, most_rows=16, stride=7),
    Case(130, 257, 72, height=64, density=0.3, stride=8),
    Case(50, 33, 17, height=24, density=0.5, offset=1),
    Case(31, 200, 129, height=5, density=0.7, most_rows=16, stride=7, offset=8, parts=4),
    Case(130, 71, 129, height=100, density=0.4, most_rows=128, stride=7, parts=2),
    Case(200, 90, 7, height=128, density=0.9, most_rows=128),
    Case(100, 150, 65, height=(64, 5, 24, 7), density=0.5, stride=6, chunk=40),
    Case(96, 97, 40, height=(24, 8, 64), density=0.6, bias=False, chunk=16),
    Case(40, 64, 16, height=8, density=0),
    Case(48, 300, 24, height=48, density=1, chunk=300),
)


# -------------------------------------------------------------------------------------- running


class Problem:
    """A structure with operands, and what the products of it may be.

    Attributes
    ----------
    values, x, dy : ndarray
        In the dtype of the kernel.
    dense, x64, dy64 : ndarray of float64
    """

    def __init__(
        self, groups: Groups, dtype: str, precision: str, n: int, most_rows: int = 64,
        stride: int = 0, offset: int = 0, chunk: int = 192, bias: bool = True, values: Any = None,
        parts: int = 1,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(7)
        self.groups, self.dtype, self.precision, self.n = groups, dtype, precision, n
        self.offset, self.parts = offset, parts
        self.plan = device_tiles(groups, most_rows, chunk)
        self.tiles = Tiles.of(self.plan)

        def draw(rows: int, columns: int, beyond: int) -> Any:
            return operand(rng.standard_normal((rows, columns)), dtype, columns + beyond, offset)

        if values is None:
            values = rng.standard_normal(groups.nnz)
        self.values = operand(values.reshape(1, -1), dtype, groups.nnz + 16, offset)[0]
        self.x, self.dy = draw(groups.cols, n, stride), draw(groups.rows, n, stride)
        self.bias = rng.standard_normal(groups.rows).astype(np.float32) if bias else None
        self.where = groups.coordinates()
        self.dense = np.zeros((groups.rows, groups.cols))
        self.dense[self.where] = self.values
        self.x64, self.dy64 = (operand.astype(np.float64) for operand in (self.x, self.dy))

    @classmethod
    def of(cls, case: Case, dtype: str, precision: str) -> Problem:
        """Return the problem of a case."""
        names = ("n", "most_rows", "stride", "offset", "chunk", "bias", "parts")
        arguments = {name: getattr(case, name) for name in names}
        return cls(case.groups(np.random.default_rng(1)), dtype, precision, **arguments)

    def run(self, op: str) -> Any:
        """Return the result of a product; nothing beside it was written."""
        groups, name = self.groups, op
        op = op.removesuffix("_sm90")
        shape = {
            "spmm": (groups.rows, self.n),
            "spmm_t": (groups.cols, self.n),
            "sddmm": (self.parts, groups.nnz),
        }[op]
        result = Result(
            *shape, "f32" if op == "sddmm" else self.dtype, self.offset, 5 * (op != "sddmm")
        )
        dense = {"spmm": self.x, "spmm_t": self.dy}
        before = (
            CODES[self.dtype],
            PRECISIONS[self.precision],
            ctypes.byref(self.tiles),
        )
        if op == "sddmm":
            arguments = (self.dy, _stride(self.dy), self.x, _stride(self.x), self.n)
            arguments += (self.parts, groups.nnz, result.array)
        else:
            arguments = (self.values, dense[op], _stride(dense[op]), self.n)
            if op == "spmm":
                arguments += (self.bias,)
            arguments += (result.array, result.stride)
        call(f"groups_{name}", *before, *arguments, None)
        result.check_frame()
        return result.array.sum(0, keepdims=True) if op == "sddmm" else result.array.copy()

    def check(self, op: str) -> Any:
        """Fail if a product is off by more than rounding explains; return it."""
        got = self.run(op)
        op = op.removesuffix("_sm90")
        want, size, terms = getattr(self, f"_{op}")()
        off = self._rounding(want, size, terms, "f32" if op == "sddmm" else self.dtype)
        error = np.abs(got.astype(np.float64) - want)
        assert not np.isnan(error).any(), "NaN: what is not there was used"
        worst = np.max(error / off, initial=0)
        assert worst <= 1, f"{worst:.3g} times the bound"
        return got

    def _rounding(self, want: Any, size: Any, terms: Any, out: str) -> Any:
        """Bound the error of sums of `terms` products, the absolute ones of which sum to `size`."""
        product, sums = {  # of products of 16 bits, which are exact; of ten; of pairs of them
            ("f32", "tf32"): (2.0**-10 + 2.0**-22, 1), ("f32", "float32"): (3 * 2.0**-22, 3)
        }.get((self.dtype, self.precision), (0.0, 1))  # fmt: skip
        unit = 2.0**-23  # of a sum: devices cut where the emulation rounds
        steps = (sums * terms + 2) * unit
        error = size * (product + steps / (1 - steps))
        half_ulp, least = {"f32": (2.0**-24, 2.0**-149), "bf16": (2.0**-8, 2.0**-133),
                           "f16": (2.0**-11, 2.0**-24)}[out]  # fmt: skip
        return error + half_ulp * (np.abs(want) + error) + least

    def _spmm(self) -> tuple[Any, Any, Any]:
        bias = np.zeros(1) if self.bias is None else self.bias.astype(np.float64)[:, None]
        terms = np.count_nonzero(self.dense, axis=1)[:, None]
        size = np.abs(self.dense) @ np.abs(self.x64) + np.abs(bias)
        return self.dense @ self.x64 + bias, size, terms

    def _spmm_t(self) -> tuple[Any, Any, Any]:
        terms = np.count_nonzero(self.dense, axis=0)[:, None]
        return self.dense.T @ self.dy64, np.abs(self.dense.T) @ np.abs(self.dy64), terms

    def _sddmm(self) -> tuple[Any, Any, Any]:
        want = (self.dy64 @ self.x64.T)[self.where]
        size = (np.abs(self.dy64) @ np.abs(self.x64.T))[self.where]
        return want[None], size[None], self.n


def _stride(array: Any) -> int:
    return array.strides[0] // array.itemsize


@pytest.fixture(autouse=True)
def _forward() -> Any:
    emulate()
    yield
    emulate()


# ---------------------------------------------------------------------------------- the products

_every_kind = pytest.mark.parametrize("kind", KINDS, ids="-".join)
_every_op = pytest.mark.parametrize("op", OPS)


@pytest.mark.parametrize("case", CASES, ids=str)
@_every_kind
def test_products_are_within_their_bounds(case: Case, kind: tuple[str, str]) -> None:
    problem = Problem.of(case, *kind)
    for op in OPS:
        problem.check(op)


@pytest.mark.parametrize("case", [c for c in CASES if c.rows > 32 and c.n > 8], ids=str)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids="-".join)
def test_every_order_gives_the_same_bits(case: Case, kind: tuple[str, str]) -> None:
    problem = Problem.of(case, *kind)
    for op in OPS:
        emulate()
        want = problem.run(op).tobytes()
        for order, late in ORDERS:
            emulate(order, late)
            assert problem.run(op).tobytes() == want, (op, order)
        emulate("1", 1, hosts=2)
        assert problem.run(op).tobytes() == want, (op, "two hosts")


SM90 = [c for c in CASES if c.most_rows > 16]


@pytest.mark.parametrize("case", SM90, ids=str)
@pytest.mark.parametrize("kind", KINDS[:2], ids="-".join)
def test_four_warps_multiply_within_the_bounds(case: Case, kind: tuple[str, str]) -> None:
    problem = Problem.of(case, *kind)
    want = problem.check("spmm_sm90").tobytes()
    if case.n > 8 and kind == KINDS[0]:
        for order, late in ORDERS:
            emulate(order, late)
            assert problem.run("spmm_sm90").tobytes() == want, order


def test_four_warps_multiply_nothing_else() -> None:
    for case, kind in ((Case(20, 30, 8, most_rows=16), KINDS[0]), (SM90[0], KINDS[3])):
        with pytest.raises(RuntimeError, match="invalid argument"):
            Problem.of(case, *kind).run("spmm_sm90")


def _tensors() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    likely = rng.random((48, 72)) < np.repeat(rng.random((3, 72)) < 0.3, 16, axis=0)
    dense = np.where(likely, rng.standard_normal((48, 72), np.float32), 0)
    return {
        "found": ShuffledBlock.from_dense(dense, block_shape=(16, 2)),
        "shuffled": ShuffledBlock.random((100, 60), 0.3, rng, block_shape=(24, 5)),
        "hrbp": HRBP.random((70, 90), 0.25, rng, groups=2),
        "nothing": ShuffledBlock.from_dense(np.zeros((20, 30))),
    }


@pytest.mark.parametrize("name", _tensors())
def test_formats_arrive_as_they_are(name: str) -> None:
    tensor = _tensors()[name]
    layout = tensor.layout()
    assert isinstance(layout, Groups)
    for most_rows in (16, 64, 128):
        values = np.asarray(tensor.values).ravel()
        problem = Problem(layout, "f32", "float32", 33, most_rows, values=values)
        assert (problem.dense == tensor.to_dense()).all()
        for op in OPS:
            problem.check(op)


def _odd_lists() -> Groups:
    """Return bands whose lists overlap, with columns that nobody names between two lists."""
    begin, end = np.array([0, 0, 4, 14, 9]), np.array([9, 9, 11, 31, 9])
    heights = np.array([16, 3, 7, 1, 2])
    row_ptr, value_ptr = (np.append(0, np.cumsum(n)) for n in (heights, heights * (end - begin)))
    columns = np.random.default_rng(2).permutation(40).astype(np.int32)[:31]
    return Groups(29, 40, np.arange(29, dtype=np.int32), row_ptr, begin, end, columns, value_ptr)


@_every_kind
def test_lists_may_overlap(kind: tuple[str, str]) -> None:
    problem = Problem(_odd_lists(), *kind, 21, chunk=8)
    for op in OPS:
        problem.check(op)


NOT_FINITE = Case(70, 85, 40, height=24, density=0.5)


def check_not_finite(problem: Problem, op: str) -> None:
    """Fail if NaN in a row or a sample of an operand reaches what has no part in it."""
    if op == "sddmm":
        return  # every sample has a part in every value
    operand, dense = (problem.x, problem.dense) if op == "spmm" else (problem.dy, problem.dense.T)
    named = dense[:, 0] != 0  # row 0 of the operand: what a wrong index is likely to find
    assert 0 < named.sum() < named.size
    want = problem.run(op)
    operand[0] = operand[:, -2] = np.nan
    got = problem.run(op)
    assert np.isnan(got[named].astype(np.float32)).all()
    assert np.delete(got == want, -2, axis=1)[~named].all(), "NaN where no operand is"


@_every_kind
@pytest.mark.parametrize("op", OPS[:2])
def test_what_is_not_finite_reaches_only_its_products(op: str, kind: tuple[str, str]) -> None:
    check_not_finite(Problem.of(NOT_FINITE, *kind), op)


def check_conflicts(problem: Problem, op: str) -> None:
    """Fail if rows of an ldmatrix meet in a bank."""
    library().counts()
    problem.run(op)
    _, mma, ldmatrix, conflicts = library().counts()
    assert mma > 0
    assert ldmatrix > 0 or (op, problem.dtype) == ("spmm", "f32")
    assert conflicts == 0, f"{conflicts} bank conflicts in {ldmatrix} matrices"


@_every_op
@_every_kind
def test_fragments_meet_no_bank_twice(op: str, kind: tuple[str, str]) -> None:
    for rows in (16, 64, 128):
        check_conflicts(Problem.of(Case(128, 128, 128, rows, 0.5, rows), *kind), op)


def test_what_is_not_offered_is_an_error() -> None:
    problem = Problem.of(Case(20, 30, 8), "f32", "tf32")
    problem.tiles.most_rows = 32
    for op in ("spmm", "sddmm"):
        with pytest.raises(RuntimeError, match="invalid argument"):
            problem.run(op)
    with pytest.raises(RuntimeError, match="invalid argument"):
        call("transpose", 9, CODES["f32"], problem.x, 8, 30, 8, problem.dy, 30, None)


def test_planted_bugs_are_found() -> None:
    script = Path(__file__).with_name("plant_cuda_bugs.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize("chunk", [1, 16, 192])
def test_pieces_hold_every_column_of_every_tile_once(chunk: int) -> None:
    for groups in (_odd_lists(), *(c.groups(np.random.default_rng(3)) for c in CASES)):
        plan = device_tiles(groups, 64, chunk)
        found = []
        for owner, (begin, end) in enumerate(zip(plan.piece_ptr, plan.piece_ptr[1:], strict=False)):
            pieces = plan.piece[begin:end]
            assert (np.diff(pieces["row"]) >= 0).all(), "in the order of the tiles"
            for piece in pieces:
                entries = slice(piece["first"], piece["first"] + piece["count"])
                columns, places = plan.sorted_cols[entries], plan.ascending[entries]
                assert 1 <= len(columns) <= 64
                assert (np.diff(columns) > 0).all()
                assert (columns // chunk == owner).all()
                assert (plan.col_indices[piece["col"] + places] == columns).all()
                found += [(piece["row"], c) for c in columns]
        want = [
            (tile["row"], c)
            for tile in plan.tile
            for c in plan.col_indices[tile["col"] : tile["col"] + tile["cols"]]
        ]
        assert sorted(found) == sorted(want)


# --------------------------------------------------------------------------------- transposition

_LAYOUTS = ((1, 1, 0, 0), (3, 130, 0, 0), (64, 64, 0, 0), (65, 63, 1, 0), (127, 66, 2, 1),
            (64, 128, 0, 2))  # fmt: skip


@pytest.mark.parametrize("to", CODES)
@pytest.mark.parametrize("of", CODES)
def test_transposition_rounds_once(of: str, to: str) -> None:
    rng = np.random.default_rng(4)
    for rows, cols, stride, offset in _LAYOUTS:
        numbers = rng.standard_normal((rows, cols)) * 10.0 ** rng.integers(-9, 6, (rows, cols))
        numbers.flat[:5] = (0, np.inf, -np.inf, np.nan, 2.0**-24)[: numbers.size]
        with np.errstate(over="ignore"):
            source = operand(numbers, of, cols + stride, offset)
            want = source.astype(np.float32).T.astype(DTYPES[to])
        for order, late in ORDERS[:3]:
            emulate(order, late)
            result = Result(cols, rows, to, offset, more=2 * stride)
            arguments = (source, cols + stride, rows, cols, result.array, result.stride, None)
            call("transpose", CODES[of], CODES[to], *arguments)
            result.check_frame()
            got = result.array.astype(np.float32)
            np.testing.assert_array_equal(got, want.astype(np.float32))
