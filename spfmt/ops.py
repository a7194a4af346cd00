"""The three products of a sparse weight.

==========  =====================  ============================================
spmm        Y = A X                forward pass
spmm_t      dX = Aᵀ dY             gradient of the input
sddmm       d(values) = dY Xᵀ      gradient of the weight, at the structure only
==========  =====================  ============================================

Operands are numpy arrays with samples along the last axis, ``(features, batch)``, or along the
first with ``batch_first=True``; strides are free.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from .errors import format_error
from .formats import SparseTensor

Array = npt.NDArray[Any]
_tensors: set[type] = set()  # types that were seen to be formats


def spmm(
    a: SparseTensor,
    x: Array,
    *,
    bias: Array | None = None,
    activation: str | None = None,
    batch_first: bool = False,
    out: Array | None = None,
    backend: str = "auto",
) -> Array:
    """Multiply a sparse weight with a dense matrix: Y = f(A X + bias).

    Parameters
    ----------
    a : SparseTensor
        Weight with matrix shape (R, C).
    x : ndarray
        (C, B), (B, C) with ``batch_first=True``, or one sample (C,); dtype of `a`, any strides,
        B from 0 up.
    bias : ndarray, optional
        (R,), added to every sample.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        f, applied before the result is stored (see `spfmt.activations`); ``"gelu"`` is the exact
        one, by erf.
    batch_first : bool
        Whether samples run along the first axis.
    out : ndarray, optional
        Receives the result; any strides, must not overlap `x`.
    backend : {"auto", "reference", "scalar", "avx2", "avx512"}
        ``"auto"`` takes the best kernel; ``"reference"`` is numpy on the dense matrix in float64.

    Returns
    -------
    ndarray
        (R, B), (B, R) or (R,), dtype of `x`. The number of threads does not change a bit of it.

    Raises
    ------
    FormatError
        If shapes or dtypes do not fit, or no activation has the name.
    KernelNotFound
        If no kernel exists for the format, dtype and backend.

    Examples
    --------
    >>> import numpy as np, spfmt
    >>> a = spfmt.NM.from_dense(np.array([[1., 0., 0., 2.], [0., 3., 4., 0.]]), n=2, m=4)
    >>> spfmt.spmm(a, np.array([1., 1., 1., 1.]))
    array([3., 7.])
    """
    _check(a)
    # The slots: every property is a call, and with a small weight calls are what takes the time.
    return a._structure.plan.spmm(
        a._values,
        x,
        bias=bias,
        activation=activation,
        batch_first=batch_first,
        out=out,
        backend=backend,
        constant=a._version,
    )


def spmm_t(
    a: SparseTensor,
    dy: Array,
    *,
    batch_first: bool = False,
    out: Array | None = None,
    backend: str = "auto",
) -> Array:
    """Multiply the transposed weight: dX = Aᵀ dY.

    Parameters are those of :func:`spmm` with dY (R, B), (B, R) or (R,) in place of X; the result is
    (C, B), (B, C) or (C,).

    Raises
    ------
    FormatError, KernelNotFound
        As :func:`spmm`.
    """
    _check(a)
    return a._structure.plan.spmm_t(
        a._values, dy, batch_first=batch_first, out=out, backend=backend, constant=a._version
    )


def sddmm(
    a: SparseTensor,
    dy: Array,
    x: Array,
    *,
    batch_first: bool = False,
    backend: str = "auto",
) -> Array:
    """Sampled dense-dense product: the gradient of the stored values, (dY Xᵀ) at the structure.

    Parameters
    ----------
    a : SparseTensor
        Supplies the structure; its values are not used.
    dy : ndarray
        (R, B), (B, R) with ``batch_first=True``, or (R,).
    x : ndarray
        (C, B), (B, C) or (C,), dtype of `dy`.
    batch_first, backend
        As in :func:`spmm`.

    Returns
    -------
    ndarray
        Shape of ``a.values``, dtype of `dy`.

    Raises
    ------
    FormatError, KernelNotFound
        As :func:`spmm`.
    """
    _check(a)
    gradient = a._structure.plan.sddmm(dy, x, batch_first=batch_first, backend=backend)
    return gradient.reshape(a._values.shape)


def _check(a: object) -> None:
    # Types that were seen before first: an abstract class answers isinstance ten times as slowly.
    if type(a) in _tensors:
        return
    if not isinstance(a, SparseTensor):
        raise format_error(
            f"a weight of type {type(a).__name__}",
            "a spfmt tensor",
            "convert it with spfmt.convert() or a format's from_dense()",
        )
    _tensors.add(type(a))
