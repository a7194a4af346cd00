"""Whatever the library allocates for kernels starts at a cache line, however it was made."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_cases import MAKERS

import spfmt
from spfmt import dispatch
from spfmt._memory import LINE, aligned, empty_aligned, is_aligned, zeros_aligned

FORMATS = sorted(MAKERS)
SHAPE = (48, 64)


def tensor(format: str, dtype: str = "float32") -> spfmt.SparseTensor:
    return MAKERS[format](SHAPE, np.random.default_rng(3)).astype(dtype)


def beside_a_line(array: np.ndarray) -> np.ndarray:
    """A copy whose elements are whole, but which starts in the middle of a line."""
    room = empty_aligned(array.size + 1, array.dtype)[1:].reshape(array.shape)
    room[...] = array
    assert room.flags.aligned
    assert room.size == 0 or not is_aligned(room)
    return room


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("shape", [0, 7, (), (0, 3), (5, 3), (2, 3, 4)])
def test_arrays_start_at_a_line(shape: Any, dtype: str) -> None:
    for _ in range(9):  # one address may be good by chance
        for a in (empty_aligned(shape, dtype), zeros_aligned(shape, dtype)):
            assert is_aligned(a)
            assert a.size == 0 or a.ctypes.data % LINE == 0
            assert a.shape == np.empty(shape).shape
            assert a.dtype == dtype
            assert a.flags.c_contiguous
            assert a.flags.writeable
        assert not a.any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_compiled_vectors_start_at_a_line(dtype: str) -> None:
    for count in (0, 1, 17, 2_000_000):
        a = dispatch._kernels.empty(count, np.dtype(dtype))
        assert is_aligned(a)
        assert a.shape == (count,)
        assert a.dtype == dtype
        assert a.flags.writeable
        a[...] = 1  # all of it is ours


def test_compiled_vectors_check_their_arguments() -> None:
    for arguments in ((), (1,), (1, "f4"), (1.5, np.dtype("f4")), (1, np.dtype(object))):
        with pytest.raises(TypeError):
            dispatch._kernels.empty(*arguments)
    with pytest.raises(TypeError, match="Python objects"):
        dispatch._kernels.empty(1, np.dtype([("a", "f4"), ("b", object)]))
    with pytest.raises(ValueError, match="negative"):
        dispatch._kernels.empty(-1, np.dtype("f4"))
    for count in (2**62, 2**63 - 1):
        with pytest.raises(MemoryError):
            dispatch._kernels.empty(count, np.dtype("f8"))


def test_aligned_copies_and_casts() -> None:
    a = np.arange(12.0).reshape(3, 4).T
    b = aligned(a, "float32")
    assert is_aligned(b)
    assert b.flags.c_contiguous
    assert b.dtype == np.float32
    np.testing.assert_array_equal(a, b)
    b[0, 0] = 7
    assert a[0, 0] == 0


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_values_of_every_origin_start_at_a_line(format: str, dtype: str, tmp_path: Path) -> None:
    a = tensor(format, dtype)
    cls, dense, file = type(a), a.to_dense(), tmp_path / "a.safetensors"
    scores = np.random.default_rng(1).random(SHAPE)
    a.save(file)
    made = {
        "astype": a,
        "constructor": a.with_values(beside_a_line(a.values)),
        "copy": copy.deepcopy(a),
        "pickle": pickle.loads(pickle.dumps(a)),
        "file": spfmt.load(file),
        "from_dense": cls.from_dense(dense, **({"m": 64} if format == "nm" else {})),
        "from_scores": cls.from_scores(scores, 0.25, values=dense),
        "from_scores, zeros": cls.from_scores(scores, 0.25),
        "convert": spfmt.convert(
            spfmt.CSR.from_dense(dense), format, max_padding=None,
            **({"n": 64, "m": 64} if format == "nm" else {}),
        ),
    }  # fmt: skip
    for origin, b in made.items():
        assert is_aligned(b.values), origin
        assert not b.values.flags.writeable, origin
        assert b.values.flags.c_contiguous, origin
    assert made["constructor"] == made["copy"] == made["pickle"] == made["file"] == a


@pytest.mark.parametrize("batch", [1, 3, 16, 65])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("backend", ["auto", "scalar", "reference"])
def test_results_start_at_a_line_and_are_ordinary(
    batch: int, batch_first: bool, backend: str
) -> None:
    a = tensor("shuffled_block")
    for _ in range(5):
        x = beside_a_line(np.ones((batch, 64) if batch_first else (64, batch), "float32"))
        y = spfmt.spmm(a, x, batch_first=batch_first, backend=backend)
        dx = spfmt.spmm_t(a, y, batch_first=batch_first, backend=backend)
        dw = spfmt.sddmm(a, y, x, batch_first=batch_first, backend=backend)
        for result in (y, dx, dw):
            assert is_aligned(result)
            assert type(result) is np.ndarray
            assert result.flags.c_contiguous
            assert result.flags.writeable
            assert result.flags.aligned
        np.testing.assert_allclose(
            y.T if batch_first else y, a.to_dense() @ np.ones((64, batch)), rtol=1e-4, atol=1e-4
        )


def test_results_live_as_long_as_their_views() -> None:
    a, x = tensor("csr"), np.ones((64, 200), "float32")
    want = spfmt.spmm(a, x).copy()
    views = [spfmt.spmm(a, x)[1:] for _ in range(50)]  # the arrays themselves are gone
    for view in views:
        np.testing.assert_array_equal(view, want[1:])
    del view, views[1:]
    views[0] += 1
    np.testing.assert_array_equal(views[0], want[1:] + 1)


@pytest.mark.parametrize("samples", [2**59, 2**60 - 1, 2**60])  # bytes: 2**63, 2**64 - 16, 2**64
def test_a_result_too_large_for_any_memory_is_an_error(samples: int) -> None:
    a = spfmt.CSR.from_dense(np.ones((4, 1), "float32"))
    x = np.broadcast_to(np.float32(1), (1, samples))
    with pytest.raises(MemoryError):
        spfmt.spmm(a, x)
