"""Random weights of every format: the hardest structures for caches and packing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spfmt.errors import format_error
from spfmt.formats import FORMATS, SparseTensor

__all__ = ["Spec", "parse_spec", "random_weight"]


@dataclass(frozen=True)
class Spec:
    """Which weight to make.

    Attributes
    ----------
    format : str
    params : dict
        Keywords of the format's `random`; ``n`` and ``m`` fix the density.
    """

    format: str
    params: dict[str, Any] = field(default_factory=dict)

    def density(self, density: float) -> float:
        """Return the density asked for, or the one that the parameters fix."""
        return self.params["n"] / self.params["m"] if "n" in self.params else density


def parse_spec(text: str) -> Spec:
    """Read a format as written on a command line.

    Parameters
    ----------
    text : str
        A format's name, alone or with parameters: ``nm`` (m = 32), ``nm:16`` (n from the density),
        ``nm:2:4``, ``shuffled_block:8x32``.

    Raises
    ------
    FormatError
        For anything else.
    """
    name, colon, rest = text.strip().partition(":")
    params = FORMATS[name].parse_spec(rest) if name in FORMATS and (rest or not colon) else None
    if params is None:
        ways = [f"{n}:{s}".strip(":") for n, f in FORMATS.items() for s in ("", *f.SPECS)]
        raise format_error(
            f"format {text!r}",
            f"{', '.join(ways[:-1])} or {ways[-1]}",
            "for example --format condensed,nm:2:4,shuffled_block:16x16",
        )
    return Spec(name, params)


def random_weight(
    spec: Spec, shape: tuple[int, ...], density: float, seed: int = 0
) -> SparseTensor:
    """Return a float32 weight with random structure and standard normal values.

    Parameters
    ----------
    spec : Spec
    shape : tuple of int
        (R, C) or (C_out, C_in, Kh, Kw).
    density : float
        Share of stored weights; the format's nearest legal budget is taken.
    seed : int
        Equal arguments give equal weights.
    """
    rng = np.random.default_rng((seed, *shape))
    return FORMATS[spec.format].random(shape, spec.density(density), rng, **spec.params)
