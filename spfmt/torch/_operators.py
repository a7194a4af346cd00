"""``torch.ops.spfmt``: the operators without their gradients, and how they are called."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spfmt.errors import KernelNotFound, format_error
from spfmt.torch import _cpu
from spfmt.torch._compiled import lower_products

__all__ = ["call", "check_devices", "register_autograd", "sddmm", "spmm", "spmm_act", "spmm_t"]

_log = logging.getLogger("spfmt.torch")
_library = torch.library.Library("spfmt", "FRAGMENT")  # type: ignore[no-untyped-call]


def _traced(fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a fake kernel that first makes sure that Inductor knows how to call the real one."""

    @functools.wraps(fake)
    def kernel(*operands: Any) -> Tensor:
        lower_products()
        return fake(*operands)

    return kernel


def _define(schema: str, cpu: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    """Define one operator: schema, CPU kernel, fake kernel, autocast to float32."""
    # pt2_compliant: checked by opcheck in the tests; needs no graph break.
    tags = [torch.Tag.pt2_compliant_tag]
    _library.define(f"{schema} -> Tensor", tags=tags)  # type: ignore[no-untyped-call]
    name = schema.partition("(")[0]
    qualified = f"spfmt::{name}"
    torch.library.impl(qualified, "cpu", cpu, lib=_library)
    torch.library.register_fake(qualified, _traced(fake), lib=_library)
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(qualified, device, torch.float32, lib=_library)
    return getattr(torch.ops.spfmt, name).default


spmm = _define(
    "spmm(Tensor values, Tensor structure, Tensor x, Tensor? bias, int[] shape, str format)",
    _cpu.spmm_cpu,
    _cpu.spmm_fake,
)
spmm_act = _define(
    "spmm_act(Tensor values, Tensor structure, Tensor x, Tensor? bias, int[] shape, str format, "
    "str activation)",
    _cpu.spmm_act_cpu,
    _cpu.spmm_fake,
)
spmm_t = _define(
    "spmm_t(Tensor values, Tensor structure, Tensor dy, int[] shape, str format)",
    _cpu.spmm_t_cpu,
    _cpu.spmm_t_fake,
)
sddmm = _define(
    "sddmm(Tensor structure, Tensor dy, Tensor x, int[] shape, str format, SymInt capacity)",
    _cpu.sddmm_cpu,
    _cpu.sddmm_fake,
)


def register_autograd(
    op: Any,
    context: Callable[[Any, Any, Any], None],
    backward: Callable[[Any, Tensor], Any],
) -> None:
    """Give an operator its gradients."""
    torch.library.register_autograd(op, backward, setup_context=context, lib=_library)


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


def call(op: Any, *operands: Any) -> Tensor:
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


def check_devices(op: str, *tensors: Tensor) -> None:
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
