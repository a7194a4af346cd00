"""2:4 sparse layers on the sparse tensor cores of NVIDIA GPUs, by torch's own tensors."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from spfmt.torch.attention import set_fast_paths
from spfmt.torch.frozen import unfreeze
from spfmt.torch.linear import SparseLinear
from spfmt.torch.report import LayerReport, ModelReport
from spfmt.torch.sparsify import row_of
from spfmt.torch.survey import Found, survey, swap
from spfmt.torch.wrappers import changeable

__all__ = ["to_semi_structured"]

_DTYPES = (torch.bfloat16, torch.float16)


def to_semi_structured(model: nn.Module) -> ModelReport:
    """Replace linear layers that keep two of every four columns at most, in place, for inference.

    Their weights become ``torch.sparse.to_sparse_semi_structured`` of the dense ones, which torch
    multiplies on sparse tensor cores: half the work of a dense product whatever the density, so
    that it can win for large batches at 50 %. The weights no longer train.

    Parameters
    ----------
    model : nn.Module
        On a CUDA device, in bfloat16 or float16. Searched through all its children.

    Returns
    -------
    ModelReport
        A row for every weight of the model; those that were replaced are taken. The others name
        what is in the way, torch's constraints on shapes too.

    Raises
    ------
    FormatError
        For a model in DDP.

    Examples
    --------
    >>> import spfmt.torch
    >>> model = nn.Sequential(SparseLinear(64, 32, format="nm", n=2, m=4))
    >>> print(to_semi_structured(model).left[0].reason)  # move it with .cuda().bfloat16() first
    on cpu: sparse tensor cores are NVIDIA GPUs'
    """
    model = unfreeze(changeable(model))
    rows = tuple(_converted(entry) for entry in survey(model))
    set_fast_paths(model)
    return ModelReport(rows)


def _converted(entry: Found) -> LayerReport:
    reason = _why_not(entry)
    if not reason:
        assert isinstance(entry.module, SparseLinear)
        dense = entry.module.to_dense()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that they are a prototype
                weight = torch.sparse.to_sparse_semi_structured(dense.weight.detach())
        except RuntimeError as error:  # shapes that torch's kernels do not take
            reason = str(error).split("\n")[0]
        else:
            dense.weight = nn.Parameter(weight, requires_grad=False)
            swap(entry, dense)
    return replace(row_of(entry, None, reason), taken=not reason)


def _why_not(entry: Found) -> str:
    """Return why a layer stays; empty where torch can multiply it."""
    layer = entry.module
    if not isinstance(layer, SparseLinear):
        return "no SparseLinear"
    if not entry.places:
        return "it is the model itself: put it into nn.Sequential"
    if not _is_on_device(layer):
        return f"on {layer.values.device}: sparse tensor cores are NVIDIA GPUs'"
    if layer.values.dtype not in _DTYPES:
        return f"of {layer.values.dtype}: cast the model with .bfloat16()"
    if layer.in_features % 4:
        return f"{layer.in_features} columns are no multiple of four"
    return "" if _is_two_of_four(layer) else "more than two of four neighbouring columns are kept"


def _is_on_device(layer: SparseLinear) -> bool:
    return layer.values.is_cuda


def _is_two_of_four(layer: SparseLinear) -> bool:
    fours = np.bincount(layer.positions() // 4, minlength=1)
    return bool(fours.max(initial=0) <= 2)
