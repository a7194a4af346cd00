"""The measured part of docs/convolution.md, and its figures, from records of the benchmarks.

``python -m benchmarks.conv`` and ``python -m benchmarks.models`` write them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from results import about, dense_wins, head, image, line, missing, of_suite

from spfmt.bench.figures import draw_blocks, draw_layers, draw_sparsity, save
from spfmt.bench.record import layer_name, select

Row = Mapping[str, Any]
Record = Mapping[str, Any]

NOTHING = "There is no record yet: `python -m benchmarks.conv --suite all --json docs/conv-….json`."
TITLES = {
    "forward": "Forward, 90 % sparse, one thread",
    "imagenet": "ImageNet's sizes, forward, 90 % sparse",
    "gradients": "Gradients, 90 % sparse, batch 64",
    "training": "Forward and backward through autograd, 90 % sparse",
    "sparsity": "Against sparsity",
    "blocks": "Against the size of blocks",
    "levels": "AVX-512 and AVX2, 90 % sparse",
    "threads": "Threads, 90 % sparse",
    "layouts": "Channels first and channels last, 90 % sparse",
}


def section(conv: tuple[str, Record] | None, models: tuple[str, Record] | None) -> str:
    """The measured part of the page.

    Parameters
    ----------
    conv, models : (str, mapping), optional
        The file in docs/ and the record of each benchmark.
    """
    if conv is None and models is None:
        return NOTHING
    parts: list[str] = []
    if conv is not None:
        name, record = conv
        parts += [
            f"Generated from [{name}]({name}).", about(record), *_figures(record),
            *_suites(record), *dense_wins(record), *missing(record),
        ]  # fmt: skip
    if models is not None:
        parts += _networks(*models)
    return "\n\n".join(part.strip("\n") for part in parts)


def draw(record: Record, folder: Path) -> None:
    """Write every figure that the record has results for as PNG."""
    where = record["machine"]["cpu"]
    if layers := _vgg(record):
        title = f"VGG-19, forward and backward, 90 % sparse, batch 128, one thread, {where}"
        save(draw_layers(layers, title), folder / "conv-layers")
    if blocks := of_suite(record, "blocks"):
        title = f"Shuffled blocks, {layer_name(blocks[0])}, one thread, {where}"
        save(draw_blocks(blocks, title), folder / "conv-blocks")
    if sparse := of_suite(record, "sparsity"):
        title = f"{layer_name(sparse[0])}, one thread, {where}"
        save(draw_sparsity(sparse, title), folder / "conv-sparsity")


def _vgg(record: Record) -> list[Row]:
    return select(record["results"], suite="training", source="VGG-19")


def _figures(record: Record) -> Iterator[str]:
    if _vgg(record):
        yield image("conv-layers", "Speed-up of VGG-19's layers over dense, by format")
    if of_suite(record, "blocks"):
        yield image("conv-blocks", "Speed-up over dense against sparsity, by size of blocks")
    if of_suite(record, "sparsity"):
        yield image("conv-sparsity", "Speed-up over dense against sparsity, by format")


# ------------------------------------------------------------------------------------- layers


def _suites(record: Record) -> Iterator[str]:
    for suite, title in TITLES.items():
        rows = of_suite(record, suite)
        if rows:
            yield f"### {title}"
            yield layer_table(rows)


def layer_table(rows: Sequence[Row]) -> str:
    """Cases down, the fastest dense convolution and ours across: times dense, and GFLOP/s."""
    columns = list(dict.fromkeys(_column(r, rows) for r in rows if r["kind"] != "dense"))
    lines = head([*_heads(rows), "fastest dense", *columns])
    for key in dict.fromkeys(_case(r, rows) for r in rows):
        here = [r for r in rows if _case(r, rows) == key]
        dense = min((r for r in here if r["kind"] == "dense"), key=_us, default=None)
        cells = {_column(r, rows): _cell(r) for r in here if r["kind"] != "dense"}
        lines.append(line([*key, _dense(dense), *(cells.get(c, "") for c in columns)]))
    return "\n".join(lines)


def _us(row: Row) -> float:
    return float(row["us"])


def _ms(row: Row) -> str:
    ms = _us(row) / 1e3
    return f"{ms:.3g} ms" if ms < 100 else f"{ms:,.0f} ms"


def _heads(rows: Sequence[Row]) -> list[str]:
    return ["layer", *(name for name, _ in _axes(rows))]


def _axes(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What else than the layer differs between cases: its heading and its field."""
    fields = {"batch": "batch", "product": "op", "density": "asked", "threads": "threads"}
    return [(name, f) for name, f in fields.items() if f == "batch" or _varies(rows, f)]


def _varies(rows: Sequence[Row], field: str) -> bool:
    return len({r[field] for r in rows}) > 1


def _case(row: Row, rows: Sequence[Row]) -> tuple[Any, ...]:
    return layer_name(row), *(row[field] for _, field in _axes(rows))


def _column(row: Row, rows: Sequence[Row]) -> str:
    """The contender's name, without what its densities and its layer make of it."""
    words = str(row["name"]).split()
    name = " ".join(w for w in words if ":" not in w and w != "SparseConv2d")
    own = [r for r in rows if r["kind"] != "dense"]
    return f"{name}, {row['layout']}" if _varies(own, "layout") else name


def _cell(row: Row) -> str:
    rate = f"{row['gflops']:.0f}"
    ratio = row["speedup"]
    return f"{rate} GFLOP/s" if ratio is None else f"{ratio:.{1 if ratio >= 0.1 else 2}f}x ({rate})"


def _dense(row: Row | None) -> str:
    if row is None:
        return ""
    name = str(row["name"]).replace(" dense", "").replace(" nn.Conv2d", "")
    return f"{_ms(row)} ({row['gflops']:.0f}), {name} {row['layout']}"


# ----------------------------------------------------------------------------------- networks


def _networks(name: str, record: Record) -> Iterator[str]:
    yield f"## Networks\n\nGenerated from [{name}]({name})."
    yield about(record)
    steps = select(record["models"], suite="step")
    if steps:
        parts = list(steps[0]["parts"])
        batch = steps[0]["batch"]
        yield f"### One step of training, batch {batch}, one thread"
        yield (
            "With shares of the step's CPU time, each operator's by itself. *Other* is additions, "
            "gradients of biases, pooling, the loss, and what autograd adds."
        )
        lines = head(["network", "convolutions", "time", "times dense", *parts])
        for r in steps:
            total = sum(r["parts"].values())
            shares = [f"{100 * r['parts'][part] / total:.0f} %" for part in parts]
            lines.append(line([*_network(r), *shares]))
        yield "\n".join(lines)
    runs = select(record["models"], suite="inference")
    if runs:
        yield "### Inference in ONNX Runtime, one thread"
        lines = head(["network", "convolutions", "time", "times dense", "batch"])
        yield "\n".join([*lines, *(line([*_network(r), r["batch"]]) for r in runs)])
    yield from missing(record)


def _network(row: Row) -> list[str]:
    density = "" if row["kind"] == "dense" else f", {100 * row['density']:.3g} %"
    name = f"{row['name']} {row['layout']}{density}"
    return [row["network"], name, _ms(row), f"{row['speedup']:.2f}x"]
