"""What training holds in memory by kind, and what an update takes beside it, both measured."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spfmt.torch.module import SparseModule

__all__ = ["Memory", "held", "workspace"]


@dataclass(frozen=True)
class Memory:
    """Bytes of the sparse layers of a model, as their tensors are now (DSB, Table 3).

    Attributes
    ----------
    weights, gradients : int
        Of the values; gradients that do not exist now count nothing.
    optimizer_state : int
        State of the values: momentum, moments.
    structure : int
        The words that say which positions the values stand for.
    dense : int
        The weights alone, were the layers dense.
    """

    weights: int
    gradients: int
    optimizer_state: int
    structure: int
    dense: int

    def __str__(self) -> str:
        kinds = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer state": self.optimizer_state,
            "structure": self.structure,
        }
        shares = (f"{name} {_mib(n)} ({n / max(1, self.dense):.3f})" for name, n in kinds.items())
        return f"{', '.join(shares)} of {_mib(self.dense)} of dense weights"


def held(layers: Iterable[SparseModule], states: Callable[[Any], Iterable[Tensor]]) -> Memory:
    """Add up what belongs to layers.

    Parameters
    ----------
    layers : iterable of SparseModule
    states : callable
        Of a parameter to the tensors of its optimizer state.
    """
    totals = [0, 0, 0, 0, 0]
    for layer in layers:
        values, grad = layer.values, layer.values.grad
        parts = (
            _bytes(values),
            0 if grad is None else _bytes(grad),
            sum(map(_bytes, states(values))),
            _bytes(layer.structure),
            math.prod(layer.shape) * values.element_size(),
        )
        totals = [total + part for total, part in zip(totals, parts, strict=True)]
    return Memory(*totals)


def workspace(run: Callable[[], Any]) -> tuple[int, int]:
    """Run something, and measure the most that it had allocated at a time and did not have before.

    Parameters
    ----------
    run : callable
        For instance ``trainer.update``; tracing makes it several times slower.

    Returns
    -------
    (int, int)
        Bytes of torch tensors on the CPU, and of Python objects and numpy arrays.

    Examples
    --------
    >>> import torch
    >>> torch_bytes, numpy_bytes = workspace(lambda: torch.zeros(1000).sum())
    >>> torch_bytes >= 4000
    True
    """
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            tracemalloc.reset_peak()  # not earlier: the profiler imports much at its first use
            before = tracemalloc.get_traced_memory()[0]
            run()
            numpy_peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        if not tracing:
            tracemalloc.stop()
    total = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak, max(0, numpy_peak)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mib(n: int) -> str:
    return f"{n / 2**20:.2f} MiB"
