"""Sparse against dense networks: ``python -m benchmarks.models``.

One step of training (forward, backward, SGD with momentum) at CIFAR size and batch 128, one thread:
the same network dense, with channels first and last, and with its convolutions at 90 %, alike or by
ERK. Logits and gradients are compared with float64 first; then networks take turns. A second run
of each says where the time goes: each operator's CPU time, dX and dW one by one. Inference is in
ONNX Runtime, where the export knows convolutions.

``--suite all --json FILE`` takes about ten minutes. ``--only`` takes a part of a network's or a
contender's name: ``--only vgg16``, ``--only hrbp``; dense networks always take part.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import command
from spfmt.bench import CHANNELS_FIRST, CHANNELS_LAST, Session
from spfmt.errors import MissingDependency, SpfmtError

NETWORKS = ("resnet18", "vgg16", "wide_resnet22_2")
DENSITY = 0.1
# The rows' order is searched in seconds, not minutes; random scores give no order anyway.
FORMATS: Mapping[str, Mapping[str, Any]] = {
    "shuffled_block": {"method": "fast"},
    "hrbp": {"method": "fast"},
    "csr": {},
    "condensed": {},
}
ERK = ("shuffled_block", "csr")
INFERENCE_BATCHES = (1, 64)


@dataclass
class Made:
    """A network to measure."""

    name: str
    kind: str
    layout: str
    density: float
    model: Any

    def fields(self) -> dict[str, Any]:
        """Return what its rows say of it."""
        return {k: getattr(self, k) for k in ("name", "kind", "layout", "density")}


def make(network: str, only: str) -> Iterator[Made]:
    """Yield a network dense, in both layouts, and sparse."""
    import torch

    import spfmt.models
    from spfmt.torch import sparsify

    torch.manual_seed(0)
    dense = getattr(spfmt.models, network)()
    yield Made("dense", "dense", CHANNELS_FIRST, 1.0, copy.deepcopy(dense))
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    yield Made("dense", "dense", CHANNELS_LAST, 1.0, last)
    ways = [(f, "uniform") for f in FORMATS] + [(f, "erk") for f in ERK]
    for format, distribution in ways:
        name = format if distribution == "uniform" else f"{format}, ERK"
        if only and only not in network and only not in name:
            continue
        model = copy.deepcopy(dense)
        report = sparsify(
            model,
            format,
            DENSITY,
            include=torch.nn.Conv2d,
            exclude=_first(model),
            distribution=distribution,
            scores="random",
            generator=torch.Generator().manual_seed(1),
            **FORMATS[format],
        )
        yield Made(name, "sparse", CHANNELS_FIRST, _density(report), model)


def _first(model: Any) -> str:
    """Name of the first convolution, which stays dense."""
    return next(name for name, m in model.named_modules() if type(m).__name__ == "Conv2d")


def _density(report: Any) -> float:
    """Of all convolutions but the first, those that ERK leaves dense among them."""
    rows = [r for r in report if r.kind == "Conv2d"][1:]
    return sum(r.nnz for r in rows) / sum(r.nnz / r.density for r in rows)


def images(batch: int) -> tuple[Any, Any]:
    """Return random images of 32 x 32 pixels, and their classes."""
    import torch

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    return x, torch.randint(10, (batch,), generator=generator)


def step(session: Session, network: str, batch: int, rows: list[Any]) -> None:
    """Measure one step of training of a network."""
    import torch

    from benchmarks.steps import Step, breakdown, check_model, model_rows
    from spfmt.bench.session import threads_restored, use_threads
    from spfmt.bench.timing import interleave

    x, y = images(batch)
    found, steps = [], []
    with threads_restored():
        use_threads(1)
        session.roof(session.machine["isa"], 1)
        for made in make(network, session.only):
            if made.kind == "sparse":
                check_model(f"{network}, {made.name}", made.model, *images(4))
            last = made.layout == CHANNELS_LAST
            own = x.to(memory_format=torch.channels_last) if last else x
            steps.append(Step(made.model, own, y))
            found.append(made)
        times = interleave(steps, session.seconds)
        fields = [{**m.fields(), "parts": breakdown(s)} for m, s in zip(found, steps, strict=True)]
    measured = model_rows("step", network, batch, fields, times)
    for line in table(f"{network}, one step of training, batch {batch}, 1 thread", measured):
        session.say(line)
    rows += measured


def inference(session: Session, network: str, rows: list[Any]) -> None:
    """Measure a network in ONNX Runtime, where it can be exported."""
    from benchmarks.steps import in_onnxruntime, model_rows
    from spfmt.bench.timing import interleave

    found, runs = [], []
    with tempfile.TemporaryDirectory(prefix="spfmt-bench-") as folder:
        ways = list(make(network, session.only))
        if not any(m.kind == "sparse" for m in ways):
            return
        for made in ways:
            if made.layout == CHANNELS_LAST:
                continue  # ONNX Runtime has an order of its own
            try:
                runs.append(in_onnxruntime(made.model, images(2)[0], Path(folder)))
                found.append(made)
            except (SpfmtError, MissingDependency) as error:
                reason = f"{' '.join(str(error).split())[:160]} ..."
                session.skip(f"{network}, {made.name}, in ONNX Runtime", reason)
    for batch in INFERENCE_BATCHES if any(m.kind == "sparse" for m in found) else ():
        x = images(batch)[0].numpy()
        times = interleave([functools.partial(run, x) for run in runs], session.seconds)
        measured = model_rows("inference", network, batch, [m.fields() for m in found], times)
        for line in table(f"{network}, ONNX Runtime, batch {batch}, 1 thread", measured):
            session.say(line)
        rows += measured


def table(title: str, rows: Sequence[Any]) -> Iterator[str]:
    """Yield rows as lines of text, with shares of the step's time."""
    from benchmarks.steps import PARTS

    yield f"\n{title}"
    heads = "".join(f"{part.replace('convolution', 'conv'):>14}" for part in PARTS)
    yield f"  {'':<28}{'density':>8}{'median':>14}{'x dense':>9}{heads if rows[0].parts else ''}"
    for r in rows:
        total = sum((r.parts or {}).values())
        shares = "".join(f"{100 * v / total:>12.0f} %" for v in (r.parts or {}).values())
        name = f"{r.name}, {r.layout}"
        yield (
            f"  {name:<28}{100 * r.density:>6.1f} %{r.us / 1e3:>11.1f} ms{r.speedup:>9.2f}{shares}"
        )


def _suites(rows: list[Any], args: argparse.Namespace) -> dict[str, command.Suite]:
    def network(name: str) -> Callable[[Session], None]:
        return lambda session: step(session, name, args.batch, rows)

    def in_runtime(session: Session) -> None:
        for name in NETWORKS:
            inference(session, name, rows)

    return {**{name: network(name) for name in NETWORKS}, "inference": in_runtime}


def main(argv: Sequence[str] | None = None) -> int:
    """Run suites; return 0, or 1 where a result was wrong."""
    names = [*NETWORKS, "inference"]
    parser = command.make_parser("models", __doc__, names, "resnet18", seconds=1.0)
    parser.add_argument("--batch", type=int, default=128, help="of a step (default: 128)")
    args = parser.parse_args(argv)
    rows: list[Any] = []
    return command.run(parser, args, _suites(rows, args), more={"models": rows})


if __name__ == "__main__":
    sys.exit(main())
