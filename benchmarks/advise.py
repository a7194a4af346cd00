"""How well the cost model chooses and predicts here: ``python -m benchmarks.advise``.

Every variant that could compute a product is timed, the best of several runs as the model predicts
it. The regret of a choice is its time over that of the fastest variant; it is what hangs on the
model's coefficients. Convolutions have one variant each: they show how far off predictions are.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable

import numpy as np
import onnxruntime
import torch

import spfmt
from benchmarks import fit
from spfmt import cost, dispatch
from spfmt.bench.baselines import dense_gemm

SHAPES = ((256, 256), (1000, 1000), (3072, 768), (512, 2048))
DENSITIES = (0.02, 0.1, 0.3, 0.5)
BATCHES = (1, 2, 4, 6, 8, 14, 16, 48, 200)
FORMATS = {"lists": spfmt.CSR, "groups": spfmt.ShuffledBlock}


def best_time(run: Callable[[], object], seconds: float) -> float:
    """Return the shortest time of a call, of at least three and as many as `seconds` allow."""
    run()  # packs and allocates
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_variants(
    a: spfmt.SparseTensor, op: str, batch: int, seconds: float
) -> dict[str, float]:
    """Return the time of every variant of a product."""
    features = a.matrix_shape[1] if op == "spmm" else a.matrix_shape[0]
    x = np.random.default_rng(2).standard_normal((batch, features), np.float32)
    run = functools.partial(getattr(spfmt, op), a, x, batch_first=True)
    times = {}
    for name, ops, largest in cost.VARIANTS[a.layout().name]:
        if op in ops and batch <= largest:
            with cost.forced(name):
                times[name] = best_time(run, seconds)
    return times


def measure_dense(weight: np.ndarray, batch: int, seconds: float) -> float:
    """Return the time of the faster of torch's and ONNX Runtime's dense layer."""
    x = np.random.default_rng(2).standard_normal((batch, weight.shape[1]), np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(dense_gemm(weight), options)
    tensors = torch.from_numpy(x), torch.from_numpy(weight)
    with torch.inference_mode():
        layer = best_time(lambda: torch.nn.functional.linear(*tensors), seconds)
    return min(layer, best_time(lambda: session.run(None, {"x": x}), seconds))


def convolution_errors(isa: str, seconds: float) -> dict[str, list[float]]:
    """Return predicted over measured times of convolutions, by layout, and of dense ones."""
    units = cost.cost_model().coefficients
    found: dict[str, list[float]] = {}
    for layer, batch in itertools.product(fit.LAYERS, fit.BATCHES[:2]):
        best = cost._kernels.best_level()
        for point in (*fit.sparse_points(layer, batch, isa), *fit.dense_points(layer, batch, best)):
            point.measure(seconds)
            row = [units[f"{point.row}.{term}"] for term in fit.TERMS]
            ratio = float(np.dot(row, point.terms)) / point.seconds
            found.setdefault(f"conv {point.row.split('.')[1]}", []).append(ratio)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4e-3, help="per measured point")
    seconds = parser.parse_args().seconds
    spfmt.set_num_threads(1)
    torch.set_num_threads(1)
    isa = dispatch.timed_isa()
    regret: dict[str, list[float]] = {}
    error: dict[str, list[float]] = {}
    for shape, density in itertools.product(SHAPES, DENSITIES):
        scores = np.random.default_rng(7).random(shape, np.float32)
        perm = np.random.default_rng(8).permutation(shape[0])
        for layout, cls in FORMATS.items():
            given = {"row_perm": perm} if layout == "groups" else {}
            a = cls.from_scores(scores, density, values=scores, **given)
            for op, batch in itertools.product(("spmm", "spmm_t"), BATCHES):
                times = measure_variants(a, op, batch, seconds)
                choice = a.plan.choice(op, dispatch.select(op, layout, "float32"), batch, 1)
                regret.setdefault(layout, []).append(times[choice.variant] / min(times.values()))
                error.setdefault(layout, []).append(choice.seconds / times[choice.variant])
        for batch in (1, 8, 64):
            predicted = cost._kernels.dense_seconds(*shape, batch, 1)
            error.setdefault("dense", []).append(predicted / measure_dense(scores, batch, seconds))
    error |= convolution_errors(isa, seconds)
    print(f"{isa}, one thread")
    print(f"{'':<12}{'cases':>6}{'regret':>9}{'worst':>8}{'predicted / measured':>24}")
    for name, ratios in error.items():
        lost = regret.get(name, [1.0])
        low, mid, high = np.percentile(ratios, [10, 50, 90])
        print(
            f"{name:<12}{len(ratios):>6}{np.exp(np.mean(np.log(lost))):>9.3f}{max(lost):>8.2f}"
            f"{low:>10.2f}{mid:>7.2f}{high:>7.2f}"
        )


if __name__ == "__main__":
    main()
