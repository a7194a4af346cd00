"""The reference against torch in float64, and the kernels against torch at random geometry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conv_cases import CASES, FORMATS, Case, Operands, check, kernels, make_operands
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import spfmt
from spfmt.convolution import Convolution
from spfmt.dispatch import CONVOLUTIONS

torch = pytest.importorskip("torch")

FORMAT_NAMES = sorted(FORMATS["lists"] + FORMATS["groups"])


def by_torch(found: Operands) -> dict[str, np.ndarray]:
    """The three products of the dense weight, in float64 and by autograd."""
    case = found.case
    x = torch.tensor(found.x, dtype=torch.float64, requires_grad=True)
    dense = torch.tensor(found.weight.to_dense(), dtype=torch.float64, requires_grad=True)
    top, left, bottom, right = Convolution.of(case.shape, **case.how).padding
    y = torch.nn.functional.conv2d(
        torch.nn.functional.pad(x, (left, right, top, bottom)), dense,
        torch.tensor(found.bias, dtype=torch.float64), case.stride, 0, case.dilation, case.groups,
    )  # fmt: skip
    y.backward(torch.tensor(found.dy, dtype=torch.float64))
    at = found.weight.layout().coordinates()
    gradient = dense.grad.numpy().reshape(found.weight.matrix_shape)[at]
    results = {
        "conv2d": y.detach().numpy(),
        "conv2d_input": x.grad.numpy(),
        "conv2d_weight": gradient.reshape(found.weight.values.shape),
    }
    assert tuple(results) == CONVOLUTIONS
    return results


# torch refuses images without channels, and weights without rows.
DENSE = [c for c in CASES if c.rows and c.channels]


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_the_reference_is_what_torch_computes(case: Case) -> None:
    for format in FORMAT_NAMES:
        found = make_operands(format, case)
        for op, result in by_torch(found).items():
            want = found.wanted(op)
            check(result, want)
            got = found.by(op, "float64", "reference")
            assert got.dtype == np.float64
            np.testing.assert_array_equal(got, want.result)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_is_that_of_torch(padding: str) -> None:
    """Of an odd number of zeros the end gets one more."""
    for kernel in [(1, 1), (2, 2), (3, 3), (4, 1), (2, 5)]:
        for dilation in (1, 2, (3, 1)):
            case = Case("", 5, 3, kernel, (11, 12), 2, padding, 1, dilation)
            found = make_operands("csr", case)
            want = torch.nn.functional.conv2d(
                torch.tensor(found.x, dtype=torch.float64),
                torch.tensor(found.weight.to_dense(), dtype=torch.float64),
                torch.tensor(found.bias, dtype=torch.float64),
                padding=padding,
                dilation=dilation,
            )
            check(want.numpy(), found.wanted("conv2d"))
            if padding == "same":
                assert case.out_size == case.size


def test_the_reference_rounds_once() -> None:
    """Its result of float32 is that of float64, rounded."""
    found = make_operands("nm", Case("", 9, 4, (3, 3), (5, 6), 2, 1))
    for op in CONVOLUTIONS:
        got = found.by(op, "float32", "reference")
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, found.wanted(op).result.astype(np.float32))


def test_the_reference_activates_and_writes_where_it_is_told() -> None:
    found = make_operands("hrbp", Case("", 9, 4, (3, 3), (5, 6), 2, 1))
    z = torch.tensor(found.wanted("conv2d").result)
    out = np.full((2, 5, 9, 6), np.nan).transpose(0, 2, 1, 3)
    functions: dict[str, Any] = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }
    assert set(functions) == set(spfmt.activations.ACTIVATIONS)
    for name, function in functions.items():
        got = found.by("conv2d", "float64", "reference", activation=name, out=out)
        assert got is out
        # Two ways to compute exp or erf differ in a few last places.
        np.testing.assert_allclose(out, function(z).numpy(), rtol=64 * 2**-52, atol=64 * 2**-52)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Small geometry of every kind."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 5]))
    rows = groups * draw(st.integers(1, 20 // groups + 1))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 12)))
    pairs = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 4), st.integers(1, 4)))
    some = st.integers(0, 5)
    padding = draw(
        st.one_of(some, st.tuples(some, some), st.tuples(some, some, some, some), st.just("same"))
    )
    stride = 1 if padding == "same" else draw(pairs)
    batch = draw(st.sampled_from([0, 1, 2, 3, 8, 16, 19]))
    case = Case(
        "any", rows, draw(st.integers(1, 5)), kernel, size, batch, padding, stride, draw(pairs),
        groups,
    )  # fmt: skip
    try:
        assert case.out_size
    except spfmt.FormatError:
        assume(False)
    return case


@given(cases(), st.sampled_from(FORMAT_NAMES))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_geometry_against_torch(case: Case, format: str) -> None:
    found = make_operands(format, case)
    for op, result in by_torch(found).items():
        want = found.wanted(op)
        check(result, want)
        for kernel in kernels(op, found.weight.layout().name):
            if kernel.available:
                check(found.run(kernel), want)


@pytest.mark.full
@given(cases(), st.sampled_from(FORMAT_NAMES))
@settings(max_examples=2000, deadline=None, derandomize=True)
def test_more_geometry_against_torch(case: Case, format: str) -> None:
    test_any_geometry_against_torch.hypothesis.inner_test(case, format)
