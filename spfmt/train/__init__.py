"""Methods that train sparse weights and change where they are; one file per method."""

from __future__ import annotations

from spfmt.torch import layer_densities  # first: says what to install where torch is missing
from spfmt.train.base import SparseTrainer
from spfmt.train.dsb import DNSB, DSB, SSB
from spfmt.train.observe import Observation
from spfmt.train.schedule import CosineSchedule
from spfmt.train.set import SET
from spfmt.train.summary import LayerSummary, TrainerSummary

__all__ = [
    "DNSB",
    "DSB",
    "SET",
    "SSB",
    "CosineSchedule",
    "LayerSummary",
    "Observation",
    "SparseTrainer",
    "TrainerSummary",
    "layer_densities",
]
