"""Measured ceilings of the machine."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import spfmt
from spfmt import ceilings
from spfmt.bench.machine import highest_level
from spfmt.ceilings import Ceilings, Level, cache_sizes, measure_ceilings
from spfmt.dispatch import _available_levels


@pytest.mark.parametrize("isa", _available_levels())
def test_probes_report_the_work_they_do(isa: str) -> None:
    kernels = spfmt.dispatch._kernels
    step = kernels.probe_fma(isa, 1, 1)
    assert step > 0
    assert step % 32 == 0  # multiply and add, on sixteen floats at least: whole registers
    assert kernels.probe_fma(isa, 7, 2) == 14 * step
    data = np.ones(4096, "float32")
    assert kernels.probe_load(isa, data, 3, 1) == 3 * data.nbytes
    assert kernels.probe_load(isa, data, 3, 2) == 3 * data.nbytes
    assert kernels.probe_load(isa, data[:5], 1, 1) == 0  # nothing that is no whole step


def test_probes_refuse_what_they_cannot_read() -> None:
    load = spfmt.dispatch._kernels.probe_load
    data = np.ones(4096, "float32")
    for bad in (data.astype("float64"), data[::2], data.reshape(2, -1)):
        with pytest.raises((ValueError, TypeError)):
            load("scalar", bad, 1, 1)
    for call in ((data, -1, 1), (data, 1, 0)):
        with pytest.raises(ValueError, match="positive"):
            load("scalar", *call)
    with pytest.raises(ValueError, match="no such level"):
        load("sse9", data, 1, 1)


def test_measured_ceilings_are_complete() -> None:
    found = measure_ceilings()
    assert found.isa == spfmt.dispatch.active_isa()
    assert [level.name for level in found.levels] == [*cache_sizes(), "DRAM"]
    assert found.gflops > 0
    assert all(level.bandwidth > 0 for level in found.levels)
    assert math.isinf(found.levels[-1].capacity)
    assert f"FMA {found.gflops:.0f} GFLOP/s" in str(found)


def test_ceilings_refuse_bad_levels_and_threads() -> None:
    for threads in (0, 1025, 1.5, "2", None, True):
        with pytest.raises(spfmt.FormatError, match=f"got {threads!r} threads"):
            measure_ceilings(threads)  # type: ignore[arg-type]
    for isa in ("sse9", 5):
        with pytest.raises(spfmt.FormatError, match=f"level {isa!r}"):
            measure_ceilings(isa=isa)  # type: ignore[arg-type]


def test_an_emulated_level_has_no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spfmt.dispatch._kernels, "emulated_levels", lambda: ["scalar"])
    with pytest.raises(spfmt.FormatError, match="level 'scalar', which this build emulates"):
        measure_ceilings(isa="scalar")
    monkeypatch.setattr("spfmt.bench.machine.EMULATED", spfmt.dispatch.LEVELS[1:])
    assert highest_level() == "scalar"  # whose roof dense layers are compared with


def test_roof_is_the_lower_of_peak_and_bandwidth() -> None:
    c = Ceilings("avx2", 1, 100.0, (Level("L1", 1000.0, 200.0), Level("DRAM", math.inf, 10.0)))
    assert c.level(1000).name == "L1"
    assert c.level(1001).name == "DRAM"
    assert c.roof(flops=1000, nbytes=1000) == 100.0  # 1 FLOP per byte at 200 GB/s: the peak
    assert c.roof(flops=250, nbytes=1000) == 50.0
    assert c.roof(flops=4000, nbytes=2000) == 20.0
    assert c.seconds(flops=4000, nbytes=2000) == pytest.approx(200e-9)
    assert c.seconds(flops=1e11, nbytes=1) == pytest.approx(1.0)


def _fake_cache(folder: Path, index: int, **fields: str) -> None:
    place = folder / f"index{index}"
    place.mkdir()
    for name, text in fields.items():
        (place / name).write_text(text + "\n")


def test_cache_sizes_are_read_from_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "_CACHES", tmp_path)
    assert cache_sizes() == {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}  # no such folder
    _fake_cache(tmp_path, 0, level="1", type="Data", size="48K")
    _fake_cache(tmp_path, 1, level="1", type="Instruction", size="32K")
    _fake_cache(tmp_path, 2, level="2", type="Unified", size="2M")
    _fake_cache(tmp_path, 3, level="3", type="Unified", size="unknown")
    _fake_cache(tmp_path, 4, level="3", type="Unified")
    assert cache_sizes() == {"L1": 48 << 10, "L2": 2 << 20}
