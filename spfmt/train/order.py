"""Whether `step` follows an optimizer's step; others would be counted and never have been."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from spfmt.errors import format_error

__all__ = ["StepOrder"]


class StepOrder:
    """Sees whether weights were written, or an optimizer stepped, since the last look.

    Parameters
    ----------
    optimizers : iterable
        The optimizer and all that it wraps.
    weights : callable
        Returns the parameters that are trained, as they are now.
    """

    def __init__(
        self, optimizers: Iterable[Any], weights: Callable[[], Sequence[torch.Tensor]]
    ) -> None:
        self._optimizers, self._weights = list(optimizers), weights
        self._stepped = False
        alone = weakref.ref(self)  # a trainer that is gone must not stay with its optimizer

        def note(*_: Any) -> None:
            if (order := alone()) is not None:
                order._stepped = True

        known = [o for o in self._optimizers if isinstance(o, torch.optim.Optimizer)]
        for optimizer in known:
            optimizer.register_step_post_hook(note)
        self._blind = not known  # others may write through .data, which torch does not count
        self.look()

    def look(self) -> None:
        """Remember the weights as they are."""
        self._stepped = False
        self._written = self._versions()

    def check(self) -> None:
        """Refuse where nothing has changed since the last look, as far as that can be seen.

        Gradients that are not finite, of whatever the optimizer holds, excuse it: a gradient scaler
        skips such a step. They must still be there: a scaler leaves no other trace in an optimizer
        that it did not call, so that with ``zero_grad()`` before ``step()`` this is an error.

        Raises
        ------
        FormatError
        """
        if self._blind or self._stepped or self._versions() != self._written:
            return
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if all(torch.isfinite(g._values() if g.is_sparse else g).all() for g in grads):
            raise format_error(
                "step() without an optimizer.step() since the last one",
                "one call of it after every optimizer.step()",
                "order: loss.backward(), optimizer.step(), step(), optimizer.zero_grad(); with a "
                "gradient scaler, whose skipped steps show in the gradients alone, too; update() "
                "moves weights at once",
            )

    def _versions(self) -> list[int]:
        return [weight._version for weight in self._weights()]
