"""How far a run of a method is: steps, changes, positions that held a weight; told and resumed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spfmt.errors import format_error
from spfmt.structure._checks import as_int
from spfmt.torch.report import ModelReport
from spfmt.train.summary import LayerSummary, TrainerSummary, summarise

__all__ = ["Progress"]

_STATE = ("method", "steps", "updates", "explored")


class Progress:
    """Base of what calls itself a method: counts, tells and resumes.

    Attributes
    ----------
    layers : dict of str to nn.Module
        That have `packed_mask`, `tensor`, `positions`, `shape` and `target_density`.
    report : ModelReport or None
        Which layers were made, and why others were not.
    steps, updates : int
        Optimizer steps so far, and how many of them changed the topology.
    """

    layers: Any
    report: ModelReport | None
    schedule: Any

    def _check_any_layer(self) -> None:
        """Refuse a model of which no layer is left to train, and say why each stays dense.

        Raises
        ------
        FormatError
        """
        if self.layers:
            return
        if self.report is None:
            raise format_error(
                "a model without a layer that this method trains, and no density",
                "at least one such layer, or a density to make some",
                "pass density=0.1",
            )
        raise format_error(
            f"a model of which every layer stays dense\n{self.report}",
            "at least one that does not",
            "change what the reasons name: the density, the format's parameters, or include=[...]",
        )

    def _begin(self) -> None:
        """Start to count, with the layers as they are."""
        self.steps = self.updates = 0
        self._explored: dict[str, NDArray[np.uint8]] = {
            name: layer.packed_mask() for name, layer in self.layers.items()
        }

    def __str__(self) -> str:
        dense = () if self.report is None else self.report.left
        left = [f"{layer.name} stays dense: {layer.reason}" for layer in dense]
        return "\n".join([f"{type(self).__name__}, {self._settings()}", str(self.summary()), *left])

    def _settings(self) -> str:
        return str(self.schedule)

    def summary(self) -> TrainerSummary:
        """Return the state of every layer; print it for a table."""
        rows = [self._summarise(name, layer) for name, layer in self.layers.items()]
        return TrainerSummary(self.steps, self.updates, tuple(rows))

    def _summarise(self, name: str, layer: Any) -> LayerSummary:
        explored = int(np.unpackbits(self._explored[name]).sum())
        return summarise(name, layer, explored / max(1, math.prod(layer.shape)))

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on bit for bit, beside the model's and the optimizer's."""
        bits = {name: torch.from_numpy(seen.copy()) for name, seen in self._explored.items()}
        method = type(self).__name__
        return {"method": method, "steps": self.steps, "updates": self.updates, "explored": bits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`, of a method made with the same arguments for the same model.

        Load the model and the optimizer as well; their order does not matter.

        Raises
        ------
        FormatError
            For the state of another method or of other layers, or a damaged one; nothing is changed
            then.
        """
        self._check_state(state)
        self.steps, self.updates = int(state["steps"]), int(state["updates"])
        self._explored = {n: bits.cpu().numpy().copy() for n, bits in state["explored"].items()}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that cannot be taken over."""
        missing = [name for name in _STATE if name not in state]
        method = type(self).__name__
        if missing or state["method"] != method:
            raise format_error(
                f"a state without {', '.join(missing)}"
                if missing
                else f"the state of {state['method']}",
                f"what state_dict() of {method} returned",
                f"load it into the method that wrote it, or the state of a {method} run into this",
            )
        for name in ("steps", "updates"):
            as_int(name, state[name], 0, sys.maxsize)
        sizes = {name: tuple(bits.shape) for name, bits in state["explored"].items()}
        if sizes != {name: bits.shape for name, bits in self._explored.items()}:
            raise format_error(
                f"the state of layers {', '.join(sizes)}",
                f"that of layers {', '.join(self._explored)}, of their sizes",
                "sparsify the model, and make the method, as in the run that wrote the state",
            )
