"""Gradual magnitude pruning (Zhu & Gupta, To prune, or not to prune, 2017), for every format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spfmt.errors import format_error
from spfmt.formats import SparseTensor
from spfmt.torch.module import SparseModule
from spfmt.torch.report import ModelReport
from spfmt.torch.sparsify import Distribution, layer_densities
from spfmt.train.base import SparseTrainer
from spfmt.train.choice import magnitudes, smallest
from spfmt.train.schedule import CubicSchedule
from spfmt.train.start import Start, started

__all__ = ["GradualPruning"]


class GradualPruning(SparseTrainer):
    """Take the smallest weights away little by little, while training goes on.

    Every `delta_t` steps from `t_start` on, each layer keeps the weights of its format that have
    the most magnitude, at the density of the cubic schedule (eq. 1 of the paper); none ever comes
    back. Begin with a trained dense model, or with full layers. Where formats allow few densities
    (N:M, constant fan-in), a layer stays as it is until the schedule has passed the next one.

    Parameters
    ----------
    model, optimizer, seed, averages, process_group
        As for :class:`SparseTrainer`.
    format, include, exclude, **params
        For :func:`spfmt.torch.sparsify`, which makes a dense model's layers sparse and full: all by
        default, the first convolution too, as CSR. None where layers are sparse already.
    distribution : {"uniform", "erk"}
        Of one density over the layers.
    density : float or mapping of str to float
        At the end: of all layers together, or by name.
    scope : {"layer", "model"}
        Whether the weights of each layer are ranked, or those of all layers together: then
        densities say how many weights the model keeps, and magnitudes where.
    delta_t : int
        Steps between updates.
    t_start, t_end : int or float
        Where pruning begins and ends: steps, or fractions of `total_steps`.
    total_steps : int, optional

    Attributes
    ----------
    first, last : dict of str to int
        Weights of every layer before and after.

    Raises
    ------
    FormatError
        For a density out of (0, 1) or above a layer's own, names that are no layers, or a schedule
        without an update.

    Notes
    -----
    Time falls with the weights; memory does not, since the optimizer's references stay what they
    are: :func:`spfmt.torch.sparsify` of the result, or its export, holds what is left.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> method = GradualPruning(model, optimizer, density=0.25, delta_t=2, t_end=8)
    >>> for step in range(8):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(16, 64)).square().mean().backward()
    ...     optimizer.step()
    ...     changed = method.step()
    >>> [round(layer.density, 2) for layer in model]
    [0.25, 0.25]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        density: float | Mapping[str, float],
        format: str | None = None,
        include: Any = None,
        exclude: Any = None,
        distribution: Distribution = "uniform",
        scope: Literal["layer", "model"] = "layer",
        delta_t: int = 100,
        t_start: int | float = 0,
        t_end: int | float = 0.75,
        total_steps: int | None = None,
        seed: int = 0,
        averages: Any = (),
        process_group: Any = None,
        **params: Any,
    ) -> None:
        if scope not in ("layer", "model"):
            raise format_error(f"scope={scope!r}", "'layer' or 'model'", "use one of them")
        for name in ("alpha", "reset", "scores", "sparsity"):  # of other methods
            if given := params.pop(name, None):
                raise format_error(
                    f"{name}={given!r} for gradual pruning",
                    "none: full layers lose their smallest weights on a cubic schedule",
                    "leave it out",
                )
        self._density, self._distribution, self.scope = density, distribution, scope
        self._shared: dict[str, int] = {}
        schedule = CubicSchedule.until(t_end, total_steps, t_start=t_start, delta_t=delta_t)
        super().__init__(
            model, optimizer, format=format, include=include, exclude=exclude, seed=seed,
            averages=averages, process_group=process_group, schedule=schedule, **params,
        )  # fmt: skip

    def _started(
        self, model: nn.Module, start: Start, seed: int
    ) -> AbstractContextManager[ModelReport | None]:
        """Make dense layers full ones."""
        if not start.asked and any(isinstance(layer, SparseModule) for layer in model.modules()):
            return nullcontext()
        given = self._density if isinstance(self._density, Mapping) else None
        full = {
            "format": start.format or self.FORMAT,
            "density": dict.fromkeys(given, 1.0) if given else 1.0,
            "include": "*" if start.include is None else start.include,
            "exclude": start.exclude,
            "reset": False,
        }
        return started(model, self.optimizer, {**full, **start.params})

    def _check_layers(self) -> None:
        super()._check_layers()
        self.first = {name: layer.nnz for name, layer in self.layers.items()}
        self.last = self._last()

    def _last(self) -> dict[str, int]:
        densities = self._density
        if not isinstance(densities, Mapping):
            shapes = {name: layer.shape for name, layer in self.layers.items()}
            densities = layer_densities(shapes, densities, self._distribution)
        unknown = [name for name in densities if name not in self.layers]
        if unknown or len(densities) < len(self.layers):
            raise format_error(
                f"densities of {', '.join(densities) or 'no layer'}",
                f"one of each of {', '.join(self.layers)}",
                "name every sparse layer, or pass one number",
            )
        for name, share in densities.items():
            self._check_density(name, share)
        self._targets = {name: float(share) for name, share in densities.items()}
        sizes = {name: math.prod(layer.shape) for name, layer in self.layers.items()}
        return {name: round(share * sizes[name]) for name, share in self._targets.items()}

    def _check_density(self, name: str, density: float) -> None:
        size = math.prod(self.layers[name].shape)
        if not 0.0 < density < 1.0 or round(density * size) > self.first[name]:
            raise format_error(
                f"density={density} for {name} of density {self.layers[name].density:.4g}",
                "less than what it has, above 0",
                "begin with layers that are full: sparsify(model, format, density=1.0)",
            )

    def budget(self, name: str, step: int) -> int:
        """Return how many weights a layer keeps after a step: round((1 - s_t)·R·C)."""
        assert isinstance(self.schedule, CubicSchedule)
        size, last = math.prod(self.layers[name].shape), self._targets[name]
        return round((last + (self.first[name] / size - last) * self.schedule.left(step)) * size)

    @torch.no_grad()
    def update(self) -> bool:
        """Update the topology of every layer; see :meth:`SparseTrainer.update`."""
        self._shared = self._ranked_together() if self.scope == "model" else {}
        return super().update()

    def _ranked_together(self) -> dict[str, int]:
        """Return how many weights layers keep where the largest of the model stay, ties last."""
        trained = self._trained()
        weights = {name: magnitudes(layer) for name, layer in trained.items()}
        budget = sum(self.budget(name, self.steps) for name in trained)
        held = [found.size for found in weights.values()]
        if not trained or sum(held) <= budget:
            return dict(zip(weights, held, strict=True))
        gone = smallest(np.concatenate(list(weights.values())), sum(held) - budget)
        layer = np.searchsorted(np.cumsum(held), gone, side="right")
        lost = np.bincount(layer, minlength=len(held))
        return {name: n - int(k) for name, n, k in zip(weights, held, lost, strict=True)}

    def n_drop(self, layer: SparseModule, step: int) -> int:
        """Return how many weights are more than the schedule allows."""
        name = self.name_of(layer)
        return max(0, layer.nnz - self._shared.get(name, self.budget(name, step)))

    def rewire(self, layer: SparseModule, n_drop: int) -> tuple[SparseTensor, NDArray[np.int64]]:
        """Choose the next structure of a layer; see :meth:`SparseTrainer.rewire`."""
        positions, weights = layer.positions(), magnitudes(layer)
        scores = np.zeros(math.prod(layer.shape), weights.dtype)
        # A weight of zero is still one: it goes before a position that has none.
        scores[positions] = np.maximum(weights, np.finfo(weights.dtype).tiny)
        density = (layer.nnz - n_drop) / scores.size
        found = self.fitting(layer, scores.reshape(layer.shape), density)
        return found if found.nnz < layer.nnz else layer.tensor(), np.empty(0, np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`SparseTrainer.state_dict` does, and where pruning began."""
        return {**super().state_dict(), "first": dict(self.first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`; see :meth:`SparseTrainer.load_state_dict`."""
        first = {name: int(n) for name, n in state.get("first", {}).items()}
        fits = first.keys() == self.first.keys() and all(
            self.last[name] <= first[name] <= layer.capacity for name, layer in self.layers.items()
        )
        if not fits:
            raise format_error(
                f"a state that began with {first} weights",
                f"one of layers {', '.join(self.layers)}, of no more than their capacities",
                "load the state of a run with the same densities",
            )
        super().load_state_dict(state)
        self.first = first
