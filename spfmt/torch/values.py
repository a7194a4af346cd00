"""What lies in which memory: structures that were compiled, and values that stay as they are.

A product multiplies with the values as they are in memory, whoever wrote them and however: an
optimizer (fused or not), ``.data``, a view, numpy on the same memory, another process. Nothing that
a tensor tells about itself proves that they are unchanged: its version counter does not advance
with all of these. So there are two ways:

*Changing values*, which is what a module has. Kernels read them where they lie, or compare them
whole with what they packed last, at the speed of memory (``cpp/core/packed.h``). Where autograd
records a product for them, they will be written before the next one: they are read where they lie.

*Constant values*, whose owner promises that nobody writes them, by holding a `Constant`: a frozen
module does. Their packed copies are reused without a look; a counted write ends the promise.

A *structure* is known by the header of its words, which holds a 64-bit hash of them all, by its
address and its version counter. Where one of these differs, the words are read again. On other
devices that would stop both: :mod:`spfmt.torch.words` says what is done there.
"""

from __future__ import annotations

import atexit
import functools
import logging
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from spfmt import _kernels, threads
from spfmt._memory import empty_aligned
from spfmt.dispatch import Plan
from spfmt.formats import HEADER, Structure, decode_structure, new_version
from spfmt.torch.words import structures

__all__ = [
    "SPMM",
    "SPMM_T",
    "WRITTEN",
    "CompiledStructure",
    "Constant",
    "compiled_structure",
    "multiply",
    "sample",
    "write_structure",
]

Words = NDArray[np.int32]

SPMM, SPMM_T = 0, 1
WRITTEN: int = _kernels.WRITTEN  # `constant` of values that are written before each product

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

    __slots__ = ("_end", "_ref", "_state", "_words", "nnz", "plan", "shape", "structure")

    def __init__(self, words: Tensor, written: tuple[Words, Structure] | None = None) -> None:
        array: NDArray[np.int32] = words.numpy()
        self._words, self.structure = written or (array.copy(), decode_structure(array))
        self.shape = self.structure.matrix_shape
        self.plan: Plan = self.structure.plan
        self.nnz = self.structure.nnz
        self._ref = StorageWeakRef(words.untyped_storage())  # type: ignore[no-untyped-call]
        self._end = weakref.ref(words, functools.partial(_release, words.data_ptr()))
        self._state = _state(words)
        self._tell(words)

    def is_current(self, words: Tensor) -> bool:
        """Tell whether the buffer still holds what was compiled.

        A write of the same content (DDP broadcasts buffers before every forward pass) advances the
        version; the words are compared then, which is far cheaper than compiling them again.
        """
        state = _state(words)
        unwritten = state is not None and state == self._state
        if not unwritten and not np.array_equal(self._words, words.numpy()):
            return False
        self._state = state
        self._tell(words)
        return True

    def is_dead(self, users: int = 0) -> bool:
        """Tell whether at most so many objects still use the memory of the buffer."""
        return bool(torch._C._storage_Use_Count(self._ref.cdata) <= users)

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
atexit.register(_compiled.clear)  # tensors that die later find modules half taken down


def write_structure(buffer: Tensor, words: Words, structure: Structure) -> None:
    """Write a structure's words into a buffer, whose content then needs no decoding.

    Parameters
    ----------
    buffer : Tensor, shape (n_words,), int32
    words : ndarray of int32, shape (n_words,)
        What :func:`spfmt.formats.encode` has just made of the structure; not to be written again.
    structure : Structure
    """
    with torch.no_grad():
        buffer.copy_(torch.from_numpy(words))
    if buffer.device.type == "cpu" and buffer.is_contiguous():
        fresh = CompiledStructure(buffer, (words, structure))
        _compiled[buffer.data_ptr()] = fresh
    elif buffer.device.type == "cuda":
        structures.know(buffer, structure, words)


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
    for place in list(_compiled):
        _release(place)
    fresh = _compiled[address] = CompiledStructure(structure)
    return fresh


def _release(address: int, dying: weakref.ref[Tensor] | None = None) -> None:
    """Forget a structure whose buffer is gone, or goes with the tensor that is dying just now.

    A tensor may die at any allocation, so this may run between any two steps of the code above.
    """
    users = 0 if dying is None else 2  # the tensor, and torch's Python object of its storage
    entry = _compiled.get(address)
    if entry is not None and entry.is_dead(users):
        _compiled.pop(address, None)
        _kernels.forget(address)


class Constant:
    """Values that stay as they are for as long as this object lives, which products are told.

    Writes that torch counts are seen and end the promise; products then compare the values as
    usual. The memory is this object's own and not torch's to move or to hand on: another tensor
    cannot come to lie there.

    Parameters
    ----------
    values : Tensor, shape (capacity,), on any device
        Copied. Only values on the CPU have kernels that profit from the promise.

    Attributes
    ----------
    values : Tensor, shape (capacity,)
        The copy, for products.
    """

    def __init__(self, values: Tensor) -> None:
        with torch.inference_mode(False):  # inference tensors count no writes
            if values.device.type != "cpu":
                self.values, self._memory = values.detach().clone(), None
                return
            self._memory = empty_aligned(values.numel() * values.element_size(), np.uint8)
            self.values = torch.from_numpy(self._memory).view(values.dtype)
            self.values.copy_(values.detach())
        if self._memory.size:
            self._address = self.values.data_ptr()
            count, version = self.values.numel(), self.values._version
            _kernels.promise(self._address, count, version, new_version())

    def __deepcopy__(self, memo: dict[int, Any]) -> Constant:
        return Constant(self.values)

    def __reduce__(self) -> tuple[Any, ...]:
        return Constant, (self.values.clone(),)  # to send a tensor moves it to shared memory

    def __del__(self) -> None:
        if hasattr(self, "_address"):
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
    written: bool = False,
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
    written : bool
        Whether the values are written before each product, as in training: to pack them for a small
        batch would then cost more than it gains.

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
        op, values, structure, x, bias, shape, activation, out, threads._override, written
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
