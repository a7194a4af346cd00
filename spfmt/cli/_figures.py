"""The demo's picture: where the weights are, and how long an answer takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spfmt.cli._measure import BATCHES
from spfmt.cli._results import Results, machine
from spfmt.formats import SparseTensor

__all__ = ["draw", "draw_pattern"]

_INK, _FAINT, _RULE = "#22303c", "#8796a3", "#d5dde4"
_WITH, _WITHOUT, _SLOW = "#1f77b4", "#c9d3dc", "#b3261e"
_CROP = 128


def draw(results: Results, tensors: Mapping[str, SparseTensor], path: Path) -> None:
    """Draw patterns and latencies to a PNG file.

    Parameters
    ----------
    results : Results
    tensors : mapping of str to SparseTensor
        The first sparse layer of every format, by the format's name.
    path : Path
    """
    figure = Figure(figsize=(13, 7.6), dpi=150, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)  # type: ignore[union-attr,call-arg]
    grid: Any = figure.subfigures(2, 1, height_ratios=(1, 1.32))
    size, (dense, *sparse) = results.settings.width, results.rows
    _heading(
        grid[0], f"Where the weights are ({_CROP}x{_CROP} of {size}x{size}, first sparse layer)"
    )
    for axes, row in zip(grid[0].subplots(1, len(sparse)), sparse, strict=True):
        accuracy = f"accuracy {100 * row.accuracy:.1f} % (dense {100 * dense.accuracy:.1f} %)"
        draw_pattern(axes, tensors[row.format], row.label, accuracy)
    _heading(grid[1], "How long ONNX Runtime takes for one call")
    panels = grid[1].subplots(1, len(BATCHES))
    for axes, batch in zip(panels, BATCHES, strict=True):
        _bars(axes, results, batch)
    grid[1].legend(
        *panels[0].get_legend_handles_labels(),
        frameon=False, fontsize=9.5, labelcolor=_INK, ncols=3, loc="upper right",
    )  # fmt: skip
    figure.savefig(path)


def _heading(part: Any, text: str) -> None:
    part.suptitle(text, x=0.008, ha="left", fontsize=13, fontweight="bold", color=_INK)


def _crop(tensor: SparseTensor) -> tuple[NDArray[np.bool_], str]:
    """Return a window of the mask, rows in the order of its groups, and that order's name."""
    mask = tensor.mask().reshape(tensor.matrix_shape)
    order = tensor.structure().get("row_perm")
    if order is not None:
        mask = mask[order]
    start = max(0, min(_CROP // 2, mask.shape[0] - _CROP))  # across the border of two large groups
    return mask[start : start + _CROP, :_CROP], "rows" if order is None else "rows, grouped"


def draw_pattern(axes: Any, tensor: SparseTensor, title: str, note: str) -> None:
    """Draw where a tensor keeps weights, rows of one group side by side.

    Parameters
    ----------
    axes : matplotlib Axes
    tensor : SparseTensor
    title, note : str
        Heading, and a line below the format's own caption.
    """
    window, rows = _crop(tensor)
    axes.imshow(window, cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest", aspect="equal")
    group = tensor.params().get("m")
    if group is not None:
        for border in range(group, window.shape[1], group):
            axes.axvline(border - 0.5, color=_FAINT, linewidth=0.7)
    axes.set_title(title, fontsize=11, color=_INK, pad=5)
    axes.set_xlabel(f"{tensor.caption()}\n{note}", fontsize=9, color=_INK)
    axes.set_ylabel(rows, fontsize=9, color=_INK)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=_FAINT, linewidth=0.8)


def _bars(axes: Any, results: Results, batch: int) -> None:
    rows = results.rows
    scale, unit = (1e3, "µs") if batch == 1 else (1.0, "ms")
    places = np.arange(len(rows))
    plain = [scale * row.plain[batch].median for row in rows]
    fast = [scale * row.latency[batch].median for row in rows]
    axes.barh(places[1:] - 0.18, fast[1:], 0.4, color=_WITH, label="with spfmt's kernels")
    axes.barh(places[1:] + 0.2, plain[1:], 0.3, color=_WITHOUT, label="same file without spfmt")
    axes.barh(0, fast[0], 0.4, color=_FAINT, label="dense")
    axes.axvline(fast[0], color=_FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.text(fast[0], 0, f" {fast[0]:.3g} {unit}", va="center", fontsize=9.5, color=_INK)
    for place, row in enumerate(rows[1:], start=1):
        text, color = _verdict(results.speed_up(row, batch))
        text = f" {fast[place]:#.3g} {unit}   {text}"
        axes.text(fast[place], place - 0.18, text, va="center", color=color, **_BOLD)
    axes.set_xlim(0, max(1.05 * max(plain), 1.2 * fast[0], 1.5 * max(fast[1:])))
    about = machine()
    where = f"{about['threads']} thread of {about['cpu']}, {about['isa']}"
    _style(axes, f"batch {batch}", f"{unit} per call, median ({where})")
    axes.set_yticks(places, [row.label for row in rows])


_BOLD: Mapping[str, Any] = {"fontsize": 9.5, "fontweight": "bold"}


def _verdict(speed_up: float) -> tuple[str, str]:
    """Return the comparison with dense in words, and its colour."""
    if speed_up < 1:
        return f"{1 / speed_up:.1f}x slower", _SLOW
    return f"{speed_up:.1f}x faster", _INK


def _style(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", color=_INK, pad=8)
    axes.set_xlabel(unit, fontsize=9, color=_INK)
    axes.invert_yaxis()
    axes.tick_params(length=0, colors=_INK, labelsize=10)
    axes.grid(axis="x", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
