"""Fit the cost model to convolutions here: ``python -m benchmarks.fit``, with ``--write`` for good.

Every product of some convolutions is timed, of both layouts at each level that this CPU has, and of
torch's dense convolution. Coefficients are those of the least squares of relative errors, none
below zero, then scaled so that as many predictions are too long as too short. Rows of
cpp/cost/defaults.cpp are printed, or written, with how well they predict; build again afterwards.
Rows of a level that this CPU lacks are scaled from its best one.

Times are those of the calling thread, the shortest over several rounds: on a busy machine take
more.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls

import spfmt
from spfmt import cost, dispatch
from spfmt.convolution import Convolution

DEFAULTS = Path(__file__).resolve().parent.parent / "cpp" / "cost" / "defaults.cpp"
TERMS = ("call", "operands", "stream", "multiply", "beyond_l2", "beyond_l3")
BEYOND_L3 = 2.5e-11  # seconds per byte from memory: what the other rows have; nothing here needs it
SCALED = {
    "avx512": (0.5, ("operands", "stream", "multiply")),
    "avx2": (0.25, ("stream", "multiply")),
}
"""Levels that may be missing, and what of the next lower one they take how much less of."""


class Layer(NamedTuple):
    """A convolution with padding that keeps the size, but for the stride."""

    inputs: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the weight."""
        return self.outputs, self.inputs // self.groups, self.kernel, self.kernel

    @property
    def options(self) -> dict[str, int]:
        """Keywords of :func:`spfmt.conv2d`."""
        return {"stride": self.stride, "padding": self.kernel // 2, "groups": self.groups}

    def geometry(self) -> cost.Geometry:
        """Return what the model is asked for."""
        return Convolution.of(self.shape, **self.options).geometry(self.size, self.size)


LAYERS = (
    Layer(4, 4, 4, 1),  # little but the call
    Layer(64, 64, 32, 3),
    Layer(128, 128, 16, 3),
    Layer(256, 256, 8, 3),
    Layer(512, 512, 4, 3),
    Layer(16, 16, 32, 3),
    Layer(96, 48, 7, 3),
    Layer(64, 128, 32, 3, 2),
    Layer(256, 512, 8, 3, 2),
    Layer(64, 64, 32, 1),
    Layer(256, 512, 8, 1),
    Layer(64, 128, 56, 1, 2),
    Layer(32, 64, 14, 5),
    Layer(64, 64, 14, 3, groups=4),
)
BATCHES = (1, 6, 32)
DENSITIES = (0.1, 0.3)
FORMATS = {"lists": spfmt.CSR, "groups": spfmt.ShuffledBlock}
MOST_WORK = 3e9  # dense multiply-adds of one product


@dataclass
class Point:
    """One product: the row of coefficients that it is for, and its shortest time."""

    row: str
    terms: list[float]
    run: Callable[[], object]
    name: str
    seconds: float = field(default=float("inf"))

    def measure(self, seconds: float) -> None:
        """Time calls for as long as `seconds`, three at least."""
        self.run()
        spent, calls = 0.0, 0
        while calls < 3 or spent < seconds:
            start = time.thread_time()
            self.run()
            taken = time.thread_time() - start
            self.seconds, spent, calls = min(self.seconds, taken), spent + taken, calls + 1


def operands(layer: Layer, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images, and a gradient of their convolution."""
    geometry, rng = layer.geometry(), np.random.default_rng(2)
    x = rng.standard_normal((batch, layer.inputs, layer.size, layer.size), np.float32)
    dy = rng.standard_normal((batch, layer.outputs, geometry.y[1], geometry.x[1]), np.float32)
    return x, dy


def variants(layout: str) -> list[str]:
    """Return the variants of a layout that convolve."""
    return [name for name, ops, _ in cost.VARIANTS[layout] if set(ops) & set(cost.CONVOLUTIONS)]


def run_forced(variant: str, call: Callable[[], object]) -> object:
    """Call one variant of a product, whichever the model would choose."""
    with cost.forced(variant):
        return call()


def sparse_points(layer: Layer, batch: int, isa: str) -> Iterator[Point]:
    """Return the products of both layouts at a level."""
    x, dy = operands(layer, batch)
    model, numbers = dict(cost.cost_model().coefficients), layer.geometry().numbers()
    for density, (layout, cls) in itertools.product(DENSITIES, FORMATS.items()):
        scores = np.random.default_rng(7).random(layer.shape, np.float32)
        perm = np.random.default_rng(8).permutation(layer.outputs)
        given: dict[str, Any] = {"row_perm": perm} if layout == "groups" else {}
        a = cls.from_scores(scores, density, values=scores, **given)
        summary = cost._kernels.summary(a.plan.compiled, "spmm")
        arguments: dict[str, tuple[Any, ...]] = {
            "conv2d": (x,),
            "conv2d_input": (dy, (layer.size, layer.size)),
            "conv2d_weight": (dy, x),
        }
        name = f"{layer} batch {batch} density {density}"
        for variant, op in itertools.product(variants(layout), arguments):
            if variant == "images" and layout == "groups" and layer.groups > 1:
                continue  # bands that span groups run row by row
            call = functools.partial(
                getattr(spfmt, op), a, *arguments[op], backend=isa, **layer.options
            )
            terms = cost._kernels.kernel_terms(
                model, variant, summary, op, batch, "float32", numbers
            )
            forced = functools.partial(run_forced, variant, call)
            yield Point(f"{isa}.{layout}.{op}.{variant}", terms, forced, name)


def dense_points(layer: Layer, batch: int, isa: str) -> Iterator[Point]:
    """Return the products of torch's dense convolution."""
    x, dy = map(torch.from_numpy, operands(layer, batch))
    weight = torch.rand(layer.shape)
    model, numbers = dict(cost.cost_model().coefficients), layer.geometry().numbers()
    options = layer.stride, layer.kernel // 2, 1, layer.groups
    pair = [[n, n] for n in options[:3]]

    def forward() -> object:
        with torch.inference_mode():
            return torch.nn.functional.conv2d(x, weight, None, *options)

    def backward(wanted: list[bool]) -> object:
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, *pair, False, [0, 0], layer.groups, wanted
        )

    calls = {
        "conv2d": forward,
        "conv2d_input": functools.partial(backward, [True, False, False]),
        "conv2d_weight": functools.partial(backward, [False, True, False]),
    }
    shape = layer.outputs, int(np.prod(layer.shape[1:]))
    # Where dense libraries compute these by Winograd's way, one row stands for all three products.
    winograd = isa == "avx512" and (layer.kernel, layer.stride, layer.groups) == (3, 1, 1)
    for op, call in calls.items():
        terms = cost._kernels.dense_image_terms(model, op, *shape, batch, numbers, winograd)
        row = f"{isa}.dense.{'winograd' if winograd else op}"
        yield Point(row, terms, call, f"{layer} batch {batch}")


def all_points() -> list[Point]:
    """Return everything that is timed here."""
    best = cost._kernels.best_level()
    found: list[Point] = []
    for layer, batch in itertools.product(LAYERS, BATCHES):
        work = batch * np.prod(layer.shape) * np.prod([a[1] for a in layer.geometry()[:2]])
        if work > MOST_WORK:
            continue
        found += dense_points(layer, batch, best)
        for isa in dispatch._available_levels():
            if isa == "scalar" and best != "scalar" and work > MOST_WORK / 30:
                continue
            found += sparse_points(layer, batch, isa)
    return found


def solve(points: list[Point]) -> tuple[np.ndarray, np.ndarray]:
    """Return a row's coefficients, and for every point what they predict over what was measured."""
    terms = np.array([p.terms for p in points])
    seconds = np.array([p.seconds for p in points])
    terms[:, -1] = 0.0  # no weight here is that large
    scale = np.where(terms.max(0) > 0, terms.max(0), 1.0)
    units, _ = nnls(terms / scale / seconds[:, None], np.ones(len(points)))
    ratios = terms @ (units / scale) / seconds
    middle = np.exp(np.mean(np.log(ratios)))  # small predictions cost such a fit less than large
    return units / scale / middle, ratios / middle


def scaled(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return rows for the levels that this CPU lacks."""
    found: dict[str, np.ndarray] = {}
    levels = dispatch.LEVELS
    for below, isa in itertools.pairwise(levels):
        factor, names = SCALED[isa]
        for row, units in {**rows, **found}.items():
            level, _, rest = row.partition(".")
            if level == below and f"{isa}.{rest}" not in rows:
                share = [factor if term in names else 1.0 for term in TERMS]
                found[f"{isa}.{rest}"] = units * share
    return found


def line(row: str, units: np.ndarray) -> str:
    """Write a row as defaults.cpp has it."""
    nothing = 1e-16  # seconds; rounding of the solver leaves less
    shown = [f"{u if u > nothing else 0:.3g}" for u in (*units[:-1], BEYOND_L3)]
    return f'{{"{row}", {{{", ".join(shown)}}}}},'


def write(rows: dict[str, np.ndarray]) -> None:
    """Replace rows in defaults.cpp."""
    text = DEFAULTS.read_text()
    for row, units in rows.items():
        text, count = re.subn(rf'\{{"{re.escape(row)}", \{{[^}}]*\}}\}},', line(row, units), text)
        if count != 1:
            raise SystemExit(f"{DEFAULTS} has {count} rows {row}")
    DEFAULTS.write_text(text)


def main() -> None:
    """Measure, fit and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="over all products (default: 3)")
    parser.add_argument("--seconds", type=float, default=5e-3, help="per product and round")
    parser.add_argument("--worst", type=int, default=0, help="points to show of every row")
    parser.add_argument("--write", action="store_true", help="into cpp/cost/defaults.cpp")
    args = parser.parse_args()
    dispatch.timed_isa()
    spfmt.set_num_threads(1)
    torch.set_num_threads(1)
    points = all_points()
    for done in range(args.rounds):
        for point in points:
            point.measure(args.seconds)
        print(f"{done + 1} of {args.rounds} rounds", flush=True)
    rows: dict[str, np.ndarray] = {}
    print(f"{'predicted / measured: deciles 1, 5, 9':>104}")
    for row in dict.fromkeys(p.row for p in points):
        mine = [p for p in points if p.row == row]
        rows[row], ratios = solve(mine)
        low, mid, high = np.percentile(ratios, [10, 50, 90])
        print(f"{line(row, rows[row]):<92}{low:6.2f}{mid:6.2f}{high:6.2f}")
        for i in np.argsort(-np.abs(np.log(ratios)))[: args.worst]:
            print(f"    {mine[i].name}: {1e3 * mine[i].seconds:.3f} ms, {ratios[i]:.2f}")
    missing = scaled(rows)
    print("\n".join(f"{line(row, units)} (scaled)" for row, units in missing.items()))
    if args.write:
        write({**rows, **missing})


if __name__ == "__main__":
    main()
