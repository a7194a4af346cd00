"""Curves of a recipe's runs: loss, accuracy, and density where it changes."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from spfmt._files import replace_file

__all__ = ["draw_curves"]

_INK, _RULE, _TRAIN, _TEST = "#22303c", "#d5dde4", "#8796a3", "#1f77b4"

Records = Sequence[Mapping[str, Any]]


def draw_curves(metrics: Mapping[int, Records], path: Path) -> None:
    """Draw all seeds' curves, from the lines of their metrics files, into a PNG file."""
    panels = {"loss": 1.0, "accuracy": 100.0}
    if any(len({m["density"] for m in records}) > 1 for records in metrics.values()):
        panels["density"] = 1.0
    figure = Figure(figsize=(5.2 * len(panels), 3.8), dpi=140, layout="constrained")
    for axes, (name, scale) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for i, records in enumerate(metrics.values()):
            _lines(axes, records, name, scale, labelled=i == 0)
        _style(axes, name + (" (%)" if scale == 100 else ""))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    replace_file(os.path.realpath(path), buffer.getvalue())


def _lines(axes: Any, records: Records, name: str, scale: float, labelled: bool) -> None:
    """Draw what was measured on training batches, and above it the evaluations."""
    for key, color, label in ((name, _TRAIN, "training"), (f"test_{name}", _TEST, "test")):
        points = [(m["epoch"], scale * m[key]) for m in records if m.get(key) is not None]
        if points:
            label = label if name != "density" else "weights"
            axes.plot(*zip(*points, strict=True), color=color, lw=1.3, label=label * labelled)


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", color=_INK)
    axes.set_xlabel("epoch", fontsize=9, color=_INK)
    axes.tick_params(length=0, colors=_INK, labelsize=9)
    axes.grid(color=_RULE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
