"""Values of a dense weight at the positions of a structure, as torch operators.

``spfmt::gather`` reads them and ``spfmt::scatter`` writes them into zeros; each is the gradient of
the other. As operators they are opaque to ``torch.compile``: a compiled graph asks for the present
structure at every run.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from spfmt.structure.moves import RowRuns, gather, scatter
from spfmt.torch import checks, cuda
from spfmt.torch import ops as products
from spfmt.torch.values import compiled_structure

__all__ = ["gathered", "scattered", "write_at"]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # elements are moved, no more
_library = torch.library.Library("spfmt", "FRAGMENT")  # type: ignore[no-untyped-call]


def gathered(weight: Tensor, structure: Tensor, capacity: int) -> Tensor:
    """Return the elements of a dense weight at the positions of a structure.

    Parameters
    ----------
    weight : Tensor, any shape and strides, of a dtype of 2, 4 or 8 bytes
    structure : Tensor, shape (n_words,), int32
        Structure words for a weight of as many elements.
    capacity : int
        Length of the result, at least the structure's nnz.

    Returns
    -------
    Tensor, shape (capacity,)
        In the order of the structure's values; zero behind them.
    """
    recording = weight.requires_grad and torch.is_grad_enabled()
    plain = not recording and products._is_unobserved()
    if plain and products._is_ordinary(weight, structure):  # past torch's dispatcher
        return _gather(weight, structure, capacity)
    return cast(Tensor, torch.ops.spfmt.gather(weight, structure, capacity))


def scattered(values: Tensor, structure: Tensor, size: int) -> Tensor:
    """Return a vector (size,) of zeros but for the values at the structure's positions."""
    return cast(Tensor, torch.ops.spfmt.scatter(values, structure, size))


@torch.no_grad()
def write_at(weight: Tensor, structure: Tensor, values: Tensor) -> None:
    """Write values to their positions in a dense weight, in place."""
    if weight.is_cuda:
        cuda.products().write_at(weight, structure, values)
        return
    flat = weight.detach().contiguous().reshape(-1)
    positions = _positions(structure, flat.numel(), values.numel())
    scatter(positions, _bits(values), _bits(flat))
    if flat.data_ptr() != weight.data_ptr():  # strides of its own: that was a copy
        weight.copy_(flat.reshape(weight.shape))
    else:
        torch.autograd.graph.increment_version(weight)


def _positions(structure: Tensor, size: int, capacity: int) -> RowRuns:
    """Return the positions of a structure that fits a weight and a vector of values."""
    found = compiled_structure(structure).structure
    checks.check_positions(found, size, capacity)
    return found.layout.row_runs()


def _bits(tensor: Tensor) -> NDArray[Any]:
    """Return a vector's memory as integers of its elements' size."""
    array: NDArray[Any] = tensor.detach().view(_BITS[tensor.element_size()]).numpy()
    return array


def _gather(weight: Tensor, structure: Tensor, capacity: int) -> Tensor:
    positions = _positions(structure, weight.numel(), capacity)
    out = weight.new_empty(capacity)
    out[positions.nnz :] = 0
    gather(positions, _bits(weight.contiguous().reshape(-1)), _bits(out))
    return out


def _scatter(values: Tensor, structure: Tensor, size: int) -> Tensor:
    dense = values.new_zeros(size)
    positions = _positions(structure, size, values.numel())
    scatter(positions, _bits(values.contiguous()), _bits(dense))
    return dense


def _define(schema: str, compute: Any, on_cuda: Any, fake: Any, backward: Any, setup: Any) -> None:
    _library.define(f"{schema} -> Tensor", tags=[torch.Tag.pt2_compliant_tag])  # type: ignore[no-untyped-call]
    name = f"spfmt::{schema.partition('(')[0]}"
    torch.library.impl(name, "cpu", compute, lib=_library)
    torch.library.impl(name, "cuda", on_cuda, lib=_library)
    torch.library.register_fake(name, fake, lib=_library)
    torch.library.register_autograd(name, backward, setup_context=setup, lib=_library)


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, structure, _ = inputs
    ctx.shape = weight.shape
    ctx.save_for_backward(structure)


def _gather_backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    (structure,) = ctx.saved_tensors
    return scattered(dvalues, structure, ctx.shape.numel()).reshape(ctx.shape), None, None


def _scatter_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, structure, _ = inputs
    ctx.capacity = values.shape[0]
    ctx.save_for_backward(structure)


def _scatter_backward(ctx: Any, ddense: Tensor) -> tuple[Tensor | None, ...]:
    (structure,) = ctx.saved_tensors
    return gathered(ddense, structure, ctx.capacity), None, None


_define(
    "gather(Tensor weight, Tensor structure, SymInt capacity)",
    _gather,
    cuda.gather_cuda,
    lambda weight, structure, capacity: weight.new_empty(capacity),
    _gather_backward,
    _gather_context,
)
_define(
    "scatter(Tensor values, Tensor structure, SymInt size)",
    _scatter,
    cuda.scatter_cuda,
    lambda values, structure, size: values.new_empty(size),
    _scatter_backward,
    _scatter_context,
)
