"""The demo's results: one row per network, as JSON and as one table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import spfmt
from spfmt.bench.machine import cpu_name
from spfmt.cli import _cnn
from spfmt.cli._measure import BATCHES, THREADS, Latency
from spfmt.cli._network import HIDDEN, Settings
from spfmt.dispatch import timed_isa
from spfmt.formats import SparseTensor

__all__ = ["Results", "Row", "label", "machine", "show", "versions", "write_json"]

_PACKAGES = ("numpy", "torch", "onnx", "onnxscript", "onnxruntime", "scikit-learn", "safetensors")
_TABLE_WIDTH = 120  # where the output is no terminal
_ROOMY = 96  # columns that the table fills with one line per row; on 80 it wraps
_BUSY = 1.25
_EVEN = 0.95  # what is shown as 1.0x counts as even


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes
    ----------
    format, label : str
        Name of the format, and how it is shown.
    density : float
        Stored weights over all weights of the hidden layers.
    accuracy : float
        Share of test images that ONNX Runtime with our library classifies right.
    onnx_bytes, weights_bytes : int
        Size of the ONNX file, and of the hidden layers' safetensors files.
    train_seconds : float
    difference : float
        Largest difference between logits of torch and ONNX Runtime, over the largest logit.
    kernels : dict of str to int
        Kernels of the hidden layers by ONNX Runtime's profile; of the dense network all kernels.
    latency : dict of int to Latency
        By batch size, with our library (the dense network needs none).
    plain : dict of int to Latency
        The same file without our library.
    """

    format: str
    label: str
    density: float
    accuracy: float
    onnx_bytes: int
    weights_bytes: int
    train_seconds: float
    difference: float
    kernels: dict[str, int]
    latency: dict[int, Latency]
    plain: dict[int, Latency]


@dataclass(frozen=True)
class Results:
    """All rows, the dense network first, and where they were measured."""

    settings: Settings
    test_images: int
    seconds: float
    rows: tuple[Row, ...]
    convolutions: tuple[_cnn.ConvRow, ...]

    def speed_up(self, row: Row, batch: int, plain: bool = False) -> float:
        """Return the dense network's latency over a row's."""
        latency = row.plain if plain else row.latency
        return self.rows[0].latency[batch].median / latency[batch].median

    def slower_than_dense(self, batch: int) -> list[Row]:
        """Return the sparse rows that lose to the dense network at a batch size."""
        return [row for row in self.rows[1:] if self.speed_up(row, batch) < _EVEN]

    @property
    def busy(self) -> bool:
        """Whether other programs held the core for a noticeable share of the measurement."""
        all_latencies = [v for row in self.rows for v in row.latency.values()]
        return sum(v.wall for v in all_latencies) > _BUSY * sum(v.median for v in all_latencies)


def label(name: str, tensors: Sequence[SparseTensor]) -> str:
    """Name a network by its format and the first sparse layer's parameters."""
    return tensors[0].label() if tensors else name


def machine() -> dict[str, Any]:
    """Describe the computer: CPU, cores, instruction set in use, threads of the measurement."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": timed_isa(),
        "threads": THREADS,
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Return versions of everything that the numbers depend on."""
    found = {package: metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version(), "spfmt": spfmt.__version__, **found}


def write_json(results: Results, path: Path) -> None:
    """Write the table with all that is needed to read it later; latencies in milliseconds."""
    rows = []
    for row in results.rows:
        speed_up = {batch: results.speed_up(row, batch) for batch in BATCHES}
        rows.append({**asdict(row), "speed_up": speed_up})
    content = {
        "version": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": results.seconds,
        "settings": {**asdict(results.settings), "layers": results.settings.layers},
        "sparse_layers": HIDDEN,
        "test_images": results.test_images,
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
        "sparse_convolutions": _cnn.CONVOLUTIONS,
        "convolutions": [asdict(row) for row in results.convolutions],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def show(results: Results) -> None:
    """Print the table and what is needed to judge it."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _TABLE_WIDTH
    gap = 1 if console.width >= _ROOMY else 0
    console.print(_table(results, gap))
    for note in _notes(results):
        console.print(note, markup=False)
    console.print(_cnn.table(results.convolutions, gap))
    for note in _cnn.notes(results.convolutions, results.settings):
        console.print(note, markup=False)


def _table(results: Results, gap: int) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False)
    table.add_column("format", min_width=12)
    for head in ("density", "test\nacc.", "file\nMB", "batch 1\nµs", "batch 256\nms"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("kernel that ran", no_wrap=True)
    for row in results.rows:
        table.add_row(*_cells(results, row))
    return table


def _cells(results: Results, row: Row) -> Iterator[str]:
    yield row.label
    yield f"{100 * row.density:.1f} %"
    yield f"{100 * row.accuracy:.1f} %"
    yield f"{row.onnx_bytes / 1e6:.2f}"
    for batch, unit in zip(BATCHES, (1e3, 1.0), strict=True):
        time = unit * row.latency[batch].median
        digits = 2 if time < 10 else 1 if time < 100 else 0
        yield f"{time:.{digits}f} ({_ratio(results.speed_up(row, batch))})"
    yield ", ".join(f"{name} x{count}" for name, count in row.kernels.items())


def _ratio(speed_up: float) -> str:
    return f"{speed_up:.1f}x" if speed_up >= _EVEN else f"[red]{speed_up:.2f}x[/red]"


def _without_library(results: Results) -> str:
    """Say how the standard-operator bodies compare with dense: lowest and highest ratio."""
    parts = []
    for batch in BATCHES:
        ratios = [results.speed_up(row, batch, plain=True) for row in results.rows[1:]]
        parts.append(f"{min(ratios):.2f}x to {max(ratios):.2f}x at batch {batch}")
    return ", ".join(parts)


def _notes(results: Results) -> Iterator[str]:
    settings, about = results.settings, machine()
    yield (
        f"Network {'→'.join(map(str, settings.layers))}; the {len(HIDDEN)} hidden "
        f"{settings.width}x{settings.width} layers are sparse (density is theirs), first and last "
        "layer dense."
    )
    yield (
        f"{results.test_images} test images: one is {100 / results.test_images:.2f} %, so "
        "differences of a few tenths mean nothing."
    )
    yield (
        f"ONNX Runtime on {about['threads']} thread of {about['cpu']} ({about['isa']}): medians of "
        f"its own time over {settings.rounds} interleaved rounds; in brackets: times as fast as "
        "dense."
    )
    yield f"The same files without our library: {_without_library(results)}."
    for batch in BATCHES:
        slower = [row.label for row in results.slower_than_dense(batch)]
        if slower:
            yield f"At batch {batch} dense is faster at this size than {', '.join(slower)}."
    if results.busy:
        yield "The machine was busy: waiting for the core is not counted, but caches were shared."
