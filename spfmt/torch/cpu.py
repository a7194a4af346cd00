"""The operators on the CPU, and on no device: what they check, compute, and promise of results.

Of every operator there are two functions. ``*_fake`` checks the operands and returns an empty
result, which is all that a trace needs. ``*_cpu`` computes: in one compiled call where the operands
are plain, and else by way of numpy, which makes them plain or says what is wrong with them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from spfmt.activations import activation_code
from spfmt.dispatch import Plan
from spfmt.errors import KernelNotFound, format_error
from spfmt.formats import Structure
from spfmt.torch.values import (
    SPMM,
    SPMM_T,
    WRITTEN,
    CompiledStructure,
    compiled_structure,
    multiply,
    sample,
)

__all__ = [
    "array",
    "check_bias",
    "check_capacity",
    "check_device",
    "check_dtype",
    "check_memory",
    "check_structure",
    "check_weight",
    "plan_of",
    "sddmm_cpu",
    "sddmm_fake",
    "spmm_cpu",
    "spmm_fake",
    "spmm_t_cpu",
    "spmm_t_fake",
]

_ON_CPU = (torch.float32, torch.float64)
_ON_CUDA = (torch.float32, torch.bfloat16, torch.float16)
_OPS_ON_CUDA = ("spmm", "spmm_t", "sddmm")

# ----------------------------------------------------------------------------- checks and fakes


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


def _check_shape(shape: Sequence[int]) -> None:
    """Check the shape of a weight before anything is allocated for it."""
    try:
        sizes = [operator.index(n) for n in shape]
    except TypeError:
        sizes = []
    if len(sizes) != 2 or not all(0 <= n < 2**31 for n in sizes):
        raise format_error(
            f"a weight of shape {shape!r}", "two ints, (R, C)", "pass the shape of its SparseLinear"
        )


def check_weight(values: Tensor, structure: Tensor) -> None:
    """Check that values and structure words are vectors."""
    if values.dim() != 1 or structure.dim() != 1 or structure.dtype != torch.int32:
        raise format_error(
            f"values of shape {tuple(values.shape)} and structure of shape "
            f"{tuple(structure.shape)} and dtype {structure.dtype}",
            "1-D values and 1-D int32 structure words",
            "take both from one SparseLinear",
        )


def check_device(op: str, device: torch.device) -> None:
    """Check that a device has kernels of an operator, or is meta, which needs none."""
    kind = device.type
    if kind in ("cpu", "meta") or (kind == "cuda" and op in _OPS_ON_CUDA):
        return
    exist = "cpu and cuda" if op in _OPS_ON_CUDA else "cpu"
    raise KernelNotFound(
        f"got {op} on {device}; kernels exist for {exist}; fix: move the module and its input "
        f"with .cpu(), or densify(model) to stay on {kind}"
    )


def check_dtype(op: str, x: Tensor, kind: str | None = None) -> None:
    """Check that an operator has kernels for a dtype on a kind of device: where `x` is."""
    kind = kind or x.device.type
    if kind == "cuda":
        check_device(op, torch.device(kind))
    if x.dtype in (_ON_CUDA if kind == "cuda" else _ON_CPU):
        return
    if kind == "cuda":
        raise KernelNotFound(
            f"got {op} of {x.dtype}; kernels exist for float32, bfloat16 and float16 on CUDA; fix: "
            "cast the module and its input with .float(), or move them with .cpu()"
        )
    raise KernelNotFound(
        f"got {op} of {x.dtype}; kernels exist for float32 and float64 on CPU; fix: cast the "
        f"module and its input with .float(), or use torch.autocast, which computes in float32"
    )


def check_bias(bias: Tensor | None, rows: int, like: Tensor) -> None:
    """Check that a bias has one number per row, in the dtype of `like`."""
    if bias is not None and (bias.shape != (rows,) or bias.dtype != like.dtype):
        raise format_error(
            f"bias of shape {tuple(bias.shape)} and dtype {bias.dtype}",
            f"({rows},) and {like.dtype}",
            "pass one bias per output feature, in the dtype of values",
        )


def spmm_fake(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    activation: str | None = None,
    kind: str | None = None,
) -> Tensor:
    """Check the operands of ``spmm`` and return an empty result; `kind` as for `check_dtype`."""
    activation_code(activation)
    _check_shape(shape)
    check_weight(values, structure)
    _check_matrix("x", x, shape[1], values)
    check_bias(bias, shape[0], values)
    check_dtype("spmm", x, kind)
    return x.new_empty((x.shape[0], shape[0]))


def spmm_t_fake(
    values: Tensor,
    structure: Tensor,
    dy: Tensor,
    shape: Sequence[int],
    kind: str | None = None,
) -> Tensor:
    """Check the operands of ``spmm_t`` and return an empty result."""
    _check_shape(shape)
    check_weight(values, structure)
    _check_matrix("dy", dy, shape[0], values)
    check_dtype("spmm_t", dy, kind)
    return dy.new_empty((dy.shape[0], shape[1]))


def sddmm_fake(
    structure: Tensor,
    dy: Tensor,
    x: Tensor,
    shape: Sequence[int],
    capacity: int,
    kind: str | None = None,
) -> Tensor:
    """Check the operands of ``sddmm`` and return an empty result."""
    _check_shape(shape)
    _check_matrix("dy", dy, shape[0], x)
    _check_matrix("x", x, shape[1], dy)
    if dy.shape[0] != x.shape[0]:
        raise format_error(
            f"dy with {dy.shape[0]} rows and x with {x.shape[0]}",
            "one batch size",
            "pass the x that this dy belongs to",
        )
    check_dtype("sddmm", x, kind)
    return x.new_empty((capacity,))


# ------------------------------------------------------------------------------------- the CPU


def _weight_of(structure: Tensor, shape: Sequence[int]) -> CompiledStructure:
    compiled = compiled_structure(structure.contiguous())
    check_structure(compiled.structure, shape)
    return compiled


def check_structure(found: Structure, shape: Sequence[int]) -> None:
    """Check that a structure is that of a weight's shape."""
    stored, wanted = found.shape, tuple(shape)
    if len(stored) != len(wanted):  # a convolution's weight is a matrix, too
        stored, wanted = found.matrix_shape, (shape[0], math.prod(shape[1:]))
    if stored != wanted:
        raise format_error(
            f"a structure of shape {stored}",
            f"shape {tuple(shape)}",
            "use the structure of the module that the values come from",
        )


def check_capacity(values: Tensor, nnz: int) -> None:
    """Check that there are as many values as positions, or more."""
    if values.numel() < nnz:
        raise format_error(
            f"{values.numel()} values",
            f"at least {nnz}",
            "use the structure of the module that the values come from",
        )


def check_memory(*tensors: Tensor | None) -> None:
    """Check that elements lie somewhere: a storage can be freed under its tensors."""
    if any(t is not None and t.numel() and t.data_ptr() == 0 for t in tensors):
        raise format_error(
            "a tensor whose storage has been freed",
            "elements in memory",
            "bring it back first; sharded modules free parameters between their passes",
        )


def plan_of(
    values: Tensor, structure: Tensor, shape: Sequence[int], *operands: Tensor | None
) -> Plan:
    """Return the plan of a structure that fits a weight's shape and values."""
    check_memory(values, structure, *operands)
    compiled = _weight_of(structure, shape)
    check_capacity(values, compiled.nnz)
    return compiled.plan


def array(t: Tensor) -> NDArray[Any]:
    """Return a tensor as an array on the same memory."""
    return t.detach().resolve_neg().numpy()


def spmm_cpu(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    activation: str | None = None,
    written: bool = False,
) -> Tensor:
    """Compute ``spmm``; `written` as for `multiply`."""
    code = activation_code(activation)
    y = multiply(SPMM, values, structure, x, bias, shape, code, written=written)
    if y is not None:
        return y
    y = spmm_fake(values, structure, x, bias, shape, activation)
    check_memory(values, structure, x, bias)
    compiled = _weight_of(structure, shape)
    check_capacity(values, compiled.nnz)
    compiled.plan.spmm(
        array(values),
        array(x),
        bias=None if bias is None else array(bias),
        activation=activation,
        batch_first=True,
        out=y.numpy(),
        constant=WRITTEN if written else None,
    )
    return y


def spmm_t_cpu(
    values: Tensor, structure: Tensor, dy: Tensor, shape: Sequence[int], written: bool = False
) -> Tensor:
    """Compute ``spmm_t``; `written` as for `multiply`."""
    dx = multiply(SPMM_T, values, structure, dy, None, shape, written=written)
    if dx is not None:
        return dx
    dx = spmm_t_fake(values, structure, dy, shape)
    check_memory(values, structure, dy)
    compiled = _weight_of(structure, shape)
    check_capacity(values, compiled.nnz)
    constant = WRITTEN if written else None
    out = dx.numpy()
    compiled.plan.spmm_t(array(values), array(dy), batch_first=True, out=out, constant=constant)
    return dx


def sddmm_cpu(
    structure: Tensor, dy: Tensor, x: Tensor, shape: Sequence[int], capacity: int
) -> Tensor:
    """Compute ``sddmm``."""
    found = sample(structure, dy, x, shape, capacity)
    if found is not None:
        return found
    gradient = sddmm_fake(structure, dy, x, shape, capacity)
    check_memory(structure, dy, x)
    compiled = _weight_of(structure, shape)
    check_capacity(gradient, compiled.nnz)
    compiled.plan.sddmm(array(dy), array(x), batch_first=True, out=gradient.numpy())
    return gradient
