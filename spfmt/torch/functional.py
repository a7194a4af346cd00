"""The three products as torch operators: ``spfmt::spmm``, ``spfmt::spmm_t``, ``spfmt::sddmm``.

A sparse weight is two tensors here: ``values``, flat and floating, and ``structure``, an int32
buffer of self-describing words (see :func:`spfmt.formats.encode`). Of the two only ``values`` is
differentiable, so autograd, ``torch.compile`` and ``torch.export`` see plain tensors.

========  =============================  ========================================
operator  computes                       gradients (each only when asked for)
========  =============================  ========================================
spmm      ``y = x @ A.T + bias``         ``x``: spmm_t, ``values``: sddmm, ``bias``: sum
spmm_act  ``y = f(x @ A.T + bias)``      as spmm; recomputes what f was applied to
spmm_t    ``dx = dy @ A``                ``dy``: spmm, ``values``: sddmm
sddmm     ``(dy.T @ x)`` at the places   ``dy``: spmm, ``x``: spmm_t
========  =============================  ========================================

Gradients are differentiable once: differentiating a gradient again raises a ``RuntimeError``, and
so does forward mode (``jvp``). ``torch.func.vmap`` works, ``torch.func.grad`` does not: torch keeps
it from operators whose gradients are written in Python, and says so. Under
``torch.autocast`` the operators cast to float32, compute and return float32, and say so once in the
log; low-precision tensors outside autocast raise :class:`spfmt.KernelNotFound`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spfmt.activations import activation_code
from spfmt.errors import KernelNotFound, format_error
from spfmt.torch._compiled import lower_products
from spfmt.torch._direct import SPMM, SPMM_T, multiply, sample
from spfmt.torch._eager import is_ordinary, is_unobserved, recorded, records, requires_grad
from spfmt.torch._identity import CompiledStructure, compiled_structure

__all__ = ["sddmm", "spmm", "spmm_t"]

_log = logging.getLogger("spfmt.torch")
_library = torch.library.Library("spfmt", "FRAGMENT")  # type: ignore[no-untyped-call]
_COMPUTE_DTYPES = (torch.float32, torch.float64)


# ------------------------------------------------------------------------------------ checks


def _check_matrix(name: str, x: Tensor, columns: int, like: Tensor) -> None:
    """Check that x is (B, columns) and has the dtype of `like`."""
    if x.dim() != 2 or x.shape[1] != columns:
        raise format_error(
            f"{name} of shape {tuple(x.shape)}",
            f"(B, {columns})",
            "pass a 2-D batch whose last size is the weight's",
        )
    if x.dtype != like.dtype:
        raise format_error(
            f"{name} of {x.dtype} beside {like.dtype}",
            "one dtype for all operands",
            f"cast with {name}.to({like.dtype}), or the module with .to({x.dtype})",
        )


def _check_weight(values: Tensor, structure: Tensor) -> None:
    if values.dim() != 1 or structure.dim() != 1 or structure.dtype != torch.int32:
        raise format_error(
            f"values of shape {tuple(values.shape)} and structure of shape "
            f"{tuple(structure.shape)} and dtype {structure.dtype}",
            "1-D values and 1-D int32 structure words",
            "take both from one SparseLinear",
        )


def _check_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in _COMPUTE_DTYPES:
        raise KernelNotFound(
            f"got {op} of {x.dtype}; kernels exist for float32 and float64 on CPU; fix: cast the "
            f"module and its input with .float(), or use torch.autocast, which computes in float32"
        )


def _check_bias(bias: Tensor | None, rows: int, like: Tensor) -> None:
    if bias is not None and (bias.shape != (rows,) or bias.dtype != like.dtype):
        raise format_error(
            f"bias of shape {tuple(bias.shape)} and dtype {bias.dtype}",
            f"({rows},) and {like.dtype}",
            "pass one bias per output feature, in the dtype of values",
        )


def _check_devices(op: str, *tensors: Tensor) -> None:
    """Check that all tensors lie on one device that has kernels (or on meta, which needs none)."""
    device = tensors[0].device
    for t in tensors:
        if t.device != device:
            places = ", ".join(str(t.device) for t in tensors)
            raise format_error(
                f"tensors on {places} for {op}",
                "one device",
                "move the input or the module with .to()",
            )
    kind = device.type
    if kind not in ("cpu", "meta"):
        raise KernelNotFound(
            f"got {op} on {device}; kernels exist for cpu; fix: move the module and its input with "
            f".cpu(), or densify(model) to stay on {kind}"
        )
    if kind == "cpu":
        _announce_autocast()


# --------------------------------------------------------------------- the operators on the CPU
#
# Each at once, or else the long way, which says what is wrong and serves what is not plain.


def _compiled(structure: Tensor, shape: Sequence[int], format: str) -> CompiledStructure:
    compiled = compiled_structure(structure)
    if compiled.format != format or compiled.shape != (shape[0], shape[1]):
        raise format_error(
            f"a structure of format {compiled.format} and shape {compiled.shape}",
            f"format {format} and shape {tuple(shape)}",
            "use the structure of the module that the values come from",
        )
    return compiled


def _check_capacity(values: Tensor, compiled: CompiledStructure) -> None:
    if values.numel() < compiled.nnz or not values.is_contiguous():
        raise format_error(
            f"{values.numel()} values (contiguous: {values.is_contiguous()})",
            f"at least {compiled.nnz}, contiguous",
            "use the structure of the module that the values come from",
        )


def _check_places(x: Tensor, places: int) -> None:
    """Check addresses, joined by ``|``: kernels read elements at multiples of their size."""
    if places % x.element_size():
        raise format_error(
            "a tensor whose elements lie at odd addresses",
            f"multiples of {x.element_size()} bytes",
            "pass its clone(); torch.frombuffer with an odd offset makes such tensors",
        )


def _dtype_name(x: Tensor) -> str:
    return "float64" if x.dtype is torch.float64 else "float32"


def _multiply(
    op: str, compiled: CompiledStructure, values: Tensor, x: Tensor, out: Tensor, bias: int = 0
) -> None:
    _check_capacity(values, compiled)
    values_at, x_at = values.data_ptr(), x.data_ptr()
    _check_places(x, values_at | x_at | bias)
    compiled.plan.multiply_at(
        op,
        _dtype_name(x),
        values_at,
        compiled.version(values),
        x_at,
        x.stride(),
        x.shape[0],
        out.data_ptr(),
        bias,
    )


def _spmm_long(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    format: str,
) -> Tensor:
    y = _spmm_fake(values, structure, x, bias, shape, format)
    compiled = _compiled(structure, shape, format)
    if bias is not None:
        bias = bias.contiguous()  # alive until the product is done
    _multiply("spmm", compiled, values, x, y, 0 if bias is None else bias.data_ptr())
    return y


def _spmm_act_long(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    format: str,
    activation: str,
) -> Tensor:
    y = _spmm_fake(values, structure, x, bias, shape, format, activation)
    compiled = _compiled(structure, shape, format)
    _check_capacity(values, compiled)
    compiled.plan.spmm(
        values.detach().numpy(),
        x.detach().numpy(),
        bias=None if bias is None else bias.detach().numpy(),
        activation=activation,
        batch_first=True,
        out=y.numpy(),
        version=compiled.version(values),
    )
    return y


def _spmm_t_long(
    values: Tensor, structure: Tensor, dy: Tensor, shape: Sequence[int], format: str
) -> Tensor:
    dx = _spmm_t_fake(values, structure, dy, shape, format)
    _multiply("spmm_t", _compiled(structure, shape, format), values, dy, dx)
    return dx


def _sddmm_long(
    structure: Tensor, dy: Tensor, x: Tensor, shape: Sequence[int], format: str, capacity: int
) -> Tensor:
    grad = _sddmm_fake(structure, dy, x, shape, format, capacity)
    compiled = _compiled(structure, shape, format)
    _check_capacity(grad, compiled)
    dy_at, x_at = dy.data_ptr(), x.data_ptr()
    _check_places(x, dy_at | x_at)
    compiled.plan.sample_at(
        _dtype_name(x),
        grad.data_ptr(),
        capacity,
        dy_at,
        dy.stride(),
        x_at,
        x.stride(),
        x.shape[0],
    )
    return grad


def _spmm_cpu(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    format: str,
) -> Tensor:
    y = multiply(SPMM, values, structure, x, bias, shape, format)
    return _spmm_long(values, structure, x, bias, shape, format) if y is None else y


def _spmm_act_cpu(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    format: str,
    activation: str,
) -> Tensor:
    code = activation_code(activation)
    y = multiply(SPMM, values, structure, x, bias, shape, format, code)
    if y is not None:
        return y
    return _spmm_act_long(values, structure, x, bias, shape, format, activation)


def _spmm_t_cpu(
    values: Tensor, structure: Tensor, dy: Tensor, shape: Sequence[int], format: str
) -> Tensor:
    dx = multiply(SPMM_T, values, structure, dy, None, shape, format)
    return _spmm_t_long(values, structure, dy, shape, format) if dx is None else dx


def _sddmm_cpu(
    structure: Tensor, dy: Tensor, x: Tensor, shape: Sequence[int], format: str, capacity: int
) -> Tensor:
    gradient = sample(structure, dy, x, shape, format, capacity)
    if gradient is not None:
        return gradient
    return _sddmm_long(structure, dy, x, shape, format, capacity)


def _spmm_fake(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    format: str,
    activation: str | None = None,
) -> Tensor:
    activation_code(activation)
    _check_weight(values, structure)
    _check_matrix("x", x, shape[1], values)
    _check_bias(bias, shape[0], values)
    _check_dtype("spmm", x)
    return x.new_empty((x.shape[0], shape[0]))


def _spmm_t_fake(
    values: Tensor, structure: Tensor, dy: Tensor, shape: Sequence[int], format: str
) -> Tensor:
    _check_weight(values, structure)
    _check_matrix("dy", dy, shape[0], values)
    _check_dtype("spmm_t", dy)
    return dy.new_empty((dy.shape[0], shape[1]))


def _sddmm_fake(
    structure: Tensor, dy: Tensor, x: Tensor, shape: Sequence[int], format: str, capacity: int
) -> Tensor:
    _check_matrix("dy", dy, shape[0], x)
    _check_matrix("x", x, shape[1], dy)
    if dy.shape[0] != x.shape[0]:
        raise format_error(
            f"dy with {dy.shape[0]} rows and x with {x.shape[0]}",
            "one batch size",
            "pass the x that this dy belongs to",
        )
    _check_dtype("sddmm", x)
    return x.new_empty((capacity,))


# --------------------------------------------------------------------------------- autograd


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
            dvalues = _sddmm(structure, dy, x, ctx.shape, ctx.format, ctx.capacity)
        if needs_x:
            dx = _spmm_t(values, structure, dy, ctx.shape, ctx.format)
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


def _activated(z: Tensor, activation: str) -> Tensor:
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
        z = _spmm(values, structure, x, bias, ctx.shape, ctx.format)
        dz = _activation_backward(dy, z, ctx.activation)
        if needs_values:
            dvalues = _sddmm(structure, dz, x, ctx.shape, ctx.format, ctx.capacity)
        if needs_x:
            dx = _spmm_t(values, structure, dz, ctx.shape, ctx.format)
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
            dvalues = _sddmm(structure, dy, ddx, ctx.shape, ctx.format, ctx.capacity)
        if needs_dy:
            ddy = _spmm(values, structure, ddx, None, ctx.shape, ctx.format)
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
            ddy = _spmm(weights, structure, x, None, ctx.shape, ctx.format)
        if needs_x:
            dx = _spmm_t(weights, structure, dy, ctx.shape, ctx.format)
    return (
        None,
        None if ddy is None else _once(ddy, dvalues, x),
        None if dx is None else _once(dx, dvalues, dy),
        None,
        None,
        None,
    )


# ---------------------------------------------------------------------------------- eager


_recorded_spmm = recorded(_spmm_cpu, _spmm_context, _spmm_backward)
_recorded_spmm_t = recorded(_spmm_t_cpu, _spmm_t_context, _spmm_t_backward)
_recorded_sddmm = recorded(_sddmm_cpu, _sddmm_context, _sddmm_backward)


def _spmm(
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
            compute = _recorded_spmm if recording else _spmm_long
            return compute(values, structure, x, bias, shape, format)
    _check_devices("spmm", values, structure, x, values if bias is None else bias)
    return _call(_spmm_op, values, structure, x, bias, shape, format)


def _spmm_act(
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
            return _spmm_act_long(values, structure, x, bias, shape, format, activation)
    _check_devices("spmm_act", values, structure, x, values if bias is None else bias)
    return _call(_spmm_act_op, values, structure, x, bias, shape, format, activation)


def _spmm_t(
    values: Tensor, structure: Tensor, dy: Tensor, shape: Sequence[int], format: str
) -> Tensor:
    if is_unobserved():
        recording = records(values, dy)
        if not recording:
            dx = multiply(SPMM_T, values, structure, dy, None, shape, format)
            if dx is not None:
                return dx
        if is_ordinary(values, structure, dy):
            compute = _recorded_spmm_t if recording else _spmm_t_long
            return compute(values, structure, dy, shape, format)
    _check_devices("spmm_t", values, structure, dy)
    return _call(_spmm_t_op, values, structure, dy, shape, format)


def _sddmm(
    structure: Tensor, dy: Tensor, x: Tensor, shape: Sequence[int], format: str, capacity: int
) -> Tensor:
    if is_unobserved():
        recording = records(dy, x)
        if not recording:
            gradient = sample(structure, dy, x, shape, format, capacity)
            if gradient is not None:
                return gradient
        if is_ordinary(structure, dy, x):
            compute = _recorded_sddmm if recording else _sddmm_long
            return compute(structure, dy, x, shape, format, capacity)
    _check_devices("sddmm", structure, dy, x)
    return _call(_sddmm_op, structure, dy, x, shape, format, capacity)


# ----------------------------------------------------------------------------- registration


def _register(schema: str, cpu: Any, fake: Any, backward: Any, context: Any) -> Any:
    """Define one operator: schema, CPU kernel, fake kernel, autograd, autocast to float32."""
    # pt2_compliant: checked by opcheck in the tests; needs no graph break.
    tags = [torch.Tag.pt2_compliant_tag]
    _library.define(f"{schema} -> Tensor", tags=tags)  # type: ignore[no-untyped-call]
    name = schema.partition("(")[0]
    qualified = f"spfmt::{name}"
    torch.library.impl(qualified, "cpu", cpu, lib=_library)
    torch.library.register_fake(qualified, _traced(fake), lib=_library)
    torch.library.register_autograd(qualified, backward, setup_context=context, lib=_library)
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(qualified, device, torch.float32, lib=_library)
    return getattr(torch.ops.spfmt, name).default


def _traced(fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a fake kernel that first makes sure that Inductor knows how to call the real one."""

    @functools.wraps(fake)
    def kernel(*operands: Any) -> Tensor:
        lower_products()
        return fake(*operands)

    return kernel


_spmm_op = _register(
    "spmm(Tensor values, Tensor structure, Tensor x, Tensor? bias, int[] shape, str format)",
    _spmm_cpu,
    _spmm_fake,
    _spmm_backward,
    _spmm_context,
)
_spmm_act_op = _register(
    "spmm_act(Tensor values, Tensor structure, Tensor x, Tensor? bias, int[] shape, str format, "
    "str activation)",
    _spmm_act_cpu,
    _spmm_fake,
    _spmm_act_backward,
    _spmm_act_context,
)
_spmm_t_op = _register(
    "spmm_t(Tensor values, Tensor structure, Tensor dy, int[] shape, str format)",
    _spmm_t_cpu,
    _spmm_t_fake,
    _spmm_t_backward,
    _spmm_t_context,
)
_sddmm_op = _register(
    "sddmm(Tensor structure, Tensor dy, Tensor x, int[] shape, str format, SymInt capacity)",
    _sddmm_cpu,
    _sddmm_fake,
    _sddmm_backward,
    _sddmm_context,
)

_autocast_announced = False


def _announce_autocast() -> None:
    """Say once that autocast does not lower the precision of sparse products."""
    global _autocast_announced
    if _autocast_announced or torch.compiler.is_compiling() or not torch.is_autocast_enabled("cpu"):
        return
    _autocast_announced = True
    _log.warning(
        "autocast: sparse products compute in float32 and return float32; "
        "there are no low-precision kernels yet"
    )


def _refuse_forward_mode(operands: Sequence[Any]) -> None:
    """Raise where an operand carries a tangent; operators of Python would drop it in silence."""
    tensors = (t for t in operands if isinstance(t, Tensor) and t.is_floating_point())
    unpack = forward_ad.unpack_dual
    if any(unpack(t).tangent is not None for t in tensors):  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "got forward-mode differentiation (jvp) of a sparse product; expected reverse mode "
            "(backward); call densify(model) for forward mode"
        )


def _call(op: Any, *operands: Any) -> Tensor:
    """Call an operator, past its autograd kernel where nothing can be recorded.

    That kernel is Python and costs 4 µs, a quarter of a batch-1 product.
    """
    if torch.compiler.is_compiling():
        return cast(Tensor, op(*operands))
    if forward_ad._current_level >= 0:
        _refuse_forward_mode(operands)
    if torch.is_grad_enabled():
        return cast(Tensor, op(*operands))
    with torch._C._AutoDispatchBelowAutograd():
        return cast(Tensor, op(*operands))


# ------------------------------------------------------------------------- public functions


def spmm(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int],
    format: str,
    activation: str | None = None,
) -> Tensor:
    """Multiply a batch by a sparse weight: ``y = f(x @ A.T + bias)``.

    Parameters
    ----------
    values : Tensor, shape (capacity,), float32 or float64
        The weight's values; the first ``nnz`` are in use.
    structure : Tensor, shape (n_words,), int32
        Structure words of the weight (:func:`spfmt.formats.encode`).
    x : Tensor, shape (B, C)
        Inputs, any strides, dtype of `values`; ``B`` may be zero.
    bias : Tensor, shape (R,), optional
        Added to every row of the result.
    shape : (int, int)
        (R, C), the shape of the weight.
    format : str
        The format's name, for instance ``"condensed"``.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        f. Where no gradient is recorded the kernel applies it to its result; where one is, torch's
        own operator follows, whose input has to be kept anyway.

    Returns
    -------
    Tensor, shape (B, R)

    Raises
    ------
    FormatError
        Where shapes, dtypes or devices do not fit together, the structure is corrupt, or no
        activation has the name.
    KernelNotFound
        Where no kernel exists for the dtype or the device.
    """
    if activation is None:
        return _spmm(values, structure, x, bias, shape, format)
    activation_code(activation)
    if torch.is_grad_enabled() and requires_grad(values, x, bias):
        return _activated(_spmm(values, structure, x, bias, shape, format), activation)
    return _spmm_act(values, structure, x, bias, shape, format, activation)


def spmm_t(
    values: Tensor, structure: Tensor, dy: Tensor, *, shape: Sequence[int], format: str
) -> Tensor:
    """Multiply a batch by the transposed weight: ``dx = dy @ A``.

    Parameters
    ----------
    values, structure, shape, format
        The weight, as for :func:`spmm`.
    dy : Tensor, shape (B, R)
        Gradients of the outputs, any strides.

    Returns
    -------
    Tensor, shape (B, C)

    Raises
    ------
    FormatError, KernelNotFound
        As for :func:`spmm`.
    """
    return _spmm_t(values, structure, dy, shape, format)


def sddmm(
    structure: Tensor,
    dy: Tensor,
    x: Tensor,
    *,
    shape: Sequence[int],
    format: str,
    capacity: int,
) -> Tensor:
    """Compute the entries of ``dy.T @ x`` that a structure stores: the gradient of its values.

    Parameters
    ----------
    structure, shape, format
        The structure, as for :func:`spmm`.
    dy : Tensor, shape (B, R)
        Gradients of the outputs, any strides.
    x : Tensor, shape (B, C)
        Inputs, any strides.
    capacity : int
        Length of the result, at least the structure's nnz; what lies behind nnz is zero.

    Returns
    -------
    Tensor, shape (capacity,)

    Raises
    ------
    FormatError, KernelNotFound
        As for :func:`spmm`.
    """
    return _sddmm(structure, dy, x, shape, format, capacity)
