"""What a call costs above its kernel: ``python -m benchmarks.overhead``.

Every contender does one product (or one forward and backward pass) with one thread. Contenders take
turns, and the table shows medians. The kernel's own time is that of the compiled call on addresses,
the shortest way into it.

With ``--compiled`` a second table shows what one layer costs inside a graph of torch.compile: the
slope between chains of 4 and of 16 small layers, from which the cost of entering the graph cancels
out. A dense layer's slope in the same table says what Inductor itself takes for a layer.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import numpy as np
import torch

import spfmt
from spfmt.bench.timing import interleave
from spfmt.torch import SparseLinear

Contender = Callable[[], object]
SHAPES = ((128, 128), (256, 128), (3072, 768))  # (R, C)
WIDTH, LENGTHS = 128, (4, 16)  # of chains of layers
FORMATS = {
    "condensed": (spfmt.Condensed, {}),
    "nm": (spfmt.NM, {"m": 32}),
    "csr": (spfmt.CSR, {}),
    "shuffled_block": (spfmt.ShuffledBlock, {"block_shape": (16, 16)}),
    "hrbp": (spfmt.HRBP, {}),
}


def kernel_call(a: spfmt.SparseTensor, x: np.ndarray) -> Contender:
    """Return the compiled product alone, on memory that exists already."""
    rows, cols = a.matrix_shape
    out = np.empty((1, rows), x.dtype)
    values, version = a.values, a.version
    spfmt.spmm(a, x, batch_first=True)  # compiles the plan
    multiply_at = a.plan._calls[2]
    where = (values.ctypes.data, version, x.ctypes.data, (cols, 1), 1, out.ctypes.data, 0, 1)

    def call() -> object:
        return multiply_at(0, False, *where), values, x, out

    return call


def without_grad(layer: torch.nn.Module, x: torch.Tensor) -> Contender:
    """Return a forward pass that records nothing."""

    def call() -> object:
        with torch.no_grad():
            return layer(x)

    return call


def forward_and_backward(layer: torch.nn.Module, x: torch.Tensor) -> Contender:
    """Return both passes, with gradients of input and parameters."""
    x = x.clone().requires_grad_()
    wanted = [x, *layer.parameters()]
    gradient = torch.ones_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), wanted, gradient)


def contenders(
    a: spfmt.SparseTensor, dense: torch.nn.Linear, compiled: bool
) -> dict[str, Contender]:
    """Return what is timed for one weight, by name."""
    x = np.random.default_rng(0).random((1, a.matrix_shape[1]), dtype=np.float32)
    layer = SparseLinear.from_tensor(a, bias=dense.bias)
    tensor = torch.from_numpy(x)
    found = {
        "kernel": kernel_call(a, x),
        "numpy": lambda: spfmt.spmm(a, x, batch_first=True),
        "torch": without_grad(layer, tensor),
        "dense": without_grad(dense, tensor),
        "torch grad": lambda: layer(tensor),
        "dense grad": lambda: dense(tensor),
        "fwd+bwd": forward_and_backward(layer, tensor),
        "dense f+b": forward_and_backward(dense, tensor),
    }
    if compiled:
        torch.compiler.reset()  # of the graphs before, which would be looked through at every call
        found["compiled"] = without_grad(torch.compile(layer, fullgraph=True), tensor)
        found["dense comp."] = without_grad(torch.compile(dense, fullgraph=True), tensor)
    for run in found.values():
        run()
    return found


def chains(make: Callable[[], torch.nn.Module]) -> list[Contender]:
    """Return compiled chains of 4 and of 16 layers, without gradients and then with both passes."""
    x = torch.rand(1, WIDTH)
    found = []
    for wrap in (without_grad, forward_and_backward):
        for count in LENGTHS:
            model = torch.nn.Sequential(*(make() for _ in range(count)))
            found.append(wrap(torch.compile(model, fullgraph=True), x))
            found[-1]()
    return found


def slopes(times: list[float]) -> list[float]:
    """Return what a layer adds to a chain, from times of short and long ones in turns."""
    pairs = zip(times[::2], times[1::2], strict=True)
    return [(long - short) / (LENGTHS[1] - LENGTHS[0]) for short, long in pairs]


def print_slopes() -> None:
    """Print what a layer costs inside a compiled graph, in µs at batch 1."""
    names = ("kernel", "compiled", "fwd+bwd", "dense", "dense f+b")
    print(f"\n{'µs per layer of a graph':28}" + "".join(f"{name:>12}" for name in names))
    scores = np.random.default_rng(0).random((WIDTH, WIDTH), dtype=np.float32)
    for name, (cls, params) in FORMATS.items():
        torch.compiler.reset()  # torch keeps eight graphs of a kind, as many as a row needs
        a = cls.from_scores(scores, 0.1, values=scores, **params)
        found = [kernel_call(a, scores[:1].copy())]
        found += chains(functools.partial(SparseLinear.from_tensor, a, bias=torch.zeros(WIDTH)))
        found += chains(functools.partial(torch.nn.Linear, WIDTH, WIDTH))
        kernel, *times = [t.median for t in interleave(found, 5.0)]
        row = "".join(f"{t:12.2f}" for t in (kernel, *slopes(times)))
        print(f"{name:16}{WIDTH:>5}x{WIDTH:<6}{row}")


def main() -> None:
    """Print the table, in µs per call at batch 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="torch.compile too (slow to start)")
    compiled = parser.parse_args().compiled
    spfmt.dispatch.timed_isa()  # refuses where times would mean nothing
    torch.set_num_threads(1)
    spfmt.set_num_threads(1)
    heading = ""
    for rows, cols in SHAPES:
        scores = np.random.default_rng(0).random((rows, cols), dtype=np.float32)
        for name, (cls, params) in FORMATS.items():
            a = cls.from_scores(scores, 0.1, values=scores, **params)
            found = contenders(a, torch.nn.Linear(cols, rows), compiled)
            if not heading:
                heading = f"{'µs per call':28}" + "".join(f"{key:>12}" for key in found)
                print(heading)
            times = [t.median for t in interleave(list(found.values()), 1.0)]
            print(f"{name:16}{rows:>5}x{cols:<6}" + "".join(f"{t:12.2f}" for t in times))
    if compiled:
        print_slopes()


if __name__ == "__main__":
    main()
