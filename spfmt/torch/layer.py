"""What sparse layers share: made from dense ones and back, drawn, called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Proxy

from spfmt.errors import FormatError, format_error
from spfmt.formats import SparseTensor, get_format
from spfmt.torch.convert import to_torch_values, whole
from spfmt.torch.module import SparseModule

__all__ = ["SparseLayer", "implied_density", "resolve_density", "traced"]

Self = TypeVar("Self", bound="SparseLayer")


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


def implied_density(params: Mapping[str, Any], shape: Sequence[int]) -> float | None:
    """Return the density that an N:M ratio or a fan-in among a format's parameters stands for."""
    if "fan_in" in params:
        share = params["fan_in"] / max(1, math.prod(shape[1:]))
    elif "n" in params and "m" in params:
        # A group ends with its row, and in a convolution with the channels of a cell.
        share = params["n"] / max(1, min(params["m"], shape[1]))
    else:
        return None
    return float(min(1.0, max(0.0, share)))  # what exceeds it, the format itself refuses by name


class SparseLayer(SparseModule):
    """A `SparseModule` that stands for a dense layer of torch.

    A subclass names that layer, takes its options, makes an empty one with the same options, and
    computes.
    """

    DENSE: ClassVar[type[nn.Module]]

    def _take(self, dense: Any) -> None:
        """Take the options of a dense layer."""

    def _blank(self) -> Any:
        """Return a dense layer on meta with this one's options, without a bias."""
        raise NotImplementedError

    def _compute(
        self, x: Tensor, values: Tensor, structure: Tensor, bias: Tensor | None, activation: Any
    ) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def _flat_shape(shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a format's weight for one of the dense layer."""
        return tuple(shape)

    # ----------------------------------------------------------------------------------- made

    def _draw(
        self,
        shape: Sequence[int],
        bias: bool,
        format: str,
        density: float | None,
        sparsity: float | None,
        capacity: int | None,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        params: Mapping[str, Any],
    ) -> None:
        """Fill an empty module with a random structure and values."""
        if density is None and sparsity is None:
            density = implied_density(params, shape)
        target = resolve_density(density, sparsity)
        device = torch.get_default_device() if device is None else torch.device(device)
        seed = torch.randint(2**62, (), generator=generator, device="cpu").item()
        rng = np.random.Generator(np.random.SFC64(int(seed)))
        tensor = get_format(format).random(tuple(shape), target, rng, **params)
        dtype = dtype or torch.get_default_dtype()
        offset = torch.empty(shape[0], device=device, dtype=dtype) if bias else None
        values = torch.zeros(tensor.nnz, dtype=dtype, device=device)
        self._install(tensor, values, offset, capacity, device, target, params)
        self.reset_parameters(generator)

    @classmethod
    def _of_tensor(
        cls: type[Self],
        tensor: SparseTensor,
        dense: nn.Module | None,
        bias: Tensor | None,
        capacity: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        target_density: float | None,
        params: Mapping[str, Any],
    ) -> Self:
        """Make a layer of a sparse tensor, with the options of a dense layer."""
        if bias is not None and tuple(bias.shape) != tensor.matrix_shape[:1]:
            raise format_error(
                f"bias of shape {tuple(bias.shape)}", f"{tensor.matrix_shape[:1]}", "one per row"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(dense)
        values = to_torch_values(tensor.values)
        values = values if dtype is None else values.to(dtype)
        device = values.device if device is None else torch.device(device)
        layer._install(tensor, values, bias, capacity, device, target_density, params)
        return layer

    @classmethod
    def from_dense(
        cls: type[Self],
        dense: Any,
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
        dense : nn.Module
            The layer of torch that this one stands for, of that very class: a subclass may compute
            something else. Its weight is read and its bias Parameter is shared, not copied.
        format, density, sparsity, capacity, **params
            As for the class.
        scores : Tensor, shape of the weight, optional
            What to keep, larger is better; ``weight.abs()`` by default.

        Raises
        ------
        FormatError
            For a layer of another class, or where the format cannot hold it at this density.
        """
        kind: type = type(dense)
        if kind is not cls.DENSE:
            raise format_error(
                f"a {kind.__name__}",
                f"an nn.{cls.DENSE.__name__} itself",
                "use the sparse layer that stands for it, or copy its weight into a plain one",
            )
        shape = cls._flat_shape(dense.weight.shape)
        if density is None and sparsity is None:
            density = implied_density(params, shape)
        target = resolve_density(density, sparsity)
        ranked = dense.weight if scores is None else scores
        ranked = ranked.detach().to("cpu", torch.float32)
        ranked = ranked.abs() if scores is None else ranked
        ranked = ranked.reshape(cls._flat_shape(ranked.shape))
        tensor = get_format(format).from_scores(ranked.numpy(), target, **params)
        return cls._gathered(dense, tensor, capacity, target, params)

    @classmethod
    def _gathered(
        cls: type[Self],
        dense: Any,
        tensor: SparseTensor,
        capacity: int | None,
        target_density: float | None,
        params: Mapping[str, Any],
    ) -> Self:
        """Make a layer on a structure with the dense layer's values, dtype, device and bias."""
        weight = dense.weight.detach()
        if tensor.shape != cls._flat_shape(weight.shape):
            raise format_error(
                f"scores of shape {tensor.shape}",
                f"those of the weight, {tuple(weight.shape)}",
                "return one score per weight",
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take(dense)
        # Gathered in torch, so that bfloat16 never has to pass through numpy.
        where = torch.from_numpy(tensor.flat_indices()).to(weight.device)
        values = weight.reshape(-1)[where]
        bias = dense.bias
        layer._install(tensor, values, bias, capacity, weight.device, target_density, params)
        layer.values.requires_grad_(dense.weight.requires_grad)
        return layer.train(dense.training)

    def to_dense(self) -> Any:
        """Return the dense layer with the same map; the bias Parameter is shared."""
        structure = self._decoded()
        like = whole(self.values).detach()
        weight = torch.zeros(math.prod(self.shape), dtype=like.dtype, device=like.device)
        weight[torch.from_numpy(structure.flat_indices()).to(like.device)] = like[: structure.nnz]
        # On meta: the initial values would be drawn only to be thrown away.
        dense = self._blank()
        dense.weight = nn.Parameter(weight.view(self.dense_shape), self.values.requires_grad)
        dense.bias = cast(nn.Parameter, self.bias)
        return dense.train(self.training)

    # --------------------------------------------------------------------------------- called

    def forward(self, x: Tensor, *, activation: str | None = None) -> Tensor:
        """Return ``f(A x + b)``.

        Parameters
        ----------
        x : Tensor
            What the dense layer takes.
        activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
            f, fused into the product where no gradient is recorded.

        Returns
        -------
        Tensor
            Of the shape that the dense layer gives.
        """
        if isinstance(x, Proxy):
            return traced(self, x, activation)
        values, structure = self._held("values"), self._held("structure")
        bias = None if self._parameters.get("bias", self) is None else self._held("bias")
        try:
            return self._compute(x, values, structure, bias, activation)
        except FormatError:
            if not self._mend():
                raise
            return self.forward(x, activation=activation)


def traced(layer: nn.Module, x: Proxy, activation: str | None) -> Tensor:
    """Let a layer become one node of a graph that torch.fx traces, as those of torch itself do."""
    tracer: Any = x.tracer
    if tracer.root is layer:
        raise format_error(
            f"a {type(layer).__name__} to be traced by itself",
            "a model that holds it",
            "trace nn.Sequential(layer)",
        )
    path = tracer.path_of_module(layer)
    options = {} if activation is None else {"activation": activation}
    return cast(Tensor, tracer.create_proxy("call_module", path, (x,), options))
