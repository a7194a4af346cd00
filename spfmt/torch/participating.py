"""`Participating`: a layer that trains all its weights and multiplies with some of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.fx import Proxy

from spfmt.errors import FormatError, format_error
from spfmt.formats import (
    HEADER,
    SparseTensor,
    Structure,
    decode_structure,
    encode,
    get_format,
    words_capacity,
)
from spfmt.torch import ops as products
from spfmt.torch.activation import activated
from spfmt.torch.convert import to_numpy
from spfmt.torch.gather import gathered, write_at
from spfmt.torch.layer import SparseLayer, implied_density, resolve_density, traced
from spfmt.torch.survey import is_plain, sparse_class
from spfmt.torch.values import compiled_structure, write_structure
from spfmt.torch.words import structures

__all__ = ["Participating"]


class Participating(nn.Module):
    """A dense layer whose weights of largest magnitude alone take part in its product.

    All weights are kept and trained: `weight` is the dense layer's own Parameter, the same object,
    so optimizers, DDP and averages go on with it. Those at the positions of `structure`
    *participate* (Advances in sparse training, section 4): sparse kernels compute the output and
    the gradient of the input with them alone. The gradient of `weight` is ``dY.T @ X`` at all
    positions, a dense product of the cost that it has in the dense layer; it is what the method
    needs and takes the memory of the dense weight.

    Participating values are read from `weight` at every call, so whoever writes it and however (an
    optimizer, an average that is swapped in, ``load_state_dict``), a product never sees old ones.
    Only :meth:`choose` moves positions. (An average that averages buffers as well, as
    ``AveragedModel(use_buffers=True)`` does, ruins those of `structure`, and its calls say so:
    call :meth:`choose` on its layers first.)

    Parameters
    ----------
    dense : nn.Linear, nn.Conv2d or nn.Conv1d
        Of that very class. Its weight and bias become this layer's.
    format : str
        Format of the structure.
    density, sparsity : float, optional
        Share of weights that participate, or that do not: one of the two, unless ``n`` and ``m`` or
        ``fan_in`` say it.
    gradient_scale : float
        Factor of the gradient where weights do not participate (section 3.2), in [0, 1]. At zero
        only participating weights have one, and the sparse kernel computes it.
    **params
        Parameters of the format, for instance ``n=2, m=4, transposable=1``.

    Attributes
    ----------
    weight : nn.Parameter, shape of the dense layer's, all weights
    bias : nn.Parameter or None
    structure : Tensor, shape (n_words,), int32
        Structure words, see :func:`spfmt.formats.encode`; the ``state_dict`` holds them beside
        weight and bias.
    shape : tuple of int
        Shape of the weight as formats see it.
    target_density : float

    Raises
    ------
    FormatError
        For a layer of another class, a weight that is sharded, a scale outside [0, 1], or where the
        format cannot hold the weight at this density.

    Examples
    --------
    >>> import torch
    >>> layer = Participating(torch.nn.Linear(64, 32), format="nm", n=2, m=4)
    >>> layer(torch.zeros(5, 64)).sum().backward()
    >>> layer.weight.grad.shape, layer.nnz
    (torch.Size([32, 64]), 1024)
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    structure: Tensor
    _layer: SparseLayer

    def __init__(
        self,
        dense: nn.Module,
        *,
        format: str | type[SparseTensor] = "csr",
        density: float | None = None,
        sparsity: float | None = None,
        gradient_scale: float = 1.0,
        **params: Any,
    ) -> None:
        super().__init__()
        if not is_plain(dense):
            raise format_error(
                f"a {type(dense).__name__}",
                "an nn.Linear, nn.Conv2d or nn.Conv1d itself",
                "take its dense layer, or leave it as it is",
            )
        if not 0.0 <= gradient_scale <= 1.0:
            raise format_error(
                f"gradient_scale={gradient_scale}", "a factor in [0, 1]", "1 leaves gradients alone"
            )
        self.weight = cast(nn.Parameter, dense.weight)
        self.check_whole()
        self.register_parameter("bias", cast(nn.Parameter, dense.bias))
        self.shape = sparse_class(dense)._flat_shape(dense.weight.shape)  # type: ignore[arg-type]
        self.format, self.format_params = get_format(format).format, dict(params)
        if density is None and sparsity is None:
            density = implied_density(params, self.shape)
        self.target_density = resolve_density(density, sparsity)
        self.gradient_scale = gradient_scale
        self._install(dense, self.fitting())
        self.train(dense.training)

    def _install(self, dense: nn.Module, tensor: SparseTensor) -> None:
        """Make the buffer of a first structure, and what computes with the dense layer's options.

        That is a sparse layer without memory of its own, and no module of this one: it must not
        show in the model's parameters.
        """
        self.capacity = tensor.most_nnz(self.target_density)
        words = words_capacity(self.format, self.shape, self.capacity, tensor.params())
        found = torch.from_numpy(encode(tensor, words))
        self.register_buffer("structure", found.to(self.weight.device))
        like = self._options_of(dense)
        layer = sparse_class(like)._gathered(like, tensor, None, None, {}).to("meta")
        layer._lineage.structure = None
        self.__dict__["_layer"] = layer

    @staticmethod
    def _options_of(dense: nn.Module) -> nn.Module:
        like = dense.__class__.__new__(dense.__class__)
        like.__dict__.update(dense.__dict__, _parameters={}, _buffers={})
        weight = cast(nn.Parameter, dense.weight).to("meta")
        like.register_parameter("weight", nn.Parameter(weight, False))
        like.register_parameter("bias", None)
        return like

    def check_whole(self) -> None:
        """Refuse a weight of which this process has a part alone.

        Raises
        ------
        FormatError
            For a DTensor, as FSDP2 makes them.
        """
        if hasattr(self.weight, "full_tensor"):
            raise format_error(
                "a weight that is sharded over processes",
                "the whole weight: all of it is ranked, and read at every call",
                "train with DistributedDataParallel instead of fully_shard",
            )

    # ------------------------------------------------------------------------------- structure

    def fitting(self) -> SparseTensor:
        """Return the structure of the weights of largest magnitude, values zero.

        Raises
        ------
        FormatError
            Where a weight is NaN.
        """
        weight = self.weight.detach().to("cpu")
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        ranked = to_numpy(weight.to(exact).reshape(self.shape))
        search = get_format(self.format).from_magnitudes
        return search(ranked, self.target_density, **self.format_params)

    @torch.no_grad()
    def choose(self) -> bool:
        """Choose again which weights participate; tell whether others do now.

        Equal magnitudes are chosen as the format does, by position alone, so that equal weights
        give equal structures on all ranks.
        """
        return self.set_structure(self.fitting())

    @torch.no_grad()
    def set_structure(self, new: SparseTensor) -> bool:
        """Let the weights at the positions of a tensor participate, whatever its values.

        Returns
        -------
        bool
            Whether they are others than before.

        Raises
        ------
        FormatError
            Where format, shape or size do not fit; nothing is changed then.
        """
        if (new.format, new.shape) != (self.format, self.shape):
            raise format_error(
                f"a structure of format {new.format} and shape {new.shape}",
                f"format {self.format} and shape {self.shape}",
                "make a new layer",
            )
        if new.nnz > self.capacity:
            raise self._too_large(new.nnz)
        words = encode(new, self.structure.shape[0])
        if words[:HEADER].tolist() == self.structure[:HEADER].tolist():  # they stand for all
            return False
        write_structure(self.structure, words, new._structure)
        return True

    def _too_large(self, nnz: int) -> FormatError:
        return format_error(
            f"a structure with {nnz} positions",
            f"at most the capacity of {self.capacity}",
            "lower its density, or make the layer with that density",
        )

    def _found(self) -> Structure:
        """Return the present structure, read at most once per content of the buffer."""
        if self.structure.is_meta:
            raise format_error(
                "a structure on meta", "words with content", "load a state_dict first"
            )
        if self.structure.device.type == "cpu":
            return compiled_structure(self.structure).structure
        return structures.of(self.structure)

    @property
    def nnz(self) -> int:
        """How many weights participate."""
        return self._found().nnz

    @property
    def density(self) -> float:
        """Share of the weights that participates."""
        return self.nnz / max(1, math.prod(self.shape))

    def positions(self) -> NDArray[Any]:
        """Return ``row * C + column`` of every participating weight."""
        return self._found().flat_indices()

    def packed_mask(self) -> NDArray[np.uint8]:
        """Return a bit per position, row-major as by `numpy.packbits`: whether it participates."""
        return self._found().packed_mask()

    def values(self) -> Tensor:
        """Return the participating weights as they are now, (capacity,); zero behind them."""
        return gathered(self.weight, self.structure, self.capacity)

    def tensor(self) -> SparseTensor:
        """Return the participating weights as a numpy format object, their values copied."""
        structure = self._found()
        return structure.tensor(to_numpy(self.values()[: structure.nnz]))

    # ------------------------------------------------------------------------------------ calls

    def forward(self, x: Tensor, *, activation: str | None = None) -> Tensor:
        """Return ``f(A x + b)``, A the participating weights; see `SparseLayer.forward`."""
        if isinstance(x, Proxy):
            return traced(self, x, activation)
        trained = torch.is_grad_enabled() and self.weight.requires_grad
        if not trained or self.gradient_scale == 0.0:  # sparse kernels compute all gradients
            return self._layer._compute(x, self.values(), self.structure, self.bias, activation)
        values = gathered(self.weight.detach(), self.structure, self.capacity)
        y = self._layer._compute(x, values, self.structure, self.bias, None)
        y = cast(Tensor, _DenseGradient.apply(y, self.weight, x, self))  # type: ignore[no-untyped-call]
        return activated(y, activation)

    def _gradient(self, x: Tensor, dy: Tensor, structure: Tensor) -> Tensor:
        """Return the gradient of all weights, scaled where they did not participate."""
        gradient = self._layer.dense_gradient(x, dy).to(self.weight.dtype)
        if self.gradient_scale != 1.0:
            participating = gathered(gradient, structure, self.capacity)
            gradient = gradient.mul_(self.gradient_scale)
            write_at(gradient, structure, participating)
        return gradient.reshape(self.weight.shape)

    # ------------------------------------------------------------------------------ other layers

    def dense(self) -> Any:
        """Return the dense layer with all weights: Parameters are shared."""
        dense = self._layer._blank()
        dense.weight, dense.bias = self.weight, self.bias
        return dense.train(self.training)

    def to_sparse(self) -> SparseLayer:
        """Return the sparse layer with the same map; the bias Parameter is shared."""
        dense, tensor = self.dense(), self.tensor()
        kind = sparse_class(dense)
        return kind._gathered(dense, tensor, None, self.target_density, self.format_params)

    def extra_repr(self) -> str:
        """Describe the layer as it is printed inside a model."""
        params = "".join(f", {name}={value}" for name, value in self.format_params.items())
        text = self._layer._blank().extra_repr().replace(", bias=False", "")
        text += f", bias={self.bias is not None}, format={self.format}{params}"
        return f"{text}, participating={self.target_density:.4g}"

    # -------------------------------------------------------------------------------- state_dict

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Check the structure of a checkpoint before a single weight is loaded.

        A state of dense weights alone lets torch say that the structure is missing; where that is
        allowed (``strict=False``), the weights loaded choose it.
        """
        words = state_dict.get(prefix + "structure")
        problem = None if words is None else self._problem_with(words)
        if problem is not None:
            rest[-1].append(f"{prefix.rstrip('.') or 'the layer'}: {problem}")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)
        if words is None and prefix + "weight" in state_dict and not self.weight.is_meta:
            self.choose()

    def _problem_with(self, words: Tensor) -> str | None:
        """Return why structure words cannot be this layer's, or None."""
        if words.is_meta:
            return None
        if words.shape != self.structure.shape:
            return (
                f"got {tuple(words.shape)} structure words, expected "
                f"{tuple(self.structure.shape)}; make the layer with the checkpoint's density"
            )
        try:
            found = decode_structure(words.detach().cpu().numpy())
        except FormatError as error:
            return str(error)
        if (found.cls.format, found.shape) != (self.format, self.shape):
            return (
                f"got a {found.cls.format} structure of shape {found.shape}, expected "
                f"{self.format} of shape {self.shape}; make the layer in the checkpoint's format"
            )
        return None if found.nnz <= self.capacity else str(self._too_large(found.nnz))


class _DenseGradient(torch.autograd.Function):
    """The identity on a layer's result, from whose gradient all weights get theirs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, x: Tensor, layer: Participating) -> Tensor:
        ctx.save_for_backward(x, layer.structure)
        ctx.layer = layer
        return y.detach()  # no view of it: what follows may write in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, structure = ctx.saved_tensors
        with torch.no_grad():
            gradient = ctx.layer._gradient(x, dy, structure)
        return dy, products._once(gradient, dy, x), None, None
