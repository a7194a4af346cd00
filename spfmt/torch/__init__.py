"""Sparse layers for torch: operators with autograd, `SparseLinear`, `sparsify` and `densify`."""

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
from spfmt.torch.linear import SparseLinear, resolve_density
from spfmt.torch.module import SparseModule, follow
from spfmt.torch.ops import sddmm, spmm, spmm_t
from spfmt.torch.report import LayerReport, ModelReport
from spfmt.torch.sparsify import decay_groups, densify, layer_densities, sparsify, sparsify_like

__all__ = [
    "LayerReport",
    "ModelReport",
    "SparseLinear",
    "SparseModule",
    "UnpackedAttention",
    "decay_groups",
    "densify",
    "follow",
    "layer_densities",
    "resolve_density",
    "sddmm",
    "sparsify",
    "sparsify_like",
    "spmm",
    "spmm_t",
    "unpack_attention",
]
