"""The three products as torch operators: ``spfmt::spmm``, ``spfmt::spmm_t``, ``spfmt::sddmm``.

A sparse weight is two tensors here: ``values``, flat and floating, and ``structure``, an int32
buffer of self-describing words (see :func:`spfmt.formats.encode`). Of the two only ``values`` is
differentiable, so autograd, ``torch.compile`` and ``torch.export`` see plain tensors.

========  =============================  ========================================
operator  computes                       gradients (each only when asked for)
========  =============================  ========================================
spmm      ``y = x @ A.T + bias``         ``x``: spmm_t, ``values``: sddmm, ``bias``: sum
spmm_act  ``y = f(x @ A.T + bias)``      as spmm; recomputes what f was applied to
spmm_t    ``dx = dy @ A``                ``dy``: spmm, ``values``: sddmm
sddmm     ``(dy.T @ x)`` at the places   ``dy``: spmm, ``x``: spmm_t
========  =============================  ========================================

Gradients are differentiable once: differentiating a gradient again raises a ``RuntimeError``, and
so does forward mode (``jvp``). ``torch.func.vmap`` works, ``torch.func.grad`` does not: torch keeps
it from operators whose gradients are written in Python, and says so. Under
``torch.autocast`` the operators cast to float32, compute and return float32, and say so once in the
log; low-precision tensors outside autocast raise :class:`spfmt.KernelNotFound`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spfmt.activations import activation_code
from spfmt.torch import _products
from spfmt.torch._eager import requires_grad

__all__ = ["sddmm", "spmm", "spmm_t"]


def spmm(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int],
    format: str,
    activation: str | None = None,
) -> Tensor:
    """Multiply a batch by a sparse weight: ``y = f(x @ A.T + bias)``.

    Parameters
    ----------
    values : Tensor, shape (capacity,), float32 or float64
        The weight's values; the first ``nnz`` are in use.
    structure : Tensor, shape (n_words,), int32
        Structure words of the weight (:func:`spfmt.formats.encode`).
    x : Tensor, shape (B, C)
        Inputs, any strides, dtype of `values`; ``B`` may be zero.
    bias : Tensor, shape (R,), optional
        Added to every row of the result.
    shape : (int, int)
        (R, C), the shape of the weight.
    format : str
        The format's name, for instance ``"condensed"``.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        f. Where no gradient is recorded the kernel applies it to its result; where one is, torch's
        own operator follows, whose input has to be kept anyway.

    Returns
    -------
    Tensor, shape (B, R)

    Raises
    ------
    FormatError
        Where shapes, dtypes or devices do not fit together, the structure is corrupt, or no
        activation has the name.
    KernelNotFound
        Where no kernel exists for the dtype or the device.
    """
    if activation is None:
        return _products.spmm(values, structure, x, bias, shape, format)
    activation_code(activation)
    if torch.is_grad_enabled() and requires_grad(values, x, bias):
        return _products.activated(
            _products.spmm(values, structure, x, bias, shape, format), activation
        )
    return _products.spmm_act(values, structure, x, bias, shape, format, activation)


def spmm_t(
    values: Tensor, structure: Tensor, dy: Tensor, *, shape: Sequence[int], format: str
) -> Tensor:
    """Multiply a batch by the transposed weight: ``dx = dy @ A``.

    Parameters
    ----------
    values, structure, shape, format
        The weight, as for :func:`spmm`.
    dy : Tensor, shape (B, R)
        Gradients of the outputs, any strides.

    Returns
    -------
    Tensor, shape (B, C)

    Raises
    ------
    FormatError, KernelNotFound
        As for :func:`spmm`.
    """
    return _products.spmm_t(values, structure, dy, shape, format)


def sddmm(
    structure: Tensor,
    dy: Tensor,
    x: Tensor,
    *,
    shape: Sequence[int],
    format: str,
    capacity: int,
) -> Tensor:
    """Compute the entries of ``dy.T @ x`` that a structure stores: the gradient of its values.

    Parameters
    ----------
    structure, shape, format
        The structure, as for :func:`spmm`.
    dy : Tensor, shape (B, R)
        Gradients of the outputs, any strides.
    x : Tensor, shape (B, C)
        Inputs, any strides.
    capacity : int
        Length of the result, at least the structure's nnz; what lies behind nnz is zero.

    Returns
    -------
    Tensor, shape (capacity,)

    Raises
    ------
    FormatError, KernelNotFound
        As for :func:`spmm`.
    """
    return _products.sddmm(structure, dy, x, shape, format, capacity)
