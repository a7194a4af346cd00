"""The operators on the CPU, and on no device: what they check, compute, and promise of results.

Of every operator there are three functions. ``*_fake`` checks the operands and returns an empty
result, which is all that a trace needs. ``*_cpu`` computes, in one compiled call where the operands
are plain. ``*_long`` computes in Python what is not, or says what is wrong with it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from spfmt.activations import activation_code
from spfmt.errors import KernelNotFound, format_error
from spfmt.torch._direct import SPMM, SPMM_T, multiply, sample
from spfmt.torch._identity import CompiledStructure, compiled_structure

__all__ = [
    "sddmm_cpu", "sddmm_fake", "sddmm_long",
    "spmm_act_cpu", "spmm_act_long",
    "spmm_cpu", "spmm_fake", "spmm_long",
    "spmm_t_cpu", "spmm_t_fake", "spmm_t_long",
]  # fmt: skip

_COMPUTE_DTYPES = (torch.float32, torch.float64)

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


def spmm_fake(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    format: str,
    activation: str | None = None,
) -> Tensor:
    activation_code(activation)
    _check_shape(shape)
    _check_weight(values, structure)
    _check_matrix("x", x, shape[1], values)
    _check_bias(bias, shape[0], values)
    _check_dtype("spmm", x)
    return x.new_empty((x.shape[0], shape[0]))


def spmm_t_fake(
    values: Tensor, structure: Tensor, dy: Tensor, shape: Sequence[int], format: str
) -> Tensor:
    _check_shape(shape)
    _check_weight(values, structure)
    _check_matrix("dy", dy, shape[0], values)
    _check_dtype("spmm_t", dy)
    return dy.new_empty((dy.shape[0], shape[1]))


def sddmm_fake(
    structure: Tensor, dy: Tensor, x: Tensor, shape: Sequence[int], format: str, capacity: int
) -> Tensor:
    _check_shape(shape)
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


# ----------------------------------------------------------------------------------- the long way


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


def _check_memory(*tensors: Tensor | None) -> None:
    """Check that elements lie somewhere: a storage can be freed under its tensors."""
    if any(t is not None and t.numel() and t.data_ptr() == 0 for t in tensors):
        raise format_error(
            "a tensor whose storage has been freed",
            "elements in memory",
            "bring it back first; sharded modules free parameters between their passes",
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


def spmm_long(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    format: str,
) -> Tensor:
    y = spmm_fake(values, structure, x, bias, shape, format)
    _check_memory(values, structure, x, bias)
    compiled = _compiled(structure, shape, format)
    if bias is not None:
        bias = bias.contiguous()  # alive until the product is done
    _multiply("spmm", compiled, values, x, y, 0 if bias is None else bias.data_ptr())
    return y


def spmm_act_long(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    format: str,
    activation: str,
) -> Tensor:
    y = spmm_fake(values, structure, x, bias, shape, format, activation)
    _check_memory(values, structure, x, bias)
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


def spmm_t_long(
    values: Tensor, structure: Tensor, dy: Tensor, shape: Sequence[int], format: str
) -> Tensor:
    dx = spmm_t_fake(values, structure, dy, shape, format)
    _check_memory(values, structure, dy)
    _multiply("spmm_t", _compiled(structure, shape, format), values, dy, dx)
    return dx


def sddmm_long(
    structure: Tensor, dy: Tensor, x: Tensor, shape: Sequence[int], format: str, capacity: int
) -> Tensor:
    grad = sddmm_fake(structure, dy, x, shape, format, capacity)
    _check_memory(structure, dy, x)
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


# ------------------------------------------------------------------------------------- at once


def spmm_cpu(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    format: str,
) -> Tensor:
    y = multiply(SPMM, values, structure, x, bias, shape, format)
    return spmm_long(values, structure, x, bias, shape, format) if y is None else y


def spmm_act_cpu(
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
    return spmm_act_long(values, structure, x, bias, shape, format, activation)


def spmm_t_cpu(
    values: Tensor, structure: Tensor, dy: Tensor, shape: Sequence[int], format: str
) -> Tensor:
    dx = multiply(SPMM_T, values, structure, dy, None, shape, format)
    return spmm_t_long(values, structure, dy, shape, format) if dx is None else dx


def sddmm_cpu(
    structure: Tensor, dy: Tensor, x: Tensor, shape: Sequence[int], format: str, capacity: int
) -> Tensor:
    gradient = sample(structure, dy, x, shape, format, capacity)
    if gradient is not None:
        return gradient
    return sddmm_long(structure, dy, x, shape, format, capacity)
