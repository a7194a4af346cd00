"""`SparseLinear`: an ``nn.Linear`` on a structure buffer and a vector of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from spfmt.errors import FormatError, format_error
from spfmt.formats import SparseTensor, get_format
from spfmt.torch.convert import to_torch_values, whole
from spfmt.torch.module import SparseModule
from spfmt.torch.ops import spmm

__all__ = ["SparseLinear", "implied_density", "resolve_density"]

Self = TypeVar("Self", bound="SparseLinear")


def resolve_density(density: float | None, sparsity: float | None) -> float:
    """Return the density that one of the two stands for.

    Raises
    ------
    FormatError
        Where both or neither is given, or the result is outside [0, 1].
    """
    if (density is None) == (sparsity is None):
        raise format_error(
            f"density={density} and sparsity={sparsity}",
            "exactly one of them",
            "pass density=0.1 or sparsity=0.9",
        )
    resolved = float(1.0 - sparsity) if sparsity is not None else float(cast(float, density))
    if not 0.0 <= resolved <= 1.0:
        raise format_error(f"a density of {resolved}", "a share in [0, 1]", "pass density=0.1")
    return resolved


def implied_density(params: Mapping[str, Any], columns: int) -> float | None:
    """Return the density that an N:M ratio or a fan-in among a format's parameters stands for."""
    if "fan_in" in params:
        share = params["fan_in"] / max(1, columns)
    elif "n" in params and "m" in params:
        share = params["n"] / max(1, min(params["m"], columns))  # a group ends with its row
    else:
        return None
    return float(min(1.0, max(0.0, share)))  # what exceeds it, the format itself refuses by name


class SparseLinear(SparseModule):
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
        Length of `values`; the first structure's nnz by default.
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
    Inputs have any number of leading dimensions, sizes of zero included, and any strides. float32
    and float64 compute; under ``torch.autocast`` the product runs in float32, and says so once in
    the log. A module in float16 or bfloat16 can be stored and moved; calling it outside autocast
    raises :class:`spfmt.KernelNotFound`.

    A call multiplies with the values as they are in memory, whoever wrote them and however. What
    that costs, and how `freeze` saves it, says docs/kernels.md.

    Examples
    --------
    >>> import torch
    >>> layer = SparseLinear(768, 3072, format="condensed", density=0.1)
    >>> layer(torch.zeros(2, 5, 768)).shape
    torch.Size([2, 5, 3072])
    """

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
        if density is None and sparsity is None:
            density = implied_density(params, in_features)
        target = resolve_density(density, sparsity)
        device = torch.get_default_device() if device is None else torch.device(device)
        drawn = torch.rand((out_features, in_features), generator=generator, device="cpu")
        tensor = get_format(format).from_scores(drawn.numpy(), target, **params)
        dtype = dtype or torch.get_default_dtype()
        offset = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        values = torch.zeros(tensor.nnz, dtype=dtype, device=device)
        self._install(tensor, values, offset, capacity, device, target, params)
        self.reset_parameters(generator)

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
            Length of `values`; the tensor's nnz by default.
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
        if bias is not None and tuple(bias.shape) != tensor.matrix_shape[:1]:
            raise format_error(
                f"bias of shape {tuple(bias.shape)}", f"{tensor.matrix_shape[:1]}", "one per row"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        values = to_torch_values(tensor.values)
        values = values if dtype is None else values.to(dtype)
        device = values.device if device is None else torch.device(device)
        layer._install(tensor, values, bias, capacity, device, target_density, params)
        return layer

    @classmethod
    def from_linear(
        cls: type[Self],
        linear: nn.Linear,
        *,
        format: str = "condensed",
        density: float | None = None,
        sparsity: float | None = None,
        scores: Tensor | None = None,
        capacity: int | None = None,
        **params: Any,
    ) -> Self:
        """Prune a dense layer to a structure and keep its values there.

        Parameters
        ----------
        linear : nn.Linear
            Its weight is read and its bias Parameter is shared, not copied.
        format, density, sparsity, capacity, **params
            As for the class.
        scores : Tensor, shape (R, C), optional
            What to keep, larger is better; ``weight.abs()`` by default.

        Raises
        ------
        FormatError
            Where the format cannot hold the layer at this density.
        """
        if density is None and sparsity is None:
            density = implied_density(params, linear.in_features)
        target = resolve_density(density, sparsity)
        ranked = linear.weight if scores is None else scores
        ranked = ranked.detach().to("cpu", torch.float32)
        ranked = ranked.abs() if scores is None else ranked
        tensor = get_format(format).from_scores(ranked.numpy(), target, **params)
        return cls._gathered(linear, tensor, capacity, target, params)

    @classmethod
    def _gathered(
        cls: type[Self],
        linear: nn.Linear,
        tensor: SparseTensor,
        capacity: int | None,
        target_density: float | None,
        params: Mapping[str, Any],
    ) -> Self:
        """Make a layer on a structure with the dense layer's values, dtype, device and bias."""
        weight = linear.weight.detach()
        if tensor.shape != tuple(weight.shape):
            raise format_error(
                f"scores of shape {tensor.shape}",
                f"those of the weight, {tuple(weight.shape)}",
                "return one score per weight",
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        # Gathered in torch, so that bfloat16 never has to pass through numpy.
        where = torch.from_numpy(tensor.flat_indices()).to(weight.device)
        values = weight.reshape(-1)[where]
        bias = linear.bias
        layer._install(tensor, values, bias, capacity, weight.device, target_density, params)
        layer.values.requires_grad_(linear.weight.requires_grad)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """Return a dense ``nn.Linear`` with the same map; the bias Parameter is shared."""
        structure = self._decoded()
        like = whole(self.values).detach()
        weight = torch.zeros(
            self.out_features * self.in_features, dtype=like.dtype, device=like.device
        )
        weight[torch.from_numpy(structure.flat_indices()).to(like.device)] = like[: structure.nnz]
        # Built on meta: the initial values of nn.Linear would be drawn only to be thrown away.
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.view(self.shape), self.values.requires_grad)
        linear.bias = cast(nn.Parameter, self.bias)
        return linear.train(self.training)

    # --------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor, *, activation: str | None = None) -> Tensor:
        """Return ``f(x A.T + b)``.

        Parameters
        ----------
        x : Tensor, shape (..., in_features)
        activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
            f, fused into the product where no gradient is recorded.

        Returns
        -------
        Tensor, shape (..., out_features)
        """
        if isinstance(x, Proxy):
            return self._traced(x, activation)
        dims, shape = x.dim(), self.shape
        if dims == 0 or x.shape[-1] != shape[1]:
            raise format_error(
                f"an input of shape {tuple(x.shape)}",
                f"(..., {self.in_features})",
                f"the last dimension must be in_features={self.in_features}",
            )
        flat = x if dims == 2 else x.flatten(0, -2) if dims > 2 else x.unsqueeze(0)
        values, structure = self._held("values"), self._held("structure")
        bias = None if self._parameters.get("bias", self) is None else self._held("bias")
        try:
            y = spmm(values, structure, flat, bias, shape=shape, activation=activation)
        except FormatError:
            if not self._mend():
                raise
            return self.forward(x, activation=activation)
        return y if dims == 2 else y.reshape((*x.shape[:-1], shape[0]))

    def samples(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (B, in_features) and output gradients (B, out_features) of a call."""
        return x.reshape(-1, self.in_features), dy.reshape(-1, self.out_features)

    def _traced(self, x: Proxy, activation: str | None) -> Tensor:
        """Become one node of a graph that torch.fx traces, as the layers of torch itself do."""
        tracer: Any = x.tracer
        if tracer.root is self:
            raise format_error(
                "a SparseLinear to be traced by itself",
                "a model that holds it",
                "trace nn.Sequential(layer)",
            )
        path = tracer.path_of_module(self)
        options = {} if activation is None else {"activation": activation}
        return cast(Tensor, tracer.create_proxy("call_module", path, (x,), options))

    def extra_repr(self) -> str:
        """Describe the layer as it is printed inside a model."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {super().extra_repr()}"
