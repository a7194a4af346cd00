"""HRBP's dynamic sparse training: block-wise updating (HRBP, 2024, section 4.2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spfmt.errors import format_error
from spfmt.formats import HRBP as Blocks
from spfmt.formats import SparseTensor
from spfmt.structure import hrbp_blocks, per_row_topk
from spfmt.torch.module import SparseModule
from spfmt.train.choice import Floats, magnitudes
from spfmt.train.gradient import GradientTrainer

__all__ = ["HRBP"]


class HRBP(GradientTrainer):
    """Groups of rows stay; inside each, channels and pattern follow weights and gradients.

    Every `delta_t` steps, per layer (C_out, C_in, Kh, Kw) or (R, C) of the format "hrbp" (figure 4
    of the paper):

    1. **Drop**, in each row of w weights, the ``floor(α·w/2·(1 + cos(t·π/T_end)))`` smallest
       ``|w|``.
    2. **Grow**, in each row, as many: the largest ``|∂L/∂W|`` of its positions that are not kept.
    3. **Regroup** inside each group: the kernels with the most weights form the group's kernel
       mask, its channels with the most kernels and its cells with the most weights are its next
       block, as large as the last. Ties go to the larger sum of scores: of a kept weight ``|w|``,
       of a grown one ``|∂L/∂W|``, each as a share of the layer's largest. Kernels that tie
       even then are drawn (with one seed at every update).

    Weights that the block leaves out are gone. Kept weights in it keep value and optimizer state;
    all others start from zero in both: grown ones, those that complete the block, and those that
    were dropped and whose positions it still holds. A block moves only where rows of a group agree;
    then it moves as a whole.

    Parameters are those of :class:`SparseTrainer`. The schedule is that of RigL, as in the paper.

    Raises
    ------
    FormatError
        For a layer of another format.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.Conv2d(32, 32, 3))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> method = HRBP(model, optimizer, density=0.25, delta_t=100, total_steps=1000)
    """

    FORMAT = "hrbp"

    def check_layer(self, name: str, layer: SparseModule) -> None:
        """Refuse other formats: they have no groups that could stay."""
        if layer.format != Blocks.format:
            raise format_error(
                f"{name} of format {layer.format!r}",
                "'hrbp'",
                'sparsify(model, "hrbp", ...), or train with RigL, which takes every format',
            )

    def n_drop(self, layer: SparseModule, step: int) -> int:
        """Return how many weights the update after a step drops, the same number in every row."""
        rows = max(1, layer.shape[0])
        per_row = self._share(step, layer.nnz // rows)
        return rows * per_row if super().n_drop(layer, step) else 0

    def rewire(self, layer: SparseModule, n_drop: int) -> tuple[SparseTensor, NDArray[np.int64]]:
        """Choose the next structure of a layer; see :meth:`SparseTrainer.rewire`."""
        tensor, gradient = layer.tensor(), self.gradient(layer)
        assert isinstance(tensor, Blocks)
        rows = gradient.shape[0]
        places = np.argsort(layer.positions()).reshape(rows, -1)  # row by row, columns ascending
        mask, scores, dropped = _updated(
            places, layer.positions(), magnitudes(layer), gradient, n_drop // rows
        )
        size = tensor.channel_indices.shape[1], tensor.pattern_indices.shape[1]
        groups = tensor.row_perm, tensor.row_ptr
        block = hrbp_blocks(mask, scores, tensor.shape, *groups, *size)
        values = np.zeros(tensor.nnz, np.float32)
        return Blocks(tensor.shape, *groups, *block, values), dropped


def _updated(
    places: NDArray[np.int64],
    positions: NDArray[np.int64],
    weights: Floats,
    gradient: Floats,
    count: int,
) -> tuple[NDArray[np.bool_], Floats, NDArray[np.int64]]:
    """Drop and grow `count` weights in every row: the mask, its scores, and what was dropped."""
    order = np.argsort(weights[places], axis=1, kind="stable")  # of equal ones the first go
    ranked = np.take_along_axis(places, order, axis=1)
    dropped, kept = ranked[:, :count].ravel(), ranked[:, count:].ravel()
    scores = np.zeros_like(gradient)
    scores.reshape(-1)[positions[kept]] = weights[kept] / (weights.max() or 1.0)

    free = gradient.copy()
    free.reshape(-1)[positions[kept]] = -1.0
    grown = per_row_topk(free, count).astype(np.int64)
    found = np.take_along_axis(gradient, grown, axis=1)
    np.put_along_axis(scores, grown, found / (found.max() or 1.0), axis=1)

    mask = np.zeros(gradient.shape, np.bool_)
    mask.reshape(-1)[positions[kept]] = True
    np.put_along_axis(mask, grown, True, axis=1)
    return mask, scores, dropped
