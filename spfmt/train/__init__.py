"""Methods that train sparse weights and change where they are; one file per method."""

from __future__ import annotations

from spfmt.torch import layer_densities  # first: says what to install where torch is missing
from spfmt.train.base import SparseTrainer
from spfmt.train.decorrelation import Decorrelation, decorrelation_times
from spfmt.train.dsb import DNSB, DSB, SSB
from spfmt.train.gradient import GradientTrainer
from spfmt.train.gradual import GradualPruning
from spfmt.train.hrbp import HRBP
from spfmt.train.lottery import Lottery
from spfmt.train.memory import Memory, workspace
from spfmt.train.observe import Observation
from spfmt.train.presets import PRESETS, Preset, Training, preset
from spfmt.train.rewire import Rewire
from spfmt.train.rigl import RigL
from spfmt.train.saliency import Saliency, grasp, random_saliency, snip
from spfmt.train.sampled import SampledGrowth
from spfmt.train.schedule import CosineSchedule, CubicSchedule, IntervalSchedule
from spfmt.train.set import SET
from spfmt.train.small import small, small_width
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
    "Decorrelation",
    "GradientTrainer",
    "GradualPruning",
    "IntervalSchedule",
    "LayerSummary",
    "Lottery",
    "Memory",
    "Observation",
    "Preset",
    "Rewire",
    "RigL",
    "SRigL",
    "Saliency",
    "SampledGrowth",
    "SparseTrainer",
    "Static",
    "TrainerSummary",
    "Training",
    "decorrelation_times",
    "grasp",
    "layer_densities",
    "preset",
    "random_saliency",
    "small",
    "small_width",
    "snip",
    "workspace",
]
