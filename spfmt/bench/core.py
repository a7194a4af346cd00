"""Whether something else uses this core at the same time.

Two hardware threads of one core share its load units, its issue slots and its nearest caches, and
in a cloud the other one may belong to a stranger. No clock of the process shows that, but a loop
that loads from first-level cache as fast as the core can takes up to twice as long.
"""

from __future__ import annotations

import functools
import time
from typing import Final

import numpy as np

import spfmt._kernels as _kernels
from spfmt._memory import empty_aligned
from spfmt.bench.machine import highest_level

__all__ = ["Core", "this_core"]

_FIRST_PACES = 1000
_ROUNDS = 200  # over 4 KiB: some six microseconds, of which the call is a small part
_PROBES = 3  # whatever ran before has driven code and data from the caches: the first is slow
_SHARED = 1.2


class Core:
    """Probes the core that the calling thread runs on.

    Attributes
    ----------
    best : float
        Seconds of the fastest probe so far, which nothing disturbed.
    """

    best: float

    def __init__(self) -> None:
        self._level: Final = highest_level()
        self._data: Final = empty_aligned(1024, np.float32)
        self._data[...] = 1
        self.best = float("inf")
        for _ in range(_FIRST_PACES):
            self.pace()

    def pace(self) -> float:
        """Seconds of the fastest of a few probes."""
        pace = min(self._probe() for _ in range(_PROBES))
        self.best = min(self.best, pace)
        return pace

    def _probe(self) -> float:
        start = time.perf_counter()
        _kernels.probe_load(self._level, self._data, _ROUNDS, 1)
        return time.perf_counter() - start

    def shared(self, pace: float) -> bool:
        """Whether a probe that took `pace` seconds did not have the core to itself."""
        return pace > _SHARED * self.best


@functools.cache
def this_core() -> Core:
    """The one that keeps the fastest probe of the process."""
    return Core()
