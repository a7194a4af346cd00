"""`freeze` a model's sparse layers for inference, and `unfreeze` them again."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from spfmt.formats import SparseTensor
from spfmt.torch.convert import to_numpy, whole
from spfmt.torch.layer import traced
from spfmt.torch.linear import SparseLinear, affine
from spfmt.torch.survey import Found, places, swap
from spfmt.torch.values import Constant, compiled_structure

__all__ = ["FrozenLinear", "freeze", "unfreeze"]

Self = TypeVar("Self", bound="FrozenLinear")

_WAY_OUT = (
    "a frozen layer's values stay as they are, so that products need not look at them; read them "
    "with tensor(), and call unfreeze(model) to change them"
)


class FrozenLinear(nn.Module):
    """A `SparseLinear` whose values stay as they are: what `freeze` puts in its place.

    Small batches of a layer whose values may change compare them with what was packed, at every
    call; here the packed copy is used without a look. There is no Parameter `values`: reading or
    assigning it raises, and ``load_state_dict`` refuses. Gradients flow to the input and the bias.
    An exported program holds the values as a constant: a write to that is seen if torch counts it,
    which it does not through ``.data``.

    Parameters
    ----------
    layer : SparseLinear
        Its values and structure are copied, its bias Parameter is shared.

    Attributes
    ----------
    structure : Tensor, shape (n_words,), int32
    bias : nn.Parameter, shape (out_features,), or None
    shape : (int, int)
        (out_features, in_features).
    format : str
    """

    structure: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        self.shape, self.format = layer.shape, layer.format
        self.out_features, self.in_features = layer.shape
        self._kept = (layer.target_density, dict(layer.format_params))
        self._trained = layer.values.requires_grad
        with torch.inference_mode(False):  # what is made for inference may be trained through later
            self.register_buffer("structure", layer.structure.detach().clone())
        self.register_parameter("bias", layer.bias)
        self._constant = Constant(whole(layer.values))
        self.train(layer.training)

    def forward(self, x: Tensor, *, activation: str | None = None) -> Tensor:
        """Return ``f(x A.T + b)``; see `SparseLinear.forward`."""
        if isinstance(x, Proxy):
            return traced(self, x, activation)
        values = self._constant.values
        return affine(x, values, self.structure, self.bias, self.shape, activation)

    def tensor(self) -> SparseTensor:
        """Return the weight as a numpy format object, its values copied."""
        found = compiled_structure(self.structure.cpu()).structure
        return found.tensor(to_numpy(self._constant.values[: found.nnz]))

    def thawed(self) -> SparseLinear:
        """Return a `SparseLinear` with the same weight, to be written; the bias is shared."""
        target, params = self._kept
        values = self._constant.values
        layer = SparseLinear.from_tensor(
            self.tensor(),
            self.bias,
            capacity=values.numel(),
            device=values.device,
            dtype=values.dtype,
            target_density=target,
            **params,
        )
        layer.values.requires_grad_(self._trained)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """Describe the layer as it is printed inside a model."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, frozen"
        )

    def __getattr__(self, name: str) -> Any:
        if name in ("values", "weight"):
            raise AttributeError(f"got {name!r} of a frozen layer; {_WAY_OUT}")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("values", "weight"):
            raise AttributeError(f"got an assignment to {name!r} of a frozen layer; {_WAY_OUT}")
        super().__setattr__(name, value)

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            moved = fn(self._constant.values)
        if moved is not self._constant.values:  # what writes in place keeps its tensor
            self._constant = Constant(moved)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save what a `SparseLinear` would, so that either loads it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "values"] = self._constant.values.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuse: what is frozen does not change."""
        error_msgs: list[str] = args[-1]
        error_msgs.append(f"{prefix.rstrip('.') or 'the layer'}: {_WAY_OUT}, then load")


def freeze(model: nn.Module) -> nn.Module:
    """Replace every `SparseLinear` of a model by a `FrozenLinear` with the same map, in place.

    Layers of subclasses stay as they are: their map may be another.

    For inference: a product of a layer whose values may change compares them whole with what was
    packed, at the speed of memory (docs/kernels.md says what that costs); of a frozen one it does
    not. The values are copied; references to the old Parameters, an optimizer's for instance, no
    longer have to do with the model.

    Parameters
    ----------
    model : nn.Module
        Searched through all its children, or a `SparseLinear` itself. Shared layers stay shared.

    Returns
    -------
    nn.Module
        The model; for a `SparseLinear` itself its frozen form.
    """
    return _replaced(model, SparseLinear, FrozenLinear)


def unfreeze(model: nn.Module) -> nn.Module:
    """Replace every `FrozenLinear` of a model by a `SparseLinear` again, in place.

    The weights are new Parameters: make the optimizer afterwards.

    Parameters
    ----------
    model : nn.Module
        As for `freeze`.

    Returns
    -------
    nn.Module
        The model; for a `FrozenLinear` itself its thawed form.
    """
    return _replaced(model, FrozenLinear, FrozenLinear.thawed)


def _replaced(model: nn.Module, kind: type[nn.Module], make: Any) -> nn.Module:
    if type(model) is kind:
        made: nn.Module = make(model)
        swap(Found(model), made)
        return made
    for entry in places(model):
        if type(entry.module) is kind:
            swap(entry, make(entry.module))
    return model
