"""Tensors as objects: frozen, equal, copied, printed, and what formats share."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from format_cases import MAKERS, W, built
from fresh_python import run_python

from spfmt.errors import FormatError
from spfmt.formats import (
    CSR,
    FORMATS,
    NM,
    SparseTensor,
    get_format,
    register,
)

NAMES = sorted(FORMATS)
RNG = np.random.default_rng(7)
CONV = np.where(RNG.random((6, 5, 3, 2)) < 0.4, 1.5, 0).astype(np.float32)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_frozen(name: str) -> None:
    given = {k: v.copy() for k, v in built(name).structure().items()}
    values = built(name).values.copy()
    a = type(built(name))._from_parts(W.shape, given, built(name).params(), values)
    values[...] = 0
    for array in given.values():
        array[...] = 0
    assert a == built(name)
    with pytest.raises(ValueError, match="read-only"):
        a.values[...] = 0
    for array in a.structure().values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
        assert array.flags.c_contiguous
    for array in (a.values, a.values.base, *a.structure().values()):
        with pytest.raises(ValueError, match="WRITEABLE"):  # as owners of memory could
            array.flags.writeable = True
    with pytest.raises(AttributeError, match="with_values"):
        a.values = values  # type: ignore[misc]
    with pytest.raises(TypeError, match="unhashable"):
        hash(a)


@pytest.mark.parametrize("name", NAMES)
def test_equality_copies_and_values(name: str) -> None:
    a = built(name)
    assert a == a.copy() == copy.copy(a) == copy.deepcopy(a) == pickle.loads(pickle.dumps(a))
    assert not pickle.loads(pickle.dumps(a)).values.flags.writeable
    b = a.with_values(np.arange(a.nnz, dtype=np.float32))
    assert b.values.shape == a.values.shape
    assert b.layout() is a.layout()
    assert b != a
    assert b.version != a.version
    assert a != a.astype("float64")
    assert a != built(name, W * 2)
    assert a != built(name, np.roll(W, 1, axis=0))
    assert a != 3
    assert a.nbytes == a.values.nbytes + sum(x.nbytes for x in a.structure().values())
    with pytest.raises(FormatError, match="values of shape"):
        a.with_values(np.zeros(a.nnz + 1))
    with pytest.raises(FormatError, match="a dense array of shape"):
        a.dense_gather(W.T)
    with pytest.raises(FormatError, match="dtype"):
        a.astype("int32")
    with pytest.raises(FormatError, match="dtype"):
        a.astype("nonsense")


@pytest.mark.parametrize("name", NAMES)
def test_products_by_operator(name: str) -> None:
    a = built(name)
    x, y = RNG.standard_normal((12, 3)), RNG.standard_normal((10, 3))
    x, y = x.astype(np.float32), y.astype(np.float32)
    bound = 32 * np.finfo(np.float32).eps * 12
    np.testing.assert_allclose(a @ x, W @ x, atol=bound)
    np.testing.assert_allclose(a.T @ y, W.T @ y, atol=bound)
    np.testing.assert_allclose(x.T @ a.T, x.T @ W.T, atol=bound)
    np.testing.assert_allclose(y.T @ a, y.T @ W, atol=bound)
    assert a.T.T is a
    assert a.T.shape == (12, 10)
    np.testing.assert_array_equal(a.T.to_dense(), W.T)
    assert repr(a.T).endswith(".T")


def test_convolutions_are_matrices_of_channels_and_cells() -> None:
    for name in NAMES:
        a = MAKERS[name]((6, 5, 3, 2), np.random.default_rng(1))
        assert a.matrix_shape == (6, 30)
        flat = a.to_dense().reshape(6, 30)
        np.testing.assert_array_equal(a.dense_gather(flat), a.values)
        np.testing.assert_array_equal(built(name, CONV).to_dense(), CONV)


def test_get_format() -> None:
    assert get_format("nm") is NM
    assert get_format(CSR) is CSR
    with pytest.raises(FormatError, match=r"'ell'.*condensed, csr, hrbp, nm, shuffled_block"):
        get_format("ell")


def test_a_format_registers_itself() -> None:
    from spfmt import formats
    from spfmt.formats import _registry

    def named(name: Any) -> type[CSR]:
        return type("Own", (CSR,), {"__slots__": (), "format": name})

    try:
        own = register(named("own"))
        assert register(own) is own
        assert get_format("own") is own
        assert formats.FORMATS is _registry.FORMATS
        assert "own" in formats.FORMATS
        a = own.from_dense(np.eye(3, dtype=np.float32))
        assert formats.decode_structure(a.encode()).cls is own
        with pytest.raises(FormatError, match="'own', which Own has"):
            register(named("own"))
    finally:
        FORMATS.pop("own")
    with pytest.raises(FormatError, match="format 'own'"):
        formats.decode_structure(a.encode())
    for name in (None, "", "Own", "own-1", "x" * 65, 3):
        with pytest.raises(FormatError, match="1 to 64 of a-z"):
            register(named(name))
    for cls in (int, SparseTensor, "csr"):
        with pytest.raises(FormatError, match="all that SparseTensor leaves open"):
            register(cls)  # type: ignore[type-var]


def test_importing_needs_numpy_alone() -> None:
    code = (
        "import sys, spfmt.formats, spfmt.convert;"
        "bad = {'torch', 'scipy', 'sklearn', 'onnx', 'onnxruntime', 'safetensors', 'ml_dtypes'};"
        "assert not bad & set(sys.modules), bad & set(sys.modules)"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------------------------- drawn


@pytest.mark.parametrize("name", NAMES)
def test_drawn_tensors_keep_what_is_asked_and_know_no_other_options(name: str) -> None:
    draw = get_format(name).random
    assert draw((16, 16), 0.0, RNG).nnz == 0
    assert draw((4, 0), 0.5, RNG).nnz == 0
    with pytest.raises(TypeError, match="nonsense"):
        draw((16, 16), 0.5, RNG, nonsense=1)


def test_drawn_groups_are_transposable_where_asked_and_end_with_the_channels() -> None:
    a = NM.random((16, 16), 0.5, RNG, n=2, m=4, transposable=1)
    assert a.transposable
    assert (a.mask().reshape(4, 4, 16).sum(1) == 2).all()
    assert NM.random((8, 3, 3, 3), 0.5, RNG).density == pytest.approx(1 / 3)  # one of 3, not 16
