"""Activations fused into spmm: every kernel, their accuracy, special values, errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from format_cases import LAYOUTS, MAKERS

import spfmt
from spfmt.activations import ACTIVATIONS, apply_activation
from spfmt.errors import FormatError

# Units in the last place that cpp/kernels/activation-inl.h states for float32.
STATED_ULP = {"relu": 0, "silu": 4, "gelu_tanh": 5, "gelu": 7}
# |f(a) - f(b)| <= slope * |a - b|: the largest derivative of the three smooth ones is 1.13.
SLOPE = 1.13

SPMM = [
    pytest.param(
        k,
        id=f"{k.layout}-{k.dtype}-{k.isa}",
        marks=[] if k.available else pytest.mark.skip(reason=k.reason),
    )
    for k in spfmt.kernels("spmm")
]
LEVELS = [p for p in SPMM if p.values[0].layout == "lists"]


def definition(name: str, x: float) -> float:
    """Compute an activation as papers write it, with the tails that erf and tanh round away."""
    if name == "relu":
        return max(x, 0.0)
    if name == "gelu":
        return x * math.erfc(-x / math.sqrt(2)) / 2
    v = x if name == "silu" else 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x / (1 + math.exp(-v)) if v > 0 else x * math.exp(v) / (1 + math.exp(v))


def identity(x: np.ndarray, dtype: str) -> tuple[spfmt.CSR, np.ndarray]:
    """A 1 x 1 weight of one and the samples, (1, B)."""
    a = spfmt.CSR((1, 1), np.array([0, 1]), np.array([0]), np.ones(1, dtype))
    return a, x.astype(dtype)[None]


def check_ulp(got: np.ndarray, x: np.ndarray, name: str) -> None:
    want = np.array([definition(name, float(v)) for v in x])
    limit: Any = STATED_ULP[name]
    if (
        got.dtype == np.float64
    ):  # libm's exp and erfc turn the rounding of z into |z| or 2 z^2 of it
        weight = np.divide(want, x, out=np.ones_like(want), where=want != 0)
        limit = (12 if limit else 0) + 4 * np.abs(np.log(weight))
    unit = np.spacing(np.maximum(np.abs(want.astype(got.dtype)), np.finfo(got.dtype).tiny))
    assert (np.abs(got - want) <= limit * unit).all()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kernel", SPMM)
def test_fused_is_applied_after_the_bias(kernel: spfmt.Kernel, batch_first: bool) -> None:
    rng = np.random.default_rng(1)
    for shape in [(37, 45), (300, 64), (5, 0)]:
        a = MAKERS[LAYOUTS[kernel.layout]](shape, rng).astype(kernel.dtype)
        bias = rng.standard_normal(shape[0]).astype(kernel.dtype)
        for batch in (0, 1, 3, 15, 16, 17, 64, 65):
            x = rng.standard_normal((shape[1], batch)).astype(kernel.dtype)
            dense = a.to_dense().astype(np.float64)
            z = dense @ x + bias[:, None]
            size = np.abs(dense) @ np.abs(x) + np.abs(bias)[:, None]
            eps = np.finfo(kernel.dtype).eps
            for name in ACTIVATIONS:
                operand = x.T if batch_first else x
                got = spfmt.spmm(
                    a, operand, bias=bias, activation=name, batch_first=batch_first,
                    backend=kernel.isa,
                )  # fmt: skip
                want = apply_activation(name, z)
                bound = eps * (SLOPE * (shape[1] + 3) * size + 8 * np.abs(want))
                assert (np.abs((got.T if batch_first else got) - want) <= bound).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("kernel", SPMM)
def test_fused_equals_the_activation_of_the_product(kernel: spfmt.Kernel, name: str) -> None:
    """The same bits whichever kernel (tokens, panels, in place) the batch selects."""
    a = MAKERS[LAYOUTS[kernel.layout]]((50, 40), np.random.default_rng(2)).astype(kernel.dtype)
    for batch in (1, 3, 16, 65):
        x = np.random.default_rng(3).standard_normal((40, batch)).astype(kernel.dtype)
        z = spfmt.spmm(a, x, backend=kernel.isa)
        one, samples = identity(z.reshape(-1), kernel.dtype)
        want = spfmt.spmm(one, samples, activation=name, backend=kernel.isa)[0]
        got = spfmt.spmm(a, x, activation=name, backend=kernel.isa)
        np.testing.assert_array_equal(got.reshape(-1), want)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("kernel", LEVELS)
def test_accuracy(kernel: spfmt.Kernel, name: str) -> None:
    dense = np.linspace(-16, 16, 30_001)
    scales = np.geomspace(1e-30, 100, 5_000)
    a, x = identity(np.concatenate([dense, scales, -scales]), kernel.dtype)
    got = spfmt.spmm(a, x, activation=name, backend=kernel.isa)[0]
    check_ulp(got, x[0], name)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("kernel", LEVELS)
def test_special_values(kernel: spfmt.Kernel, backend: str) -> None:
    huge = float(np.finfo(kernel.dtype).max)
    values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, huge, -huge, 1e-45, -1e-45, 200, -200])
    a, x = identity(values, kernel.dtype)
    for name in ACTIVATIONS:
        isa = kernel.isa if backend == "kernel" else "reference"
        got = spfmt.spmm(a, x, activation=name, backend=isa)[0]
        want = np.array([0, 0, np.inf, 0, np.nan, huge, 0, 0, 0, 200, 0], kernel.dtype)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-45)
        for batch in (1, 3):  # the kernels of small batches
            few = spfmt.spmm(a, x[:, 2 : 2 + batch], activation=name, backend=isa)[0]
            np.testing.assert_array_equal(few, got[2 : 2 + batch])


def test_a_negative_tail_is_not_rounded_away() -> None:
    a, x = identity(np.array([-5.0]), "float32")
    got = float(spfmt.spmm(a, x, activation="gelu")[0, 0])
    assert got == pytest.approx(-5 * 2.866515718791939e-07, rel=1e-6)


@pytest.mark.parametrize("name", ["", "tanh", "ReLU", 1, ["relu"]])
def test_unknown_activations_are_refused(name: Any) -> None:
    a, x = identity(np.ones(3), "float32")
    for backend in ("auto", "reference"):
        with pytest.raises(FormatError, match=r"got activation=.*expected None or one of .'relu'"):
            spfmt.spmm(a, x, activation=name, backend=backend)
