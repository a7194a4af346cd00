"""Random structures, drawn strip by strip: the hardest ones for caches and packing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["normal", "random_columns"]

Rng = np.random.Generator
_STRIP = 1 << 24  # scores drawn at a time


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


def normal(rng: Rng, shape: Any) -> npt.NDArray[np.float32]:
    """Return standard normal float32 values."""
    drawn: npt.NDArray[np.float32] = rng.standard_normal(shape, dtype=np.float32)
    return drawn
