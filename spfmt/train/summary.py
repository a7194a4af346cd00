"""What a trainer tells about its layers: one row each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from spfmt.torch.report import table

__all__ = ["LayerSummary", "TrainerSummary", "summarise"]


@dataclass(frozen=True)
class LayerSummary:
    """The state of one layer.

    Attributes
    ----------
    name : str
        Qualified name of the module.
    shape : tuple of int
        Shape of the weight.
    format, structure : str
        Name of the format and its own description (fan-in, blocks, …).
    target_density, density : float
        What was asked for, and stored positions over all positions now.
    active_rows : int
        Rows with at least one weight.
    mean_fan_in : float
        Weights per active row.
    fill : float
        Share of the stored weights that are not zero: what a format had to store to complete its
        blocks, and what grew a moment ago, is.
    exploration : float
        In-time over-parametrisation rate: share of all positions that held a weight at some time
        (Liu et al., Do We Actually Need Dense Over-Parameterization?, 2021).
    """

    name: str
    shape: tuple[int, ...]
    format: str
    structure: str
    target_density: float
    density: float
    active_rows: int
    mean_fan_in: float
    fill: float
    exploration: float

    def cells(self) -> tuple[str, ...]:
        """Return the row of the printed table."""
        return (
            self.name,
            "x".join(map(str, self.shape)),
            self.format,
            f"{self.target_density:.4f}",
            f"{self.density:.4f}",
            f"{self.active_rows}/{self.shape[0]}",
            f"{self.mean_fan_in:.1f}",
            f"{self.fill:.4f}",
            f"{self.exploration:.4f}",
            self.structure,
        )


def summarise(name: str, layer: Any, exploration: float) -> LayerSummary:
    """Return the row of a layer with `tensor`, `positions`, `shape` and `target_density`."""
    tensor = layer.tensor()
    active = np.unique(layer.positions() // max(1, math.prod(layer.shape[1:]))).size
    return LayerSummary(
        name=name,
        shape=layer.shape,
        format=layer.format,
        structure=tensor._summary(),
        target_density=layer.target_density,
        density=tensor.density,
        active_rows=active,
        mean_fan_in=tensor.nnz / max(1, active),
        fill=np.count_nonzero(tensor.values) / max(1, tensor.nnz),
        exploration=exploration,
    )


_HEAD = (
    "layer",
    "shape",
    "format",
    "target",
    "density",
    "active rows",
    "fan-in",
    "fill",
    "explored",
    "structure",
)


@dataclass(frozen=True)
class TrainerSummary:
    """The state of a trainer; prints as a table.

    Attributes
    ----------
    steps, updates : int
        Optimizer steps seen, and changes of the topology so far.
    layers : tuple of LayerSummary
        In the order of ``model.named_modules()``.
    """

    steps: int
    updates: int
    layers: tuple[LayerSummary, ...]

    @property
    def exploration(self) -> float:
        """In-time over-parametrisation rate of all layers together."""
        sizes = [math.prod(layer.shape) for layer in self.layers]
        seen = sum(layer.exploration * size for layer, size in zip(self.layers, sizes, strict=True))
        return seen / max(1, sum(sizes))

    def __iter__(self) -> Iterator[LayerSummary]:
        return iter(self.layers)

    def __str__(self) -> str:
        text = table([_HEAD, *(layer.cells() for layer in self.layers)])
        total = f"{self.steps} steps, {self.updates} updates, explored {self.exploration:.4f}"
        return f"{text}\n{total}"
