"""Static sparse training: the baseline of every method that moves weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spfmt.formats import SparseTensor
from spfmt.torch.module import SparseModule
from spfmt.train.base import SparseTrainer

__all__ = ["Static"]


class Static(SparseTrainer):
    """Train the structure that the layers were made with; no weight ever moves.

    Takes the arguments of the other methods, so that it can stand in for them, and tells the same
    summary; what they schedule has no effect. HRBP (section 4.2) trains like this by default, and
    so does DSB's baseline of static shuffled blocks (SSB).

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 10))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> method = Static(model, optimizer, density=0.1, total_steps=1000)
    >>> round(method.report.density, 3)
    0.1
    """

    MOVES = False

    def n_drop(self, layer: SparseModule, step: int) -> int:
        """Return 0: no update drops a weight."""
        return 0

    def rewire(self, layer: SparseModule, n_drop: int) -> tuple[SparseTensor, NDArray[np.int64]]:
        """Return the structure that the layer has; see :meth:`SparseTrainer.rewire`."""
        return layer.tensor(), np.empty(0, np.int64)
