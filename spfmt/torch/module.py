"""`SparseModule`: a layer whose weight is a structure buffer and a vector of values."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spfmt.cost import Geometry
from spfmt.errors import FormatError, format_error
from spfmt.formats import SparseTensor, Structure, decode_structure, encode, words_capacity
from spfmt.torch.averages import Lineage
from spfmt.torch.convert import to_numpy, to_torch_values, whole, write_whole
from spfmt.torch.values import compiled_structure, write_structure
from spfmt.torch.weight import WeightInfo
from spfmt.torch.words import structures

__all__ = ["SparseModule", "follow", "move", "powers"]

Self = TypeVar("Self", bound="SparseModule")

# What fixes a format's budget at its first search; afterwards the layer's own density does.
BUDGET_PARAMS = frozenset({"n", "fan_in"})


def _search_params(tensor: SparseTensor, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords with which the tensor's format searches another structure like it.

    They are what the caller gave and else the tensor's own attributes of the same names (a block
    shape, a group size), without what fixes the budget and without structure arrays.
    """
    parameters = inspect.signature(type(tensor).from_scores).parameters
    names = {n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    names -= BUDGET_PARAMS | {"values"}
    own = {n: getattr(tensor, n) for n in parameters if n in names and hasattr(tensor, n)}
    structure = type(tensor).STRUCTURE
    return {
        **{name: value for name, value in own.items() if name not in structure},
        **{name: value for name, value in given.items() if name in names},
    }


class SparseModule(nn.Module):
    """Base of the sparse layers: values, structure, moving, ``state_dict``.

    The weight is held as two tensors. `values` is one flat Parameter whose length (the *capacity*)
    never changes; `structure` is an int32 buffer, also of fixed length, that says which positions
    the values stand for. A training method moves positions by writing into both, so references held
    by optimizers, DDP, ``state_dict`` and compiled graphs stay valid. Values beyond the structure's
    nnz are zero and inert.

    Attributes
    ----------
    values : nn.Parameter, shape (capacity,)
    structure : Tensor, shape (n_words,), int32
    bias : nn.Parameter, shape (R,), or None
    shape : tuple of int
        Shape of the weight; (R, C) is that of its matrix.
    format : str
    format_params : dict
        Keywords with which another structure of this kind is searched.
    target_density : float
        The density that was asked for; `density` is the one that the format could give.

    Notes
    -----
    A ``copy.deepcopy`` that is kept in step with the layer, as ``AveragedModel`` does it, moves
    along when the structure moves; one that nobody writes into stays; where it cannot be told which
    of them a copy is, the move is an error. `spfmt.torch.averages` has the rules.
    """

    values: nn.Parameter
    structure: Tensor
    bias: nn.Parameter | None
    shape: tuple[int, ...]
    format_params: dict[str, Any]
    _lineage: Lineage

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
        self.shape = tensor.shape
        self.format = tensor.format
        self.format_params = _search_params(tensor, params)
        most = tensor.nnz if target_density is None else tensor.most_nnz(target_density)
        if target_density is None or not BUDGET_PARAMS.isdisjoint(params):
            target_density = tensor.density
        self.target_density = float(target_density)
        capacity = most if capacity is None else int(capacity)
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
        self._lineage = Lineage.of(self)
        self._lineage.structure = tensor._structure
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    # ------------------------------------------------------------------------ values and shape

    @property
    def _matrix(self) -> tuple[int, int]:
        """(R, C) of the weight's matrix."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the weight of the dense layer that this one stands for."""
        return self.shape

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
        return self.nnz / max(1, math.prod(self.shape))

    def _decoded(self) -> Structure:
        """Return the present structure, decoded at most once per content."""
        if self.structure.is_meta:
            raise format_error(
                "a structure on meta", "words with content", "load a state_dict first"
            )
        try:
            found = self._as_written()
        except FormatError as error:
            found = self._lineage.mended(error)
        self._lineage.found(found)
        return found

    @property
    def _readable(self) -> bool:
        """Whether the structure buffer has content: it is neither on meta nor a stand-in."""
        return type(self.structure) is Tensor and not self.structure.is_meta

    def _as_written(self) -> Structure:
        if self.structure.device.type == "cpu":
            return compiled_structure(self.structure).structure
        return structures.of(self.structure)

    def _mend(self) -> bool:
        """Tell whether words were corrupt and are restored now, so that a product can go on."""
        if torch.compiler.is_compiling() or not self._readable:
            return False
        try:
            self._as_written()
        except FormatError as error:
            self._lineage.mended(error)
            return True
        return False

    def _mend_if_possible(self) -> None:
        with contextlib.suppress(FormatError):
            self._mend()

    def positions(self) -> NDArray[np.int64]:
        """Return ``row * C + column`` of every weight, in the order of `values`."""
        return self._decoded().flat_indices()

    def packed_mask(self) -> NDArray[np.uint8]:
        """Return a bit per position, row-major as by `numpy.packbits`: whether it has a weight."""
        return self._decoded().packed_mask()

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
        values = to_numpy(whole(self.values)[: structure.nnz])
        return structure.tensor(values)

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
        rows = structure.flat_indices()  # in place: large layers are drawn in memory for a few nnz
        rows //= max(1, self._matrix[1])
        fan_in = np.bincount(rows, minlength=self._matrix[0])
        bound = 1.0 / np.sqrt(np.where(fan_in > 0, fan_in, max(1, self._matrix[1])))
        self.values.zero_()
        drawn = _symmetric(structure.nnz, generator)
        drawn *= torch.from_numpy(bound[rows])
        self.values[: structure.nnz] = drawn.to(self.values)
        if self.bias is not None:
            drawn = _symmetric(self._matrix[0], generator)
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
        self.stand_alone()
        structure, old = new._structure, self._decoded()
        places = structure.sources(old, self.capacity)
        if forget is not None:
            dropped = np.zeros(old.nnz + 1, np.bool_)  # the last one stands for -1
            dropped[:-1][forget] = True
            places[dropped[places]] = -1
        source = torch.from_numpy(places).to(self.values.device)
        taken = None
        if take_values:
            taken = torch.zeros(self.capacity, dtype=self.values.dtype, device=self.values.device)
            taken[: new.nnz] = to_torch_values(new.values).reshape(-1).to(taken)
        self._move(old, structure, words, source, taken)
        return source

    def _move(
        self,
        old: Structure,
        new: Structure,
        words: NDArray[np.int32],
        source: Tensor,
        taken: Tensor | None = None,
    ) -> None:
        """Write another structure and its values, here and in the averages of this layer."""
        for average in self._lineage.move(old, new):
            average._write(new, words, source.to(average.values.device))
        self._write(new, words, source, taken)

    def _write(
        self, new: Structure, words: NDArray[np.int32], source: Tensor, taken: Tensor | None = None
    ) -> None:
        write_structure(self.structure, words, new)
        if taken is None:
            move(self.values, source)
        else:
            write_whole(self.values, taken)

    def averages(self) -> list[SparseModule]:
        """Return the layers that will move along with this one.

        Raises
        ------
        FormatError
            Where that is unclear of a copy: it is neither named nor kept in step as an average, nor
            left alone as a saved state.
        """
        return self._lineage.averages(self._decoded())

    def lead(self, average: SparseModule) -> None:
        """Let an average of this layer, on the same structure, move whenever this layer moves."""
        self._lineage.lead(average._lineage)

    def stand_alone(self) -> None:
        """Follow no other layer any more: whoever is trained or moved by itself is no average."""
        self._lineage.stand_alone()

    def _words_of(self, new: SparseTensor) -> NDArray[np.int32]:
        """Encode a structure for this layer's buffer, or say why it does not fit."""
        if new.format != self.format or new.shape != self.shape:
            raise format_error(
                f"a structure of format {new.format} and shape {new.shape}",
                f"format {self.format} and shape {self.shape}",
                "make a new layer with its class's from_tensor",
            )
        if new.nnz > self.capacity:
            raise format_error(
                f"a structure with {new.nnz} positions",
                f"at most the capacity of {self.capacity}",
                "lower its density, or build the layer with a larger capacity",
            )
        return encode(new, self.structure.shape[0])

    def samples(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a call multiplied, as matrices: inputs (B, C), output gradients (B, R)."""
        raise NotImplementedError

    def power_sums(self, x: Tensor, dy: Tensor, order: int = 2) -> tuple[Tensor, Tensor]:
        """Return the sums of `powers` over a call's samples: per input (C,), per output (R,)."""
        x, dy = self.samples(x, dy)
        return powers(x, order).sum(0), powers(dy, order).sum(0)

    def dense_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """Return the gradient that a call gives the dense weight, as a matrix (R, C)."""
        x, dy = self.samples(x, dy)
        return dy.T @ x.to(dy.dtype)

    def explain(
        self, batch: int, threads: int | None = None, op: str | None = None, *, size: Any = None
    ) -> str:
        """Say which kernel would run a batch, and the time predicted for it.

        Parameters are those of :meth:`spfmt.dispatch.Plan.explain`; `batch` is the product of all
        leading dimensions; `size`, that of the maps, an int or (H, W), is what convolutions need.
        """
        dtype, geometry = str(self.values.dtype).removeprefix("torch."), self._geometry(size)
        return self._decoded().plan.explain(batch, threads, op, dtype=dtype, geometry=geometry)

    def _geometry(self, size: Any) -> Geometry | None:
        if size is None:
            return None
        raise format_error(f"size={size!r}", "none: these layers have no maps", "leave it out")

    def _held(self, name: str) -> Tensor:
        """Return a tensor of this module; nn.Module finds it only after an attribute was missed."""
        held: Tensor | None = self._parameters.get(name)
        held = self._buffers.get(name) if held is None else held
        return getattr(self, name) if held is None else held

    def extra_repr(self) -> str:
        """Describe the layer as it is printed inside a model."""
        text = f"bias={self.bias is not None}, format={self.format}"
        params = dict(self.format_params)
        try:
            found = self._decoded().params
        except FormatError:  # on meta, or fresh from to_empty(): there is nothing to describe yet
            return f"{text}, capacity={self.capacity}, structure not loaded"
        params.update({k: v for k, v in found.items() if k in BUDGET_PARAMS})
        text += "".join(f", {name}={value}" for name, value in params.items())
        return f"{text}, nnz={self.nnz}, density={self.density:.4g}, capacity={self.capacity}"

    # --------------------------------------------------------------------- the weight as others see

    @property
    def weight(self) -> WeightInfo:
        """dtype, device, shape and requires_grad of the weight; its content raises."""
        return WeightInfo(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(WeightInfo.EXPLANATION)
        super().__setattr__(name, value)

    # ------------------------------------------------------------------------- copies and pickles

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        state = {name: held for name, held in self.__dict__.items() if name != "_lineage"}
        twin.__setstate__(copy.deepcopy(state, memo))
        if self._lineage.structure is None and self._readable:
            with contextlib.suppress(FormatError):
                self._decoded()
        self._lineage.copied(twin._lineage, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        self._mend_if_possible()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lineage = Lineage.of(self, state.get("_lineage"))

    def _apply(self: Self, fn: Any, recurse: bool = True) -> Self:
        self._lineage.changing()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._lineage.converted()
        return self

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
        self._lineage.changing()
        assign = local_metadata.get("assign_to_params_buffers", False)
        if prefix + "structure" in state_dict and not assign:
            with torch.no_grad():
                self.structure.copy_(state_dict[prefix + "structure"])
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._lineage.loaded(self._structure_loaded())

    def _structure_loaded(self) -> Structure | None:
        """Return the present structure, or None where it is still to come."""
        if self._readable:
            with contextlib.suppress(FormatError):
                return self._as_written()
        return None

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Save words that averaging damaged as they were; what is corrupt, loading refuses."""
        self._mend_if_possible()
        super()._save_to_state_dict(*args, **kwargs)

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


def powers(x: Tensor, order: int) -> Tensor:
    """Return ``|x| ** order`` in float32, of which sums give the l1 (1) or Euclidean (2) norm."""
    return x.float().abs() if order == 1 else x.float().square()


def follow(state: Tensor, source: Tensor) -> Tensor:
    """Return per-weight state after a move: ``state[source]``, zero where `source` is -1.

    Parameters
    ----------
    state : Tensor, shape (capacity,)
        Values, a gradient, or a tensor of optimizer state.
    source : Tensor, shape (capacity,), int64
        Result of :meth:`SparseModule.set_structure`.
    """
    # The zero comes first, so that -1 finds it; index_select takes a third of the time of take.
    return torch.cat([state.new_zeros(1), state]).index_select(0, source + 1)


@torch.no_grad()
def move(state: Tensor, source: Tensor) -> None:
    """Let per-weight state follow its weights in place, on every rank that has a part of it."""
    write_whole(state, follow(whole(state), source.to(state.device)))
