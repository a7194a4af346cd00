"""spfmt: structured sparse weights, one structure from mask to kernel to checkpoint to ONNX.

Importing needs numpy alone. ``spfmt.torch``, ``spfmt.train``, ``spfmt.onnx`` and ``spfmt.recipes``
are imported on first use and say what to install if it is missing.
"""

from __future__ import annotations

import importlib
from typing import Any

try:
    import spfmt._kernels  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"got no compiled kernels in {__path__[0]}; expected them beside the package; fix: in a "
        "clone Python finds the sources first, so work in another directory after 'pip install .', "
        "or build in place with 'python setup.py build_ext --inplace'"
    ) from error

from .advice import Advice, advise
from .convert import ConversionReport, convert
from .convolution import conv2d, conv2d_input, conv2d_weight
from .cost import CostModel, cost_model
from .dispatch import Kernel, kernels, show_config
from .errors import DeviceError, FormatError, KernelNotFound, MissingDependency, SpfmtError
from .formats import CSR, HRBP, NM, Condensed, ShuffledBlock, SparseTensor, load
from .ops import sddmm, spmm, spmm_t
from .threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "CSR",
    "HRBP",
    "NM",
    "Advice",
    "Condensed",
    "ConversionReport",
    "CostModel",
    "DeviceError",
    "FormatError",
    "Kernel",
    "KernelNotFound",
    "MissingDependency",
    "ShuffledBlock",
    "SparseTensor",
    "SpfmtError",
    "advise",
    "conv2d",
    "conv2d_input",
    "conv2d_weight",
    "convert",
    "cost_model",
    "get_num_threads",
    "kernels",
    "load",
    "sddmm",
    "set_num_threads",
    "show_config",
    "spmm",
    "spmm_t",
]

_SUBPACKAGES = ("models", "onnx", "recipes", "structure", "torch", "train")


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
