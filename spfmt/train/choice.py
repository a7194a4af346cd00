"""Which weights go and which positions come: choices that several methods share."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from spfmt.errors import FormatError
from spfmt.formats import SparseTensor
from spfmt.torch.convert import whole
from spfmt.torch.module import SparseModule

__all__ = [
    "NotFinite",
    "fill_below_kept",
    "free_positions",
    "magnitudes",
    "magnitudes_of",
    "smallest",
    "units_first",
]

Floats: TypeAlias = NDArray[np.floating[Any]]

# Powers of two between which scores of kept weights lie; all others lie below the lower one.
_LEAST, _MOST = 0, 100


class NotFinite(FormatError):
    """What was observed of a layer cannot rank anything: an update leaves the layer as it is.

    A gradient scaler skips the optimizer's step then; without one, weights would not be finite, and
    no layer would move.
    """


def magnitudes(layer: SparseModule) -> Floats:
    """Return ``|w|`` of the weights in use, (nnz,), float32 or of float64 layers float64."""
    return _magnitudes(whole(layer.values)[: layer.nnz])


def magnitudes_of(observed: torch.Tensor) -> Floats:
    """Return the magnitudes of norms or gradients that were observed, float32 or float64.

    Raises
    ------
    NotFinite
        Where one is not finite.
    """
    found = _magnitudes(observed)
    if not np.isfinite(found.max(initial=0.0)):
        raise NotFinite("what was observed on the step of its update is not finite")
    return found


def _magnitudes(tensor: torch.Tensor) -> Floats:
    exact = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    found: Floats = tensor.detach().abs().to("cpu", exact).contiguous().numpy()
    return found


def smallest(numbers: Floats, count: int) -> NDArray[np.int64]:
    """Return where the `count` smallest numbers are, of equal ones the first; ascending."""
    if count == 0:
        return np.empty(0, np.int64)
    # Far cheaper than sorting.
    limit = np.partition(numbers, count - 1)[count - 1]
    small = numbers < limit
    small[np.flatnonzero(numbers == limit)[: count - np.count_nonzero(small)]] = True
    return np.flatnonzero(small)


def fill_below_kept(
    fill: Floats,
    kept: NDArray[np.int64],
    weights: Floats,
    grown: NDArray[np.int64] | None = None,
) -> Floats:
    """Return a score of every position that puts all kept weights before all other positions.

    Parameters
    ----------
    fill : ndarray, shape (R * C,)
        Not negative; ranks the positions that are neither kept nor grown.
    kept : ndarray of int64, shape (n_kept,)
        Positions.
    weights : ndarray, shape (n_kept,)
        Magnitudes at `kept`.
    grown : ndarray of int64, optional
        Positions that score as much as the largest kept weight.

    Returns
    -------
    ndarray, shape (R * C,), of the dtype of `fill`
        Scaled by powers of two alone, so that orders and ties stay what they were.
    """
    scores = _scaled(fill, _LEAST)
    high = np.maximum(_scaled(weights, _MOST), 2.0**_LEAST)
    scores[kept] = high
    if grown is not None:
        scores[grown] = high.max(initial=2.0**_LEAST)
    return scores


def _scaled(numbers: Floats, exponent: int) -> Floats:
    """Multiply by the power of two that brings the largest below ``2**exponent``, just."""
    shift = exponent - int(np.frexp(numbers.max(initial=0.0))[1])
    if abs(shift) < 127:  # a power that float32 holds: several times faster
        scaled: Floats = numbers * numbers.dtype.type(2.0**shift)
        return scaled
    return np.ldexp(numbers, shift)


def free_positions(
    layer: SparseModule,
    tensor: SparseTensor,
    scores: Floats,
    taken: NDArray[np.int64],
    count: int,
    **params: Any,
) -> NDArray[np.int64]:
    """Return about `count` positions, none of them taken, that the layer's format would choose.

    `scores`, (R * C,) and not negative, rank them: single positions of CSR, equally many in all
    rows of a constant fan-in, whole blocks of shuffled blocks. `params` go before the layer's own
    in the search.
    """
    free = scores.copy()
    free[taken] = 0.0
    wanted: NDArray[np.bool_] = type(tensor).project(
        free.reshape(layer.shape), count / free.size, **{**layer.format_params, **params}
    )
    wanted.reshape(-1)[taken] = False
    return np.flatnonzero(wanted)


def units_first(unit: NDArray[np.int64], order: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Tell which items belong to the first units of an order that hold `count` items together.

    Parameters
    ----------
    unit : ndarray of int64, shape (n,)
        The unit of every item, below ``order.size``.
    order : ndarray of int64
        A permutation of the units.
    count : int
    """
    sizes = np.bincount(unit, minlength=order.size)[order]
    chosen = np.zeros(order.size, np.bool_)
    chosen[order[np.cumsum(sizes) - sizes < count]] = True
    return chosen[unit]
