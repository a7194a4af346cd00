"""What convolutions say to bad input, what they keep, and that no numbers crash them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_cases import LAYOUTS
from fresh_python import run_python

import spfmt
from spfmt import FormatError, KernelNotFound
from spfmt.dispatch import CONVOLUTIONS

TESTS = str(Path(__file__).parent)


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, "float32")


WEIGHT = spfmt.CSR.from_dense(np.arange(1, 6 * 2 * 3 * 3 + 1).reshape(6, 2, 3, 3).astype("float32"))
X, DY = f32(2, 2, 5, 6), f32(2, 6, 3, 4)


# ---------------------------------------------------------------------------------- bad arguments

GEOMETRY: list[tuple[dict[str, Any], str]] = [
    ({"stride": 0}, r"stride=0; expected an int or 2 of them, 1 or more"),
    ({"stride": -1}, "stride=-1"),
    ({"stride": 1.0}, r"stride=1\.0"),
    ({"stride": True}, "stride=True"),
    ({"stride": (1, 2, 3)}, "stride="),
    ({"stride": (1, -2)}, "stride="),
    ({"stride": (2, False)}, "stride="),
    ({"stride": "2"}, "stride='2'"),
    ({"stride": None}, "stride=None"),
    ({"stride": [[1, 2], [3]]}, "stride="),
    ({"stride": 2**31}, "stride=2147483648"),
    ({"stride": 2**70}, "stride="),
    ({"stride": np.float32(2)}, "stride="),
    ({"stride": np.array(2.0)}, "stride="),
    ({"stride": {2: 2, 1: 1}}, "stride="),
    ({"dilation": 0}, "dilation=0"),
    ({"dilation": (1, 1.5)}, "dilation="),
    ({"dilation": 2**30}, "dilation="),
    ({"padding": -1}, "padding=-1; expected an int or 2 of them, 0 or more"),
    ({"padding": (0, 0, -1, 0)}, r"padding=\(0, 0, -1, 0\); expected an int or 4"),
    ({"padding": (1, 2, 3)}, "padding="),
    ({"padding": (1, 2, 3, 4, 5)}, "padding="),
    ({"padding": ()}, "padding="),
    ({"padding": 0.5}, "padding=0.5"),
    ({"padding": True}, "padding=True"),
    ({"padding": None}, "padding=None"),
    ({"padding": np.array(1.5)}, "padding="),
    ({"padding": "foo"}, "padding='foo'; expected 'same', 'valid' or ints"),
    ({"padding": "SAME"}, "padding='SAME'"),
    ({"padding": b"same"}, "padding="),
    ({"padding": "same", "stride": 2}, "padding='same' with a stride"),
    ({"padding": "same", "stride": (1, 2)}, "padding='same' with a stride"),
    ({"groups": 0}, "groups=0; expected an int, 1 or more"),
    ({"groups": -2}, "groups=-2"),
    ({"groups": 2.0}, "groups=2.0"),
    ({"groups": True}, "groups=True"),
    ({"groups": (1, 2)}, "groups="),
    ({"groups": 4}, "groups=4; expected a divisor of 6 channels of Y"),
    ({"groups": 3}, "expected .N, 6, "),  # 2 channels for each group
]


@pytest.mark.parametrize(("options", "message"), GEOMETRY, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_bad_geometry_is_refused(op: str, options: dict[str, Any], message: str) -> None:
    if options == {"groups": 3} and op == "conv2d_input":
        pytest.skip("dX has as many channels as the groups say")
    out = np.full({"conv2d": DY, "conv2d_input": X}.get(op, X).shape, np.nan, "float32")
    calls: dict[str, Callable[[], Any]] = {
        "conv2d": lambda: spfmt.conv2d(WEIGHT, X, out=out, **options),
        "conv2d_input": lambda: spfmt.conv2d_input(WEIGHT, DY, (5, 6), out=out, **options),
        "conv2d_weight": lambda: spfmt.conv2d_weight(WEIGHT, DY, X, **options),
    }
    with pytest.raises(FormatError, match=message) as caught:
        calls[op]()
    assert_answers(caught.value)
    assert np.isnan(out).all()


def assert_answers(error: BaseException) -> None:
    """A message says what was got, what was expected, and how to fix it."""
    text = str(error)
    assert text.startswith("got ")
    assert "; expected " in text
    assert "; fix: " in text


FORWARD: list[tuple[Any, dict[str, Any], str]] = [
    (f32(2, 5, 6), {}, r"X of shape \(2, 5, 6\); expected \(N, 2, H, W\)"),
    (f32(1, 2, 2, 5, 6), {}, "X of shape"),
    (f32(2, 3, 5, 6), {}, "X of shape"),
    (f32(2, 5, 6, 2), {}, "X of shape"),  # channels last in shape
    ([[1, 2]], {}, "X of shape"),
    ("images", {}, "X of shape"),
    (None, {}, "X of shape"),
    (X.astype("float64"), {}, "X of dtype float64 beside the other operands of float32"),
    (X.astype("float16"), {}, "X of dtype float16"),
    (X.astype("int32"), {}, "X of dtype int32"),
    (X.astype(">f4"), {}, "X of dtype >f4"),
    (X.astype("complex64"), {}, "X of dtype complex64"),
    (f32(2, 2, 2, 6), {}, "padded maps of 2 x 6 for a kernel that reaches over 3 x 3"),
    (f32(2, 2, 5, 2), {}, "padded maps of 5 x 2"),
    (X, {"dilation": (1, 3)}, "padded maps of 5 x 6 for a kernel that reaches over 3 x 7"),
    (X, {"padding": (0, 1), "dilation": (1, 4)}, "padded maps of 5 x 8"),
    (f32(2, 2, 0, 6), {}, "padded maps of 0 x 6"),
    (X, {"bias": f32(5)}, r"bias of shape \(5,\); expected \(6,\)"),
    (X, {"bias": f32(6, 1)}, r"bias of shape \(6, 1\); expected \(6,\)"),
    (X, {"bias": np.ones(6)}, "bias of dtype float64 beside values of float32"),
    (X, {"bias": 1.0}, r"bias of shape \(\); expected \(6,\)"),
    (X, {"activation": "tanh"}, "activation='tanh'"),
    (X, {"activation": 1}, "activation=1"),
    (X, {"backend": "gpu"}, "backend 'gpu'"),
    (X, {"backend": None}, "backend None"),
]


@pytest.mark.parametrize(("x", "options", "message"), FORWARD, ids=lambda v: str(v)[:30])
def test_conv2d_refuses(x: Any, options: dict[str, Any], message: str) -> None:
    out = np.full(DY.shape, np.nan, "float32")
    with pytest.raises(FormatError, match=message) as caught:
        spfmt.conv2d(WEIGHT, x, out=out, **options)
    assert_answers(caught.value)
    assert np.isnan(out).all()


BACKWARD: list[tuple[Any, Any, dict[str, Any], str]] = [
    (f32(2, 5, 3, 4), (5, 6), {}, r"dY of shape \(2, 5, 3, 4\); expected \(N, 6, H, W\)"),
    (f32(6, 3, 4), (5, 6), {}, "dY of shape"),
    (DY.astype("float64"), (5, 6), {}, "dY of dtype float64"),
    (DY, (6, 5), {}, "dY with maps of 3 x 4; expected 4 x 3, which maps of 6 x 5 give"),
    (DY, (5, 6), {"padding": 1}, "dY with maps of 3 x 4; expected 5 x 6"),
    (DY, (5, 6), {"stride": 2}, "dY with maps of 3 x 4; expected 2 x 2"),
    (DY, (1, 6), {}, "padded maps of 1 x 6"),
    (DY, (-5, 6), {}, "size="),
    (DY, (5, 6, 1), {}, "size="),
    (DY, (5.0, 6), {}, "size="),
    (DY, "56", {}, "size="),
    (DY, None, {}, "size="),
    (DY, (5, True), {}, "size="),
    (DY, (2**40, 6), {}, "size="),
    (DY, (5, 6), {"backend": "gpu"}, "backend 'gpu'"),
]


@pytest.mark.parametrize(("dy", "size", "options", "message"), BACKWARD, ids=lambda v: str(v)[:30])
def test_conv2d_input_refuses(dy: Any, size: Any, options: dict[str, Any], message: str) -> None:
    out = np.full(X.shape, np.nan, "float32")
    with pytest.raises(FormatError, match=message) as caught:
        spfmt.conv2d_input(WEIGHT, dy, size, out=out, **options)
    assert_answers(caught.value)
    assert np.isnan(out).all()


GRADIENT: list[tuple[Any, Any, dict[str, Any], str]] = [
    (DY[:1], X, {}, "1 images of dY and 2 of X; expected the same number"),
    (DY, X[:0], {}, "2 images of dY and 0 of X"),
    (DY, f32(2, 3, 5, 6), {}, "X of shape"),
    (f32(2, 7, 3, 4), X, {}, "dY of shape"),
    (DY.astype("float64"), X, {}, "dY of dtype float64 beside the other operands of float32"),
    (DY, X.astype("float64"), {}, "dY of dtype float32 beside the other operands of float64"),
    (DY, f32(2, 2, 6, 6), {}, "dY with maps of 3 x 4; expected 4 x 4"),
    (DY, X, {"padding": 1}, "dY with maps of 3 x 4"),
    (DY, X, {"backend": "gpu"}, "backend 'gpu'"),
]


@pytest.mark.parametrize(("dy", "x", "options", "message"), GRADIENT, ids=lambda v: str(v)[:30])
def test_conv2d_weight_refuses(dy: Any, x: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        spfmt.conv2d_weight(WEIGHT, dy, x, **options)
    assert_answers(caught.value)


def everywhere(weight: Any) -> list[Callable[[], Any]]:
    """The three products with a weight, and operands that fit `WEIGHT`."""
    return [
        lambda: spfmt.conv2d(weight, X),
        lambda: spfmt.conv2d_input(weight, DY, (5, 6)),
        lambda: spfmt.conv2d_weight(weight, DY, X),
        lambda: spfmt.conv2d(weight, X, backend="reference"),
    ]


def test_weights_that_are_no_kernels_are_refused() -> None:
    matrix = spfmt.CSR.from_dense(f32(6, 18))
    no_cells = spfmt.CSR((6, 2, 0, 3), np.zeros(7, int), [], f32(0))
    for weight, message in [
        (matrix, "a weight of shape .6, 18.; expected .C_out, C_in / groups, Kh, Kw."),
        (WEIGHT.to_dense(), "a weight of type ndarray; expected a spfmt tensor"),
        (None, "a weight of type NoneType"),
        (no_cells, "kernel"),
    ]:
        for call in everywhere(weight):
            with pytest.raises(FormatError, match=message) as caught:
                call()
            assert_answers(caught.value)


def test_outputs_that_do_not_fit_are_refused() -> None:
    def refuse(out: Any, message: str) -> None:
        calls = [
            lambda: spfmt.conv2d(WEIGHT, X, padding=1, groups=1, out=out),
            lambda: spfmt.conv2d_input(WEIGHT, f32(2, 6, 3, 4), (5, 6), out=out),
        ]
        for call in calls:
            with pytest.raises(FormatError, match=message) as caught:
                call()
            assert_answers(caught.value)

    refuse(f32(2, 6, 5, 7), "out of shape .2, 6, 5, 7.")
    refuse(f32(2, 30, 6), "out of shape")
    refuse([1], "out of type list; expected an array")
    refuse("out", "out of type str; expected an array")
    for shape, call in [
        ((2, 6, 3, 4), lambda out: spfmt.conv2d(WEIGHT, X, out=out)),
        ((2, 2, 5, 6), lambda out: spfmt.conv2d_input(WEIGHT, DY, (5, 6), out=out)),
    ]:
        read_only = f32(*shape)
        read_only.flags.writeable = False
        odd = np.ones(4 * np.prod(shape) + 1, "u1")[1:].view("f4").reshape(shape)
        record = np.ones(shape, np.dtype([("pad", "u1"), ("x", "f4")]))["x"]
        for bad in (read_only, odd, record, np.ones(shape), f32(*shape).astype(">f4")):
            before = bad.copy()
            with pytest.raises(FormatError):
                call(bad)
            np.testing.assert_array_equal(bad, before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_outputs_must_not_overlap_any_operand(backend: str) -> None:
    memory = f32(400)
    x, out = memory[:120].reshape(2, 2, 5, 6), memory[100:244].reshape(2, 6, 3, 4)
    bias = memory[240:246]
    for call in (
        lambda: spfmt.conv2d(WEIGHT, x, out=out, backend=backend),
        lambda: spfmt.conv2d(WEIGHT, X, bias=bias, out=out, backend=backend),
        lambda: spfmt.conv2d_input(WEIGHT, out, (5, 6), out=x, backend=backend),
    ):
        with pytest.raises(FormatError, match="shares memory with an operand"):
            call()
    assert (memory == 1).all()


def test_outputs_beside_operands_in_one_buffer() -> None:
    """Channels of one array, as networks that concatenate have them."""
    buffer = np.random.default_rng(0).standard_normal((2, 8, 5, 6)).astype("float32")
    x = buffer[:, :2]
    want = spfmt.conv2d(WEIGHT, x.copy(), padding=1)
    before = x.copy()
    out = spfmt.conv2d(WEIGHT, x, padding=1, out=buffer[:, 2:])
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(x, before)


def test_operands_whose_elements_lie_at_odd_places_are_copied() -> None:
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(a.shape).astype("float32") for a in (X, DY))
    for spoil in (odd, packed):
        bias = rng.standard_normal(6).astype("float32")
        np.testing.assert_array_equal(
            spfmt.conv2d(WEIGHT, spoil(x), bias=spoil(bias)), spfmt.conv2d(WEIGHT, x, bias=bias)
        )
        np.testing.assert_array_equal(
            spfmt.conv2d_input(WEIGHT, spoil(dy), (5, 6)), spfmt.conv2d_input(WEIGHT, dy, (5, 6))
        )
        np.testing.assert_array_equal(
            spfmt.conv2d_weight(WEIGHT, spoil(dy), spoil(x)), spfmt.conv2d_weight(WEIGHT, dy, x)
        )


def odd(a: np.ndarray) -> np.ndarray:
    """A copy one byte behind a whole address."""
    copy = np.zeros(a.nbytes + 1, "u1")[1:].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def packed(a: np.ndarray) -> np.ndarray:
    """A copy in records of five bytes."""
    record = np.zeros(a.shape, np.dtype([("pad", "u1"), ("x", a.dtype)]))
    record["x"] = a
    return record["x"]


def test_missing_kernels_name_what_exists() -> None:
    half = WEIGHT.astype("float16")
    x, dy = X.astype("float16"), DY.astype("float16")
    with pytest.raises(KernelNotFound, match=r"(?s)conv2d of lists in float16.*float32.*astype"):
        spfmt.conv2d(half, x)
    with pytest.raises(KernelNotFound, match=r"conv2d_input of lists in float16"):
        spfmt.conv2d_input(half, dy, (5, 6))
    with pytest.raises(KernelNotFound, match=r"conv2d_weight of lists in float16"):
        spfmt.conv2d_weight(half, dy, x)
    with pytest.raises(KernelNotFound, match=r"(?s)float64 at level avx2.*backend='auto'"):
        spfmt.conv2d(WEIGHT.astype("float64"), X.astype("float64"), backend="avx2")
    got = spfmt.conv2d(half, x, backend="reference")
    assert got.dtype == np.float16
    want = spfmt.conv2d(WEIGHT, X, backend="reference")
    np.testing.assert_allclose(got, want, rtol=2 * np.finfo("f2").eps)


def test_foreign_byte_order_has_no_kernel() -> None:
    """Only the gradient of the weight takes its dtype from its operands."""
    with pytest.raises(KernelNotFound, match="conv2d_weight of lists in >f4"):
        spfmt.conv2d_weight(WEIGHT, DY.astype(">f4"), X.astype(">f4"))


@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_results_too_large_for_memory_say_so(op: str) -> None:
    """Whether numpy could not even count the elements or has no memory for them."""
    far = {"padding": 2**30, "dilation": 2**28}
    x = np.broadcast_to(np.float32(1), (2**30, 2, 1, 1))
    dy = np.broadcast_to(np.float32(1), (2**20, 6, 1, 1))
    calls: dict[str, list[Callable[[], Any]]] = {
        "conv2d": [
            lambda: spfmt.conv2d(WEIGHT, X, padding=2**30),
            lambda: spfmt.conv2d(WEIGHT, x, padding=2**29),
            lambda: spfmt.conv2d(WEIGHT, X, **far),
        ],
        "conv2d_input": [
            lambda: spfmt.conv2d_input(WEIGHT, dy, (2**30, 2**30), stride=2**30),
        ],
        "conv2d_weight": [],
    }
    for call in calls[op]:
        with pytest.raises((MemoryError, FormatError)):
            call()


# --------------------------------------------------------------------------------------- the fuzz

FUZZ = """
import resource, sys
import numpy as np
from hypothesis import given, settings, strategies as st
import spfmt
from format_cases import MAKERS
from spfmt.convolution import Convolution

# Memory is short, so that what asks for all of it is refused, and a loop without end ends.
resource.setrlimit(resource.RLIMIT_AS, (700 * 2**20, 700 * 2**20))
resource.setrlimit(resource.RLIMIT_CPU, (2_000, 2_000))
spfmt.set_num_threads(2)

few = st.integers(1, 4)
large = st.one_of(
    st.integers(0, 30).map(lambda k: 2**k), st.integers(1, 31).map(lambda k: 2**k - 1),
)
size = st.one_of(st.integers(0, 4), st.integers(1, 40))
number = st.one_of(
    few, large, st.integers(-1, 2**31),
    st.sampled_from([True, 1.0, None, "same", "valid", "x", 2**63, -(2**63), 2**64]),
)
numbers = st.one_of(number, st.tuples(number, number), st.tuples(number, number, number, number))

@st.composite
def axis(draw):
    # A kernel that fits its maps by their padding, whatever the numbers.
    k, d, s = draw(few), draw(st.one_of(few, large)), draw(st.one_of(few, large))
    n, out = draw(size), draw(few)
    total = max(0, d * (k - 1) + 1 + (out - 1) * s - n) + draw(st.sampled_from([0, 0, 1]))
    before = draw(st.sampled_from([0, total // 2, total]))
    return n, k, s, d, before, total - before

@st.composite
def fitting(draw):
    (h, kh, sy, dy, top, bottom), (w, kw, sx, dx, left, right) = draw(axis()), draw(axis())
    how = {"stride": (sy, sx), "dilation": (dy, dx), "padding": (top, left, bottom, right)}
    return (kh, kw), (h, w), how

@st.composite
def wild(draw):
    how = {name: draw(numbers) for name in ("stride", "dilation", "padding")}
    return (draw(st.integers(0, 3)), draw(st.integers(0, 3))), (draw(size), draw(size)), how

channels = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 17, 32, 64])

@given(
    st.sampled_from(["csr", "nm", "hrbp", "shuffled_block"]), st.integers(0, 3), channels,
    st.sampled_from([1, 1, 1, 2, 16, 0]), st.one_of(fitting(), fitting(), fitting(), wild()),
    st.sampled_from([0, 1, 2, 3, 8, 17]), st.sampled_from(["float32", "float64"]),
    st.sampled_from([1, 1, 1, 0, 2**30, True, None]),
)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
def fuzz(format, rows, cols, groups, case, batch, dtype, spoiled):
    kernel, maps, how = case
    shape = rows * groups, cols, *kernel
    how["groups"] = groups if spoiled == 1 else spoiled
    text = str([format, shape, (batch, *maps), how, dtype])
    print(text, file=sys.stderr, flush=True)
    a = MAKERS[format](shape, np.random.default_rng(0)).astype(dtype)
    one = np.ones((), dtype)
    x = np.broadcast_to(one, (batch, cols * groups, *maps))
    try:
        out = Convolution.of(shape, **how).sizes(*maps)
    except spfmt.FormatError:
        out = 1, 1
    try:
        dy = np.broadcast_to(one, (batch, rows * groups, *out))
    except ValueError:  # more than there are addresses
        dy = np.broadcast_to(one, (batch, rows * groups, 1, 1))
    for call in (
        lambda: spfmt.conv2d(a, x, **how),
        lambda: spfmt.conv2d_input(a, dy, maps, **how),
        lambda: spfmt.conv2d_weight(a, dy, x, **how),
    ):
        try:
            call()
        except (spfmt.FormatError, MemoryError):
            pass
        except Exception as error:
            strange.setdefault(repr(error)[:80], text)

strange = {}
fuzz()
print(strange or "done")
"""


def run_fuzz(examples: int) -> None:
    code = FUZZ.replace("EXAMPLES", str(examples))
    result = run_python(f"import sys; sys.path.insert(0, {TESTS!r})\n" + code)
    assert (result.returncode, result.stdout.strip()) == (0, "done"), result.stderr[-500:]


def test_no_numbers_crash() -> None:
    """Random geometry, huge numbers among it, works or is refused: the process survives."""
    run_fuzz(120)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_frames_are_not_counted_in_too_few_bits(layout: str, op: str) -> None:
    """64 channels of 2**29 x 2**29 positions are 2**64, which must not pass for none."""
    code = f"""if True:
        import resource, numpy as np, spfmt
        resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        far = 2**29 - 1
        how = dict(padding=(0, 0, far, far), dilation=far)
        for rows, cols in ((4, 64), (64, 4), (1024, 1)):
            a = spfmt.convert(np.ones((rows, cols, 2, 2), "float32"), {LAYOUTS[layout]!r})
            x, dy = np.ones((1, cols, 1, 1), "float32"), np.ones((1, rows, 1, 1), "float32")
            calls = dict(
                conv2d=lambda: spfmt.conv2d(a, x, **how),
                conv2d_input=lambda: spfmt.conv2d_input(a, dy, (1, 1), **how),
                conv2d_weight=lambda: spfmt.conv2d_weight(a, dy, x, **how),
            )
            try:
                calls[{op!r}]()
                print("fits")
            except (spfmt.FormatError, MemoryError):
                print("refused")
        """
    result = run_python(code)
    assert (result.returncode, result.stdout.split()) == (0, ["refused"] * 3), result.stderr


def test_kernels_without_channels_are_not_counted_cell_by_cell() -> None:
    a = spfmt.CSR((4, 0, 2**21, 1), np.zeros(5, int), np.zeros(0, int), f32(0))
    with pytest.raises(spfmt.FormatError, match=r"kernels are no larger than 2\^20"):
        spfmt.conv2d(a, f32(1, 0, 2**21, 1))


@pytest.mark.full
def test_no_numbers_crash_at_length() -> None:
    run_fuzz(3_000)
