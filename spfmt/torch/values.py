"""What lies in which memory: structures that were compiled, and values that stay as they are.

A product multiplies with the values as they are in memory, whoever wrote them and however: an
optimizer (fused or not), ``.data``, a view, numpy on the same memory, another process. Nothing that
a tensor tells about itself proves that they are unchanged: its version counter does not advance
with all of these. So there are two ways:

*Changing values*, which is what a module has. Kernels read them where they lie, or compare them
whole with what they packed last, at the speed of memory (``cpp/core/packed.h``).

*Constant values*, whose owner promises that nobody writes them, by holding a `Constant`: a frozen
module does. Their packed copies are reused without a look; a counted write ends the promise.

A *structure* is known by the header of its words, which holds a 64-bit hash of them all, by its
address and its version counter. Where one of these differs, the words are read again.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from spfmt import _kernels, threads
from spfmt.dispatch import Plan
from spfmt.formats import HEADER, Structure, decode_structure, new_version

__all__ = [
    "SPMM",
    "SPMM_T",
    "CompiledStructure",
    "Constant",
    "compiled_structure",
    "multiply",
    "sample",
    "sweep",
]

SPMM, SPMM_T = 0, 1

_log = logging.getLogger("spfmt.torch")
_debug = logging.getLogger("spfmt").isEnabledFor


class CompiledStructure:
    """A decoded structure and its plan, and what was read of the buffer it came from.

    Attributes
    ----------
    shape : tuple of int
        (R, C), the shape of the weight.
    nnz : int
        Number of stored positions: the first ``nnz`` elements of the values are in use.
    plan : spfmt.dispatch.Plan
        The compiled structure.
    structure : spfmt.formats.Structure
        The decoded structure.
    """

    __slots__ = ("_ref", "_state", "_words", "nnz", "plan", "shape", "structure")

    def __init__(self, words: Tensor) -> None:
        array: NDArray[np.int32] = words.numpy()
        self.structure: Structure = decode_structure(array)
        self.shape = self.structure.matrix_shape
        self.plan: Plan = self.structure.plan
        self.nnz = self.structure.nnz
        self._words = array.copy()
        self._ref = StorageWeakRef(words.untyped_storage())  # type: ignore[no-untyped-call]
        self._state = _state(words)
        self._tell(words)

    def is_current(self, words: Tensor) -> bool:
        """Tell whether the buffer still holds what was compiled.

        A write of the same content (DDP broadcasts buffers before every forward pass) advances the
        version; the words are compared then, which is far cheaper than compiling them again.
        """
        state = _state(words)
        if state is not None and state == self._state:
            return True
        if not np.array_equal(self._words, words.numpy()):
            return False
        self._state = state
        self._tell(words)
        return True

    def is_dead(self) -> bool:
        """Tell whether the buffer no longer exists."""
        return bool(self._ref.expired())  # type: ignore[no-untyped-call]

    def _tell(self, words: Tensor) -> None:
        """Let compiled code know which structure lies there; not of inference tensors."""
        if self._state is not None:
            _, count, version, header = self._state
            _kernels.know(words.data_ptr(), count, version, header, self.plan.capsule())


_State = tuple[int, int, int, list[int]]


def _state(words: Tensor) -> _State | None:
    """Return what shows a change of words; None for inference tensors, which count no writes."""
    if words.is_inference():
        return None
    header = words[:HEADER].tolist()
    return words.untyped_storage()._cdata, words.numel(), words._version, header


_compiled: dict[int, CompiledStructure] = {}  # by address


def compiled_structure(structure: Tensor) -> CompiledStructure:
    """Return the compiled form of a structure buffer, built at most once per content.

    Parameters
    ----------
    structure : Tensor, shape (n_words,), int32, on the CPU, contiguous

    Raises
    ------
    FormatError
        Where the words are corrupt.
    """
    address = structure.data_ptr()
    known = _compiled.get(address)
    if known is not None and not known.is_dead() and known.is_current(structure):
        return known
    sweep()
    fresh = _compiled[address] = CompiledStructure(structure)
    return fresh


def sweep() -> None:
    """Release what was compiled of buffers that no longer exist."""
    for address, entry in list(_compiled.items()):
        if entry.is_dead():
            del _compiled[address]
            _kernels.forget(address)


class Constant:
    """A promise that a tensor of values is not written for as long as this object lives.

    Parameters
    ----------
    values : Tensor, shape (capacity,), on the CPU, contiguous
        Held by this object and shown to products only. Writes that advance its version counter end
        the promise; products then compare the values as usual.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._address = values.data_ptr()
        if not values.is_inference() and self._address:
            _kernels.promise(self._address, values.numel(), values._version, new_version())

    def __deepcopy__(self, memo: dict[int, Any]) -> Constant:
        return Constant(self.values.clone())

    def __reduce__(self) -> tuple[Any, ...]:
        return Constant, (self.values,)

    def __del__(self) -> None:
        # The tensor lives until here, so its address can have been given to no other.
        _kernels.retract(self._address)


def _connect() -> bool:
    """Give the compiled code what it knows torch by; tell whether this torch has all of it."""
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):  # torch 2.10 brought it
        _log.info("torch %s has no DLPack table of functions: calls cost more", torch.__version__)
        return False
    empty: Any = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)
    if empty is None:

        def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")

    _kernels.use_torch(Tensor, nn.Parameter, compiled_structure, empty)
    return True


_connected = _connect()


def multiply(
    op: int,
    values: Tensor,
    structure: Tensor,
    x: Tensor,
    bias: Tensor | None,
    shape: Any,
    activation: int = 0,
    out: Tensor | None = None,
) -> Tensor | None:
    """Compute spmm or spmm_t in one compiled call that torch's dispatcher knows nothing of.

    Parameters
    ----------
    op : int
        `SPMM` or `SPMM_T`.
    values, structure, x, bias, shape
        As for :func:`spfmt.torch.spmm`.
    activation : int
        :func:`spfmt.activations.activation_code`.
    out : Tensor, optional
        Receives the result, (B, R) or (B, C); otherwise it is allocated.

    Returns
    -------
    Tensor or None
        None wherever something is not plain: another dtype, layout, device or class of tensor,
        operands that do not fit together, a lazily negated view, inference tensors. The caller then
        goes the long way, which computes or says what is wrong.

    Raises
    ------
    FormatError
        Where the structure is corrupt.
    """
    if _debug(logging.DEBUG):  # the long way logs which kernel runs
        return None
    y: Tensor | None = _kernels.multiply_tensors(
        op, values, structure, x, bias, shape, activation, out, threads._override
    )
    return y


def sample(
    structure: Tensor,
    dy: Tensor,
    x: Tensor,
    shape: Any,
    capacity: int | None,
    out: Tensor | None = None,
) -> Tensor | None:
    """Compute sddmm into `out`, or into `capacity` new elements; otherwise as `multiply`."""
    if _debug(logging.DEBUG):
        return None
    gradient: Tensor | None = _kernels.sample_tensors(
        structure, dy, x, shape, capacity, out, threads._override
    )
    return gradient
