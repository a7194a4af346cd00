"""Methods that train sparse weights and change where they are; one file per method."""

from __future__ import annotations

from spfmt.torch import layer_densities  # first: says what to install where torch is missing
from spfmt.train.base import LayerSummary, SparseTrainer, TrainerSummary
from spfmt.train.schedule import CosineSchedule
from spfmt.train.set import SET

__all__ = [
    "SET",
    "CosineSchedule",
    "LayerSummary",
    "SparseTrainer",
    "TrainerSummary",
    "layer_densities",
]
