"""Forward and backward pass of one linear layer through torch's autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spfmt.bench.contenders import Contender, Setting
from spfmt.bench.exact import Exact
from spfmt.formats import SparseTensor

if TYPE_CHECKING:
    import torch

__all__ = ["dense_layer", "layer_contender", "sparse_layer"]


def dense_layer(setting: Setting) -> Contender:
    """Return ``nn.Linear``, which every layer's speed-up refers to."""
    import torch

    rows, cols = setting.case.shape
    layer = torch.nn.Linear(cols, rows)
    layer.weight = torch.nn.Parameter(torch.from_numpy(setting.dense.copy()))
    torch.nn.init.zeros_(layer.bias)
    return layer_contender(setting, "torch nn.Linear", "dense", setting.dense, layer, layer.weight)


def sparse_layer(setting: Setting, a: SparseTensor) -> Contender:
    """Return `SparseLinear` with a weight."""
    import torch

    from spfmt.torch import SparseLinear

    layer = SparseLinear.from_tensor(a, torch.zeros(a.matrix_shape[0]))
    return layer_contender(setting, f"{a.label()} SparseLinear", "sparse", a, layer, layer.values)


def layer_contender(
    setting: Setting,
    name: str,
    kind: str,
    weight: Any,
    layer: torch.nn.Module,
    parameter: torch.nn.Parameter,
) -> Contender:
    """Return a layer's forward and backward pass.

    Parameters
    ----------
    setting : Setting
    name, kind : str
    weight : SparseTensor or ndarray
        What the layer multiplies with; its bias is zero.
    layer : nn.Module
        (B, C) to (B, R).
    parameter : nn.Parameter
        Whose gradient is the weight's: (R, C), or (nnz,) in the order of the values.
    """
    import torch

    x = torch.from_numpy(setting.x.copy()).requires_grad_()
    dy = torch.from_numpy(setting.dy)
    parameters = list(layer.parameters())

    def call() -> torch.Tensor:
        x.grad = None
        for p in parameters:
            p.grad = None
        y: torch.Tensor = layer(x)
        y.backward(dy)  # type: ignore[no-untyped-call]
        return y

    def results(y: torch.Tensor) -> Sequence[Any]:
        gradients = [x.grad, parameter.grad, getattr(layer, "bias").grad]  # noqa: B009
        return [t.detach().numpy() for t in (y, *gradients) if t is not None]

    exact = [setting.exact(weight, op) for op in ("spmm", "spmm_t", "sddmm")]
    exact.append(_bias_gradient(setting))
    return setting.contender(name, kind, weight, call, results=results, exact=exact)


def _bias_gradient(setting: Setting) -> Exact:
    """The bias adds every sample's gradient."""
    factor = (setting.case.batch + 2) * float(np.finfo(np.float32).eps)
    bound = factor * np.abs(setting.dy.astype(np.float64)).sum(0)
    return Exact(setting.dy.sum(0, dtype=np.float64), bound)
