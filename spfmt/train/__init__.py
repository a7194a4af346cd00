"""Methods that train sparse weights and change where they are; one file per method."""

from __future__ import annotations

from spfmt.torch import layer_densities  # first: says what to install where torch is missing
from spfmt.train.base import SparseTrainer
from spfmt.train.dsb import DNSB, DSB, SSB
from spfmt.train.gradient import GradientTrainer
from spfmt.train.gradual import GradualPruning
from spfmt.train.hrbp import HRBP
from spfmt.train.memory import Memory, workspace
from spfmt.train.observe import Observation
from spfmt.train.presets import PRESETS, Preset, Training, preset
from spfmt.train.rigl import RigL
from spfmt.train.saliency import Saliency, grasp, random_saliency, snip
from spfmt.train.sampled import SampledGrowth
from spfmt.train.schedule import CosineSchedule, CubicSchedule
from spfmt.train.set import SET
from spfmt.train.srigl import SRigL
from spfmt.train.static import Static
from spfmt.train.summary import LayerSummary, TrainerSummary

__all__ = [
    "DNSB",
    "DSB",
    "HRBP",
    "PRESETS",
    "SET",
    "SSB",
    "CosineSchedule",
    "CubicSchedule",
    "GradientTrainer",
    "GradualPruning",
    "LayerSummary",
    "Memory",
    "Observation",
    "Preset",
    "RigL",
    "SRigL",
    "Saliency",
    "SampledGrowth",
    "SparseTrainer",
    "Static",
    "TrainerSummary",
    "Training",
    "grasp",
    "layer_densities",
    "preset",
    "random_saliency",
    "snip",
    "workspace",
]
