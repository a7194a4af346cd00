"""What updates of the topology cost: ``python -m benchmarks.updates``.

A network trains with a method; the time of one update, and what observing its step and filling
caches in the step after it cost more than another step, are set against the steps between two
updates. One thread, batch 128, SGD with
momentum, CPU time of the thread: other programs do not count.

- ``mlp``: 784 → 3 × 1024 → 10, the last layer dense
- ``resnet18``: at CIFAR size, its convolutions sparse

Each with DSB at every block and density, then with every method at 90 % sparsity.

``--json FILE`` writes the rows; without it they are printed only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import spfmt.models
from spfmt import train
from spfmt._files import replace_file
from spfmt.bench import machine

DELTA_T, BATCH = 100, 128
EVERY = 4  # steps between updates while they are timed
BLOCKS, DENSITIES = (4, 8, 16, 32), (0.5, 0.3, 0.2, 0.1, 0.05)
OTHERS = (train.SET, train.RigL, train.SRigL, train.HRBP, train.DNSB)


def networks() -> dict[str, tuple[Any, str, tuple[int, ...], int]]:
    """Return by name: a model's maker, what stays dense, an input's shape, updates to time."""

    def mlp() -> nn.Module:
        sizes = [784, 1024, 1024, 1024]
        parts: list[nn.Module] = []
        for n, m in itertools.pairwise(sizes):
            parts += [nn.Linear(n, m), nn.ReLU()]
        return nn.Sequential(*parts, nn.Linear(1024, 10))

    return {
        "mlp": (mlp, "6", (784,), 10),
        "resnet18": (spfmt.models.resnet18, "linear", (3, 32, 32), 2),
    }


def cases() -> Iterator[tuple[type, float, dict[str, Any]]]:
    """Yield a method, a density and parameters of the format."""
    for block, density in itertools.product(BLOCKS, DENSITIES):
        yield train.DSB, density, {"block_shape": (block, block)}
    for method in OTHERS:
        yield method, 0.1, {}


def measure(network: str, method: type, density: float, params: dict[str, Any]) -> dict[str, Any]:
    """Train a little, and return the times in milliseconds of a step and of an update."""
    make, dense, shape, updates = networks()[network]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = method(
        model, optimizer, density=density, distribution="uniform", exclude=[dense, "conv1"],
        delta_t=EVERY, t_end=10**9, **params,
    )  # fmt: skip
    x, y = torch.randn(BATCH, *shape), torch.randint(10, (BATCH,))
    times: dict[str, list[float]] = {"step": [], "observed": [], "first": [], "update": []}
    for _ in range(EVERY * (updates + 1)):
        kind = "observed" if trainer.observing else "step" if trainer.steps % EVERY else "first"
        start = time.thread_time()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        times[kind].append(time.thread_time() - start)
        due, start = trainer.steps % EVERY == EVERY - 1, time.thread_time()
        trainer.step()
        if due:
            times["update"].append(time.thread_time() - start)
    step, observed, first, update = (
        1e3 * statistics.median(found[len(found) // 3 :] or [0.0]) for found in times.values()
    )
    extra = update + sum(max(0.0, other - step) for other in (observed, first))
    return {
        "network": network, "method": method.__name__, "density": density, **params,
        "step_ms": round(step, 3), "update_ms": round(update, 3),
        "share": round(extra / (DELTA_T * step + extra), 5),
    }  # fmt: skip


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.updates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--network", choices=(*networks(), "all"), default="all")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for network in networks() if args.network == "all" else [args.network]:
        for method, density, params in cases():
            rows.append(measure(network, method, density, params))
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        record = {"machine": machine.describe(), "versions": machine.versions(), "results": rows}
        replace_file(str(args.json), (json.dumps(record, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
