"""Activations that a product can apply to its result before storing it.

==========  ===========================================================
relu        max(x, 0)
gelu        x Φ(x), Φ the standard normal distribution (exact, by erf)
gelu_tanh   x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2
silu        x / (1 + exp(-x))
==========  ===========================================================

(Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import format_error

__all__ = ["ACTIVATIONS", "activation_code", "apply_activation"]

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
"""Names, in the order of the kernels' codes from 1 on."""

Array = npt.NDArray[Any]
_CODES: dict[str | None, int] = {
    None: 0,
    **{name: code for code, name in enumerate(ACTIVATIONS, 1)},
}
_erfc = np.vectorize(math.erfc, otypes=[float])


def activation_code(name: str | None) -> int:
    """Return the kernels' number of an activation, 0 for None.

    Raises
    ------
    FormatError
        If no activation has this name.
    """
    try:
        return _CODES[name]
    except (KeyError, TypeError):
        raise format_error(
            f"activation={name!r}",
            f"None or one of {ACTIVATIONS}",
            "apply other functions to the result",
        ) from None


def apply_activation(name: str | None, x: Array) -> Array:
    """Compute an activation in float64.

    Parameters
    ----------
    name : {None, "relu", "gelu", "gelu_tanh", "silu"}
    x : ndarray
        Any shape.

    Returns
    -------
    ndarray of float64
        Shape of `x`. Infinities give limits, -inf thus -0 or 0; NaN stays NaN.

    Raises
    ------
    FormatError
        If no activation has this name.
    """
    activation_code(name)
    x = np.asarray(x, np.float64)
    if name is None:
        return x
    if name == "relu":
        return np.maximum(x, 0.0)
    bounded = np.maximum(x, -1000.0)  # all have reached 0 there, and -inf * 0 would be NaN
    if name == "gelu":
        return np.asarray(bounded * 0.5 * _erfc(-x / math.sqrt(2.0)), np.float64)
    with np.errstate(over="ignore"):
        slope = 2.0 * math.sqrt(2.0 / math.pi) * (1.0 + 0.044715 * x * x)
    e = np.exp(-np.abs(x if name == "silu" else x * slope))
    return np.asarray(bounded * (np.where(x < 0.0, e, 1.0) / (1.0 + e)), np.float64)
