"""Ranks that train one model must move its weights alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spfmt.errors import format_error
from spfmt.formats import HEADER
from spfmt.torch.module import SparseModule

__all__ = ["check_ranks"]


def check_ranks(
    model: nn.Module, layers: Mapping[str, SparseModule], settings: Any, group: Any = None
) -> None:
    """Refuse ranks with another seed, schedule or structure; all of them must call this.

    Parameters
    ----------
    model : nn.Module
        Perhaps in DDP, which knows its process group.
    layers : mapping of str to SparseModule
    settings : (seed, schedule)
    group : ProcessGroup, optional
        The ranks to compare; by default DDP's, and else all.

    Raises
    ------
    FormatError
        On every rank, and says what differs.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    group = group if group is not None else getattr(model, "process_group", None)
    if distributed.get_world_size(group) == 1:
        return
    seed, schedule = settings
    headers = {name: layer.structure[:HEADER].tolist() for name, layer in layers.items()}
    own = {"seeds": seed, "schedules": schedule, "layers or structures": headers}
    found: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(found, own, group)
    differing = [what for what in own if any(other[what] != own[what] for other in found)]
    if not differing:  # the same answer on every rank: each compares itself with all
        return
    raise format_error(
        f"ranks with different {' and '.join(differing)}",
        "one seed, one schedule and one structure: weights would move apart silently",
        "pass the same seed= on every rank, and sparsify with one generator seed or load one state;"
        " where ranks hold different models, pass process_group=<the ranks of this one>",
    )
