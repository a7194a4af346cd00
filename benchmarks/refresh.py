"""What rewiring at every step costs: ``python -m benchmarks.refresh``.

The time to choose again which weights of a layer participate, and what the first passes on the new
structure cost more than later ones (its plan, its transposed index), are set against the sparse
forward pass. One thread, batch 128, CPU time of the thread: other programs do not count, but they
take caches. Between two measurements all weights are written, as an optimizer does.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import nn

from spfmt.torch import Participating

STRUCTURES: dict[str, dict[str, Any]] = {
    "csr, 90 % sparse": {"format": "csr", "density": 0.1},
    "2:4": {"format": "nm", "n": 2, "m": 4},
    "2:4, both directions": {"format": "nm", "n": 2, "m": 4, "transposable": 1},
    "blocks of 16 x 16, 90 %": {
        "format": "shuffled_block", "density": 0.1, "block_shape": (16, 16), "aligned": True,
        "norm": math.inf,
    },
}  # fmt: skip

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear 1024 x 1024": (lambda: nn.Linear(1024, 1024, bias=False), (128, 1024)),
    "conv 256 x 256 x 3 x 3 on 8 x 8": (
        lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False),
        (128, 256, 8, 8),
    ),
}


def passes(layer: Participating, x: torch.Tensor, dy: torch.Tensor) -> tuple[float, float]:
    """Return the seconds of a forward pass and of the gradient of its input."""
    layer.weight.requires_grad_(False)
    start = time.thread_time()
    y = layer(x)
    middle = time.thread_time()
    torch.autograd.grad(y, x, dy)
    return middle - start, time.thread_time() - middle


def measure(make: Any, shape: tuple[int, ...], options: dict[str, Any], n: int = 15) -> list[float]:
    """Return median milliseconds: of a choice, of the first passes beyond later ones, of a pass."""
    torch.manual_seed(0)
    layer = Participating(make(), **options)
    noise = [0.02 * layer.weight.std() * torch.randn_like(layer.weight) for _ in range(3)]
    base, x = layer.weight.detach().clone(), torch.randn(shape, requires_grad=True)
    dy = torch.randn_like(layer(x))
    rows = []
    for i in range(n + 2):
        layer.weight.data.copy_(base + noise[i % 3])
        start = time.thread_time()
        assert layer.choose()
        chosen = time.thread_time() - start
        first, later = passes(layer, x, dy), passes(layer, x, dy)
        rows.append((chosen, max(0.0, sum(first) - sum(later)), later[0]))
    return [1e3 * statistics.median(column) for column in zip(*rows[2:], strict=True)]


def main() -> None:
    """Measure every layer with every structure, and print a row for each."""
    torch.set_num_threads(1)
    for layer, (make, shape) in LAYERS.items():
        for structure, options in STRUCTURES.items():
            choice, first, forward = measure(make, shape, options)
            print(
                f"{layer}, {structure}: choice {choice:.2f} ms, first passes {first:.2f} ms more, "
                f"forward {forward:.2f} ms, ratio {(choice + first) / forward:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
