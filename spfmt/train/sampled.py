"""Large output layers: constant fan-in, and growth at sampled positions in memory for the weights.

Schultheis and Babbar, Towards Memory-Efficient Training for Extremely Large Output Spaces, 2023.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spfmt.errors import format_error
from spfmt.formats import Condensed, SparseTensor
from spfmt.structure import per_row_topk
from spfmt.structure._checks import as_int
from spfmt.structure.fan_in import row_strips
from spfmt.torch.module import SparseModule
from spfmt.train.base import SparseTrainer
from spfmt.train.choice import magnitudes, magnitudes_of
from spfmt.train.observe import Observe

__all__ = ["SampledGrowth"]

_Columns = NDArray[np.integer[Any]]


class SampledGrowth(SparseTrainer):
    """Drop each row's smallest weights, grow as many at random or at large sampled gradients.

    For output layers of 10⁵ to 10⁶ rows, whose dense gradient, or a score of every position, would
    be many times larger than what is trained. Every `delta_t` steps, per layer of R active rows
    with k weights each:

    1. **Drop**, in each row, the ``d = floor(α·k/2·(1 + cos(t·π/T_end)))`` smallest ``|w|``, of
       equal ones the first.
    2. **Draw**, for each row, ``samples·d`` of its positions that are not kept, uniformly and
       without repetition; d where `samples` is 0, and all where there are no more.
    3. **Grow** the d drawn ones of largest ``|∂L/∂W|``, computed there and nowhere else, of equal
       ones the first; with `samples` = 0 (the paper's way) all that were drawn.

    Kept weights keep value and optimizer state; grown ones start with zero in both, those that were
    dropped in the same update too. The fan-in stays what it is, and ablated rows stay ablated.

    Parameters
    ----------
    model, optimizer, **options
        As for :class:`SparseTrainer`; all sparse layers are linear ones of the format "condensed".
        ``SparseLinear(in_features, classes, format="condensed", fan_in=32)`` makes one without a
        dense weight at any time.
    samples : int
        How many positions are drawn for each that grows.
    delta_t : int
        Steps between updates; the paper takes 300 to 1500.
    t_end : int or float
        Where updates end: a step, or a fraction of `total_steps`.

    Raises
    ------
    FormatError
        For a layer that is no linear one of a constant fan-in, or `samples` out of range.

    Notes
    -----
    Beside weights, gradients and optimizer state an update takes a few arrays of nnz, strips of
    2²⁰ scores and, to tell the summary what was explored, a bit for every position; sampled
    gradients need the output's gradient (batch, R) of that step.

    Examples
    --------
    >>> import torch
    >>> from spfmt.torch import SparseLinear
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(500, 256),
    ...     torch.nn.ReLU(),
    ...     SparseLinear(256, 10_000, format="condensed", fan_in=32),
    ... )
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> method = SampledGrowth(model, optimizer, samples=4, total_steps=10_000)
    """

    FORMAT = "condensed"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        samples: int = 0,
        delta_t: int = 300,
        t_end: int | float = 2 / 3,
        **options: Any,
    ) -> None:
        self.samples = as_int("samples", samples, 0)
        super().__init__(model, optimizer, delta_t=delta_t, t_end=t_end, **options)

    def check_layer(self, name: str, layer: SparseModule) -> None:
        """Refuse what has no constant fan-in, and convolutions."""
        if layer.format != Condensed.format or len(layer.shape) != 2:
            raise format_error(
                f"{name} of format {layer.format!r} and shape {layer.shape}",
                "a linear layer of the format 'condensed'",
                "exclude it, or train with a method such as SET, which takes every layer",
            )

    def observes(self, name: str, layer: SparseModule) -> Observe | None:
        """Ask for the batches of an update that samples gradients."""
        return "batches" if self.samples else None

    def n_drop(self, layer: SparseModule, step: int) -> int:
        """Return how many weights the update after a step drops, the same number in every row."""
        tensor = layer._decoded()
        rows, fan_in = tensor.values_shape
        return rows * self._share(step, fan_in) if super().n_drop(layer, step) else 0

    def rewire(self, layer: SparseModule, n_drop: int) -> tuple[SparseTensor, NDArray[np.int64]]:
        """Choose the next structure of a layer; see :meth:`SparseTrainer.rewire`."""
        tensor = layer.tensor()
        assert isinstance(tensor, Condensed)
        columns, weights = tensor.col_indices, magnitudes(layer).reshape(tensor.values.shape)
        rows, fan_in = columns.shape
        count, random = n_drop // rows, self.random_numbers()
        new = np.empty_like(columns)
        dropped = np.empty((rows, count), np.int64)
        for strip in row_strips(rows, layer.shape[1]):
            order = np.argsort(weights[strip], axis=1, kind="stable")
            kept = np.take_along_axis(columns[strip], order[:, count:], axis=1)
            drawn = self._drawn(layer, kept, count, random)
            grown = self._best(layer, tensor.row_indices[strip], drawn, count)
            new[strip] = np.sort(np.concatenate([kept, grown], axis=1), axis=1)
            places = np.arange(strip.start, strip.stop)[:, None] * fan_in
            dropped[strip] = places + order[:, :count]
        values = np.zeros(new.shape, np.float32)
        return Condensed(layer.shape, tensor.row_indices, new, values), dropped.ravel()

    def _drawn(
        self, layer: SparseModule, kept: _Columns, count: int, random: np.random.Generator
    ) -> _Columns:
        """Draw columns of every row that are not kept, ascending, (n, samples·count or less)."""
        rows, cols = kept.shape[0], layer.shape[1]
        keys = random.random((rows, cols), np.float32)
        np.put_along_axis(keys, kept, -1.0, axis=1)
        return per_row_topk(keys, min(count * max(1, self.samples), cols - kept.shape[1]))

    def _best(
        self, layer: SparseModule, rows: NDArray[Any], drawn: _Columns, count: int
    ) -> _Columns:
        """Return the drawn columns of each row that grow."""
        if drawn.shape[1] == count:
            return drawn
        gradient = magnitudes_of(self.observed(layer).grad_at(rows, drawn))
        return np.take_along_axis(drawn, per_row_topk(gradient, count).astype(np.int64), axis=1)
