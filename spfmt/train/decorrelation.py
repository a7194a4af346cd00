"""How long weights remember: the metric for learning of Advances in sparse training, section 2."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spfmt.errors import format_error
from spfmt.structure._checks import as_int, plain_array
from spfmt.torch.convert import whole
from spfmt.torch.wrappers import unwrapped

__all__ = ["Decorrelation", "decorrelation_times"]


def decorrelation_times(history: Any) -> NDArray[np.int64]:
    """Return Δ, the lag at which a series no longer correlates with its own past.

    The Pearson correlation of ``w[:T-τ]`` with ``w[τ:]`` is followed from τ = 1 on; Δ is the first
    τ at which it is not positive.

    Parameters
    ----------
    history : array_like of float, shape (T, n)
        One series in each column.

    Returns
    -------
    ndarray of int64, shape (n,)
        From 1 to T; T where no lag that leaves two points is one. Where a window is constant there
        is no correlation, and the lag is not one.

    Raises
    ------
    FormatError
        Where `history` is no matrix of finite numbers.

    Examples
    --------
    >>> decorrelation_times([[0.0, 5.0], [1.0, -5.0], [2.0, 5.0], [3.0, -5.0]]).tolist()
    [4, 1]
    """
    series = np.asarray(plain_array("history", history), np.float64)
    if series.ndim != 2 or not np.isfinite(series).all():
        raise format_error(
            f"history of shape {series.shape}, or with NaN or infinity",
            "finite numbers of shape (T, n)",
            "record one row per step",
        )
    steps, count = series.shape
    found = np.full(count, steps, np.int64)
    # Sums of centred series: means are far larger than what a weight moves.
    left = np.flatnonzero(np.ptp(series, axis=0) > 0 if steps else np.zeros(count, np.bool_))
    centred = series[:, left] - series[:, left].mean(axis=0) if left.size else series[:, left]
    centred /= np.abs(centred).max(axis=0, initial=np.finfo(np.float64).tiny)
    for lag in range(1, steps - 1):
        if not left.size:
            break
        done = _not_positive(centred[: steps - lag], centred[lag:])
        found[left[done]] = lag
        left, centred = left[~done], centred[:, ~done]
    return found


def _not_positive(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell where two windows, whose columns are compared, have a correlation that is 0 or less."""
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    covariance = np.einsum("tn,tn->n", x, y) - len(x) * mean_x * mean_y
    noise = 1e-12 * len(x)  # of sums of numbers up to 1
    moves = (np.ptp(x, axis=0) > 0) & (np.ptp(y, axis=0) > 0)
    return np.asarray(moves & (covariance <= noise))


class Decorrelation:
    """Record sampled weights at every step, and tell how long each correlates with its past.

    Large weights turn out to be correlated over much of a training, small ones to move at random
    (figure 1), so that these can be dropped.

    Parameters
    ----------
    model : nn.Module
        Weights are its parameters that are matrices or larger.
    samples : int
        Weights drawn from each of them.
    every : int
        Steps between two records.
    seed : int
        Of the draw.

    Raises
    ------
    FormatError
        For a model without weights, or a number out of its range.

    Notes
    -----
    Memory is 4 bytes per record and sampled weight. Of a sparse layer, whose values move, nothing
    is recorded; `Participating` layers keep all their weights and are.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(8, 8)
    >>> recorder = Decorrelation(model, samples=16)
    >>> for step in range(20):
    ...     with torch.no_grad():
    ...         model.weight += torch.randn(8, 8)
    ...     recorder.step()
    >>> recorder.times()["weight"].shape
    (16,)
    """

    def __init__(
        self, model: nn.Module, *, samples: int = 256, every: int = 1, seed: int = 0
    ) -> None:
        samples = as_int("samples", samples, 1)
        self.every, self.steps = as_int("every", every, 1), 0
        named = unwrapped(model).named_parameters()
        self._weights = {name: p for name, p in named if p.dim() >= 2}
        if not self._weights:
            raise format_error("a model without weights", "at least one matrix", "pass a model")
        generator = torch.Generator().manual_seed(seed)
        self._places = {
            name: torch.randperm(p.numel(), generator=generator, device="cpu")[:samples].sort()[0]
            for name, p in self._weights.items()
        }
        self._records: dict[str, list[NDArray[np.float32]]] = {n: [] for n in self._weights}

    @torch.no_grad()
    def step(self) -> None:
        """Count one optimizer step; record the weights if it is time."""
        self.steps += 1
        if self.steps % self.every:
            return
        for name, weight in self._weights.items():
            flat = whole(weight.detach()).reshape(-1)
            taken = flat[self._places[name].to(flat.device)]
            self._records[name].append(taken.float().cpu().numpy())

    def history(self, name: str) -> NDArray[np.float32]:
        """Return what was recorded of a parameter, (records, samples)."""
        return np.array(self._records[name]).reshape(-1, self._places[name].numel())

    def times(self) -> dict[str, NDArray[np.int64]]:
        """Return Δ of every sampled weight, by parameter, in steps; see `decorrelation_times`."""
        return {n: self.every * decorrelation_times(self.history(n)) for n in self._weights}

    def magnitudes(self) -> dict[str, NDArray[np.float32]]:
        """Return the last ``|w|`` of every sampled weight, by parameter.

        Raises
        ------
        FormatError
            Before the first record.
        """
        return {name: self._last(name) for name in self._weights}

    def _last(self, name: str) -> NDArray[np.float32]:
        records = self._records[name]
        if not records:
            raise format_error(
                f"no record after {self.steps} steps",
                f"at least {self.every} steps",
                "call step() after every optimizer.step()",
            )
        return np.abs(records[-1])

    def by_magnitude(
        self, name: str, bins: int = 10
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return figure 1 of one parameter: the median Δ of bins of weights, by magnitude.

        Parameters
        ----------
        name : str
        bins : int
            Of as many weights each, up to one.

        Returns
        -------
        magnitudes, medians : ndarray of float64, shape (bins,)
            Median ``|w|`` of every bin, ascending, and its median Δ over all steps, in [0, 1].

        Raises
        ------
        FormatError
            Before the first record, or for more bins than sampled weights.
        """
        final, history = self._last(name), self.history(name)
        times = decorrelation_times(history) / len(history)
        parts = np.array_split(
            np.argsort(final, kind="stable"), as_int("bins", bins, 1, final.size)
        )
        return (
            np.array([np.median(final[part]) for part in parts], np.float64),
            np.array([np.median(times[part]) for part in parts], np.float64),
        )
