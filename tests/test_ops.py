"""What the products say to bad input, and that nothing is touched before they say it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import spfmt
from spfmt import FormatError, KernelNotFound


@pytest.fixture
def a() -> spfmt.SparseTensor:
    weight = np.arange(12, dtype="float32").reshape(3, 4)
    return spfmt.CSR.from_dense(weight)


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, "float32")


@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (f32(3, 2), {}, "X of shape .* expected .features, batch. with 4 features"),
        (f32(2, 3), {"batch_first": True}, "expected .batch, features. with 4 features"),
        (f32(4, 2, 2), {}, "X with 3 dimensions; expected 1 or 2"),
        (f32(4, 2).astype("float64"), {}, "X of dtype float64 beside A of float32"),
        (f32(4, 2).astype("int32"), {}, "X of dtype int32"),
        (f32(4, 2), {"bias": f32(4)}, "bias of shape"),
        (f32(4, 2), {"bias": np.ones(3)}, "bias of dtype float64"),
        (f32(4, 2), {"out": f32(4, 2)}, "out of shape"),
        (f32(4, 2), {"out": np.ones((3, 2))}, "out of dtype float64"),
        (f32(4, 2), {"backend": "gpu"}, "backend 'gpu'"),
    ],
)
def test_spmm_refuses(a: spfmt.CSR, x: np.ndarray, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        spfmt.spmm(a, x, **kwargs)


def test_read_only_and_shared_outputs_are_refused(a: spfmt.CSR) -> None:
    out = f32(3, 2)
    out.flags.writeable = False
    with pytest.raises(FormatError, match="read-only"):
        spfmt.spmm(a, f32(4, 2), out=out)
    memory = f32(4, 4)
    with pytest.raises(FormatError, match="shares memory"):
        spfmt.spmm(a, memory[:, :2], out=memory[:3, 1:3])
    assert (memory == 1).all()


def test_sddmm_refuses(a: spfmt.CSR) -> None:
    with pytest.raises(FormatError, match="dY with 2 and X with 3 samples"):
        spfmt.sddmm(a, f32(3, 2), f32(4, 3))
    with pytest.raises(FormatError, match="dY of shape"):
        spfmt.sddmm(a, f32(4, 2), f32(4, 2))
    with pytest.raises(FormatError, match="dY of dtype"):
        spfmt.sddmm(a, f32(3, 2).astype("float64"), f32(4, 2))


@pytest.mark.parametrize("product", [spfmt.spmm, spfmt.spmm_t])
def test_dense_weights_are_refused(product: Any) -> None:
    with pytest.raises(FormatError, match="a weight of type ndarray; expected a spfmt tensor"):
        product(f32(3, 4), f32(4, 1))


def test_plan_refuses_short_values_and_outputs(a: spfmt.CSR) -> None:
    with pytest.raises(FormatError, match="values with 2 elements; expected at least 11"):
        a.plan.spmm(f32(2), f32(4, 1))
    with pytest.raises(FormatError, match="out of shape"):
        a.plan.sddmm(f32(3, 1), f32(4, 1), out=f32(3))


def test_missing_kernel_names_what_exists(a: spfmt.CSR) -> None:
    half = a.astype("float16")
    x = np.ones((4, 1), "float16")
    with pytest.raises(KernelNotFound, match=r"(?s)spmm of lists in float16.*float32.*astype"):
        spfmt.spmm(half, x)
    with pytest.raises(KernelNotFound, match=r"(?s)float64 at level avx2.*backend='auto'"):
        spfmt.spmm(a.astype("float64"), x.astype("float64"), backend="avx2")
    np.testing.assert_allclose(spfmt.spmm(half, x, backend="reference"), half.to_dense() @ x)


def test_a_level_by_name_is_not_what_auto_found_there(
    a: spfmt.CSR, monkeypatch: pytest.MonkeyPatch
) -> None:
    double, x = a.astype("float64"), np.ones((4, 1))
    if "avx2" not in spfmt.dispatch._available_levels():
        pytest.skip("needs avx2")
    monkeypatch.setenv("SPFMT_ISA", "avx2")
    spfmt.sddmm(double, np.ones((3, 1)), x)  # takes the scalar kernel, by way of the cache
    with pytest.raises(KernelNotFound, match="float64 at level avx2"):
        spfmt.sddmm(double, np.ones((3, 1)), x, backend="avx2")


def test_operands_of_packed_records_are_copied(a: spfmt.CSR) -> None:
    record = np.zeros((4, 3), dtype=np.dtype([("pad", "u1"), ("x", "f4")]))
    record["x"] = np.arange(12).reshape(4, 3)
    plain = np.ascontiguousarray(record["x"])
    np.testing.assert_array_equal(spfmt.spmm(a, record["x"]), spfmt.spmm(a, plain))


def test_operands_at_odd_addresses_are_copied(a: spfmt.CSR) -> None:
    def odd(array: np.ndarray) -> np.ndarray:
        memory = np.zeros(array.nbytes + 1, "u1")
        copy = memory[1:].view(array.dtype).reshape(array.shape)
        copy[...] = array
        assert not copy.flags.aligned
        return copy

    rng = np.random.default_rng(0)
    for batch in (2, 20):
        x, dy = (rng.standard_normal((n, batch)).astype("float32") for n in (4, 3))
        bias, values = f32(3), a.values
        want = spfmt.spmm(a, x, bias=bias)
        np.testing.assert_array_equal(a.plan.spmm(odd(values), odd(x), bias=odd(bias)), want)
        np.testing.assert_array_equal(spfmt.spmm_t(a, odd(dy)), spfmt.spmm_t(a, dy))
        np.testing.assert_array_equal(spfmt.sddmm(a, odd(dy), odd(x)), spfmt.sddmm(a, dy, x))
    with pytest.raises(FormatError, match="splits elements"):
        spfmt.spmm(a, f32(4, 2), out=odd(f32(3, 2)))


def test_outputs_must_not_overlap_any_operand(a: spfmt.CSR) -> None:
    memory = f32(20)
    for call in (
        lambda: a.plan.spmm(memory[:11], f32(4, 2), out=memory[8:14].reshape(3, 2)),
        lambda: a.plan.spmm(f32(11), f32(4, 2), bias=memory[:3], out=memory[:6].reshape(3, 2)),
        lambda: a.plan.sddmm(memory[:6].reshape(3, 2), f32(4, 2), out=memory[5:16]),
        lambda: a.plan.sddmm(f32(3, 2), memory[:8].reshape(4, 2), out=memory[5:16]),
    ):
        with pytest.raises(FormatError, match="shares memory with an operand"):
            call()
    assert (memory == 1).all()


def test_output_beside_the_operand_in_one_buffer(a: spfmt.CSR) -> None:
    buffer = np.random.default_rng(0).standard_normal((5, 7)).astype("float32")
    x = buffer[:, :4]
    want = spfmt.spmm(a, x.copy(), batch_first=True)
    out = spfmt.spmm(a, x, batch_first=True, out=buffer[:, 4:])
    np.testing.assert_array_equal(out, want)


def test_foreign_byte_order_has_no_kernel(a: spfmt.CSR) -> None:
    dy, x = f32(3, 2).astype(">f4"), f32(4, 2).astype(">f4")
    with pytest.raises(KernelNotFound, match="sddmm of lists in >f4"):
        spfmt.sddmm(a, dy, x)


def test_broadcast_operand(a: spfmt.CSR) -> None:
    x = np.broadcast_to(np.arange(4, dtype="float32")[:, None], (4, 40))
    np.testing.assert_array_equal(spfmt.spmm(a, x), spfmt.spmm(a, x.copy()))


@pytest.mark.parametrize("threads", [0, -1, 2.0, True, "2", 5000])
def test_thread_numbers_are_checked(threads: Any) -> None:
    before = spfmt.get_num_threads()
    with pytest.raises(FormatError, match=" threads; expected an int"):
        spfmt.set_num_threads(threads)
    assert spfmt.get_num_threads() == before
