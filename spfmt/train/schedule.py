"""When a topology changes and how much of it: the cosine drop of dynamic sparse training."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from spfmt.errors import format_error
from spfmt.structure._checks import as_int

__all__ = ["CosineSchedule", "CubicSchedule", "IntervalSchedule", "Schedule"]


class Schedule(Protocol):
    """When a method updates."""

    def is_update(self, t: int) -> bool:
        """Tell whether the topology changes after step `t` (steps count from 1)."""
        ...  # pragma: no cover


@dataclass(frozen=True)
class CosineSchedule:
    r"""Drop a share of the weights every `delta_t` steps, decaying to zero along a cosine.

    At step ``t`` the number of weights to drop is (DSB, eq. 1)

    .. math:: k = \frac{\alpha N}{2} \left(1 + \cos\frac{t\,\pi}{T_{end}}\right)

    Parameters
    ----------
    alpha : float
        Share of the weights dropped at the start, in [0, 1].
    delta_t : int
        Steps between two updates of the topology.
    t_end : int
        The step from which on the topology stays as it is.

    Raises
    ------
    FormatError
        Where a number is out of its range.

    Examples
    --------
    >>> schedule = CosineSchedule(alpha=0.3, delta_t=100, t_end=1000)
    >>> schedule.drop_fraction(500)
    0.15
    >>> [schedule.is_update(t) for t in (0, 50, 100, 1000)]
    [False, False, True, False]
    """

    alpha: float = 0.3
    delta_t: int = 100
    t_end: int = 75_000

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise format_error(f"alpha={self.alpha}", "a share in [0, 1]", "DSB uses alpha=0.3")
        _whole("delta_t", self.delta_t, 1)
        _whole("t_end", self.t_end)

    @classmethod
    def until(
        cls, t_end: int | float, total_steps: int | None, *, alpha: float, delta_t: int
    ) -> CosineSchedule:
        """Build a schedule whose end is a step or a fraction of all steps.

        Parameters
        ----------
        t_end : int or float
            A step (int), or a fraction of `total_steps` (float in (0, 1]).
        total_steps : int, optional
            Steps of the whole run; needed for a fraction.
        alpha, delta_t
            As for the class.
        """
        return cls(alpha=alpha, delta_t=delta_t, t_end=_step("t_end", t_end, total_steps))

    @property
    def updates(self) -> int:
        """How many updates there are."""
        return max(0, self.t_end - 1) // self.delta_t

    def is_update(self, t: int) -> bool:
        """Tell whether the topology changes after step `t` (steps count from 1)."""
        return 0 < t < self.t_end and t % self.delta_t == 0

    def drop_fraction(self, t: int) -> float:
        """Return the share of weights to drop after step `t`; zero from `t_end` on."""
        if t >= self.t_end:
            return 0.0
        return 0.5 * self.alpha * (1.0 + math.cos(math.pi * t / self.t_end))

    def n_drop(self, t: int, n_weights: int) -> int:
        """Return how many of `n_weights` weights go after step `t`: eq. 1, rounded down."""
        # The rounding guard keeps 0.3 * 10 = 3 from becoming 2 by one ulp.
        return math.floor(self.drop_fraction(t) * n_weights + 1e-9)


@dataclass(frozen=True)
class CubicSchedule:
    r"""Prune little by little: much at the start, less and less towards the end.

    At step ``t`` of ``t_start .. t_end``, in n updates ``delta_t`` apart (Zhu & Gupta 2017, eq. 1),

    .. math:: s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_{start}}{n \Delta t}\right)^3

    Parameters
    ----------
    t_start : int
        The step that pruning begins after, at least 0.
    delta_t : int
        Steps between two updates.
    t_end : int
        The last step that an update may follow, at least ``t_start + delta_t``.

    Raises
    ------
    FormatError
        Where no update fits, or a number is out of its range.

    Examples
    --------
    >>> schedule = CubicSchedule(t_start=10, delta_t=10, t_end=30)
    >>> [t for t in range(50) if schedule.is_update(t)]
    [20, 30]
    >>> schedule.left(20), schedule.left(30)
    (0.125, 0.0)
    """

    t_start: int = 0
    delta_t: int = 100
    t_end: int = 75_000

    def __post_init__(self) -> None:
        for name in ("t_start", "delta_t", "t_end"):
            _whole(name, getattr(self, name), 1 if name == "delta_t" else 0)
        if self.t_end < self.t_start + self.delta_t:
            raise format_error(
                f"t_start={self.t_start}, delta_t={self.delta_t}, t_end={self.t_end}",
                "room for an update: t_start + delta_t <= t_end",
                "lower delta_t, or raise t_end or total_steps",
            )

    @classmethod
    def until(
        cls, t_end: int | float, total_steps: int | None, *, t_start: int | float, delta_t: int
    ) -> CubicSchedule:
        """Build a schedule whose start and end are steps or fractions of all steps.

        Parameters
        ----------
        t_end, t_start : int or float
            A step (int), or a fraction of `total_steps` (float; of the end in (0, 1]).
        total_steps : int, optional
        delta_t : int
        """
        start = 0 if t_start == 0 else _step("t_start", t_start, total_steps)
        return cls(start, delta_t, _step("t_end", t_end, total_steps))

    @property
    def updates(self) -> int:
        """How many updates there are."""
        return (self.t_end - self.t_start) // self.delta_t

    def is_update(self, t: int) -> bool:
        """Tell whether weights go after step `t` (steps count from 1)."""
        return self.t_start < t <= self.t_end and (t - self.t_start) % self.delta_t == 0

    def left(self, t: int) -> float:
        """Return the share of the weights that must go which is still there after step `t`."""
        done = (t - self.t_start) / (self.updates * self.delta_t)
        return float((1.0 - min(1.0, max(0.0, done))) ** 3)


@dataclass(frozen=True)
class IntervalSchedule:
    """Update every so many steps, until a step if one is given.

    Parameters
    ----------
    interval : int
        Steps between two updates.
    end : int, optional
        The step from which on nothing is updated.

    Raises
    ------
    FormatError
        Where a number is out of its range.

    Examples
    --------
    >>> schedule = IntervalSchedule(interval=2, end=5)
    >>> [t for t in range(9) if schedule.is_update(t)]
    [2, 4]
    """

    interval: int = 1
    end: int | None = None

    def __post_init__(self) -> None:
        _whole("interval", self.interval, 1)
        if self.end is not None:
            _whole("end", self.end)

    @classmethod
    def until(
        cls, end: int | float, total_steps: int | None, *, interval: int, name: str = "end"
    ) -> IntervalSchedule:
        """Build a schedule whose end is a step (int), or a fraction of all steps (float)."""
        return cls(interval, _step(name, end, total_steps))

    def is_update(self, t: int) -> bool:
        """Tell whether step `t` (steps count from 1) is one of an update."""
        return t > 0 and t % self.interval == 0 and not self.ended(t)

    def ended(self, t: int) -> bool:
        """Tell whether step `t` is the end or behind it."""
        return self.end is not None and t >= self.end


def _whole(name: str, value: int, least: int = 0) -> int:
    if isinstance(value, bool):  # an int to Python, and an answer to another question
        raise format_error(f"{name}={value}", "a number of steps", f"pass {name} as an int")
    return as_int(name, value, least, sys.maxsize)


def _step(name: str, given: int | float, total_steps: int | None) -> int:
    """Return a step that may be given as a fraction of all."""
    if total_steps is not None:
        _whole("total_steps", total_steps, 1)
    if not isinstance(given, float | np.floating):
        return _whole(name, given)
    if not 0.0 < given <= 1.0 or total_steps is None:
        raise format_error(
            f"{name}={given} with total_steps={total_steps}",
            "an int (a step), or a float in (0, 1] together with total_steps",
            f"pass total_steps=<steps of the whole run>, or {name} as an int",
        )
    return round(given * total_steps)
