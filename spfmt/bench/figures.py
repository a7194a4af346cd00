"""Figures of a benchmark's record: speed-up against sparsity and block size, roofline, threads.

Needs matplotlib. Each function takes results as a record holds them (`spfmt.bench.record`) and
returns a matplotlib ``Figure``; `save` writes it as PNG, byte for byte the same each time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from spfmt.bench.record import layer_name
from spfmt.formats import FORMATS

__all__ = [
    "draw_all",
    "draw_blocks",
    "draw_layers",
    "draw_roofline",
    "draw_sparsity",
    "draw_threads",
    "save",
]

Row = Mapping[str, Any]

_INK, _FAINT, _RULE, _LOSS = "#22303c", "#8796a3", "#dfe5ea", "#fbeeee"
# Distinguishable with any colour vision (Okabe and Ito), with a marker each.
_LOOKS = (
    ("#d55e00", "^"), ("#cc79a7", "v"), ("#009e73", "D"), ("#e69f00", "s"), ("#0072b2", "o"),
    ("#56b4e9", "P"),
)  # fmt: skip
_SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def _style() -> dict[str, tuple[str, str, str]]:
    """Colour, marker and text of every format, in the order of the legend, and of dense."""
    looks = itertools.cycle(_LOOKS)
    found = {name: (*next(looks), name.replace("_", " ")) for name in FORMATS}
    return {**found, "dense": (_INK, "X", "dense (ONNX Runtime)")}


def save(figure: Figure, stem: Path) -> Path:
    """Write ``stem.png`` and return its path."""
    path = stem.with_suffix(".png")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def draw_all(record: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every figure that a record has results for; each shape has figures of its own.

    Parameters
    ----------
    record : mapping
        See `spfmt.bench.record`.
    folder : Path
        Exists.

    Returns
    -------
    list of Path
        The PNG files.
    """
    products = [r for r in record["results"] if r["kind"] != "baseline"]
    forward = [r for r in products if r["op"] in ("spmm", "conv2d")]
    single = [r for r in forward if r["threads"] == 1 and r["layout"] in ("(B, C)", "NCHW")]
    ceilings = max(
        (c for c in record["ceilings"] if c["threads"] == 1),
        key=lambda c: c["gflops"],
        default=None,
    )
    paths = []
    for layer, name in {layer_name(r): _file_name(r) for r in forward}.items():
        where = f"{layer}, {record['machine']['cpu']}, {record['machine']['isa']}"
        here = [r for r in single if layer_name(r) == layer]
        if len({r["asked"] for r in here}) > 1:
            paths.append(save(draw_sparsity(here, where), folder / f"sparsity-{name}"))
        asked = [r for r in here if r["asked"] == here[0]["asked"]]
        if ceilings and len({r["batch"] for r in asked}) > 1:
            figure = draw_roofline(asked, ceilings, where)
            paths.append(save(figure, folder / f"roofline-{name}"))
    if len({r["threads"] for r in forward}) > 1:
        paths.append(save(draw_threads(forward, record["machine"]["cpu"]), folder / "threads"))
    return paths


def draw_sparsity(rows: Sequence[Row], where: str) -> Figure:
    """Draw the speed-up over dense against sparsity, one panel per batch size.

    Parameters
    ----------
    rows : sequence of mapping
        Results of forward products of one shape, with at least two densities.
    where : str
        CPU and shape, for the caption.
    """
    rows = [r for r in rows if r["kind"] == "sparse" and r["speedup"]]
    batches = sorted({r["batch"] for r in rows})
    figure = _figure(3.5 * len(batches) + 1, 4.3)
    panels = np.atleast_1d(figure.subplots(1, len(batches), sharey=True))
    for axes, batch in zip(panels, batches, strict=True):
        here = [r for r in rows if r["batch"] == batch]
        for family, series in _series(here, "asked"):
            _line(axes, family, [1 / r["asked"] for r in series], [r["speedup"] for r in series])
        _sparsity_axes(axes, here)
        axes.set_title(f"batch {batch}", loc="left", fontsize=11, color=_INK, fontweight="bold")
    panels[0].set_ylabel("times as fast as dense", fontsize=10, color=_INK)
    _finish(figure, panels[0], f"Sparse against dense, {where}")
    return figure


def _sparsity_axes(axes: Any, rows: Sequence[Row]) -> None:
    """Sparsity to the right, so spaced that an ideal kernel is a straight line."""
    low = min(0.7, 0.9 * min(r["speedup"] for r in rows))
    high = 1.6 * max(r["speedup"] for r in rows)
    shown = [s for s in _SPARSITIES if 1 / (1 - s) <= 1.01 * max(1 / r["asked"] for r in rows)]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhspan(low, 1, color=_LOSS, zorder=0)
    axes.axhline(1, color=_FAINT, linewidth=1, zorder=1)
    ends = np.array([min(1 / r["asked"] for r in rows), max(1 / r["asked"] for r in rows)])
    axes.plot(ends, ends, color=_FAINT, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    axes.annotate(
        "dense wins", (ends[0], 1), (0, -3), textcoords="offset points", va="top", fontsize=8.5,
        color="#a33b3b",
    )  # fmt: skip
    axes.annotate(
        "1 / density", (ends[1], ends[1]), (-2, 3), textcoords="offset points", ha="right",
        fontsize=8.5, color=_FAINT,
    )  # fmt: skip
    axes.set_xticks([1 / (1 - s) for s in shown], [f"{100 * s:.0f} %" for s in shown])
    ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(low, high)
    axes.set_xlabel("sparsity", fontsize=10, color=_INK)
    _bare(axes)


def draw_roofline(rows: Sequence[Row], ceilings: Mapping[str, Any], where: str) -> Figure:
    """Draw GFLOP/s against FLOP per byte under the machine's ceilings.

    Parameters
    ----------
    rows : sequence of mapping
        Forward products of one shape at several batch sizes, dense ones among them.
    ceilings : mapping
        One entry of a record's ``ceilings``, of the same number of threads.
    where : str
    """
    figure = _figure(9.2, 5.6)
    axes = figure.subplots()
    intensities = [r["gflops"] / r["gbytes"] for r in rows]
    left, right = 0.6 * min(intensities), 1.8 * max(intensities)
    low = 0.5 * min(r["gflops"] for r in rows)
    _roofs(axes, ceilings, left, right, low)
    dense = [r for r in rows if r["name"] == "onnxruntime dense"]
    sparse = [r for r in rows if r["kind"] == "sparse"]
    for family, series in [*_series(sparse, "batch"), ("dense", sorted(dense, key=_by_batch))]:
        if series:
            x = [r["gflops"] / r["gbytes"] for r in series]
            _line(axes, family, x, [r["gflops"] for r in series])
            _label_ends(axes, family, series, x)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(low, 1.5 * ceilings["gflops"])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("FLOP per byte that must be touched", fontsize=10, color=_INK)
    axes.set_ylabel("GFLOP/s", fontsize=10, color=_INK)
    _bare(axes)
    _finish(figure, axes, f"Roofline, {where}")
    return figure


def _roofs(axes: Any, ceilings: Mapping[str, Any], left: float, right: float, low: float) -> None:
    peak = ceilings["gflops"]
    axes.axhline(peak, color=_INK, linewidth=1.4, zorder=1)
    text = f"multiply-adds in registers, {peak:.0f} GFLOP/s"
    axes.annotate(
        text, (right, peak), (-4, 4), textcoords="offset points", ha="right", fontsize=9, color=_INK
    )
    for number, level in enumerate(ceilings["levels"]):
        speed = level["bandwidth"]
        x = np.array([max(left, low / speed), min(right, peak / speed)])
        axes.plot(x, speed * x, color=_FAINT, linewidth=1, zorder=1)
        # L2 and L3 are close: one name above its line, the next below.
        above = number < 2
        place = 1.08 * x[0]
        axes.text(
            place, speed * place * (1.04 if above else 0.97), f"{level['name']} {speed:.0f} GB/s",
            rotation=np.degrees(np.arctan(speed)), rotation_mode="anchor",
            transform_rotates_text=True, va="bottom" if above else "top", fontsize=8.5,
            color=_FAINT,
        )  # fmt: skip


def _label_ends(axes: Any, family: str, series: Sequence[Row], x: Sequence[float]) -> None:
    """Name the batch sizes along the line of dense, which lies apart from the others."""
    if family != "dense":
        return
    for row, place in zip(series, x, strict=True):
        if row["batch"] in (1, 8, 64, 256, 1024):
            axes.annotate(
                f"batch {row['batch']}" if row["batch"] == 1 else f"{row['batch']}",
                (place, row["gflops"]), (5, -11), textcoords="offset points", fontsize=8,
                color=_INK,
            )  # fmt: skip


def draw_threads(rows: Sequence[Row], where: str) -> Figure:
    """Draw how much faster more threads are than one, per shape, batch and format.

    Parameters
    ----------
    rows : sequence of mapping
        Results of the same cases with one thread and with more, which there must be.
    where : str
    """
    rows = [r for r in rows if r["kind"] == "sparse" or r["name"] == "onnxruntime dense"]
    single = {_thread_key(r): r["us"] for r in rows if r["threads"] == 1}
    counts = sorted({r["threads"] for r in rows} - {1})
    cases = list(dict.fromkeys((layer_name(r), r["batch"]) for r in rows))
    figure = _figure(9.2, 1.6 + 0.55 * len(cases))
    axes = figure.subplots()
    for n in counts:
        axes.axvline(n, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.axvline(1, color=_FAINT, linewidth=1, zorder=1)
    style = _style()
    families = list(style)
    for row in rows:
        if row["threads"] == 1 or _thread_key(row) not in single:
            continue
        family = _family(row)
        place = cases.index((layer_name(row), row["batch"]))
        lift = 0.11 * (families.index(family) - (len(families) - 1) / 2)
        color, marker, text = style[family]
        small = row["threads"] != counts[-1]
        axes.plot(
            single[_thread_key(row)] / row["us"], place + lift, marker, color=color, label=text,
            markersize=5 if small else 8, alpha=0.55 if small else 0.95,
            markeredgecolor="white", markeredgewidth=0.7, linestyle="none",
        )  # fmt: skip
    labels = [f"{layer}, batch {batch}" for layer, batch in cases]
    axes.set_yticks(range(len(cases)), labels)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(left=min(0.8, axes.get_xlim()[0]))
    axes.set_xlabel("times as fast as one thread (dashed: ideal)", fontsize=10, color=_INK)
    _bare(axes)
    _finish(figure, axes, f"{counts[-1]} threads against one, {where}")
    return figure


def draw_layers(rows: Sequence[Row], where: str) -> Figure:
    """Draw the speed-up of every layer of a network, one bar per format (as HRBP, figure 7).

    Parameters
    ----------
    rows : sequence of mapping
        Results of one operation and batch size, in the order of the layers.
    where : str
    """
    rows = [r for r in rows if r["kind"] == "sparse" and r["speedup"]]
    layers = list(dict.fromkeys(layer_name(r) for r in rows))
    style = _style()
    families = [f for f in style if any(_family(r) == f for r in rows)]
    figure = _figure(1.25 * len(layers) + 1.2, 4.6)
    axes = figure.subplots()
    width = 0.8 / max(1, len(families))
    for number, family in enumerate(families):
        own = [r for r in rows if _family(r) == family]
        lift = width * (number - (len(families) - 1) / 2)
        places = [layers.index(layer_name(r)) + lift for r in own]
        color, _, text = style[family]
        axes.bar(places, [r["speedup"] for r in own], 0.92 * width, color=color, label=text)
    axes.axhline(1, color=_INK, linewidth=1)
    axes.set_xticks(range(len(layers)), [layer.replace(", ", "\n") for layer in layers])
    axes.set_ylabel("times as fast as dense", fontsize=10, color=_INK)
    _bare(axes)
    axes.grid(axis="x", visible=False)
    _finish(figure, axes, where)
    return figure


def draw_blocks(rows: Sequence[Row], where: str) -> Figure:
    """Draw the speed-up against sparsity, one line per block size (as DSB, figure 10).

    Parameters
    ----------
    rows : sequence of mapping
        Results of shuffled blocks of several shapes at several densities; one panel per operation.
    where : str
    """
    rows = [r for r in rows if r["kind"] == "sparse" and r["speedup"]]
    ops = list(dict.fromkeys((r["op"], r["batch"]) for r in rows))
    figure = _figure(4.6 * len(ops) + 1, 4.3)
    panels = np.atleast_1d(figure.subplots(1, len(ops), sharey=True))
    sizes = list(dict.fromkeys(str(r["name"]).split()[1] for r in rows))
    for axes, (op, batch) in zip(panels, ops, strict=True):
        here = [r for r in rows if (r["op"], r["batch"]) == (op, batch)]
        for size, (color, marker) in zip(sizes, itertools.cycle(_LOOKS), strict=False):
            own = sorted(
                (r for r in here if str(r["name"]).split()[1] == size), key=lambda r: -r["asked"]
            )
            points = [1 / r["asked"] for r in own], [r["speedup"] for r in own]
            _marked(axes, (color, marker, f"blocks of {size}"), *points)
        _sparsity_axes(axes, rows)  # all panels share one scale
        axes.set_title(f"{op}, batch {batch}", loc="left", fontsize=11, color=_INK)
    panels[0].set_ylabel("times as fast as dense", fontsize=10, color=_INK)
    _finish(figure, panels[0], where)
    return figure


def _file_name(row: Row) -> str:
    geometry = row.get("geometry")
    name = "x".join(map(str, row["shape"]))
    if geometry is None:
        return name
    numbers = [*geometry["size"], geometry["stride"], geometry["padding"], geometry["groups"]]
    return f"{name}-{'x'.join(map(str, numbers))}"


def _thread_key(row: Row) -> tuple[Any, ...]:
    return row["name"], row["layout"], layer_name(row), row["op"], row["batch"], row["asked"]


def _by_batch(row: Row) -> int:
    return int(row["batch"])


def _family(row: Row) -> str:
    return "dense" if row["kind"] == "dense" else str(row["name"]).split()[0]


def _series(rows: Sequence[Row], along: str) -> Iterator[tuple[str, list[Row]]]:
    """Rows by format, in the order of the legend, sorted by a field."""
    for family in _style():
        found = [r for r in rows if _family(r) == family]
        if found:
            yield family, sorted(found, key=lambda r: float(r[along]))


def _line(axes: Any, family: str, x: Sequence[float], y: Sequence[float]) -> None:
    _marked(axes, _style()[family], x, y)


def _marked(axes: Any, look: tuple[str, str, str], x: Sequence[float], y: Sequence[float]) -> None:
    color, marker, text = look
    axes.plot(
        x, y, color=color, marker=marker, label=text, linewidth=1.8, markersize=6,
        markeredgecolor="white", markeredgewidth=0.7, zorder=3,
    )  # fmt: skip


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def _bare(axes: Any) -> None:
    axes.grid(color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=_INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)


def _finish(figure: Figure, axes: Any, title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, color=_INK)
    figure.legend(
        unique.values(), unique.keys(), loc="outside lower center", ncols=6, frameon=False,
        fontsize=9.5, labelcolor=_INK,
    )  # fmt: skip
