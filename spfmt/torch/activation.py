"""Activations of torch by our names, for what no kernel of ours applies."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

__all__ = ["activated", "activation_backward"]


def activated(z: Tensor, activation: str | None) -> Tensor:
    """Return ``f(z)``; `z` itself without an activation."""
    if activation is None:
        return z
    if activation == "relu":
        return torch.relu(z)
    if activation == "silu":
        return torch.nn.functional.silu(z)
    return torch.nn.functional.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def activation_backward(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """Return the gradient at `z`."""
    aten = torch.ops.aten
    if activation == "relu":
        return cast(Tensor, aten.threshold_backward(dy, z, 0))
    if activation == "silu":
        return cast(Tensor, aten.silu_backward(dy, z))
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return cast(Tensor, aten.gelu_backward(dy, z, approximate=approximate))
