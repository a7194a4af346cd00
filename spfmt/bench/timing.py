"""Interleaved timing: contenders take turns, so whatever else the machine does meets all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from spfmt.bench.core import Core, this_core

__all__ = ["Timing", "interleave"]

_LEAST_ROUNDS = 5
_MOST_ROUNDS = 1000
# Untimed calls before every sample. One call is not enough: megabytes of weights come back into a
# cache only by and by, and a dense layer at batch 1 would seem twice as slow as it is.
# Threads of the contender before, which spin after their last work (libgomp: 300,000 rounds of
# `pause`) and hold cores that this one's own pool needs, are asleep by then too.
_WARM_SECONDS = 5e-3
# A call this long warms itself: what it finds cold, or busy, takes a small part of it.
_LONG_SECONDS = 0.2
# A clock cannot see a call of a few microseconds: samples are repeated up to this length.
_SAMPLE_SECONDS = 30e-6


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, by the wall clock.

    Attributes
    ----------
    median, low, high : float
        Median, first and ninth decile.
    samples : int
        Those that they are of.
    shared : float
        Share of all samples during which something else used the calling thread's core: another
        hardware thread, a hypervisor, another program (`spfmt.bench.core`).
    left_out : bool
        Whether those samples do not count. They do where any contender has fewer than five others.
    waited : float
        Share of the time in which this process did not run: other programs held the core, or a
        call slept. Of several threads the busiest one would count, so it is 0 where they keep more
        than one core busy.
    """

    median: float
    low: float
    high: float
    samples: int
    shared: float
    left_out: bool
    waited: float


def interleave(
    calls: Sequence[Callable[[], Any]],
    seconds: float,
    *,
    before: Sequence[Callable[[], Any]] | None = None,
) -> list[Timing]:
    """Time calls in turns for about `seconds`, but at least five rounds.

    Parameters
    ----------
    calls : sequence of callable
        Each is called untimed for some milliseconds before every sample, so that it finds its data
        as warm as in a loop of its own; one that takes longer than a fifth of a second only before
        its first sample.
    seconds : float
        In all. Calls of many seconds take longer: five rounds are the least a median needs.
    before : sequence of callable, optional
        One for each call, run before its untimed call: sets a number of threads, for instance.

    Returns
    -------
    list of Timing
    """
    samples: list[list[_Sample]] = [[] for _ in calls]
    repeats = [0] * len(calls)
    core = this_core()
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        stop = time.perf_counter() + seconds
        for round_ in range(_MOST_ROUNDS):
            for i, call in enumerate(calls):
                if before is not None:
                    before[i]()
                if not samples[i] or samples[i][-1].wall < 1e6 * _LONG_SECONDS:
                    warm = _warm(call)
                    repeats[i] = repeats[i] or max(1, min(100, round(_SAMPLE_SECONDS / warm)))
                samples[i].append(_sample(call, repeats[i], core))
            if round_ + 1 >= _LEAST_ROUNDS and time.perf_counter() > stop:
                break
    finally:
        if was_enabled:
            gc.enable()
    return _timings(samples, core)


def _warm(call: Callable[[], Any]) -> float:
    """Call until everything is as in a loop of this call; return the seconds of the last one."""
    start = time.perf_counter()
    while True:
        begin = time.perf_counter()
        call()
        end = time.perf_counter()
        if end - start >= _WARM_SECONDS:
            return end - begin


class _Sample(NamedTuple):
    wall: float  # microseconds per call by the wall clock
    own: float  # and by the process's own
    pace: float  # seconds of the slower of two probes of the core, before and after


def _sample(call: Callable[[], Any], repeats: int, core: Core) -> _Sample:
    before = core.pace()
    own = time.process_time()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wall = time.perf_counter() - start
    own = time.process_time() - own
    return _Sample(1e6 * wall / repeats, 1e6 * own / repeats, max(before, core.pace()))


def _timings(samples: list[list[_Sample]], core: Core) -> list[Timing]:
    alone = [[s for s in own if not core.shared(s.pace)] for own in samples]
    leave_out = all(len(own) >= _LEAST_ROUNDS for own in alone)
    return [_timing(s, a, leave_out) for s, a in zip(samples, alone, strict=True)]


def _timing(samples: list[_Sample], alone: list[_Sample], leave_out: bool) -> Timing:
    used = alone if leave_out else samples
    low, median, high = np.percentile([s.wall for s in used], (10, 50, 90))
    return Timing(
        median=float(median),
        low=float(low),
        high=float(high),
        samples=len(used),
        shared=1 - len(alone) / len(samples),
        left_out=leave_out,
        waited=max(0.0, 1 - sum(s.own for s in used) / sum(s.wall for s in used)),
    )
