"""Products as graphs compiled by Inductor call them: plain functions, into buffers given to them.

Which function stands for which operator says :mod:`spfmt.torch._lowerings`.
"""

from __future__ import annotations

import importlib
import logging
import sys

import torch
from torch import Tensor

from spfmt.activations import activation_code
from spfmt.torch.values import SPMM, SPMM_T, multiply, sample

__all__ = ["lower_products", "sddmm_into_v1", "spmm_into_v1", "spmm_t_into_v1"]

_log = logging.getLogger("spfmt.torch")
_profiled = torch._C._autograd._profiler_enabled

# Inductor keeps generated modules on disk, where they outlive a version of spfmt: a function that
# takes other arguments, or means something else by them, needs another name. What `multiply` and
# `sample` decline goes to the operators, and so does everything under a profiler, which names them.


def spmm_into_v1(
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    shape: tuple[int, int],
    activation: str | None,
    out: Tensor,
) -> None:
    """Compute ``spfmt::spmm`` into `out`."""
    code = activation_code(activation)
    if _profiled() or multiply(SPMM, values, structure, x, bias, shape, code, out) is None:
        out.copy_(torch.ops.spfmt.spmm(values, structure, x, bias, shape, activation))


def spmm_t_into_v1(
    values: Tensor,
    structure: Tensor,
    dy: Tensor,
    *,
    shape: tuple[int, int],
    out: Tensor,
) -> None:
    """Compute ``spfmt::spmm_t`` into `out`."""
    if _profiled() or multiply(SPMM_T, values, structure, dy, None, shape, 0, out) is None:
        out.copy_(torch.ops.spfmt.spmm_t(values, structure, dy, shape))


def sddmm_into_v1(
    structure: Tensor, dy: Tensor, x: Tensor, *, shape: tuple[int, int], out: Tensor
) -> None:
    """Compute ``spfmt::sddmm`` into `out`, whose length is the capacity."""
    if _profiled() or sample(structure, dy, x, shape, None, out) is None:
        out.copy_(torch.ops.spfmt.sddmm(structure, dy, x, shape, out.shape[0]))


_lowered = False


def lower_products() -> None:
    """Teach Inductor these functions once it is there; called whenever a product is traced."""
    global _lowered
    # Importing Inductor takes seconds: not before somebody compiles with it.
    if _lowered or "torch._inductor.compile_fx" not in sys.modules:
        return
    _lowered = True
    try:
        importlib.import_module("spfmt.torch._lowerings")
    except (ImportError, AttributeError, TypeError) as error:
        _log.warning(
            "torch %s: Inductor has changed (%s); compiled graphs call sparse products through "
            "torch's dispatcher, which costs each of them about 15 µs",
            torch.__version__,
            error,
        )
