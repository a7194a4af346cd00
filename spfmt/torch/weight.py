"""What stands in for the `weight` that a sparse layer does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from spfmt.torch.module import SparseModule

__all__ = ["WeightInfo"]


class WeightInfo:
    """Shape, dtype, device and requires_grad of a sparse layer's weight, and never its content.

    Models look at ``layer.weight.dtype`` to cast their activations; that is answered. Whatever
    would read or write the weight itself raises and says what to use.
    """

    __slots__ = ("_layer",)

    EXPLANATION = (
        "a sparse layer has no dense `weight`: use `values` (the Parameter), tensor() (structure "
        "and values) or tensor().to_dense(); only dtype, device, shape and requires_grad of "
        "`weight` can be read"
    )

    def __init__(self, layer: SparseModule) -> None:
        object.__setattr__(self, "_layer", layer)

    @property
    def dtype(self) -> torch.dtype:
        """That of the values."""
        return self._layer._held("values").dtype

    @property
    def device(self) -> torch.device:
        """That of the values."""
        return self._layer._held("values").device

    @property
    def requires_grad(self) -> bool:
        """That of the values."""
        return self._layer._held("values").requires_grad

    @property
    def is_meta(self) -> bool:
        """That of the values."""
        return self._layer._held("values").is_meta

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense weight."""
        return torch.Size(self._layer.dense_shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions of the dense weight."""
        return len(self._layer.dense_shape)

    def dim(self) -> int:
        """Return `ndim`."""
        return self.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return `shape`, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return the number of weights of the dense layer."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Tell that a weight is floating."""
        return True

    def __repr__(self) -> str:
        return f"WeightInfo(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"weight.{name}: {self.EXPLANATION}")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"weight.{name}: {self.EXPLANATION}")

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], *args: Any) -> NoReturn:
        name = getattr(func, "__name__", func)
        raise TypeError(f"{name} of `weight`: {cls.EXPLANATION}")


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: WeightInfo, *_: Any) -> NoReturn:
        raise TypeError(f"{name} of `weight`: {self.EXPLANATION}")

    return refuse


for _operation in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    for _name in (f"__{_operation}__", f"__r{_operation}__", f"__i{_operation}__"):
        setattr(WeightInfo, _name, _refusing(_name))
for _name in ("__getitem__", "__setitem__", "__iter__", "__len__", "__neg__", "__abs__",
              "__array__", "__float__", "__bool__"):  # fmt: skip
    setattr(WeightInfo, _name, _refusing(_name))
