"""How ``spfmt train`` shows where it is: a bar on a terminal, a line per evaluation elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from spfmt.recipes import Progress, Recipe, Watcher

if TYPE_CHECKING:
    from spfmt.cli._progress import Reporter

__all__ = ["watcher"]

_EVERY = 0.1  # seconds between two looks at the bar


@contextlib.contextmanager
def watcher(recipe: Recipe, *, quiet: bool = False) -> Iterator[Watcher]:
    """Yield who tells how a recipe's runs go on: on stderr, with a bar where rich is installed."""
    if quiet:
        yield Watcher()
    elif sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        from spfmt.cli._progress import Reporter

        with Reporter(len(recipe.seeds), width=12) as reporter:
            yield _Bar(reporter)
    else:
        yield _Lines()


def _duration(seconds: float) -> str:
    """Write seconds as a clock does."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _where(progress: Progress) -> str:
    epoch = f"epoch {round(progress.epoch, 2):g}/{round(progress.epochs, 2):g}"
    return f"seed {progress.seed}, {epoch}, {_duration(progress.seconds_left)} left"


def _speed(progress: Progress) -> str:
    return f"density {progress.density:.3f}, {progress.steps_per_second:.1f} steps/s"


def _score(accuracy: float | None) -> str:
    return "" if accuracy is None else f", test accuracy {100 * accuracy:.2f} %"


class _Lines(Watcher):
    """A line at the beginning of a run and after every evaluation."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        print(f"[{time.monotonic() - self._started:6.1f} s] {text}", file=sys.stderr, flush=True)

    def begin(self, progress: Progress, dense: dict[str, str]) -> None:
        """Say where the run begins, and what of it runs dense."""
        how = "begins" if progress.step == 0 else f"goes on after step {progress.step}"
        self.say(
            f"seed {progress.seed} {how}: {progress.steps} steps, density {progress.density:.3f}"
        )
        for name, why in dense.items():
            self.say(f"{name} runs dense: {why}")

    def tested(self, progress: Progress) -> None:
        """Say what the evaluation found."""
        loss = f"loss {progress.loss:.4f}{_score(progress.test_accuracy)}"
        self.say(f"{_where(progress)}: {loss}, {_speed(progress)}")

    def writing(self, progress: Progress) -> None:
        """Say that training is over."""
        self.say(f"seed {progress.seed}: trained{_score(progress.test_accuracy)}; writing results")


class _Bar(_Lines):
    """The same lines above a bar with loss, accuracy, density, speed and the time that is left."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter, self._shown, self._at = reporter, 0.0, 0

    def say(self, text: str) -> None:
        """Leave a line above the bar."""
        self._reporter.done(text)

    def begin(self, progress: Progress, dense: dict[str, str]) -> None:
        """Begin at the step that was reached before."""
        super().begin(progress, dense)
        self._at = 0
        self._look(progress)

    def step(self, progress: Progress) -> None:
        """Move the bar, not more often than an eye sees."""
        if progress.step == progress.steps or time.monotonic() - self._shown > _EVERY:
            self._look(progress)

    def _look(self, progress: Progress) -> None:
        self._shown = time.monotonic()
        self._reporter.step((progress.step - self._at) / progress.steps)
        self._at = progress.step
        loss = f"loss {progress.loss:.3f}, accuracy {100 * progress.accuracy:.1f} %"
        test = (
            ""
            if progress.test_accuracy is None
            else f" (test {100 * progress.test_accuracy:.1f} %)"
        )
        self._reporter.doing(f"{_where(progress)}: {loss}{test}, {_speed(progress)}")
