"""The frozen integer structure of a sparse tensor, checked once and shared."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spfmt.formats._checks import (
    Array,
    Shape,
    check_names,
    check_shape,
    index_array,
    kernel_cells,
    matrix_shape,
)
from spfmt.formats._layout import Layout
from spfmt.structure._checks import as_int
from spfmt.structure.moves import packed_mask, sources

if TYPE_CHECKING:
    from spfmt.dispatch import Plan
    from spfmt.formats._base import SparseTensor

__all__ = ["Structure"]


class Structure:
    """A checked, frozen structure; tensors with the same pattern share one.

    Parameters
    ----------
    cls : type of SparseTensor
        The format.
    shape : sequence of int
        Shape of the weight: (R, C) or (C_out, C_in, Kh, Kw).
    arrays : mapping of str to array_like
        The format's `STRUCTURE` arrays.
    params : mapping of str to int
        The format's `PARAMS`.
    copy : bool
        False shares the memory of arrays that already have the right dtype and order.
    legal : bool
        Whether the arrays are known to form a legal structure, since a search of this package has
        just made them: to check them takes as long as to find them.

    Raises
    ------
    FormatError
        Names the first offending index, row or group.
    """

    def __init__(
        self,
        cls: type[SparseTensor],
        shape: Any,
        arrays: Mapping[str, Any],
        params: Mapping[str, Any],
        copy: bool = True,
        legal: bool = False,
    ) -> None:
        check_names("arrays", arrays, cls.STRUCTURE, cls.__name__)
        check_names("parameters", params, cls.PARAMS, cls.__name__)
        self.cls = cls
        self.shape: Shape = check_shape(shape)
        self.params: Mapping[str, int] = MappingProxyType(
            {name: as_int(name, params[name], 0) for name in cls.PARAMS}
        )
        self.arrays: Mapping[str, Array] = MappingProxyType(
            {
                name: index_array(
                    name, arrays[name], ndim, np.int64 if name in cls.POINTERS else np.int32, copy
                )
                for name, ndim in zip(cls.STRUCTURE, cls.NDIMS, strict=True)
            }
        )
        self._layout: Layout | None = None
        self._plan: Plan | None = None
        if not legal:
            cls._check(self)
        self.values_shape: Shape = cls._values_shape(self)

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(R, C) of the weight's matrix."""
        return matrix_shape(self.shape)

    @property
    def cells(self) -> int:
        """Kh * Kw of a convolution, 1 for a matrix."""
        return kernel_cells(self.shape)

    @property
    def nnz(self) -> int:
        """Number of stored positions."""
        size = 1
        for length in self.values_shape:
            size *= length
        return size

    @property
    def layout(self) -> Layout:
        """The kernel layout, made at its first use."""
        if self._layout is None:  # without a lock, which a forked child could inherit locked
            self._layout = self.cls._lower(self)
        return self._layout

    @property
    def plan(self) -> Plan:
        """The structure compiled for the kernels, made at its first use."""
        if self._plan is None:
            from spfmt.dispatch import Plan

            self._plan = Plan(self.layout)
        return self._plan

    def flat_indices(self) -> npt.NDArray[np.int64]:
        """Row-major flat index of every stored position, in the order of the values."""
        return self.layout.flat_indices()

    def packed_mask(self) -> npt.NDArray[np.uint8]:
        """One bit per position, see `spfmt.structure.moves.packed_mask`."""
        return packed_mask(self.layout.row_runs())

    def sources(self, old: Structure, capacity: int | None = None) -> npt.NDArray[np.int64]:
        """For every stored position its place in `old`; -1 if it is new, and for spare capacity.

        See `spfmt.structure.moves.sources`.
        """
        return sources(old.layout.row_runs(), self.layout.row_runs(), capacity)

    def tensor(self, values: Any) -> SparseTensor:
        """Tensor with copied `values`, nnz of them in any shape, on this structure."""
        return self.cls._on(self, values, reshape=True)

    def same_as(self, other: Structure) -> bool:
        """Whether format, shape, parameters and all arrays are equal."""
        return self is other or (
            self.cls is other.cls
            and self.shape == other.shape
            and self.params == other.params
            and all(np.array_equal(self[name], other[name]) for name in self.cls.STRUCTURE)
        )
