"""Structures in a device's memory, as the CUDA kernels want them: each uploaded once per device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from spfmt.convolution import Convolution
from spfmt.cuda import library, plan
from spfmt.errors import DeviceError
from spfmt.formats import Groups, Structure
from spfmt.torch.words import is_capturing

__all__ = ["Device", "Uploaded", "Uploads"]


class Device:
    """What products ask of torch about CUDA devices; tests on the CPU answer otherwise.

    Parameters
    ----------
    kernels : spfmt.cuda.library.Library
    """

    kind = "cuda"

    def __init__(self, kernels: library.Library) -> None:
        self.kernels = kernels

    @contextlib.contextmanager
    def current(self, device: torch.device) -> Iterator[None]:
        """Make a device the current one, on which kernels run: torch's and the library's."""
        with torch.cuda.device(device):
            self.kernels.call("use", device.index)
            yield

    def stream(self, device: torch.device) -> int:
        """Return the handle of a device's current stream: asked at every call, it changes."""
        return int(torch.cuda.current_stream(device).cuda_stream)

    def is_capturing(self) -> bool:
        """Tell whether that stream is being captured in a graph."""
        return is_capturing()

    def processors(self, device: torch.device) -> int:
        """Return how many multiprocessors a device has."""
        return int(torch.cuda.get_device_properties(device).multi_processor_count)

    def has_wgmma(self, device: torch.device) -> bool:
        """Tell whether a device has Hopper's instructions, which no later one has."""
        return torch.cuda.get_device_capability(device) == (9, 0)

    def keep_for_stream(self, tensor: Tensor) -> None:
        """Let the memory of a tensor that dies wait for the current stream of its device."""
        tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def allows_tf32(self) -> bool:
        """Tell whether products of float32 may round their operands to TF32, as torch's may."""
        matmul = torch.backends.cuda.matmul
        precision = getattr(matmul, "fp32_precision", None)  # from torch 2.9 on; excludes the other
        return bool(matmul.allow_tf32 if precision is None else precision == "tf32")


@dataclass
class Uploaded:
    """A struct of ``cuda/api.h`` and the tensors that it points to.

    Attributes
    ----------
    struct : library.Tiles, library.Lists or None
    tensors : tuple of Tensor
    streams : set of int
        Handles of the streams that may use the tensors.
    """

    struct: Any
    tensors: tuple[Tensor, ...]
    streams: set[int] = field(default_factory=set)


class Uploads:
    """What of structures lies on devices.

    Freed with its structure, unless a graph captured it: a graph reads at the addresses it saw, so
    what it saw stays for as long as this object.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._of: WeakKeyDictionary[Structure, dict[Any, Uploaded]] = WeakKeyDictionary()
        self._captured: dict[int, Uploaded] = {}  # by id

    def get(
        self,
        structure: Structure,
        transposed: bool,
        place: torch.device,
        how: Convolution | None = None,
    ) -> Uploaded:
        """Return tiles of groups, or lists or their transpose, for the current stream.

        With a convolution these are the tiles of its weight.

        Raises
        ------
        DeviceError
            Where they would have to be uploaded while a graph is captured.
        """
        tiles = isinstance(structure.layout, Groups)
        turned = transposed and not tiles
        make: Any = _tiles if tiles else _transposed if turned else _lists
        if how is not None:
            make = functools.partial(_conv_tiles, how=how)
        return self._uploaded(structure, (turned, how), make, place)

    def positions(self, structure: Structure, place: torch.device) -> Tensor:
        """Return where values lie in the weight, as one number each; errors as for `get`."""
        found = self._uploaded(structure, _positions, _positions, place)
        return found.tensors[0]

    def _uploaded(
        self, structure: Structure, what: Any, make: Callable[..., Uploaded], place: torch.device
    ) -> Uploaded:
        known = self._of.setdefault(structure, {})
        found = known.get((what, place))
        capturing = self._device.is_capturing()
        if found is None:
            if capturing:
                raise _not_there(place)
            found = known[what, place] = make(structure.layout, place)
            found.streams.add(self._device.stream(place))
        elif self._device.stream(place) not in found.streams:
            found.streams.add(self._device.stream(place))
            for tensor in found.tensors:
                self._device.keep_for_stream(tensor)
        if capturing:
            self._captured[id(found)] = found
        return found


def _not_there(place: torch.device) -> DeviceError:
    return DeviceError(
        f"got a structure that is not on {place} while a CUDA graph is captured; expected one that "
        "was uploaded before; fix: run what is captured once before the capture, backward passes "
        "too, and again after structures moved"
    )


def _on(place: torch.device, *arrays: Any) -> tuple[Tensor, ...]:
    """Copy arrays; when this returns they are there for every stream."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(array, device=place) for array in arrays)


def _tiles(groups: Groups, place: torch.device) -> Uploaded:
    return _of_tiles(plan.device_tiles(groups, plan.tile_rows(groups)), place)


def _positions(layout: Any, place: torch.device) -> Uploaded:
    return Uploaded(None, _on(place, layout.flat_indices()))


def _conv_tiles(groups: Any, place: torch.device, how: Convolution) -> Uploaded:
    return _of_tiles(plan.conv_tiles(groups, plan.tile_rows(groups), how), place)


def _of_tiles(made: plan.DeviceTiles, place: torch.device) -> Uploaded:
    tap = np.zeros(0, np.int64) if made.tap is None else made.tap.view("i8")
    tensors = _on(
        place, made.tile.view("i8"), made.row_perm, made.col_indices, tap, made.ascending,
        made.sorted_cols, made.piece.view("i8"), made.piece_ptr,
    )  # fmt: skip
    sizes = made.rows, made.cols, made.tile.size, made.most_rows, made.most_cols, made.chunk
    return Uploaded(library.Tiles(*sizes, *(t.data_ptr() for t in tensors)), tensors)


def _of_lists(made: plan.DeviceLists, place: torch.device) -> Uploaded:
    source = () if made.source is None else (made.source,)
    tensors = _on(place, made.indptr, made.col_indices, *source)
    struct = library.Lists(made.rows, made.cols, *(t.data_ptr() for t in tensors))
    return Uploaded(struct, tensors)


def _lists(lists: Any, place: torch.device) -> Uploaded:
    return _of_lists(plan.device_lists(lists), place)


def _transposed(lists: Any, place: torch.device) -> Uploaded:
    return _of_lists(plan.transposed_lists(lists), place)
