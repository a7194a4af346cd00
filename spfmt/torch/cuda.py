"""The operators on CUDA devices: what `spfmt.torch.cpu` is for the CPU, by kernels of ``cuda/``.

The kernels want samples side by side, torch has features so. Small batches of lists are multiplied
as they are; all else is transposed into memory that is free again after the product, and back.
Every call asks for the current stream of its device, launches there and waits for nothing, but for
what a structure needs once (:mod:`spfmt.torch.words`, :mod:`spfmt.torch.uploads`).
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spfmt.cuda import library
from spfmt.formats import Groups, Structure
from spfmt.torch import checks
from spfmt.torch.activation import activated
from spfmt.torch.uploads import Device, Uploaded, Uploads
from spfmt.torch.words import Structures, structures

__all__ = [
    "Products",
    "gather_cuda",
    "products",
    "scatter_cuda",
    "sddmm_cuda",
    "spmm_cuda",
    "spmm_t_cuda",
]

SMALL = 16
"""Most samples of the kernel for small batches."""

_ALIGNED = 16  # bytes, of which kernels copy so many at once
_CODES = {
    torch.float32: library.DTYPES["float32"],
    torch.bfloat16: library.DTYPES["bfloat16"],
    torch.float16: library.DTYPES["float16"],
}


class Products:
    """The three products by a library of kernels.

    Parameters
    ----------
    device : Device
        Where they run.
    structures : Structures
        What the words of structures mean.

    Attributes
    ----------
    wgmma : bool
        Whether 64 samples and more of 16-bit dtypes are multiplied by ``wgmma`` where a device has
        it and rows share lists by 64. Experimental; ``SPFMT_CUDA_WGMMA=1`` sets it.
    """

    def __init__(self, device: Device, structures: Structures) -> None:
        self._device, self._structures = device, structures
        self._uploads = Uploads(device)
        self.wgmma = os.environ.get("SPFMT_CUDA_WGMMA") == "1"

    # ------------------------------------------------------------------------------- operators

    def spmm(
        self,
        values: Tensor,
        structure: Tensor,
        x: Tensor,
        bias: Tensor | None,
        shape: Sequence[int],
        activation: str | None = None,
    ) -> Tensor:
        """Compute ``spmm``: `values`, x (B, C), `bias` (R,) to (B, R), of one dtype of CUDA's.

        Raises
        ------
        FormatError, KernelNotFound
            As for :func:`spfmt.torch.spmm`.
        DeviceError
            Where the device fails, or the structure is not there yet while a graph is captured.
        """
        checks.check_place(values, structure, x, bias)
        with self._device.current(x.device):
            kind = self._device.kind
            y = checks.spmm_fake(values, structure, x, bias, shape, activation, kind)
            found = self._structure(structure, shape, values, x, bias)
            return activated(self._multiply(found, values, x, bias, y), activation)

    def spmm_t(self, values: Tensor, structure: Tensor, dy: Tensor, shape: Sequence[int]) -> Tensor:
        """Compute ``spmm_t``: `values`, dy (B, R) to (B, C); errors as for `spmm`."""
        checks.check_place(values, structure, dy)
        with self._device.current(dy.device):
            dx = checks.spmm_t_fake(values, structure, dy, shape, self._device.kind)
            found = self._structure(structure, shape, values, dy)
            return self._multiply(found, values, dy, None, dx, transposed=True)

    def sddmm(
        self, structure: Tensor, dy: Tensor, x: Tensor, shape: Sequence[int], capacity: int
    ) -> Tensor:
        """Compute ``sddmm``: dy (B, R), x (B, C) to (capacity,); errors as for `spmm`."""
        checks.check_place(structure, dy, x)
        with self._device.current(x.device):
            gradient = checks.sddmm_fake(structure, dy, x, shape, capacity, self._device.kind)
            found = self._structure(structure, shape, gradient, dy, x)
            if not (found.nnz and x.shape[0]):  # kernels see no empty matrices
                return gradient.zero_()
            self._sample(found, dy, x, gradient)
            if capacity > found.nnz:
                gradient[found.nnz :] = 0
            return gradient

    def gather(self, weight: Tensor, structure: Tensor, capacity: int) -> Tensor:
        """Compute ``gather``: of a dense weight (capacity,) values; errors as for `spmm`."""
        checks.check_place(weight, structure)
        with self._device.current(weight.device):
            positions = self._positions(structure, weight.numel(), capacity)
            values = weight.new_empty(capacity)
            found = len(positions)
            torch.index_select(weight.reshape(-1), 0, positions, out=values[:found])
            values[found:] = 0
            return values

    def scatter(self, values: Tensor, structure: Tensor, size: int) -> Tensor:
        """Compute ``scatter``: (size,) zeros but for the values; errors as for `spmm`."""
        checks.check_place(values, structure)
        with self._device.current(values.device):
            positions = self._positions(structure, size, values.numel())
            dense = values.new_zeros(size)
            return dense.index_copy_(0, positions, values[: len(positions)])

    def write_at(self, weight: Tensor, structure: Tensor, values: Tensor) -> None:
        """Write values to their positions in a dense weight; errors as for `spmm`."""
        checks.check_place(weight, structure, values)
        with self._device.current(weight.device):
            positions = self._positions(structure, weight.numel(), values.numel())
            flat = weight.detach().contiguous().view(-1)
            flat.index_copy_(0, positions, values[: len(positions)].to(flat.dtype))
            if flat.data_ptr() != weight.data_ptr():  # strides of its own: that was a copy
                weight.copy_(flat.view(weight.shape))

    # -------------------------------------------------------------------------------- in steps

    def _positions(self, structure: Tensor, size: int, capacity: int) -> Tensor:
        found = self._structures.of(structure)
        checks.check_positions(found, size, capacity)
        return self._uploads.positions(found, structure.device)

    def _structure(
        self, words: Tensor, shape: Sequence[int], values: Tensor, *operands: Tensor | None
    ) -> Structure:
        """Return the structure of words that fit a weight's shape and values."""
        checks.check_memory(words, values, *operands)
        found = self._structures.of(words)
        checks.check_structure(found, shape)
        checks.check_capacity(values, found.nnz)
        return found

    def _multiply(
        self,
        structure: Structure,
        values: Tensor,
        x: Tensor,
        bias: Tensor | None,
        y: Tensor,
        transposed: bool = False,
    ) -> Tensor:
        """Compute y (B, R) = x (B, C) A^T + bias, or with A transposed, into `y`."""
        if not (structure.nnz and y.numel()):  # kernels see no empty matrices
            return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
        matrix = self._uploads.get(structure, transposed, x.device)
        values = values.contiguous()
        offset = None if bias is None else bias.to(torch.float32).contiguous()
        if isinstance(structure.layout, Groups):
            name = "groups_spmm_t" if transposed else self._by_groups("groups_spmm", matrix, x, y)
        else:
            name = "lists_small" if x.shape[0] <= SMALL else "lists_spmm"
        if name == "lists_small":
            x = _rows(x)
            self._launch(name, matrix, values, x, offset, y, y.shape[0])
            return y
        x = self._features_first(x)
        result = _workspace(y.shape[1], y.shape[0], y)
        self._launch(name, matrix, values, x, offset, result, y.shape[0])
        self._transpose(result, y)
        return y

    def _launch(
        self,
        name: str,
        matrix: Uploaded,
        values: Tensor,
        x: Tensor,
        offset: Tensor | None,
        y: Tensor,
        batch: int,
    ) -> None:
        added = [] if name == "groups_spmm_t" else [_pointer(offset)]
        self._device.kernels.call(
            name,
            *self._how(name, x),
            ctypes.byref(matrix.struct),
            values.data_ptr(),
            *_matrix(x),
            batch,
            *added,
            *_matrix(y),
            self._device.stream(y.device),
        )

    def _by_groups(self, name: str, matrix: Uploaded, x: Tensor, y: Tensor) -> str:
        """Return the kernel of a product of groups: `name`, or the one by ``wgmma``."""
        fits = x.element_size() == 2 and matrix.struct.most_rows >= 64
        samples = y.numel() // y.shape[1]
        wanted = self.wgmma and fits and samples >= 64
        return f"{name}_sm90" if wanted and self._device.has_wgmma(x.device) else name

    def _how(self, name: str, x: Tensor) -> tuple[int, ...]:
        """Return what says in which dtype a kernel computes, and groups how exactly."""
        if name.startswith("lists"):
            return (_CODES[x.dtype],)
        return _CODES[x.dtype], library.TF32 if self._device.allows_tf32() else library.FLOAT32

    def _sample(self, structure: Structure, dy: Tensor, x: Tensor, gradient: Tensor) -> None:
        """Compute the first nnz elements of `gradient`, in float32 and then in its dtype."""
        matrix, samples = self._uploads.get(structure, False, x.device), x.shape[0]
        dy, x = self._features_first(dy), self._features_first(x)
        operands = *_matrix(dy), *_matrix(x), samples
        if isinstance(structure.layout, Groups):
            self._in_parts("groups_sddmm", matrix, x, samples, gradient, structure.nnz, *operands)
            return
        exact = gradient.dtype == torch.float32
        out = gradient if exact else torch.empty_like(gradient, dtype=torch.float32)
        self._device.kernels.call(
            "lists_sddmm",
            *self._how("lists_sddmm", x),
            ctypes.byref(matrix.struct),
            *operands,
            out.data_ptr(),
            self._device.stream(x.device),
        )
        if not exact:
            gradient[: structure.nnz] = out[: structure.nnz]

    def _in_parts(
        self,
        name: str,
        matrix: Uploaded,
        x: Tensor,
        samples: int,
        gradient: Tensor,
        nnz: int,
        *operands: Any,
    ) -> None:
        """Compute values' gradients as sums of shares of the samples, in the order of these."""
        parts = _parts(matrix.struct, samples, self._device.processors(x.device))
        whole = parts == 1 and gradient.dtype == torch.float32
        out = gradient if whole else x.new_empty((parts, nnz), dtype=torch.float32)
        self._device.kernels.call(
            name,
            *self._how(name, x),
            ctypes.byref(matrix.struct),
            *operands,
            parts,
            nnz,
            out.data_ptr(),
            self._device.stream(x.device),
        )
        if not whole:
            gradient[:nnz] = out.sum(0)

    # ------------------------------------------------------------------------------- transposed

    def _features_first(self, x: Tensor) -> Tensor:
        """Return x (B, F) as (F, B or more), samples contiguous and rows aligned."""
        turned, size = x.T, x.element_size()
        if (
            turned.stride(1) == 1
            and turned.stride(0) >= x.shape[0]
            and turned.stride(0) * size % _ALIGNED == 0
            and turned.data_ptr() % _ALIGNED == 0
        ):
            return turned
        result = _workspace(x.shape[1], x.shape[0], x)
        self._transpose(_rows(x), result)
        return result

    def _transpose(self, x: Tensor, out: Tensor) -> None:
        """Copy x (rows, columns) into out (columns, rows); of both, one may be padded."""
        rows, columns = min(x.shape[0], out.shape[1]), min(x.shape[1], out.shape[0])
        code = _CODES[x.dtype]
        self._device.kernels.call(
            "transpose", code, code, *_matrix(x), rows, columns, *_matrix(out),
            self._device.stream(x.device),
        )  # fmt: skip


def _parts(tiles: ctypes.Structure, samples: int, processors: int) -> int:
    """Return in how many shares to sum: two blocks for every multiprocessor, of 1024 samples up."""
    count, cols = int(tiles.count), int(tiles.most_cols)
    blocks = max(1, count * -(-cols // (128 if cols > 64 else 64)))
    return max(1, min(-(-2 * processors // blocks), samples // 1024))


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _matrix(t: Tensor) -> tuple[int, int]:
    """Return a matrix's pointer, and the elements from a row to the next."""
    return t.data_ptr(), t.stride(0)


def _rows(x: Tensor) -> Tensor:
    """Return x (B, F) with contiguous features and rows that do not overlap."""
    plain = x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return x if plain else x.clone(memory_format=torch.contiguous_format)


def _workspace(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return a matrix whose rows are aligned; columns are added for that."""
    step = _ALIGNED // like.element_size()
    return like.new_empty((rows, -(-columns // step) * step))


# ---------------------------------------------------------------------------- CUDA's own devices


@functools.cache
def products() -> Products:
    """Return the products of this process's CUDA devices.

    Raises
    ------
    KernelNotFound
        Where the library was not built, or there is no driver or no device.
    """
    return Products(Device(library.load()), structures)


def spmm_cuda(*operands: Any) -> Tensor:
    """Compute ``spmm`` on a CUDA device."""
    return products().spmm(*operands)


def spmm_t_cuda(*operands: Any) -> Tensor:
    """Compute ``spmm_t`` on a CUDA device."""
    return products().spmm_t(*operands)


def sddmm_cuda(*operands: Any) -> Tensor:
    """Compute ``sddmm`` on a CUDA device."""
    return products().sddmm(*operands)


def gather_cuda(*operands: Any) -> Tensor:
    """Compute ``gather`` on a CUDA device."""
    return products().gather(*operands)


def scatter_cuda(*operands: Any) -> Tensor:
    """Compute ``scatter`` on a CUDA device."""
    return products().scatter(*operands)
