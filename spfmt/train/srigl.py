"""SRigL: constant fan-in with neuron ablation (Lasby et al., ICLR 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spfmt.errors import format_error
from spfmt.formats import Condensed, SparseTensor
from spfmt.structure import per_row_topk, topk_columns
from spfmt.torch.module import SparseModule
from spfmt.train.choice import Floats, magnitudes, smallest
from spfmt.train.gradient import GradientTrainer

__all__ = ["SRigL"]


class SRigL(GradientTrainer):
    """RigL under a constant fan-in, with ablation of the neurons that few weights matter to.

    Every `delta_t` steps, per layer (R, C) of k0·R weights at the start and `nnz` now:

    1. **Drop** ``n_drop = floor(α·nnz/2·(1 + cos(t·π/T_end)))``, keep ``n_keep = nnz - n_drop``.
    2. **Salient** are the n_keep largest ``|w|`` and the n_drop largest ``|∂L/∂W|`` of the
       positions outside the mask, over the whole layer.
    3. **Ablate** the rows with fewer than ``max(1, floor(γ_sal·k0))`` salient weights. The
       threshold is lowered until the fan-in of the others is at most C. Chosen anew at every
       update: a row that was ablated comes back where enough large gradients are its own.
    4. **Fan-in** ``k = k0·R // (R - ablated)``: the initial k0·R holds for the whole run.
    5. **Move**: of the n_keep kept weights those in ablated rows go; a row with more than k is
       trimmed to its k largest ``|w|``, a row with fewer is filled by ``|∂L/∂W|`` from its
       positions that are not kept. A weight dropped in this update can only come back as a grown
       one.

    Kept weights keep value and optimizer state; grown ones start with zero in both. Of equal
    magnitudes the first in row-major order is dropped in step 1; wherever the largest are chosen,
    the first of equal ones is. An ablated row gives its bias and nothing else.

    Parameters
    ----------
    model, optimizer, **options
        As for :class:`SparseTrainer`; the paper's are its defaults. All sparse layers are of the
        format "condensed".
    gamma_sal : float
        γ_sal in [0, 1]; the paper takes 0.3, and 0.95 for vision transformers. 0 still ablates
        rows without any salient weight, as step 3 says.

    Attributes
    ----------
    budgets : dict of str to int
        k0·R of every layer: k0 = N // R with N = round(target_density·R·C), the fan-in that the
        format gives a layer without ablated rows.

    Raises
    ------
    FormatError
        For a layer of another format; where N < R, so that not all rows can hold a weight; where
        k0·R exceeds a layer's capacity; for a gamma_sal out of range.

    Notes
    -----
    The steps are section 3 of the paper and "The SRigL Algorithm" of its summary (ICLR blog). The
    public code differs, and these are not repeated here: it trims over-full rows by index, takes
    the fan-in from nonzero values (a trained zero is an ordinary weight), and leaves out the
    outputs of ablated rows instead of giving their bias.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> method = SRigL(model, optimizer, density={"0": 0.125, "1": 0.125}, gamma_sal=0.5,
    ...                delta_t=2, total_steps=8)
    >>> method.budgets
    {'0': 1024, '1': 160}
    """

    FORMAT = "condensed"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        gamma_sal: float = 0.3,
        **options: Any,
    ) -> None:
        if not 0.0 <= gamma_sal <= 1.0:
            raise format_error(
                f"gamma_sal={gamma_sal}", "a share in [0, 1]", "the paper takes 0.3, ViTs 0.95"
            )
        self.gamma_sal = float(gamma_sal)
        super().__init__(model, optimizer, **options)
        self.budgets = {name: _budget(layer) for name, layer in self.layers.items()}

    def check_layer(self, name: str, layer: SparseModule) -> None:
        """Refuse other formats, and layers too sparse for one weight in every row."""
        if layer.format != Condensed.format:
            raise format_error(
                f"{name} of format {layer.format!r}",
                "'condensed', whose rows can be ablated",
                'sparsify(model, "condensed", ...), or train with RigL, which takes every format',
            )
        rows, wanted = layer.shape[0], _wanted(layer)
        if wanted < rows:
            raise format_error(
                f"{name} with a budget of N = {wanted} weights for {rows} rows",
                "at least one weight for every row",
                f"raise its density to 1/{math.prod(layer.shape[1:])} or more, or leave it dense",
            )
        if _budget(layer) > layer.capacity:
            raise format_error(
                f"{name} with room for {layer.capacity} weights and a budget of {_budget(layer)}",
                "room for the budget",
                "make the layer with capacity=, or with the density that it has",
            )

    # ------------------------------------------------------------------------------------ update

    def rewire(self, layer: SparseModule, n_drop: int) -> tuple[SparseTensor, NDArray[np.int64]]:
        """Choose the next structure of a layer; see :meth:`SparseTrainer.rewire`."""
        budget = self.budgets[self.name_of(layer)]
        positions, weights = layer.positions(), magnitudes(layer)
        gradient = self.gradient(layer)
        dropped = smallest(weights, n_drop)  # step 1
        kept = np.delete(np.arange(layer.nnz), dropped)

        salient = _salient_per_row(gradient, positions, positions[kept], n_drop)  # step 2
        active = self._active_rows(salient, budget, gradient.shape[1])  # step 3
        fan_in = budget // active.size  # step 4
        stays = _trimmed(positions[kept], weights[kept], gradient.shape, active, fan_in)  # step 5
        gradient.reshape(-1)[positions[kept[stays]]] = np.inf  # before all others of their rows
        columns = per_row_topk(gradient[active], fan_in)
        values = np.zeros(columns.shape, np.float32)
        return Condensed(layer.shape, active, columns, values), dropped

    def _active_rows(self, salient: NDArray[np.int64], budget: int, cols: int) -> NDArray[np.int64]:
        """Return the rows that are not ablated, ascending: step 3."""
        rows = salient.size
        # The rounding guard keeps 0.29 * 100 from becoming 28.
        threshold = max(1, math.floor(self.gamma_sal * (budget // rows) + 1e-9))
        fewest = budget // (cols + 1) + 1  # of n rows, budget // n <= cols
        # Lowered step by step, the threshold ends where so many rows reach it.
        threshold = min(threshold, int(np.sort(salient)[rows - fewest]))
        return np.flatnonzero(salient >= threshold)

    # ---------------------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`SparseTrainer.state_dict` does, and the budget k0·R of every layer."""
        return {**super().state_dict(), "budgets": dict(self.budgets)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`; see :meth:`SparseTrainer.load_state_dict`."""
        budgets = {name: int(budget) for name, budget in state.get("budgets", {}).items()}
        fits = budgets.keys() == self.budgets.keys() and all(
            layer.shape[0] <= budgets[name] <= min(layer.capacity, math.prod(layer.shape))
            and budgets[name] % max(1, layer.shape[0]) == 0
            for name, layer in self.layers.items()
        )
        if not fits:
            raise format_error(
                f"a state with budgets {budgets}",
                f"k0·R of layers {', '.join(self.layers)}, within their capacities",
                "load the state of an SRigL run, with the model sparsified as there",
            )
        super().load_state_dict(state)
        self.budgets = budgets


def _wanted(layer: SparseModule) -> int:
    """N: the number of weights that the layer's target density stands for."""
    return round(layer.target_density * math.prod(layer.shape))


def _budget(layer: SparseModule) -> int:
    """k0·R: what the layer holds where no row is ablated, or would hold."""
    rows = layer.shape[0]
    return _wanted(layer) // max(1, rows) * rows


def _salient_per_row(
    gradient: Floats, mask: NDArray[np.int64], kept: NDArray[np.int64], n_grow: int
) -> NDArray[np.int64]:
    """Count kept weights and the largest gradients outside the mask, (R,): step 2."""
    rows, cols = gradient.shape
    outside = gradient.copy()
    outside.reshape(-1)[mask] = -1.0
    indptr, _ = topk_columns(outside, min(n_grow, outside.size - mask.size))
    return np.bincount(kept // cols, minlength=rows) + np.diff(indptr)


def _trimmed(
    kept: NDArray[np.int64],
    weights: Floats,
    shape: tuple[int, ...],
    active: NDArray[np.int64],
    fan_in: int,
) -> NDArray[np.bool_]:
    """Tell which kept weights, ascending positions, are of the `fan_in` largest of active rows."""
    rows, cols = shape
    row = kept // cols
    stays = np.isin(np.arange(rows), active)[row]
    counts = np.bincount(row, minlength=rows)
    full = np.flatnonzero(stays & (counts > fan_in)[row])  # few, and sorting all is slow
    order = full[np.lexsort([-weights[full], row[full]])]  # stable: of equal ones the first
    in_row = np.bincount(row[full], minlength=rows)
    rank = np.arange(full.size) - np.repeat(np.cumsum(in_row) - in_row, in_row)
    stays[order[rank >= fan_in]] = False
    return stays
