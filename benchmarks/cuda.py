"""The CUDA kernels beside cuBLAS and torch's sparse products: ``python -m benchmarks.cuda``.

First what the device gives: bytes from memory and from L2, dense products. Then layers of language
models and the convolutions of a ResNet-50, at 50 to 98 % sparsity: forward, and for large batches
the gradients. Contenders are checked against float64, recorded in CUDA graphs of several calls
each, and timed in turns. Weights are the same at every call: they stay in L2 where they fit.

``--json FILE`` is written after every row, and rows that it has are not measured again, so a run
that was stopped goes on; ``--seconds`` stops one by itself.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spfmt._files import replace_file
from spfmt.bench import machine
from spfmt.cuda import library
from spfmt.errors import SpfmtError
from spfmt.torch import SparseConv2d, SparseLinear

Call = Callable[[], Tensor]

LINEAR = ((768, 3072), (3072, 768), (4096, 11008), (11008, 4096))  # in, out
BATCHES = (1, 16, 64, 256, 1024, 4096)
TRAINED = 256  # samples from which gradients are timed, too
SPARSITIES = (0.9, 0.75, 0.95, 0.5, 0.98)
# In, out, kernel, stride, size of the maps: of ResNet-50 what is not repeated.
CONVS = (
    (64, 64, 3, 1, 56), (128, 128, 3, 2, 56), (128, 128, 3, 1, 28), (256, 256, 3, 1, 14),
    (512, 512, 3, 1, 7), (256, 64, 1, 1, 56), (1024, 256, 1, 1, 14), (512, 2048, 1, 1, 7),
)  # fmt: skip
CONV_BATCHES = (1, 32, 128)
CONV_SPARSITIES = (0.9, 0.75, 0.95)
FORMATS: dict[str, dict[str, Any]] = {
    "shuffled_block 16": {"format": "shuffled_block", "block_shape": (16, 1)},
    "shuffled_block 64": {"format": "shuffled_block", "block_shape": (64, 1)},
    "shuffled_block 128": {"format": "shuffled_block", "block_shape": (128, 1)},
    "nm": {"format": "nm"},
    "condensed": {"format": "condensed"},
    "csr": {"format": "csr"},
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Largest error beside the largest result; a wrong index is off by its whole size.
TOLERANCE = {"bfloat16": 2e-2, "float32": 5e-3}

ROUNDS, GRAPH_SECONDS = 15, 1e-3


# ----------------------------------------------------------------------------------------- timing


class Wall:
    """Times calls by the wall clock, for tests on the CPU."""

    def prepare(self, call: Call) -> Callable[[], float]:
        """Return what runs a call and returns seconds."""

        def run() -> float:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin

        return run


class Graphs:
    """Times calls on the device, in graphs of about a millisecond where they can be captured."""

    def prepare(self, call: Call) -> Callable[[], float]:
        """Return what runs a call and returns seconds."""
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        count = max(1, min(64, int(GRAPH_SECONDS / max(self._seconds(call, 3), 1e-6))))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for _ in range(count):
                    call()
        except RuntimeError:  # what allocates or waits by itself is called as it is
            torch.cuda.synchronize()
            return lambda: self._seconds(call, count)
        graph.replay()
        return lambda: self._seconds(graph.replay, 1) / count

    def _seconds(self, call: Callable[[], Any], count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count


Clock = Wall | Graphs


def in_turns(clock: Clock, calls: dict[str, Call]) -> dict[str, float]:
    """Return the median microseconds of each call."""
    runs = {name: clock.prepare(call) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            found[name].append(run())
    return {name: statistics.median(times) * 1e6 for name, times in found.items()}


def ceilings(clock: Clock, device: str, small: bool = False) -> dict[str, float]:
    """Measure TB/s of copies, read and written, and TFLOP/s of dense products."""
    size = 1 << (16 if small else 29)  # bytes: memory; an eighth of a L2 of 64 MB
    n = 64 if small else 8192
    far, near = (torch.empty(b // 4, device=device) for b in (size, size // 64))
    to_far, to_near = torch.empty_like(far), torch.empty_like(near)
    found = in_turns(
        clock, {"memory": lambda: to_far.copy_(far), "l2": lambda: to_near.copy_(near)}
    )
    rates = {"memory": 2 * size / found["memory"] / 1e6, "l2": size / 32 / found["l2"] / 1e6}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        calls: dict[str, Call] = {name: lambda a=a, b=b: a @ b}  # type: ignore[misc]
        rates[f"dense {name}"] = 2 * n**3 / in_turns(clock, calls)[name] / 1e6
    return rates


# ------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Case:
    """A layer on a batch.

    Attributes
    ----------
    layer : tuple of int
        (in, out), or (in, out, kernel, stride, size of the maps).
    """

    layer: tuple[int, ...]
    sparsity: float
    batch: int
    dtype: str

    @property
    def name(self) -> str:
        """Return what rows are known by."""
        return f"{'x'.join(map(str, self.layer))}, {self.sparsity:g}, {self.batch}, {self.dtype}"

    def inputs(self, device: str) -> Tensor:
        """Draw a batch, images with channels last."""
        if len(self.layer) == 2:
            return torch.randn(self.batch, self.layer[0], device=device).to(DTYPES[self.dtype])
        channels, size = self.layer[0], self.layer[-1]
        x = torch.randn(self.batch, channels, size, size, device=device).to(DTYPES[self.dtype])
        return x.to(memory_format=torch.channels_last)


def cases() -> Iterator[Case]:
    """Yield what is measured, what matters most first."""
    linear = itertools.product(("bfloat16",), SPARSITIES, LINEAR, BATCHES)
    convs = itertools.product(("bfloat16",), CONV_SPARSITIES, CONVS, CONV_BATCHES)
    exact = itertools.product(("float32",), SPARSITIES[:1], LINEAR, BATCHES)
    for dtype, sparsity, layer, batch in itertools.chain(linear, convs, exact):
        yield Case(layer, sparsity, batch, dtype)


class Layers:
    """The layers of the last shape, sparsity and dtype: to make them takes longer than to time."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._key: Any = None
        self._made: dict[str, Any] = {}

    def of(self, case: Case) -> dict[str, Any]:
        """Return sparse layers by name."""
        key = case.layer, case.sparsity, case.dtype
        if key != self._key:
            self._made.clear()  # before others take memory
            self._key, self._made = key, dict(self._make(case))
        return self._made

    def _make(self, case: Case) -> Iterator[tuple[str, Any]]:
        for name, options in FORMATS.items():
            how = {"density": 1 - case.sparsity, "bias": False, **options}
            if len(case.layer) == 2:
                layer: Any = SparseLinear(*case.layer, **how)
            elif options["format"] != "shuffled_block":
                continue  # lists have no convolutions on CUDA
            else:
                inside, outside, kernel, stride, _ = case.layer
                layer = SparseConv2d(inside, outside, kernel, stride, kernel // 2, **how)
            yield name, layer.to(self._device, DTYPES[case.dtype])


def forward(layer: Any, x: Tensor) -> Call:
    """Return a product without gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return layer(x)  # type: ignore[no-any-return]

    return run


def backward(layer: Any, x: Tensor) -> Call:
    """Return the gradients of a layer's input and values, of a graph that is kept."""
    x = x.detach().requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    values = layer.values if hasattr(layer, "values") else layer.weight

    def run() -> Tensor:
        return torch.autograd.grad(y, (x, values), dy, retain_graph=True)[0]

    return run


def dense_layer(case: Case, device: str) -> Any:
    """Return the dense layer that torch has."""
    if len(case.layer) == 2:
        made: Any = nn.Linear(*case.layer, bias=False, device=device)
    else:
        inside, outside, kernel, stride, _ = case.layer
        made = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False, device=device)
        made = made.to(memory_format=torch.channels_last)
    return made.to(DTYPES[case.dtype])


def of_torch(case: Case, x: Tensor) -> dict[str, Call]:
    """Return torch's own sparse products of a linear layer, of random weights that suit them."""
    if len(case.layer) != 2:
        return {}
    inside, outside = case.layer
    place = {"device": x.device, "dtype": x.dtype}
    coarse = torch.rand(outside // 64, inside // 64, device=x.device) < 1 - case.sparsity
    blocks = coarse.repeat_interleave(64, 0).repeat_interleave(64, 1)
    weight = torch.randn(outside, inside, **place)
    free = torch.rand(outside, inside, device=x.device) < 1 - case.sparsity
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that they are beta
        bsr = (weight * blocks).to_sparse_bsr((64, 64))
        csr = (weight * free).to_sparse_csr()
    columns = x.T.contiguous()
    calls: dict[str, Call] = {
        "torch CSR": lambda: csr @ columns,
        "torch BSR 64": lambda: functional.linear(x, bsr),
    }
    if case.sparsity == 0.5 and case.dtype == "bfloat16":
        half = torch.tensor([1, 1, 0, 0], **place).repeat(outside, inside // 4)
        made = torch.sparse.to_sparse_semi_structured(weight * half)
        calls["torch 2:4"] = lambda: functional.linear(x, made)
    return calls


# -------------------------------------------------------------------------------------- measuring


def measure(case: Case, layers: Layers, clock: Clock, device: str) -> dict[str, Any]:
    """Return microseconds by contender of each pass, and what could not run and why."""
    torch.manual_seed(0)
    x = case.inputs(device)
    contenders = {"dense": dense_layer(case, device), **layers.of(case)}
    row: dict[str, Any] = {"left_out": {}}
    calls = {name: forward(layer, x) for name, layer in contenders.items()} | of_torch(case, x)
    row["forward_us"] = in_turns(clock, _that_run(calls, row["left_out"]))
    for name in row["forward_us"]:
        if name in contenders and name != "dense":
            check(case, contenders[name], x)
    if case.batch >= TRAINED or (len(case.layer) > 2 and case.batch > 1):
        passes = {n: backward(m, x) for n, m in contenders.items() if n in row["forward_us"]}
        row["backward_us"] = in_turns(clock, _that_run(passes, row["left_out"]))
    return row


def _that_run(calls: dict[str, Call], left_out: dict[str, str]) -> dict[str, Call]:
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = call
        except (RuntimeError, SpfmtError, NotImplementedError) as error:
            left_out[name] = str(error).split("\n")[0][:200]
    return found


def check(case: Case, layer: Any, x: Tensor) -> None:
    """Raise where a layer's product is not that of its weight in float64."""
    w = copy.deepcopy(layer).cpu().to_dense().weight.detach().to(x.device, torch.float64)
    with torch.no_grad():
        got = layer(x).double()
        some = x[: min(len(x), 64)].double()
        if len(case.layer) == 2:
            want = some @ w.T
        else:
            want = functional.conv2d(some, w, stride=case.layer[3], padding=case.layer[2] // 2)
    error = (got[: len(some)] - want).abs().max() / want.abs().max()
    if not error < TOLERANCE[case.dtype]:
        raise AssertionError(f"{case.name}: {layer.format} is off by {error:.2g}")


def about(device: str) -> dict[str, Any]:
    """Return the device, the versions and the day."""
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    here = {"commit": machine.commit(), "versions": machine.versions(), "date": day}
    if device == "cpu":
        return here
    properties = torch.cuda.get_device_properties(0)
    return here | {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def run(
    chosen: Sequence[Case], path: Path, clock: Clock, device: str, seconds: float = 1e9
) -> dict[str, Any]:
    """Measure what a record lacks, until so many seconds have passed; return the record."""
    end = time.monotonic() + seconds
    record = json.loads(path.read_text()) if path.exists() else about(device)

    def save() -> None:
        replace_file(str(path), (json.dumps(record, indent=1) + "\n").encode())

    record.setdefault("rows", {})
    if "ceilings" not in record:
        record["ceilings"] = ceilings(clock, device, small=device == "cpu")
        save()
    rows, layers = record["rows"], Layers(device)
    for case in chosen:
        if time.monotonic() > end:
            print(f"stopped after {seconds:.0f} s; run again to go on", flush=True)
            break
        if case.name not in rows:
            rows[case.name] = measure(case, layers, clock, device)
            save()
            times = {n: round(t, 1) for n, t in rows[case.name]["forward_us"].items()}
            print(case.name, times, flush=True)
    return record


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the record")
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after so many")
    args = parser.parse_args()
    if not library.available():
        print(f"no CUDA kernels: {library.why_not()}", file=sys.stderr)
        return 2
    run(list(cases()), args.json, Graphs(), "cuda", args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
