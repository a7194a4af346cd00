"""Prediction against measurement: ``python -m benchmarks.advise``.

Structures, densities and batches are others than those of the calibration. Each contender is timed
as its user calls it, with (batch, features) arrays; the best of several runs counts, because that
is what the model predicts. ``--defaults`` prints the rows of ``cpp/cost_defaults.cpp`` for this
machine instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import spfmt
from spfmt import calibration, cost, dispatch

SHAPES = ((256, 256), (1000, 1000), (3072, 768), (512, 2048))
DENSITIES = (0.02, 0.1, 0.3, 0.5)
BATCHES = (1, 6, 14, 48, 200)


@dataclass(frozen=True)
class Run:
    """One contender in one case; seconds of the best other variant if there is one."""

    case: str
    format: str
    predicted: float
    measured: float
    other_variant: float | None = None

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return abs(self.predicted / self.measured - 1)


def tensors(shape: tuple[int, int], density: float) -> list[spfmt.SparseTensor]:
    """Random structures of one weight."""
    scores = np.random.default_rng(7).random(shape, np.float32)
    perm = np.random.default_rng(8).permutation(shape[0])
    found: list[spfmt.SparseTensor] = [
        spfmt.CSR.from_scores(scores, density),
        spfmt.Condensed.from_scores(scores, density),
        spfmt.ShuffledBlock.from_scores(scores, density, block_shape=(16, 1), row_perm=perm),
    ]
    if density * 32 >= 1:
        found.append(spfmt.NM.from_scores(scores, n=round(density * 32), m=32))
    return [a.astype("float32") for a in found]


def measure(a: spfmt.SparseTensor, case: str, batch: int) -> Run:
    """Time the chosen variant, and the others that exist."""
    run = calibration.product(a.plan, a.values, "spmm", batch)
    kernel = dispatch.select("spmm", a.format, "float32")
    choice = a.plan.choice("spmm", kernel, batch, 1)
    measured, others = calibration.best_time(run), []
    for variant in calibration.variants(a.plan, "spmm", batch):
        if variant != choice.variant:
            with cost.forced(variant):
                others.append(calibration.best_time(run))
    if others:
        measured = min(measured, calibration.best_time(run))
    return Run(case, a.format, choice.seconds, measured, min(others, default=None))


def measure_all() -> list[Run]:
    """Time every case, dense included."""
    runs = []
    for shape, density in itertools.product(SHAPES, DENSITIES):
        weight = np.random.default_rng(0).standard_normal(shape, np.float32)
        held = tensors(shape, density)
        for batch in BATCHES:
            case = f"{shape[0]}x{shape[1]}, density {density}, batch {batch}"
            runs += [measure(a, case, batch) for a in held]
            predicted = cost._kernels.dense_seconds(*shape, batch, 1)
            runs.append(Run(case, "dense", predicted, calibration.dense_time(weight, batch, 1)))
    return runs


def quantiles(name: str, errors: list[float]) -> str:
    """One line: median and 90th percentile."""
    median, high = np.percentile(errors, [50, 90])
    return f"{name:<24}{len(errors):>6}{median:>10.1%}{high:>10.1%}"


def report(runs: list[Run]) -> str:
    """Relative errors per format, and how good the choices were."""
    lines = [f"{'relative error of':<24}{'cases':>6}{'median':>10}{'p90':>10}"]
    for name in dict.fromkeys(r.format for r in runs):
        lines.append(quantiles(name, [r.error for r in runs if r.format == name]))
    lines.append(quantiles("all times", [r.error for r in runs]))
    cases = [[r for r in runs if r.case == c] for c in dict.fromkeys(r.case for r in runs)]
    speedups = []
    near, lost = 0, []
    for case in cases:
        dense = next(r for r in case if r.format == "dense")
        for r in case:
            if r is not dense:
                truth = dense.measured / r.measured
                speedups.append(abs(dense.predicted / r.predicted / truth - 1))
        chosen = min(case, key=lambda r: r.predicted)
        best = min(case, key=lambda r: r.measured)
        near += chosen.measured <= 1.1 * best.measured
        lost.append(chosen.measured / best.measured)
    lines.append(quantiles("speed-up over dense", speedups))
    lines.append(
        f"advised format within 10 % of the best: {near} of {len(cases)}; "
        f"mean loss {np.mean(lost) - 1:.1%}, worst {max(lost) - 1:.0%}"
    )
    both = [r for r in runs if r.other_variant is not None]
    good = sum(r.measured <= 1.1 * (r.other_variant or 0.0) for r in both)
    lines.append(f"kernel variant within 10 % of the best one: {good} of {len(both)}")
    return "\n".join(lines)


def print_defaults() -> None:
    """Calibrate this CPU's levels thoroughly and print the rows of ``cpp/cost_defaults.cpp``."""
    for isa in dispatch._available_levels():
        os.environ["SPFMT_ISA"] = isa
        model = spfmt.calibrate(threads=1, save=False)
    rows: dict[str, list[float]] = {}
    for name in calibration.names():
        row, _, _ = name.rpartition(".")
        rows.setdefault(row, []).append(model.coefficients[name])
    for row, units in rows.items():
        print(f'    {{"{row}", {{{", ".join(f"{u:.3g}" for u in units)}}}}},')


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--defaults", action="store_true", help="print compiled-in coefficients")
    parser.add_argument("--no-calibration", action="store_true", help="judge the model in use")
    parser.add_argument("--seconds", type=float, default=10e-3, help="per measured point")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.defaults:
        calibration._SECONDS_PER_POINT = args.seconds
        return print_defaults()
    isa = dispatch.timed_isa()
    if not args.no_calibration:
        spfmt.calibrate(threads=1, save=False)
    calibration._SECONDS_PER_POINT = args.seconds
    spfmt.set_num_threads(1)
    runs = measure_all()
    print(f"{cost.cost_model().cpu}, {isa}, one thread")
    print(f"cost model: {cost.cost_model().origin}\n{report(runs)}")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in runs], indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
