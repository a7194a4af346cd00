"""`sparsify` a model's linear layers in place, and `densify` it again."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spfmt.convert import convert
from spfmt.errors import FormatError, format_error
from spfmt.formats import SparseTensor, get_format
from spfmt.structure.distribution import erk_densities, uniform_densities
from spfmt.torch.attention import set_fast_paths
from spfmt.torch.linear import SparseLinear, implied_density, resolve_density
from spfmt.torch.report import LayerReport, ModelReport
from spfmt.torch.wrappers import changeable

__all__ = ["densify", "layer_densities", "sparsify"]

Selector = str | type | Callable[[str, nn.Module], bool]
Scores = Literal["magnitude", "random"] | Callable[[str, nn.Linear], Tensor]
Distribution = Literal["uniform", "erk"]

_COMPUTED = (
    "its weight is computed (pruning hook, norm or parametrization); make it plain, e.g. with "
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
)


# ----------------------------------------------------------------------------------- survey


@dataclass
class _Found:
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
        if isinstance(self.module, SparseLinear):
            return self.module.shape
        sizes = [tuple(p.shape) for p in self.weights.values() if not nn.parameter.is_lazy(p)]
        if sizes or self.weights:
            return sizes[0] if sizes else ()
        if _is_quantised(self.module):
            return self.module.out_features, self.module.in_features  # type: ignore[return-value]
        return tuple(getattr(getattr(self.module, "weight", None), "shape", ()))

    @property
    def size(self) -> int:
        """Number of weights; zero where a lazy module does not know it yet."""
        return math.prod(self.shape) if self.shape else 0


def _survey(model: nn.Module) -> list[_Found]:
    """Return every module that owns a weight, once, in the order of its first name."""
    found: dict[int, _Found] = {}
    parents = dict(model.named_modules(remove_duplicate=False))
    for name, module in parents.items():
        entry = found.setdefault(id(module), _Found(module))
        entry.names.append(name)
        parent, _, attribute = name.rpartition(".")
        if name:
            entry.places.append((parents[parent], attribute))
    linear = (nn.Linear, SparseLinear)
    return [
        f
        for f in found.values()
        if f.weights or isinstance(f.module, linear) or _is_quantised(f.module)
    ]


def _is_quantised(module: nn.Module) -> bool:
    """Tell whether a module is a linear layer of torch.ao, whose weight is no Parameter."""
    return hasattr(module, "_packed_params") and hasattr(module, "in_features")


def _matches(selectors: Iterable[Selector], names: list[str], module: nn.Module) -> bool:
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


def _selectors(given: Selector | Iterable[Selector] | None) -> tuple[Selector, ...]:
    if given is None:
        return ()
    if isinstance(given, str | type) or callable(given):
        return (given,)
    return tuple(given)


def _ties(found: list[_Found]) -> dict[int, list[str]]:
    """Return, by identity, the places of every parameter that several modules own."""
    owners: dict[int, list[str]] = {}
    for entry in found:
        for name, parameter in entry.weights.items():
            owners.setdefault(id(parameter), []).append(f"{entry.name}.{name}".lstrip("."))
    return {key: places for key, places in owners.items() if len(places) > 1}


def _why_unfit(entry: _Found, ties: Mapping[int, list[str]]) -> str:
    """Return why a module cannot become a SparseLinear; empty if it can."""
    module = entry.module
    if isinstance(module, SparseLinear):
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
    if type(module) is not nn.Linear:
        kind = type(module).__name__
        if isinstance(module, nn.Linear):
            return f"{kind} is a subclass of nn.Linear and may compute something else"
        return f"{kind} is not an nn.Linear"
    return _why_unfit_weight(entry, ties)


def _why_unfit_weight(entry: _Found, ties: Mapping[int, list[str]]) -> str:
    weight = entry.weights.get("weight")
    if weight is None:
        return _COMPUTED
    if id(weight) in ties:
        others = [place for place in ties[id(weight)] if place != f"{entry.name}.weight"]
        return f"its weight is tied to {', '.join(others)}"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.is_meta:
        return "its weight is on meta: load it first"
    if not entry.places:
        return "it is the model itself: use SparseLinear.from_linear"
    return ""


# --------------------------------------------------------------------------------- densities


def layer_densities(
    shapes: Mapping[str, tuple[int, ...]],
    density: float,
    distribution: Distribution = "uniform",
) -> dict[str, float]:
    """Spread a budget over the layers of a model.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Weight shape of every layer.
    density : float
        Share of all their weights that stays.
    distribution : {"uniform", "erk"}
        The same density everywhere, or Erdős–Rényi-Kernel: wide layers sparser than narrow ones
        (Evci et al., RigL, 2020), with the same total.

    Returns
    -------
    dict of str to float
    """
    solvers = {"uniform": uniform_densities, "erk": erk_densities}
    if distribution not in solvers:
        raise format_error(
            f"distribution={distribution!r}", "'uniform' or 'erk'", "use one of them"
        )
    found = solvers[distribution](list(shapes.values()), density)
    return dict(zip(shapes, map(float, found), strict=True))


# ---------------------------------------------------------------------------------- sparsify


@dataclass(frozen=True)
class _Recipe:
    """How one layer is made sparse."""

    format: str
    params: Mapping[str, Any]
    scores: Scores
    reset: bool
    generator: torch.Generator | None

    def kept(self, linear: nn.Linear) -> tuple[SparseLinear, str]:
        """Make a layer on the nonzeros of a pruned weight; the remark counts padding zeros."""
        weight = linear.weight.detach().to("cpu", torch.float32).numpy()
        nonzero = int(np.count_nonzero(weight))
        if nonzero == weight.size:
            raise FormatError("its weight has no zeros to keep")
        tensor = convert(weight, self.format, **self.params)
        padding = tensor.nnz - nonzero
        remark = f"{padding} padding zeros" if padding else ""
        return self._finish(linear, tensor, None), remark

    def pruned(self, name: str, linear: nn.Linear, density: float | None) -> SparseLinear:
        """Make a layer on the structure that keeps the most score."""
        scores = self._scores(name, linear).detach().to("cpu", torch.float32).numpy()
        if density is None:
            density = resolve_density(implied_density(self.params, linear.in_features), None)
        tensor = get_format(self.format).from_scores(scores, density, **self.params)
        return self._finish(linear, tensor, density)

    def _scores(self, name: str, linear: nn.Linear) -> Tensor:
        if callable(self.scores):
            return self.scores(name, linear)
        if self.scores == "random":
            return torch.rand(linear.weight.shape, generator=self.generator, device="cpu")
        return linear.weight.abs()

    def _finish(
        self, linear: nn.Linear, tensor: SparseTensor, density: float | None
    ) -> SparseLinear:
        layer = SparseLinear._gathered(linear, tensor, None, density, self.params)
        if self.reset:
            layer.reset_parameters(self.generator)
        return layer


def sparsify(
    model: nn.Module,
    format: str | type[SparseTensor] = "condensed",
    density: float | Literal["keep"] | Mapping[str, float] | None = None,
    *,
    sparsity: float | None = None,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    distribution: Distribution = "uniform",
    scores: Scores = "magnitude",
    reset: bool = False,
    generator: torch.Generator | None = None,
    **params: Any,
) -> ModelReport:
    """Replace the ``nn.Linear`` layers of a model by `SparseLinear`, in place.

    Every layer is built before the first one is replaced, so an error leaves the model as it was.
    Make the optimizer afterwards: the weights are new Parameters (biases stay the same objects).

    Parameters
    ----------
    model : nn.Module
        Searched through all its children; a module used in several places is replaced once and
        stays shared.
    format : str or type of SparseTensor
        The format, for instance ``"shuffled_block"``.
    density, sparsity : float, optional
        Share of weights that stay, or that go: exactly one of the two, unless ``n`` and ``m`` or
        ``fan_in`` say it. ``density="keep"`` keeps the zeros that a pruned model already has, and
        no others. A mapping from layer names to densities takes exactly those layers.
    include, exclude : str, type, callable, or several of them, optional
        Globs on the qualified name (``"encoder.*"``), module classes, or predicates
        ``(name, module) -> bool``. By default every ``nn.Linear`` is included and none excluded.
    distribution : {"uniform", "erk"}
        How a density is spread over the layers; see :func:`layer_densities`. A layer that ERK gives
        every weight stays dense and counts in the budget.
    scores : {"magnitude", "random"} or callable
        What to keep, larger is better: ``|w|``, random, or ``(name, linear) -> Tensor``.
    reset : bool
        Draw new values, scaled for the sparse fan-in: for training from scratch.
    generator : torch.Generator, optional
        For random scores and `reset`.
    **params
        Parameters of the format, for instance ``block_shape=(16, 16)``.

    Returns
    -------
    ModelReport
        A row for every weight of the model, taken or left, with the reason. Print it.

    Raises
    ------
    FormatError
        Where densities contradict each other or a name of a mapping is unknown. A layer that the
        format cannot hold is reported, not raised.

    Notes
    -----
    Tied weights are left, because a sparse layer would break the tie. ``nn.MultiheadAttention`` is
    left, because it multiplies its packed weights itself; after :func:`unpack_attention` its
    projections are ordinary layers. ``nn.TransformerEncoderLayer`` has a fast
    path that reads the weights of its linear layers; it is switched off for layers that were
    changed, and :func:`densify` switches it on again.
    """
    targets = _Targets.of(density, sparsity, distribution, params)
    if isinstance(scores, str) and scores not in ("magnitude", "random"):
        raise format_error(
            f"scores={scores!r}", "'magnitude', 'random' or a callable", "use one of them"
        )
    model = changeable(model)
    found = _survey(model)
    _decide(found, targets, _selectors(include), _selectors(exclude))
    shapes = {entry.name: entry.shape for entry in found if not entry.reason}
    densities = targets.spread(shapes)
    _leave_full(found, targets, densities)
    recipe = _Recipe(get_format(format).format, params, scores, reset, generator)
    rows, swaps = [], []
    for entry in found:
        row, layer = _make(entry, recipe, densities)
        rows.append(row)
        if layer is not None:
            swaps.append((entry, layer))
    for entry, layer in swaps:
        _swap(entry, layer)
    set_fast_paths(model)
    return ModelReport(tuple(rows))


@dataclass(frozen=True)
class _Targets:
    """The densities asked for: one for all, one by name, implied by n:m, or those the model has."""

    density: float | None
    by_name: Mapping[str, float] | None
    distribution: Distribution
    implied: bool = False

    @classmethod
    def of(
        cls,
        density: Any,
        sparsity: float | None,
        distribution: Distribution,
        params: Mapping[str, Any],
    ) -> _Targets:
        if isinstance(density, str | Mapping):
            if sparsity is not None or (isinstance(density, str) and density != "keep"):
                raise format_error(
                    f"density={density!r} and sparsity={sparsity}",
                    "a number, 'keep', or a mapping from names to numbers, without sparsity",
                    "pass density=0.1, for example",
                )
            by_name = None if isinstance(density, str) else density
            return cls(None, by_name, distribution)._not_spread()
        if density is None and sparsity is None and implied_density(params, 1) is not None:
            return cls(None, None, distribution, implied=True)._not_spread()
        return cls(resolve_density(density, sparsity), None, distribution)

    def _not_spread(self) -> _Targets:
        if self.distribution != "uniform":
            raise format_error(
                f"distribution={self.distribution!r} where every layer's density is given already",
                "it together with one density for the whole model",
                "leave out distribution, or pass density=0.1",
            )
        return self

    def spread(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, float | None] | None:
        """Return every layer's density by name, None where n:m says it; None keeps the zeros."""
        if self.by_name is not None:
            return {name: resolve_density(self.by_name[name], None) for name in shapes}
        if self.implied:
            return dict.fromkeys(shapes)
        if self.density is None:
            return None
        return layer_densities(shapes, self.density, self.distribution)


def _decide(
    found: list[_Found],
    targets: _Targets,
    include: tuple[Selector, ...],
    exclude: tuple[Selector, ...],
) -> None:
    """Write into every entry why it is left, or leave the reason empty."""
    ties = _ties(found)
    for entry in found:
        entry.reason = _why_unfit(entry, ties)
        if entry.reason:
            continue
        if include and not _matches(include, entry.names, entry.module):
            entry.reason = "not included"
        elif _matches(exclude, entry.names, entry.module):
            entry.reason = "excluded"
        elif targets.by_name is not None and entry.name not in targets.by_name:
            entry.reason = "not named in density"
    unknown = set(targets.by_name or ()) - {name for entry in found for name in entry.names[:1]}
    if unknown:
        raise format_error(
            f"densities for {', '.join(sorted(unknown))}",
            "names of layers of the model",
            "compare with dict(model.named_modules())",
        )


def _leave_full(
    found: list[_Found], targets: _Targets, densities: Mapping[str, float | None] | None
) -> None:
    """Leave dense what ERK gives every weight: a sparse layer would only be a slower dense one."""
    if targets.distribution != "erk" or densities is None:
        return
    for entry in found:
        if not entry.reason and densities[entry.name] == 1.0:
            entry.reason = "its share under ERK is every weight: it stays dense"


def _make(
    entry: _Found, recipe: _Recipe, densities: Mapping[str, float | None] | None
) -> tuple[LayerReport, SparseLinear | None]:
    """Build the sparse layer of an entry and its row; a FormatError becomes the row's reason."""
    layer: SparseLinear | None = None
    remark = entry.reason
    if not entry.reason:
        assert isinstance(entry.module, nn.Linear)
        try:
            if densities is None:
                layer, remark = recipe.kept(entry.module)
            else:
                layer = recipe.pruned(entry.name, entry.module, densities[entry.name])
        except FormatError as error:
            remark = str(error)
    return _row(entry, layer, remark), layer


def _row(entry: _Found, layer: SparseLinear | None, remark: str) -> LayerReport:
    kind, aliases = type(entry.module).__name__, tuple(entry.names[1:])
    now = layer if layer is not None else entry.module
    if isinstance(now, SparseLinear):
        sparse = (now.format, now.target_density, now.density, now.nnz)
    else:
        sparse = ("", 1.0, 1.0, entry.size)
    return LayerReport(
        entry.name, kind, entry.shape, layer is not None, remark, *sparse, aliases=aliases
    )


def _swap(entry: _Found, layer: nn.Module) -> None:
    """Put a layer in every place of an old one; hooks come along."""
    for hooks in _HOOKS:  # the dictionaries themselves, so that handles can still remove hooks
        setattr(layer, hooks, getattr(entry.module, hooks))
    layer.training = entry.module.training
    for parent, attribute in entry.places:
        setattr(parent, attribute, layer)


def densify(model: nn.Module) -> ModelReport:
    """Replace every `SparseLinear` of a model by a dense ``nn.Linear`` with the same map, in place.

    Parameters
    ----------
    model : nn.Module
        Searched through all its children. Shared layers stay shared.

    Returns
    -------
    ModelReport
        A row for every weight of the model; the sparse ones are taken.
    """
    rows = []
    model = changeable(model)
    for entry in _survey(model):
        sparse = isinstance(entry.module, SparseLinear) and bool(entry.places)
        if isinstance(entry.module, SparseLinear) and sparse:
            _swap(entry, entry.module.to_linear())
        reason = "" if sparse else _why_not_densified(entry)
        rows.append(
            LayerReport(
                entry.name,
                type(entry.module).__name__,
                entry.shape,
                sparse,
                reason,
                nnz=entry.size,
                aliases=tuple(entry.names[1:]),
            )
        )
    set_fast_paths(model)
    return ModelReport(tuple(rows))


def _why_not_densified(entry: _Found) -> str:
    if isinstance(entry.module, SparseLinear):
        return "it is the model itself: use to_linear()"
    return "already dense"
