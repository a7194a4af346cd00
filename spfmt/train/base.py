"""What all methods share: when to update, moving weights with their optimizer state, resuming."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spfmt.errors import format_error
from spfmt.formats import SparseTensor, get_format
from spfmt.torch.linear import SparseLinear
from spfmt.torch.module import follow
from spfmt.torch.report import table
from spfmt.torch.wrappers import unwrapped
from spfmt.train.schedule import CosineSchedule

# A structure drawn with the caller's seed 0 and growth drawn with the trainer's seed 0 must not be
# the same random numbers: every dropped weight would be the first to grow again.
_SEED_OFFSET = 0x5EED_0000  # within the 32 bits that the generator looks at

__all__ = ["LayerSummary", "SparseTrainer", "TrainerSummary"]


@dataclass(frozen=True)
class LayerSummary:
    """The state of one layer.

    Attributes
    ----------
    name : str
        Qualified name of the module.
    shape : tuple of int
        (R, C).
    format, structure : str
        Name of the format and its own description (fan-in, blocks, …).
    target_density, density : float
        What was asked for, and stored positions over R·C now.
    active_rows : int
        Rows with at least one weight.
    mean_fan_in : float
        Weights per active row.
    exploration : float
        In-time over-parametrisation rate: share of all positions that held a weight at some time
        (Liu et al., Do We Actually Need Dense Over-Parameterization?, 2021).
    """

    name: str
    shape: tuple[int, int]
    format: str
    structure: str
    target_density: float
    density: float
    active_rows: int
    mean_fan_in: float
    exploration: float

    def cells(self) -> tuple[str, ...]:
        """Return the row of the printed table."""
        return (
            self.name,
            f"{self.shape[0]}x{self.shape[1]}",
            self.format,
            f"{self.target_density:.4f}",
            f"{self.density:.4f}",
            f"{self.active_rows}/{self.shape[0]}",
            f"{self.mean_fan_in:.1f}",
            f"{self.exploration:.4f}",
            self.structure,
        )


_HEAD = (
    "layer",
    "shape",
    "format",
    "target",
    "density",
    "active rows",
    "fan-in",
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
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        seen = sum(layer.exploration * size for layer, size in zip(self.layers, sizes, strict=True))
        return seen / max(1, sum(sizes))

    def __iter__(self) -> Iterator[LayerSummary]:
        return iter(self.layers)

    def __str__(self) -> str:
        text = table([_HEAD, *(layer.cells() for layer in self.layers)])
        total = f"{self.steps} steps, {self.updates} updates, explored {self.exploration:.4f}"
        return f"{text}\n{total}"


class SparseTrainer(ABC):
    """Base of the training methods: calls `rewire` on schedule and moves what belongs to weights.

    Call :meth:`step` once after every ``optimizer.step()``. A method implements :meth:`rewire`.

    Parameters
    ----------
    model : nn.Module
        Holds `SparseLinear` layers (see :func:`spfmt.torch.sparsify`), may be wrapped or compiled.
    optimizer : torch.optim.Optimizer
        Made after the layers, so that it holds their `values`. State tensors of a parameter's own
        shape (SGD momentum; Adam's and AdamW's moments) follow their weights, new weights start
        with zero state.
    alpha : float
        Share of the weights that the first update drops.
    delta_t : int
        Steps between updates.
    t_end : int or float
        Where updates end: a step, or a fraction of `total_steps`.
    total_steps : int, optional
        Steps of the whole run, needed where `t_end` is a fraction.
    seed : int
        Of the trainer's own random generator. Under DDP all ranks need one seed; weights are equal
        on all ranks after a step, so the topologies are equal too.

    Raises
    ------
    FormatError
        Where the model has no sparse layer, or the optimizer does not hold the values of one that
        is not frozen.

    Notes
    -----
    An update holds one layer's scores (R·C float32) at a time; weights, gradients and optimizer
    state never grow. Parameters, buffers and the optimizer's references stay the same objects, so
    compiled models, DDP and ``state_dict`` see nothing but new content.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        alpha: float = 0.3,
        delta_t: int = 100,
        t_end: int | float = 0.75,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        self.schedule = CosineSchedule.until(t_end, total_steps, alpha=alpha, delta_t=delta_t)
        self.optimizer = optimizer
        self.layers: dict[str, SparseLinear] = {
            name: module
            for name, module in unwrapped(model).named_modules()
            if isinstance(module, SparseLinear)
        }
        self.generator = torch.Generator().manual_seed(_SEED_OFFSET + seed)
        self.steps = 0
        self.updates = 0
        self._check_layers()
        self._explored = {name: _packed_mask(layer) for name, layer in self.layers.items()}

    def _check_layers(self) -> None:
        if not self.layers:
            raise format_error(
                "a model without sparse layers",
                "at least one SparseLinear",
                "call sparsify(model, ...)",
            )
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise format_error(
                "L-BFGS, whose history is one vector over all parameters",
                "an element-wise optimizer",
                "train with SGD, Adam or AdamW",
            )
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, layer in self.layers.items():
            if layer.values.requires_grad and id(layer.values) not in held:
                raise format_error(
                    f"an optimizer without {name}.values",
                    "one that holds the values of every sparse layer",
                    "make the optimizer after sparsify(model, ...)",
                )

    # --------------------------------------------------------------------------------- stepping

    def step(self) -> bool:
        """Count one optimizer step and update the topology if it is due.

        Returns
        -------
        bool
            Whether the topology changed.
        """
        self.steps += 1
        if not self.schedule.is_update(self.steps):
            return False
        return self.update()

    @torch.no_grad()
    def update(self) -> bool:
        """Update the topology of every layer now, whatever the schedule says about the time.

        A frozen layer (``values.requires_grad`` is False) stays as it is: weights that grew there
        would stay zero.

        Returns
        -------
        bool
            Whether any weight moved.
        """
        trained = {n: layer for n, layer in self.layers.items() if layer.values.requires_grad}
        for name, layer in trained.items():
            self._check_state(name, layer.values)
        moved = [self._update_layer(name, layer) for name, layer in trained.items()]
        self.updates += any(moved)
        return any(moved)

    def _update_layer(self, name: str, layer: SparseLinear) -> bool:
        n_drop = self.schedule.n_drop(self.steps, layer.nnz)
        # A full layer (erk gives small ones density 1) could only grow what it dropped, as zeros.
        if n_drop == 0 or layer.nnz == layer.out_features * layer.in_features:
            return False
        before = _packed_mask(layer)
        structure, forgotten = self.rewire(layer, n_drop)
        source = layer.set_structure(structure, forget=forgotten)
        self._move_state(layer.values, source)
        after = _packed_mask(layer)
        self._explored[name] |= after
        return not np.array_equal(before, after)

    @abstractmethod
    def rewire(self, layer: SparseLinear, n_drop: int) -> tuple[SparseTensor, NDArray[np.int64]]:
        """Choose the next structure of a layer.

        Parameters
        ----------
        layer : SparseLinear
        n_drop : int
            How many weights the schedule drops, at least 1.

        Returns
        -------
        structure : SparseTensor
            Of the layer's format, with at most ``layer.capacity`` positions.
        forgotten : ndarray of int64
            Places in ``layer.values`` whose weights start from zero even where their positions are
            in `structure`.
        """

    def fitting(self, layer: SparseLinear, scores: NDArray[Any]) -> SparseTensor:
        """Return the structure that keeps the most of `scores` at the layer's target density.

        Where sizes are not multiples of a block, structures of equally many blocks differ in their
        number of weights; one that exceeds the layer's capacity is searched again at a density as
        much smaller as it takes.
        """
        search = get_format(layer.format).from_scores
        size = scores.size
        density, step = layer.target_density, 0
        found: SparseTensor = search(scores, density, **layer.format_params)
        while found.nnz > layer.capacity:
            step = max(1, 2 * step, found.nnz - layer.capacity)
            density = max(0.0, density - step / size)
            found = search(scores, density, **layer.format_params)
        return found

    # --------------------------------------------------------------------------- optimizer state

    def _check_state(self, name: str, values: nn.Parameter) -> None:
        """Refuse optimizer state of weights that has another shape and so cannot follow them."""
        for key, state in self.optimizer.state.get(values, {}).items():
            parts = state if isinstance(state, list | tuple) else [state]
            for part in parts:
                if isinstance(part, Tensor) and part.numel() > 1 and part.shape != values.shape:
                    raise format_error(
                        f"optimizer state {key!r} of shape {tuple(part.shape)} for {name}.values",
                        f"state of the parameter's shape {tuple(values.shape)}",
                        "train with SGD, Adam, AdamW or another element-wise optimizer",
                    )

    def _move_state(self, values: nn.Parameter, source: Tensor) -> None:
        """Let optimizer state and a gradient that is still there follow their weights."""
        for state in self.optimizer.state.get(values, {}).values():
            if isinstance(state, Tensor) and state.shape == values.shape:
                state.copy_(follow(state, source.to(state.device)))
        if values.grad is not None:
            values.grad.copy_(follow(values.grad, source))

    # ---------------------------------------------------------------------------------- reporting

    def summary(self) -> TrainerSummary:
        """Return the state of every layer; print it for a table."""
        rows = [self._summarise(name, layer) for name, layer in self.layers.items()]
        return TrainerSummary(self.steps, self.updates, tuple(rows))

    def _summarise(self, name: str, layer: SparseLinear) -> LayerSummary:
        tensor = layer.tensor()
        active = np.unique(layer.positions() // max(1, layer.in_features)).size
        explored = int(np.unpackbits(self._explored[name]).sum())
        return LayerSummary(
            name=name,
            shape=layer.shape,
            format=layer.format,
            structure=tensor._summary(),
            target_density=layer.target_density,
            density=tensor.density,
            active_rows=active,
            mean_fan_in=tensor.nnz / max(1, active),
            exploration=explored / max(1, layer.out_features * layer.in_features),
        )

    # ----------------------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on bit for bit, beside the model's and the optimizer's."""
        return {
            "steps": self.steps,
            "updates": self.updates,
            "generator": self.generator.get_state(),
            "explored": {name: torch.from_numpy(b.copy()) for name, b in self._explored.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`, of a trainer made with the same arguments for the same model.

        Load the model and the optimizer as well; their order does not matter.

        Raises
        ------
        FormatError
            Where the layers differ; nothing is changed then.
        """
        explored = {name: b.cpu().numpy().copy() for name, b in state["explored"].items()}
        sizes = {name: bits.shape for name, bits in explored.items()}
        if sizes != {name: bits.shape for name, bits in self._explored.items()}:
            raise format_error(
                f"the state of layers {', '.join(sizes)}",
                f"that of layers {', '.join(self._explored)}, of their sizes",
                "sparsify the model as in the run that wrote the state",
            )
        steps, updates = int(state["steps"]), int(state["updates"])
        self.generator.set_state(state["generator"].cpu())
        self.steps, self.updates = steps, updates
        self._explored = explored


def _packed_mask(layer: SparseLinear) -> NDArray[np.uint8]:
    """Return one bit per position of a layer, row-major: whether it holds a weight."""
    mask = np.zeros(layer.out_features * layer.in_features, np.bool_)
    mask[layer.positions()] = True
    return np.packbits(mask)
