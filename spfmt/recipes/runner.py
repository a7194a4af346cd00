"""Run a recipe: every seed to its end, from where it stopped, with its results on the disk."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spfmt.errors import format_error
from spfmt.recipes.checkpoint import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from spfmt.recipes.data import Images, load_images
from spfmt.recipes.methods import method_options
from spfmt.recipes.networks import network_options
from spfmt.recipes.outputs import check_installed, dense_layers, write_outputs
from spfmt.recipes.recipe import Recipe
from spfmt.recipes.results import (
    METRICS,
    Metrics,
    claimed,
    file_checksum,
    read_metrics,
    seed_folder,
    settle,
    write_text,
)
from spfmt.recipes.run import Progress, SeedRun
from spfmt.torch.report import table

__all__ = ["SeedResult", "Summary", "Watcher", "run_recipe"]

CHECKPOINT, RESULT = "checkpoint.pt", "result.json"


class Watcher:
    """Hears how runs go on; this one says nothing."""

    def begin(self, progress: Progress, dense: dict[str, str]) -> None:
        """A seed's run begins, or goes on; `dense` are layers that run dense, and why."""

    def step(self, progress: Progress) -> None:
        """A step is done."""

    def tested(self, progress: Progress) -> None:
        """An evaluation is done."""

    def writing(self, progress: Progress) -> None:
        """Training is over; the outputs are written."""


@dataclass(frozen=True)
class SeedResult:
    """What a seed's run came to.

    Attributes
    ----------
    seed, steps : int
    test_accuracy, test_loss : float
        At the end.
    density : float
        Stored weights over all weights of the sparse layers.
    updates : int
        Changes of the topology.
    seconds_per_step : float
        Mean over the run; evaluations and results are no part of it.
    peak_memory : int
        Bytes that the process took, all its libraries among them: a seed that follows another in
        one process has those that wrote the other's ONNX, too.
    dense_layers : dict of str to str
        Layers that run dense, and why.
    """

    seed: int
    steps: int
    test_accuracy: float
    test_loss: float
    density: float
    updates: int
    seconds_per_step: float
    peak_memory: int
    dense_layers: dict[str, str]


@dataclass(frozen=True)
class Summary:
    """All seeds of a recipe; prints as a table.

    Attributes
    ----------
    out : Path
        The results directory.
    seeds : tuple of SeedResult
    """

    out: Path
    seeds: tuple[SeedResult, ...]

    @property
    def accuracy(self) -> tuple[float, float]:
        """Mean of the test accuracies, and their sample deviation (0 for one seed)."""
        found = [seed.test_accuracy for seed in self.seeds]
        return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0

    def __str__(self) -> str:
        head = ("seed", "test accuracy", "density", "updates", "ms/step", "peak memory")
        rows: list[tuple[str, ...]] = [head, *map(_cells, self.seeds)]
        if len(self.seeds) > 1:
            mean, spread = self.accuracy
            rows.append(("mean", f"{100 * mean:.2f} ± {100 * spread:.2f} %", "", "", "", ""))
        dense = self.seeds[0].dense_layers
        lines = [f"{name} ran dense: {why}" for name, why in dense.items()]
        return "\n".join([table(rows), *lines])

    def as_json(self) -> dict[str, Any]:
        """Return the summary for a file of JSON."""
        mean, spread = self.accuracy
        return {
            "test_accuracy": mean,
            "test_accuracy_spread": spread,
            "seeds": [asdict(seed) for seed in self.seeds],
        }


def _cells(seed: SeedResult) -> tuple[str, ...]:
    return (
        str(seed.seed),
        f"{100 * seed.test_accuracy:.2f} %",
        f"{seed.density:.4f}",
        str(seed.updates),
        f"{1e3 * seed.seconds_per_step:.2f}",
        f"{seed.peak_memory / 2**20:.0f} MiB",
    )


def run_recipe(
    recipe: Recipe, out: Path, *, resume: bool = False, watcher: Watcher | None = None
) -> Summary:
    """Train every seed of a recipe and write its results.

    Parameters
    ----------
    recipe : Recipe
    out : Path
        The results directory: ``recipe.toml`` (with all defaults), ``summary.json``,
        ``summary.txt``, ``curves.png``, and for each seed ``seed-N/`` with ``metrics.jsonl``,
        ``layers.txt``, ``model.safetensors``, ``model.onnx``, ``result.json`` and
        ``checkpoint.pt``.
    resume : bool
        Go on with what is there: finished seeds stay, the others go on from their last checkpoint
        to the same bits that a run without a stop would have. Begins where nothing is there. Models
        of a finished seed that are missing or damaged are written again from its checkpoint.
    watcher : Watcher, optional

    Returns
    -------
    Summary

    Raises
    ------
    FormatError
        For a recipe whose parts do not fit each other, data that is missing or damaged, a results
        directory of something else, and results that are damaged and cannot be written again.
    MissingDependency
        For an output whose package is missing; before the training.
    Diverged
        Where the loss is not finite.
    OSError
    """
    network_options(recipe.model)
    method_options(recipe)
    check_installed(recipe)
    images = load_images(recipe.data)
    with claimed(out, recipe, resume), _globals_kept():
        results = [_run_seed(recipe, images, s, out, watcher or Watcher()) for s in recipe.seeds]
        summary = Summary(out, tuple(results))
        write_text(out / "summary.json", json.dumps(summary.as_json(), indent=1) + "\n")
        write_text(out / "summary.txt", f"{summary}\n")
        if recipe.output.curves:
            from spfmt.recipes.curves import draw_curves

            metrics = {s: read_metrics(seed_folder(out, s) / METRICS) for s in recipe.seeds}
            draw_curves(metrics, out / "curves.png")
    return summary


@contextlib.contextmanager
def _globals_kept() -> Iterator[None]:
    """Leave threads and global generators as they were before the training."""
    state, threads = random_state(), torch.get_num_threads()
    try:
        yield
    finally:
        set_random_state(state)
        torch.set_num_threads(threads)


def _run_seed(recipe: Recipe, images: Images, seed: int, out: Path, watcher: Watcher) -> SeedResult:
    """Train one seed, or go on with it, or take its result where it is done."""
    folder = seed_folder(out, seed)
    if (folder / RESULT).exists():
        result, files = _read_result(folder / RESULT, images)
        if not _to_write_again(folder, files):
            return result
    saved = folder / CHECKPOINT
    state: dict[str, Any] = load_checkpoint(saved) if saved.exists() else {"metrics": 0}
    # Sums depend on how many threads share them: a run keeps the number that it began with.
    torch.set_num_threads(state.get("threads") or recipe.train.threads or torch.get_num_threads())
    run = SeedRun(recipe, images, seed)
    if "run" in state:
        _check_data(images, state["data"], saved)
        run.load_state_dict(state["run"])
    settle(out, recipe)
    folder.mkdir(exist_ok=True)
    watcher.begin(run.progress(), dense_layers(run))
    with Metrics(folder / METRICS, state["metrics"]) as metrics:
        _train(run, metrics, saved, watcher)
    watcher.writing(run.progress())
    names = (METRICS, *write_outputs(run, folder))
    result = seed_result(run, read_metrics(folder / METRICS))
    checksums = {name: file_checksum(folder / name) for name in names}
    kept = {**asdict(result), "data": images.checksum(), "files": checksums}
    write_text(folder / RESULT, json.dumps(kept, indent=1) + "\n")
    return result


def _to_write_again(folder: Path, files: Mapping[str, int | None]) -> bool:
    """Tell whether files of a finished seed are missing or changed, and its checkpoint has them.

    Raises
    ------
    FormatError
        Where no checkpoint has them.
    """
    damaged = [name for name, checksum in files.items() if file_checksum(folder / name) != checksum]
    # No checkpoint has the metrics, and without one the seed would be trained again unasked.
    if METRICS in damaged or (damaged and not (folder / CHECKPOINT).exists()):
        raise format_error(
            f"{folder / damaged[0]}, which is missing or not what the run wrote",
            "the results of a seed that is done",
            f"restore it, or remove {folder}: the seed is trained again",
        )
    return bool(damaged)


def _read_result(path: Path, images: Images) -> tuple[SeedResult, dict[str, int | None]]:
    """Return what a seed that is done came to, and the checksums of its files."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        checksum = kept.pop("data", None)
        files = dict(kept.pop("files", ()))  # earlier versions kept none
        result = SeedResult(**kept)
    except (ValueError, TypeError, AttributeError) as error:
        raise format_error(
            f"a damaged {path} ({error})", "what a run wrote", "remove it: it is written again"
        ) from None
    if checksum is not None:  # likewise
        _check_data(images, checksum, path)
    return result, files


def _check_data(images: Images, checksum: int, saved: Path) -> None:
    if images.checksum() != checksum:
        raise format_error(
            f"other images than those that {saved} came from",
            "the same data set",
            "pass the --data DIR of the run that is resumed",
        )


def _train(run: SeedRun, metrics: Metrics, saved: Path, watcher: Watcher) -> None:
    """Step to the end; what belongs to a step is done before the checkpoint after it."""
    train, checksum = run.recipe.train, run.images.checksum()
    while not run.finished:
        run.step()
        tested = run.due_for_test
        if tested:
            run.test()
            watcher.tested(run.progress())
        watcher.step(run.progress())
        if tested or run.done % train.log_every == 0:
            metrics.write(run.record(tested))
        if run.finished or run.done % train.checkpoint_every == 0:
            state = {"run": run.state_dict(), "metrics": metrics.sync(), "data": checksum}
            save_checkpoint(saved, {**state, "threads": torch.get_num_threads()})


def seed_result(run: SeedRun, metrics: list[dict[str, Any]]) -> SeedResult:
    """Return what a run that is done came to, from its metrics."""
    test_loss, test_accuracy = run.tested or (math.nan, math.nan)
    steps = [m["step"] for m in metrics]
    counts = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    seconds = sum(m["seconds_per_step"] * n for m, n in zip(metrics, counts, strict=True))
    return SeedResult(
        seed=run.seed,
        steps=run.steps,
        test_accuracy=test_accuracy,
        test_loss=test_loss,
        density=run.density,
        updates=sum(m["updates"] for m in metrics),
        seconds_per_step=seconds / run.steps,
        peak_memory=max(m["peak_memory"] for m in metrics),
        dense_layers=dense_layers(run),
    )
