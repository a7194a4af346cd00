"""What the operators check of their operands, and promise of results, on whatever device.

``*_fake`` checks the operands of an operator and returns an empty result, which is all that a trace
needs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from spfmt.activations import activation_code
from spfmt.convolution import Convolution
from spfmt.cuda import library
from spfmt.errors import KernelNotFound, format_error
from spfmt.formats import Structure

__all__ = [
    "check_bias",
    "check_capacity",
    "check_device",
    "check_dtype",
    "check_memory",
    "check_place",
    "check_positions",
    "check_structure",
    "check_weight",
    "conv2d_fake",
    "conv2d_input_fake",
    "conv2d_weight_fake",
    "sddmm_fake",
    "spmm_fake",
    "spmm_t_fake",
]

_ON_CPU = (torch.float32, torch.float64)
_ON_CUDA = (torch.float32, torch.bfloat16, torch.float16)
_OPS_ON_CUDA = library.OPS["groups"]  # those of lists are fewer, which only a structure tells

_Ints = Sequence[int]

# ------------------------------------------------------------------------------------- of anything


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


def check_place(*tensors: Tensor | None) -> None:
    """Check that all pointers are of one device: a kernel given others crashes."""
    given = [t for t in tensors if t is not None]
    if any(t.device != given[0].device for t in given):
        raise format_error(
            f"tensors on {', '.join(str(t.device) for t in given)}",
            "one device",
            "move the input or the module with .to()",
        )


def check_positions(found: Structure, size: int, capacity: int) -> None:
    """Check that a structure's positions lie in a weight of `size` and fit `capacity` values."""
    if math.prod(found.shape) != size or capacity < found.nnz:
        rows, columns = found.matrix_shape
        raise format_error(
            f"a structure of {found.nnz} positions in {rows} x {columns} for {capacity} values of "
            f"a weight of {size}",
            "one structure for all of them",
            "use the structure of the layer that the weight comes from",
        )


# --------------------------------------------------------------------------------- of the products


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


# ------------------------------------------------------------------------------- of convolutions


def _check_images(name: str, x: Tensor, channels: int, like: Tensor) -> None:
    if x.dim() != 4 or x.shape[1] != channels:
        raise format_error(
            f"{name} of shape {tuple(x.shape)}", f"(N, {channels}, H, W)", "pass a batch of images"
        )
    if x.dtype != like.dtype:
        raise format_error(
            f"{name} of {x.dtype} beside {like.dtype}",
            "one dtype for all operands",
            f"cast with {name}.to({like.dtype}), or the module with .to({x.dtype})",
        )


def _images_like(x: Tensor, *shape: Any) -> Tensor:
    return torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=suggest_memory_format(x)
    )


def conv2d_fake(
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
    kind: str | None = None,
) -> Tensor:
    """Check the operands of ``conv2d`` and return an empty result."""
    activation_code(activation)
    how = Convolution.of(shape, stride, padding, dilation, groups)
    check_weight(values, structure)
    _check_images("x", x, shape[1] * groups, values)
    check_bias(bias, shape[0], values)
    check_dtype("conv2d", x, kind)
    return _images_like(x, x.shape[0], shape[0], *how.sizes(x.shape[2], x.shape[3]))


def conv2d_input_fake(
    values: Tensor,
    structure: Tensor,
    dy: Tensor,
    shape: _Ints,
    size: _Ints,
    stride: _Ints,
    padding: _Ints,
    dilation: _Ints,
    groups: int,
    kind: str | None = None,
) -> Tensor:
    """Check the operands of ``conv2d_input`` and return an empty result."""
    how = Convolution.of(shape, stride, padding, dilation, groups)
    check_weight(values, structure)
    _check_images("dy", dy, shape[0], values)
    _check_maps(how, dy, size)
    check_dtype("conv2d_input", dy, kind)
    return _images_like(dy, dy.shape[0], shape[1] * groups, *size)


def conv2d_weight_fake(
    structure: Tensor,
    dy: Tensor,
    x: Tensor,
    shape: _Ints,
    capacity: int,
    stride: _Ints,
    padding: _Ints,
    dilation: _Ints,
    groups: int,
    kind: str | None = None,
) -> Tensor:
    """Check the operands of ``conv2d_weight`` and return an empty result."""
    how = Convolution.of(shape, stride, padding, dilation, groups)
    _check_images("dy", dy, shape[0], x)
    _check_images("x", x, shape[1] * groups, dy)
    if dy.shape[0] != x.shape[0]:
        raise format_error(
            f"dy of {dy.shape[0]} images and x of {x.shape[0]}",
            "one batch size",
            "pass the x that this dy belongs to",
        )
    _check_maps(how, dy, x.shape[2:])
    check_dtype("conv2d_weight", x, kind)
    return x.new_empty((capacity,))


def _check_maps(how: Convolution, dy: Tensor, size: _Ints) -> None:
    wanted = how.sizes(size[0], size[1])
    if dy.shape[2] != wanted[0] or dy.shape[3] != wanted[1]:
        raise format_error(
            f"dy with maps of {dy.shape[2]} x {dy.shape[3]}",
            f"{wanted[0]} x {wanted[1]}, which maps of {size[0]} x {size[1]} give",
            "pass the gradient of the same convolution's result",
        )
