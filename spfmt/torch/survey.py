"""Every module of a model that owns a weight: its names, its places, and why it may be left."""

from __future__ import annotations

import fnmatch
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spfmt.torch.conv import SparseConv1d, SparseConv2d
from spfmt.torch.layer import SparseLayer
from spfmt.torch.linear import SparseLinear
from spfmt.torch.module import SparseModule

__all__ = [
    "Found",
    "Selector",
    "as_dense",
    "is_plain",
    "matches",
    "places",
    "selectors",
    "sparse_class",
    "survey",
    "swap",
    "ties",
    "why_kept",
    "why_unfit",
]

Selector = str | type | Callable[[str, nn.Module], bool]

_COMPUTED = (
    "its {} is computed (pruning hook, norm or parametrization); make it plain, e.g. with "
    "prune.remove(...)"
)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass
class Found:
    """A module with a weight: all its names, every place that refers to it, why it is left."""

    module: nn.Module
    names: list[str] = field(default_factory=list)
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    reason: str = ""

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The module's own parameters that are matrices or larger, by name."""
        own = self.module.named_parameters(recurse=False)
        return {name: p for name, p in own if nn.parameter.is_lazy(p) or p.dim() >= 2}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its (first) weight; empty where a lazy module does not know it yet."""
        if isinstance(self.module, SparseModule):
            return self.module.dense_shape
        sizes = [tuple(p.shape) for p in self.weights.values() if not nn.parameter.is_lazy(p)]
        if _is_conv1d(self.module):
            return sizes[0][::-1]
        if sizes or self.weights:
            return sizes[0] if sizes else ()
        if _is_quantised(self.module):
            return self.module.out_features, self.module.in_features  # type: ignore[return-value]
        return tuple(getattr(getattr(self.module, "weight", None), "shape", ()))

    @property
    def size(self) -> int:
        """Number of weights; zero where a lazy module does not know it yet."""
        return math.prod(self.shape) if self.shape else 0


def places(model: nn.Module) -> list[Found]:
    """Return every module of a model once, in the order of its first name."""
    found: dict[int, Found] = {}
    parents = dict(model.named_modules(remove_duplicate=False))
    for name, module in parents.items():
        entry = found.setdefault(id(module), Found(module))
        entry.names.append(name)
        parent, _, attribute = name.rpartition(".")
        if name:
            entry.places.append((parents[parent], attribute))
    return list(found.values())


def survey(model: nn.Module) -> list[Found]:
    """Return every module that owns a weight, once, in the order of its first name."""
    layers = (*_SPARSE, SparseModule)
    return [
        f
        for f in places(model)
        if f.weights or isinstance(f.module, layers) or _is_quantised(f.module)
    ]


def _is_quantised(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer of torch.ao, whose weight is no Parameter."""
    return hasattr(module, "_packed_params") and hasattr(module, "in_features")


def selectors(given: Selector | Iterable[Selector] | None) -> tuple[Selector, ...]:
    """Return one or several selectors as several."""
    if given is None:
        return ()
    if isinstance(given, str | type) or callable(given):
        return (given,)
    return tuple(given)


def matches(chosen: Iterable[Selector], names: list[str], module: nn.Module) -> bool:
    """Tell whether any glob, class or predicate picks the module under any of its names."""
    for selector in chosen:
        if isinstance(selector, str):
            hit = any(fnmatch.fnmatchcase(name, selector) for name in names)
        elif isinstance(selector, type):
            hit = isinstance(module, selector)
        else:
            hit = any(selector(name, module) for name in names)
        if hit:
            return True
    return False


_SPARSE: dict[type[nn.Module], type[SparseLayer]] = {
    layer.DENSE: layer for layer in (SparseLinear, SparseConv2d, SparseConv1d)
}


def is_plain(module: nn.Module) -> bool:
    """Tell whether a module is a dense layer of torch that a sparse one stands for."""
    return type(module) in _SPARSE


def sparse_class(dense: nn.Module) -> type[SparseLayer]:
    """Return the sparse layer that stands for a dense one."""
    return _SPARSE[type(dense)]


def as_dense(module: nn.Module) -> Any:
    """Return a dense layer with a module's map, on the module's own memory and bias."""
    if is_plain(module):
        return module
    if isinstance(module, SparseLayer):
        return module.to_dense()
    weight: Tensor = module.weight  # type: ignore[assignment]  # (in, out), of a Conv1D
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().t(), weight.requires_grad)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear.train(module.training)


def _is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is GPT-2's linear layer, ``y = x W + b`` with W (in, out)."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return named and isinstance(weight, nn.Parameter) and weight.dim() == 2


def ties(found: list[Found]) -> dict[int, list[str]]:
    """Return, by identity, the places of every weight whose memory is another one's, too."""
    spans = []
    for entry in found:
        for name, weight in entry.weights.items():
            spans.append((*_span(weight), id(weight), f"{entry.name}.{name}".lstrip(".")))
    groups: list[list[tuple[int, int, int, str]]] = []
    reached = 0
    for span in sorted(spans, key=lambda span: span[0]):  # stable: in the order of the model
        if not groups or span[0] >= reached:
            groups.append([])
        groups[-1].append(span)
        reached = span[1] if len(groups[-1]) == 1 else max(reached, span[1])
    shared = [group for group in groups if len(group) > 1]
    return {key: [span[3] for span in group] for group in shared for *_, key, _ in group}


def _span(weight: Tensor) -> tuple[int, int]:
    """Return the first address of a weight and the one behind its last."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.layout is torch.strided
    start = weight.data_ptr() if plain and not weight.is_meta and weight.numel() else 0
    if start == 0:  # no memory to share; the identity serves as an address of its own
        return -id(weight), 1 - id(weight)
    last = sum((n - 1) * step for n, step in zip(weight.shape, weight.stride(), strict=True))
    return start, start + (last + 1) * weight.element_size()


def why_unfit(entry: Found, tied: Mapping[int, list[str]], empty: bool = False) -> str:
    """Return why a module cannot become a sparse layer; empty if it can.

    Parameters
    ----------
    entry : Found
    tied : mapping of int to list of str
        Result of :func:`ties`.
    empty : bool
        Whether weights on meta will do, since their content is not needed.
    """
    module = entry.module
    if isinstance(module, SparseModule):
        return f"already sparse ({module.format})"
    if isinstance(module, nn.MultiheadAttention):
        return (
            "nn.MultiheadAttention multiplies its packed projections itself; call "
            "unpack_attention(model) first to make them nn.Linear"
        )
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads the weight of its out_proj itself"
    if any(map(nn.parameter.is_lazy, module.parameters(recurse=False))):
        return "its shape is not known yet; call the model once first"
    if _is_quantised(module):
        return "its weight is quantised; sparsify before quantising"
    if parametrize.is_parametrized(module):
        return _COMPUTED.format("weight")
    if not is_plain(module) and not _is_conv1d(module):
        kind = type(module).__name__
        for dense in _SPARSE:
            if isinstance(module, dense):
                return f"{kind} is a subclass of nn.{dense.__name__} and may compute something else"
        return f"{kind} has no sparse layer"
    return _why_unfit_weight(entry, tied, empty)


def _why_unfit_weight(entry: Found, tied: Mapping[int, list[str]], empty: bool) -> str:
    weight = entry.weights.get("weight")
    if weight is None:
        return _COMPUTED.format("weight")
    if "bias" not in entry.module._parameters:
        return _COMPUTED.format("bias")
    if lost := _lost(entry.module):
        return f"it has {lost} of its own, which a sparse layer would lose"
    if id(weight) in tied:
        others = [place for place in tied[id(weight)] if place != f"{entry.name}.weight"]
        return f"its weight is tied to {', '.join(others)}"
    if hasattr(weight, "full_tensor"):
        return "its weight is sharded: make the layer sparse before fully_shard(model)"
    if weight.layout is not torch.strided:
        return f"its weight has the layout {weight.layout}: make it dense; 'keep' keeps its zeros"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.is_meta and not empty:
        return "its weight is on meta: load it first"
    if not entry.places:
        return "it is the model itself: use from_dense of the sparse layer"
    return ""


def _lost(module: nn.Module) -> str:
    """Return what a module has beside its class's weight and bias, by name; empty if nothing."""
    own = (*module._parameters, *module._buffers, *module._modules)
    methods = vars(module).keys() & {"forward", "_conv_forward"}
    return ", ".join(sorted({*own} - {"weight", "bias"} | methods))


def why_kept(entry: Found, found: Sequence[Found]) -> str:
    """Return why a convolution stays dense unless it is named; empty if it does not.

    The first convolution of a model sees images of few channels, and in a depthwise one each
    channel has a kernel of its own: both hold few weights, and lose more than they gain.
    """
    module = entry.module
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return ""
    kinds = nn.Conv1d | nn.Conv2d | SparseConv1d | SparseConv2d
    if entry is next(f for f in found if isinstance(f.module, kinds)):
        return "the first convolution stays dense unless `include` or `density` names it"
    if module.groups > 1 and module.groups == module.in_channels:
        return "depthwise: stays dense unless `include` or `density` names it"
    return ""


def swap(entry: Found, layer: nn.Module) -> None:
    """Put a layer in every place of an old one; hooks come along."""
    for hooks in _HOOKS:  # the dictionaries themselves, so that handles can still remove hooks
        setattr(layer, hooks, getattr(entry.module, hooks))
    for hook in layer._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # torch passes the module that it was made for
            hook.module = weakref.ref(layer)  # type: ignore[attr-defined]
    layer.training = entry.module.training
    for parent, attribute in entry.places:
        setattr(parent, attribute, layer)
