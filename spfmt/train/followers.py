"""What belongs to weights and moves with them: optimizer state, gradients, averages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spfmt.errors import FormatError, format_error
from spfmt.formats import decode_structure
from spfmt.torch.module import SparseModule, move

__all__ = ["Averages", "OptimizerState"]


class OptimizerState:
    """The per-weight state of an optimizer and of those that it wraps.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Itself one, or an object that holds others as attributes: ``ZeroRedundancyOptimizer.optim``,
        ``Lookahead.optimizer``, ``SAM.base_optimizer``.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        if any(isinstance(inner, torch.optim.LBFGS) for inner in self.all()):
            raise format_error(
                "L-BFGS, whose history is one vector over all parameters",
                "an element-wise optimizer",
                "train with SGD, Adam or AdamW",
            )

    def check_holds(self, name: str, layer: SparseModule) -> None:
        """Refuse to move a layer whose values are not whole, or not those that are trained."""
        values = layer.values
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if values.requires_grad and id(values) not in held:
            raise format_error(
                f"an optimizer without {name}.values",
                "one that holds the values of every sparse layer",
                "make the optimizer after sparsify(model, ...) and after fully_shard(model); "
                "where fully_shard gathered values for evaluation, call model.reshard() first",
            )
        if values.shape[0] < layer.nnz:
            raise format_error(
                f"{values.shape[0]} of the {layer.nnz} weights of {name} on this rank",
                "all of them, or a DTensor that knows the others",
                "shard with torch.distributed.fsdp.fully_shard",
            )

    def check_follows(self, name: str, values: nn.Parameter) -> None:
        """Refuse state of another shape, or out of reach: it could not follow its weights."""
        for state in self._of(values):
            for key, part in _parts(state):
                if part.numel() > 1 and part.shape != values.shape:
                    raise format_error(
                        f"optimizer state {key!r} of shape {tuple(part.shape)} for {name}.values",
                        f"state of the parameter's shape {tuple(values.shape)}",
                        "train with SGD, Adam, AdamW or another element-wise optimizer",
                    )
        hidden = None if any(self._of(values)) else self._hidden(values.numel())
        if hidden:
            raise format_error(
                f"an optimizer that keeps state in {hidden}, and none of {name}.values in `state`",
                "state by parameter in optimizer.state, or in that of an optimizer it wraps",
                "train with an optimizer of torch.optim, or one that wraps it",
            )

    def follow(self, values: nn.Parameter, source: Tensor) -> None:
        """Move state and a gradient that is still there."""
        for state in self._of(values):
            for _, part in _parts(state):
                if part.shape == values.shape:
                    move(part, source)
        if values.grad is not None:
            move(values.grad, source)

    def all(self) -> Iterator[Any]:
        """Return the optimizer and all that it holds, each once."""
        found, seen = [self.optimizer], set()
        while found:
            optimizer = found.pop()
            if id(optimizer) in seen:
                continue
            seen.add(id(optimizer))
            yield optimizer
            found += [inner for inner in _attributes(optimizer).values() if _is_optimizer(inner)]

    def tensors(self, values: nn.Parameter) -> Iterator[Tensor]:
        """Return all tensors of a parameter's state."""
        for state in self._of(values):
            for _, part in _parts(state):
                yield part

    def _of(self, values: nn.Parameter) -> list[dict[str, Any]]:
        """Every dictionary of state for a parameter; wrappers may share one."""
        held = (getattr(optimizer, "state", None) for optimizer in self.all())
        states = [state.get(values) for state in held if isinstance(state, Mapping)]
        return list({id(state): state for state in states if state}.values())

    def _hidden(self, size: int) -> str | None:
        """Name what an innermost optimizer holds, other than `state`, that is large enough."""
        for optimizer in self.all():
            attributes = _attributes(optimizer)
            if any(map(_is_optimizer, attributes.values())):
                continue  # a wrapper: buckets, schedules, references to parameters
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, value in attributes.items():
                if name not in ("state", "param_groups", "defaults"):
                    tensors = (
                        t for t in _tensors(value) if t.numel() >= size and id(t) not in held
                    )
                    if any(t.is_floating_point() for t in tensors):
                        return f"{type(optimizer).__name__}.{name}"
        return None


def _parts(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors of a parameter's state, those in its lists too."""
    for key, entry in state.items():
        for part in entry if isinstance(entry, list | tuple) else [entry]:
            if isinstance(part, Tensor):
                yield key, part


def _attributes(optimizer: Any) -> dict[str, Any]:
    return getattr(optimizer, "__dict__", {})


def _is_optimizer(candidate: Any) -> bool:
    return hasattr(candidate, "param_groups") and hasattr(candidate, "step")


def _tensors(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Return the tensors in a value, in containers and in objects that hold its parts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        return  # a model that the optimizer knows
    elif depth and isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, list | tuple | set):
        for item in value:
            yield from _tensors(item, depth - 1)
    elif depth and hasattr(value, "__dict__") and not callable(value):
        yield from _tensors(vars(value), depth - 1)


class Averages:
    """Averages of a model that follow its weights: models, or mappings from names to tensors.

    Parameters
    ----------
    given : nn.Module, mapping, or iterable of them
    layers : mapping of str to SparseModule
        Of the model that is trained.

    Raises
    ------
    FormatError
        Where an average does not have all the layers, or stands for other positions.
    """

    def __init__(self, given: Any, layers: Mapping[str, SparseModule]) -> None:
        self._given: list[Any] = []
        self.add(given, layers)

    def add(self, given: Any, layers: Mapping[str, SparseModule]) -> None:
        """Take more averages; none of them where one does not fit."""
        averages = [given] if isinstance(given, nn.Module | Mapping) else list(given)
        for name, layer in layers.items():
            _check(averages, name, layer)
        self._given += averages
        for name, layer in layers.items():
            for twin in filter(None, (_layer_of(average, name) for average in averages)):
                layer.lead(twin)

    def check(self, name: str, layer: SparseModule) -> None:
        """Refuse to move a layer where an average stands on other positions, or is unclear."""
        _check(self._given, name, layer)
        layer.averages()

    @torch.no_grad()
    def follow(self, name: str, layer: SparseModule, source: Tensor) -> None:
        """Move the mappings; an average that is a model has moved with the layer."""
        for average in self._given:
            if _layer_of(average, name) is None:
                values, structure = _pair(average, name)
                move(values, source)
                if structure is not None:
                    structure.copy_(layer.structure)


def _check(averages: Iterable[Any], name: str, layer: SparseModule) -> None:
    """Refuse averages of a layer that do not stand for the layer's positions now."""
    for average in averages:
        values, structure = _pair(average, name)
        fits = values.shape == layer.values.shape
        if not fits or (structure is not None and not _is_on(structure, layer)):
            raise format_error(
                f"an average of {name} with {values.numel()} values on other positions",
                f"{layer.capacity} values on the layer's positions",
                "make the average of the model as it is now",
            )


def _layer_of(average: Any, name: str) -> SparseModule | None:
    """Return a model's layer of a name, with or without a wrapper's ``module.`` before it."""
    if not isinstance(average, nn.Module):
        return None
    modules = dict(average.named_modules())
    found = (modules.get(prefix + name) for prefix in ("", "module.", "_orig_mod."))
    return next((module for module in found if isinstance(module, SparseModule)), None)


def _pair(average: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Return the values, and if there are any the structure words, of a layer in an average."""
    layer = _layer_of(average, name)
    if layer is not None:
        return layer.values, layer.structure
    if isinstance(average, Mapping):
        for prefix in ("", "module.", "_orig_mod."):
            key = f"{prefix}{name}.".lstrip(".")
            if isinstance(average.get(key + "values"), Tensor):
                return average[key + "values"], average.get(key + "structure")
    raise format_error(
        f"an average of type {type(average).__name__} without {name}.values",
        "a copy of the model, or a mapping with the names of its parameters",
        "pass averages=AveragedModel(model), or averages=[ema_state_dict]",
    )


def _is_on(structure: Tensor, layer: SparseModule) -> bool:
    """Tell whether words are a layer's, or were until averaging rounded them."""
    if structure.shape != layer.structure.shape:
        return False
    try:
        found = decode_structure(structure.detach().cpu().numpy())
    except FormatError:
        return layer._lineage.is_near(structure)
    return found.same_as(layer._decoded())
