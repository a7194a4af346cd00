"""`sparsify` a model's linear layers and convolutions in place, and `densify` it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spfmt.convert import convert
from spfmt.errors import FormatError, format_error
from spfmt.formats import SparseTensor, decode_structure, get_format
from spfmt.structure.distribution import erk_densities, uniform_densities
from spfmt.torch.attention import set_fast_paths
from spfmt.torch.frozen import unfreeze
from spfmt.torch.layer import SparseLayer, implied_density, resolve_density
from spfmt.torch.module import SparseModule
from spfmt.torch.participating import Participating
from spfmt.torch.report import LayerReport, ModelReport
from spfmt.torch.survey import (
    Found,
    Selector,
    as_dense,
    matches,
    selectors,
    sparse_class,
    survey,
    swap,
    ties,
    why_kept,
    why_unfit,
)
from spfmt.torch.wrappers import changeable

__all__ = [
    "Targets",
    "decay_groups",
    "decide",
    "densify",
    "layer_densities",
    "leave_full",
    "row_of",
    "sparsify",
    "sparsify_like",
]

Scores = Literal["magnitude", "random"] | Callable[[str, Any], Tensor]
Distribution = Literal["uniform", "erk"]


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
    generator: torch.Generator | None

    def kept(self, dense: Any) -> tuple[SparseLayer, str]:
        """Make a layer on the nonzeros of a pruned weight; the remark counts padding zeros."""
        weight = _flat(dense, dense.weight)
        nonzero = int(np.count_nonzero(weight))
        if nonzero == weight.size:
            raise FormatError("its weight has no zeros to keep")
        tensor = convert(weight, self.format, **self.params)
        padding = tensor.nnz - nonzero
        remark = f"{padding} padding zeros" if padding else ""
        return self._made(dense, tensor, None), remark

    def pruned(self, name: str, dense: Any, density: float | None) -> SparseLayer:
        """Make a layer on the structure that keeps the most score."""
        scores = _flat(dense, self._scores(name, dense))
        if density is None:
            density = resolve_density(implied_density(self.params, scores.shape), None)
        tensor = get_format(self.format).from_scores(scores, density, **self.params)
        if tensor.nnz == scores.size > round(density * scores.size):
            raise FormatError(
                f"at density {density:.4g} the format keeps every weight of it: it stays dense"
            )
        return self._made(dense, tensor, density)

    def _scores(self, name: str, dense: Any) -> Tensor:
        if callable(self.scores):
            return self.scores(name, dense)
        if self.scores == "random":
            return torch.rand(dense.weight.shape, generator=self.generator, device="cpu")
        magnitude: Tensor = dense.weight.abs()
        return magnitude

    def _made(self, dense: Any, tensor: SparseTensor, density: float | None) -> SparseLayer:
        return sparse_class(dense)._gathered(dense, tensor, None, density, self.params)


def _flat(dense: nn.Module, weight: Tensor) -> NDArray[Any]:
    """Return a weight, or its scores, as formats take them."""
    shape = sparse_class(dense)._flat_shape(weight.shape)
    array: NDArray[Any] = weight.detach().to("cpu", torch.float32).reshape(shape).numpy()
    return array


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
    """Replace the linear layers and convolutions of a model by sparse ones, in place.

    Taken are ``nn.Linear``, ``nn.Conv2d`` and ``nn.Conv1d``, and GPT-2's ``Conv1D``, whose weight
    (in, out) is transposed. The first convolution and depthwise ones stay dense unless they are
    named. Nothing is folded: batch norms stay what they are.

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
        ``(name, module) -> bool``. By default every layer that can be taken is included but the
        first convolution and depthwise ones, and none is excluded.
    distribution : {"uniform", "erk"}
        How a density is spread over the layers; see :func:`layer_densities`. A layer that ERK gives
        every weight stays dense and counts in the budget.
    scores : {"magnitude", "random"} or callable
        What to keep, larger is better: ``|w|``, random, or ``(name, layer) -> Tensor``,
        where a ``Conv1D`` is given as the linear layer of the same map.
    reset : bool
        Draw new values, scaled for the sparse fan-in: for training from scratch.
    generator : torch.Generator, optional
        For random scores and `reset`.
    **params
        Parameters of the format, for instance ``block_shape=(16, 16)``.

    Returns
    -------
    ModelReport
        A row for every weight of the model, taken or left, with the reason. Print it. Left is also
        what a format can only keep whole at its density, as blocks larger than the layer do.

    Raises
    ------
    FormatError
        Where densities contradict each other or a name of a mapping is unknown. A layer that the
        format cannot hold is reported, not raised.

    Notes
    -----
    Tied weights, which share an object or memory, are left: a sparse layer would break the tie.
    `values` has one dimension, so rules like "no weight decay where ``p.ndim < 2``" pass over it:
    make the optimizer's groups with :func:`decay_groups`. ``nn.MultiheadAttention`` is
    left, because it multiplies its packed weights itself; after :func:`unpack_attention` its
    projections are ordinary layers. ``nn.TransformerEncoderLayer`` has a fast
    path that reads the weights of its linear layers; it is switched off for layers that were
    changed, and :func:`densify` switches it on again.
    """
    targets = Targets.of(density, sparsity, distribution, params)
    if isinstance(scores, str) and scores not in ("magnitude", "random"):
        raise format_error(
            f"scores={scores!r}", "'magnitude', 'random' or a callable", "use one of them"
        )
    model = changeable(model)
    found = survey(model)
    decide(found, targets, selectors(include), selectors(exclude))
    shapes = {entry.name: entry.shape for entry in found if not entry.reason}
    densities = targets.spread(shapes)
    leave_full(found, targets, densities)
    recipe = _Recipe(get_format(format).format, params, scores, generator)
    rows, swaps = [], []
    for entry in found:
        row, layer = _make(entry, recipe, densities)
        rows.append(row)
        if layer is not None:
            swaps.append((entry, layer))
    for entry, layer in swaps:
        if reset:  # not before: the biases are those of the dense layers
            layer.reset_parameters(generator)
        swap(entry, layer)
    set_fast_paths(model)
    return ModelReport(tuple(rows))


@dataclass(frozen=True)
class Targets:
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
    ) -> Targets:
        """Read the arguments of `sparsify`; raise a FormatError where they contradict."""
        if isinstance(density, str | Mapping):
            if sparsity is not None or (isinstance(density, str) and density != "keep"):
                raise format_error(
                    f"density={density!r} and sparsity={sparsity}",
                    "a number, 'keep', or a mapping from names to numbers, without sparsity",
                    "pass density=0.1, for example",
                )
            by_name = None if isinstance(density, str) else density
            return cls(None, by_name, distribution)._not_spread()
        if density is None and sparsity is None and implied_density(params, (1, 1)) is not None:
            return cls(None, None, distribution, implied=True)._not_spread()
        return cls(resolve_density(density, sparsity), None, distribution)

    def _not_spread(self) -> Targets:
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


def decide(
    found: list[Found],
    targets: Targets,
    include: tuple[Selector, ...],
    exclude: tuple[Selector, ...],
    rule: Callable[[Found, list[Found]], str] = why_kept,
) -> None:
    """Write into every entry why it is left, or leave the reason empty.

    The rule says what stays dense unless it is named.
    """
    tied = ties(found)
    for entry in found:
        entry.reason = why_unfit(entry, tied)
        if entry.reason:
            continue
        if include and not matches(include, entry.names, entry.module):
            entry.reason = "not included"
        elif matches(exclude, entry.names, entry.module):
            entry.reason = "excluded"
        elif targets.by_name is not None and entry.name not in targets.by_name:
            entry.reason = "not named in density"
        elif not include and targets.by_name is None:
            entry.reason = rule(entry, found)
    unknown = set(targets.by_name or ()) - {name for entry in found for name in entry.names[:1]}
    if unknown:
        raise format_error(
            f"densities for {', '.join(sorted(unknown))}",
            "names of layers of the model",
            "compare with dict(model.named_modules())",
        )


def leave_full(
    found: list[Found], targets: Targets, densities: Mapping[str, float | None] | None
) -> None:
    """Leave dense what ERK gives every weight: a sparse layer would only be a slower dense one."""
    if targets.distribution != "erk" or densities is None:
        return
    for entry in found:
        if not entry.reason and densities[entry.name] == 1.0:
            entry.reason = "its share under ERK is every weight: it stays dense"


def _make(
    entry: Found, recipe: _Recipe, densities: Mapping[str, float | None] | None
) -> tuple[LayerReport, SparseLayer | None]:
    """Build the sparse layer of an entry and its row; a FormatError becomes the row's reason."""
    layer: SparseLayer | None = None
    remark = entry.reason
    if not entry.reason:
        dense = as_dense(entry.module)
        try:
            if densities is None:
                layer, remark = recipe.kept(dense)
            else:
                layer = recipe.pruned(entry.name, dense, densities[entry.name])
                remark = "; ".join(filter(None, (layer.tensor().remark(), _excess(layer))))
        except FormatError as error:
            remark = str(error)
    return row_of(entry, layer, remark), layer


def _excess(layer: SparseLayer) -> str:
    """Say so where the format's least structure, one block for instance, is far above the target.

    Half above is more than any format has to round in a layer that is large for it.
    """
    if layer.density <= 1.5 * layer.target_density:
        return ""
    return f"the format holds no less than density {layer.density:.4g} here"


def row_of(entry: Found, layer: SparseLayer | Participating | None, remark: str) -> LayerReport:
    """Return the row of an entry, and of the layer that takes its place if there is one."""
    kind, aliases = type(entry.module).__name__, tuple(entry.names[1:])
    now = layer if layer is not None else entry.module
    if isinstance(now, SparseModule | Participating):
        nnz = now.capacity if now.structure.is_meta else now.nnz
        sparse = (now.format, now.target_density, nnz / max(1, entry.size), nnz)
    else:
        sparse = ("", 1.0, 1.0, entry.size)
    return LayerReport(
        entry.name, kind, entry.shape, layer is not None, remark, *sparse, aliases=aliases
    )


def densify(model: nn.Module) -> ModelReport:
    """Replace every sparse layer of a model by the dense one with the same map, in place.

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
    model = unfreeze(changeable(model))
    for entry in survey(model):
        sparse = isinstance(entry.module, SparseLayer) and bool(entry.places)
        if isinstance(entry.module, SparseLayer) and sparse:
            swap(entry, entry.module.to_dense())
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


def _why_not_densified(entry: Found) -> str:
    if isinstance(entry.module, SparseLayer):
        return "it is the model itself: use to_dense()"
    if isinstance(entry.module, Participating):
        return "it holds all its weights: use dense() for them, or to_sparse()"
    return "already dense"


def sparsify_like(model: nn.Module, state_dict: Mapping[str, Tensor]) -> ModelReport:
    """Build the sparse layers that a checkpoint describes, in place; then load the checkpoint.

    Structure words say format, shape and structure, so nothing else needs to be known of the run
    that saved them: ``sparsify_like(model, state); model.load_state_dict(state)``.

    Parameters
    ----------
    model : nn.Module
        A fresh model, dense where the checkpoint is sparse; on meta, too (``assign=True`` then).
    state_dict : mapping of str to Tensor
        Of a model whose layers were sparsified, under the names of `model`.

    Returns
    -------
    ModelReport
        A row for every weight of the model; the rebuilt ones are taken.

    Raises
    ------
    FormatError
        Where words are corrupt or fit no layer of the model, which then stays as it was.
    """
    model = changeable(model)
    found = survey(model)
    layers = {id(entry): _like(entry, state_dict) for entry in found}
    names = {f"{name}.structure".lstrip(".") for entry in found for name in entry.names}
    unknown = [key for key in state_dict if key.split(".")[-1] == "structure" and key not in names]
    if unknown:
        raise format_error(
            f"{', '.join(unknown)} in the state", "names of the model's layers", "rename its keys"
        )
    rows = []
    for entry in found:
        layer = layers[id(entry)]
        rows.append(row_of(entry, layer, "" if layer else "not sparse in the state"))
        if layer is not None:
            swap(entry, layer)
    set_fast_paths(model)
    return ModelReport(tuple(rows))


def _like(entry: Found, state: Mapping[str, Tensor]) -> SparseLayer | None:
    """Build the layer that a state describes for an entry; None where it describes none."""
    keys = (f"{name}.".lstrip(".") for name in entry.names)
    key = next((key for key in keys if key + "structure" in state), None)
    if key is None:
        return None
    words, values = state[key + "structure"], state.get(key + "values")
    structure = decode_structure(words.detach().cpu().numpy())
    again = isinstance(entry.module, SparseModule)
    reason = "" if again and entry.places else why_unfit(entry, {}, empty=True)
    fits = not reason and structure.shape == sparse_class(as_dense(entry.module))._flat_shape(
        entry.shape
    )
    if not fits or values is None:
        raise format_error(
            f"a {structure.cls.format} weight of shape {structure.shape} for {entry.name}",
            f"a layer of this shape, and its values; it is {entry.shape}, {reason}",
            "build the model as in the run that saved the state",
        )
    tensor = structure.tensor(np.zeros(structure.nnz, np.float32))
    dense = as_dense(entry.module)
    layer = sparse_class(dense)._gathered(dense, tensor, values.numel(), None, {})
    if layer.structure.shape != words.shape:  # of parameters that need more words, or fewer
        layer.structure = words.detach().clone().to(layer.structure.device)
    return layer


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: weights decay, biases and norms do not.

    A weight is what has two dimensions or more, and `values` of a sparse layer, which has one.

    Parameters
    ----------
    model : nn.Module
    weight_decay : float
        Of the first group; that of the second is 0.

    Returns
    -------
    list of dict
        For instance for ``torch.optim.AdamW(decay_groups(model, 0.1))``; frozen ones are left out.
    """
    if not weight_decay >= 0:
        raise format_error(f"weight_decay={weight_decay}", "at least 0", "pass 0.1, for example")
    values = {id(m.values) for m in model.modules() if isinstance(m, SparseModule)}
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trained if p.dim() >= 2 or id(p) in values]
    chosen = set(map(id, weights))
    others = [p for p in trained if id(p) not in chosen]
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
