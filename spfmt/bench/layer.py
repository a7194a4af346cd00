"""Forward and backward pass of one layer through torch's autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from spfmt.bench.contenders import BATCH_FIRST, Contender, Setting
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


def sparse_layer(setting: Setting, a: SparseTensor, layout: str = BATCH_FIRST) -> Contender:
    """Return `SparseLinear` with a weight."""
    import torch

    from spfmt.torch import SparseLinear

    layer = SparseLinear.from_tensor(a, torch.zeros(a.matrix_shape[0]))
    name = f"{a.label()} SparseLinear"
    return layer_contender(setting, name, "sparse", a, layer, layer.values, layout)


def layer_contender(
    setting: Setting,
    name: str,
    kind: str,
    weight: Any,
    layer: torch.nn.Module,
    parameter: torch.nn.Parameter,
    layout: str = BATCH_FIRST,
) -> Contender:
    """Return a layer's forward and backward pass.

    Parameters
    ----------
    setting : Setting
    name, kind : str
    weight : SparseTensor or ndarray
        What the layer multiplies with; its bias is zero.
    layer : nn.Module
        X to Y.
    parameter : nn.Parameter
        Whose gradient is the weight's: of its shape, or (nnz,) in the order of the values.
    layout : str
    """
    import torch

    images, dy = (torch.from_numpy(a) for a in setting.operands(layout))
    x = images.clone().requires_grad_()
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

    def exact() -> Sequence[Exact]:
        return [*(setting.exact(weight, op) for op in setting.PASSES), _bias_gradient(setting)]

    return setting.contender(name, kind, weight, call, layout=layout, results=results, exact=exact)


def _bias_gradient(setting: Setting) -> Exact:
    """The bias adds every sample's gradient, of images every pixel's."""
    dy = setting.dy.astype(np.float64)
    axes = tuple(axis for axis in range(dy.ndim) if axis != 1)
    factor = (dy.size // dy.shape[1] + 2) * float(np.finfo(np.float32).eps)
    return Exact(dy.sum(axes), factor * np.abs(dy).sum(axes))
