"""The three products as torch operators: ``spfmt::spmm``, ``spfmt::spmm_t``, ``spfmt::sddmm``.

A sparse weight is two tensors here: ``values``, flat and floating, and ``structure``, an int32
buffer of self-describing words (see :func:`spfmt.formats.encode`). Of the two only ``values`` is
differentiable, so autograd, ``torch.compile`` and ``torch.export`` see plain tensors.

========  =============================  ========================================
operator  computes                       gradients (each only when asked for)
========  =============================  ========================================
spmm      ``y = f(x @ A.T + bias)``      ``x``: spmm_t, ``values``: sddmm, ``bias``: sum
spmm_t    ``dx = dy @ A``                ``dy``: spmm, ``values``: sddmm
sddmm     ``(dy.T @ x)`` at the places   ``dy``: spmm, ``x``: spmm_t
========  =============================  ========================================

Gradients are differentiable once: differentiating a gradient again raises a ``RuntimeError``, and
so does forward mode (``jvp``). ``torch.func.vmap`` and vectorized Jacobians work,
``torch.func.grad`` does not: torch keeps it from operators whose gradients are written in Python,
and says so.

On the CPU there are kernels for float32 and float64: under ``torch.autocast`` the operators
compute in float32 and return autocast's dtype, and low-precision tensors outside it raise
:class:`spfmt.KernelNotFound`. On CUDA devices there are kernels for float32, bfloat16 and float16,
and autocast computes in its dtype. Both leave float64 alone under it, as ``nn.Linear`` does.

Products are called at once where nothing looks into a call, past torch's dispatcher, which costs
ten times a small product. It serves everything that looks into, changes or records calls:
compilation, export, tracing, modes, subclasses, functorch, autocast, forward mode, profilers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from spfmt.activations import activation_code
from spfmt.errors import format_error
from spfmt.torch import checks, cpu, cuda
from spfmt.torch._compiled import lower_products
from spfmt.torch.activation import activated, activation_backward
from spfmt.torch.values import SPMM, SPMM_T, multiply, sample

__all__ = ["sddmm", "spmm", "spmm_t"]

_library = torch.library.Library("spfmt", "FRAGMENT")  # type: ignore[no-untyped-call]

# ----------------------------------------------------------------------------------- operators


def _traced(fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a fake kernel that first makes sure that Inductor knows how to call the real one."""

    @functools.wraps(fake)
    def kernel(*operands: Any) -> Tensor:
        lower_products()
        return fake(*operands)

    return kernel


def _autocast(op: Any, device: str) -> Callable[..., Tensor]:
    """Return an operator's kernel under autocast: in its dtype, or on the CPU in float32 inside."""

    def kernel(*operands: Any) -> Tensor:
        result = torch.get_autocast_dtype(device)
        inside = torch.float32 if device == "cpu" else result  # where there is no narrower kernel

        def cast_to_inside(t: Any) -> Any:
            return t.to(inside) if isinstance(t, Tensor) and t.is_floating_point() else t

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_autocast_key(device))):
            if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in operands):
                return cast(Tensor, op(*operands))  # double stays so, as in torch's own operators
            return cast(Tensor, op(*map(cast_to_inside, operands)).to(result))

    return kernel


def _autocast_key(device: str) -> Any:
    key = torch._C.DispatchKey
    return key.AutocastCPU if device == "cpu" else key.AutocastCUDA


def _define(
    schema: str,
    compute: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    on_cuda: Callable[..., Tensor],
) -> Any:
    """Define one operator: schema, kernels of the CPU and of CUDA, fake kernel, autocast."""
    # pt2_compliant: checked by opcheck in the tests; needs no graph break.
    tags = [torch.Tag.pt2_compliant_tag]
    _library.define(f"{schema} -> Tensor", tags=tags)  # type: ignore[no-untyped-call]
    name = schema.partition("(")[0]
    qualified = f"spfmt::{name}"
    torch.library.impl(qualified, "cpu", compute, lib=_library)
    torch.library.impl(qualified, "cuda", on_cuda, lib=_library)
    torch.library.register_fake(qualified, _traced(fake), lib=_library)
    op = getattr(torch.ops.spfmt, name).default
    for device in ("cpu", "cuda"):
        key = str(_autocast_key(device)).rpartition(".")[2]
        _library.impl(name, _autocast(op, device), key)  # type: ignore[no-untyped-call]
    return op


_WEIGHT = "Tensor values, Tensor structure"
_spmm_op = _define(
    f"spmm({_WEIGHT}, Tensor x, Tensor? bias, int[] shape, str? activation=None)",
    cpu.spmm_cpu,
    checks.spmm_fake,
    cuda.spmm_cuda,
)
_spmm_t_op = _define(
    f"spmm_t({_WEIGHT}, Tensor dy, int[] shape)",
    cpu.spmm_t_cpu,
    checks.spmm_t_fake,
    cuda.spmm_t_cuda,
)
_sddmm_op = _define(
    "sddmm(Tensor structure, Tensor dy, Tensor x, int[] shape, SymInt capacity)",
    cpu.sddmm_cpu,
    checks.sddmm_fake,
    cuda.sddmm_cuda,
)

# ----------------------------------------------------------------------------------- gradients


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
    values, structure, x, bias, shape, activation = inputs
    needs_values, _, needs_x, *_ = ctx.needs_input_grad
    ctx.shape, ctx.activation, ctx.capacity = shape, activation, values.shape[0]
    if activation is None:
        # x is the large one: keep it alive only when the gradient of the values will ask for it.
        values, x, bias = values if needs_x else None, x if needs_values else None, None
    ctx.save_for_backward(values, structure, x, bias)


def _spmm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    values, structure, x, bias = ctx.saved_tensors
    needs_values, _, needs_x, needs_bias, *_ = ctx.needs_input_grad
    dvalues = dx = dbias = None
    with torch.no_grad():
        dz = dy
        if ctx.activation is not None:  # the activation's input was not kept
            z = _spmm(values, structure, x, bias, ctx.shape, written=needs_values)
            dz = activation_backward(dy, z, ctx.activation)
        if needs_values:
            dvalues = _sddmm(structure, dz, x, ctx.shape, ctx.capacity)
        if needs_x:
            dx = _spmm_t(values, structure, dz, ctx.shape, written=needs_values)
        if needs_bias:
            dbias = dz.sum(0)
    sources = [t for t in (dy, values, x, bias) if t is not None]
    once = [None if g is None else _once(g, *sources) for g in (dvalues, dx, dbias)]
    return once[0], None, once[1], once[2], None, None


def _spmm_t_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, structure, dy, shape = inputs
    needs_values, _, needs_dy, *_ = ctx.needs_input_grad
    ctx.shape, ctx.capacity = shape, values.shape[0]
    ctx.save_for_backward(values if needs_dy else None, structure, dy if needs_values else None)


def _spmm_t_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    values, structure, dy = ctx.saved_tensors
    needs_values, _, needs_dy, *_ = ctx.needs_input_grad
    dvalues = ddy = None
    with torch.no_grad():
        if needs_values:
            dvalues = _sddmm(structure, dy, ddx, ctx.shape, ctx.capacity)
        if needs_dy:
            ddy = _spmm(values, structure, ddx, None, ctx.shape, written=needs_values)
    return (
        None if dvalues is None else _once(dvalues, ddx, dy),
        None,
        None if ddy is None else _once(ddy, ddx, values),
        None,
    )


def _sddmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    structure, dy, x, shape, _ = inputs
    _, needs_dy, needs_x, *_ = ctx.needs_input_grad
    ctx.shape = shape
    ctx.save_for_backward(structure, dy if needs_x else None, x if needs_dy else None)


def _sddmm_backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    structure, dy, x = ctx.saved_tensors
    _, needs_dy, needs_x, *_ = ctx.needs_input_grad
    ddy = dx = None
    with torch.no_grad():
        weights = dvalues.contiguous()
        if needs_dy:
            ddy = _spmm(weights, structure, x, None, ctx.shape, written=True)
        if needs_x:
            dx = _spmm_t(weights, structure, dy, ctx.shape, written=True)
    return (
        None,
        None if ddy is None else _once(ddy, dvalues, x),
        None if dx is None else _once(dx, dvalues, dy),
        None,
        None,
    )


torch.library.register_autograd(_spmm_op, _spmm_backward, setup_context=_spmm_context, lib=_library)
torch.library.register_autograd(
    _spmm_t_op, _spmm_t_backward, setup_context=_spmm_t_context, lib=_library
)
torch.library.register_autograd(
    _sddmm_op, _sddmm_backward, setup_context=_sddmm_context, lib=_library
)

# -------------------------------------------------------------------------------- vmap and FLOPs


def _each(op: Any, info: Any, dims: tuple[Any, ...], *operands: Any) -> tuple[Tensor, int]:
    """Call an operator once for every element of the mapped dimension."""
    pairs = [(t, d if isinstance(t, Tensor) else None) for t, d in zip(operands, dims, strict=True)]
    results = [
        op(*(t if d is None else t.select(d, i) for t, d in pairs)) for i in range(info.batch_size)
    ]
    return torch.stack(results), 0


def _folded(
    op: Any, info: Any, dims: tuple[Any, ...], weight: tuple[Tensor, Tensor], x: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    """Call an operator once, the mapped dimension of its operand folded into the batch.

    Where each element has a weight or bias of its own, it is called for each.
    """
    others = (*weight, *rest), (*dims[:2], *dims[3:])
    if any(isinstance(t, Tensor) and d is not None for t, d in zip(*others, strict=True)):
        return _each(op, info, dims, *weight, x, *rest)
    x = x.movedim(dims[2], 0)
    y = op(*weight, x.flatten(0, 1), *rest)
    return y.unflatten(0, x.shape[:2]), 0


def _spmm_vmap(
    info: Any, dims: Any, values: Any, structure: Any, x: Any, *rest: Any
) -> tuple[Tensor, int]:
    return _folded(_spmm_op, info, dims, (values, structure), x, *rest)


def _spmm_t_vmap(
    info: Any, dims: Any, values: Any, structure: Any, dy: Any, shape: Any
) -> tuple[Tensor, int]:
    return _folded(_spmm_t_op, info, dims, (values, structure), dy, shape)


def _sddmm_vmap(info: Any, dims: Any, *operands: Any) -> tuple[Tensor, int]:
    return _each(_sddmm_op, info, dims, *operands)


torch.library.register_vmap(_spmm_op, _spmm_vmap, lib=_library)
torch.library.register_vmap(_spmm_t_op, _spmm_t_vmap, lib=_library)
torch.library.register_vmap(_sddmm_op, _sddmm_vmap, lib=_library)


@register_flop_formula([_spmm_op.overloadpacket, _spmm_t_op.overloadpacket])
def _product_flops(values: Any, structure: Any, x: Any, *rest: Any, **_: Any) -> int:
    """Two operations per stored weight and sample."""
    return int(2 * math.prod(values) * x[0])


@register_flop_formula(_sddmm_op.overloadpacket)
def _sddmm_flops(
    structure: Any, dy: Any, x: Any, shape: Any, capacity: int, *rest: Any, **_: Any
) -> int:
    return 2 * capacity * int(x[0])


# ---------------------------------------------------------------------------- past the dispatcher

_PLAIN = (Tensor, nn.Parameter)
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_profiled = torch._C._autograd._profiler_enabled
_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD = torch._C.DispatchKey.AutogradCPU


def _is_unobserved() -> bool:
    """Tell whether nothing but autograd looks into calls of operators or changes them."""
    return not (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _functorch_active()
        or _tracing_state() is not None
        or _profiled()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


def _is_ordinary(*operands: Tensor | None) -> bool:
    """Tell whether every operand is a tensor in the CPU's memory and nothing else."""
    for t in operands:
        if t is None:
            continue
        # Exact types: a subclass may redefine operators. A lazily negated view has other memory.
        plain = type(t) in _PLAIN and t.is_cpu and t.layout is torch.strided and not t.is_neg()
        if not plain or is_legacy_batchedtensor(t) or (t.data_ptr() == 0 and t.numel()):
            return False  # the last are torch's zero tensors
    return True


def _requires_grad(*operands: Tensor | None) -> bool:
    """Tell whether any of `operands` wants a gradient."""
    for t in operands:  # noqa: SIM110 (a generator costs more than the loop)
        if t is not None and t.requires_grad:
            return True
    return False


def _records(*operands: Tensor | None) -> bool:
    """Tell whether autograd would record a product of `operands`."""
    wanted = torch.is_grad_enabled() and _requires_grad(*operands)
    return wanted and not _excluded(_AUTOGRAD)  # excluded inside the kernel of another operator


def _recorded(
    compute: Callable[..., Tensor],
    context: Callable[[Any, Any, Any], None],
    backward: Callable[[Any, Tensor], Any],
) -> Callable[..., Tensor]:
    """Return a product that autograd records without the dispatcher, from an operator's parts."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            result = compute(*inputs)
            context(ctx, inputs, result)
            return result

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return backward(ctx, gradient)

    return cast(Callable[..., Tensor], Recorded.apply)


def _trained(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a product that knows: what autograd records for values is written before the next."""
    return lambda values, *rest: compute(values, *rest, written=values.requires_grad)


_recorded_spmm = _recorded(_trained(cpu.spmm_cpu), _spmm_context, _spmm_backward)
_recorded_spmm_t = _recorded(_trained(cpu.spmm_t_cpu), _spmm_t_context, _spmm_t_backward)
_recorded_sddmm = _recorded(cpu.sddmm_cpu, _sddmm_context, _sddmm_backward)


def _refuse_forward_mode(operands: Sequence[Any]) -> None:
    """Raise where an operand carries a tangent; operators of Python would drop it in silence."""
    tensors = (t for t in operands if isinstance(t, Tensor) and t.is_floating_point())
    unpack = forward_ad.unpack_dual
    if any(unpack(t).tangent is not None for t in tensors):  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "got forward-mode differentiation (jvp) of a sparse product; expected reverse mode "
            "(backward); call densify(model) for forward mode"
        )


def _dispatched(op: Any, *operands: Any) -> Tensor:
    """Call an operator by way of torch's dispatcher."""
    if not torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            _refuse_forward_mode(operands)
        _check_devices(op, *(t for t in operands if isinstance(t, Tensor)))
    return cast(Tensor, op(*operands))


def _check_devices(op: Any, *tensors: Tensor) -> None:
    """Check that all tensors lie on one device that has kernels (or on meta, which needs none)."""
    device, name = tensors[0].device, op._schema.name.partition("::")[2]
    for t in tensors:
        if t.device != device:
            places = ", ".join(str(t.device) for t in tensors)
            raise format_error(
                f"tensors on {places} for {name}",
                "one device",
                "move the input or the module with .to()",
            )
    checks.check_device(name, device)


def _spmm(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    activation: str | None = None,
    written: bool = False,
) -> Tensor:
    if _is_unobserved():
        recording = _records(values, x, bias)
        if not recording:
            code = activation_code(activation)
            y = multiply(SPMM, values, structure, x, bias, shape, code, written=written)
            if y is not None:
                return y
        if _is_ordinary(values, structure, x, bias):
            if recording:
                return _recorded_spmm(values, structure, x, bias, shape, activation)
            return cpu.spmm_cpu(values, structure, x, bias, shape, activation, written)
    return _dispatched(_spmm_op, values, structure, x, bias, shape, activation)


def _spmm_t(
    values: Tensor, structure: Tensor, dy: Tensor, shape: Sequence[int], written: bool = False
) -> Tensor:
    if _is_unobserved():
        recording = _records(values, dy)
        if not recording:
            dx = multiply(SPMM_T, values, structure, dy, None, shape, written=written)
            if dx is not None:
                return dx
        if _is_ordinary(values, structure, dy):
            if recording:
                return _recorded_spmm_t(values, structure, dy, shape)
            return cpu.spmm_t_cpu(values, structure, dy, shape, written)
    return _dispatched(_spmm_t_op, values, structure, dy, shape)


def _sddmm(structure: Tensor, dy: Tensor, x: Tensor, shape: Sequence[int], capacity: int) -> Tensor:
    if _is_unobserved():
        recording = _records(dy, x)
        if not recording:
            gradient = sample(structure, dy, x, shape, capacity)
            if gradient is not None:
                return gradient
        if _is_ordinary(structure, dy, x):
            compute = _recorded_sddmm if recording else cpu.sddmm_cpu
            return compute(structure, dy, x, shape, capacity)
    return _dispatched(_sddmm_op, structure, dy, x, shape, capacity)


# -------------------------------------------------------------------------------------- public


def spmm(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int],
    activation: str | None = None,
) -> Tensor:
    """Multiply a batch by a sparse weight: ``y = f(x @ A.T + bias)``.

    Parameters
    ----------
    values : Tensor, shape (capacity,)
        The weight's values; the first ``nnz`` are in use. float32 or float64 on the CPU; float32,
        bfloat16 or float16 on a CUDA device.
    structure : Tensor, shape (n_words,), int32
        Structure words of the weight, which describe themselves (:func:`spfmt.formats.encode`).
    x : Tensor, shape (B, C)
        Inputs, any strides, dtype of `values`; ``B`` may be zero.
    bias : Tensor, shape (R,), optional
        Added to every row of the result.
    shape : (int, int)
        (R, C), the shape of the weight.
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
        Where no kernel exists for the dtype or the device, or no kernels for CUDA were built.
    DeviceError
        Where a CUDA device fails; also where a graph is captured that needs a structure which this
        device has not seen yet.
    """
    activation_code(activation)
    recording = torch.is_grad_enabled() and _requires_grad(values, x, bias)
    if activation is None or not recording:
        return _spmm(values, structure, x, bias, shape, activation)
    return activated(_spmm(values, structure, x, bias, shape), activation)


def spmm_t(values: Tensor, structure: Tensor, dy: Tensor, *, shape: Sequence[int]) -> Tensor:
    """Multiply a batch by the transposed weight: ``dx = dy @ A``.

    Parameters
    ----------
    values, structure, shape
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
    return _spmm_t(values, structure, dy, shape)


def sddmm(
    structure: Tensor,
    dy: Tensor,
    x: Tensor,
    *,
    shape: Sequence[int],
    capacity: int,
) -> Tensor:
    """Compute the entries of ``dy.T @ x`` that a structure stores: the gradient of its values.

    Parameters
    ----------
    structure, shape
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
    return _sddmm(structure, dy, x, shape, capacity)
