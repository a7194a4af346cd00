"""Where operators on CUDA devices are tested: on the CPU with emulated kernels, and on a device.

The fixtures of conftest.py give a test both places, or one.
"""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from typing import Any

import cuda_cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spfmt.cuda import library
from spfmt.torch import cuda, cuda_convolution
from spfmt.torch.cuda_convolution import Convolutions
from spfmt.torch.uploads import Device
from spfmt.torch.words import Structures

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


class Emulated(Device):
    """The emulated kernels, on tensors of the CPU; streams and captures are those of the test."""

    def __init__(self) -> None:
        super().__init__(cuda_cases.library())
        self.capturing, self.number, self.tf32 = False, 0, False
        self.kept: list[Any] = []
        self.products = Convolutions(self, Structures(self.is_capturing))

    def current(self, device: torch.device) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def stream(self, device: torch.device) -> int:
        return self.number

    def is_capturing(self) -> bool:
        return self.capturing

    def processors(self, device: torch.device) -> int:
        return 8

    def has_wgmma(self, device: torch.device) -> bool:
        return True

    def keep_for_stream(self, tensor: torch.Tensor) -> None:
        self.kept.append(tensor)

    def allows_tf32(self) -> bool:
        return self.tf32


class OnEmulation(TorchDispatchMode):
    """Let the operators compute by the emulated kernels instead of those of the CPU."""

    def __init__(self, products: Convolutions) -> None:
        super().__init__()
        ops = torch.ops.spfmt
        self._instead = {
            ops.spmm.default: products.spmm,
            ops.spmm_t.default: products.spmm_t,
            ops.sddmm.default: products.sddmm,
            ops.gather.default: products.gather,
            ops.scatter.default: products.scatter,
            ops.conv2d.default: products.conv2d,
            ops.conv2d_input.default: products.conv2d_input,
            ops.conv2d_weight.default: products.conv2d_weight,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._instead.get(func, func)(*args, **(kwargs or {}))


class Place:
    """Where layers compute.

    Attributes
    ----------
    device : str
        Of their tensors.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._emulated = Emulated() if device == "cpu" else None

    def uses_wgmma(self, on: bool = True) -> bool:
        """Let products of groups use wgmma, or not; tell whether this place can."""
        for products in self._products():
            products.wgmma = on
        return self._emulated is not None or torch.cuda.get_device_capability() == (9, 0)

    def _products(self) -> tuple[Any, ...]:
        if self._emulated is not None:
            return (self._emulated.products,)
        return cuda.products(), cuda_convolution.convolutions()

    def on(self) -> AbstractContextManager[Any]:
        """Return the context in which layers compute here."""
        if self._emulated is None:
            return contextlib.nullcontext()
        return OnEmulation(self._emulated.products)


def need_device() -> None:
    """Skip where no device is; fail where one was promised (benchmarks/gpu.sh)."""
    if os.environ.get("SPFMT_NEEDS_CUDA") == "1":
        assert torch.cuda.is_available(), "torch sees no CUDA device"
        assert library.available(), library.why_not()
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if not library.available():
        pytest.skip(library.why_not())


def check(
    got: torch.Tensor, want: torch.Tensor, size: torch.Tensor, terms: int, tf32: bool = False
) -> None:
    """Check a result against float64: `size` is the sum of its terms' absolute values.

    Operands of float32 are multiplied with 21 bits or more on tensor cores, all sums are of
    float32; the result, and what it is added to, is rounded to its dtype.
    """
    product = 2.0**-10 if tf32 else 2.0**-20
    inexact = product if got.dtype == torch.float32 else 0.0
    bound = ((terms + 2) * 2.0**-23 + inexact) * size
    bound += 2 * ROUNDING[got.dtype] * want.abs() + SMALLEST[got.dtype]
    error = (got.detach().cpu().double() - want).abs()
    assert (error <= bound).all(), (error - bound).max()


def check_replay(layer: Any, x: torch.Tensor, dy: torch.Tensor) -> None:
    """Check that a replayed graph of both passes computes with what lies there then."""
    x = x.detach().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x).backward(dy)
    torch.cuda.current_stream().wait_stream(side)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(dy)
    with torch.no_grad():
        layer.values.normal_()
        x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    got = [t.detach().clone() for t in (y, x.grad, layer.values.grad)]
    del y  # its graph belongs to the captured stream
    layer.zero_grad()
    x.grad = None
    want = layer(x)
    want.backward(dy)
    assert all(map(torch.equal, got, (want, x.grad, layer.values.grad)))
