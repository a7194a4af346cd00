"""Sparse layers for torch: operators with autograd, layers, `sparsify` and `densify`."""

from __future__ import annotations

from spfmt.errors import MissingDependency

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingDependency(
        "spfmt.torch needs torch, which is not installed; fix: pip install 'spfmt[torch]' (or pip "
        "install torch)"
    ) from error

from spfmt.torch.attention import UnpackedAttention, unpack_attention
from spfmt.torch.conv import SparseConv1d, SparseConv2d
from spfmt.torch.convolution import conv2d, conv2d_input, conv2d_weight
from spfmt.torch.frozen import FrozenLinear, freeze, unfreeze
from spfmt.torch.layer import resolve_density
from spfmt.torch.linear import SparseLinear
from spfmt.torch.module import SparseModule, follow
from spfmt.torch.ops import sddmm, spmm, spmm_t
from spfmt.torch.participate import participate
from spfmt.torch.participating import Participating
from spfmt.torch.report import LayerReport, ModelReport
from spfmt.torch.semi_structured import to_semi_structured
from spfmt.torch.sparsify import decay_groups, densify, layer_densities, sparsify, sparsify_like

__all__ = [
    "FrozenLinear",
    "LayerReport",
    "ModelReport",
    "Participating",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
    "UnpackedAttention",
    "conv2d",
    "conv2d_input",
    "conv2d_weight",
    "decay_groups",
    "densify",
    "follow",
    "freeze",
    "layer_densities",
    "participate",
    "resolve_density",
    "sddmm",
    "sparsify",
    "sparsify_like",
    "spmm",
    "spmm_t",
    "to_semi_structured",
    "unfreeze",
    "unpack_attention",
]
