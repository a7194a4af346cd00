"""When a topology changes and how much of it: the cosine drop of dynamic sparse training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spfmt.errors import format_error

__all__ = ["CosineSchedule"]


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
        if self.delta_t < 1:
            raise format_error(f"delta_t={self.delta_t}", "at least 1 step", "DSB uses delta_t=100")
        if self.t_end < 0:
            raise format_error(
                f"t_end={self.t_end}",
                "a step, or a fraction of total_steps",
                "see CosineSchedule.until",
            )

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
        if isinstance(t_end, float):
            if not 0.0 < t_end <= 1.0 or total_steps is None:
                raise format_error(
                    f"t_end={t_end} with total_steps={total_steps}",
                    "an int (a step), or a float in (0, 1] together with total_steps",
                    "pass total_steps=<steps of the whole run>, or t_end as an int",
                )
            t_end = round(t_end * total_steps)
        return cls(alpha=alpha, delta_t=delta_t, t_end=t_end)

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
