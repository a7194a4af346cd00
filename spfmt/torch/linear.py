"""`SparseLinear`: an ``nn.Linear`` on a structure buffer and a vector of values."""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from spfmt.errors import format_error
from spfmt.formats import SparseTensor
from spfmt.torch.layer import SparseLayer
from spfmt.torch.ops import spmm

__all__ = ["SparseLinear", "affine"]

Self = TypeVar("Self", bound="SparseLinear")


class SparseLinear(SparseLayer):
    """Affine map ``y = x A.T + b`` with a sparse weight A (out_features, in_features).

    The weight is held as two tensors. `values` is one flat Parameter whose length (the *capacity*)
    never changes; `structure` is an int32 buffer, also of fixed length, that says which positions
    the values stand for. A training method moves positions by writing into both, so references held
    by optimizers, DDP, ``state_dict`` and compiled graphs stay valid. Values beyond the structure's
    nnz are zero and inert.

    Parameters
    ----------
    in_features, out_features : int
        Sizes C and R.
    bias : bool
        Whether to learn an additive bias (R,).
    format : str
        Name of the format, for instance ``"condensed"`` or ``"shuffled_block"``.
    density, sparsity : float, optional
        Share of stored, or of absent, positions: exactly one of the two, unless ``n`` and ``m`` or
        ``fan_in`` say it. The nearest legal budget of the format is taken.
    capacity : int, optional
        Length of `values`; by default the first structure's nnz, and where short blocks make the
        number of weights vary from structure to structure, the most at this density.
    generator : torch.Generator, optional
        Draws the random structure and the initial values.
    device, dtype
        Of the parameters. The structure is always int32.
    **params
        The format's own, for instance ``block_shape=(16, 16)`` or ``m=32``.

    Attributes
    ----------
    values : nn.Parameter, shape (capacity,)
    structure : Tensor, shape (n_words,), int32
    bias : nn.Parameter, shape (out_features,), or None
    format : str
    format_params : dict
        Keywords with which another structure of this kind is searched.
    target_density : float
        The density that was asked for; `density` is the one that the format could give.

    Notes
    -----
    Inputs have any number of leading dimensions, sizes of zero included, and any strides. On the
    CPU float32 and float64 compute; under ``torch.autocast`` the product runs in float32, a float64
    one in float64. A module in float16 or bfloat16 can be stored and moved; calling it there
    outside autocast raises :class:`spfmt.KernelNotFound`. On a CUDA device float32, bfloat16 and
    float16 compute (``docs/cuda.md``).

    A call multiplies with the values as they are in memory, whoever wrote them and however. What
    that costs, and how `freeze` saves it, says docs/kernels.md.

    Examples
    --------
    >>> import torch
    >>> layer = SparseLinear(768, 3072, format="condensed", density=0.1)
    >>> layer(torch.zeros(2, 5, 768)).shape
    torch.Size([2, 5, 3072])
    """

    DENSE = nn.Linear
    shape: tuple[int, int]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "condensed",
        density: float | None = None,
        sparsity: float | None = None,
        capacity: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **params: Any,
    ) -> None:
        super().__init__()
        shape = out_features, in_features
        self._draw(
            shape, bias, format, density, sparsity, capacity, generator, device, dtype, params
        )

    def _install(self, tensor: SparseTensor, *args: Any) -> None:
        if len(tensor.shape) != 2:
            raise format_error(
                f"a weight of shape {tensor.shape}",
                "(out_features, in_features)",
                "pass a 2-D weight",
            )
        super()._install(tensor, *args)
        self.out_features, self.in_features = self.shape

    @classmethod
    def from_tensor(
        cls: type[Self],
        tensor: SparseTensor,
        bias: Tensor | None = None,
        *,
        capacity: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        target_density: float | None = None,
        **params: Any,
    ) -> Self:
        """Make a layer of a sparse tensor (R, C).

        Parameters
        ----------
        tensor : SparseTensor
            Structure and values; the values are copied.
        bias : Tensor, shape (R,), optional
            Becomes the bias; a Parameter is taken as it is, not copied.
        capacity : int, optional
            Length of `values`; the tensor's nnz by default, or with `target_density` the most
            that structures at that density have.
        device, dtype
            Of the values; the CPU and the tensor's dtype by default.
        target_density : float, optional
            What later structures aim at; the tensor's density by default.
        **params
            Keywords for later searches, where they differ from the tensor's own.

        Raises
        ------
        FormatError
            For a 4-D weight, a bias of another shape, or a capacity below nnz.
        """
        return cls._of_tensor(tensor, None, bias, capacity, device, dtype, target_density, params)

    @classmethod
    def from_linear(cls: type[Self], linear: nn.Linear, **options: Any) -> Self:
        """Prune a dense layer; see `from_dense`."""
        return cls.from_dense(linear, **options)

    def to_linear(self) -> nn.Linear:
        """Return a dense ``nn.Linear`` with the same map; the bias Parameter is shared."""
        return cast(nn.Linear, self.to_dense())

    def _blank(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=False, device="meta")

    def _compute(
        self, x: Tensor, values: Tensor, structure: Tensor, bias: Tensor | None, activation: Any
    ) -> Tensor:
        return affine(x, values, structure, bias, self.shape, activation)

    def samples(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (B, in_features) and output gradients (B, out_features) of a call."""
        batch = math.prod(x.shape[:-1])  # not -1: a layer may be empty
        return x.reshape(batch, self.in_features), dy.reshape(batch, self.out_features)

    def extra_repr(self) -> str:
        """Describe the layer as it is printed inside a model."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {super().extra_repr()}"


def affine(
    x: Tensor,
    values: Tensor,
    structure: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    activation: str | None,
) -> Tensor:
    """Return ``f(x A.T + b)`` for an x of shape (..., C)."""
    dims = x.dim()
    if dims == 0 or x.shape[-1] != shape[1]:
        raise format_error(
            f"an input of shape {tuple(x.shape)}",
            f"(..., {shape[1]})",
            f"the last dimension must be in_features={shape[1]}",
        )
    flat = x if dims == 2 else x.flatten(0, -2) if dims > 2 else x.unsqueeze(0)
    y = spmm(values, structure, flat, bias, shape=shape, activation=activation)
    return y if dims == 2 else y.reshape((*x.shape[:-1], shape[0]))
