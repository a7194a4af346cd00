"""The three products of a sparse convolution.

=============  ==============================  ============================================
conv2d         Y = A * X                       forward pass
conv2d_input   dX, A turned by 180° * dY       gradient of the input
conv2d_weight  d(values) from dY and X         gradient of the weight, at the structure only
=============  ==============================  ============================================

A weight of shape (C_out, C_in / groups, Kh, Kw) is the matrix (C_out, C_in / groups · Kh · Kw), and
a convolution is its product with images whose samples overlap. Images are (N, C, H, W) arrays of
any strides: channels last is ``x.transpose(0, 3, 1, 2)`` of an (N, H, W, C) array. Nothing is
unfolded: the kernels keep one padded image per thread, or 16 of a batch, in strips of some
megabytes, or of what a single row of outputs takes, whatever the batch.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from spfmt import _kernels, threads
from spfmt._memory import empty_aligned

from .activations import activation_code, apply_activation
from .cost import Geometry
from .dispatch import (
    Plan,
    active_isa,
    check_own_memory,
    dtype_name,
    logger,
    same_dtype,
    select,
    splits_elements,
)
from .errors import format_error
from .formats import SparseTensor

__all__ = ["Convolution", "conv2d", "conv2d_input", "conv2d_weight"]

Array = npt.NDArray[Any]
Pair = int | Sequence[int]
_MOST = 2**30  # the kernels add sizes up


@dataclass(frozen=True)
class Convolution:
    """How a kernel moves over images.

    Attributes
    ----------
    kernel, stride, dilation : (int, int)
        Along y and x, at least 1.
    padding : (int, int, int, int)
        Zeros at the top, the left, the bottom and the right, as ONNX orders them.
    groups : int
    """

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
    ) -> Convolution:
        """Read arguments like those of ``torch.nn.functional.conv2d``.

        Parameters
        ----------
        shape : sequence of int
            (C_out, C_in / groups, Kh, Kw).
        stride, dilation : int or (int, int)
        padding : int, (int, int), (int, int, int, int) or {"same", "valid"}
            Four numbers are those of `Convolution.padding`.
        groups : int

        Raises
        ------
        FormatError
            Where a number is out of range, or `groups` does not divide C_out.
        """
        given = (tuple(shape), _plain(stride), _plain(padding), _plain(dilation), groups)
        if None not in given and type(groups) is int and all(type(n) is int for n in given[0]):
            return _remembered(*given)
        return cls._read(shape, stride, padding, dilation, groups)

    @classmethod
    def _read(
        cls, shape: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: Any
    ) -> Convolution:
        if len(shape) != 4:
            raise format_error(
                f"a weight of shape {tuple(shape)}",
                "(C_out, C_in / groups, Kh, Kw)",
                "use spmm for matrices",
            )
        rows, _, *kernel = (int(n) for n in shape)
        steps, spread = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
        size = kernel[0], kernel[1]
        if min(size) < 1:
            raise format_error(
                f"a kernel of {size[0]} x {size[1]}", "one cell or more", "use another weight"
            )
        ends = _padding(padding, size, steps, spread)
        (count,) = _ints("groups", groups, 1, 1)
        if rows % count:
            raise format_error(f"groups={count}", f"a divisor of {rows} channels of Y", "groups=1")
        if any(k * d > _MOST for k, d in zip(size, spread, strict=True)):
            raise format_error(f"dilation={spread}", f"a reach of at most {_MOST}", "dilation=1")
        return cls(size, steps, ends, spread, count)

    def sizes(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the maps of Y for maps of X.

        Raises
        ------
        FormatError
            Where the kernel does not fit the padded maps.
        """
        top, left, bottom, right = self.padding
        padded = height + top + bottom, width + left + right
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        if any(n < r for n, r in zip(padded, reach, strict=True)):
            raise format_error(
                f"padded maps of {padded[0]} x {padded[1]} for a kernel that reaches over "
                f"{reach[0]} x {reach[1]}",
                "maps no smaller than the kernel",
                "add padding, or leave the layer out",
            )
        y, x = ((n - r) // s + 1 for n, r, s in zip(padded, reach, self.stride, strict=True))
        return y, x

    def geometry(self, height: int, width: int) -> Geometry:
        """Return what the cost model and `Plan.explain` ask for: this on maps of one size.

        Raises
        ------
        FormatError
            Where a size is no positive int, or the kernel does not fit the padded maps.

        Examples
        --------
        >>> import spfmt
        >>> a = spfmt.CSR.from_dense(np.ones((8, 4, 3, 3), "float32"))
        >>> text = a.plan.explain(16, 1, geometry=Convolution.of(a.shape).geometry(32, 32))
        >>> text.partition(",")[0]
        'conv2d lists float32'
        """
        size = _pair("size", (height, width), 1)
        out = self.sizes(*size)
        y, x = (
            (size[i], out[i], self.kernel[i], self.stride[i], self.padding[i], self.dilation[i])
            for i in range(2)
        )
        return Geometry(y, x, self.groups)

    def parameters(self) -> tuple[int, ...]:
        """Return the numbers that the compiled kernels take."""
        axes = [
            (self.kernel[i], self.stride[i], self.padding[i], self.dilation[i]) for i in range(2)
        ]
        return (*axes[0], *axes[1], self.groups)


def _plain(given: Any) -> Any:
    """Return ints, or a word, in a form that can be looked up; None for anything else."""
    if type(given) is int or type(given) is str:
        return given
    if isinstance(given, tuple | list) and all(type(n) is int for n in given):
        return tuple(given)
    return None


@functools.lru_cache(maxsize=256)  # reading the arguments takes longer than a small product
def _remembered(*given: Any) -> Convolution:
    return Convolution._read(*given)


def _several(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1)


def _ints(name: str, value: Any, count: int, least: int) -> tuple[int, ...]:
    given = tuple(value) if _several(value) else (value,) * count
    whole = all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in given)
    if len(given) != count or not whole or not all(least <= n <= _MOST for n in given):
        wanted = "an int" if count == 1 else f"an int or {count} of them"
        raise format_error(
            f"{name}={value!r}", f"{wanted}, {least} or more", f"pass {name}={least}"
        )
    return tuple(int(n) for n in given)


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    y, x = _ints(name, value, 2, least)
    return y, x


def _padding(
    padding: Any, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    if isinstance(padding, str):
        if padding == "same" and stride != (1, 1):
            raise format_error("padding='same' with a stride", "stride 1", "give the padding")
        if padding not in ("same", "valid"):
            raise format_error(f"padding={padding!r}", "'same', 'valid' or ints", "pass padding=0")
        total = [
            d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)
        ]
        y, x = total  # of an odd number the end gets one more, as in torch
        return y // 2, x // 2, y - y // 2, x - x // 2
    if _several(padding) and len(padding) == 4:
        top, left, bottom, right = _ints("padding", padding, 4, 0)
        return top, left, bottom, right
    y, x = _pair("padding", padding, 0)
    return y, x, y, x


# ------------------------------------------------------------------------------- on plain arrays


def convolve(
    plan: Plan,
    how: Convolution,
    values: Array,
    x: Array,
    bias: Array | None,
    activation: str | None,
    out: Array,
    backend: str = "auto",
    turned: bool = False,
) -> None:
    """Compute conv2d, or conv2d_input where `turned`, into `out`; shapes fit by now."""
    op = "conv2d_input" if turned else "conv2d"
    if backend == "reference":
        out[...] = _reference(plan, how, values, x, bias, activation, out.shape, turned)
        return
    isa = _level(plan, op, out, backend)
    code, most = activation_code(activation), threads.get_num_threads()
    with _refusals():
        _kernels.convolve(
            plan.compiled, turned, isa, values, x, bias, code, how.parameters(), out, most
        )


def convolve_sampled(
    plan: Plan,
    how: Convolution,
    dy: Array,
    x: Array,
    gradient: Array,
    backend: str = "auto",
) -> None:
    """Compute conv2d_weight into `gradient`, zero behind nnz; shapes fit by now."""
    if backend == "reference":
        gradient[: plan.nnz] = _reference_sampled(plan, how, dy, x)
        gradient[plan.nnz :] = 0
        return
    isa, most = _level(plan, "conv2d_weight", gradient, backend), threads.get_num_threads()
    with _refusals():
        _kernels.convolve_sampled(plan.compiled, isa, dy, x, how.parameters(), gradient, most)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn what the compiled code refuses into this library's error."""
    try:
        yield
    except ValueError as error:
        raise format_error(
            f"a convolution that the kernels refuse: {error}",
            "sizes whose offsets fit 32 bits",
            "split the images, or use fewer channels",
        ) from None


def _level(plan: Plan, op: str, like: Array, backend: str) -> str | None:
    """Return the level that runs, None for the best one in use; raise where there is none."""
    plain = like.dtype == np.float32 or like.dtype == np.float64
    if backend == "auto" and plain and not logger.isEnabledFor(logging.DEBUG):
        active_isa()  # raises where SPFMT_ISA is invalid
        return None
    kernel = select(op, plan.layout.name, dtype_name(like.dtype), backend)
    logger.debug("%s %s %s: kernel %s", op, plan.layout.name, kernel.dtype, kernel.isa)
    return kernel.isa


def _dense(plan: Plan, how: Convolution, values: Array) -> npt.NDArray[np.float64]:
    """Return the weight by groups: (groups, rows, channels, Kh, Kw)."""
    dense = np.zeros(plan.shape)
    dense[plan.layout.coordinates()] = values[: plan.nnz].astype(np.float64)
    return dense.reshape(
        how.groups, plan.shape[0] // how.groups, plan.shape[1] // math.prod(how.kernel), *how.kernel
    )


def _grouped(x: Array, groups: int) -> Array:
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])


def _cells(how: Convolution, out: tuple[int, int]) -> list[tuple[int, int, slice, slice]]:
    """Return every cell of the kernel and the numbers of padded maps that it meets."""
    steps = [
        [
            slice(k * how.dilation[i], k * how.dilation[i] + (out[i] - 1) * how.stride[i] + 1,
                  how.stride[i])
            for k in range(how.kernel[i])
        ]
        for i in range(2)
    ]  # fmt: skip
    return [(ky, kx, y, x) for ky, y in enumerate(steps[0]) for kx, x in enumerate(steps[1])]


def _padded(how: Convolution, shape: Sequence[int]) -> tuple[Array, tuple[slice, slice]]:
    """Return zeros for padded maps by groups, and where the maps lie in them."""
    n, channels, height, width = shape
    top, left, bottom, right = how.padding
    zeros = np.zeros(
        (n, how.groups, channels // how.groups, height + top + bottom, width + left + right)
    )
    return zeros, (slice(top, top + height), slice(left, left + width))


def _reference(
    plan: Plan,
    how: Convolution,
    values: Array,
    x: Array,
    bias: Array | None,
    activation: str | None,
    shape: Sequence[int],
    turned: bool,
) -> Array:
    weight = _dense(plan, how, values)
    padded, (rows, cols) = _padded(how, shape if turned else x.shape)
    if turned:
        dy = _grouped(x, how.groups).astype(np.float64)
        for ky, kx, at_y, at_x in _cells(how, (x.shape[2], x.shape[3])):
            share = np.einsum("grc,ngryx->ngcyx", weight[..., ky, kx], dy)
            padded[..., at_y, at_x] += share
        return padded[..., rows, cols].reshape(shape)
    padded[..., rows, cols] = _grouped(x, how.groups)
    y = np.zeros((x.shape[0], how.groups, weight.shape[1], *shape[2:]))
    for ky, kx, at_y, at_x in _cells(how, (shape[2], shape[3])):
        y += np.einsum("grc,ngcyx->ngryx", weight[..., ky, kx], padded[..., at_y, at_x])
    y = y.reshape(shape)
    if bias is not None:
        y += bias.astype(np.float64)[:, None, None]
    return apply_activation(activation, y)


def _reference_sampled(plan: Plan, how: Convolution, dy: Array, x: Array) -> Array:
    padded, (rows, cols) = _padded(how, x.shape)
    padded[..., rows, cols] = _grouped(x, how.groups)
    parts = _grouped(dy, how.groups).astype(np.float64)
    full = np.zeros((how.groups, parts.shape[2], padded.shape[2], *how.kernel))
    for ky, kx, at_y, at_x in _cells(how, (dy.shape[2], dy.shape[3])):
        full[..., ky, kx] = np.einsum("ngryx,ngcyx->grc", parts, padded[..., at_y, at_x])
    found: Array = full.reshape(plan.shape)[plan.layout.coordinates()]
    return found


# --------------------------------------------------------------------------------------- public


def conv2d(
    a: SparseTensor,
    x: Array,
    *,
    bias: Array | None = None,
    activation: str | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    out: Array | None = None,
    backend: str = "auto",
) -> Array:
    """Convolve images with a sparse weight: Y = f(A * X + bias).

    Parameters
    ----------
    a : SparseTensor
        Weight of shape (C_out, C_in / groups, Kh, Kw) with float32 or float64 values.
    x : ndarray, shape (N, C_in, H, W)
        Of the values' dtype, with any strides. N may be 0.
    bias : ndarray, shape (C_out,), optional
    activation : {None, "relu", "gelu", "gelu_tanh", "silu"}
        Applied to the result.
    stride, dilation : int or (int, int)
        Along y and x.
    padding : int, (int, int), (int, int, int, int) or {"same", "valid"}
        Zeros around X: both, along y and x, or at the top, left, bottom and right.
    groups : int
        Groups of channels that do not meet.
    out : ndarray, shape (N, C_out, Ho, Wo), optional
        Receives the result; must not share memory with an operand.
    backend : {"auto", "reference", "scalar", "avx2", "avx512"}

    Returns
    -------
    ndarray, shape (N, C_out, Ho, Wo)
        `out`, or a new array; channels last in memory where `x` is.

    Raises
    ------
    FormatError
        For arguments that do not fit together.
    KernelNotFound
        For dtypes without a kernel.
    """
    how = Convolution.of(_shape_of(a), stride, padding, dilation, groups)
    x = _images("X", x, a.shape[1] * how.groups, a.values.dtype)
    size = how.sizes(x.shape[2], x.shape[3])
    activation_code(activation)
    if bias is not None:
        bias = a._structure.plan.bias_like(bias, a.values.dtype)
    shape = x.shape[0], a.shape[0], *size
    y = _result(shape, x, out, a._values, *(() if bias is None else (bias,)))
    values = a._values.reshape(-1)
    convolve(a._structure.plan, how, values, x, bias, activation, y, backend)
    return y


def conv2d_input(
    a: SparseTensor,
    dy: Array,
    size: tuple[int, int],
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    out: Array | None = None,
    backend: str = "auto",
) -> Array:
    """Compute the gradient of a convolution's input: dX, from dY and the same values.

    Parameters
    ----------
    a : SparseTensor
        As for :func:`conv2d`.
    dy : ndarray, shape (N, C_out, Ho, Wo)
    size : (int, int)
        (H, W) of X, which several sizes of Y may belong to.
    stride, padding, dilation, groups, out, backend
        As for :func:`conv2d`; `out` is (N, C_in, H, W).

    Returns
    -------
    ndarray, shape (N, C_in, H, W)
        `out`, or a new array; channels last in memory where `dy` is.

    Raises
    ------
    FormatError, KernelNotFound
        As :func:`conv2d`.
    """
    how = Convolution.of(_shape_of(a), stride, padding, dilation, groups)
    dy = _images("dY", dy, a.shape[0], a.values.dtype)
    height, width = _pair("size", size, 0)
    _check_maps(how, dy, (height, width))
    shape = dy.shape[0], a.shape[1] * how.groups, height, width
    dx = _result(shape, dy, out, a._values)
    plan, values = a._structure.plan, a._values.reshape(-1)
    convolve(plan, how, values, dy, None, None, dx, backend, turned=True)
    return dx


def conv2d_weight(
    a: SparseTensor,
    dy: Array,
    x: Array,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    backend: str = "auto",
) -> Array:
    """Compute the gradient of a convolution's values, at the structure only.

    Parameters
    ----------
    a : SparseTensor
        Supplies the structure; its values are not used.
    dy : ndarray, shape (N, C_out, Ho, Wo)
    x : ndarray, shape (N, C_in, H, W)
        Of the dtype of `dy`.
    stride, padding, dilation, groups, backend
        As for :func:`conv2d`.

    Returns
    -------
    ndarray
        Shape of ``a.values``, dtype of `dy`.

    Raises
    ------
    FormatError, KernelNotFound
        As :func:`conv2d`.
    """
    how = Convolution.of(_shape_of(a), stride, padding, dilation, groups)
    dtype = np.asarray(x).dtype
    dy = _images("dY", dy, a.shape[0], dtype)
    x = _images("X", x, a.shape[1] * how.groups, dtype)
    if dy.shape[0] != x.shape[0]:
        raise format_error(
            f"{dy.shape[0]} images of dY and {x.shape[0]} of X", "the same number", "pass one batch"
        )
    _check_maps(how, dy, (x.shape[2], x.shape[3]))
    gradient = empty_aligned(a._structure.nnz, dtype)
    convolve_sampled(a._structure.plan, how, dy, x, gradient, backend)
    return gradient.reshape(a._values.shape)


def _shape_of(a: object) -> tuple[int, ...]:
    if not isinstance(a, SparseTensor):
        raise format_error(
            f"a weight of type {type(a).__name__}",
            "a spfmt tensor",
            "convert it with spfmt.convert() or a format's from_dense()",
        )
    return a.shape


def _images(name: str, x: Any, channels: int, dtype: np.dtype[Any]) -> Array:
    """Check images, and copy those whose elements do not lie at whole addresses."""
    x = np.asarray(x)
    if x.ndim != 4 or x.shape[1] != channels:
        raise format_error(
            f"{name} of shape {x.shape}",
            f"(N, {channels}, H, W)",
            "pass images of that many channels",
        )
    same_dtype(x.dtype, dtype, name, "the other operands")
    return np.array(x, order="C") if splits_elements(x) else x


def _check_maps(how: Convolution, dy: Array, size: tuple[int, int]) -> None:
    wanted = how.sizes(*size)
    if dy.shape[2:] != wanted:
        raise format_error(
            f"dY with maps of {dy.shape[2]} x {dy.shape[3]}",
            f"{wanted[0]} x {wanted[1]}, which maps of {size[0]} x {size[1]} give",
            "pass the gradient of the same convolution's result",
        )


def _result(shape: tuple[int, ...], like: Array, out: Array | None, *operands: Array) -> Array:
    if out is None:
        return _empty(shape, like)
    check_own_memory(out, like, *operands)
    if out.shape != shape:
        raise format_error(f"out of shape {out.shape}", f"{shape}", "let it be allocated")
    same_dtype(out.dtype, like.dtype, "out", "the operands")
    return out


def _empty(shape: tuple[int, ...], like: Array) -> Array:
    n, channels, height, width = shape
    try:
        if is_channels_last(like):
            return empty_aligned((n, height, width, channels), like.dtype).transpose(0, 3, 1, 2)
        return empty_aligned(shape, like.dtype)
    except ValueError:  # numpy cannot even count the elements
        raise MemoryError(f"no memory for images of shape {shape}") from None


def is_channels_last(x: Array) -> bool:
    """Tell whether the channels of images lie side by side, and there are several of them."""
    last = x.transpose(0, 2, 3, 1).flags.c_contiguous
    return bool(last and not x.flags.c_contiguous)
