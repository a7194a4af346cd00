"""Copies of layers, and what becomes of each when the layer's structure moves.

Values mean nothing without the structure they stand for. When a layer moves, an average of it must
move too: otherwise the next average adds up weights of different positions, and nothing shows it.
A saved copy must stay. Both began as ``copy.deepcopy``, so these are the rules.

**Relatives.** A layer, its copies and their copies are relatives, and stay so where they are
pickled in one. Where a layer and its average are copied in one, so are the copies to each other. A
layer that was built anew is a stranger, whatever was loaded into it.

A layer *stands alone* once it was moved by itself (its trainer, ``set_structure``), was told to
(``stand_alone``), or was trained: it had gradients, and somebody cleared them. It follows nobody,
and parts its relatives: who is related to another layer through it alone, as its own averages are,
is not looked at.

**When a layer moves**, its relatives are looked at before anything is written. Each one

1. that is *named*, in ``averages=`` or by ``lead``, follows: it moves as the layer does;
2. that stands alone stays;
3. that descends from the layer, and whose *structure words* somebody wrote, is kept *in step*, as
   by ``AveragedModel``. It follows where it stands on the layer's structure; else it was left
   behind earlier, and stays;
4. whose values are what they were when it was copied or loaded is a *saved state*, and stays;
5. else is *unclear*: the move is an error. An average over parameters alone, and a copy that
   somebody pruned, or trained without clearing gradients, look alike.

Where two findings contradict each other it is unclear too: a layer that was trained, and has its
words written.

**Converting** (``.to``, ``.half``) and **loading** do not count as writing. A state that is loaded
is a saved one if a relative has the same values then, as after
``best.load_state_dict(model.state_dict())``. Else it came from a file, and was an average or a
saved state there: on the layer's structure that is unclear, until rule 1 or 3 says more. What was
in step before it was loaded still is.

**Who was left behind**, and then has its words written, gets a warning in the log: a first
``update_parameters`` copies everything, which is right, and any other mixes positions. Where the
words were averaged, and so are lost, it is an error. Words that were averaged with equal ones are
off by some roundings, and are restored (`Lineage.mended`).

What nobody can see: an average of parameters that is a stranger, or begins after the last move; and
words that DDP broadcasts to a copy before it is trained, which look like those of an average.
"""

from __future__ import annotations

import logging
import weakref
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from spfmt.errors import FormatError, format_error
from spfmt.formats import Structure, encode

if TYPE_CHECKING:
    from spfmt.torch.module import SparseModule

__all__ = ["Lineage"]

_log = logging.getLogger("spfmt.torch")


class Lineage:
    """What a layer is to its relatives; the rules are those at the top of this file.

    Attributes
    ----------
    structure : Structure or None
        What the layer's values stand for, as far as it was looked at.
    """

    def __init__(self) -> None:
        self.structure: Structure | None = None
        self._layer: weakref.ref[SparseModule] | None = None
        self._parent: Lineage | None = None  # outlives its layer: it holds the relatives together
        self._copies: WeakSet[Lineage] = WeakSet()
        self._gradients = _Gradients()
        self._named = self._moves_itself = self._mended = False
        self._in_step = False  # somebody wrote its words, before `_words` was counted
        self._written = False  # somebody wrote its values, before `_values` was taken
        self._loaded = False  # with values that no relative had
        self._left = False  # a relative moved away from the structure, and this one stayed
        self._words = 0  # version of the words when it was copied, converted or loaded
        self._values: int | None = None  # checksum of its values at that time
        self._born: int | None = None  # the same when it was copied

    @classmethod
    def of(cls, layer: SparseModule, known: Lineage | None = None) -> Lineage:
        """Return the lineage of a new layer, or what was pickled with it and is nobody's yet."""
        lineage = cls() if known is None or known.layer is not None else known
        lineage._layer = weakref.ref(layer)
        lineage._begin()
        return lineage

    @property
    def layer(self) -> SparseModule | None:
        """Return the layer, if it is still there."""
        return None if self._layer is None else self._layer()

    # ------------------------------------------------------------------------- what happens to it

    def copied(self, twin: Lineage, memo: dict[int, Any]) -> None:
        """Take note of a copy; those of a layer and its average in one are to each other as these.

        Parameters
        ----------
        twin : Lineage
        memo : dict
            Of ``copy.deepcopy``.
        """
        memo[id(self)] = twin
        twin.structure = self.structure
        twin._hang_under(self)
        twin._begin()
        twin._born = twin._values
        if self._values is None:
            self._begin()
        self._watch()
        twin._watch()
        for child in (self, *self._copies):
            if id(child) in memo and id(child._parent) in memo and child._is_average:
                memo[id(child)]._hang_under(memo[id(child._parent)])
                memo[id(child)].__dict__.update(child._marks())

    @property
    def _is_average(self) -> bool:
        """Whether it is one of its parent; blocks that are repeated in a model are none."""
        parent_moves = self._parent is not None and self._parent._moves_itself
        return parent_moves and not self._alone and (self._named or self._words_written())

    def _marks(self) -> dict[str, Any]:
        """Return what is known of it, but for what was written since."""
        self.changing()
        names = ("_named", "_moves_itself", "_in_step", "_written", "_loaded", "_left", "_born")
        return {name: getattr(self, name) for name in names}

    def _hang_under(self, parent: Lineage | None) -> None:
        if self._parent is not None:
            self._parent._copies.discard(self)
        self._parent = parent
        if parent is not None:
            parent._copies.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled with a layer: an average beside its model is one afterwards."""
        return {**self._marks(), "_parent": self._parent}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state, _parent=None)
        self._hang_under(state["_parent"])

    def changing(self) -> None:
        """Settle what was written so far: conversion or loading will write everything."""
        self._in_step = self._words_written()
        self._written = self._values_written(self._checksum())
        self._begin()

    def converted(self) -> None:
        """Go on from here after a conversion."""
        self._begin()

    def loaded(self, now: Structure | None) -> None:
        """Go on from here after a state was loaded, on a structure if that can be told."""
        before, values = self.structure, self._values
        self.structure = now
        self._begin()
        others = [relative for relative, _, _ in self._relatives(everyone=True)]
        if self._values != values:
            self._written = False
            self._loaded = not any(map(self._has_values_of, others))
        self._left = self._left and not any(_same(other.structure, now) for other in others)
        self._part(before, now)

    def stand_alone(self) -> None:
        """Follow no other layer any more."""
        self._moves_itself, self._named = True, False

    def lead(self, average: Lineage) -> None:
        """Let another layer follow, whatever it was before."""
        if average is self:
            raise format_error("a model as its own average", "a copy", "make an AveragedModel")
        top = self
        while top._parent is not None and top._parent is not average:
            top = top._parent
        if top._parent is average:  # the average is the original
            top._hang_under(None)
        average._hang_under(self)
        average._named, average._moves_itself = True, False

    # --------------------------------------------------------------------------- when a layer moves

    def averages(self, old: Structure) -> list[SparseModule]:
        """Return the layers that will follow a move away from a structure.

        Raises
        ------
        FormatError
            Where that is unclear.
        """
        found = []
        for relative, child, descends in self._relatives():
            layer = relative.layer
            if layer is not None and relative._follows(child, descends, old):
                found.append(layer)
        return found

    def move(self, old: Structure, new: Structure) -> list[SparseModule]:
        """Take note of a move, and return the layers that must follow; see `averages`."""
        averages = self.averages(old)
        self._part(old, new)
        for one in (self, *(layer._lineage for layer in averages)):
            one.structure, one._left = new, False
        if averages:
            _log.info("%d averages of a layer move along", len(averages))
        return averages

    def _part(self, old: Structure | None, new: Structure | None) -> None:
        """Leave behind who stands on the old structure, and meet who stands on the new one."""
        for relative, _, _ in self._relatives():
            if _same(relative.structure, new):
                relative._left = False
            elif _same(relative.structure, old):
                relative._left = True

    def _relatives(self, everyone: bool = False) -> Iterator[tuple[Lineage, Lineage | None, bool]]:
        """Yield everyone who is related, or all as far as nobody who stands alone is between.

        With each comes its copy on the way from here, where the way goes up, and whether it
        descends from here.
        """
        seen, found = {id(self)}, self._next(True)
        while found:
            relative, child, descends = found.pop()
            if id(relative) not in seen:
                seen.add(id(relative))
                yield relative, child, descends
                if everyone or not relative._alone:
                    found += relative._next(descends)

    def _next(self, descends: bool) -> list[tuple[Lineage, Lineage | None, bool]]:
        up = [] if self._parent is None else [(self._parent, self, False)]
        return [*up, *((copied, None, descends) for copied in tuple(self._copies))]

    @property
    def _alone(self) -> bool:
        return self._moves_itself or (not self._named and self._trained)

    def _follows(self, child: Lineage | None, descends: bool, old: Structure) -> bool:
        """Tell whether this relative of a layer moves with it, by the rules."""
        in_step = not self._moves_itself and self._words_written()
        if self._alone and not in_step:
            return False
        if self._named or (in_step and (descends or self._alone)):
            on_old = self._is_on(old)
            if on_old and self._alone:
                raise _unclear("was trained, and has had its structure words written")
            return on_old
        values = self._checksum()
        if child is not None and values == child._born:
            return False
        if self._values_written(values):
            raise _unclear("has had its values written, and not its structure words")
        if self._loaded and self._is_on(old):
            raise _unclear("was loaded with other values than the model's")
        return False

    def _is_on(self, structure: Structure) -> bool:
        layer = self.layer
        if layer is None or not layer._readable:
            return False
        try:
            return layer._decoded().same_as(structure)
        except FormatError:
            return False  # its next product says what is wrong

    # ----------------------------------------------------------------------------- what was written

    def _begin(self) -> None:
        """Take words and values as they are for unwritten."""
        layer = self.layer
        self._words = 0 if layer is None else _version(layer.structure)
        self._values = self._checksum()

    def _words_written(self) -> bool:
        layer = self.layer
        return self._in_step or (layer is not None and _version(layer.structure) != self._words)

    def _values_written(self, now: int | None) -> bool:
        return self._written or (None not in (now, self._values) and now != self._values)

    def _checksum(self) -> int | None:
        """Return that of the values, if anybody cares; torch counts no writes through ``.data``."""
        layer = self.layer
        has_relatives = self._parent is not None or len(self._copies) > 0
        if layer is None or not has_relatives or not layer._readable or layer.values.is_meta:
            return None
        values = _here(layer.values).cpu()
        return zlib.crc32(values.contiguous().view(torch.uint8).numpy().data)

    def _has_values_of(self, other: Lineage) -> bool:
        if self.layer is None or other.layer is None:
            return False
        mine, others = _here(self.layer.values), _here(other.layer.values)
        if (mine.shape, mine.dtype, mine.device) != (others.shape, others.dtype, others.device):
            return False
        return mine.is_meta or torch.equal(mine, others)  # ends at the first that differs

    @property
    def _trained(self) -> bool:
        layer = self.layer
        return layer is not None and self._gradients.were_cleared(layer.values)

    def _watch(self) -> None:
        layer = self.layer
        if layer is not None and not self._moves_itself:
            self._gradients.watch(layer.values)

    # --------------------------------------------------------------------- words that were averaged

    def found(self, structure: Structure) -> None:
        """Take note of what the words stand for, whoever wrote them."""
        if self._left and not _same(structure, self.structure):
            self._left = False
            _log.warning(
                "structure words of a copy were overwritten after its original had moved: values "
                "that were averaged since then mix positions; pass averages= to the trainer"
            )
        self.structure = structure

    def mended(self, error: FormatError) -> Structure:
        """Restore words that were averaged with equal ones, whose rounding made them corrupt."""
        layer = self.layer
        if layer is None or self.structure is None or not self.is_near(layer.structure):
            raise error
        if self._left:
            raise format_error(
                "structure words that were averaged after the structure of the original had moved",
                "an average that moves along",
                "pass averages=[...] to the trainer, or average parameters and copy buffers",
            ) from error
        level = logging.DEBUG if self._mended else logging.WARNING  # once for every average
        _log.log(level, "structure words had been averaged like weights; they are restored")
        self._mended = self._in_step = True
        with torch.no_grad():
            layer.structure.copy_(_words(self.structure, layer.structure.shape[0]))
        return self.structure

    def is_near(self, words: Tensor) -> bool:
        """Tell whether words are those of the known structure, but for the rounding of averages.

        A moving average of equal words drifts from them by at most 1 / (1 - decay) roundings.
        """
        if self.structure is None:
            return False
        known = _words(self.structure, words.shape[0]).long()
        return bool(((words.cpu().long() - known).abs() <= 2 + known.abs() // 500).all())


class _Gradients:
    """Whether a layer is trained: whoever trains clears gradients, and an average's are never.

    That an average has gradients is no sign: without ``no_grad`` a loss that reads it makes some.
    """

    def __init__(self) -> None:
        self._watched: weakref.ref[Tensor] | None = None
        self._last: weakref.ref[Tensor] | None = None
        self._cleared = False

    def watch(self, values: Tensor) -> None:
        """Notice every gradient of a layer's values from now on."""
        known = self._watched is not None and self._watched() is values
        if known or not values.requires_grad or not values.is_leaf or values.is_inference():
            return
        self._watched, own = weakref.ref(values), weakref.ref(self)

        def came(values: Tensor) -> None:
            gradients = own()
            if gradients is not None:
                gradients._came(values)

        values.register_post_accumulate_grad_hook(came)  # type: ignore[no-untyped-call]

    def _came(self, values: Tensor) -> None:
        self._cleared = self.were_cleared(values)
        self._last = None if values.grad is None else weakref.ref(values.grad)

    def were_cleared(self, values: Tensor) -> bool:
        """Tell whether there was a gradient, and it is gone."""
        return self._cleared or (self._last is not None and self._last() is not values.grad)


def _unclear(reason: str) -> FormatError:
    return format_error(
        f"a copy of the layer that moves, which {reason}: an average that must move too, or not",
        "averages that are named, and other copies that stand alone",
        "pass averages= to the trainer or call its add_averages(...); if the copy is no average, "
        "call stand_alone() on its sparse layers",
    )


def _here(values: Tensor) -> Tensor:
    """Return what this rank has of values."""
    values = values.detach()
    return values.to_local() if hasattr(values, "to_local") else values


def _same(one: Structure | None, other: Structure | None) -> bool:
    return one is not None and other is not None and (one is other or one.same_as(other))


def _words(structure: Structure, size: int) -> Tensor:
    tensor = structure.tensor(np.zeros(structure.nnz, np.float32))
    return torch.from_numpy(encode(tensor, size))


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version
