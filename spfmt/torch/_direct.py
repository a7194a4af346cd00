"""Products from tensors to result in one compiled call, which torch's dispatcher knows nothing of.

`multiply` and `sample` return None wherever something is not plain: another dtype, layout, device
or class of tensor, operands that do not fit together, a lazily negated view, inference tensors.
The caller then goes the long way, through the operators, which computes or says what is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spfmt import _kernels, threads
from spfmt.torch._identity import refresh

__all__ = ["SPMM", "SPMM_T", "multiply", "sample"]

SPMM, SPMM_T = 0, 1

_log = logging.getLogger("spfmt.torch")
_debug = logging.getLogger("spfmt").isEnabledFor


def _connect() -> bool:
    """Give the compiled code what it knows torch by; tell whether this torch has all of it."""
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):  # torch 2.10 brought it
        _log.info("torch %s has no DLPack table of functions: calls cost more", torch.__version__)
        return False
    empty: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)
    if empty is None:

        def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")

    _kernels.use_torch(Tensor, nn.Parameter, refresh, empty)
    return True


_connected = _connect()


def multiply(
    op: int,
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    format: str,
    activation: int = 0,
    out: Tensor | None = None,
) -> Tensor | None:
    """Compute spmm or spmm_t, or return None.

    Parameters
    ----------
    op : int
        `SPMM` or `SPMM_T`.
    values, structure, x, bias, shape, format
        As for :func:`spfmt.torch.spmm`.
    activation : int
        :func:`spfmt.activations.activation_code`.
    out : Tensor, optional
        Receives the result, (B, R) or (B, C); otherwise it is allocated.

    Raises
    ------
    FormatError
        Where the structure is corrupt.
    """
    if _debug(logging.DEBUG):  # the long way logs which kernel runs
        return None
    y: Tensor | None = _kernels.multiply_tensors(
        op, values, structure, x, bias, shape, format, activation, out, threads._override
    )
    return y


def sample(
    structure: Tensor,
    dy: Tensor,
    x: Tensor,
    shape: Sequence[int],
    format: str,
    capacity: int | None,
    out: Tensor | None = None,
) -> Tensor | None:
    """Compute sddmm into `out`, or into `capacity` new elements; otherwise as `multiply`."""
    if _debug(logging.DEBUG):
        return None
    gradient: Tensor | None = _kernels.sample_tensors(
        structure, dy, x, shape, format, capacity, out, threads._override
    )
    return gradient
