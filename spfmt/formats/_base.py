"""What all formats share: a frozen integer structure plus one array of values.

A format's own file says which arrays make its structure (`SparseTensor.STRUCTURE`), what is legal
(`_check`), how it lowers to a kernel layout (`_lower`) and how a pattern or scores become a
structure. Everything else is here, once.
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from spfmt._memory import aligned, is_aligned, zeros_aligned
from spfmt.errors import format_error
from spfmt.formats._checks import (
    Array,
    Shape,
    check_shape,
    float_array,
    frozen,
    matrix_shape,
    value_dtype,
)
from spfmt.formats._coords import Coordinates
from spfmt.formats._layout import Layout
from spfmt.formats._structure import Structure
from spfmt.structure._checks import as_density, as_scores, plain_array

if TYPE_CHECKING:
    from spfmt.dispatch import Plan

__all__ = ["SparseTensor", "Transposed", "new_version"]

Self = TypeVar("Self", bound="SparseTensor")

_versions = itertools.count()


def new_version() -> int:
    """Return a number that no other array of values of this process has."""
    return next(_versions)


class SparseTensor(ABC):
    """A sparse weight: a frozen integer structure and one array of values.

    Instances are immutable; `with_values` makes a new one on the same structure. Values may hold
    NaN and infinities and keep them. A stored zero is an ordinary value.

    Attributes
    ----------
    format : str
        Name of the format, as in files and structure words; see `spfmt.formats.register`.
    STRUCTURE, PARAMS : tuple of str
        Names of the structure arrays and of the integer parameters.
    """

    __slots__ = ("__weakref__", "_structure", "_values", "_version")
    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None  # numpy must not take A apart in X @ A

    format: ClassVar[str]
    STRUCTURE: ClassVar[tuple[str, ...]]
    NDIMS: ClassVar[tuple[int, ...]]
    POINTERS: ClassVar[tuple[str, ...]] = ()
    PARAMS: ClassVar[tuple[str, ...]] = ()

    _structure: Structure
    _values: Array
    _version: int

    # ---- what a format defines -----------------------------------------------------------------

    @classmethod
    @abstractmethod
    def _check(cls, s: Structure) -> None:
        """Raise FormatError unless the arrays form a legal structure."""

    @classmethod
    @abstractmethod
    def _values_shape(cls, s: Structure) -> Shape:
        """Shape of the values of a legal structure."""

    @classmethod
    @abstractmethod
    def _lower(cls, s: Structure) -> Layout:
        """The kernel layout of a legal structure."""

    @classmethod
    @abstractmethod
    def _most_words(cls, shape: Shape, nnz: int, params: Mapping[str, int]) -> int:
        """Most elements that the structure arrays can have with at most `nnz` stored positions."""

    @classmethod
    @abstractmethod
    def _from_coordinates(cls: type[Self], *args: Any, **kwargs: Any) -> Self:
        """Tensor that holds the given `Coordinates`, with padding zeros where the format asks."""

    @classmethod
    @abstractmethod
    def from_dense(cls: type[Self], *args: Any, **kwargs: Any) -> Self:
        """Tensor of a dense weight, or of the positions of it that a mask names."""

    @classmethod
    @abstractmethod
    def from_scores(cls: type[Self], *args: Any, **kwargs: Any) -> Self:
        """Tensor on the structure that keeps the most score at a density."""

    @classmethod
    def from_magnitudes(
        cls: type[Self], weights: Any, density: float | None = None, **params: Any
    ) -> Self:
        """Tensor on the structure that keeps the most magnitude of weights; its values are zero.

        `from_scores` of their absolute values, faster where the format can rank the weights
        themselves.
        """
        return cls.from_scores(np.abs(plain_array("weights", weights)), density, **params)

    @abstractmethod
    def _summary(self) -> str:
        """What the repr tells about this structure."""

    # ---- what a format may tell, for reports, benchmarks and command lines ----------------------

    PARTICIPATING: ClassVar[Mapping[str, Any]] = {}
    """Parameters of the search where all weights are trained and the largest take part."""

    SPECS: ClassVar[tuple[str, ...]] = ()
    """How parameters are written behind the format's name, as ``"M"`` in ``nm:M``."""

    def label(self) -> str:
        """Name this tensor by its format and what distinguishes it, as in ``nm 3:32``."""
        return self.format

    def caption(self) -> str:
        """Where values may be, in a few words: below a picture, in advice."""
        return "as the format keeps them"

    @classmethod
    def parse_spec(cls, text: str) -> dict[str, Any] | None:
        """Read parameters of `from_scores` as written in one of `SPECS`; None for anything else."""
        return None if text else {}

    @classmethod
    def random(
        cls: type[Self],
        shape: Sequence[int],
        density: float,
        rng: np.random.Generator,
        **params: Any,
    ) -> Self:
        """Draw a float32 tensor of random structure and standard normal values.

        Parameters
        ----------
        shape : sequence of int
            (R, C) or (C_out, C_in, Kh, Kw).
        density : float
            Share of stored weights; the nearest legal budget is taken, or the one that `params`
            fix.
        rng : numpy.random.Generator
        **params
            Those of `from_scores`.
        """
        found = cls.from_scores(rng.random(shape, dtype=np.float32), density, **params)
        return found.with_values(rng.standard_normal(found.values.shape, dtype=np.float32))

    @classmethod
    def _least_nnz(cls, coords: Coordinates) -> int:
        """A lower bound of the stored positions for `coords`, before memory for them is taken."""
        return coords.nnz

    def unit_of_rows(self) -> tuple[str, Array]:
        """Rows that share their columns form a unit: its name, and the unit of every row.

        Returns
        -------
        name : str
            "row", or "group" where the format keeps groups of rows on common columns.
        unit : ndarray of int, shape (R,)
        """
        return "row", np.arange(self.matrix_shape[0])

    def remark(self) -> str:
        """What the structure does not keep of what its format promises; mostly nothing."""
        return ""

    def most_nnz(self, density: float) -> int:
        """Most positions of a structure that this one's search finds at a density.

        Formats for which that depends on the scores override this.
        """
        return self.nnz

    def same_groups(self) -> dict[str, Any]:
        """Keywords of `from_scores` with which another structure keeps this one's groups of rows.

        Finding groups anew costs many training steps; keeping them costs less than one.
        """
        return {}

    # ---- construction --------------------------------------------------------------------------

    def _init(
        self,
        shape: Any,
        arrays: Mapping[str, Any],
        params: Mapping[str, Any],
        values: Any,
        copy: bool = True,
    ) -> None:
        """Check everything, then fill this instance."""
        self._adopt(Structure(type(self), shape, arrays, params, copy), values, copy)

    def _adopt(self, structure: Structure, values: Any, copy: bool, reshape: bool = False) -> None:
        array = float_array("values", values)
        fits = array.size == structure.nnz if reshape else array.shape == structure.values_shape
        if not fits:
            raise format_error(
                f"values of shape {array.shape}",
                f"shape {structure.values_shape}, one value per stored position",
                "check that values and structure belong together",
            )
        # Kernels use them where they lie, so they start at a cache line, see spfmt._memory.
        array = frozen(array, array.dtype, copy or not is_aligned(array))
        array = array.reshape(structure.values_shape)
        object.__setattr__(self, "_structure", structure)
        object.__setattr__(self, "_values", array)
        object.__setattr__(self, "_version", new_version())

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"{type(self).__name__} is immutable: got an assignment to {name!r}; "
            "fix: with_values() makes a tensor with other values"
        )

    @classmethod
    def _on(
        cls: type[Self], structure: Structure, values: Any, copy: bool = True, reshape: bool = False
    ) -> Self:
        """Tensor of `values` on a checked structure."""
        new = object.__new__(cls)
        new._adopt(structure, values, copy, reshape)
        return new

    @classmethod
    def _from_parts(
        cls: type[Self],
        shape: Any,
        structure: Mapping[str, Any],
        params: Mapping[str, Any],
        values: Any,
        *,
        copy: bool = True,
    ) -> Self:
        """Tensor of its parts, checked; values of any shape with the right size are accepted."""
        return cls._on(Structure(cls, shape, structure, params, copy), values, copy, reshape=True)

    @classmethod
    def _fill(
        cls: type[Self],
        coords: Coordinates,
        arrays: Mapping[str, Array],
        params: Mapping[str, int],
    ) -> Self:
        """Tensor on a structure that covers all of `coords`; positions beyond them hold zero."""
        structure = Structure(cls, coords.shape, arrays, params, copy=False)
        keys = structure.flat_indices()
        values = zeros_aligned(keys.size, coords.values.dtype)
        order = None if (keys[1:] > keys[:-1]).all() else np.argsort(keys)
        place = np.searchsorted(keys, coords.keys, sorter=order)
        values[place if order is None else order[place]] = coords.values
        return cls._on(structure, values, copy=False, reshape=True)

    @classmethod
    def _found(
        cls: type[Self],
        scores: Array,
        shape: Shape,
        arrays: Mapping[str, Array],
        params: Mapping[str, int],
        values: Any,
    ) -> Self:
        """Tensor on a structure found from scores, with values gathered from a dense array."""
        structure = Structure(cls, shape, arrays, params, copy=False, legal=True)
        if values is None:
            zeros = zeros_aligned(structure.values_shape, scores.dtype)
            return cls._on(structure, zeros, copy=False)
        return cls._on(structure, _gather(structure, values), copy=False)

    @classmethod
    def project(
        cls, scores: Any, density: float | None = None, **params: Any
    ) -> npt.NDArray[np.bool_]:
        """Legal mask that keeps the most score.

        Parameters
        ----------
        scores : array_like of shape (R, C) or (C_out, C_in, Kh, Kw)
            One score per position, larger is better; NaN is refused.
        density : float
            Wanted share of kept positions; the nearest legal budget is taken. Optional where other
            parameters fix the budget (n and m).
        **params
            Those of the format's `from_scores`.

        Returns
        -------
        ndarray of bool, same shape as `scores`
        """
        return cls.from_scores(scores, density, **params).mask()

    # ---- fields --------------------------------------------------------------------------------

    @property
    def shape(self) -> Shape:
        """Shape of the weight: (R, C), or (C_out, C_in, Kh, Kw) of a convolution."""
        return self._structure.shape

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(R, C) of the matrix that the products use; C = C_in * Kh * Kw for a convolution."""
        return self._structure.matrix_shape

    @property
    def values(self) -> Array:
        """Stored values, read-only; they start at a cache line."""
        return self._values

    @property
    def version(self) -> int:
        """Number of these values: no other tensor of this process has it.

        Kernels reuse a packed copy of the values as long as the number is the same.
        """
        return self._version

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the values."""
        return self._values.dtype

    @property
    def nnz(self) -> int:
        """Number of stored positions, stored zeros included."""
        return int(self._values.size)

    @property
    def density(self) -> float:
        """Nnz / (R * C), and 0 for an empty matrix."""
        rows, cols = self.matrix_shape
        return self.nnz / (rows * cols) if rows and cols else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the values and of the structure arrays."""
        arrays = self._structure.arrays.values()
        return int(self._values.nbytes) + sum(int(array.nbytes) for array in arrays)

    @property
    def T(self) -> Transposed:
        """The transpose as a view: ``A.T @ Y`` and ``X @ A.T``."""
        return Transposed(self)

    @property
    def plan(self) -> Plan:
        """The structure compiled for the kernels; shared by tensors on the same structure."""
        return self._structure.plan

    def layout(self) -> Layout:
        """The kernel layout, made once per structure."""
        return self._structure.layout

    def structure(self) -> dict[str, Array]:
        """The structure arrays by name, read-only."""
        return dict(self._structure.arrays)

    def params(self) -> dict[str, int]:
        """The integer parameters by name."""
        return dict(self._structure.params)

    def flat_indices(self) -> npt.NDArray[np.int64]:
        """Row-major flat index of every value in the dense weight, in the order of `values`."""
        return self._structure.flat_indices()

    # ---- dense forms ---------------------------------------------------------------------------

    def to_dense(self) -> Array:
        """Dense array of `shape` and of this dtype."""
        return self._scatter(self._values.reshape(-1), self.dtype)

    def mask(self) -> npt.NDArray[np.bool_]:
        """Bool array of `shape`: the stored positions, whatever their values."""
        return self._scatter(True, np.dtype(np.bool_))

    def _scatter(self, values: Any, dtype: np.dtype[Any]) -> Array:
        rows, cols = self.matrix_shape
        if rows * cols * dtype.itemsize > np.iinfo(np.intp).max:
            raise format_error(
                f"a dense array of {rows} x {cols}",
                "a size that can be addressed",
                "use the products or the sparse targets of convert",
            )
        dense = np.zeros(rows * cols, dtype)
        dense[self._structure.flat_indices()] = values
        return dense.reshape(self.shape)

    def dense_gather(self, w: Any) -> Array:
        """Values of a dense array at this structure, in the order and shape of `values`.

        Parameters
        ----------
        w : array_like of shape `shape` or `matrix_shape`, any dtype
        """
        return _gather(self._structure, w)

    def coordinates(self) -> Coordinates:
        """Positions and values in row-major order."""
        rows, cols = self.layout().coordinates()
        return Coordinates.of_unsorted(self.shape, rows, cols, self._values.reshape(-1))

    # ---- copies --------------------------------------------------------------------------------

    def validate(self) -> None:
        """Check the whole structure again.

        Raises
        ------
        FormatError
            Names the first offending index, row or group.
        """
        structure = self._structure
        type(self)._check(structure)
        if self._values.shape != type(self)._values_shape(structure):
            raise format_error(
                f"values of shape {self._values.shape}",
                f"shape {structure.values_shape}",
                "make the tensor anew",
            )

    def copy(self: Self) -> Self:
        """Tensor with its own values on the same structure."""
        return self._on(self._structure, self._values)

    def astype(self: Self, dtype: Any) -> Self:
        """Tensor with values cast to `dtype`."""
        return self._on(self._structure, aligned(self._values, value_dtype(dtype)), copy=False)

    def with_values(self: Self, values: Any) -> Self:
        """Tensor with other values on the same structure and plan.

        Parameters
        ----------
        values : array_like
            nnz values in the order of `values`, of any shape.
        """
        return self._on(self._structure, values, reshape=True)

    def __copy__(self: Self) -> Self:
        return self.copy()

    def __deepcopy__(self: Self, memo: Any) -> Self:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickling goes through the checks, and leaves plans (compiled objects) behind.
        return _rebuild, (type(self), self.shape, self.structure(), self.params(), self._values)

    def __eq__(self, other: object) -> bool:
        """Same format, shape, structure, dtype and values; NaN equals NaN."""
        if not isinstance(other, SparseTensor):
            return NotImplemented
        return (
            self.dtype == other.dtype
            and self._structure.same_as(other._structure)
            and bool(np.array_equal(self._values, other._values, equal_nan=True))
        )

    def __repr__(self) -> str:
        size = "x".join(map(str, self.shape))
        density = f"density {self.density:.4g}"
        return f"{type(self).__name__}({size}, {self._summary()}, {density}, {self.dtype.name})"

    # ---- products ------------------------------------------------------------------------------

    def __matmul__(self, x: Any) -> Any:
        from spfmt import ops

        return ops.spmm(self, x)

    def __rmatmul__(self, x: Any) -> Any:
        from spfmt import ops

        return ops.spmm_t(self, x, batch_first=True)

    # ---- words and files -----------------------------------------------------------------------

    def encode(self, capacity: int | None = None) -> npt.NDArray[np.int32]:
        """The structure as one int32 array; see `spfmt.formats.encode`."""
        from spfmt.formats._words import encode

        return encode(self, capacity)

    def save(
        self, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a safetensors file, whole or not at all; see `spfmt.formats.save`."""
        from spfmt.formats._io import save

        save(self, path, metadata=metadata)

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote with this format.

        Raises
        ------
        FormatError
            For a file of another format, and for one that is truncated, corrupt or foreign.
        """
        from spfmt.formats._io import load

        tensor = load(path)
        if not isinstance(tensor, cls):
            raise format_error(
                f"a file of format {tensor.format!r}",
                f"format {getattr(cls, 'format', cls.__name__)!r}",
                f"use spfmt.load or {type(tensor).__name__}.load",
            )
        return tensor


class Transposed:
    """The transpose of a sparse tensor, as a view for products."""

    __slots__ = ("T",)
    __array_ufunc__ = None

    def __init__(self, tensor: SparseTensor) -> None:
        self.T = tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(C, R)."""
        rows, cols = self.T.matrix_shape
        return cols, rows

    def to_dense(self) -> Array:
        """Dense (C, R) array."""
        return np.ascontiguousarray(self.T.to_dense().reshape(self.T.matrix_shape).T)

    def __matmul__(self, y: Any) -> Any:
        from spfmt import ops

        return ops.spmm_t(self.T, y)

    def __rmatmul__(self, x: Any) -> Any:
        from spfmt import ops

        return ops.spmm(self.T, x, batch_first=True)

    def __repr__(self) -> str:
        return f"{self.T!r}.T"


def _gather(structure: Structure, w: Any) -> Array:
    dense = plain_array("w", w)
    if dense.shape not in (structure.shape, structure.matrix_shape):
        raise format_error(
            f"a dense array of shape {dense.shape}",
            f"shape {structure.shape}",
            "pass the weight that the structure belongs to",
        )
    gathered = dense.reshape(-1)[structure.flat_indices()]
    return np.asarray(gathered).reshape(structure.values_shape)


def _rebuild(
    cls: type[SparseTensor],
    shape: Shape,
    structure: Mapping[str, Array],
    params: Mapping[str, int],
    values: Array,
) -> SparseTensor:
    return cls._from_parts(shape, structure, params, values)


def scores_budget(scores: Any, density: Any) -> tuple[Array, Shape, int]:
    """Checked score matrix, the weight's shape, and the budget round(density * R * C)."""
    plain = as_scores(scores)
    shape = check_shape(plain.shape)
    return plain.reshape(matrix_shape(shape)), shape, round(as_density(density) * plain.size)
