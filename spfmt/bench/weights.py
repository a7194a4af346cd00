"""Random weights of every format, as a command line names them."""

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
        Keywords of the format's `random`.
    """

    format: str
    params: dict[str, Any] = field(default_factory=dict)


def parse_spec(text: str) -> Spec:
    """Read a format as written on a command line: a name, or ``name:`` and what it accepts.

    Raises
    ------
    FormatError
        For an unknown name, and for what the format does not accept after it.
    """
    name, colon, rest = text.strip().partition(":")
    if name not in FORMATS or (colon and not rest):
        raise format_error(
            f"format {text!r}",
            f"{', '.join(FORMATS)}, some with parameters",
            "see spfmt bench --help",
        )
    return Spec(name, FORMATS[name].parse_spec(rest))


def random_weight(
    spec: Spec, shape: tuple[int, int], density: float, seed: int = 0
) -> SparseTensor:
    """Return a float32 weight with random structure; equal arguments give equal weights.

    Parameters
    ----------
    spec : Spec
    shape : (int, int)
        (R, C).
    density : float
        Share of stored weights; the format's nearest legal budget is taken.
    seed : int
    """
    rng = np.random.default_rng((seed, *shape))
    found: SparseTensor = FORMATS[spec.format].random(shape, density, rng, **spec.params)
    return found
