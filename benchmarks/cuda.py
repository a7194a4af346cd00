"""The CUDA kernels beside cuBLAS and torch's sparse products: ``python -m benchmarks.cuda``.

First what the device gives: bytes from memory and from L2, dense products. Then layers of language
models and the convolutions of a ResNet-50, at 50 to 98 % sparsity: forward, and for large batches
the gradients. Contenders are checked against float64, recorded in CUDA graphs of ten calls each
(those that cannot be are named in "eager"), and timed in turns. Weights are the same at every call:
they stay in L2 where they fit, which favours sparse ones.

``--json FILE`` is written after every row, and rows that it has are not measured again, so a run
that was stopped goes on; ``--seconds`` stops one by itself.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import itertools
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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

ROUNDS, CALLS = 15, 10


# ----------------------------------------------------------------------------------------- timing


class Wall:
    """Times calls by the wall clock, for tests on the CPU."""

    eager = True

    def prepare(self, call: Call) -> Callable[[], float]:
        """Return what runs a call and returns seconds."""

        def run() -> float:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin

        return run


class Graphs:
    """Times calls on the device, `CALLS` of them in a graph where they can be captured.

    Everything runs on one side stream: backward passes go on where their forward pass was, and may
    not leave the stream that is captured.

    Attributes
    ----------
    eager : bool
        Whether the last call could not be captured, so that its time has the host's in it.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        torch.cuda.set_stream(self._stream)

    def prepare(self, call: Call) -> Callable[[], float]:
        """Return what runs a call and returns seconds."""
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self.eager = False
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                for _ in range(CALLS):
                    call()
        except RuntimeError:  # what allocates or waits by itself is called as it is
            self.eager = True
            torch.cuda.synchronize()
        torch.cuda.set_stream(self._stream)  # a failed capture leaves another one behind
        if self.eager:
            return lambda: self._seconds(call, CALLS)
        graph.replay()
        return lambda: self._seconds(graph.replay, 1) / CALLS

    def _seconds(self, call: Callable[[], Any], count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count


Clock = Wall | Graphs


def in_turns(
    clock: Clock, calls: dict[str, Call], eager: list[str] | None = None
) -> dict[str, float]:
    """Return the median microseconds of each call; add to `eager` those without a graph."""
    runs = {}
    for name, call in calls.items():
        runs[name] = clock.prepare(call)
        if clock.eager and eager is not None:
            eager.append(name)
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
            return _drawn(self, device, self.batch, self.layer[0])
        channels, size = self.layer[0], self.layer[-1]
        x = _drawn(self, device, self.batch, channels, size, size)
        return x.to(memory_format=torch.channels_last)


def _drawn(case: Case, device: str, *shape: int) -> Tensor:
    """Draw on the CPU: a failed capture may leave the device's generator captured."""
    return torch.randn(shape, dtype=DTYPES[case.dtype]).to(device)


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
    dy = torch.ones_like(y)
    values = layer.values if hasattr(layer, "values") else layer.weight

    def run() -> Tensor:
        return torch.autograd.grad(y, (x, values), dy, retain_graph=True)[0]

    return run


def dense_layer(case: Case, device: str) -> Any:
    """Return the dense layer that torch has."""
    if len(case.layer) == 2:
        made: Any = nn.Linear(*case.layer, bias=False)
    else:
        inside, outside, kernel, stride, _ = case.layer
        made = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
        made = made.to(memory_format=torch.channels_last)
    return made.to(device, DTYPES[case.dtype])


def of_torch(case: Case, x: Tensor) -> dict[str, Callable[[], Call]]:
    """Return what makes torch's own sparse products of a linear layer, of weights that suit them.

    Theirs have X as they want it: CSR has it transposed before, and leaves Y transposed.
    """
    if len(case.layer) != 2:
        return {}
    inside, outside = case.layer
    weight = _drawn(case, "cpu", outside, inside)

    def kept(height: int, width: int) -> Tensor:
        mask = torch.rand(outside // height, inside // width) < 1 - case.sparsity
        found = weight * mask.repeat_interleave(height, 0).repeat_interleave(width, 1)
        return found.to(x.device)

    def csr() -> Call:
        made, columns = kept(1, 1).to_sparse_csr(), x.T.contiguous()
        return lambda: made @ columns

    def bsr() -> Call:
        made = kept(64, 64).to_sparse_bsr((64, 64))
        return lambda: functional.linear(x, made)

    def two_of_four() -> Call:
        half = weight * torch.tensor([1, 1, 0, 0]).repeat(outside, inside // 4)
        made = torch.sparse.to_sparse_semi_structured(half.to(x.device, x.dtype))
        return lambda: functional.linear(x, made)

    found: dict[str, Callable[[], Call]] = {"torch CSR": csr, "torch BSR 64": bsr}
    if case.sparsity == 0.5 and case.dtype == "bfloat16":
        found["torch 2:4"] = two_of_four
    return found


# -------------------------------------------------------------------------------------- measuring


def measure(case: Case, layers: Layers, clock: Clock, device: str) -> dict[str, Any]:
    """Return microseconds by contender of each pass, and what could not run and why."""
    torch.manual_seed(0)
    x = case.inputs(device)
    contenders = {"dense": dense_layer(case, device), **layers.of(case)}
    row: dict[str, Any] = {"left_out": {}, "eager": [], "eager_backward": []}
    row["density"] = {n: m.density for n, m in contenders.items() if n != "dense"}
    makers = {name: functools.partial(forward, layer, x) for name, layer in contenders.items()}
    calls = _that_run({**makers, **of_torch(case, x)}, row["left_out"])
    for name in [n for n in calls if n in contenders and n != "dense"]:
        fault = why_wrong(case, contenders[name], x)
        if fault:
            row["left_out"][name] = f"WRONG: {fault}"
            del calls[name]
    row["forward_us"] = in_turns(clock, calls, row["eager"])
    if case.batch >= TRAINED or (len(case.layer) > 2 and case.batch > 1):
        makers = {n: functools.partial(backward, m, x) for n, m in contenders.items() if n in calls}
        calls = _that_run(makers, row["left_out"])
        row["backward_us"] = in_turns(clock, calls, row["eager_backward"])
    return row


def _that_run(
    makers: Mapping[str, Callable[[], Call]], left_out: dict[str, str]
) -> dict[str, Call]:
    found = {}
    for name, make in makers.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that some are beta
                call = make()
                call()
            found[name] = call
        except (RuntimeError, SpfmtError, NotImplementedError) as error:
            left_out[name] = str(error).split("\n")[0][:200]
    return found


def why_wrong(case: Case, layer: Any, x: Tensor) -> str:
    """Compare a layer's product with that of its weight in float64; empty where it is right."""
    w = copy.deepcopy(layer).cpu().to_dense().weight.detach().to(x.device, torch.float64)
    rows = torch.linspace(0, len(x) - 1, min(len(x), 64), device=x.device).long()  # the last, too
    with torch.no_grad():
        got, some = layer(x)[rows].double(), x[rows].double()
        if len(case.layer) == 2:
            want = some @ w.T
        else:
            want = functional.conv2d(some, w, stride=case.layer[3], padding=case.layer[2] // 2)
    error = float((got - want).abs().max() / want.abs().max())
    if error < TOLERANCE[case.dtype]:
        return ""
    return f"{layer.format} is off by {error:.2g}"


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
        "wgmma": os.environ.get("SPFMT_CUDA_WGMMA") == "1",
    }


def run(
    chosen: Sequence[Case], path: Path, clock: Clock, device: str, seconds: float = 1e9
) -> dict[str, Any]:
    """Measure what a record lacks, until so many seconds have passed; return the record."""
    end = time.monotonic() + seconds
    record = json.loads(path.read_text()) if path.exists() else about(device)
    if any(record[name] != value for name, value in about(device).items() if name != "date"):
        raise SystemExit(f"{path} was begun elsewhere, or by other code; name another file")

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
            for name, reason in rows[case.name]["left_out"].items():
                print(f"  {name}: {reason}", flush=True)
    return record


def wrong(record: dict[str, Any]) -> list[str]:
    """Return the rows in which a contender was wrong."""
    rows = record["rows"].items()
    return [n for n, row in rows if any(r.startswith("WRONG") for r in row["left_out"].values())]


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
    record = run(list(cases()), args.json, Graphs(), "cuda", args.seconds)
    if wrong(record):
        print(f"wrong products: {'; '.join(wrong(record))}", file=sys.stderr)
    return bool(wrong(record))


if __name__ == "__main__":
    sys.exit(main())
