"""Which weights go and which positions come: choices that several methods share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["smallest"]


def smallest(magnitudes: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return where the `count` smallest numbers are, of equal ones the first; ascending."""
    if count == 0:
        return np.empty(0, np.int64)
    # Far cheaper than sorting.
    limit = np.partition(magnitudes, count - 1)[count - 1]
    small = magnitudes < limit
    small[np.flatnonzero(magnitudes == limit)[: count - np.count_nonzero(small)]] = True
    return np.flatnonzero(small)
