"""The demo's convolutions: a small network of them, dense and in every format, trained with SET."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

import spfmt.onnx
from spfmt.bench.timing import Timing, interleave
from spfmt.cli import _measure as onnx
from spfmt.cli._deploy import Deployed, Mismatch, deploy
from spfmt.cli._network import PARAMS, Digits, Settings, prune, train
from spfmt.cli._progress import Reporter
from spfmt.torch import densify

__all__ = ["BATCH", "CONVOLUTIONS", "ConvRow", "build", "notes", "run", "table"]

CONVOLUTIONS = ("conv1", "conv2")
"""The layers that become sparse."""

BATCH = 256
_EVEN = 0.95  # what is shown as 1.0x counts as even
_TOLERANCE = 1e-4  # of the largest logit: rounding in float32 moves one by some 1e-6
_SECONDS = 0.5  # of the measurement, for each network


@dataclass(frozen=True)
class ConvRow:
    """One network of convolutions.

    Attributes
    ----------
    format, label : str
        Name of the format, and how it is shown.
    density : float
        Stored weights over all weights of the sparse convolutions.
    accuracy : float
        Share of test images that torch classifies right.
    weights_bytes : int
        Size of the sparse convolutions' safetensors files.
    train_seconds : float
    milliseconds : float
        Median of one pass of `BATCH` images through the network in torch, on one thread.
    difference : float
        Largest difference between its logits and those of the same weights in dense layers and
        in ONNX Runtime, over the largest logit.
    kernels : dict of str to int
        Kernels of the convolutions by ONNX Runtime's profile.
    """

    format: str
    label: str
    density: float
    accuracy: float
    weights_bytes: int
    train_seconds: float
    milliseconds: float
    difference: float
    kernels: dict[str, int]


def build(settings: Settings, format: str | None) -> nn.Sequential:
    """Make the untrained network, dense or with sparse convolutions; see `_network.build`."""
    torch.manual_seed(settings.seed)
    few, many = settings.channels // 2, settings.channels
    model = nn.Sequential(
        OrderedDict[str, nn.Module](
            image=nn.Unflatten(1, (1, 8, 8)),
            stem=nn.Conv2d(1, few, 3, padding=1),
            stem_relu=nn.ReLU(),
            conv1=nn.Conv2d(few, many, 3, padding=1),
            conv1_relu=nn.ReLU(),
            conv2=nn.Conv2d(many, many, 3, stride=2, padding=1),
            conv2_relu=nn.ReLU(),
            flat=nn.Flatten(),
            output=nn.Linear(many * 16, 10),
        )
    )
    if format is not None:
        prune(model, format, CONVOLUTIONS, settings)
    return model


def run(
    data: Digits, settings: Settings, folder: Path, reporter: Reporter, share: float
) -> tuple[ConvRow, ...]:
    """Train, save, check and time all networks; `share` of the progress for each."""
    settings = replace(settings, epochs=settings.conv_epochs)
    made: dict[str, tuple[Deployed, float]] = {}
    for name in ("dense", *PARAMS):
        reporter.doing(f"convolutions, {name}: training")
        model = build(settings, None if name == "dense" else name)
        started = time.perf_counter()
        train(model, data, settings, lambda _: reporter.step(share / settings.epochs))
        seconds = time.perf_counter() - started
        stem = f"{name}.conv"
        made[name] = deploy(model, stem, folder, CONVOLUTIONS), seconds
        reporter.done(f"convolutions, {name}: trained in {seconds:.1f} s, converted, saved")
    reporter.doing("checking and timing the convolutions")
    times = _times(made, data)
    rows = tuple(_row(name, *made[name], times[name], data) for name in made)
    reporter.done("sparse convolutions give the answers of dense ones with the same weights")
    return rows


def _times(made: Mapping[str, tuple[Deployed, float]], data: Digits) -> dict[str, Timing]:
    x = data.x_test.repeat(-(-BATCH // len(data.x_test)), 1)[:BATCH]
    with torch.inference_mode():
        calls = [lambda model=deployed.model: model(x) for deployed, _ in made.values()]
        return dict(zip(made, interleave(calls, _SECONDS * len(calls)), strict=True))


def _row(name: str, deployed: Deployed, seconds: float, timing: Timing, data: Digits) -> ConvRow:
    with torch.inference_mode():
        logits = deployed.model(data.x_test)
        twin = copy.deepcopy(deployed.model)
        densify(twin)
        expected = twin(data.x_test)
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise Mismatch(
            f"{name}: got logits of convolutions that differ by {difference:.1e} of the largest "
            f"from those of dense layers; expected at most {_TOLERANCE:.0e}; please report this"
        )
    x = data.x_test.numpy()
    sessions = onnx.open_sessions({name: deployed})
    difference = max(difference, onnx.answers(deployed, sessions, name, x)[1])
    kernels = onnx.kernels(deployed, name, x, spfmt.onnx.CONVOLUTIONS)
    return ConvRow(
        format=name,
        label=deployed.tensors[0].label() if deployed.tensors else name,
        density=deployed.density,
        accuracy=float((logits.argmax(1) == data.y_test).float().mean()),
        weights_bytes=sum(path.stat().st_size for path in deployed.weights),
        train_seconds=seconds,
        milliseconds=timing.median / 1e3,
        difference=difference,
        kernels=kernels,
    )


def table(rows: tuple[ConvRow, ...], gap: int) -> Table:
    """Return the table of the convolutions."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False)
    shown.add_column("convolutions", min_width=12)
    for head in (
        "density",
        "test\nacc.",
        "weights\nkB",
        "training\ns",
        f"batch {BATCH}\nms, torch",
    ):
        shown.add_column(head, justify="right", no_wrap=True)
    dense = rows[0]
    for row in rows:
        ratios = dense.train_seconds / row.train_seconds, dense.milliseconds / row.milliseconds
        shown.add_row(
            row.label,
            f"{100 * row.density:.1f} %",
            f"{100 * row.accuracy:.1f} %",
            f"{row.weights_bytes / 1e3:.0f}" if row.weights_bytes else "-",
            f"{row.train_seconds:.1f} ({_ratio(ratios[0])})",
            f"{row.milliseconds:.2f} ({_ratio(ratios[1])})",
        )
    return shown


def _ratio(speed_up: float) -> str:
    return f"{speed_up:.1f}x" if speed_up >= _EVEN else f"[red]{speed_up:.2f}x[/red]"


def notes(rows: tuple[ConvRow, ...], settings: Settings) -> Iterator[str]:
    """Say what is needed to judge the table."""
    few, many = settings.channels // 2, settings.channels
    yield (
        f"Two 3x3 convolutions ({few}→{many} on 8x8, {many}→{many} with stride 2) are sparse and "
        f"rewired by SET; {settings.conv_epochs} epochs on one thread, in brackets: times as fast "
        "as dense."
    )
    dense = rows[0]
    slower = [r.label for r in rows[1:] if dense.train_seconds / r.train_seconds < _EVEN]
    if slower:
        yield f"Dense convolutions train faster at this size than {', '.join(slower)}."
    slower = [r.label for r in rows[1:] if dense.milliseconds / r.milliseconds < _EVEN]
    if slower:
        yield f"Dense convolutions answer faster at this size than {', '.join(slower)}."
    ran = sorted({name for row in rows[1:] for name in row.kernels})
    yield f"Exported to ONNX too, with equal answers; ONNX Runtime ran {', '.join(ran)}."
