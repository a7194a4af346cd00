"""SET: sparse evolutionary training (Mocanu et al., Nat. Commun. 2018), for every format."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from spfmt.formats import SparseTensor
from spfmt.torch.module import SparseModule
from spfmt.train.base import SparseTrainer
from spfmt.train.choice import (
    fill_below_kept,
    free_positions,
    magnitudes,
    smallest,
    units_first,
)

__all__ = ["SET"]


class SET(SparseTrainer):
    """Drop the smallest magnitudes, regrow as many weights at random.

    Every `delta_t` steps, per layer with N weights (algorithm 1 of the paper, with the cosine decay
    of the later methods for its constant share):

    1. **Drop** the ``k = α·N/2·(1 + cos(t·π/T_end))`` smallest ``|w|``.
    2. **Grow** k of the positions that hold no weight now, drawn at random *through the format*:
       the format projects random scores to a legal structure of k positions (single positions of
       CSR, one more in some rows of a constant fan-in, whole blocks of shuffled blocks).
    3. **Project**: kept weights score ``|w|``, drawn positions score the largest ``|w|``, and the
       format takes the legal structure of its budget with the most score.

    Kept weights keep value and optimizer state; grown ones start with zero in both, and so do
    dropped ones whose positions come back: drawn again, or part of a block that stays. On CSR this
    is SET itself.

    Parameters are those of :class:`SparseTrainer`. For shuffled blocks of large layers, sparsify
    with ``method="fast"``: it orders rows without scikit-learn at every update.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 10))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> method = SET(model, optimizer, density=0.1, delta_t=2, total_steps=8)
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
        tensor, positions = layer.tensor(), layer.positions()
        weights = magnitudes(layer)
        dropped = smallest(weights, n_drop)
        kept = np.ones(layer.nnz, np.bool_)
        kept[dropped] = False
        grow_scores = self.grow_scores(layer, tensor)
        grown = self._draw(layer, tensor, grow_scores, positions[kept], n_drop)

        # Where a format must take more than was kept and drawn, the grow scores go on deciding.
        scores = fill_below_kept(grow_scores, positions[kept], weights[kept], grown)
        return self.fitting(layer, scores.reshape(layer.shape)), dropped

    def grow_scores(self, layer: SparseModule, tensor: SparseTensor) -> NDArray[np.float32]:
        """Return a score in [0, 1) for growing each position, (R·C,): random numbers.

        Rows that a format keeps on common columns (a group of shuffled blocks) get common numbers,
        so that what is drawn is as large as what the format can change. A method that differs from
        SET only in what it grows overrides this.
        """
        unit = _units(tensor)
        size = (int(unit.max()) + 1, math.prod(layer.shape[1:]))
        drawn = self.random_numbers().random(size, np.float32)
        return (drawn if size[0] == unit.size else drawn[unit]).reshape(-1)

    def _draw(
        self,
        layer: SparseModule,
        tensor: SparseTensor,
        grow_scores: NDArray[np.float32],
        taken: NDArray[np.int64],
        count: int,
    ) -> NDArray[np.int64]:
        """Return about `count` free positions that score high and lie as the format needs them."""
        drawn = free_positions(layer, tensor, grow_scores, taken, count)
        if drawn.size <= count:
            return drawn
        # A format whose smallest legal change is larger (one more per row, say) changes some units.
        unit = _units(tensor)[drawn // math.prod(layer.shape[1:])]
        order = torch.randperm(int(unit.max()) + 1, generator=self.generator, device="cpu").numpy()
        return drawn[units_first(unit, order, count)]


def _units(tensor: SparseTensor) -> NDArray[np.int64]:
    """Return, for every row, the number of the group of rows that shares its columns."""
    return np.asarray(tensor.unit_of_rows()[1], np.int64)
