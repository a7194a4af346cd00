"""LOTTERY: a mask from trained weights, trained again from early ones.

Frankle & Carbin (The Lottery Ticket Hypothesis, ICLR 2019), with the rewinding of Frankle et al.
(Stabilizing the Lottery Ticket Hypothesis, 2019), as Advances in sparse training, section 5.2,
compares with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spfmt.errors import format_error
from spfmt.formats import SparseTensor
from spfmt.torch.report import ModelReport
from spfmt.torch.sparsify import sparsify, sparsify_like
from spfmt.torch.wrappers import changeable, unwrapped
from spfmt.train.schedule import IntervalSchedule

__all__ = ["Lottery"]


class Lottery:
    """Remember early weights of a dense training, and prune them by the trained ones.

    Train a dense model and call :meth:`step` after every ``optimizer.step()``; at step `rewind` its
    state is copied. In the end :meth:`draw` makes the model sparse: the structure keeps the largest
    trained weights, the values are those of step `rewind`. Train that with a new optimizer, a
    learning rate that starts from step `rewind`, and :class:`spfmt.train.Static`.

    Parameters
    ----------
    model : nn.Module
        Dense; may be wrapped or compiled while it trains.
    rewind : int or float
        A step, 0 for the initial weights, or a fraction of `total_steps`. The paper takes 0.01 to
        0.1 of a run.
    total_steps : int, optional
        Steps of the dense run, needed where `rewind` is a fraction.

    Raises
    ------
    FormatError
        Where a number is out of its range.

    Notes
    -----
    Holds one more copy of the model's state from step `rewind` on.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> ticket = Lottery(model, rewind=0.1, total_steps=10)
    >>> for step in range(10):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(16, 64)).square().mean().backward()
    ...     optimizer.step()
    ...     recorded = ticket.step()
    >>> report = ticket.draw("csr", density=0.25)
    >>> [layer.nnz for layer in model]
    [2048, 320]
    """

    def __init__(
        self, model: nn.Module, *, rewind: int | float = 0.01, total_steps: int | None = None
    ) -> None:
        schedule = IntervalSchedule.until(rewind, total_steps, interval=1, name="rewind")
        assert schedule.end is not None
        self.model, self.rewind, self.steps = model, schedule.end, 0
        self._recorded: dict[str, Tensor] | None = None
        self._record()

    def step(self) -> bool:
        """Count one optimizer step; tell whether the weights were recorded."""
        self.steps += 1
        return self._record()

    def _record(self) -> bool:
        due = self.steps == self.rewind
        if due:
            state = unwrapped(self.model).state_dict()
            self._recorded = {name: t.detach().clone() for name, t in state.items()}
        return due

    def draw(
        self,
        format: str | type[SparseTensor] = "csr",
        density: float | Mapping[str, float] | None = None,
        **options: Any,
    ) -> ModelReport:
        """Make the model sparse, in place: structure of the trained weights, values of early ones.

        Parameters
        ----------
        format, density, **options
            As for :func:`spfmt.torch.sparsify`.

        Returns
        -------
        ModelReport

        Raises
        ------
        FormatError
            Before step `rewind`, for a model inside DDP, or as :func:`spfmt.torch.sparsify`; the
            model stays as it was.
        """
        if self._recorded is None:
            raise format_error(
                f"a ticket drawn after step {self.steps}",
                f"one drawn after step {self.rewind}, where weights are recorded",
                "call step() after every optimizer.step()",
            )
        model = changeable(self.model)
        trained = copy.deepcopy(model)
        report = sparsify(trained, format, density, **options)
        model.load_state_dict(self._recorded)
        sparsify_like(model, trained.state_dict())
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on, beside the model's and the optimizer's state."""
        return {"steps": self.steps, "recorded": self._recorded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`."""
        self.steps, self._recorded = int(state["steps"]), state["recorded"]
