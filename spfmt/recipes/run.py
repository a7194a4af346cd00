"""One seed's training: model, optimizer, method and data, step after step."""

from __future__ import annotations

import contextlib
import math
import random
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spfmt.errors import SpfmtError
from spfmt.recipes.batches import Batches, held_back
from spfmt.recipes.checkpoint import random_state, set_random_state
from spfmt.recipes.data import Images
from spfmt.recipes.methods import build_method
from spfmt.recipes.networks import build_network
from spfmt.recipes.recipe import Recipe
from spfmt.recipes.tables import Optimizer
from spfmt.torch import decay_groups

__all__ = ["Diverged", "Progress", "SeedRun", "build_optimizer", "rate_at"]

_EVALUATION_BATCH = 500


class Diverged(SpfmtError, ArithmeticError):
    """The loss of a run is no number any more."""


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes
    ----------
    seed : int
    step, steps : int
        Done, and of the whole run.
    epoch, epochs : float
        Likewise.
    loss, accuracy : float
        Of the training batches since the last line of metrics.
    test_accuracy : float or None
        Of the last evaluation.
    density : float
        Stored weights over all weights of the sparse layers; 1 without any.
    steps_per_second : float
        Since this process began with the run, evaluations counted.
    """

    seed: int
    step: int
    steps: int
    epoch: float
    epochs: float
    loss: float
    accuracy: float
    test_accuracy: float | None
    density: float
    steps_per_second: float

    @property
    def seconds_left(self) -> float:
        """How long the rest of the run will take."""
        return (self.steps - self.step) / max(self.steps_per_second, 1e-9)


@dataclass
class Window:
    """Sums over the training steps since the last line of metrics."""

    loss: float = 0.0
    correct: int = 0
    images: int = 0
    steps: int = 0
    seconds: float = 0.0
    updates: int = 0

    def add(self, loss: float, correct: int, images: int, seconds: float, changed: bool) -> None:
        """Count a step."""
        self.loss += loss * images
        self.correct += correct
        self.images += images
        self.steps += 1
        self.seconds += seconds
        self.updates += changed


def build_optimizer(optimizer: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of a recipe; biases and norms do not decay."""
    groups = decay_groups(model, optimizer.weight_decay)
    if optimizer.name == "sgd":
        momentum = 0.9 if optimizer.momentum is None else optimizer.momentum
        return torch.optim.SGD(
            groups, optimizer.lr, momentum=momentum, nesterov=bool(optimizer.nesterov)
        )
    names = ("betas", "eps")
    given = {name: getattr(optimizer, name) for name in names if getattr(optimizer, name)}
    cls = torch.optim.Adam if optimizer.name == "adam" else torch.optim.AdamW
    return cls(groups, optimizer.lr, **given)


def rate_at(recipe: Recipe, step: int, steps: int, per_epoch: int) -> float:
    """Return the learning rate after so many steps; it has no state to save."""
    rate, unit = recipe.rate, per_epoch if recipe.train.epochs else 1
    warmup = rate.warmup * unit
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if rate.name == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * max(0.0, step - warmup) / (steps - warmup)))
    if rate.name == "drops":
        drop = 0.1 if rate.factor is None else rate.factor
        factor *= drop ** sum(step >= at * unit for at in rate.at)
    return recipe.optimizer.lr * factor


class SeedRun:
    """A run that can be saved after any step and gone on with, bit for bit.

    Seeds the global generators of torch, numpy and Python.

    Attributes
    ----------
    model : nn.Module
    method : SparseTrainer, Rewire or None
    done, steps : int
        Optimizer steps so far, and of the whole run.
    density : float
        Stored weights over all weights of the sparse layers; 1 without any.
    """

    def __init__(self, recipe: Recipe, images: Images, seed: int) -> None:
        forget_peak()
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 whoever draws from it must draw the same
        torch.manual_seed(seed)
        self.recipe, self.images, self.seed = recipe, images, seed
        self.batches = Batches(images, recipe.train.batch_size, seed, recipe.data.augment)
        per_epoch = self.batches.per_epoch
        self.steps = recipe.train.steps or (recipe.train.epochs or 0) * per_epoch
        last = len(images.x) % recipe.train.batch_size or recipe.train.batch_size
        self.model = build_network(recipe.model, images.shape, images.classes, last)
        self.optimizer = build_optimizer(recipe.optimizer, self.model)
        first = Batches(images, recipe.train.batch_size, seed, augmented=False).take()
        self.method = build_method(recipe, self.model, self.optimizer, self.steps, seed, first)
        self.density = self._density()
        self.done = 0
        self.window = Window()
        self.tested: tuple[float, float] | None = None
        self._started, self._begun_at = time.perf_counter(), 0

    # --------------------------------------------------------------------------------- stepping

    def step(self) -> None:
        """Train on the next batch. Raises Diverged where the loss is not finite."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        x, y = self.batches.take()
        outputs = self.model(x)
        train = self.recipe.train
        loss = nn.functional.cross_entropy(outputs, y, label_smoothing=train.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if train.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        self.optimizer.step()
        changed = self.method is not None and self.method.step()
        self.done += 1
        if changed:
            self.density = self._density()
        found = self._finite(loss.item(), "loss")
        correct = int((outputs.argmax(1) == y).sum())
        self.window.add(found, correct, len(y), time.perf_counter() - started, changed)

    def _finite(self, loss: float, name: str) -> float:
        if not math.isfinite(loss):
            raise Diverged(
                f"got a {name} of {loss} in step {self.done} of seed {self.seed}; expected a "
                "number; fix: lower optimizer.lr, or add rate.warmup"
            )
        return loss

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return rate_at(self.recipe, self.done, self.steps, self.batches.per_epoch)

    @property
    def epoch(self) -> float:
        """Epochs so far."""
        return self.done / self.batches.per_epoch

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.done >= self.steps

    def _density(self) -> float:
        """Count the weights of all sparse layers; not in every step, for layers may be many."""
        layers = () if self.method is None else self.method.layers.values()
        size = sum(math.prod(layer.shape) for layer in layers)
        return sum(layer.nnz for layer in layers) / size if size else 1.0

    @property
    def due_for_test(self) -> bool:
        """Whether an evaluation follows the step that was done."""
        at_end = self.batches.position == 0
        return self.finished or (
            at_end and self.batches.epoch % self.recipe.train.evaluate_every == 0
        )

    def test(self) -> None:
        """Evaluate the model on the test images; raises Diverged as `step`."""
        loss, accuracy = evaluate(self.model, held_back(self.images, _EVALUATION_BATCH))
        self.tested = self._finite(loss, "test loss"), accuracy

    # -------------------------------------------------------------------------------- reporting

    def record(self, tested: bool) -> dict[str, Any]:
        """Return the metrics since the last record, and those of a test at this step."""
        window, self.window = self.window, Window()
        test_loss, test_accuracy = self.tested if tested and self.tested else (None, None)
        return {
            "step": self.done,
            "epoch": round(self.epoch, 4),
            "rate": self.optimizer.param_groups[0]["lr"],
            "loss": window.loss / window.images,
            "accuracy": window.correct / window.images,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "density": self.density,
            "updates": window.updates,
            "seconds_per_step": window.seconds / window.steps,
            "peak_memory": peak_memory(),
        }

    def progress(self) -> Progress:
        """Return where the run is."""
        window, seconds = self.window, time.perf_counter() - self._started
        images = max(1, window.images)
        return Progress(
            seed=self.seed,
            step=self.done,
            steps=self.steps,
            epoch=self.epoch,
            epochs=self.steps / self.batches.per_epoch,
            loss=window.loss / images,
            accuracy=window.correct / images,
            test_accuracy=self.tested[1] if self.tested else None,
            density=self.density,
            steps_per_second=(self.done - self._begun_at) / max(seconds, 1e-9),
        )

    # ---------------------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict() if self.method else None,
            "batches": self.batches.state_dict(),
            "random": random_state(),
            "done": self.done,
            "window": asdict(self.window),
            "tested": self.tested,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run of the recipe and the seed was saved."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        self.done = self._begun_at = int(state["done"])
        if self.method is not None:
            self.method.load_state_dict(state["method"])
        self.density = self._density()
        self.window = Window(**state["window"])
        self.tested = state["tested"]
        self._started = time.perf_counter()
        set_random_state(state["random"])


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return mean loss and accuracy of a model over batches; it trains on afterwards."""
    model.eval()
    loss, correct, count = 0.0, 0, 0
    for x, y in batches:
        outputs = model(x)
        loss += float(nn.functional.cross_entropy(outputs, y, reduction="sum"))
        correct += int((outputs.argmax(1) == y).sum())
        count += len(y)
    model.train()
    return loss / count, correct / count


def forget_peak() -> None:
    """Let `peak_memory` count from now on, where the system lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the most memory that this process had since `forget_peak`, in bytes."""
    with contextlib.suppress(OSError):  # what the process was forked from counts in getrusage, too
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
