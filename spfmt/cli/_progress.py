"""How commands show what they are doing: a bar on a terminal, a line per stage anywhere else."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

__all__ = ["Reporter"]


class Reporter:
    """Progress on stderr.

    Parameters
    ----------
    total : float
        Sum of the amounts of all steps.
    width : int
        Of the bar; what is done now is written beside it.
    """

    def __init__(self, total: float, width: int = 30) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._started = time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=width),
            TaskProgressColumn(),
            Elapsed(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._started

    def doing(self, text: str) -> None:
        """Say what happens now."""
        self._bar.update(self._task, description=text)

    def step(self, amount: float = 1.0) -> None:
        """Count a part of the work as done."""
        self._bar.advance(self._task, amount)

    def done(self, text: str) -> None:
        """Leave a line about a finished stage."""
        self._console.print(f"[{self.seconds:5.1f} s] {text}", markup=False, soft_wrap=True)
