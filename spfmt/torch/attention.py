"""Multi-head attention with its projections as linear layers, so that they can become sparse."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spfmt.errors import format_error
from spfmt.torch.frozen import FrozenLinear
from spfmt.torch.linear import SparseLinear
from spfmt.torch.participating import Participating
from spfmt.torch.wrappers import changeable

__all__ = ["UnpackedAttention", "unpack_attention"]


class UnpackedAttention(nn.Module):
    """``nn.MultiheadAttention`` with four ``nn.Linear`` in place of packed weights.

    Takes the same arguments and gives the same results. ``q_proj``, ``k_proj``, ``v_proj`` and
    ``out_proj`` are called as modules, so any of them may be replaced by a `SparseLinear`.

    Parameters
    ----------
    packed : nn.MultiheadAttention
        Its weights are copied; without ``add_bias_kv`` and ``add_zero_attn``.

    Raises
    ------
    FormatError
        For an attention that appends biases or zeros to its keys.
    """

    # nn.TransformerEncoderLayer asks for these before it reads packed weights on its fast path.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        if packed.bias_k is not None or packed.add_zero_attn:
            raise format_error(
                "nn.MultiheadAttention with add_bias_kv or add_zero_attn",
                "one without",
                "exclude it from unpack_attention",
            )
        self.embed_dim, self.num_heads = packed.embed_dim, packed.num_heads
        self.dropout, self.batch_first = packed.dropout, packed.batch_first
        if packed._qkv_same_embed_dim:
            weights = packed.in_proj_weight.chunk(3)
        else:
            weights = (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
        bias = packed.in_proj_bias
        biases = (None, None, None) if bias is None else bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj: nn.Module = _linear(packed.out_proj.weight, packed.out_proj.bias)
        self.train(packed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of ``nn.MultiheadAttention.forward``."""
        if is_causal and attn_mask is None:
            raise RuntimeError("got is_causal without attn_mask; pass the causal mask as well")
        batched = query.dim() == 3
        inputs = [t if batched else t.unsqueeze(0) for t in (query, key, value)]
        if batched and not self.batch_first:
            inputs = [t.transpose(0, 1) for t in inputs]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (self._heads(project(t)) for project, t in zip(projections, inputs, strict=True))
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        drop = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), drop)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        y: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _heads(self, x: Tensor) -> Tensor:
        """Split (N, L, E) into (N, heads, L, E / heads)."""
        sizes = (*x.shape[:-1], self.num_heads, x.shape[-1] // self.num_heads)
        return x.reshape(sizes).transpose(1, 2)

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None
    ) -> Tensor | None:
        """Join both masks into one that is added to the scores, (N or 1, heads or 1, L or 1, S)."""
        joined = None
        if attn_mask is not None:
            if attn_mask.dim() == 3:  # (N * heads, L, S)
                attn_mask = attn_mask.view(q.shape[0], -1, q.shape[2], k.shape[2])
            joined = _additive(attn_mask, q.dtype)
        if padding is not None:
            keys = _additive(padding.view(q.shape[0], 1, 1, k.shape[2]), q.dtype)
            joined = keys if joined is None else joined + keys
        return joined


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make a linear layer of copies of a weight and a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return linear


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to scores; True of a bool mask means: do not attend."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def unpack_attention(model: nn.Module) -> tuple[str, ...]:
    """Replace every ``nn.MultiheadAttention`` of a model by `UnpackedAttention`, in place.

    Call it before :func:`sparsify`, which then takes the projections like any other linear layer.
    Modules that append biases or zeros to their keys stay as they are. Names in a ``state_dict``
    change: ``in_proj_weight`` becomes ``q_proj.weight``, ``k_proj.weight``, ``v_proj.weight``.

    Parameters
    ----------
    model : nn.Module
        Searched through all its children; shared modules stay shared.

    Returns
    -------
    tuple of str
        Names of the modules that were replaced.
    """
    replaced: dict[nn.Module, UnpackedAttention] = {}
    names = []
    model = changeable(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.MultiheadAttention or not name:
            continue
        if module.bias_k is not None or module.add_zero_attn:
            continue
        parent, _, attribute = name.rpartition(".")
        if module not in replaced:
            replaced[module] = UnpackedAttention(module)
            names.append(name)
        setattr(model.get_submodule(parent), attribute, replaced[module])
    set_fast_paths(model)
    return tuple(names)


def set_fast_paths(model: nn.Module) -> None:
    """Switch the fast path of transformer encoders off where it would read a weight itself.

    The path passes ``linear1.weight`` and ``self_attn.in_proj_weight`` straight to a fused kernel.
    Sparse layers have none; that of a `Participating` layer is there, but not all of it takes part.
    Its own conditions offer one switch per layer (an activation it does not know) and one per
    stack (no nested tensors). Where everything is dense again, it is switched on again.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            switch = "activation_relu_or_gelu"
        elif isinstance(module, nn.TransformerEncoder):
            switch = "use_nested_tensor"
        else:
            continue
        changed = (SparseLinear, FrozenLinear, Participating, UnpackedAttention)
        sparse = any(isinstance(child, changed) for child in module.modules())
        saved = module.__dict__.get("_dense_fast_path")
        if sparse and saved is None:
            module._dense_fast_path = getattr(module, switch)
            setattr(module, switch, 0)
        elif not sparse and saved is not None:
            setattr(module, switch, saved)
            del module._dense_fast_path
