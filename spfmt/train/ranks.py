"""Ranks that train one model must move its weights alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spfmt.errors import format_error
from spfmt.formats import HEADER, SparseTensor, decode_structure, encode

__all__ = ["agreed", "check_ranks", "world_size"]


def world_size(group: Any) -> int:
    """Return how many ranks a process group has, None for all; 1 where there is none."""
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size(group) if ready else 1


def check_ranks(layers: Mapping[str, Any], settings: Mapping[str, Any], group: Any) -> None:
    """Refuse ranks with other options or structures; all of them must call this.

    Parameters
    ----------
    layers : mapping of str to nn.Module
        With a buffer `structure`.
    settings : mapping of str to Any
        What a method was made with; numbers, texts and dataclasses are compared.
    group : ProcessGroup or None
        The ranks to compare; None for all.

    Raises
    ------
    FormatError
        On every rank, and says what differs.
    """
    count = world_size(group)
    if count == 1:
        return
    plain = {
        name.strip("_"): value
        for name, value in settings.items()
        if isinstance(value, int | float | str | tuple) or dataclasses.is_dataclass(value)
        if name != "report"  # it tells of layers, which are compared themselves
    }
    headers = {name: layer.structure[:HEADER].tolist() for name, layer in layers.items()}
    own = {**plain, "layers or structures": headers}
    found: list[Any] = [None] * count
    torch.distributed.all_gather_object(found, own, group)
    differing = [what for what in own if any(other.get(what) != own[what] for other in found)]
    if not differing:  # the same answer on every rank: each compares itself with all
        return
    raise format_error(
        f"ranks with different {' and '.join(differing)}",
        "the same on every rank: weights would move apart silently",
        "pass the same seed= and options on every rank, and sparsify with one generator seed or "
        "load one state; where ranks hold different models, pass process_group=<this one's ranks>",
    )


def agreed(
    structure: SparseTensor, forgotten: NDArray[np.int64], group: Any
) -> tuple[SparseTensor, NDArray[np.int64]]:
    """Return the first rank's choice on every rank.

    Weights and scores of the ranks are equal up to what their processors round differently, and
    where two of them are nearly equal that decides.
    """
    if world_size(group) == 1:
        return structure, forgotten
    chosen: list[Any] = [encode(structure), forgotten]
    torch.distributed.broadcast_object_list(chosen, group_src=0, group=group)
    found = decode_structure(chosen[0])
    return found.tensor(np.zeros(found.nnz, structure.dtype)), chosen[1]
