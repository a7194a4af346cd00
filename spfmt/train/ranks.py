"""Ranks that train one model must move its weights alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from spfmt.errors import format_error
from spfmt.formats import HEADER
from spfmt.torch.module import SparseModule

__all__ = ["check_ranks", "world_size"]


def world_size(group: Any) -> int:
    """Return how many ranks a process group has, None for all; 1 where there is none."""
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size(group) if ready else 1


def check_ranks(layers: Mapping[str, SparseModule], settings: tuple[int, Any], group: Any) -> None:
    """Refuse ranks with another seed, schedule or structure; all of them must call this.

    Parameters
    ----------
    layers : mapping of str to SparseModule
    settings : (seed, schedule)
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
    seed, schedule = settings
    headers = {name: layer.structure[:HEADER].tolist() for name, layer in layers.items()}
    own = {"seeds": seed, "schedules": schedule, "layers or structures": headers}
    found: list[Any] = [None] * count
    torch.distributed.all_gather_object(found, own, group)
    differing = [what for what in own if any(other[what] != own[what] for other in found)]
    if not differing:  # the same answer on every rank: each compares itself with all
        return
    raise format_error(
        f"ranks with different {' and '.join(differing)}",
        "one seed, one schedule and one structure: weights would move apart silently",
        "pass the same seed= on every rank, and sparsify with one generator seed or load one state;"
        " where ranks hold different models, pass process_group=<the ranks of this one>",
    )
