"""Sparse against dense linear layers: ``python -m benchmarks.linear [--shape 3072x768]``.

Every kernel's result is checked against float64 before it is timed. All contenders are then timed
in turn, many times over, in one process; the table shows medians and the ratio to the *faster* of
torch's and ONNX Runtime's dense layers in the same run. Each side is called as its user would:
``spfmt.spmm`` on arrays, ``F.linear`` on tensors, ``session.run``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

import spfmt

Contender = Callable[[], object]


def random_tensors(shape: tuple[int, int], density: float) -> dict[str, spfmt.SparseTensor]:
    """One tensor per format on a random structure: the hardest case for caches and packing."""
    rng = np.random.default_rng(0)
    scores = rng.random(shape, dtype=np.float32)
    weight = rng.standard_normal(shape, dtype=np.float32)
    m = 32
    return {
        "shuffled_block 16x16": spfmt.ShuffledBlock.from_scores(
            scores, density, block_shape=(16, 16), row_perm=rng.permutation(shape[0]), values=weight
        ),
        "hrbp": spfmt.HRBP.from_scores(scores, density, values=weight, method="fast"),
        f"nm {round(density * m)}:{m}": spfmt.NM.from_scores(
            scores, n=round(density * m), m=m, values=weight
        ),
        "condensed": spfmt.Condensed.from_scores(scores, density, values=weight),
        "csr": spfmt.CSR.from_scores(scores, density, values=weight),
    }


def dense_session(weight: np.ndarray, threads: int) -> onnxruntime.InferenceSession:
    """ONNX Runtime's own dense layer, Y = X Wᵀ + 0."""
    rows, cols = weight.shape
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, cols])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, rows])],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.zeros(rows, np.float32), "b"),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def check(a: spfmt.SparseTensor, x: np.ndarray) -> None:
    """Raise unless the product agrees with float64 within its rounding bound."""
    dense = a.to_dense()
    got = spfmt.spmm(a, x, batch_first=True)
    want = x.astype(np.float64) @ dense.T.astype(np.float64)
    bound = (x.shape[1] + 2) * np.finfo(np.float32).eps * (np.abs(x) @ np.abs(dense).T)
    if not (np.abs(got - want) <= bound).all():
        raise SystemExit(f"wrong result: {a!r} at batch {x.shape[0]}; no time is reported for it")


def contenders(
    tensors: dict[str, spfmt.SparseTensor], session: onnxruntime.InferenceSession, batch: int
) -> dict[str, Contender]:
    """The calls to time at one batch size."""
    shape = next(iter(tensors.values())).matrix_shape
    x = np.random.default_rng(1).standard_normal((batch, shape[1]), dtype=np.float32)
    weight = torch.randn(shape)
    tokens = torch.from_numpy(x)
    calls: dict[str, Contender] = {
        "torch dense": lambda: torch.nn.functional.linear(tokens, weight),
        "onnxruntime dense": lambda: session.run(None, {"x": x}),
    }
    features = np.ascontiguousarray(x.T)
    for name, a in tensors.items():
        check(a, x)
        calls[f"{name}, (B, C)"] = lambda a=a: spfmt.spmm(a, x, batch_first=True)
        if batch > 1:
            calls[f"{name}, (C, B)"] = lambda a=a: spfmt.spmm(a, features)
    return calls


def medians(calls: dict[str, Contender], seconds: float) -> dict[str, float]:
    """Median microseconds of each call, interleaved for about `seconds` in all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[next(iter(times))]) < 7:
        for name, call in calls.items():
            call()  # once untimed: each finds its own data as warm as in a loop of its own
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t)) * 1e6 for name, t in times.items()}


def cpu_name() -> str:
    """The CPU's name as the kernel reports it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """Time all contenders at all batch sizes and print the table as it grows."""
    rows, cols = (int(n) for n in args.shape.split("x"))
    tensors = random_tensors((rows, cols), args.density)
    session = dense_session(np.random.default_rng(2).random((rows, cols), np.float32), args.threads)
    results: list[dict[str, object]] = []
    for batch in args.batch:
        times = medians(contenders(tensors, session, batch), args.seconds)
        dense = min(times["torch dense"], times["onnxruntime dense"])
        print(
            f"\n{cols} -> {rows}, density {args.density}, batch {batch}, {args.threads} thread(s)"
        )
        for name, micros in times.items():
            print(f"  {name:<32}{micros:>10.1f} us {dense / micros:>7.2f}x")
            results.append(
                {"batch": batch, "name": name, "us": round(micros, 2), "speedup": dense / micros}
            )
    return results


def main() -> None:
    """Parse the command line, measure, and write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="3072x768", help="rows x columns of the weight")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="per batch size")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    spfmt.set_num_threads(args.threads)
    results = measure(args)
    if args.json:
        record = {
            "date": date.today().isoformat(),
            "cpu": cpu_name(),
            "isa": spfmt.dispatch.active_isa(),
            "python": platform.python_version(),
            "versions": {m.__name__: m.__version__ for m in (spfmt, np, torch, onnx, onnxruntime)},
            "shape": args.shape,
            "density": args.density,
            "threads": args.threads,
            "results": results,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
