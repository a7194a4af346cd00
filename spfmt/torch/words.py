"""Which structure words on a device are, without waiting for the device at every product.

The words lie where the host cannot look without stopping both. They are known by the tensor that
holds them, its memory and its version counter, which every write that torch counts advances:
``copy_``, so ``set_structure``, ``load_state_dict``, averages and what DDP broadcasts, on detached
tensors and views, too. After such a write they are compared or read once, and the host waits for
that; :func:`spfmt.torch.values.write_structure` says what it wrote, and nothing is read.

Writes that torch does *not* count are through ``.data``, by collectives called on the buffer
itself, by replayed CUDA graphs, by other libraries on the same memory. Of these nothing tells but
the words. Therefore their header, which stands for all of them, comes to the host now and then
behind the products, and a product that finds another one arrived raises. This is late, not never:
products of `EVERY` seconds and more may have used the structure before. A layer's structure is
moved by ``set_structure``; who writes otherwise, writes with ``copy_``.

What a graph captured stays what it was: capture again after a structure moved.
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from spfmt.errors import DeviceError, FormatError, format_error
from spfmt.formats import HEADER, Structure, decode_structure

__all__ = ["EVERY", "Structures", "is_capturing", "structures"]

EVERY = 0.1
"""Seconds from one look at words that nobody is known to have written to the next."""

Arrival = Callable[[], Tensor | None]


def is_capturing() -> bool:
    """Tell whether the current CUDA stream is being captured in a graph."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and torch.cuda.is_current_stream_capturing()


def _send(words: Tensor) -> Arrival:
    """Send the header to the host, and return what gives it once it is there."""
    if words.device.type != "cuda":
        header = words[:HEADER].cpu()
        return lambda: header
    with torch.cuda.device(words.device):
        header = torch.empty(HEADER, dtype=torch.int32, pin_memory=True)
        header.copy_(words[:HEADER], non_blocking=True)
        there: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record()
    return lambda: header if there.query() else None


class _Known:
    """The structure of one tensor of words, and what shows that they are still those."""

    def __init__(
        self, words: Tensor, structure: Structure, header: list[int], end: Callable[[Any], None]
    ) -> None:
        self.structure = structure
        self._words = weakref.ref(words, end)
        self._storage = StorageWeakRef(words.untyped_storage())  # type: ignore[no-untyped-call]
        self._header = header
        self._twin: Tensor | None = None  # the words, where they are written as they were
        self._settle(words)

    def _settle(self, words: Tensor) -> None:
        """Take the words, as they are now, for those of the structure."""
        self._state = _state(words)
        self._sent: Arrival | None = None
        self._looked = time.monotonic()

    def is_of(self, words: Tensor) -> bool:
        """Tell whether this is about that tensor, and not about one before it at its address."""
        return self._words() is words

    def is_unwritten(self, words: Tensor) -> bool:
        """Tell whether memory and version are those of the words that were read."""
        return self._state is not None and self._state == _state(words)

    def is_equal(self, words: Tensor) -> bool:
        """Tell whether words are what they were, on the device; waits for it."""
        if self._twin is None or not torch.equal(self._twin, words):
            return False
        self._settle(words)
        return True

    def keep_twin(self, words: Tensor) -> None:
        """Take words that were read for those of the structure, and keep them to compare with."""
        self._twin = words.detach().clone()
        self._settle(words)

    def is_as_sent(self, words: Tensor, capturing: Callable[[], bool]) -> bool:
        """Let the header come now and then; tell whether that of the last time is the known one."""
        now = time.monotonic()
        if now - self._looked < EVERY or capturing():
            return True
        if self._sent is None:
            self._sent = _send(words)
        header = self._sent()
        if header is None:
            return True
        self._sent, self._looked = None, now
        return header.tolist() == self._header


_State = tuple[int, int, int, int]


def _state(words: Tensor) -> _State | None:
    """Return what shows a write that torch counts; None for inference tensors, which count none."""
    if words.is_inference():
        return None
    return words.untyped_storage()._cdata, words.data_ptr(), words.numel(), words._version


class Structures:
    """The structures of words on devices.

    Parameters
    ----------
    capturing : callable
        Tells whether a graph is being captured, in which nothing can be read.
    """

    def __init__(self, capturing: Callable[[], bool] = is_capturing) -> None:
        self._capturing = capturing
        self._known: dict[int, _Known] = {}  # by id of the tensor

    def of(self, words: Tensor) -> Structure:
        """Return the structure of words, which are read once after every write that torch counts.

        Parameters
        ----------
        words : Tensor, shape (n_words,), int32, on any device

        Raises
        ------
        FormatError
            Where the words are corrupt, or were written uncounted.
        DeviceError
            Where they would have to be read while a graph is captured.
        """
        known = self._known.get(id(words))
        if known is not None and not known.is_of(words):
            known = None
        if known is not None and known.is_unwritten(words):
            if known.is_as_sent(words, self._capturing):
                return known.structure
            del self._known[id(words)]
            raise _written_uncounted(words)
        if self._capturing():
            raise _unread(words)
        if known is not None and known.is_equal(words):
            return known.structure
        return self._read(words, known)

    def know(self, words: Tensor, structure: Structure, written: Any) -> None:
        """Learn what has just been written to words.

        Parameters
        ----------
        words : Tensor, shape (n_words,), int32
        structure : Structure
        written : ndarray of int32, shape (n_words,)
            What :func:`spfmt.formats.encode` made of it.
        """
        end = functools.partial(self._forget, id(words))
        self._known[id(words)] = _Known(words, structure, written[:HEADER].tolist(), end)

    def _read(self, words: Tensor, known: _Known | None) -> Structure:
        array = words.detach().cpu().numpy()
        structure = decode_structure(array)  # at once, where it is alive
        if known is not None and known.structure is structure:
            known.keep_twin(words)
        else:
            self.know(words, structure, array)
        return structure

    def _forget(self, number: int, dying: weakref.ref[Tensor]) -> None:
        known = self._known.get(number)
        if known is not None and known._words is dying:
            self._known.pop(number, None)


def _unread(words: Tensor) -> DeviceError:
    fix = "call the model once before the capture, and again after its structures moved"
    if words.is_inference():
        fix = "make the model outside torch.inference_mode(): tensors made inside count no writes"
    return DeviceError(
        f"got a structure on {words.device} that is not known while a CUDA graph is captured; "
        f"expected one that was read before: a capture cannot wait for the device; fix: {fix}"
    )


def _written_uncounted(words: Tensor) -> FormatError:
    return format_error(
        f"structure words on {words.device} that changed without torch counting a write; products "
        f"of up to {EVERY} s before this one used the structure before",
        "words written through their tensor",
        "move layers with set_structure, write words with copy_ and not through .data, and after a "
        "collective on the buffer call torch.autograd.graph.increment_version(buffer)",
    )


structures = Structures()
"""Those of all CUDA devices."""
