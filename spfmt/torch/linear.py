"""`SparseLinear`: an ``nn.Linear`` whose weight is a structure buffer and a vector of values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spfmt.errors import FormatError, format_error
from spfmt.formats import (
    SparseTensor,
    Structure,
    decode_structure,
    encode,
    get_format,
    words_capacity,
)
from spfmt.torch.convert import to_numpy, to_torch_values
from spfmt.torch.ops import spmm
from spfmt.torch.values import compiled_structure

__all__ = ["SparseLinear", "follow", "implied_density", "resolve_density"]

Self = TypeVar("Self", bound="SparseLinear")

# What fixes a format's budget at its first search; afterwards the layer's own density does.
_BUDGET_PARAMS = frozenset({"n", "fan_in"})


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
        share = params["n"] / max(1, params["m"])
    else:
        return None
    return float(min(1.0, max(0.0, share)))  # what exceeds it, the format itself refuses by name


def _search_params(tensor: SparseTensor, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords with which the tensor's format searches another structure like it.

    They are what the caller gave and else the tensor's own attributes of the same names (a block
    shape, a group size), without what fixes the budget and without structure arrays.
    """
    left_out = _BUDGET_PARAMS.union(type(tensor).STRUCTURE, {"values"})
    names = [
        name
        for name, p in inspect.signature(type(tensor).from_scores).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY and name not in left_out
    ]
    own = {name: getattr(tensor, name) for name in names if hasattr(tensor, name)}
    return {**own, **{name: v for name, v in given.items() if name not in _BUDGET_PARAMS}}


class SparseLinear(nn.Module):
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

    A call multiplies with the values as they are in memory, whoever wrote them and however.

    Examples
    --------
    >>> import torch
    >>> layer = SparseLinear(768, 3072, format="condensed", density=0.1)
    >>> layer(torch.zeros(2, 5, 768)).shape
    torch.Size([2, 5, 3072])
    """

    values: nn.Parameter
    structure: Tensor
    bias: nn.Parameter | None
    format_params: dict[str, Any]

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

    def _install(
        self,
        tensor: SparseTensor,
        values: Tensor,
        bias: Tensor | None,
        capacity: int | None,
        device: torch.device,
        target_density: float | None,
        params: Mapping[str, Any],
    ) -> None:
        """Fill an empty module with a structure, its values and a bias."""
        if len(tensor.shape) != 2:
            raise format_error(
                f"a weight of shape {tensor.shape}",
                "(out_features, in_features)",
                "pass a 2-D weight",
            )
        self.out_features, self.in_features = tensor.matrix_shape
        self.format = tensor.format
        self.format_params = _search_params(tensor, params)
        if target_density is None or not _BUDGET_PARAMS.isdisjoint(params):
            target_density = tensor.density
        self.target_density = float(target_density)
        capacity = tensor.nnz if capacity is None else int(capacity)
        if capacity < tensor.nnz:
            raise format_error(
                f"capacity={capacity}",
                f"at least the structure's {tensor.nnz} positions",
                "raise capacity, or lower the density",
            )
        n_words = words_capacity(self.format, tensor.shape, capacity, tensor.params())
        words = torch.from_numpy(encode(tensor, n_words))
        flat = torch.zeros(capacity, dtype=values.dtype, device=device)
        flat[: tensor.nnz] = values.detach().reshape(-1)
        self.values = nn.Parameter(flat)
        self.register_buffer("structure", words.to(device))
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

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

    # ------------------------------------------------------------------------ values and shape

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def capacity(self) -> int:
        """Length of `values`."""
        return self.values.shape[0]

    @property
    def nnz(self) -> int:
        """Stored positions of the present structure."""
        return self._decoded().nnz

    @property
    def density(self) -> float:
        """Share of stored positions of the present structure."""
        return self.nnz / max(1, self.out_features * self.in_features)

    def _decoded(self) -> Structure:
        """Return the present structure, decoded at most once per content."""
        if self.structure.is_meta:
            raise format_error(
                "a structure on meta", "words with content", "load a state_dict first"
            )
        if self.structure.device.type == "cpu":
            return compiled_structure(self.structure).structure
        return decode_structure(self.structure.cpu().numpy())

    def positions(self) -> NDArray[np.int64]:
        """Return ``row * in_features + column`` of every weight, in the order of `values`."""
        return self._decoded().flat_indices()

    def tensor(self) -> SparseTensor:
        """Return the weight as a numpy format object, its values copied.

        Raises
        ------
        MissingDependency
            For bfloat16 values without ml_dtypes.
        FormatError
            Where the structure is corrupt.
        """
        structure = self._decoded()
        values = to_numpy(self.values[: structure.nnz])
        return structure.tensor(values)

    def to_linear(self) -> nn.Linear:
        """Return a dense ``nn.Linear`` with the same map; the bias Parameter is shared."""
        structure = self._decoded()
        like = self.values.detach()
        weight = torch.zeros(
            self.out_features * self.in_features, dtype=like.dtype, device=like.device
        )
        weight[torch.from_numpy(structure.flat_indices()).to(like.device)] = like[: structure.nnz]
        # Built on meta: the initial values of nn.Linear would be drawn only to be thrown away.
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.view(self.shape), self.values.requires_grad)
        linear.bias = cast(nn.Parameter, self.bias)
        return linear.train(self.training)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the values from U(-1/√f, 1/√f), where f is the row's own fan-in.

        Scaling by the number of weights that a neuron really has keeps the variance of its output
        what it is in ``nn.Linear`` (Evci et al., Gradient Flow in Sparse Neural Networks, 2022).
        The bias is drawn with the same bound, that of an ablated row with the bound of a dense one.
        """
        if self.values.is_meta:
            return
        structure = self._decoded()
        rows, _ = structure.layout.coordinates()
        fan_in = np.bincount(rows, minlength=self.out_features)
        bound = 1.0 / np.sqrt(np.where(fan_in > 0, fan_in, max(1, self.in_features)))
        self.values.zero_()
        drawn = _symmetric(structure.nnz, generator)
        self.values[: structure.nnz] = (drawn * torch.from_numpy(bound[rows])).to(self.values)
        if self.bias is not None:
            drawn = _symmetric(self.out_features, generator)
            self.bias.copy_(drawn * torch.from_numpy(bound))

    # ------------------------------------------------------------------------------- structure

    @torch.no_grad()
    def set_structure(
        self,
        new: SparseTensor,
        *,
        take_values: bool = False,
        forget: NDArray[np.int64] | None = None,
    ) -> Tensor:
        """Move the layer to another structure, in place.

        Parameter and buffer stay the same objects with the same memory; their content changes.

        Parameters
        ----------
        new : SparseTensor
            Of this layer's format and shape, with at most `capacity` positions.
        take_values : bool
            True takes the values of `new`; False keeps the value of every position that is in both
            structures and sets new positions to zero.
        forget : ndarray of int64, optional
            Places in `values` whose weights are dropped: where their positions are in `new` again,
            they count as new.

        Returns
        -------
        Tensor, shape (capacity,), int64, on the values' device
            For every place in `values` the place its position had before, or -1 for a new position
            and for unused capacity. Whatever follows the weights (optimizer state) moves by it.

        Raises
        ------
        FormatError
            Where format, shape or capacity do not fit; nothing is changed then.
        """
        words = self._words_of(new)
        structure, old = new._structure, self._decoded()
        places = structure.sources(old, self.capacity)
        if forget is not None:
            dropped = np.zeros(old.nnz + 1, np.bool_)  # the last one stands for -1
            dropped[:-1][forget] = True
            places[dropped[places]] = -1
        source = torch.from_numpy(places).to(self.values.device)
        if take_values:
            moved = torch.zeros_like(self.values)
            moved[: new.nnz] = to_torch_values(new.values).reshape(-1).to(moved)
        else:
            moved = follow(self.values, source)
        self.structure.copy_(torch.from_numpy(words))
        self.values.copy_(moved)
        if self.structure.device.type == "cpu":
            self._decoded()  # while `structure` lives: so the words are not decoded and checked
        return source

    def _words_of(self, new: SparseTensor) -> NDArray[np.int32]:
        """Encode a structure for this layer's buffer, or say why it does not fit."""
        if new.format != self.format or new.shape != self.shape:
            raise format_error(
                f"a structure of format {new.format} and shape {new.shape}",
                f"format {self.format} and shape {self.shape}",
                "make a new layer with SparseLinear.from_tensor",
            )
        if new.nnz > self.capacity:
            raise format_error(
                f"a structure with {new.nnz} positions",
                f"at most the capacity of {self.capacity}",
                "lower its density, or build the layer with a larger capacity",
            )
        return encode(new, self.structure.shape[0])

    def explain(self, batch: int, threads: int | None = None, op: str = "spmm") -> str:
        """Say which kernel would run a batch, and the time predicted for it.

        Parameters are those of :meth:`spfmt.dispatch.Plan.explain`; `batch` is the product of all
        leading dimensions.
        """
        dtype = str(self.values.dtype).removeprefix("torch.")
        return self._decoded().plan.explain(batch, threads, op, dtype=dtype)

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
        dims, shape = x.dim(), (self.out_features, self.in_features)
        if dims == 0 or x.shape[-1] != shape[1]:
            raise format_error(
                f"an input of shape {tuple(x.shape)}",
                f"(..., {self.in_features})",
                f"the last dimension must be in_features={self.in_features}",
            )
        flat = x if dims == 2 else x.flatten(0, -2) if dims > 2 else x.unsqueeze(0)
        values, structure = self._held("values"), self._held("structure")
        bias = None if self._parameters.get("bias", self) is None else self._held("bias")
        y = spmm(values, structure, flat, bias, shape=shape, activation=activation)
        return y if dims == 2 else y.reshape((*x.shape[:-1], shape[0]))

    def _held(self, name: str) -> Tensor:
        """Return a tensor of this module; nn.Module finds it only after an attribute was missed."""
        held: Tensor | None = self._parameters.get(name)
        held = self._buffers.get(name) if held is None else held
        return cast(Tensor, getattr(self, name)) if held is None else held

    def extra_repr(self) -> str:
        """Describe the layer as it is printed inside a model."""
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}"
        )
        params = dict(self.format_params)
        try:
            found = self._decoded().params
        except FormatError:  # on meta, or fresh from to_empty(): there is nothing to describe yet
            return f"{text}, capacity={self.capacity}, structure not loaded"
        params.update({k: v for k, v in found.items() if k in _BUDGET_PARAMS})
        text += "".join(f", {name}={value}" for name, value in params.items())
        return f"{text}, nnz={self.nnz}, density={self.density:.4g}, capacity={self.capacity}"

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "SparseLinear has no dense `weight`: use `values` (the Parameter), tensor() "
                "(structure and values) or tensor().to_dense()"
            )
        return super().__getattr__(name)

    # ------------------------------------------------------------------------------ state_dict

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check the structure of a checkpoint before a single value is loaded."""
        problem = self._problem_with(state_dict, prefix)
        if problem is not None:
            error_msgs.append(problem)
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        if prefix + "structure" in state_dict and not assign:
            with torch.no_grad():
                self.structure.copy_(state_dict[prefix + "structure"])
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _problem_with(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Return why a checkpoint cannot be loaded into this layer, or None."""
        words, values = (state_dict.get(prefix + name) for name in ("structure", "values"))
        name = prefix.rstrip(".") or "the layer"
        if words is None and values is None:
            return None  # missing keys: torch reports them by the rules of `strict`
        if words is None:
            return f"{name}: got values without a structure; values mean nothing without it"
        problem = self._problem_with_words(words)  # the format first: it decides all sizes
        if problem is None and values is not None and values.shape != self.values.shape:
            problem = (
                f"got a capacity of {values.numel()} values, expected {self.capacity}; "
                f"build the layer with capacity={values.numel()} and the checkpoint's parameters"
            )
        if problem is None and words.shape != self.structure.shape:
            problem = (
                f"got {tuple(words.shape)} structure words, expected "
                f"{tuple(self.structure.shape)}; the layers differ in capacity or parameters"
            )
        if problem is None and values is None and not self._has_words(words):
            problem = (
                "got another structure without values; the present values stand for other "
                "positions; load both, or neither"
            )
        return None if problem is None else f"{name}: {problem}"

    def _problem_with_words(self, words: Tensor) -> str | None:
        """Return why structure words cannot be this layer's, whatever their number; or None."""
        if words.dim() != 1 or words.dtype != torch.int32:
            return (
                f"got structure words of shape {tuple(words.shape)} and {words.dtype}, expected "
                "one dimension of torch.int32; save the state_dict again"
            )
        if words.is_meta:
            return None
        try:
            found = decode_structure(words.detach().cpu().numpy())
        except FormatError as error:
            return str(error)
        if (found.cls.format, found.shape) != (self.format, self.shape):
            return (
                f"got a {found.cls.format} structure of shape {found.shape}, expected "
                f"{self.format} of shape {self.shape}; build the layer in the checkpoint's format"
            )
        return None

    def _has_words(self, words: Tensor) -> bool:
        """Tell whether a structure is the present one, as far as there is any content."""
        if words.is_meta or self.structure.is_meta:
            return True
        return torch.equal(words.cpu(), self.structure.cpu())


def _symmetric(size: int, generator: torch.Generator | None) -> Tensor:
    """Draw from U(-1, 1) on the CPU, whatever the default device is."""
    return torch.rand(size, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1


def follow(state: Tensor, source: Tensor) -> Tensor:
    """Return per-weight state after a move: ``state[source]``, zero where `source` is -1.

    Parameters
    ----------
    state : Tensor, shape (capacity,)
        Values, a gradient, or a tensor of optimizer state.
    source : Tensor, shape (capacity,), int64
        Result of :meth:`SparseLinear.set_structure`.
    """
    return torch.cat([state, state.new_zeros(1)]).take(source)  # -1 is the last one, the zero
