"""What `sparsify` and `densify` did to a model: one row per weight, with the reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["LayerReport", "ModelReport", "table"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of cells into a text table; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class LayerReport:
    """One weight of a model.

    Attributes
    ----------
    name : str
        Qualified name of the module; further names of a shared module are in `aliases`.
    kind : str
        Class of the module before the call.
    shape : tuple of int
        Shape of the weight.
    taken : bool
        Whether the module was replaced.
    reason : str
        Why it was left; for a taken one a remark, or nothing.
    format : str
        The format, empty for a dense weight.
    target_density, density : float
        What was asked for and what the layer has now.
    nnz : int
        Stored weights now.
    aliases : tuple of str
        Other names of the same module.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    taken: bool
    reason: str = ""
    format: str = ""
    target_density: float = 1.0
    density: float = 1.0
    nnz: int = 0
    aliases: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of weights of the dense layer."""
        return math.prod(self.shape) if self.shape else 0

    def cells(self) -> tuple[str, ...]:
        """Return the row of the printed table."""
        return (
            " = ".join((self.name, *self.aliases)),
            self.kind,
            "x".join(map(str, self.shape)),
            self.format or "dense",
            f"{self.target_density:.4f}",
            f"{self.density:.4f}",
            str(self.nnz),
            "taken" if self.taken else "left",
            self.reason,
        )


_HEAD = ("layer", "kind", "shape", "now", "target", "density", "weights", "", "reason")


@dataclass(frozen=True)
class ModelReport:
    """Every weight of a model that a call took, and every one that it left; prints as a table.

    Attributes
    ----------
    layers : tuple of LayerReport
        In the order of ``model.named_modules()``.
    """

    layers: tuple[LayerReport, ...]

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
            if name in (layer.name, *layer.aliases):
                return layer
        raise KeyError(name)

    @property
    def taken(self) -> tuple[LayerReport, ...]:
        """Layers that were replaced."""
        return tuple(layer for layer in self.layers if layer.taken)

    @property
    def left(self) -> tuple[LayerReport, ...]:
        """Weights that stay as they were; each has its reason."""
        return tuple(layer for layer in self.layers if not layer.taken)

    @property
    def density(self) -> float:
        """Stored weights over all weights of the layers that were taken."""
        return sum(layer.nnz for layer in self.taken) / max(1, sum(t.size for t in self.taken))

    def __str__(self) -> str:
        text = table([_HEAD, *(layer.cells() for layer in self.layers)])
        total = f"{len(self.taken)} taken at density {self.density:.4f}, {len(self.left)} left"
        return f"{text}\n{total}"
