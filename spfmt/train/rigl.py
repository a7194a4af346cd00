"""RigL: rigging the lottery (Evci et al., ICML 2020), for every format."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from spfmt.formats import SparseTensor
from spfmt.torch.module import SparseModule
from spfmt.train.choice import (
    Floats,
    fill_below_kept,
    free_positions,
    magnitudes,
    smallest,
    units_first,
)
from spfmt.train.gradient import GradientTrainer

__all__ = ["RigL"]


class RigL(GradientTrainer):
    """Drop the smallest magnitudes, grow where the dense gradient is largest.

    Every `delta_t` steps, per layer with N weights (algorithm 1 of the paper):

    1. **Drop** the ``k = α·N/2·(1 + cos(t·π/T_end))`` smallest ``|w|``, rounded down.
    2. **Grow** the k largest ``|∂L/∂W|`` of the positions that hold no weight now. A weight that
       was just dropped may be among them.

    Kept weights keep value and optimizer state; grown ones start with zero in both, those that
    were dropped in the same update too.

    On CSR this is RigL itself; of equal magnitudes the first is dropped, of equal gradients the
    first is grown, in row-major order. Where a format lays down how many weights a row holds
    (constant fan-in, N:M), all kept weights stay, and each row, or each group of M, fills up by its
    own largest gradients. Where rows share columns (shuffled blocks, HRBP), single positions cannot
    grow: about k of them, whole blocks of the largest gradients in the groups that rows form now,
    score as much as the largest weight, kept weights score ``|w|``, and the format takes the legal
    structure of its budget with the most score. A dropped weight whose position stays with its
    block starts again from zero.

    Parameters are those of :class:`SparseTrainer`. Only layers that move, and only on the step of
    their update, have a dense gradient; see :class:`GradientTrainer`. For shuffled blocks of large
    layers, sparsify with ``method="fast"``.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> method = RigL(model, optimizer, density=0.1, delta_t=2, total_steps=8)
    >>> changed = []
    >>> for step in range(8):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(16, 64)).square().mean().backward()
    ...     optimizer.step()
    ...     changed.append(method.step())
    >>> changed
    [False, True, False, True, False, False, False, False]
    """

    def rewire(self, layer: SparseModule, n_drop: int) -> tuple[SparseTensor, NDArray[np.int64]]:
        """Choose the next structure of a layer; see :meth:`SparseTrainer.rewire`."""
        positions, weights = layer.positions(), magnitudes(layer)
        dropped = smallest(weights, n_drop)
        kept = np.ones(layer.nnz, np.bool_)
        kept[dropped] = False
        gradient = self.gradient(layer).reshape(-1)
        grown = _grown_blocks(layer, gradient, positions[kept], n_drop)
        scores = fill_below_kept(gradient, positions[kept], weights[kept], grown)
        return self.fitting(layer, scores.reshape(layer.shape)), dropped


def _grown_blocks(
    layer: SparseModule, gradient: Floats, kept: NDArray[np.int64], count: int
) -> NDArray[np.int64] | None:
    """Return about `count` free positions, whole blocks of the groups that rows form now.

    None where rows stand alone.
    """
    tensor = layer.tensor()
    kind, group_of_row = tensor.unit_of_rows()
    if kind == "row":
        return None
    drawn = free_positions(layer, tensor, gradient, kept, count, **tensor.same_groups())
    if drawn.size <= count:
        return drawn
    # The smallest legal change of all groups is larger: those with the largest gradients change.
    group = np.asarray(group_of_row, np.int64)[drawn // math.prod(layer.shape[1:])]
    order = np.argsort(-np.bincount(group, weights=gradient[drawn]), kind="stable")
    return drawn[units_first(group, order, count)]
