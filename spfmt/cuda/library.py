"""The library of CUDA kernels: opened at first use, its functions declared, its errors raised.

``cuda/api.h`` says what the functions do. The library needs a driver only to compute: it opens
without one, and then counts no devices.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, ClassVar

from spfmt.errors import DeviceError, KernelNotFound

__all__ = [
    "DTYPES",
    "FLOAT32",
    "LEVEL",
    "OPS",
    "TF32",
    "Library",
    "Lists",
    "Maps",
    "Stride",
    "Tiles",
    "available",
    "load",
    "why_not",
]

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
"""How the library calls dtypes."""

OPS: dict[str, tuple[str, ...]] = {
    "lists": ("spmm", "spmm_t", "sddmm"),
    "groups": ("spmm", "spmm_t", "sddmm", "conv2d", "conv2d_input", "conv2d_weight"),
}
"""The products that it has of each layout."""

LEVEL = "sm_80"
"""The least compute capability that it runs on."""

FLOAT32, TF32 = 0, 1
"""Precisions of products of float32."""

PATH = Path(__file__).with_name("libspfmt_cuda.so")

# What CUDA's own text leaves open.
_HINTS = {
    2: "free memory on the device, or multiply fewer samples at once",
    35: "update the driver: spfmt's kernels were built with a newer CUDA than it knows",
    209: "spfmt's kernels need compute capability 8.0 or higher, and an architecture that was "
    "named in SPFMT_CUDA_ARCHS when they were built; otherwise use the CPU",
    700: "an index pointed out of bounds; please report the structure that it came from",
}


class Tiles(ctypes.Structure):
    """The struct of groups; its pointers are the device's."""

    _fields_: ClassVar = [
        ("rows", c_int64),
        ("cols", c_int64),
        ("count", c_int32),
        ("most_rows", c_int32),
        ("most_cols", c_int32),
        ("chunk", c_int32),
        ("tile", c_void_p),
        ("row_perm", c_void_p),
        ("col_indices", c_void_p),
        ("tap", c_void_p),
        ("ascending", c_void_p),
        ("sorted_cols", c_void_p),
        ("piece", c_void_p),
        ("piece_ptr", c_void_p),
    ]


class Lists(ctypes.Structure):
    """The struct of lists; its pointers are the device's."""

    _fields_: ClassVar = [
        ("rows", c_int64),
        ("cols", c_int64),
        ("indptr", c_void_p),
        ("col_indices", c_void_p),
        ("source", c_void_p),
    ]


class Maps(ctypes.Structure):
    """The struct of images."""

    _fields_: ClassVar = [
        ("channels", c_int32),
        ("height", c_int32),
        ("width", c_int32),
        ("batch", c_int32),
        ("channel", c_int32),
        ("row", c_int32),
        ("column", c_int32),
        ("stride", c_int32),
    ]


Stride = c_int32 * 2
"""The strides of a convolution, along y and x."""

_MATRIX = [c_void_p, c_int64]  # and the elements from a row to the next
_TILES, _LISTS = [c_int, c_int, POINTER(Tiles)], [c_int, POINTER(Lists)]
_IMAGES = [c_void_p, POINTER(Maps)]
_PRODUCT = [c_void_p, *_MATRIX, c_int64, c_void_p, *_MATRIX, c_void_p]
_PARTS = [c_int32, c_int64, c_void_p, c_void_p]
_SAMPLED = [*_MATRIX, *_MATRIX, c_int64, c_void_p, c_void_p]
_FUNCTIONS: dict[str, list[Any]] = {
    "use": [c_int],
    "transpose": [c_int, c_int, *_MATRIX, c_int64, c_int64, *_MATRIX, c_void_p],
    "groups_spmm": [*_TILES, *_PRODUCT],
    "groups_spmm_sm90": [*_TILES, *_PRODUCT],
    "groups_spmm_t": [*_TILES, c_void_p, *_MATRIX, c_int64, *_MATRIX, c_void_p],
    "groups_sddmm": [*_TILES, *_MATRIX, *_MATRIX, c_int64, *_PARTS],
    "groups_conv": [*_TILES, c_void_p, *_IMAGES, Stride, c_void_p, *_IMAGES, c_void_p],
    "groups_conv_sm90": [*_TILES, c_void_p, *_IMAGES, Stride, c_void_p, *_IMAGES, c_void_p],
    "groups_conv_t": [*_TILES, c_void_p, *_IMAGES, Stride, *_IMAGES, c_void_p],
    "groups_conv_sampled": [*_TILES, *_IMAGES, *_IMAGES, Stride, *_PARTS],
    "lists_small": [*_LISTS, *_PRODUCT],
    "lists_spmm": [*_LISTS, *_PRODUCT],
    "lists_sddmm": [*_LISTS, *_SAMPLED],
}


class Library:
    """The kernels in a shared library.

    Parameters
    ----------
    path : path-like
        Of a build of ``cuda/``: by nvcc, or of its emulation.

    Raises
    ------
    OSError
        Where it cannot be opened.
    """

    def __init__(self, path: Any) -> None:
        self._opened = ctypes.CDLL(str(path))
        self._functions: dict[str, Any] = {}
        self._opened.spfmt_cuda_error.argtypes = [c_int]
        self._opened.spfmt_cuda_error.restype = c_char_p

    def devices(self) -> int:
        """Return how many devices there are, 0 without a driver."""
        return int(self._opened.spfmt_cuda_devices())

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of ``cuda/api.h`` by its name without ``spfmt_cuda_``.

        Pointers and streams are ints, 0 for null; structs are passed with `ctypes.byref`.

        Raises
        ------
        DeviceError
            Where it returns an error; also one that an earlier call left on the device.
        """
        code = self._function(name)(*arguments)
        if code:
            text = self._opened.spfmt_cuda_error(code).decode(errors="replace")
            hint = _HINTS.get(code, "set CUDA_LAUNCH_BLOCKING=1 to see which call it came from")
            raise DeviceError(f"spfmt_cuda_{name} failed: {text} (error {code}); fix: {hint}")

    def _function(self, name: str) -> Any:
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = getattr(self._opened, f"spfmt_cuda_{name}")
            function.argtypes, function.restype = _FUNCTIONS[name], c_int
        return function


@functools.cache
def _found() -> tuple[Library | None, str]:
    """Open the library; or say why there is none, and the way out."""
    if not PATH.exists():
        return None, (
            "spfmt was installed without CUDA kernels, for want of nvcc; fix: install it with "
            "SPFMT_CUDA=1 and the CUDA toolkit in CUDA_HOME"
        )
    try:
        library = Library(PATH)
    except OSError as error:
        return None, f"{PATH.name} cannot be opened ({error}); fix: install spfmt again"
    if library.devices():
        return library, ""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, "there is no NVIDIA driver (libcuda.so.1); fix: install one, or use the CPU"
    return None, (
        "the driver offers no device, or is too old; fix: look at nvidia-smi and "
        "CUDA_VISIBLE_DEVICES, or use the CPU"
    )


def available() -> bool:
    """Tell whether the kernels are there, and a device to run them."""
    return _found()[0] is not None


def why_not() -> str:
    """Return why products cannot run on a CUDA device, and the way out; empty where they can."""
    return _found()[1]


def load() -> Library:
    """Return the library, opened once.

    Raises
    ------
    KernelNotFound
        Where it was not built, or there is no driver or no device.
    """
    library, reason = _found()
    if library is None:
        raise KernelNotFound(f"no CUDA kernels: {reason}")
    return library
