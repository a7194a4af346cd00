"""`SparseConv2d` and `SparseConv1d`: convolutions on a structure buffer and a vector of values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from spfmt.convolution import Convolution
from spfmt.cost import Geometry
from spfmt.errors import FormatError, format_error
from spfmt.formats import SparseTensor
from spfmt.torch.convolution import conv2d
from spfmt.torch.layer import SparseLayer
from spfmt.torch.module import powers

__all__ = ["SparseConv1d", "SparseConv2d"]

Self = TypeVar("Self", bound="_SparseConv")

_OPTIONS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "padding_mode",
)  # fmt: skip


class _SparseConv(SparseLayer):
    """What convolutions of images and of sequences share."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    _around: list[int]  # what modes other than zeros pad, of the last dimension first, as in torch

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        format: str = "condensed",
        density: float | None = None,
        sparsity: float | None = None,
        capacity: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        format_params: Mapping[str, Any] | None = None,
        **params: Any,
    ) -> None:
        super().__init__()
        params.update(format_params or {})
        make: Any = self.DENSE  # on meta: torch's own checks, and its own messages
        dense = make(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False,
            padding_mode, device="meta",
        )  # fmt: skip
        self._take(dense)
        shape = self._flat_shape(dense.weight.shape)
        self._draw(
            shape, bias, format, density, sparsity, capacity, generator, device, dtype, params
        )

    def _take(self, dense: Any) -> None:
        for name in _OPTIONS:
            setattr(self, name, getattr(dense, name))
        dims = len(self._kernel_of((1, 1)))
        for name in ("kernel_size", "stride", "padding", "dilation"):
            given = getattr(self, name)
            counts = (dims,) if name == "kernel_size" else (1, dims)
            if isinstance(given, tuple) and len(given) not in counts:
                raise format_error(
                    f"{name}={given} for maps of {dims} dimensions",
                    "a number for each of them",
                    f"pass {name}={(1,) * dims}",
                )
        around = list(dense._reversed_padding_repeated_twice)  # made with the layer, and then kept
        self._around = around * (2 * dims // len(around))

    def _install(self, tensor: SparseTensor, *args: Any) -> None:
        wanted = self._flat_shape(self.dense_shape)
        if tensor.shape != wanted:
            raise format_error(
                f"a weight of shape {tensor.shape}",
                f"{wanted}, by channels, groups and kernel_size",
                "pass a weight of that shape, or other options",
            )
        super()._install(tensor, *args)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the weight of the dense layer that this one stands for."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    @classmethod
    def from_dense(
        cls: type[Self],
        dense: Any,
        *,
        format_params: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Self:
        """Prune a dense convolution; see `SparseLinear.from_dense`.

        Parameters
        ----------
        dense : nn.Conv2d or nn.Conv1d
        format_params : mapping, optional
            As for the class.
        **options
            As for `SparseLinear.from_dense`.
        """
        return super().from_dense(dense, **{**options, **(format_params or {})})

    @classmethod
    def from_conv(cls: type[Self], conv: Any, **options: Any) -> Self:
        """Prune a dense convolution; see `from_dense`."""
        return cls.from_dense(conv, **options)

    @classmethod
    def from_tensor(
        cls: type[Self],
        tensor: SparseTensor,
        bias: Tensor | None = None,
        *,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        target_density: float | None = None,
        format_params: Mapping[str, Any] | None = None,
        **params: Any,
    ) -> Self:
        """Make a layer of a sparse tensor (C_out, C_in / groups, Kh, Kw).

        Parameters
        ----------
        tensor : SparseTensor
            Structure and values; the values are copied. Of a sequence, Kh is 1.
        bias : Tensor, shape (C_out,), optional
            Becomes the bias; a Parameter is taken as it is, not copied.
        stride, padding, dilation, groups, padding_mode
            As for the class.
        capacity, device, dtype, target_density, **params
            As for `SparseLinear.from_tensor`.
        format_params
            As for the class.

        Raises
        ------
        FormatError
            For a weight of another rank, a bias of another shape, or a capacity below nnz.
        """
        if len(tensor.shape) != 4:
            raise format_error(
                f"a weight of shape {tensor.shape}",
                "(C_out, C_in / groups, Kh, Kw)",
                "use SparseLinear for matrices",
            )
        params.update(format_params or {})
        rows, channels, *kernel = tensor.shape
        make: Any = cls.DENSE
        dense = make(
            channels * groups, rows, cls._kernel_of(kernel), stride, padding, dilation, groups,
            False, padding_mode, device="meta",
        )  # fmt: skip
        return cls._of_tensor(tensor, dense, bias, capacity, device, dtype, target_density, params)

    @staticmethod
    def _kernel_of(kernel: Sequence[int]) -> tuple[int, ...]:
        return tuple(kernel)

    def to_conv(self) -> Any:
        """Return the dense convolution with the same map; the bias Parameter is shared."""
        return self.to_dense()

    def _blank(self) -> Any:
        # Without initial values: vmap refuses whatever draws random numbers, even on meta.
        make: Any = type("", (self.DENSE,), {"reset_parameters": lambda dense: None})
        dense = make(*(getattr(self, name) for name in _OPTIONS[:-1]), False, self.padding_mode,
                     device="meta")  # fmt: skip
        dense.__class__ = self.DENSE
        dense._reversed_padding_repeated_twice = list(self._around)
        return dense

    # --------------------------------------------------------------------------------- forward

    def _compute(
        self, x: Tensor, values: Tensor, structure: Tensor, bias: Tensor | None, activation: Any
    ) -> Tensor:
        dims = len(self.kernel_size)
        if x.dim() not in (dims + 1, dims + 2):
            self._explain_error(x, values, bias)
        batched = x if x.dim() == dims + 2 else x.unsqueeze(0)
        try:
            y = self._convolve(batched, values, structure, bias, activation)
        except FormatError:
            self._explain_error(x, values, bias)
            raise
        return y if x.dim() == dims + 2 else y.squeeze(0)

    def _convolve(
        self, x: Tensor, values: Tensor, structure: Tensor, bias: Tensor | None, activation: Any
    ) -> Tensor:
        flat = x.dim() == 3  # a sequence is an image of one row
        images = x.unsqueeze(2) if flat else x
        if self.padding_mode != "zeros":
            images = self._padded(images)
        how = {"shape": self.shape, "activation": activation, **self._how()}
        y = conv2d(values, structure, images, bias, **how)
        return y.squeeze(2) if flat else y

    def _explain_error(self, x: Tensor, values: Tensor, bias: Tensor | None) -> None:
        """Raise the error of the dense layer, where it has one."""
        if torch.compiler.is_compiling() or self._is_taken_by_dense(x, values, bias):
            return

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:  # of no memory
            return torch.zeros((), dtype=dtype).expand(shape)

        dense = self._blank()
        dense.weight = nn.Parameter(zeros(values.dtype, *self.dense_shape), False)
        if bias is not None:
            dense.bias = nn.Parameter(zeros(bias.dtype, *bias.shape), False)
        dense(zeros(x.dtype, *x.shape))

    def _is_taken_by_dense(self, x: Tensor, values: Tensor, bias: Tensor | None) -> bool:
        """Tell whether the dense layer would compute: that takes long, and explains nothing."""
        dims = len(self.kernel_size)
        dtypes = {t.dtype for t in (x, values, bias) if t is not None}
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            return False
        if len(dtypes) > 1 and not torch.is_autocast_enabled("cpu"):
            return False
        try:
            self._geometry(x.shape[-dims:])
        except FormatError:
            return False
        return True

    def samples(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a call multiplied, as matrices: one row per output pixel.

        Unfolds the images, in memory of the kernel's size times theirs.

        Raises
        ------
        FormatError
            For convolutions in groups, whose rows see different columns.
        """
        if self.groups != 1:
            raise format_error(
                f"samples of a convolution in {self.groups} groups",
                "one group",
                "use power_sums or dense_gradient",
            )
        x, dy = self._as_images(x), self._as_images(dy)
        return (
            self._unfolded(x).transpose(1, 2).reshape(-1, math.prod(self.shape[1:])),
            dy.flatten(2).transpose(1, 2).reshape(-1, self.out_channels),
        )

    def power_sums(self, x: Tensor, dy: Tensor, order: int = 2) -> tuple[Tensor, Tensor]:
        """Return the sums of `powers` over a call's pixels: per column, and per channel of Y.

        Columns are those of all groups, C_in times the cells of the kernel. Takes the memory of one
        unfolded image, whatever the batch.
        """
        x, dy = self._as_images(x), self._as_images(dy)
        total = powers(x, order).sum(0, keepdim=True)
        return self._unfolded(total).sum(2)[0], powers(dy, order).sum((0, 2, 3))

    def dense_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """Return the gradient that a call gives the dense weight, as the matrix that it is."""
        x, dy = self._as_images(x), self._as_images(dy)
        how = self._convolution()
        gradient: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            self._padded(x.to(dy.dtype)), self.shape, dy, how.stride, 0, how.dilation, how.groups
        )
        return gradient.flatten(1)

    def _as_images(self, x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.unsqueeze(0)

    def _padded(self, x: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            top, left, bottom, right = self._convolution().padding
            return functional.pad(x, (left, right, top, bottom))
        if not any(self._around):
            return x
        if len(self.kernel_size) == 1:  # torch pads so many dimensions as the mode asks for
            return functional.pad(x.squeeze(2), self._around, self.padding_mode).unsqueeze(2)
        return functional.pad(x, self._around, self.padding_mode)

    def _unfolded(self, x: Tensor) -> Tensor:
        how = self._convolution()
        return functional.unfold(
            self._padded(x), how.kernel, dilation=how.dilation, stride=how.stride
        )

    def _both(self, option: Any, across: int = 1) -> Any:
        """Return an option along y and x: a sequence is an image of one row, with `across` there.

        Options may be written at any time, and as in torch one number is that of every dimension.
        """
        if isinstance(option, str):
            return option
        dims = len(self.kernel_size)
        given = (option,) if isinstance(option, int) else tuple(option)
        return (across,) * (2 - dims) + (given * dims if len(given) == 1 else given)

    def _how(self) -> dict[str, Any]:
        """Return how the kernel moves over images, which other modes than zeros pad before."""
        return {
            "stride": self._both(self.stride),
            "padding": self._both(self.padding, 0) if self.padding_mode == "zeros" else 0,
            "dilation": self._both(self.dilation),
            "groups": self.groups,
        }

    def _convolution(self) -> Convolution:
        return Convolution.of(self.shape, **self._how())

    def _geometry(self, size: Any) -> Geometry:
        dims = len(self.kernel_size)
        given = () if size is None else (size,) * dims if np.ndim(size) == 0 else tuple(size)
        if len(given) != dims or not all(isinstance(n, int | np.integer) for n in given):
            raise format_error(
                f"size={size!r}", f"{dims} size(s) of the maps of X", "pass those of your images"
            )
        if self.padding_mode != "zeros":  # the kernels then see maps that were padded before
            ends = [sum(self._around[i : i + 2]) for i in range(0, 2 * dims, 2)]
            given = tuple(n + e for n, e in zip(given, reversed(ends), strict=True))
        height, width = (1,) * (2 - dims) + given
        return self._convolution().geometry(height, width)

    def extra_repr(self) -> str:
        """Describe the layer as it is printed inside a model."""
        text = self._blank().extra_repr()
        return f"{text.replace(', bias=False', '')}, {super().extra_repr()}"


class SparseConv2d(_SparseConv):
    """``nn.Conv2d`` with a sparse weight (out_channels, in_channels / groups, Kh, Kw).

    Values and structure are held as in `SparseLinear`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As for ``nn.Conv2d``, whose errors wrong ones raise. ``padding`` may be 'same' or 'valid';
        ``padding_mode`` other than 'zeros' pads with torch's own operator first.
    format, density, sparsity, capacity, generator, device, dtype, **params
        As for `SparseLinear`.
    format_params : mapping, optional
        The format's own parameters where a name means something else here: HRBP's ``groups`` of
        rows.

    Attributes
    ----------
    values : nn.Parameter, shape (capacity,)
    structure : Tensor, shape (n_words,), int32
    bias : nn.Parameter, shape (out_channels,), or None
    kernel_size, stride, padding, dilation, groups, padding_mode
        As ``nn.Conv2d`` has them.

    Notes
    -----
    Inputs are (N, C_in, H, W) or (C_in, H, W), in any memory format, which the output keeps:
    channels last is multiplied as it is (on CUDA it is transposed, as any other). No packed copy of
    the values is kept, so a write to them costs nothing and `freeze` would gain nothing.

    Examples
    --------
    >>> import torch
    >>> layer = SparseConv2d(64, 128, 3, padding=1, format="shuffled_block", density=0.1)
    >>> layer(torch.zeros(2, 64, 8, 8)).shape
    torch.Size([2, 128, 8, 8])
    """

    DENSE = nn.Conv2d


class SparseConv1d(_SparseConv):
    """``nn.Conv1d`` with a sparse weight (out_channels, in_channels / groups, K).

    A sequence is an image of one row: structures and formats have shape (.., .., 1, K). Else as
    `SparseConv2d`.

    Examples
    --------
    >>> import torch
    >>> layer = SparseConv1d(16, 32, 5, padding="same", format="csr", density=0.2)
    >>> layer(torch.zeros(2, 16, 100)).shape
    torch.Size([2, 32, 100])
    """

    DENSE = nn.Conv1d

    @staticmethod
    def _flat_shape(shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[:2], 1, shape[2]) if len(shape) == 3 else tuple(shape)

    @staticmethod
    def _kernel_of(kernel: Sequence[int]) -> tuple[int, ...]:
        if kernel[0] != 1:
            raise format_error(
                f"a kernel of {kernel[0]} x {kernel[1]}", "one row", "use SparseConv2d"
            )
        return tuple(kernel[1:])

    def _as_images(self, x: Tensor) -> Tensor:
        return (x if x.dim() == 3 else x.unsqueeze(0)).unsqueeze(2)
