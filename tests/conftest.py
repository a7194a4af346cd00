"""Fixtures of more than one file."""

from __future__ import annotations

import sys
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _own_graphs() -> None:
    """Forget what other tests compiled: torch counts the graphs of a function, whoever asked."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest) -> Any:
    """Return where layers compute: on the emulation of CUDA, and on a device."""
    from torch_cuda_cases import Place, need_device

    if request.param == "cuda":
        need_device()
    found = Place(request.param)
    yield found
    found.uses_wgmma(False)


@pytest.fixture
def emulated() -> Any:
    """Return the emulated device."""
    from torch_cuda_cases import Emulated

    return Emulated()


@pytest.fixture
def device() -> None:
    """Skip where there is no device that the kernels run on."""
    from torch_cuda_cases import need_device

    need_device()
