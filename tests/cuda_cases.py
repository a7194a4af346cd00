"""The CUDA kernels compiled for the CPU, and operands that show what a kernel must not do.

A kernel is called as torch calls it, by pointers, but on arrays of numpy: they are NaN where nobody
may read, and a pattern where nobody may write.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from spfmt.cuda.library import FLOAT32, TF32, Library

CUDA = Path(os.environ.get("SPFMT_CUDA_SOURCES", Path(__file__).resolve().parent.parent / "cuda"))
FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror")

DTYPES: dict[str, Any] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
}
CODES = {"f32": 0, "bf16": 1, "f16": 2}
PRECISIONS = {"float32": FLOAT32, "tf32": TF32}

# Orders of threads, and whether copies happen late.
ORDERS = (("forward", 1), ("reverse", 1), ("1", 1), ("2", 0), ("3", 1))


def build(sources: Path = CUDA, flags: tuple[str, ...] = ()) -> Path:
    """Compile the kernels of a folder with g++; what was compiled before is taken from a cache."""
    files = sorted(p for p in sources.rglob("*") if p.suffix in (".cu", ".h"))
    sanitize = os.environ.get("SPFMT_SANITIZE", "")
    flags = (*FLAGS, *flags, *([f"-fsanitize={sanitize}"] if sanitize else []))
    digest = hashlib.sha256(" ".join(flags).encode())
    for file in files:
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"spfmt-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder / f"{digest.hexdigest()[:24]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            with tempfile.TemporaryDirectory(dir=folder) as place:
                new = Path(place) / "new.so"
                command = ["g++", *flags, "-I", str(sources)]

                def compiled(kernel: Path) -> str:
                    to = str(Path(place) / f"{kernel.stem}.o")
                    subprocess.run([*command, "-c", "-x", "c++", kernel, "-o", to], check=True)
                    return to

                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    objects = list(pool.map(compiled, (p for p in files if p.suffix == ".cu")))
                subprocess.run([*command, "-shared", *objects, "-o", str(new)], check=True)
                new.replace(found)
    return found


class Emulated(Library):
    """The emulated kernels, with what only the emulation has."""

    def emulate(self, order: str, late: int, hosts: int) -> None:
        """Say how the next launches run."""
        self._opened.emulate(ctypes.c_char_p(order.encode()), late, hosts)

    def counts(self) -> list[int]:
        """Return switches, mma, ldmatrix and bank conflicts since the last call."""
        found = (ctypes.c_int64 * 4)()
        self._opened.emulated(found)
        return list(found)


@functools.cache
def library() -> Emulated:
    """Return the emulated kernels."""
    if shutil.which("g++") is None:
        pytest.skip("the emulation of CUDA needs g++")
    return Emulated(build())


def emulate(order: str = "forward", late: int = 1, hosts: int = 1) -> None:
    """Say in which order threads run, when copies happen, and on how many threads blocks run."""
    library().emulate(order, late, hosts)


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library; arrays go as pointers, dtypes and the rest as they are."""
    pointers = (a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments)
    library().call(name, *pointers)


# ------------------------------------------------------------------------------------- operands


def aligned(shape: tuple[int, ...], dtype: Any, offset: int = 0) -> Any:
    """Return an array whose first element lies `offset` elements behind a cache line."""
    size = np.dtype(dtype).itemsize
    count = int(np.prod(shape))
    raw = np.empty(count * size + 64 + offset * size, np.uint8)
    start = -raw.ctypes.data % 64 + offset * size
    return raw[start : start + count * size].view(dtype).reshape(shape)


def operand(numbers: Any, dtype: str, stride: int | None = None, offset: int = 0) -> Any:
    """Return a matrix in a dtype, rows `stride` elements apart, NaN between them."""
    rows, columns = numbers.shape
    whole = aligned((rows, columns if stride is None else stride), DTYPES[dtype], offset)
    whole[:] = np.nan
    whole[:, :columns] = numbers.astype(DTYPES[dtype])
    return whole[:, :columns]


class Result:
    """A matrix that a kernel writes, with a frame that nobody may write.

    Attributes
    ----------
    array : ndarray, shape (rows, columns)
        NaN until it is written.
    stride : int
        Elements from a row to the next.
    """

    def __init__(self, rows: int, columns: int, dtype: str, offset: int = 0, more: int = 3) -> None:
        self._frame = aligned((rows + 2, columns + more), DTYPES[dtype], offset)
        self._frame[:] = np.nan
        self._frame.view(np.uint8)[:] |= 0x01  # a NaN that no kernel makes
        self._before = self._frame.tobytes()
        self.array, self.stride = self._frame[1:-1, :columns], columns + more

    def check_frame(self) -> None:
        """Fail where something beside the matrix was written."""
        now = self._frame.copy()
        then = np.frombuffer(self._before, now.dtype).reshape(now.shape)
        now[1:-1, : self.array.shape[1]] = then[1:-1, : self.array.shape[1]]
        assert now.tobytes() == self._before, "written beside the result"
