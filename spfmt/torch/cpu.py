"""The operators on the CPU.

In one compiled call where the operands are plain, and else by way of numpy, which makes them plain
or says what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from spfmt.activations import activation_code
from spfmt.convolution import Convolution, convolve, convolve_sampled
from spfmt.dispatch import Plan
from spfmt.torch import checks
from spfmt.torch.values import (
    SPMM,
    SPMM_T,
    WRITTEN,
    compiled_structure,
    multiply,
    sample,
)

__all__ = [
    "conv2d_cpu",
    "conv2d_input_cpu",
    "conv2d_weight_cpu",
    "sddmm_cpu",
    "spmm_cpu",
    "spmm_t_cpu",
]

_Ints = Sequence[int]


def _plan_of(
    values: Tensor, structure: Tensor, shape: Sequence[int], *operands: Tensor | None
) -> Plan:
    """Return the plan of a structure that fits a weight's shape and values."""
    checks.check_memory(values, structure, *operands)
    compiled = compiled_structure(structure.contiguous())
    checks.check_structure(compiled.structure, shape)
    checks.check_capacity(values, compiled.nnz)
    return compiled.plan


def _memory(t: Tensor) -> NDArray[Any]:
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
    y = checks.spmm_fake(values, structure, x, bias, shape, activation)
    _plan_of(values, structure, shape, x, bias).spmm(
        _memory(values),
        _memory(x),
        bias=None if bias is None else _memory(bias),
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
    dx = checks.spmm_t_fake(values, structure, dy, shape)
    plan = _plan_of(values, structure, shape, dy)
    constant = WRITTEN if written else None
    out = dx.numpy()
    plan.spmm_t(_memory(values), _memory(dy), batch_first=True, out=out, constant=constant)
    return dx


def sddmm_cpu(
    structure: Tensor, dy: Tensor, x: Tensor, shape: Sequence[int], capacity: int
) -> Tensor:
    """Compute ``sddmm``."""
    found = sample(structure, dy, x, shape, capacity)
    if found is not None:
        return found
    gradient = checks.sddmm_fake(structure, dy, x, shape, capacity)
    plan = _plan_of(gradient, structure, shape, dy, x)
    plan.sddmm(_memory(dy), _memory(x), batch_first=True, out=gradient.numpy())
    return gradient


# ------------------------------------------------------------------------------------ convolutions


def _array(t: Tensor) -> NDArray[Any]:
    """Return a tensor as an array: on the same memory, unless elements lie at odd addresses."""
    array = _memory(t)
    return array if array.flags.aligned else array.copy("K")


def conv2d_cpu(
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
    """Compute ``conv2d``."""
    rest = (shape, stride, padding, dilation, groups)
    y = checks.conv2d_fake(values, structure, x, bias, *rest, activation)
    plan = _plan_of(values, structure, shape, x, bias)
    offset = None if bias is None else _array(bias.contiguous())
    flat = _array(values.contiguous())
    convolve(plan, Convolution.of(*rest), flat, _array(x), offset, activation, y.numpy())
    return y


def conv2d_input_cpu(
    values: Tensor,
    structure: Tensor,
    dy: Tensor,
    shape: _Ints,
    size: _Ints,
    stride: _Ints,
    padding: _Ints,
    dilation: _Ints,
    groups: int,
) -> Tensor:
    """Compute ``conv2d_input``."""
    dx = checks.conv2d_input_fake(
        values, structure, dy, shape, size, stride, padding, dilation, groups
    )
    plan = _plan_of(values, structure, shape, dy)
    how = Convolution.of(shape, stride, padding, dilation, groups)
    flat = _array(values.contiguous())
    convolve(plan, how, flat, _array(dy), None, None, dx.numpy(), turned=True)
    return dx


def conv2d_weight_cpu(
    structure: Tensor,
    dy: Tensor,
    x: Tensor,
    shape: _Ints,
    capacity: int,
    stride: _Ints,
    padding: _Ints,
    dilation: _Ints,
    groups: int,
) -> Tensor:
    """Compute ``conv2d_weight``."""
    rest = (stride, padding, dilation, groups)
    gradient = checks.conv2d_weight_fake(structure, dy, x, shape, capacity, *rest)
    plan = _plan_of(gradient, structure, shape, dy, x)
    convolve_sampled(plan, Convolution.of(shape, *rest), _array(dy), _array(x), gradient.numpy())
    return gradient
