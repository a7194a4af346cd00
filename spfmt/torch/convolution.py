"""The products of a sparse convolution as torch operators.

=================  ==================================  ===========================================
operator           computes                            gradients (each only when asked for)
=================  ==================================  ===========================================
conv2d             ``y = f(A * x + bias)``             conv2d_input, conv2d_weight, ``bias``: sum
conv2d_input       ``dx``, A turned by 180° * ``dy``   ``dy``: conv2d, ``values``: conv2d_weight
conv2d_weight      ``d(values)`` from ``dy``, ``x``    ``dy``: conv2d, ``x``: conv2d_input
=================  ==================================  ===========================================

What :mod:`spfmt.torch.ops` says of weights, derivatives, vmap, autocast and the dispatcher holds
here too. Results lie in memory like their operand: channels last where it is. Graphs that Inductor
compiles call these operators through torch's dispatcher, a small part of a convolution's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from spfmt.activations import activation_code
from spfmt.convolution import Convolution, Pair
from spfmt.torch import checks, cpu, cuda_convolution
from spfmt.torch import ops as products
from spfmt.torch.activation import activated, activation_backward

__all__ = ["conv2d", "conv2d_input", "conv2d_weight"]

_Ints = Sequence[int]


# ----------------------------------------------------------------------------------- gradients


def _conv2d_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, structure, x, bias, shape, *geometry, activation = inputs
    needs_values, _, needs_x, *_ = ctx.needs_input_grad
    ctx.shape, ctx.geometry, ctx.activation = shape, geometry, activation
    ctx.capacity, ctx.size = values.shape[0], x.shape[2:]
    if activation is None:
        # x is the large one: keep it alive only when the gradient of the values will ask for it.
        values, x, bias = values if needs_x else None, x if needs_values else None, None
    ctx.save_for_backward(values, structure, x, bias)


def _conv2d_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, structure, x, bias = ctx.saved_tensors
    needs_values, _, needs_x, needs_bias, *_ = ctx.needs_input_grad
    dvalues = dx = dbias = None
    with torch.no_grad():
        dz = dy
        if ctx.activation is not None:  # the activation's input was not kept
            z = _conv2d(values, structure, x, bias, ctx.shape, *ctx.geometry)
            dz = activation_backward(dy, z, ctx.activation)
        if needs_values:
            dvalues = _conv2d_weight(structure, dz, x, ctx.shape, ctx.capacity, *ctx.geometry)
        if needs_x:
            dx = _conv2d_input(values, structure, dz, ctx.shape, ctx.size, *ctx.geometry)
        if needs_bias:
            dbias = dz.sum((0, 2, 3))
    sources = [t for t in (dy, values, x, bias) if t is not None]
    once = [None if g is None else products._once(g, *sources) for g in (dvalues, dx, dbias)]
    return once[0], None, once[1], once[2], *(None,) * 6


def _conv2d_input_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, structure, dy, shape, _, *geometry = inputs
    needs_values, _, needs_dy, *_ = ctx.needs_input_grad
    ctx.shape, ctx.geometry, ctx.capacity = shape, geometry, values.shape[0]
    ctx.save_for_backward(values if needs_dy else None, structure, dy if needs_values else None)


def _conv2d_input_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    values, structure, dy = ctx.saved_tensors
    needs_values, _, needs_dy, *_ = ctx.needs_input_grad
    dvalues = ddy = None
    with torch.no_grad():
        if needs_values:
            dvalues = _conv2d_weight(structure, dy, ddx, ctx.shape, ctx.capacity, *ctx.geometry)
        if needs_dy:
            ddy = _conv2d(values, structure, ddx, None, ctx.shape, *ctx.geometry)
    dvalues = None if dvalues is None else products._once(dvalues, ddx, dy)
    ddy = None if ddy is None else products._once(ddy, ddx, values)
    return dvalues, None, ddy, *(None,) * 6


def _conv2d_weight_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    structure, dy, x, shape, _, *geometry = inputs
    _, needs_dy, needs_x, *_ = ctx.needs_input_grad
    ctx.shape, ctx.geometry, ctx.size = shape, geometry, x.shape[2:]
    ctx.save_for_backward(structure, dy if needs_x else None, x if needs_dy else None)


def _conv2d_weight_backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    structure, dy, x = ctx.saved_tensors
    _, needs_dy, needs_x, *_ = ctx.needs_input_grad
    ddy = dx = None
    with torch.no_grad():
        weights = dvalues.contiguous()
        if needs_dy:
            ddy = _conv2d(weights, structure, x, None, ctx.shape, *ctx.geometry)
        if needs_x:
            dx = _conv2d_input(weights, structure, dy, ctx.shape, ctx.size, *ctx.geometry)
    ddy = None if ddy is None else products._once(ddy, dvalues, x)
    dx = None if dx is None else products._once(dx, dvalues, dy)
    return None, ddy, dx, *(None,) * 6


# ----------------------------------------------------------------------------------- operators

_WEIGHT = "Tensor values, Tensor structure"
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"


class _Product:
    """One product: as torch's dispatcher knows it, and called at once where nothing looks."""

    def __init__(
        self,
        schema: str,
        compute: Callable[..., Tensor],
        fake: Callable[..., Tensor],
        on_cuda: Callable[..., Tensor],
        context: Callable[[Any, Any, Any], None],
        backward: Callable[[Any, Tensor], Any],
    ) -> None:
        self.op = products._define(schema, compute, fake, on_cuda)
        self._compute = compute
        self._recorded = products._recorded(compute, context, backward)
        torch.library.register_autograd(
            self.op, backward, setup_context=context, lib=products._library
        )

    def __call__(self, *operands: Any) -> Tensor:
        tensors = [t for t in operands if isinstance(t, Tensor)]
        if products._is_unobserved() and products._is_ordinary(*tensors):
            recorded = products._records(*tensors)
            return (self._recorded if recorded else self._compute)(*operands)
        return products._dispatched(self.op, *operands)


_conv2d_product = _Product(
    f"conv2d({_WEIGHT}, Tensor x, Tensor? bias, int[] shape, {_GEOMETRY}, str? activation=None)",
    cpu.conv2d_cpu, checks.conv2d_fake, cuda_convolution.conv2d_cuda,
    _conv2d_context, _conv2d_backward,
)  # fmt: skip
_conv2d_input = _Product(
    f"conv2d_input({_WEIGHT}, Tensor dy, int[] shape, SymInt[] size, {_GEOMETRY})",
    cpu.conv2d_input_cpu, checks.conv2d_input_fake, cuda_convolution.conv2d_input_cuda,
    _conv2d_input_context, _conv2d_input_backward,
)  # fmt: skip
_conv2d_weight = _Product(
    "conv2d_weight(Tensor structure, Tensor dy, Tensor x, int[] shape, SymInt capacity, "
    f"{_GEOMETRY})",
    cpu.conv2d_weight_cpu, checks.conv2d_weight_fake, cuda_convolution.conv2d_weight_cuda,
    _conv2d_weight_context, _conv2d_weight_backward,
)  # fmt: skip


def _conv2d(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: _Ints,
    stride: _Ints,
    padding: _Ints,
    dilation: _Ints,
    groups: int,
    activation: str | None = None,
) -> Tensor:
    return _conv2d_product(
        values, structure, x, bias, shape, stride, padding, dilation, groups, activation
    )


def _conv2d_vmap(info: Any, dims: Any, *operands: Any) -> tuple[Tensor, int]:
    weight, (x, *rest) = operands[:2], operands[2:]
    return products._folded(_conv2d_product.op, info, dims, weight, x, *rest)


def _conv2d_input_vmap(info: Any, dims: Any, *operands: Any) -> tuple[Tensor, int]:
    weight, (dy, *rest) = operands[:2], operands[2:]
    return products._folded(_conv2d_input.op, info, dims, weight, dy, *rest)


def _conv2d_weight_vmap(info: Any, dims: Any, *operands: Any) -> tuple[Tensor, int]:
    return products._each(_conv2d_weight.op, info, dims, *operands)


torch.library.register_vmap(_conv2d_product.op, _conv2d_vmap, lib=products._library)
torch.library.register_vmap(_conv2d_input.op, _conv2d_input_vmap, lib=products._library)
torch.library.register_vmap(_conv2d_weight.op, _conv2d_weight_vmap, lib=products._library)


@register_flop_formula(_conv2d_product.op.overloadpacket)
def _conv2d_flops(*shapes: Any, out_shape: Any, **_: Any) -> int:
    """Two operations per stored weight and output of a channel."""
    return int(2 * math.prod(shapes[0]) * out_shape[0] * math.prod(out_shape[2:]))


@register_flop_formula(_conv2d_input.op.overloadpacket)
def _conv2d_input_flops(values: Any, structure: Any, dy: Any, *rest: Any, **_: Any) -> int:
    return int(2 * math.prod(values) * dy[0] * math.prod(dy[2:]))


@register_flop_formula(_conv2d_weight.op.overloadpacket)
def _conv2d_weight_flops(
    structure: Any, dy: Any, x: Any, shape: Any, capacity: int, *rest: Any, **_: Any
) -> int:
    return int(2 * capacity * dy[0] * math.prod(dy[2:]))


# -------------------------------------------------------------------------------------- public


def _numbers(
    shape: _Ints, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Return stride, padding, dilation and groups as the operators take them."""
    how = Convolution.of(shape, stride, padding, dilation, groups)
    return how.stride, how.padding, how.dilation, how.groups


# What torch.compiler.assume_constant_result does, but that imports Dynamo: nothing is to be traced.
_numbers._dynamo_marked_constant = True  # type: ignore[attr-defined]


def conv2d(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    shape: _Ints,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Convolve images with a sparse weight: ``y = f(A * x + bias)``.

    Parameters
    ----------
    values : Tensor, shape (capacity,), float32 or float64; on CUDA float32, bfloat16 or float16
        The weight's values; the first ``nnz`` are in use.
    structure : Tensor, shape (n_words,), int32
        Structure words of the weight (:func:`spfmt.formats.encode`).
    x : Tensor, shape (N, C_in, H, W)
        Images, any strides, dtype of `values`; ``N`` may be zero.
    bias : Tensor, shape (C_out,), optional
    shape : (int, int, int, int)
        (C_out, C_in / groups, Kh, Kw).
    stride, dilation : int or (int, int)
    padding : int, (int, int), (int, int, int, int) or {"same", "valid"}
        Zeros around X: both, along y and x, or at the top, the left, the bottom and the right.
    groups : int
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        f. Where no gradient is recorded the kernel applies it to its result.

    Returns
    -------
    Tensor, shape (N, C_out, Ho, Wo)
        In the memory format of `x`.

    Raises
    ------
    FormatError
        Where shapes, dtypes or devices do not fit together, or the structure is corrupt.
    KernelNotFound
        Where no kernel exists for the dtype or the device.
    """
    activation_code(activation)
    recording = torch.is_grad_enabled() and products._requires_grad(values, x, bias)
    rest = (shape, *_numbers(shape, stride, padding, dilation, groups))
    if activation is None or not recording:
        return _conv2d(values, structure, x, bias, *rest, activation)
    return activated(_conv2d(values, structure, x, bias, *rest), activation)


def conv2d_input(
    values: Tensor,
    structure: Tensor,
    dy: Tensor,
    size: _Ints,
    *,
    shape: _Ints,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Compute the gradient of a convolution's input.

    Parameters
    ----------
    values, structure, shape, stride, padding, dilation, groups
        The convolution, as for :func:`conv2d`.
    dy : Tensor, shape (N, C_out, Ho, Wo)
    size : (int, int)
        (H, W) of the input.

    Returns
    -------
    Tensor, shape (N, C_in, H, W)

    Raises
    ------
    FormatError, KernelNotFound
        As for :func:`conv2d`.
    """
    how = _numbers(shape, stride, padding, dilation, groups)
    return _conv2d_input(values, structure, dy, shape, size, *how)


def conv2d_weight(
    structure: Tensor,
    dy: Tensor,
    x: Tensor,
    *,
    shape: _Ints,
    capacity: int,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Compute the gradient of a convolution's values, at the structure only.

    Parameters
    ----------
    structure, shape, stride, padding, dilation, groups
        The convolution, as for :func:`conv2d`.
    dy : Tensor, shape (N, C_out, Ho, Wo)
    x : Tensor, shape (N, C_in, H, W)
    capacity : int
        Length of the result, at least the structure's nnz; what lies behind nnz is zero.

    Returns
    -------
    Tensor, shape (capacity,)

    Raises
    ------
    FormatError, KernelNotFound
        As for :func:`conv2d`.
    """
    how = _numbers(shape, stride, padding, dilation, groups)
    return _conv2d_weight(structure, dy, x, shape, capacity, *how)
