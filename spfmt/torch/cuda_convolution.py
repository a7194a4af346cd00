"""The convolutions on CUDA devices, of formats whose rows share lists of columns.

The kernels want all samples of a pixel side by side, torch has whole images so. Channels last or
first, images are transposed into memory that is free again after the product, and results back; a
single image needs neither. Nothing is padded or unfolded.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from spfmt.convolution import Convolution
from spfmt.cuda import library
from spfmt.errors import KernelNotFound, format_error
from spfmt.formats import Groups, Structure
from spfmt.torch import checks
from spfmt.torch.activation import activated
from spfmt.torch.cuda import Products
from spfmt.torch.uploads import Device, Uploaded
from spfmt.torch.words import structures

__all__ = ["Convolutions", "conv2d_cuda", "conv2d_input_cuda", "conv2d_weight_cuda", "convolutions"]

_Ints = Sequence[int]
_MOST = 2**31 - 8192  # elements of a batch of maps: kernels count with 32 bits
_WIDEST = 2**15 - 1  # and pixels with 16


class Convolutions(Products):
    """The three products of convolutions, beside those of matrices."""

    def conv2d(
        self,
        values: Tensor,
        structure: Tensor,
        x: Tensor,
        bias: Tensor | None,
        shape: _Ints,
        stride: _Ints,
        padding: _Ints,
        dilation: _Ints,
        groups: int,
        activation: str | None = None,
    ) -> Tensor:
        """Compute ``conv2d``: `values`, x (N, C_in, H, W), `bias` (C_out,), of one dtype of CUDA's.

        Raises
        ------
        FormatError
            As for :func:`spfmt.torch.conv2d`.
        KernelNotFound
            For formats of lists, convolutions in groups and other dtypes.
        DeviceError
            As for `Products.spmm`.
        """
        checks.check_place(values, structure, x, bias)
        rest = (shape, stride, padding, dilation, groups)
        with self._device.current(x.device):
            kind = self._device.kind
            y = checks.conv2d_fake(values, structure, x, bias, *rest, activation, kind)
            found = self._structure(structure, shape, values, x, bias)
            how = self._convolution(found, y.shape[2:], *rest)
            if not (found.nnz and y.numel()):
                y.zero_() if bias is None else y.copy_(bias.view(1, -1, 1, 1).expand_as(y))
                return activated(y, activation)
            matrix = self._uploads.get(found, False, x.device, how)
            offset = None if bias is None else bias.to(torch.float32).contiguous()
            source, out = self._maps(x), _Maps(y)
            self._convolve(
                self._by_groups("groups_conv", matrix, x, y),
                matrix,
                values,
                *source.arguments(),
                library.Stride(*how.stride),
                0 if offset is None else offset.data_ptr(),
                out=out,
            )
            return activated(self._images(out, y), activation)

    def conv2d_input(
        self,
        values: Tensor,
        structure: Tensor,
        dy: Tensor,
        shape: _Ints,
        size: _Ints,
        stride: _Ints,
        padding: _Ints,
        dilation: _Ints,
        groups: int,
    ) -> Tensor:
        """Compute ``conv2d_input``: `values`, dy (N, C_out, Ho, Wo); errors as for `conv2d`."""
        checks.check_place(values, structure, dy)
        rest = (stride, padding, dilation, groups)
        with self._device.current(dy.device):
            kind = self._device.kind
            dx = checks.conv2d_input_fake(values, structure, dy, shape, size, *rest, kind)
            found = self._structure(structure, shape, values, dy)
            how = self._convolution(found, dy.shape[2:], shape, *rest)
            if not (found.nnz and dx.numel() and dy.numel()):
                return dx.zero_()
            matrix = self._uploads.get(found, True, dy.device, how)
            source, out = self._maps(dy), _Maps(dx)
            steps = library.Stride(*how.stride)
            self._convolve("groups_conv_t", matrix, values, *source.arguments(), steps, out=out)
            return self._images(out, dx)

    def conv2d_weight(
        self,
        structure: Tensor,
        dy: Tensor,
        x: Tensor,
        shape: _Ints,
        capacity: int,
        stride: _Ints,
        padding: _Ints,
        dilation: _Ints,
        groups: int,
    ) -> Tensor:
        """Compute ``conv2d_weight``: dy, x to (capacity,); errors as for `conv2d`."""
        checks.check_place(structure, dy, x)
        rest = (stride, padding, dilation, groups)
        with self._device.current(x.device):
            kind = self._device.kind
            gradient = checks.conv2d_weight_fake(structure, dy, x, shape, capacity, *rest, kind)
            found = self._structure(structure, shape, gradient, dy, x)
            how = self._convolution(found, dy.shape[2:], shape, *rest)
            if not (found.nnz and dy.numel() and x.numel()):
                return gradient.zero_()
            matrix = self._uploads.get(found, False, x.device, how)
            of_dy, of_x = self._maps(dy), self._maps(x)
            operands = *of_dy.arguments(), *of_x.arguments(), library.Stride(*how.stride)
            samples = dy.numel() // dy.shape[1]
            name = "groups_conv_sampled"
            self._in_parts(name, matrix, x, samples, gradient, found.nnz, *operands)
            gradient[found.nnz :] = 0
            return gradient

    # -------------------------------------------------------------------------------- in steps

    def _convolution(self, found: Structure, out: _Ints, shape: _Ints, *rest: Any) -> Convolution:
        """Return how a kernel moves, to maps of size `out`, where there are kernels for that."""
        how = Convolution.of(shape, *rest)
        if not isinstance(found.layout, Groups):
            raise KernelNotFound(
                f"got a convolution of {found.cls.format} on CUDA; kernels exist for formats whose "
                "rows share lists, shuffled_block and hrbp; fix: project the layer to one of them, "
                "move the module and its input with .cpu(), or densify(model)"
            )
        if how.groups != 1:
            raise KernelNotFound(
                f"got a convolution in {how.groups} groups on CUDA; kernels exist for one; fix: "
                "leave the layer out, move the module and its input with .cpu(), or densify(model)"
            )
        # A kernel starts so far down and across, beyond the maps where padding is wide.
        _check_side("padded maps", *((n - 1) * s + 1 for n, s in zip(out, how.stride, strict=True)))
        return how

    def _convolve(
        self, name: str, matrix: Uploaded, values: Tensor, *operands: Any, out: _Maps
    ) -> None:
        values = values.contiguous()
        self._device.kernels.call(
            name,
            *self._how(name, values),
            ctypes.byref(matrix.struct),
            values.data_ptr(),
            *operands,
            *out.arguments(),
            self._device.stream(values.device),
        )

    def _maps(self, x: Tensor) -> _Maps:
        """Return images with samples side by side."""
        if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
            x = x.contiguous(memory_format=suggest_memory_format(x))
        made = _Maps(x)
        if made.rows is not None:
            self._transpose(made.by_image(x), made.rows)
        return made

    def _images(self, maps: _Maps, y: Tensor) -> Tensor:
        """Write maps to the images that they are of."""
        if maps.rows is not None:
            self._transpose(maps.rows, maps.by_image(y))
        return y


class _Maps:
    """Memory for images as kernels want them: a row for each pixel and channel, with all samples.

    Parameters
    ----------
    x : Tensor
        The images, contiguous or channels last, whose order rows have, too.

    Attributes
    ----------
    rows : Tensor or None
        None for a single image: its memory is that of its rows.
    """

    def __init__(self, x: Tensor) -> None:
        images, channels, height, width = x.shape
        self._last = not x.is_contiguous()
        chunk = 16 // x.element_size()
        stride = -(-images // chunk) * chunk if images >= chunk else images
        size = channels * height * width
        if size * stride > _MOST:
            raise format_error(
                f"{images} maps of {channels} x {height} x {width}",
                "fewer than 2^31 elements together on CUDA",
                "pass fewer images at once, or use the CPU",
            )
        _check_side("maps", height, width)
        self.rows = None if images == 1 else x.new_empty((size, stride))
        self._memory = x if self.rows is None else self.rows
        steps = (1, width * channels, channels) if self._last else (height * width, width, 1)
        self._struct = library.Maps(channels, height, width, images, *steps, stride)

    def by_image(self, x: Tensor) -> Tensor:
        """Return images as a matrix (N, C · H · W) on the same memory."""
        return (x.permute(0, 2, 3, 1) if self._last else x).view(x.shape[0], -1)

    def arguments(self) -> tuple[int, Any]:
        """Return the pointer and the struct for a call."""
        return self._memory.data_ptr(), ctypes.byref(self._struct)


def _check_side(what: str, height: int, width: int) -> None:
    if max(height, width) > _WIDEST:
        raise KernelNotFound(
            f"got {what} of {height} x {width} pixels on CUDA; kernels exist for sides of up to "
            f"{_WIDEST}; fix: cut them, move the module and its input with .cpu(), or "
            "densify(model)"
        )


@functools.cache
def convolutions() -> Convolutions:
    """Return the convolutions of this process's CUDA devices; errors as for `products`."""
    return Convolutions(Device(library.load()), structures)


def conv2d_cuda(*operands: Any) -> Tensor:
    """Compute ``conv2d`` on a CUDA device."""
    return convolutions().conv2d(*operands)


def conv2d_input_cuda(*operands: Any) -> Tensor:
    """Compute ``conv2d_input`` on a CUDA device."""
    return convolutions().conv2d_input(*operands)


def conv2d_weight_cuda(*operands: Any) -> Tensor:
    """Compute ``conv2d_weight`` on a CUDA device."""
    return convolutions().conv2d_weight(*operands)
