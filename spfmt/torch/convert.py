"""Between torch tensors and the numpy arrays of formats."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spfmt.errors import MissingDependency

__all__ = ["to_numpy", "to_torch_values", "whole", "write_whole"]


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """Return a dense tensor's content as a numpy array; bfloat16 through ml_dtypes.

    Raises
    ------
    MissingDependency
        For bfloat16 without ml_dtypes.
    """
    tensor = tensor.detach().cpu()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingDependency(
            "got bfloat16 values; numpy holds them only with ml_dtypes: pip install ml_dtypes, or "
            "cast the module with .float()"
        ) from error
    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def to_torch_values(array: NDArray[Any]) -> Tensor:
    """Return a copy of an array of values as a tensor; bfloat16 stays bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as it is, and a sharded one gathered from all ranks that share it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_whole(tensor: Tensor, content: Tensor) -> None:
    """Write the whole content into a tensor; of a sharded one every rank writes its own part."""
    if not hasattr(tensor, "full_tensor"):
        tensor.copy_(content)
        return
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    part: Any = distribute_tensor(content, mesh, placements, src_data_rank=None)
    tensor.to_local().copy_(part.to_local())  # type: ignore[attr-defined]
