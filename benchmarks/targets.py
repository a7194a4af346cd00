"""The targets that the kernels are built for, and what became of them.

Ratios are of medians, to the faster of torch's and ONNX Runtime's dense layers of the same run,
float32 at the highest instruction-set level. Dense layers hold X as (B, C), so that layout decides;
what (C, B) reaches stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.suites import CLASSES, LARGE, NARROW, WIDE
from spfmt.bench import BATCH_FIRST, FEATURES_FIRST, LAYER

Row = Mapping[str, Any]
Record = Mapping[str, Any]

AT_90 = {
    "shuffled_block 16x16": {1: 8.0, 8: 8.0, 64: 8.5, 256: 9.5},
    "hrbp": {1: 8.0, 8: 8.0, 64: 8.5, 256: 9.5},
    "nm 3:32": {1: 7.0, 8: 5.0, 64: 5.5, 256: 6.0},
    "condensed": {1: 4.5, 8: 4.0, 64: 5.0, 256: 6.0},
    "csr": {1: 3.5, 8: 3.5, 64: 4.5, 256: 5.5},
}
AT_50 = [
    ("shuffled_block 16x16", 1, 1.9),
    ("shuffled_block 16x16", 256, 1.9),
    ("nm 2:4", 1, 1.6),
    ("nm 16:32", 1, 1.6),
    ("condensed", 256, 1.0),
    ("nm 16:32", 256, 1.0),
    ("csr", 256, 1.0),
]
AT_99 = {"nm 1:100": "nm 3:32"}  # the name at 90 % where it is another
SDDMM_SHARE = {
    "shuffled_block 16x16": 0.70,
    "hrbp": 0.70,
    "nm 3:32": 0.45,
    "condensed": 0.45,
    "csr": 0.45,
}
TRAINING = {"shuffled_block 16x16": 7.0, "hrbp": 7.0, "condensed": 4.5, "nm 3:32": 4.5}


@dataclass(frozen=True)
class Verdict:
    """One target.

    Attributes
    ----------
    group, what : str
    target : float
        In `unit`: "x", "%", "us" or "s".
    unit : str
    at_most : bool
        Whether smaller is better.
    measured, features_first : float or None
        With X as (B, C), and as (C, B) where that was measured too.
    """

    group: str
    what: str
    target: float
    unit: str
    at_most: bool
    measured: float | None
    features_first: float | None = None

    @property
    def verdict(self) -> str:
        """One of: pass, miss, pass (C, B) where only that layout does, not measured."""
        if self.measured is None:
            return "not measured"
        if self._met(self.measured):
            return "pass"
        also = self.features_first is not None and self._met(self.features_first)
        return f"pass {FEATURES_FIRST}" if also else "miss"

    def _met(self, value: float) -> bool:
        return value <= self.target if self.at_most else value >= self.target

    def cells(self) -> tuple[str, str, str, str, str]:
        """What, target, measured with either layout, and verdict, as text."""
        sign = "≤" if self.at_most else "≥"
        shown = [_text(v, self.unit) for v in (self.measured, self.features_first)]
        return (self.what, f"{sign} {_text(self.target, self.unit)}", *shown, self.verdict)

    def as_json(self) -> dict[str, Any]:
        """The same as an entry of a record."""
        names = ("what", "target", "measured", "features_first", "verdict")
        return {"group": self.group, **dict(zip(names, self.cells(), strict=True))}


def _text(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "%":
        return f"{100 * value:.0f} %"
    return f"{value:.2f}x" if unit == "x" else f"{value:.3g} {unit.replace('us', 'µs')}"


class _Rows:
    """Results of a record, found by their fields."""

    def __init__(self, record: Record) -> None:
        self.rows = record["results"]
        self.facts = record.get("facts", {})
        best = [c for c in record["ceilings"] if c["threads"] == 1]
        self.peak = max((c["gflops"] for c in best), default=None)
        self.dram = max((c["levels"][-1]["bandwidth"] for c in best), default=None)

    def find(self, name: str, shape: Sequence[int], **fields: Any) -> Row | None:
        fields = {"layout": BATCH_FIRST, "threads": 1, "op": "spmm", **fields}
        for row in self.rows:
            here = row["name"] == name and tuple(row["shape"]) == tuple(shape)
            if here and all(row[k] == v for k, v in fields.items()):
                return row
        return None

    def both(self, key: str, name: str, shape: Sequence[int], **fields: Any) -> Iterator[Any]:
        """A field for X as (B, C) and as (C, B); None where not measured."""
        for layout in (BATCH_FIRST, FEATURES_FIRST):
            row = self.find(name, shape, layout=layout, **fields)
            yield None if row is None else row[key]


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} → {shape[0]}"


def judge(record: Record) -> list[Verdict]:
    """Compare a record's results with every target; needs the suites that `TARGET_SUITES` names."""
    rows = _Rows(record)
    verdicts: list[Verdict] = []
    for part in (_forward, _backward, _levels, _threads, _costs, _small, _odd):
        verdicts += part(rows)
    return verdicts


def _forward(rows: _Rows) -> Iterator[Verdict]:
    for shape in (WIDE, NARROW):
        group = f"{_size(shape)}, 90 % sparse, speed-up over dense"
        for name, goals in AT_90.items():
            for batch, goal in goals.items():
                found = rows.both("speedup", name, shape, suite="layers", asked=0.1, batch=batch)
                yield Verdict(group, f"{name}, batch {batch}", goal, "x", False, *found)
        group = f"{_size(shape)}, 50 % sparse, speed-up over dense"
        for name, batch, goal in AT_50:
            found = rows.both("speedup", name, shape, suite="layers", asked=0.5, batch=batch)
            yield Verdict(group, f"{name}, batch {batch}", goal, "x", False, *found)
        group = f"{_size(shape)}, 99 % over 90 % sparse, batch 256"
        for name in ("shuffled_block 16x16", "hrbp", "nm 1:100", "condensed", "csr"):
            fields = {"suite": "layers", "batch": 256}
            less = rows.both("us", name, shape, asked=0.01, **fields)
            more = rows.both("us", AT_99.get(name, name), shape, asked=0.1, **fields)
            yield Verdict(group, name, 4.0, "x", False, *map(_ratio, more, less))


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _backward(rows: _Rows) -> Iterator[Verdict]:
    fields = {"suite": "backward", "batch": 256}
    for shape in (WIDE, NARROW):
        group = f"{_size(shape)}, 90 % sparse, backward, batch 256"
        for name, share in SDDMM_SHARE.items():
            there = rows.both("us", name, shape, op="spmm", **fields)
            back = rows.both("us", name, shape, op="spmm_t", **fields)
            yield Verdict(
                group, f"{name}, spmm_t over spmm", 1.25, "x", True, *map(_ratio, back, there)
            )
            speeds = rows.both("gflops", name, shape, op="sddmm", **fields)
            shares = (_ratio(speed, rows.peak) for speed in speeds)
            yield Verdict(group, f"{name}, sddmm, of FMA peak", share, "%", False, *shares)
        group = f"{_size(shape)}, 90 % sparse, forward + backward, batch 256, over nn.Linear"
        for name, goal in TRAINING.items():
            row = rows.find(f"{name} SparseLinear", shape, op=LAYER, **fields)
            yield Verdict(group, name, goal, "x", False, row and row["speedup"])


def _levels(rows: _Rows) -> Iterator[Verdict]:
    group = "AVX2 over AVX-512, 90 % sparse"
    for shape in (WIDE, NARROW):
        for name in ("shuffled_block 16x16", "hrbp"):
            for batch in (1, 256):
                fields = {"suite": "levels", "batch": batch}
                high = rows.find(name, shape, **fields)
                low = rows.find(f"{name} [avx2]", shape, **fields)
                share = high and low and high["us"] / low["us"]
                what = f"{_size(shape)}, {name}, batch {batch}"
                yield Verdict(group, what, 0.6, "%", False, share)


def _threads(rows: _Rows) -> Iterator[Verdict]:
    group = "two threads over one, 90 % sparse"
    cases = [(WIDE, 64, 1.85), (WIDE, 256, 1.85), (WIDE, 1024, 1.85)]
    cases += [(LARGE, 1, 1.6), (LARGE, 64, 1.85)]
    for shape, batch, goal in cases:
        for name in AT_90:
            if shape == LARGE and name in ("hrbp", "csr"):
                continue
            fields = {"suite": "threads", "batch": batch}
            one, two = (rows.find(name, shape, threads=n, **fields) for n in (1, 2))
            speed = one and two and one["us"] / two["us"]
            yield Verdict(group, f"{_size(shape)}, {name}, batch {batch}", goal, "x", False, speed)


def _costs(rows: _Rows) -> Iterator[Verdict]:
    group = "costs beside the kernel"
    tiny = {"suite": "costs", "shape": (16, 16)}
    numpy_call = rows.find("shuffled_block 16x16", **tiny)
    torch_call = rows.find("SparseLinear, no gradient", **tiny)
    yield Verdict(group, "a call from numpy", 3.0, "us", True, numpy_call and numpy_call["us"])
    yield Verdict(
        group, "a call of SparseLinear", 12.0, "us", True, torch_call and torch_call["us"]
    )
    for format, name in (("nm", "nm 3:32"), ("condensed", "condensed"), ("csr", "csr")):
        fields = {"suite": "costs", "shape": WIDE}
        fresh = rows.find(f"{format}, new values", batch=1, **fields)
        known = rows.find(name, batch=1, **fields)
        forward = rows.find(name, batch=64, **fields)
        share = fresh and known and forward and (fresh["us"] - known["us"]) / forward["us"]
        what = f"{name}: packing new values, of one forward at batch 64"
        yield Verdict(group, what, 1.0, "%", True, share)
    facts = rows.facts
    grouped = facts.get("padding of condensed, as the kernels have it")
    yield Verdict(group, "condensed: padding, 768 columns", 1.5, "x", True, grouped)
    yield Verdict(
        group, "condensed: row grouping", 0.5, "s", True, facts.get("seconds to group rows")
    )


def _small(rows: _Rows) -> Iterator[Verdict]:
    group = "small layers, 90 % sparse, batch 1, speed-up over dense"
    for shape in ((256, 128), (128, 256)):
        for name in AT_90:
            for where in ("", " in onnxruntime"):
                row = rows.find(name + where, shape, suite="shapes", batch=1)
                what = f"{_size(shape)}, {name}{where or ' from numpy'}"
                yield Verdict(group, what, 1.0, "x", False, row and row["speedup"])


def _odd(rows: _Rows) -> Iterator[Verdict]:
    group = "odd and large shapes, 90 % sparse: share of the roof over that of 768 → 3072"
    for shape in ((257, 513), (1000, 1000), LARGE):
        for name in AT_90:
            for batch in (1, 256):
                usual = rows.both("roof", name, WIDE, suite="layers", asked=0.1, batch=batch)
                here = rows.both("roof", name, shape, suite="shapes", batch=batch)
                what = f"{_size(shape)}, {name}, batch {batch}"
                yield Verdict(group, what, 0.75, "%", False, *map(_ratio, here, usual))
    row = rows.find("condensed", CLASSES, suite="shapes", batch=1)
    share = row and rows.dram and row["gbytes"] / rows.dram
    group = "a million classes"
    what = f"{_size(CLASSES)}, fan-in 32, batch 1, of the memory's bandwidth"
    yield Verdict(group, what, 0.75, "%", False, share)


def lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The table as text."""
    group = ""
    for v in verdicts:
        if v.group != group:
            group = v.group
            yield f"\n{group}"
            yield f"  {'':<58}{'target':>10}{BATCH_FIRST:>10}{FEATURES_FIRST:>10}"
        what, target, measured, other, verdict = v.cells()
        yield f"  {what:<58}{target:>10}{measured:>10}{other:>10}  {verdict}"
    count = [v.verdict for v in verdicts].count
    yield (
        f"\n{len(verdicts)} targets: {count('pass')} pass, {count(f'pass {FEATURES_FIRST}')} with "
        f"{FEATURES_FIRST} only, {count('miss')} miss, {count('not measured')} not measured"
    )
