"""The quick way into the kernels agrees with the long way, and leaves to it what is not plain."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from fresh_python import run_python

import spfmt
from spfmt import FormatError, KernelNotFound, dispatch

R, C = 12, 20


def weight(dtype: str = "float32") -> spfmt.CSR:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((R, C)) * (rng.random((R, C)) < 0.3)
    return spfmt.CSR.from_dense(dense.astype(dtype))


def misaligned(a: np.ndarray) -> np.ndarray:
    raw = np.empty(a.nbytes + 1, "u1")[1:].view(a.dtype).reshape(a.shape)
    raw[...] = a
    return raw


class Sub(np.ndarray):
    pass


def test_quick_multiplication_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.Plan, "_multiply", None)  # the long way would call it
    for dtype in ("float32", "float64"):
        a, bias = weight(dtype), np.ones(R, dtype)
        x = np.random.default_rng(1).standard_normal((3, C)).astype(dtype)
        want = x @ a.to_dense().T + bias
        for operand in (x, np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x[::-1][::-1]):
            y = spfmt.spmm(a, operand, bias=bias, batch_first=True)
            np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
            assert (y.dtype, y.shape, type(y)) == (x.dtype, (3, R), np.ndarray)
            assert y.flags.c_contiguous
        # A dtype that equals numpy's own without being the same object is plain as well.
        equal = np.dtype(np.dtype(dtype), copy=True)
        assert equal is not x.dtype
        y = spfmt.spmm(a, x.view(equal), bias=bias, batch_first=True)
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(spfmt.spmm(a, x[0], bias=bias), want[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            spfmt.spmm_t(a, want.T.copy()), (want @ a.to_dense()).T, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", [None, *spfmt.activations.ACTIVATIONS])
def test_quick_multiplication_takes_out_and_activations(
    dtype: str, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, rng = weight(dtype), np.random.default_rng(1)
    x, bias = rng.standard_normal((3, C)).astype(dtype), rng.standard_normal(R).astype(dtype)
    want = spfmt.activations.apply_activation(activation, x @ a.to_dense().T + bias)
    monkeypatch.setattr(dispatch.Plan, "_multiply", None)  # the long way would call it
    frame = np.full((5, R + 4), np.nan, dtype)
    for out in (
        np.empty((3, R), dtype),
        np.empty((R, 3), dtype).T,
        frame[1:4, 2:-2],  # a window
        np.empty((3, 2 * R), dtype)[:, ::2],
        np.empty((3, R), dtype)[::-1, ::-1],
    ):
        y = spfmt.spmm(a, x, bias=bias, activation=activation, batch_first=True, out=out)
        assert y is out
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    assert np.isnan(frame).sum() == frame.size - 3 * R  # nothing beside the window
    vector = np.empty(R, dtype)
    assert spfmt.spmm(a, x[0], bias=bias, activation=activation, out=vector) is vector
    np.testing.assert_allclose(vector, want[0], rtol=1e-4, atol=1e-5)
    dx = np.empty((C, 3), dtype)
    assert spfmt.spmm_t(a, want.T.astype(dtype), out=dx) is dx
    np.testing.assert_allclose(dx, (want @ a.to_dense()).T, rtol=1e-4, atol=1e-4)


def test_quick_multiplication_leaves_doubtful_outputs_to_the_long_way() -> None:
    a = weight()
    multiply = a.plan._bind()[0]
    memory = np.ones(200, "float32")
    x, bias = memory[:C], memory[C : C + R]

    def quick(out: object, values: np.ndarray = a.values) -> object:
        return multiply(0, values, None, x, bias, 0, False, out, 1, None)

    read_only = np.ones(R, "float32")
    read_only.flags.writeable = False
    for out in (
        np.ones(R + 1, "float32"),
        np.ones((R, 1), "float32"),
        np.ones(R, "float64"),
        np.ones(R, ">f4"),
        read_only,
        misaligned(np.ones(R, "float32")),
        np.ones(R, "float32").view(Sub),
        [0.0] * R,
        memory[C - 1 : C - 1 + R],  # the end of x
        memory[C + R - 1 : C + 2 * R - 1],  # the end of the bias
        memory[2 * C - 2 :: -1][: 2 * R : 2],  # backwards, into x
    ):
        assert quick(out) is None
    values = np.ones(a.nnz + R, "float32")
    assert quick(values[a.nnz - 1 : a.nnz - 1 + R], values[: a.nnz]) is None
    assert (memory == 1).all()
    assert (values == 1).all()
    assert quick(memory[C + R : C + 2 * R]) is not None  # right behind them
    assert (memory[: C + R] == 1).all()
    assert (memory[C + 2 * R :] == 1).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_quick_sampling_is_taken(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.Plan, "_level", None)  # the long way would call it
    a, rng = weight(dtype), np.random.default_rng(3)
    dy, x = rng.standard_normal((3, R)).astype(dtype), rng.standard_normal((3, C)).astype(dtype)
    at = a.layout().coordinates()
    want = (dy.T @ x)[at]
    for left, right in (
        (dy, x),
        (np.asfortranarray(dy), x[::-1][::-1]),
        (dy, np.repeat(x, 2, 1)[:, ::2]),
    ):
        got = spfmt.sddmm(a, left, right, batch_first=True)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        assert (got.dtype, got.shape, type(got)) == (x.dtype, a.values.shape, np.ndarray)
        np.testing.assert_array_equal(spfmt.sddmm(a, left.T, right.T), got)
    got = spfmt.sddmm(a, dy[0], x[0])
    np.testing.assert_allclose(got, np.outer(dy[0], x[0])[at], rtol=1e-4, atol=1e-5)
    assert (spfmt.sddmm(a, dy[:0], x[:0], batch_first=True) == 0).all()
    out = np.full(a.nnz + 5, np.nan, dtype)
    assert a.plan.sddmm(dy, x, batch_first=True, out=out) is out
    np.testing.assert_allclose(out, np.append(want, np.zeros(5)), rtol=1e-4, atol=1e-5)


def test_quick_sampling_leaves_what_is_not_plain_to_the_long_way() -> None:
    a = weight()
    sample = a.plan._bind()[1]
    memory = np.ones(400, "float32")
    dy, x = memory[:R], memory[R : R + C]

    def quick(dy: object = dy, x: object = x, out: object = None) -> object:
        return sample(dy, x, False, out, 1, None)

    assert quick() is not None
    for other in (np.ones(R + 1, "float32"), np.ones((R, 1), "float32"), np.ones(R), dy.view(Sub)):
        assert quick(dy=other) is None
    for other in (x[1:], x[:, None], x[None, :, None], misaligned(x), x.tolist(), x.astype(">f4")):
        assert quick(x=other) is None
    assert (
        sample(np.ones((R, 2), "float32"), np.ones((C, 3), "float32"), False, None, 1, None) is None
    )
    read_only = np.ones(a.nnz, "float32")
    read_only.flags.writeable = False
    for out in (
        np.ones(a.nnz - 1, "float32"),
        np.ones((a.nnz, 1), "float32"),
        np.ones(a.nnz),
        np.ones(2 * a.nnz, "float32")[::2],
        read_only,
        [0.0] * a.nnz,
        memory[R + C - 1 : R + C - 1 + a.nnz],  # the end of x
        memory[R - 1 :],
    ):
        assert quick(out=out) is None
    assert (memory == 1).all()
    assert quick(out=memory[R + C : R + C + a.nnz]) is not None  # right behind them
    assert (memory[: R + C] == 1).all()
    assert (memory[R + C + a.nnz :] == 1).all()


@pytest.mark.parametrize("out", [[0.0] * R, "out", 1, np.float32(1)])
def test_outputs_that_are_no_arrays_are_refused(out: object) -> None:
    with pytest.raises(FormatError, match="out of type"):
        spfmt.spmm(weight(), np.ones(C, "float32"), out=out)  # type: ignore[arg-type]


def test_output_over_the_operand_is_refused_and_nothing_written() -> None:
    a = spfmt.CSR.from_dense(np.ones((4, 4), "float32"))
    for x in (np.ones((4, 4), "float32"), np.ones(4, "float32")):
        for out in (x, x[::-1], x.T):
            with pytest.raises(FormatError, match="shares memory"):
                spfmt.spmm(a, x, out=out, activation="relu")
            with pytest.raises(FormatError, match="shares memory"):
                spfmt.spmm_t(a, x, out=out)
        assert (x == 1).all()


def test_unknown_activations_are_refused() -> None:
    for name in ("tanh", "", 1, ["relu"]):
        with pytest.raises(FormatError, match="activation="):
            spfmt.spmm(weight(), np.ones(C, "float32"), activation=name)  # type: ignore[arg-type]


def test_batch_first_may_be_any_truth() -> None:
    a, x = weight(), np.ones((3, C), "float32")
    want = spfmt.spmm(a, x, batch_first=True)
    for true in (1, np.True_, "yes"):
        np.testing.assert_array_equal(spfmt.spmm(a, x, batch_first=true), want)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ambiguous"):
        spfmt.spmm(a, x, batch_first=np.ones(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", [misaligned, lambda x: x.view(Sub), lambda x: x.tolist()])
def test_what_is_not_plain_computes_all_the_same(kind, backend: str) -> None:
    a = weight("float64")
    x = np.random.default_rng(1).standard_normal((C, 5))
    want = a.to_dense() @ x
    got = spfmt.spmm(a, kind(x), bias=np.zeros(R), backend=backend)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    assert type(got) is np.ndarray


@pytest.mark.parametrize("shape", [(0, C), (1, C), (7, C)])
def test_batches_of_any_size_and_read_only(shape: tuple[int, int]) -> None:
    a, x = weight(), np.ones(shape, "float32")
    x.flags.writeable = False
    want = spfmt.spmm(a, x, batch_first=True, backend="reference")
    np.testing.assert_allclose(spfmt.spmm(a, x, batch_first=True), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "int32", "float64", ">f4", "complex64"])
def test_other_dtypes_are_refused_by_name(dtype: str) -> None:
    with pytest.raises(FormatError, match="X of dtype"):
        spfmt.spmm(weight(), np.ones((C, 2), dtype))


def test_byte_order_of_another_machine_has_no_kernel() -> None:
    a = weight()
    with pytest.raises(KernelNotFound, match=">f4"):
        a.plan.spmm(a.values.astype(">f4"), np.ones((C, 2), ">f4"))


def test_a_level_that_does_not_exist_is_an_error_at_every_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, x = weight(), np.ones(C, "float32")
    spfmt.spmm(a, x)
    monkeypatch.setenv("SPFMT_ISA", "sse9")
    for product, operand in ((spfmt.spmm, x), (spfmt.spmm_t, np.ones(R, "float32"))):
        with pytest.raises(FormatError, match="sse9"):
            product(a, operand)
    with pytest.raises(FormatError, match="sse9"):
        spfmt.sddmm(a, np.ones(R, "float32"), x)


def test_bound_functions_check_their_arguments_and_keep_their_plan() -> None:
    a = weight()
    multiply, sample = dispatch._kernels.bind(a.plan.compiled)
    values, x, dense = a.values, np.ones(C, "float32"), a.to_dense()
    for function in (multiply, sample):
        with pytest.raises(TypeError):
            function()
    with pytest.raises(IndexError):
        multiply(9, values, None, x, None, 0, False, None, None, None)
    for code in (-1, 5):
        with pytest.raises(ValueError, match="no such activation"):
            multiply(0, values, None, x, None, code, False, None, None, None)
    dy = np.ones(R, "float32")
    with pytest.raises(ValueError, match="only spmm has a bias and activations"):
        multiply(1, values, None, dy, None, 1, False, None, None, None)
    for level in (-1, 3):
        with pytest.raises(ValueError, match="no such level"):
            multiply(0, values, None, x, None, 0, False, None, None, level)
        with pytest.raises(ValueError, match="no such level"):
            sample(dy, x, False, None, None, level)
    assert multiply(1, values, None, dy, values[:R], 0, False, None, None, None) is None
    del a
    gc.collect()
    np.testing.assert_allclose(
        multiply(0, values, None, x, None, 0, False, None, 1, None), dense.sum(1), rtol=1e-5
    )


def test_first_products_of_two_threads_do_not_wait_for_each_other() -> None:
    """Whatever a product needs of numpy is there before: imports give other threads a turn."""
    code = """if True:
        import builtins, signal, threading, time
        import numpy as np, spfmt
        a, x = spfmt.CSR.from_dense(np.eye(8, dtype="float32")), np.ones(8, "float32")
        a.plan._bind()
        threads = [threading.Thread(target=spfmt.spmm, args=(a, x)) for _ in range(4)]
        real = builtins.__import__
        def slow(*args):
            time.sleep(0.2)
            return real(*args)
        signal.alarm(60)  # ends a process whose threads wait for each other
        builtins.__import__ = slow
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        print("done")
        """
    result = run_python(code)
    assert result.stdout.strip() == "done", (result.returncode, result.stderr)
