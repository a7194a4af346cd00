"""Calibration: fit the cost model to a few timed products and dense layers on this machine.

Each kernel variant is timed on a small grid of structures and batches; its coefficients are the
non-negative least squares of the *relative* errors (Lawson and Hanson, Solving Least Squares
Problems, 1974, chapter 23; here all supports are tried, for there are at most 2^5). What such short
runs cannot see, memory behind the L3 cache, keeps its compiled-in coefficient.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt

import spfmt._kernels as _kernels

from . import cost, threads
from .cost import CostModel
from .dispatch import Plan, check_workload, timed_isa
from .formats._layout import Groups, Lists, lower_groups

__all__ = ["calibrate", "dense_layers"]

Array = npt.NDArray[Any]
logger = logging.getLogger("spfmt")

TERMS = ("call", "operands", "stream", "multiply", "beyond_l2", "beyond_l3")
"""Names of a cost's terms, in the order of ``cpp/cost.h``."""

# Rows, columns, density, and rows per block in the structures of groups. Small ones show what a
# call costs, short blocks what a column costs beside its rows, the last two what leaves L2.
_GRID = (
    (64, 64, 0.3, 16),
    (256, 384, 0.1, 16),
    (512, 768, 0.1, 4),
    (768, 3072, 0.05, 8),
    (3072, 768, 0.1, 16),
    (1024, 1536, 0.5, 16),
)
_THREADED = (3072, 768, 0.1)
_DENSE_GRID = ((64, 64), (256, 256), (512, 1024), (768, 3072), (2048, 1536))
_BATCHES = {
    "lookup": (1, 2, 4, 8, 12, 16),
    "bands": (1, 2, 4, 8, 12, 16),
    "octets": (1, 4, 8, 16),
    "panels": (4, 16, 32, 64, 256),
}
_DENSE_BATCHES = (1, 4, 16, 64, 256)
_MOST_WORK = {"scalar": 1e7, "avx2": 6e7, "avx512": 6e7}  # multiply-adds of one timed run
_SECONDS_PER_POINT = 4e-3
_SLICE_SECONDS = 1e-3


@dataclass(frozen=True)
class _Point:
    """One measurement: the terms of its cost, and the seconds."""

    terms: tuple[float, ...]
    seconds: float


def calibrate(threads: int | None = None, *, save: bool = True) -> CostModel:
    """Measure this CPU at the active instruction-set level, and use the result from now on.

    Takes two to five seconds, and imports torch and onnxruntime where they are installed: the dense
    side is the faster of torch's ``F.linear`` and ONNX Runtime's Gemm, or numpy's matmul where
    neither is there. Kernels may change their variant, and results their last bits, when another
    model is put in use.

    Parameters
    ----------
    threads : int, optional
        Threads whose gain is measured; :func:`spfmt.get_num_threads` by default. With one, what
        is known about threads stays as it is.
    save : bool
        Whether to keep the result in the cache directory for later processes and for ONNX Runtime
        elsewhere. Where it cannot be written, a warning says so and this process uses it all the
        same.

    Returns
    -------
    CostModel
        Print it to see the coefficients.

    Raises
    ------
    FormatError
        If `threads` is no positive int, or ``SPFMT_ISA`` is invalid or forces a level that this
        build only emulates.
    """
    _, used = check_workload(1, threads, "spmm")
    isa = timed_isa()
    logger.info("calibrating the cost model for %s, %d threads", isa, used)
    old = cost.cost_model()
    fitted = dict(old.coefficients) | _cache_sizes()
    with _single_thread():
        fitted |= _fit_kernels(isa, fitted)
        fitted |= _fit_dense(fitted)
    if used > 1:
        fitted |= _fit_threads(used)
    levels = tuple(sorted({*old.levels, isa}))
    model = CostModel(fitted, old.cpu, date.today().isoformat(), levels)
    if save:
        try:
            model = CostModel(fitted, old.cpu, model.date, levels, cost.save(model))
        except OSError as error:
            logger.warning("the calibration could not be saved: %s", error)
    cost.use(model)
    return model


def _cache_sizes() -> dict[str, float]:
    """Return the sizes of the caches that the C library knows."""
    found = {}
    for key, name in (("l2_bytes", "SC_LEVEL2_CACHE_SIZE"), ("l3_bytes", "SC_LEVEL3_CACHE_SIZE")):
        with contextlib.suppress(ValueError, OSError):
            size = os.sysconf(name)
            if size > 0:
                found[key] = float(size)
    return found


def names() -> list[str]:
    """Return the names of all coefficients that belong to a row, a row's terms in order."""
    found = [name for name in _kernels.cost_model() if "." in name]
    return sorted(found, key=lambda n: (n.rpartition(".")[0], TERMS.index(n.rpartition(".")[2])))


# ------------------------------------------------------------------------------------ kernels


def _structures(rng: np.random.Generator) -> Iterator[Plan]:
    """Yield random structures of both layouts over the grid."""
    for rows, cols, density, _ in _GRID:
        yield Plan(_random_lists(rows, cols, density, rng))
    for rows, cols, density, height in _GRID:
        yield Plan(_random_groups(rows, cols, density, height, rng))


def _random_groups(
    rows: int, cols: int, density: float, height: int, rng: np.random.Generator
) -> Groups:
    groups, width = -(-rows // height), max(1, round(density * cols))
    chosen = np.argsort(rng.random((groups, cols)), axis=1)[:, :width]
    group_ptr = np.minimum(np.arange(groups + 1) * height, rows)
    col_ptr = np.arange(groups + 1) * width
    perm = rng.permutation(rows).astype(np.int32)
    columns = chosen.astype(np.int32).reshape(-1)
    return lower_groups((rows, cols), perm, group_ptr, col_ptr, columns)


def _random_lists(rows: int, cols: int, density: float, rng: np.random.Generator) -> Lists:
    fan_in = max(1, round(density * cols))
    chosen = np.argpartition(rng.random((rows, cols), np.float32), fan_in - 1)[:, :fan_in]
    columns = np.sort(chosen, axis=1).astype(np.int32).reshape(-1)
    return Lists(rows, cols, np.arange(rows + 1, dtype=np.int64) * fan_in, columns)


def _cases(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield the (op, variant) pairs that have coefficients of their own."""
    # spmm_t of lists is spmm of the transposed lists.
    ops = ("spmm", "sddmm") if plan.layout.name == "lists" else ("spmm", "spmm_t", "sddmm")
    return ((op, variant) for op in ops for variant in variants(plan, op, 1))


def variants(plan: Plan, op: str, batch: int) -> list[str]:
    """Return the kernel variants that can compute a product."""
    return [
        name for name, ops, most in cost.VARIANTS[plan.layout.name] if op in ops and batch <= most
    ]


def _fit_kernels(isa: str, model: dict[str, float]) -> dict[str, float]:
    """Time all variants on all structures and fit their coefficients."""
    points: dict[str, list[_Point]] = {}
    for plan in _structures(np.random.default_rng(0)):
        layout = plan.layout.name
        values = np.random.default_rng(1).standard_normal(plan.nnz, np.float32)
        for op, variant in _cases(plan):
            summary = _kernels.summary(plan.compiled, op)
            for batch in _BATCHES[variant]:
                if batch > 1 and plan.nnz * batch > _MOST_WORK[isa]:
                    continue
                run = product(plan, values, op, batch)
                with cost.forced(variant):
                    seconds = best_time(run)
                terms = _kernels.kernel_terms(model, variant, summary, op, batch, "float32")
                name = f"{isa}.{layout}.{op}.{variant}"
                points.setdefault(name, []).append(_Point(tuple(terms), seconds))
    return _fitted(points, model)


def product(plan: Plan, values: Array, op: str, batch: int) -> Callable[[], object]:
    """Return a call of one product with (batch, features) operands, its values packed once."""
    rng = np.random.default_rng(2)
    rows, cols = plan.shape
    x = rng.standard_normal((batch, cols), np.float32)
    dy = rng.standard_normal((batch, rows), np.float32)
    if op == "sddmm":
        return lambda: plan.sddmm(dy, x, batch_first=True)
    if op == "spmm_t":
        return lambda: plan.spmm_t(values, dy, batch_first=True, constant=0)
    return lambda: plan.spmm(values, x, batch_first=True, constant=0)


def best_time(
    run: Callable[[], object], seconds: float | None = None, *, alone: bool = True
) -> float:
    """Return the shortest time of a call: at least three runs, more while `seconds` last.

    Where the call works `alone` on this thread, the time in which others had the core does not
    count in runs longer than a scheduler's slice, which would all be slow on a busy machine. Some
    shorter run is undisturbed, and the thread's own clock is too coarse for it on virtual machines.
    """
    run()  # packs layouts and values, allocates
    times: list[float] = []
    stop = time.perf_counter() + (_SECONDS_PER_POINT if seconds is None else seconds)
    while len(times) < 3 or time.perf_counter() < stop:
        busy = time.thread_time()
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
        busy = time.thread_time() - busy
        times.append(min(wall, busy) if alone and wall > _SLICE_SECONDS else wall)
    return min(times)


# -------------------------------------------------------------------------------------- dense


def dense_layers(weight: Array, threads: int) -> dict[str, Callable[[Array], object]]:
    """Return the dense layers to compare with, by library: functions of X (batch, C).

    Parameters
    ----------
    weight : ndarray of float32, shape (R, C)
    threads : int
        Threads of each; torch's are set for the process.

    Notes
    -----
    numpy's matmul takes part only where no other library is installed: its number of threads
    cannot be set from here.
    """
    found: dict[str, Callable[[Array], object]] = {}
    if importlib.util.find_spec("torch"):
        found["torch"] = _torch_layer(weight, threads)
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        found["onnxruntime"] = _onnx_layer(weight, threads)
    return found or {"numpy": lambda x: x @ weight.T}


def _torch_layer(weight: Array, threads: int) -> Callable[[Array], object]:
    import torch

    torch.set_num_threads(threads)
    tensor = torch.from_numpy(weight)
    cached: dict[int, torch.Tensor] = {}

    def run(x: Array) -> object:
        tokens = cached.get(id(x))
        if tokens is None:
            tokens = cached[id(x)] = torch.from_numpy(x)
        with torch.inference_mode():
            return torch.nn.functional.linear(tokens, tensor)

    return run


def dense_gemm(weight: Array, *, transposed: bool = False) -> bytes:
    """Return an ONNX model of one dense layer, Y = X Wᵀ, or Y = X W where `transposed`.

    Parameters
    ----------
    weight : ndarray of float32, shape (R, C)
    transposed : bool
        Whether X is (batch, R) and Y (batch, C) instead of the other way round.
    """
    from onnx import TensorProto, helper, numpy_helper

    n_out, n_in = weight.shape[::-1] if transposed else weight.shape
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=int(not transposed))],
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, n_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, n_out])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return model


def _onnx_layer(weight: Array, threads: int) -> Callable[[Array], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        dense_gemm(weight), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x})


def dense_time(weight: Array, batch: int, threads: int) -> float:
    """Return the shortest time of the fastest dense layer."""
    x = np.random.default_rng(2).standard_normal((batch, weight.shape[1]), np.float32)
    layers = dense_layers(weight, threads)
    alone = threads == 1 and "numpy" not in layers
    return min(best_time(functools.partial(run, x), alone=alone) for run in layers.values())


def _fit_dense(model: dict[str, float]) -> dict[str, float]:
    """Time the dense layers and fit their coefficients."""
    points = []
    for rows, cols in _DENSE_GRID:
        weight = np.random.default_rng(0).standard_normal((rows, cols), np.float32)
        for batch in _DENSE_BATCHES:
            if batch > 1 and rows * cols * batch > 7e8:
                continue
            terms = _kernels.dense_terms(model, rows, cols, batch)
            points.append(_Point(tuple(terms), dense_time(weight, batch, 1)))
    return _fitted({"dense": points}, model)


# ------------------------------------------------------------------------------------ threads


def _fit_threads(used: int) -> dict[str, float]:
    """Measure what further threads add, on products large enough to share."""
    rng = np.random.default_rng(0)
    plan = Plan(_random_lists(*_THREADED, rng))
    values = rng.standard_normal(plan.nnz, np.float32)
    weight = rng.standard_normal(_THREADED[:2], np.float32)
    run = product(plan, values, "spmm", 256)
    times, dense = [], []
    for n in (1, used):
        with _threads(n):
            times.append(best_time(run, 5 * _SECONDS_PER_POINT, alone=n == 1))
            dense.append(dense_time(weight, 256, n))
    return {
        "efficiency": _efficiency(times, used),
        "dense_efficiency": _efficiency(dense, used),
    }


def _efficiency(times: list[float], used: int) -> float:
    """Return the share of each further thread that was won."""
    alone, shared = times
    return float(np.clip((alone / shared - 1) / (used - 1), 0.0, 1.0))


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """Let products and torch use `n` threads, and restore what was."""
    before = threads._override
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    torch_before = torch.get_num_threads() if torch else 0
    try:
        threads.set_num_threads(n)
        yield
    finally:
        threads.set_num_threads(before)
        if torch:
            torch.set_num_threads(torch_before)


def _single_thread() -> contextlib.AbstractContextManager[None]:
    return _threads(1)


# ---------------------------------------------------------------------------------------- fit


def _fitted(points: dict[str, list[_Point]], model: dict[str, float]) -> dict[str, float]:
    """Fit every row of coefficients to its points, the last term held."""
    out = {}
    for name, measured in points.items():
        held = model[f"{name}.{TERMS[-1]}"]
        terms = np.array([p.terms for p in measured])
        seconds = np.array([p.seconds for p in measured])
        rest = np.maximum(seconds - held * terms[:, -1], 0.0)
        solution = fit_relative(terms[:, :-1], rest, seconds)
        out.update({f"{name}.{t}": float(v) for t, v in zip(TERMS, [*solution, held], strict=True)})
    return out


def fit_relative(terms: Array, rest: Array, seconds: Array) -> Array:
    """Return x >= 0 that minimises the sum of ((terms @ x - rest) / seconds)**2.

    Parameters
    ----------
    terms : ndarray, shape (points, n)
    rest : ndarray, shape (points,)
        What the terms shall explain.
    seconds : ndarray, shape (points,)
        What errors are relative to, all positive.

    Returns
    -------
    ndarray, shape (n,)
    """
    a, b = terms / seconds[:, None], rest / seconds
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    a = a / scale
    best: Array = np.zeros(a.shape[1])
    best_error = float(b @ b)
    for size in range(1, a.shape[1] + 1):
        for support in map(list, itertools.combinations(range(a.shape[1]), size)):
            x = np.linalg.lstsq(a[:, support], b, rcond=None)[0]
            error = float(np.square(a[:, support] @ x - b).sum())
            if (x >= 0).all() and error < best_error:
                best = np.zeros(a.shape[1])
                best[support], best_error = x, error
    return np.asarray(best / scale)
