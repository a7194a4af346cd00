"""When a product may run at once, past torch's dispatcher, which costs ten times a small product.

The dispatcher serves everything that looks into, changes or records a call: compilation, export,
tracing, modes, subclasses, functorch, autocast, forward mode, profilers. Where none of them is
there and all operands are ordinary strided CPU tensors, calling the product is all it would do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["is_ordinary", "is_unobserved", "recorded", "records", "requires_grad"]

_PLAIN = (Tensor, nn.Parameter)
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
_profiled = torch._C._autograd._profiler_enabled
_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_AUTOGRAD = torch._C.DispatchKey.AutogradCPU


def is_unobserved() -> bool:
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


def is_ordinary(*operands: Tensor | None) -> bool:
    """Tell whether every operand is a tensor in the CPU's memory and nothing else."""
    for t in operands:
        if t is None:
            continue
        # Exact types: a subclass may redefine operators. A lazily negated view has other memory.
        plain = type(t) in _PLAIN and t.is_cpu and t.layout is torch.strided and not t.is_neg()
        if not plain or (t.data_ptr() == 0 and t.numel()):  # the latter: torch's zero tensors
            return False
    return True


def requires_grad(*operands: Tensor | None) -> bool:
    """Tell whether any of `operands` wants a gradient."""
    for t in operands:  # noqa: SIM110 (a generator costs more than the loop)
        if t is not None and t.requires_grad:
            return True
    return False


def records(*operands: Tensor | None) -> bool:
    """Tell whether autograd would record a product of `operands`."""
    wanted = torch.is_grad_enabled() and requires_grad(*operands)
    return wanted and not _excluded(_AUTOGRAD)  # excluded inside the kernel of another operator


def recorded(
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
