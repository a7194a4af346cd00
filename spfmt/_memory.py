"""Arrays that start at a cache line, as numpy's own do not.

numpy's memory starts 16 or 48 bytes into a line of 64. Kernels of row groups load weights where the
tensor keeps them, 16 at a time: at such an address every load of a 512-bit register takes two lines
instead of one. Tensors always own their values, so they place them well; nothing is copied for it
that would not be copied or made anyway. Operands are used where the caller has them: a copy would
cost more than it saves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LINE", "aligned", "empty_aligned", "is_aligned", "zeros_aligned"]

Array = npt.NDArray[Any]

LINE = 64
"""Bytes of a cache line, and of the widest register."""


def empty_aligned(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Return an uninitialised C-contiguous array of `shape` that starts at a cache line."""
    return _placed(np.empty, shape, dtype)


def zeros_aligned(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Return a C-contiguous array of zeros of `shape` that starts at a cache line."""
    return _placed(np.zeros, shape, dtype)


def aligned(array: Array, dtype: npt.DTypeLike) -> Array:
    """Return a C-contiguous copy of `array`, cast to `dtype`, that starts at a cache line."""
    copy = empty_aligned(array.shape, dtype)
    copy[...] = array
    return copy


def is_aligned(array: Array) -> bool:
    """Tell whether `array` starts at a cache line; an empty one is nowhere."""
    return array.size == 0 or _address(array) % LINE == 0


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]  # ctypes.data takes microseconds
    return address


def _placed(make: Any, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    dtype = np.dtype(dtype)
    size = math.prod((shape,) if isinstance(shape, int) else shape) * dtype.itemsize
    raw = make(size + LINE - 1, np.uint8)
    return np.ndarray(shape, dtype, raw, -_address(raw) % LINE)
