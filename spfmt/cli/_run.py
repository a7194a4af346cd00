"""The demo from the data to the rows of its table."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from spfmt.cli import _cnn
from spfmt.cli import _measure as onnx
from spfmt.cli._deploy import Deployed, deploy
from spfmt.cli._figures import draw
from spfmt.cli._network import PARAMS, Digits, Settings, build, load_digits, train
from spfmt.cli._progress import Reporter
from spfmt.cli._results import Results, Row, label, write_json
from spfmt.dispatch import timed_isa

__all__ = ["run"]

# Shares of the progress bar, in epochs of training.
_DEPLOY, _OPEN, _MEASURE, _DRAW, _CONVOLUTIONS = 3.0, 2.0, 20.0, 3.0, 12.0


def run(settings: Settings, folder: Path, keep: bool) -> Results:
    """Run the demo in a folder; `keep` also draws and writes the table there."""
    timed_isa()  # or the end of it refuses
    names = ("dense", *PARAMS)
    total = len(names) * (settings.epochs + _DEPLOY + _CONVOLUTIONS) + _OPEN + _MEASURE + _DRAW
    with Reporter(total) as reporter, _one_thread():
        data = load_digits(settings.seed)
        made = {name: _make(name, data, settings, folder, reporter) for name in names}
        rows = _measure(made, data, settings, reporter)
        convolutions = _cnn.run(data, settings, folder, reporter, _CONVOLUTIONS)
        results = Results(settings, len(data.x_test), reporter.seconds, rows, convolutions)
        if keep:
            reporter.doing("drawing")
            write_json(results, folder / "results.json")
            firsts = {name: m.tensors[0] for name, (m, _) in made.items() if m.tensors}
            draw(results, firsts, folder / "demo.png")
        reporter.step(_DRAW)
    return results


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread: layers this small lose more to waiting for threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make(
    name: str, data: Digits, settings: Settings, folder: Path, reporter: Reporter
) -> tuple[Deployed, float]:
    """Train one network and write its files; also return the seconds of its training."""

    def on_epoch(epoch: int) -> None:
        reporter.doing(f"{name}: trained {epoch} of {settings.epochs} epochs")
        reporter.step()

    reporter.doing(f"{name}: training")
    model = build(settings, None if name == "dense" else name)
    started = time.perf_counter()
    train(model, data, settings, on_epoch)
    seconds = time.perf_counter() - started
    reporter.doing(f"{name}: converting, saving, exporting")
    deployed = deploy(model, name, folder)
    reporter.step(_DEPLOY)
    reporter.done(f"{name}: trained in {seconds:.1f} s, converted, saved, exported")
    return deployed, seconds


def _measure(
    made: dict[str, tuple[Deployed, float]], data: Digits, settings: Settings, reporter: Reporter
) -> tuple[Row, ...]:
    """Check answers and kernels of all networks, then time them together."""
    models = {name: model for name, (model, _) in made.items()}
    x, y = data.x_test.numpy(), data.y_test.numpy()
    reporter.doing("comparing answers with and without the library")
    sessions = onnx.open_sessions(models)
    checked = {name: onnx.answers(model, sessions, name, x) for name, model in models.items()}
    ran = {name: onnx.kernels(model, name, x) for name, model in models.items()}
    reporter.step(_OPEN)
    reporter.done("torch and ONNX Runtime, with and without our library, give the same answers")
    reporter.doing("measuring latencies in turns")
    share = _MEASURE / settings.rounds
    times = onnx.latencies(sessions, x, settings.rounds, lambda: reporter.step(share))
    return tuple(
        Row(
            format=name,
            label=label(name, model.tensors),
            density=model.density,
            accuracy=float((checked[name][0].argmax(1) == y).mean()),
            onnx_bytes=model.onnx.stat().st_size,
            weights_bytes=sum(path.stat().st_size for path in model.weights),
            train_seconds=made[name][1],
            difference=checked[name][1],
            kernels=ran[name],
            latency=times[name, bool(model.tensors)],
            plain=times[name, False],
        )
        for name, model in models.items()
    )
