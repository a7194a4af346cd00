"""Checks of shapes, dtypes and index arrays, shared by all formats; see also structure/_checks.

Each check is vectorised, raises `FormatError` before anything is touched, and names the first
offending place.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from spfmt._memory import aligned
from spfmt.errors import FormatError, MissingDependency, format_error
from spfmt.structure._checks import INT32_MAX, plain_array
from spfmt.structure._checks import as_int as as_int  # convert.py takes these two from here
from spfmt.structure._checks import check_range as check_range

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

VALUE_DTYPES = ("float32", "float64", "float16", "bfloat16")


def check_shape(shape: Any) -> Shape:
    """Return `shape` as a tuple of 2 or 4 ints whose matrix fits 32-bit indices."""
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise format_error(
            f"shape {shape!r}", "a sequence of 2 or 4 integers", "pass e.g. (rows, cols)"
        ) from None
    if len(sizes) not in (2, 4):
        raise format_error(
            f"shape {sizes} of rank {len(sizes)}",
            "rank 2 (rows, cols) or 4 (C_out, C_in, Kh, Kw)",
            "reshape the weight to a matrix or a convolution kernel",
        )
    if min(sizes) < 0:
        raise format_error(f"shape {sizes}", "sizes >= 0", "pass the weight's own shape")
    rows, cols = matrix_shape(sizes)
    if max(cols, *sizes) > INT32_MAX:
        raise format_error(
            f"shape {sizes}, that is a matrix of {rows} x {cols}",
            f"at most {INT32_MAX} rows and columns, because indices have 32 bits",
            "split the weight",
        )
    return sizes


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """Shape (R, C) of the matrix of a weight: C = C_in * Kh * Kw for a convolution."""
    cols = 1
    for size in shape[1:]:
        cols *= size
    return shape[0], cols


def kernel_cells(shape: Shape) -> int:
    """Number of cells Kh * Kw of a convolution kernel, 1 for a matrix."""
    return shape[2] * shape[3] if len(shape) == 4 else 1


def check_rank(name: str, array: Array, ndim: int) -> None:
    """Raise unless `array` has `ndim` axes."""
    if array.ndim != ndim:
        raise format_error(
            f"{name} of shape {array.shape}", f"{ndim} axes", f"reshape {name} to {ndim} axes"
        )


def index_array(name: str, value: Any, ndim: int, dtype: type, copy: bool) -> Array:
    """Read-only C-contiguous index array of `dtype` (int32 or int64).

    The range is checked before the cast. An empty list has no dtype of its own and is accepted.
    """
    array = plain_array(name, value)
    if array.size == 0 and not isinstance(value, np.ndarray):
        array = array.astype(dtype)
    if array.dtype.kind not in "iu":
        raise format_error(
            f"{name} of dtype {array.dtype}", "an integer dtype", f"cast: {name}.astype('int32')"
        )
    check_rank(name, array, ndim)
    if array.size and array.dtype != dtype:
        low, high = int(array.min()), int(array.max())
        limit = np.iinfo(dtype)
        if low < limit.min or high > limit.max:
            raise format_error(
                f"{name} with a value {low if low < limit.min else high}",
                f"values that fit {np.dtype(dtype).name}",
                "indices count rows and columns from 0",
            )
    return frozen(array, np.dtype(dtype), copy)


def value_dtype(dtype: Any) -> np.dtype[Any]:
    """The numpy dtype of values; bfloat16 needs the package ml_dtypes."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", None)
    if name == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise MissingDependency(
                "got dtype bfloat16; expected the package ml_dtypes, which gives numpy this dtype; "
                "fix: pip install ml_dtypes"
            ) from None
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    try:
        resolved = np.dtype(dtype)
    except TypeError:
        resolved = np.dtype(object)
    if resolved.name not in VALUE_DTYPES:
        raise format_error(
            f"dtype {dtype!r}",
            f"one of {', '.join(VALUE_DTYPES)}",
            "cast: values.astype('float32')",
        )
    native: np.dtype[Any] = resolved.newbyteorder("=")
    return native


def float_array(name: str, value: Any) -> Array:
    """`value` as an array of a supported floating dtype (any strides, native byte order)."""
    array = plain_array(name, value)
    if array.dtype.name not in VALUE_DTYPES:
        raise format_error(
            f"{name} of dtype {array.dtype}",
            f"one of {', '.join(VALUE_DTYPES)}",
            f"cast: {name}.astype('float32')",
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def frozen(array: Array, dtype: np.dtype[Any], copy: bool) -> Array:
    """Read-only C-contiguous `array` of `dtype`; without `copy` a fitting array is shared.

    A copy starts at a cache line. numpy will not make the result writeable again, as it would an
    owner of memory: kernels keep what they pack of a tensor's values for as long as it lives.
    """
    if copy:
        out = aligned(array, dtype)
    else:
        out = np.ascontiguousarray(array, dtype=dtype).reshape(array.shape).view(np.ndarray)
    memory = out.reshape(-1).view(np.uint8).data.toreadonly()
    return np.frombuffer(memory, out.dtype).reshape(out.shape)


def check_ascending(name: str, array: Array, row_name: str) -> None:
    """Raise unless the indices ascend strictly along the last axis of a 1-D or 2-D array."""
    if array.shape[-1] < 2:
        return
    bad = array[..., 1:] <= array[..., :-1]
    if not bad.any():
        return
    place = tuple(int(i) for i in np.unravel_index(np.flatnonzero(bad)[0], bad.shape))
    before, after = int(array[place]), int(array[(*place[:-1], place[-1] + 1)])
    where = f" in {row_name} {place[0]}" if array.ndim == 2 else ""
    raise unsorted(name, before, after, where)


def unsorted(name: str, before: int, after: int, where: str) -> FormatError:
    """The error of two neighbouring indices that do not ascend strictly."""
    kind = "a duplicate" if before == after else "unsorted"
    return format_error(
        f"{name} with {before} before {after}{where} ({kind})",
        "strictly ascending indices",
        "sort the indices together with their values and merge duplicates",
    )


def check_pointer(name: str, pointer: Array, count: int, total: int) -> None:
    """Raise unless `pointer` has ``count + 1`` entries that climb from 0 to `total`."""
    if pointer.size != count + 1:
        raise format_error(
            f"{name} of length {pointer.size}", f"length {count + 1}", f"check {name} and the shape"
        )
    falls = np.flatnonzero(pointer[1:] < pointer[:-1])
    if pointer[0] != 0 or falls.size:
        place = (
            f"{name}[0] = {int(pointer[0])}" if pointer[0] != 0 else f"a fall at {int(falls[0])}"
        )
        raise format_error(
            f"{name} with {place}", "pointers that start at 0 and never fall", f"rebuild {name}"
        )
    if int(pointer[-1]) != total:
        raise format_error(
            f"{name} that ends at {int(pointer[-1])}",
            f"its last entry to be {total}, the length of the array that it points into",
            f"rebuild {name}",
        )


def bool_mask(name: str, mask: Any, shape: Shape) -> Array:
    """`mask` as a bool array of `shape`."""
    array = plain_array(name, mask)
    if array.dtype != np.bool_:
        raise format_error(
            f"{name} of dtype {array.dtype}", "dtype bool", f"pass {name} != 0 instead"
        )
    if array.shape != shape:
        raise format_error(
            f"{name} of shape {array.shape}", f"shape {shape}", f"give {name} the weight's shape"
        )
    return array


def weight_array(name: str, value: Any) -> Array:
    """A dense weight: floating dtype, rank 2 or 4, sizes that fit."""
    array = float_array(name, value)
    check_shape(array.shape)
    return array


def check_names(kind: str, given: Mapping[str, Any], names: tuple[str, ...], owner: str) -> None:
    """Raise unless the keys of `given` are exactly `names`."""
    if set(given) != set(names):
        raise format_error(
            f"{kind} {sorted(given)} for {owner}",
            f"{sorted(names)}",
            "take them from a tensor of this format: structure() and params()",
        )
