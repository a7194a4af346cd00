"""What this machine can do at best: multiply-adds in registers, and loads from each cache level.

A kernel does a fixed number of floating-point operations on a fixed number of bytes, so its speed
has a roof: the smaller of the peak rate of multiply-adds and of intensity times bandwidth, where
intensity is FLOP per byte (Williams et al. 2009, "Roofline"). The probes are C++ at the same
instruction-set levels as the kernels (``cpp/kernels/probe-inl.h``).
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import spfmt._kernels as _kernels
from spfmt.errors import format_error

__all__ = ["Ceilings", "Level", "cache_sizes", "measure_ceilings"]

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_FALLBACK = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LINE = 64

# A sample is shorter than a scheduler's time slice, so that on a busy machine some are undisturbed,
# and a hundred times longer than the call of the probe.
_SAMPLE_SECONDS = 3e-4
_SAMPLES = 60
_WINDOW = 8 << 20  # bytes of a larger working set that one sample takes at a time


@dataclass(frozen=True)
class Level:
    """One level of the memory hierarchy.

    Attributes
    ----------
    name : str
        ``"L1"``, ``"L2"``, ``"L3"`` or ``"DRAM"``.
    capacity : float
        Bytes that fit, of all threads together; infinite for DRAM.
    bandwidth : float
        Loads from a working set that fits here and in no nearer level, in GB/s (1e9 bytes), all
        threads together.
    """

    name: str
    capacity: float
    bandwidth: float


@dataclass(frozen=True)
class Ceilings:
    """The roof over every kernel of one instruction-set level on some threads of this machine.

    Attributes
    ----------
    isa : str
    threads : int
    gflops : float
        Float32 multiply-adds in registers, in GFLOP/s, all threads together.
    levels : tuple of Level
        From the nearest outwards.
    """

    isa: str
    threads: int
    gflops: float
    levels: tuple[Level, ...]

    def level(self, nbytes: float) -> Level:
        """Return the nearest level that holds a working set of `nbytes`."""
        return next(level for level in self.levels if nbytes <= level.capacity)

    def roof(self, flops: float, nbytes: float) -> float:
        """Return the highest possible GFLOP/s of work that touches `nbytes` once.

        Parameters
        ----------
        flops : float
            Floating-point operations; 0 is copying, whose roof is 0 GFLOP/s.
        nbytes : float
            Bytes that have to be read or written at least once; they are the working set too.
        """
        return min(self.gflops, flops / max(nbytes, 1) * self.level(nbytes).bandwidth)

    def seconds(self, flops: float, nbytes: float) -> float:
        """Return the shortest possible time of such work."""
        return max(flops / self.gflops, nbytes / self.level(nbytes).bandwidth) / 1e9

    def __str__(self) -> str:
        loads = " / ".join(f"{level.name} {level.bandwidth:.0f}" for level in self.levels)
        threads = f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        return f"{self.isa}, {threads}: FMA {self.gflops:.0f} GFLOP/s; loads {loads} GB/s"


def cache_sizes() -> dict[str, int]:
    """Return bytes of each data-cache level of the first CPU, ``{"L1": ..., "L2": ..., ...}``.

    Levels that the machine does not have are missing. Where the system does not tell (some virtual
    machines and containers), the result is 32 KiB, 1 MiB and 16 MiB.
    """
    sizes = {}
    for index in sorted(_CACHES.glob("index*")):
        try:
            kind, level, size = (
                (index / name).read_text().strip() for name in ("type", "level", "size")
            )
        except OSError:
            continue
        match = re.fullmatch(r"([1-9]\d*)([KMG]?)", size)
        if kind != "Instruction" and match:
            sizes[f"L{level}"] = int(match[1]) * _UNITS[match[2]]
    return dict(sorted(sizes.items())) if "L1" in sizes else dict(_FALLBACK)


def measure_ceilings(threads: int = 1, isa: str | None = None) -> Ceilings:
    """Measure the peak of multiply-adds and the load bandwidth of every level, in about a second.

    Each figure is the best of many short samples: other programs can only make a sample slower.

    Parameters
    ----------
    threads : int
        Threads that compute and load at the same time. Each has L1 and L2 of its own and an equal
        share of the working sets of L3 and DRAM.
    isa : {"scalar", "avx2", "avx512"}, optional
        Level of the probes; the one in use by default.

    Raises
    ------
    FormatError
        For a number of threads below 1 or above 1024, or a level that is unknown, that this CPU
        lacks or that this build only emulates.
    """
    whole = isinstance(threads, int) and not isinstance(threads, bool)
    if not whole or not 1 <= threads <= 1024:
        raise format_error(f"{threads!r} threads", "an int from 1 to 1024", "pass threads=1")
    isa = str(_kernels.active_isa()) if isa is None else isa
    if isa in _kernels.emulated_levels():
        raise format_error(
            f"level {isa!r}, which this build emulates",
            "a level of this CPU",
            "pass a level that it has, or build without SPFMT_EMULATE",
        )
    try:
        _kernels.probe_fma(str(isa), 0, 1)
    except ValueError as error:
        raise format_error(
            f"level {isa!r} ({error})", "a level of this CPU", "leave isa out"
        ) from None
    flops = _best_rate(lambda n: int(_kernels.probe_fma(isa, 100 * n, threads)), _SAMPLES)
    caches = cache_sizes()
    levels = []
    for name, size in caches.items():
        shared = name == "L3"
        total = size * (1 if shared else threads)
        # Half a private cache is sure to stay in it; a quarter of a shared one likely does.
        working_set = max(total // (4 if shared else 2), _smallest(caches, name, threads))
        levels.append(Level(name, float(total), _load_rate(isa, working_set, threads)))
    beyond = min(max(4 * max(caches.values()), 64 << 20), 1 << 30)
    levels.append(Level("DRAM", math.inf, _load_rate(isa, beyond, threads)))
    return Ceilings(isa, threads, flops / 1e9, tuple(levels))


def _smallest(caches: dict[str, int], name: str, threads: int) -> int:
    """Return the least working set that the levels nearer than `name` do not hold."""
    nearer = list(caches.values())[: list(caches).index(name)]
    return 2 * threads * max(nearer, default=0)


def _load_rate(isa: str, nbytes: int, threads: int) -> float:
    """GB/s of loads from a working set that all threads share equally."""
    data = _aligned_ones(nbytes // 4)
    if nbytes < 2 * _WINDOW:
        return _best_rate(lambda n: int(_kernels.probe_load(isa, data, n, threads)), _SAMPLES) / 1e9
    # Window after window: when its turn comes again, all the others have driven it out.
    windows = itertools.cycle(
        np.split(data[: nbytes // _WINDOW * (_WINDOW // 4)], nbytes // _WINDOW)
    )

    def probe(n: int) -> int:
        return sum(int(_kernels.probe_load(isa, next(windows), 1, threads)) for _ in range(n))

    return _best_rate(probe, _SAMPLES) / 1e9


def _aligned_ones(size: int) -> npt.NDArray[np.float32]:
    """Ones from the start of a cache line on: loads that cross lines are half as fast."""
    raw: npt.NDArray[Any] = np.ones(size + _LINE // 4, np.float32)
    start = -raw.ctypes.data % _LINE // 4
    return raw[start : start + size]


def _best_rate(probe: Callable[[int], int], samples: int) -> float:
    """Most units of work per second, where ``probe(n)`` does n rounds and returns its units."""
    rounds = 1
    while True:  # also brings data to where it belongs, and the CPU to its frequency
        start = time.perf_counter()
        probe(rounds)
        if time.perf_counter() - start >= _SAMPLE_SECONDS or rounds >= 1 << 30:
            break
        rounds *= 2
    best = 0.0
    for _ in range(samples):
        start = time.perf_counter()
        work = probe(rounds)
        best = max(best, work / (time.perf_counter() - start))
    return best
