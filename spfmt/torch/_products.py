"""The products as modules call them: at once where nothing looks into a call, else as operators.

Gradients are products too, so what computes a product and what differentiates it call each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from spfmt.activations import activation_code
from spfmt.torch import _cpu, _operators
from spfmt.torch._direct import SPMM, SPMM_T, multiply, sample
from spfmt.torch._eager import is_ordinary, is_unobserved, recorded, records

__all__ = ["activated", "sddmm", "spmm", "spmm_act", "spmm_t"]

# ------------------------------------------------------------------------------------- gradients


class _DifferentiableOnce(torch.autograd.Function):
    """The identity on a gradient; differentiating through it raises.

    Unlike ``torch.autograd.function.once_differentiable`` it also notices sources that the gradient
    depends on without their being inputs of the backward pass (the saved ``values`` and ``x``).
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "got a double backward through a sparse product; expected first derivatives only; "
            "call densify(model) for second derivatives (gradient penalties, Hessians)"
        )


def _once(gradient: Tensor, *sources: Tensor) -> Tensor:
    if not torch.is_grad_enabled():  # the usual case: no create_graph
        return gradient
    once = _DifferentiableOnce.apply(gradient, *sources)  # type: ignore[no-untyped-call]
    return cast(Tensor, once)


def _spmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, structure, x, _, shape, format = inputs
    needs_values, _, needs_x, *_ = ctx.needs_input_grad
    ctx.shape, ctx.format, ctx.capacity = shape, format, values.shape[0]
    # x is the large one: keep it alive only when the gradient of the values will ask for it.
    ctx.save_for_backward(values if needs_x else None, structure, x if needs_values else None)


def _spmm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, structure, x = ctx.saved_tensors
    needs_values, _, needs_x, needs_bias, *_ = ctx.needs_input_grad
    dvalues = dx = dbias = None
    with torch.no_grad():
        if needs_values:
            dvalues = sddmm(structure, dy, x, ctx.shape, ctx.format, ctx.capacity)
        if needs_x:
            dx = spmm_t(values, structure, dy, ctx.shape, ctx.format)
        if needs_bias:
            dbias = dy.sum(0)
    return (
        None if dvalues is None else _once(dvalues, dy, x),
        None,
        None if dx is None else _once(dx, dy, values),
        None if dbias is None else _once(dbias, dy),
        None,
        None,
    )


def activated(z: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu(z)
    if activation == "silu":
        return torch.nn.functional.silu(z)
    return torch.nn.functional.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activation_backward(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    if activation == "relu":
        return cast(Tensor, aten.threshold_backward(dy, z, 0))
    if activation == "silu":
        return cast(Tensor, aten.silu_backward(dy, z))
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return cast(Tensor, aten.gelu_backward(dy, z, approximate=approximate))


def _spmm_act_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, structure, x, bias, shape, format, activation = inputs
    ctx.shape, ctx.format, ctx.activation = shape, format, activation
    ctx.capacity = values.shape[0]
    ctx.save_for_backward(values, structure, x, bias)


def _spmm_act_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, structure, x, bias = ctx.saved_tensors
    needs_values, _, needs_x, needs_bias, *_ = ctx.needs_input_grad
    dvalues = dx = dbias = None
    with torch.no_grad():
        z = spmm(values, structure, x, bias, ctx.shape, ctx.format)
        dz = _activation_backward(dy, z, ctx.activation)
        if needs_values:
            dvalues = sddmm(structure, dz, x, ctx.shape, ctx.format, ctx.capacity)
        if needs_x:
            dx = spmm_t(values, structure, dz, ctx.shape, ctx.format)
        if needs_bias:
            dbias = dz.sum(0)
    sources = [t for t in (dy, values, x, bias) if t is not None]
    once = [None if g is None else _once(g, *sources) for g in (dvalues, dx, dbias)]
    return once[0], None, once[1], once[2], None, None, None


def _spmm_t_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, structure, dy, shape, format = inputs
    needs_values, _, needs_dy, *_ = ctx.needs_input_grad
    ctx.shape, ctx.format, ctx.capacity = shape, format, values.shape[0]
    ctx.save_for_backward(values if needs_dy else None, structure, dy if needs_values else None)


def _spmm_t_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    values, structure, dy = ctx.saved_tensors
    needs_values, _, needs_dy, *_ = ctx.needs_input_grad
    dvalues = ddy = None
    with torch.no_grad():
        if needs_values:
            dvalues = sddmm(structure, dy, ddx, ctx.shape, ctx.format, ctx.capacity)
        if needs_dy:
            ddy = spmm(values, structure, ddx, None, ctx.shape, ctx.format)
    return (
        None if dvalues is None else _once(dvalues, ddx, dy),
        None,
        None if ddy is None else _once(ddy, ddx, values),
        None,
        None,
    )


def _sddmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    structure, dy, x, shape, format, _ = inputs
    _, needs_dy, needs_x, *_ = ctx.needs_input_grad
    ctx.shape, ctx.format = shape, format
    ctx.save_for_backward(structure, dy if needs_x else None, x if needs_dy else None)


def _sddmm_backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    structure, dy, x = ctx.saved_tensors
    _, needs_dy, needs_x, *_ = ctx.needs_input_grad
    ddy = dx = None
    with torch.no_grad():
        weights = dvalues.contiguous()
        if needs_dy:
            ddy = spmm(weights, structure, x, None, ctx.shape, ctx.format)
        if needs_x:
            dx = spmm_t(weights, structure, dy, ctx.shape, ctx.format)
    return (
        None,
        None if ddy is None else _once(ddy, dvalues, x),
        None if dx is None else _once(dx, dvalues, dy),
        None,
        None,
        None,
    )


_operators.register_autograd(_operators.spmm, _spmm_context, _spmm_backward)
_operators.register_autograd(_operators.spmm_act, _spmm_act_context, _spmm_act_backward)
_operators.register_autograd(_operators.spmm_t, _spmm_t_context, _spmm_t_backward)
_operators.register_autograd(_operators.sddmm, _sddmm_context, _sddmm_backward)

_recorded_spmm = recorded(_cpu.spmm_cpu, _spmm_context, _spmm_backward)
_recorded_spmm_t = recorded(_cpu.spmm_t_cpu, _spmm_t_context, _spmm_t_backward)
_recorded_sddmm = recorded(_cpu.sddmm_cpu, _sddmm_context, _sddmm_backward)

# -------------------------------------------------------------------------------------- products


def spmm(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    format: str,
) -> Tensor:
    if is_unobserved():
        recording = records(values, x, bias)
        if not recording:
            y = multiply(SPMM, values, structure, x, bias, shape, format)
            if y is not None:
                return y
        if is_ordinary(values, structure, x, bias):
            compute = _recorded_spmm if recording else _cpu.spmm_long
            return compute(values, structure, x, bias, shape, format)
    _operators.check_devices("spmm", values, structure, x, values if bias is None else bias)
    return _operators.call(_operators.spmm, values, structure, x, bias, shape, format)


def spmm_act(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    format: str,
    activation: str,
) -> Tensor:
    """Compute the fused product; the caller has made sure that no gradient is recorded."""
    if is_unobserved():
        code = activation_code(activation)
        y = multiply(SPMM, values, structure, x, bias, shape, format, code)
        if y is not None:
            return y
        if is_ordinary(values, structure, x, bias):
            return _cpu.spmm_act_long(values, structure, x, bias, shape, format, activation)
    _operators.check_devices("spmm_act", values, structure, x, values if bias is None else bias)
    return _operators.call(
        _operators.spmm_act, values, structure, x, bias, shape, format, activation
    )


def spmm_t(
    values: Tensor, structure: Tensor, dy: Tensor, shape: Sequence[int], format: str
) -> Tensor:
    if is_unobserved():
        recording = records(values, dy)
        if not recording:
            dx = multiply(SPMM_T, values, structure, dy, None, shape, format)
            if dx is not None:
                return dx
        if is_ordinary(values, structure, dy):
            compute = _recorded_spmm_t if recording else _cpu.spmm_t_long
            return compute(values, structure, dy, shape, format)
    _operators.check_devices("spmm_t", values, structure, dy)
    return _operators.call(_operators.spmm_t, values, structure, dy, shape, format)


def sddmm(
    structure: Tensor, dy: Tensor, x: Tensor, shape: Sequence[int], format: str, capacity: int
) -> Tensor:
    if is_unobserved():
        recording = records(dy, x)
        if not recording:
            gradient = sample(structure, dy, x, shape, format, capacity)
            if gradient is not None:
                return gradient
        if is_ordinary(structure, dy, x):
            compute = _recorded_sddmm if recording else _cpu.sddmm_long
            return compute(structure, dy, x, shape, format, capacity)
    _operators.check_devices("sddmm", structure, dy, x)
    return _operators.call(_operators.sddmm, structure, dy, x, shape, format, capacity)
