"""How Inductor writes products into the modules that it generates.

Left alone, it writes ``torch.ops.spfmt.spmm.default(...)``. Each such call looks through a schema,
passes the autograd key, comes back to Python and allocates: a small product's time ten times over.
With these lowerings it writes a call of a function in :mod:`spfmt.torch._compiled` instead, the way
it calls its own dense products: into a buffer that it has planned and reuses between layers.

Importing this module registers them. It imports Inductor, which takes seconds, and names that
Inductor does not promise to keep: :func:`spfmt.torch._compiled.lower_products` knows when to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.virtualized import V

from spfmt.torch import _compiled

__all__: list[str] = []


class _Product(ir.ExternKernelOut):
    """A call of a function of `_compiled`, which the generated module has to import first."""

    def codegen(self, wrapper: Any) -> None:
        wrapper.add_import_once(f"from {_compiled.__name__} import {self.python_kernel_name}")
        super().codegen(wrapper)


def _call(
    function: Callable[..., None],
    operands: Sequence[Any],
    size: Sequence[Any],
    **constants: Any,
) -> Any:
    """Let `function` compute a contiguous buffer of this size from operands of any strides."""
    like = operands[-1]
    call = _Product(
        layout=ir.FixedLayout(like.get_device(), like.get_dtype(), list(size)),
        inputs=[ir.ExternKernel.realize_input(t) for t in operands],
        kwargs=constants,
        python_kernel_name=function.__name__,
    )
    return ir.TensorBox.create(call)


def _register(op: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Lower `op` with a function, except where generated code cannot call functions of Python."""
    dispatched = fallback_handler(op, add_to_fallback_set=False)  # type: ignore[no-untyped-call]

    def decorate(direct: Callable[..., Any]) -> Callable[..., Any]:
        def lowered(*operands: Any, **options: Any) -> Any:
            devices = {t.get_device().type for t in operands if hasattr(t, "get_device")}
            called_from_python = devices == {"cpu"} and not V.graph.cpp_wrapper
            return (direct if called_from_python else dispatched)(*operands, **options)

        register_lowering(op, type_promotion_kind=None)(lowered)
        return direct

    return decorate


@_register(torch.ops.spfmt.spmm.default)
def _spmm(
    values: Any,
    structure: Any,
    x: Any,
    bias: Any,
    shape: Sequence[int],
    activation: str | None = None,
) -> Any:
    operands = [values, structure, x] if bias is None else [values, structure, x, bias]
    constants = {"shape": tuple(shape), "activation": activation}
    size = x.get_size()[0], shape[0]
    return _call(_compiled.spmm_into_v1, operands, size, **constants)


@_register(torch.ops.spfmt.spmm_t.default)
def _spmm_t(values: Any, structure: Any, dy: Any, shape: Sequence[int]) -> Any:
    size, constants = (dy.get_size()[0], shape[1]), {"shape": tuple(shape)}
    operands = [values, structure, dy]
    return _call(_compiled.spmm_t_into_v1, operands, size, **constants)


@_register(torch.ops.spfmt.sddmm.default)
def _sddmm(structure: Any, dy: Any, x: Any, shape: Sequence[int], capacity: Any) -> Any:
    constants = {"shape": tuple(shape)}
    operands = [structure, dy, x]
    return _call(_compiled.sddmm_into_v1, operands, (capacity,), **constants)
