"""The demo in ONNX Runtime: equal answers first, then which kernel ran, then how long it takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from spfmt.cli._deploy import INPUT, Deployed, Mismatch
from spfmt.onnx import OPERATORS, kernels_run, session
from spfmt.onnx.functions import Operator

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["BATCHES", "THREADS", "Latency", "answers", "kernels", "latencies", "open_sessions"]

Array = NDArray[np.float32]
Key = tuple[str, bool]
"""Name of a network, and whether our library is loaded."""

BATCHES = (1, 256)
THREADS = 1

# Largest difference of two logits over the largest logit. Rounding in float32 moves a logit by some
# 1e-6 of it, for sums of a thousand products; a wrong kernel moves it by about 1.
_TOLERANCE = 1e-4
# Calls per sample: a clock cannot see a single call of a few microseconds.
_CALLS = {1: 20, 256: 1}


@dataclass(frozen=True)
class Latency:
    """Time of one call, in milliseconds.

    Attributes
    ----------
    median, low, high : float
        Median, first and ninth decile over all rounds, of the time that the calling thread ran.
        With one thread that is the whole computation, and on a busy machine the time that other
        programs had the core does not count.
    wall : float
        Median by the wall clock; larger than `median` where the machine was busy.
    """

    median: float
    low: float
    high: float
    wall: float


def open_sessions(models: Mapping[str, Deployed]) -> dict[Key, onnxruntime.InferenceSession]:
    """Open every file with one thread: the sparse ones with and without our library."""
    opened = {}
    for name, model in models.items():
        for library in (True, False) if model.tensors else (False,):
            opened[name, library] = session(model.onnx, threads=THREADS, library=library)
    return opened


def answers(
    model: Deployed, sessions: Mapping[Key, Any], name: str, x: Array
) -> tuple[Array, float]:
    """Return a network's logits, and the largest difference between the ways to compute them.

    Raises
    ------
    Mismatch
        Where torch, ONNX Runtime alone and ONNX Runtime with our library do not agree.
    """
    with torch.no_grad():
        expected: Array = model.model(torch.from_numpy(x)).numpy()
    scale = float(np.abs(expected).max())
    logits, worst = expected, 0.0
    for library in (False, True):
        if (name, library) in sessions:
            (logits,) = sessions[name, library].run(None, {INPUT: x})
            difference = np.abs(logits - expected).max() / scale
            worst = float(np.maximum(worst, difference))  # a NaN stays one
    if not worst <= _TOLERANCE:
        raise Mismatch(
            f"{name}: got logits that differ by {worst:.1e} of the largest between torch and ONNX "
            f"Runtime; expected at most {_TOLERANCE:.0e}; please report this"
        )
    return logits, worst


def kernels(
    model: Deployed, name: str, x: Array, operators: Mapping[str, Operator] = OPERATORS
) -> dict[str, int]:
    """Count the kernels that a network ran, from ONNX Runtime's own profile.

    Parameters
    ----------
    model, name, x
        A network that was exported, and its input.
    operators : mapping
        Those of its sparse layers, by layout.

    Returns
    -------
    dict of str to int
        Runs by kernel; of a sparse network those of our library only.

    Raises
    ------
    Mismatch
        Where a sparse layer ran anything but our kernel.
    """
    runs = kernels_run(model.onnx, {INPUT: x}, threads=THREADS)
    counts = Counter(run.op_type for run in runs)
    if not model.tensors:
        return dict(counts)
    # The plain operator, and those with an activation fused into them, which begin with its name.
    plain = operators[model.tensors[0].layout().name].op_type
    ours = {op: runs for op, runs in counts.items() if op.startswith(plain)}
    if sum(ours.values()) != len(model.tensors):
        raise Mismatch(
            f"{name}: got the kernels {dict(counts)} in ONNX Runtime's profile; expected {plain}, "
            f"plain or with an activation, for {len(model.tensors)} layers; please report this"
        )
    return ours


def latencies(
    sessions: Mapping[Key, Any], x: Array, rounds: int, on_round: Callable[[], None]
) -> dict[Key, dict[int, Latency]]:
    """Time all sessions in turns, so that whatever else the machine does meets all alike."""
    samples: dict[tuple[Key, int], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for batch in BATCHES:
            feed = {INPUT: np.resize(x, (batch, x.shape[1]))}
            for key, opened in sessions.items():
                samples.setdefault((key, batch), []).append(_time(opened, feed, _CALLS[batch]))
        on_round()
    return {key: {b: _latency(samples[key, b]) for b in BATCHES} for key in sessions}


def _time(opened: Any, feed: dict[str, Array], calls: int) -> tuple[float, float]:
    """Milliseconds per call, by the thread's clock and the wall clock, after a call to warm up."""
    opened.run(None, feed)
    wall, thread = time.perf_counter(), time.thread_time()
    for _ in range(calls):
        opened.run(None, feed)
    thread, wall = time.thread_time() - thread, time.perf_counter() - wall
    return 1e3 * thread / calls, 1e3 * wall / calls


def _latency(samples: list[tuple[float, float]]) -> Latency:
    thread, wall = np.array(samples).T
    low, median, high = np.percentile(thread, (10, 50, 90))
    return Latency(float(median), float(low), float(high), float(np.median(wall)))
