"""Every module of a model that owns a weight: its names, its places, and why it may be left."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spfmt.torch.linear import SparseLinear
from spfmt.torch.module import SparseModule

__all__ = ["Found", "Selector", "as_linear", "matches", "survey", "ties", "why_unfit"]

Selector = str | type | Callable[[str, nn.Module], bool]

_COMPUTED = (
    "its weight is computed (pruning hook, norm or parametrization); make it plain, e.g. with "
    "prune.remove(...)"
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
            return self.module.shape
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


def survey(model: nn.Module) -> list[Found]:
    """Return every module that owns a weight, once, in the order of its first name."""
    found: dict[int, Found] = {}
    parents = dict(model.named_modules(remove_duplicate=False))
    for name, module in parents.items():
        entry = found.setdefault(id(module), Found(module))
        entry.names.append(name)
        parent, _, attribute = name.rpartition(".")
        if name:
            entry.places.append((parents[parent], attribute))
    linear = (nn.Linear, SparseModule)
    return [
        f
        for f in found.values()
        if f.weights or isinstance(f.module, linear) or _is_quantised(f.module)
    ]


def _is_quantised(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer of torch.ao, whose weight is no Parameter."""
    return hasattr(module, "_packed_params") and hasattr(module, "in_features")


def matches(selectors: Iterable[Selector], names: list[str], module: nn.Module) -> bool:
    """Tell whether any glob, class or predicate picks the module under any of its names."""
    for selector in selectors:
        if isinstance(selector, str):
            hit = any(fnmatch.fnmatchcase(name, selector) for name in names)
        elif isinstance(selector, type):
            hit = isinstance(module, selector)
        else:
            hit = any(selector(name, module) for name in names)
        if hit:
            return True
    return False


def as_linear(module: nn.Module) -> nn.Linear:
    """Return a dense layer with a module's map, on the module's own memory and bias."""
    if isinstance(module, nn.Linear):
        return module
    if isinstance(module, SparseLinear):
        return module.to_linear()
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
    """Return why a module cannot become a SparseLinear; empty if it can.

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
        return _COMPUTED
    if type(module) is not nn.Linear and not _is_conv1d(module):
        kind = type(module).__name__
        if isinstance(module, nn.Linear):
            return f"{kind} is a subclass of nn.Linear and may compute something else"
        return f"{kind} is not an nn.Linear"
    return _why_unfit_weight(entry, tied, empty)


def _why_unfit_weight(entry: Found, tied: Mapping[int, list[str]], empty: bool) -> str:
    weight = entry.weights.get("weight")
    if weight is None:
        return _COMPUTED
    if id(weight) in tied:
        others = [place for place in tied[id(weight)] if place != f"{entry.name}.weight"]
        return f"its weight is tied to {', '.join(others)}"
    if weight.layout is not torch.strided:
        return f"its weight has the layout {weight.layout}: make it dense; 'keep' keeps its zeros"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.is_meta and not empty:
        return "its weight is on meta: load it first"
    if not entry.places:
        return "it is the model itself: use SparseLinear.from_linear"
    return ""
