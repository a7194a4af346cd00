"""Products as graphs compiled by Inductor call them: plain functions, into buffers given to them.

Which function stands for which operator says :mod:`spfmt.torch._lowerings`.
"""

from __future__ import annotations

import importlib
import logging
import sys

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from spfmt.activations import activation_code
from spfmt.torch._direct import SPMM, SPMM_T, multiply, sample

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
    format: str,
    activation: str | None,
    written: bool = False,
    out: Tensor,
) -> None:
    """Compute ``spfmt::spmm``, or ``spfmt::spmm_act`` where there is an activation, into `out`.

    `written` tells that generated code writes the values, whose version then means nothing.
    """
    if written:
        increment_version(values)
    code = activation_code(activation)
    if _profiled() or multiply(SPMM, values, structure, x, bias, shape, format, code, out) is None:
        operands = values, structure, x, bias, shape, format
        ops = torch.ops.spfmt
        out.copy_(ops.spmm_act(*operands, activation) if code else ops.spmm(*operands))


def spmm_t_into_v1(
    values: Tensor,
    structure: Tensor,
    dy: Tensor,
    *,
    shape: tuple[int, int],
    format: str,
    written: bool = False,
    out: Tensor,
) -> None:
    """Compute ``spfmt::spmm_t`` into `out`; `written` as for `spmm_into_v1`."""
    if written:
        increment_version(values)
    if _profiled() or multiply(SPMM_T, values, structure, dy, None, shape, format, 0, out) is None:
        out.copy_(torch.ops.spfmt.spmm_t(values, structure, dy, shape, format))


def sddmm_into_v1(
    structure: Tensor, dy: Tensor, x: Tensor, *, shape: tuple[int, int], format: str, out: Tensor
) -> None:
    """Compute ``spfmt::sddmm`` into `out`, whose length is the capacity."""
    if _profiled() or sample(structure, dy, x, shape, format, None, out) is None:
        out.copy_(torch.ops.spfmt.sddmm(structure, dy, x, shape, format, out.shape[0]))


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
