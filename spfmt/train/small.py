"""SMALL: a dense model of fewer weights, the baseline of every sparse one.

Advances in sparse training, section 5.1: widths are reduced so that the number of weights is that
of the sparse model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from spfmt.errors import format_error
from spfmt.structure._checks import as_int
from spfmt.torch.layer import resolve_density

__all__ = ["small", "small_width"]

Factory = Callable[[int], nn.Module]


def small(make_model: Factory, density: float | None = None, **options: Any) -> nn.Module:
    """Make the same model, narrower; see `small_width`, which finds the width.

    Examples
    --------
    >>> import torch
    >>> def make_model(width):
    ...     return torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.Linear(width, width))
    >>> small(make_model, density=0.25, width=128)
    Sequential(
      (0): Linear(in_features=64, out_features=53, bias=True)
      (1): Linear(in_features=53, out_features=53, bias=True)
    )
    """
    return make_model(small_width(make_model, density, **options))


def small_width(
    make_model: Factory,
    density: float | None = None,
    *,
    sparsity: float | None = None,
    width: int,
    weights: int | None = None,
    multiple: int = 1,
) -> int:
    """Return the width at which a model has as many weights as the sparse one of the full width.

    Parameters
    ----------
    make_model : callable
        ``make_model(width)`` returns a model whose number of weights does not fall where the width
        grows. It is called on the meta device, some log2(width) times.
    density, sparsity : float, optional
        Share of the full model's weights, or of what is left out.
    width : int
        Of the full model.
    weights : int, optional
        Number of weights instead of a density, for instance the sum of ``nnz`` in the report of a
        sparse model, in which some layers are dense.
    multiple : int
        The width is a multiple of it (of heads, of vectors), as the full one is.

    Returns
    -------
    int
        From `multiple` to `width`, the nearest number of weights; of two equally near ones the
        smaller width.

    Raises
    ------
    FormatError
        Where a number is out of its range, or densities and a number of weights are both given.
    """
    multiple = as_int("multiple", multiple, 1)
    most = as_int("width", width, multiple) // multiple
    full = _weights(make_model, width)
    if weights is None:
        wanted = resolve_density(density, sparsity) * full
    elif density is None and sparsity is None:
        wanted = float(as_int("weights", weights, 0, full))
    else:
        raise format_error(
            f"weights={weights} and a density", "one of them", "pass density=0.1 alone"
        )
    counts: dict[int, int] = {}

    def count(units: int) -> int:
        if units not in counts:
            counts[units] = _weights(make_model, units * multiple)
        return counts[units]

    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= wanted else (low, middle)
    return multiple * min(low, high, key=lambda units: (abs(count(units) - wanted), units))


def _weights(make_model: Factory, width: int) -> int:
    """Return the number of weights of a model: of parameters that are matrices or larger."""
    with torch.device("meta"):
        model = make_model(width)
    return sum(p.numel() for p in model.parameters() if p.dim() >= 2)
