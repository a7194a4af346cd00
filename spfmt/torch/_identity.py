"""From a tensor's identity to its compiled structure and to the version of its values.

A compiled structure (a :class:`spfmt.dispatch.Plan`) is expensive to build and packed values are
expensive to place, so both are reused for as long as the tensors they came from are unchanged.
"Unchanged" is decided from what a tensor *is*, never from what a module promises:

1. the storage object, held by a weak reference so that its address cannot be given to another
   storage while it is remembered here (no ABA), with data pointer, length and dtype;
2. the version counter, which every in-place operation advances: ``optimizer.step()``,
   ``load_state_dict``, ``add_`` under ``no_grad`` and under ``inference_mode``;
3. a fingerprint, because writes through ``.data``, through ``.numpy()`` or by another process do
   not advance the counter: a 64-bit hash of about 256 evenly spread elements of the values, and of
   the structure's header, in which structure words carry a checksum of their content.

The fingerprint of the values sees every write of the whole array (an EMA swap, ``.data.copy_``,
``.data.mul_``). A write through ``.data`` to a *few* elements can slip between the samples; write
under ``torch.no_grad()`` without ``.data`` instead, or call :func:`invalidate` afterwards.
Inference tensors have no counter: their structure is compared in full, and their values are never
taken for unchanged. Reading all values instead would double the time of a batch-1 product.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.multiprocessing.reductions import StorageWeakRef

from spfmt._kernels import Content, Memo, fingerprint
from spfmt.dispatch import Plan
from spfmt.formats import Structure, decode_structure, new_version

__all__ = ["CompiledStructure", "compiled_structure", "invalidate", "refresh"]

_HEADER = 4  # magic, version, length and checksum of structure words
_Key = tuple[Any, ...]


def _key(tensor: torch.Tensor, count: int) -> _Key | None:
    """Return what identifies the content of a 1-D tensor; None for an inference tensor.

    The fingerprint is that of the first `count` elements. `read_content` in bindings/tensors.cpp
    reads the same.
    """
    if tensor.is_inference():
        return None
    storage, address = tensor.untyped_storage()._cdata, tensor.data_ptr()
    itemsize = 8 if tensor.dtype is torch.float64 else 4
    sampled = fingerprint(address, count, itemsize)
    return storage, address, tensor.numel(), itemsize, tensor._version, sampled


def _weak(tensor: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


class CompiledStructure:
    """A decoded structure, its plan, and the version of the values last seen with it.

    Attributes
    ----------
    format : str
        Name of the format.
    shape : tuple of int
        (R, C), the shape of the weight.
    nnz : int
        Number of stored positions: the first ``nnz`` elements of the values are in use.
    plan : spfmt.dispatch.Plan
        The compiled structure.
    structure : spfmt.formats.Structure
        The decoded structure.
    """

    __slots__ = (
        "_key", "_known", "_memo", "_ref", "_seen", "_words",
        "format", "nnz", "plan", "shape", "structure",
    )  # fmt: skip

    def __init__(self, structure: torch.Tensor, words: NDArray[np.int32], key: _Key | None) -> None:
        self.structure: Structure = decode_structure(words)
        self.format = self.structure.cls.format
        self.shape = self.structure.shape
        self.plan: Plan = self.structure.plan
        self.nnz = self.structure.nnz
        self._ref = _weak(structure)
        self._key = key
        self._words = words.copy()
        self._seen: tuple[_Key | None, StorageWeakRef | None, int] = (None, None, 0)
        self._memo: Memo | None = None
        self._known: StorageWeakRef | None = None

    def is_current(self, key: _Key | None, structure: torch.Tensor) -> bool:
        """Tell whether the structure buffer still holds what was compiled.

        A write of the same content (DDP broadcasts buffers before every forward pass) changes the
        key; the words are compared then, which is far cheaper than compiling them again.
        """
        if key is not None and self._key == key:
            return True
        if not np.array_equal(self._words, structure.numpy()):
            return False
        self._key = key
        return True

    def is_dead(self) -> bool:
        """Tell whether the structure buffer no longer exists."""
        return bool(self._ref.expired())  # type: ignore[no-untyped-call]

    def version(self, values: torch.Tensor) -> int | None:
        """Return a number that stands for the content of `values`; None: do not reuse anything.

        Parameters
        ----------
        values : Tensor
            The values, float32 or float64 and contiguous, as the operator got them.
        """
        key = _key(values, values.numel())
        if key is None:
            return None
        seen, _, version = self._seen
        if seen == key:
            return version
        version = new_version()
        # One assignment: another thread sees the old triple or the new one, never a mixture.
        self._seen = (key, _weak(values), version)
        return version

    def publish(self, values: torch.Tensor | None) -> None:
        """Tell compiled code which tensors this structure, and a version of its values, are."""
        if self._memo is None:
            self._memo = Memo(self.plan.capsule(), self.format)
        if self._key is not None:
            self._memo.set_structure(Content(*self._key))
        if values is not None and self.version(values) is not None:
            # The storage of what compiled code knows is held, whatever is seen after it.
            key, self._known, version = self._seen
            self._memo.set_values(Content(*cast(_Key, key)), version)

    def withdraw(self) -> None:
        """Take back what `publish` told."""
        self._memo = None


def _place(tensor: torch.Tensor) -> _Key:
    return tensor.untyped_storage()._cdata, tensor.data_ptr()


_compiled: dict[_Key, CompiledStructure] = {}


def compiled_structure(structure: torch.Tensor) -> CompiledStructure:
    """Return the compiled form of a structure buffer, built at most once per content.

    Parameters
    ----------
    structure : Tensor, shape (n_words,), int32, on the CPU

    Raises
    ------
    FormatError
        Where the words are corrupt.
    """
    key = _key(structure, min(_HEADER, structure.numel()))
    place = key[:2] if key is not None else _place(structure)
    known = _compiled.get(place)
    if known is not None and known.is_current(key, structure):
        return known
    for other, entry in list(_compiled.items()):
        if entry.is_dead():
            _compiled.pop(other, None)
    fresh = _compiled[place] = CompiledStructure(structure, structure.numpy(), key)
    return fresh


def invalidate(structure: torch.Tensor) -> None:
    """Forget what is known about a structure buffer and the values that were used with it.

    Needed only after a write to a few elements through ``.data`` or ``.numpy()``.
    """
    if structure.device.type == "cpu":
        known = _compiled.pop(_place(structure), None)
        if known is not None:  # may live on: in a frame of another thread, for instance
            known.withdraw()


def refresh(structure: torch.Tensor, values: torch.Tensor | None) -> None:
    """Look at tensors again that compiled code does not recognize.

    Raises
    ------
    FormatError
        Where the words are corrupt.
    """
    compiled_structure(structure).publish(values)
