"""Random weights of every format: the hardest structures for caches and packing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from spfmt.errors import format_error
from spfmt.formats import CSR, HRBP, NM, Condensed, ShuffledBlock, SparseTensor

__all__ = ["FORMATS", "Spec", "label", "parse_spec", "random_columns", "random_weight"]

FORMATS = ("shuffled_block", "hrbp", "nm", "condensed", "csr")

Rng = np.random.Generator
_STRIP = 1 << 24  # scores drawn at a time


@dataclass(frozen=True)
class Spec:
    """Which weight to make.

    Attributes
    ----------
    format : str
    params : dict of str to int
        Of N:M ``m`` and maybe ``n``, which then fixes the density; of blocks ``rows``, ``cols``.
    """

    format: str
    params: dict[str, int] = field(default_factory=dict)

    def density(self, density: float) -> float:
        """Return the density asked for, or the one that the parameters fix."""
        return self.params["n"] / self.params["m"] if "n" in self.params else density


def parse_spec(text: str) -> Spec:
    """Read a format as written on a command line.

    Parameters
    ----------
    text : str
        ``condensed``, ``csr``, ``hrbp``; ``nm`` (m = 32), ``nm:16`` (n from the density) or
        ``nm:2:4``; ``shuffled_block`` (16x16) or ``shuffled_block:8x32``.

    Raises
    ------
    FormatError
        For anything else.
    """
    name, _, rest = text.strip().partition(":")
    if name in FORMATS and not rest and ":" not in text:
        defaults = {"nm": {"m": 32}, "shuffled_block": {"rows": 16, "cols": 16}}
        return Spec(name, defaults.get(name, {}))
    if name == "nm" and (match := re.fullmatch(r"(?:([1-9]\d{0,3}):)?([1-9]\d{0,3})", rest)):
        n, m = int(match[1] or 0), int(match[2])
        if n <= m:
            return Spec(name, {"n": n, "m": m} if n else {"m": m})
    if name == "shuffled_block" and (match := re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", rest)):
        return Spec(name, {"rows": int(match[1]), "cols": int(match[2])})
    raise format_error(
        f"format {text!r}",
        "condensed, csr, hrbp, nm, nm:M, nm:N:M with N <= M, shuffled_block or "
        "shuffled_block:ROWSxCOLS",
        "for example --format condensed,nm:2:4,shuffled_block:16x16",
    )


def label(a: SparseTensor) -> str:
    """Name a weight by its format and what distinguishes it, as in ``nm 3:32``."""
    if isinstance(a, NM):
        return f"nm {a.n}:{a.m}"
    if isinstance(a, ShuffledBlock):
        return "shuffled_block {}x{}".format(*a.block_shape)
    return a.format


def random_weight(
    spec: Spec, shape: tuple[int, int], density: float, seed: int = 0
) -> SparseTensor:
    """Return a float32 weight with random structure and standard normal values.

    Parameters
    ----------
    spec : Spec
    shape : (int, int)
        (R, C).
    density : float
        Share of stored weights; the format's nearest legal budget is taken.
    seed : int
        Equal arguments give equal weights.

    Notes
    -----
    Constant fan-in and HRBP are drawn row by row or group by group, so a matrix with a million
    rows takes memory for its nonzeros only. The others are chosen from random scores (R, C).
    """
    rng = np.random.default_rng((seed, *shape))
    rows, cols = shape
    density = spec.density(density)
    if spec.format == "condensed":
        columns = random_columns(rng, rows, cols, max(1, round(density * cols)))
        return Condensed(shape, np.arange(rows), columns, _normal(rng, columns.shape))
    if spec.format == "hrbp":
        return _random_hrbp(rng, shape, density)
    scores = rng.random(shape, dtype=np.float32)
    values = _normal(rng, shape)
    if spec.format == "csr":
        return CSR.from_scores(scores, density, values=values)
    if spec.format == "nm":
        m = spec.params["m"]
        n = spec.params.get("n", max(1, round(density * m)))
        return NM.from_scores(scores, n=n, m=m, values=values)
    block = spec.params["rows"], spec.params["cols"]
    order = rng.permutation(rows)
    return ShuffledBlock.from_scores(
        scores, density, block_shape=block, row_perm=order, values=values
    )


def _random_hrbp(rng: Rng, shape: tuple[int, int], density: float) -> HRBP:
    rows, cols = shape
    groups = max(1, min(8, rows // 8))
    channels = random_columns(rng, groups, cols, max(1, round(density * cols)))
    pattern = np.zeros((groups, 1), np.int64)
    starts = np.linspace(0, rows, groups + 1).astype(np.int64)
    values = _normal(rng, rows * channels.shape[1])
    return HRBP(shape, rng.permutation(rows), starts, channels, pattern, values)


def random_columns(rng: Rng, lists: int, limit: int, k: int) -> npt.NDArray[np.int32]:
    """Return `lists` ascending lists of k distinct columns below `limit`, (lists, k)."""
    columns = np.empty((lists, k), np.int32)
    for first, last in _strips(lists, limit):
        scores = rng.random((last - first, limit), dtype=np.float32)
        kept = np.argpartition(scores, k - 1, axis=1)[:, :k] if k < limit else np.argsort(scores)
        columns[first:last] = np.sort(kept, axis=1)
    return columns


def _strips(rows: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(1, _STRIP // max(1, width))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def _normal(rng: Rng, shape: Any) -> npt.NDArray[np.float32]:
    drawn: npt.NDArray[np.float32] = rng.standard_normal(shape, dtype=np.float32)
    return drawn
