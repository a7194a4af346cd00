"""Generated parts of the documentation: ``python docs/generate.py`` rewrites what is out of date.

- the support table of README.md, from ``spfmt.kernels()``
- the speed table of README.md, docs/benchmarks.md and its figures, from the records that
  ``python -m benchmarks.linear --suite all --json docs/linear-....json`` wrote
- docs/convolution.md's measured part and its figures, from the records docs/conv-*.json and
  docs/models-*.json of ``python -m benchmarks.conv`` and ``python -m benchmarks.models``, if any
- docs/training.md's measured part, from docs/training-*.json of ``python -m benchmarks.methods``
  and docs/updates-*.json of ``python -m benchmarks.updates``, if any
- docs/patterns.png, the formats' patterns
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import convolutions
import numpy as np
import results
import trainings
from matplotlib.figure import Figure

import spfmt
from spfmt.bench.record import read_record
from spfmt.cli._figures import draw_pattern
from spfmt.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
SPEED = ROOT / "docs" / "linear-zen4.json"
CONVOLUTION = ROOT / "docs" / "convolution.md"
TRAINING = ROOT / "docs" / "training.md"


def support_table() -> str:
    """Markdown table: for each device, layout and dtype the levels of each product."""
    ops = list(dict.fromkeys(k.op for k in spfmt.kernels()))
    names = " | ".join(f"`{op}`" for op in ops)
    lines = [f"| device | layout | dtype | {names} |", "|---" * (3 + len(ops)) + "|"]
    for device, name in (("cpu", "CPU"), ("cuda", "CUDA ¹")):
        table = spfmt.kernels(device=device)
        for layout, dtype in dict.fromkeys((k.layout, k.dtype) for k in table):
            of = [spfmt.kernels(op, layout, dtype, device) for op in ops]
            cells = [", ".join(k.isa for k in found) or "-" for found in of]
            lines.append(f"| {name} | {layout} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "¹ checked by emulation, not yet run ([docs/cuda.md](docs/cuda.md))"]
    )


def records() -> dict[str, dict[str, Any]]:
    """Every record in docs/ by its file's name, the page's own first."""
    paths = sorted(SPEED.parent.glob("linear-*.json"), key=lambda path: path != SPEED)
    return {path.name: read_record(path) for path in paths}


def benchmarks() -> str:
    """The results page."""
    found = records()
    return results.page(found.pop(SPEED.name), SPEED.name, found)


def record_of(benchmark: str) -> tuple[str, dict[str, Any]] | None:
    """The latest record of a benchmark in docs/, and its file's name."""
    paths = CONVOLUTION.parent.glob(f"{benchmark}-*.json")
    found = [(path.name, read_record(path)) for path in sorted(paths)]
    return max(found, key=lambda named: named[1]["date"], default=None)


def convolution() -> str:
    """docs/convolution.md with its measured part up to date."""
    measured = convolutions.section(record_of("conv"), record_of("models"))
    return insert(CONVOLUTION.read_text(), "measurements", measured)


def training() -> str:
    """docs/training.md with its measured part up to date."""
    found = {
        benchmark: [(path.name, json.loads(path.read_text())) for path in sorted(paths)]
        for benchmark in trainings.PARTS
        for paths in [TRAINING.parent.glob(f"{benchmark}-*.json")]
    }
    latest = {name: records[-1] if records else None for name, records in found.items()}
    measured = trainings.section(latest)
    return insert(TRAINING.read_text(), "measurements", measured)


def insert(text: str, title: str, table: str) -> str:
    """Replace what stands between the markers of one table."""
    before, start, rest = text.partition(f"<!-- {title}: ")
    note, arrow, rest = rest.partition("-->\n")
    _, end, after = rest.partition(f"<!-- end of {title} -->")
    if not (start and arrow and end):
        raise SystemExit(f"the page lacks the markers of the {title}")
    return f"{before}{start}{note}{arrow}{table}\n{end}{after}"


def readme() -> str:
    """README.md with up-to-date tables."""
    text = insert(README.read_text(), "support table", support_table())
    return insert(text, "speed table", results.speed_table(read_record(SPEED)))


def draw_patterns() -> None:
    """Draw a random 64 x 96 weight of every format at a quarter of the weights."""
    figure = Figure(figsize=(13, 2.5), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots(1, len(FORMATS))
    for place, found in zip(axes, FORMATS.values(), strict=True):
        tensor = found.random(
            (64, 96), 0.25, np.random.default_rng(0), **found.parse_spec("") or {}
        )
        draw_pattern(place, tensor, tensor.label(), f"density {tensor.density:.2g}")
    figure.savefig(ROOT / "docs" / "patterns.png", metadata={"Software": None})


def main() -> None:
    """Rewrite README.md, the pages of results and the figures."""
    README.write_text(readme())
    CONVOLUTION.write_text(convolution())
    if record := record_of("conv"):
        convolutions.draw(record[1], CONVOLUTION.parent)
    TRAINING.write_text(training())
    PAGE.write_text(benchmarks())
    results.draw(read_record(SPEED), PAGE.parent)
    draw_patterns()


if __name__ == "__main__":
    main()
