"""Input checks shared by the structure search: one place that turns user arrays into plain ones."""

from __future__ import annotations

import math
import operator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import format_error

BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]

INT32_MAX = 2**31 - 1


def plain_array(name: str, value: Any) -> npt.NDArray[Any]:
    """`value` as an ndarray; masked arrays are refused because their mask would get lost."""
    if isinstance(value, np.ma.MaskedArray):
        raise format_error(
            f"{name} as a numpy masked array", "a plain array", f"pass {name}.filled(0) instead"
        )
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # torch raises the last two
        raise format_error(
            f"{name} that numpy cannot read ({error})",
            "a rectangular array of numbers in main memory",
            f"check {name}; spfmt.convert reads torch tensors of every dtype and layout",
        ) from None


def as_scores(scores: npt.ArrayLike, *, ndim: int | None = None) -> FloatArray:
    """Scores as a C-contiguous float32 or float64 array without NaN.

    Parameters
    ----------
    scores : array_like
        Real numbers, larger is better. float32 stays, float16 and bfloat16 become float32 and every
        other real type float64; strides and byte order may be any.
    ndim : int, optional
        Required number of dimensions.

    Returns
    -------
    ndarray of float32 or float64
        The input itself where it already has that form.

    Raises
    ------
    FormatError
        Not real numbers, the wrong number of dimensions, more than 2**31 - 1 columns, or a NaN.
    """
    array = plain_array("scores", scores)
    _check_ndim(array, "scores", ndim)
    small = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    if array.dtype.name == "bfloat16" or small:
        dtype: Any = np.float32
    elif array.dtype.kind in "fiub":
        dtype = np.float64
    else:
        raise format_error(
            f"scores of dtype {array.dtype}", "real numbers", "pass the magnitudes as floats"
        )
    plain: FloatArray = np.ascontiguousarray(array, dtype=dtype).reshape(array.shape)
    # min() hands a NaN on and needs no temporary array.
    if plain.size and np.isnan(plain.min()):
        where = tuple(int(i) for i in np.argwhere(np.isnan(plain))[0])
        raise format_error(
            f"NaN in scores at {where}",
            "scores that can be ranked",
            "replace NaN first, e.g. by numpy.nan_to_num(scores)",
        )
    return plain


def as_mask(mask: npt.ArrayLike) -> BoolArray:
    """A (R, C) C-contiguous bool array; other dtypes count as nonzero (a NaN is a nonzero).

    Raises
    ------
    FormatError
        Not two-dimensional, or more than 2**31 - 1 rows or columns.
    """
    array = plain_array("mask", mask)
    _check_ndim(array, "mask", 2)
    return np.ascontiguousarray(array if array.dtype == np.bool_ else array != 0)


def bounded(scores: FloatArray) -> FloatArray:
    """Infinite scores as +-1e30, so that sums of scores can be ranked."""
    if scores.size and not (np.isfinite(scores.min()) and np.isfinite(scores.max())):
        limit = scores.dtype.type(1e30)
        return np.minimum(np.maximum(scores, -limit), limit)
    return scores


def check_finite(scores: FloatArray, what: str) -> None:
    """Raise FormatError where a score is infinite."""
    if scores.size and not (np.isfinite(scores.min()) and np.isfinite(scores.max())):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(scores))[0])
        raise format_error(
            f"an infinite score at {where}",
            f"finite scores for {what}",
            "use a large finite score to force a position and 0 to avoid one",
        )


def as_int(name: str, value: Any, low: int, high: int = INT32_MAX) -> int:
    """`value` as an int in low..high.

    Raises
    ------
    FormatError
        Not an integer (2.0 is none), or out of range.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise format_error(
            f"{name}={value!r}",
            f"an integer from {low} to {high}",
            f"choose {name} in this range",
        )
    return number


def as_pair(
    name: str, value: Any, symbols: tuple[str, str], parts: tuple[str, str] | None = None
) -> tuple[int, int]:
    """`value` as two ints from 1 on; errors call them by `parts`, their symbols by default.

    Raises
    ------
    FormatError
        Not two, or one of them no integer or below 1.
    """
    try:
        first, second = value
    except (TypeError, ValueError):
        raise format_error(
            f"{name} = {value!r}", f"two integers ({', '.join(symbols)})", "pass e.g. (16, 16)"
        ) from None
    names = parts or symbols
    return as_int(names[0], first, 1), as_int(names[1], second, 1)


def as_density(value: Any, name: str = "density") -> float:
    """Check that value is a real number in [0, 1] and return it as a float.

    Raises
    ------
    FormatError
        Not a number, NaN, or out of range.
    """
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= 1.0:
        raise format_error(
            f"{name}={value!r}",
            "a number in [0, 1]",
            f"pass {name} as a fraction (density = 1 - sparsity)",
        )
    return number


def as_choice(value: str, name: str, choices: tuple[str, ...]) -> str:
    """Check that value is one of the choices and return it.

    Raises
    ------
    FormatError
        Any other value.
    """
    if value not in choices:
        expected = " or ".join(repr(c) for c in choices)
        raise format_error(f"{name}={value!r}", expected, f"pass {name}={choices[0]!r}")
    return value


def check_range(name: str, array: npt.NDArray[Any], size: int, axis: str) -> None:
    """Raise unless every element of `array` lies in ``0..size-1``."""
    if not array.size:
        return
    low, high = int(array.min()), int(array.max())
    if low >= 0 and high < size:
        return
    bad = np.flatnonzero((array.reshape(-1) < 0) | (array.reshape(-1) >= size))[0]
    place = tuple(int(i) for i in np.unravel_index(bad, array.shape))
    raise format_error(
        f"{name}[{', '.join(map(str, place))}] = {int(array[place])}",
        f"0 <= index < {size} (the number of {axis})",
        f"check that {name} belongs to this shape and counts from 0",
    )


def check_permutation(name: str, perm: npt.NDArray[Any], size: int) -> None:
    """Raise unless `perm` holds each of ``0..size-1`` exactly once."""
    if perm.shape != (size,):
        raise format_error(
            f"{name} of shape {perm.shape}", f"shape {(size,)}", "list every row exactly once"
        )
    check_range(name, perm, size, "rows")
    counts = np.bincount(perm, minlength=size)
    if counts.size and counts.max() > 1:
        row = int(np.flatnonzero(counts > 1)[0])
        raise format_error(
            f"{name} with row {row} {int(counts[row])} times",
            f"a permutation of 0..{size - 1}",
            "list every row exactly once",
        )


def as_row_perm(row_perm: npt.ArrayLike, rows: int) -> Int32Array:
    """`row_perm` as int32, each of range(rows) exactly once.

    Raises
    ------
    FormatError
        Not integers, or names the first row that is out of range or listed twice.
    """
    array = plain_array("row_perm", row_perm)
    if array.dtype.kind not in "iu" and array.size:
        raise format_error(
            f"row_perm of dtype {array.dtype}", "an integer dtype", "pass the result of order_rows"
        )
    array = array.astype(np.int64, copy=False)
    check_permutation("row_perm", array, rows)
    return array.astype(np.int32)


def _check_ndim(array: npt.NDArray[Any], name: str, ndim: int | None) -> None:
    if ndim is not None and array.ndim != ndim:
        raise format_error(
            f"{name} of shape {array.shape}",
            f"{ndim} dimensions",
            "reshape a convolution weight to (C_out, C_in*Kh*Kw)",
        )
    if array.ndim and max(array.shape) > INT32_MAX:
        raise format_error(
            f"{name} of shape {array.shape}",
            "at most 2**31 - 1 rows and columns",
            "split the layer",
        )
