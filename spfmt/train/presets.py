"""The papers' settings by name: method, format, layer densities, and the run they belong to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from spfmt.errors import format_error
from spfmt.torch.sparsify import Distribution
from spfmt.train.base import SparseTrainer
from spfmt.train.dsb import DNSB, DSB, SSB
from spfmt.train.hrbp import HRBP
from spfmt.train.rewire import Rewire
from spfmt.train.rigl import RigL
from spfmt.train.set import SET
from spfmt.train.srigl import SRigL
from spfmt.train.static import Static

__all__ = ["PRESETS", "Preset", "Training", "preset"]

_CIFAR, _IMAGENET = 50_000, 1_281_167  # images to train on


@dataclass(frozen=True)
class Training:
    """The run of a paper; what the paper does not say is None, and torch's default.

    Attributes
    ----------
    data : str
    images : int
        To train on, in an epoch.
    epochs : int
    batch_size : int
    learning_rate : float
        The largest.
    drops : tuple of float
        Epochs after which the learning rate is multiplied by `factor`.
    factor : float
    warmup : int
        Epochs in which the learning rate grows to the largest, from `warmup_from` of it.
    warmup_from : float
    cosine : bool
        Whether it falls to zero along a cosine after the warm-up, in place of drops.
    optimizer_class : type of torch.optim.Optimizer
    momentum : float, optional
    nesterov : bool
    weight_decay : float, optional
    label_smoothing : float
    clip_norm : float, optional
        Of the gradients.
    """

    data: str
    images: int
    epochs: int
    batch_size: int
    learning_rate: float
    drops: tuple[float, ...] = ()
    factor: float = 1.0
    warmup: int = 0
    warmup_from: float = 0.0
    cosine: bool = False
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.SGD
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float | None = None
    label_smoothing: float = 0.0
    clip_norm: float | None = None

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return round(self.epochs * self.images / self.batch_size)

    def optimizer(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        """Make the optimizer for parameters, or groups of them."""
        options: dict[str, Any] = {"lr": self.learning_rate}
        if self.momentum is not None:
            options |= {"momentum": self.momentum, "nesterov": self.nesterov}
        if self.weight_decay is not None:
            options["weight_decay"] = self.weight_decay
        return self.optimizer_class(params, **options)

    def share(self, done: float) -> float:
        """Return the share of the largest learning rate where a share of the run is done."""
        epoch = done * self.epochs
        if epoch < self.warmup:
            return self.warmup_from + (1.0 - self.warmup_from) * epoch / self.warmup
        if self.cosine:
            left = (epoch - self.warmup) / (self.epochs - self.warmup)
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, left)))
        return float(self.factor ** sum(epoch >= drop for drop in self.drops))

    def scheduler(
        self, optimizer: torch.optim.Optimizer, total_steps: int | None = None
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """Make the learning rate's schedule; step it after every step of the optimizer.

        Parameters
        ----------
        optimizer : torch.optim.Optimizer
        total_steps : int, optional
            Of a run that is shorter or longer than the paper's: all epochs stretch with it.
        """
        steps = self.steps if total_steps is None else total_steps
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.share(step / steps))


@dataclass(frozen=True)
class Preset:
    """A method as a paper runs it.

    Attributes
    ----------
    name, source : str
    method : type of SparseTrainer, or Rewire
    format : str
    training : Training
    params : mapping
        Of the format.
    options : mapping
        Of the method, without its schedule's end.
    t_end : int or float, optional
        Where updates end: a step of the paper's run or a share of it; None for methods without.
    distribution : {"erk", "uniform"}
    """

    name: str
    source: str
    method: type[SparseTrainer] | type[Rewire]
    format: str
    training: Training
    params: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    t_end: int | float | None = None
    distribution: Distribution = "erk"

    def __post_init__(self) -> None:
        for name in ("params", "options"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def make(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        density: float | Mapping[str, float] | None = None,
        sparsity: float | None = None,
        total_steps: int | None = None,
        **changes: Any,
    ) -> SparseTrainer | Rewire:
        """Make the method for a model and its optimizer.

        Parameters
        ----------
        model, optimizer, density, sparsity
            As for :class:`SparseTrainer`; without a density the model is sparse already.
        total_steps : int, optional
            Of a run that is shorter or longer than the paper's: updates end at the same share of
            it. Steps between updates stay; change `delta_t` where they shall not.
        **changes
            Options that go before the preset's.

        Returns
        -------
        SparseTrainer or Rewire

        Examples
        --------
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 32))
        >>> optimizer = preset("dsb-cifar").training.optimizer(model.parameters())
        >>> method = preset("dsb-cifar").make(model, optimizer, density=0.2, total_steps=1000)
        >>> method.schedule
        CosineSchedule(alpha=0.3, delta_t=100, t_end=768)
        """
        given = {"density": density, "sparsity": sparsity}
        start: dict[str, Any] = {}
        if density is not None or sparsity is not None:
            start = {**given, "format": self.format, **self.params}
            if not isinstance(density, Mapping):
                start["distribution"] = self.distribution
        steps = self.training.steps if total_steps is None else total_steps
        end = {} if self.t_end is None else {"t_end": round(self.end * steps)}
        options = {**self.options, **end, "total_steps": steps, **start, **changes}
        return self.method(model, optimizer, **options)

    @property
    def end(self) -> float:
        """Share of the run after which updates end; all of it for methods without."""
        if self.t_end is None or isinstance(self.t_end, float):
            return 1.0 if self.t_end is None else self.t_end
        return self.t_end / self.training.steps


def preset(name: str) -> Preset:
    """Return the settings of a paper.

    Parameters
    ----------
    name : str
        One of :data:`PRESETS`: ``"dsb-cifar"``, for instance.

    Returns
    -------
    Preset

    Raises
    ------
    FormatError
        For another name; lists those that there are.

    Examples
    --------
    >>> found = preset("dsb-cifar")
    >>> found.method.__name__, found.format, dict(found.params)
    ('DSB', 'shuffled_block', {'block_shape': (16, 16)})
    >>> found.training.epochs, found.training.batch_size, found.training.learning_rate
    (250, 128, 0.1)
    """
    if name not in PRESETS:
        raise format_error(
            f"preset {name!r}", f"one of {', '.join(sorted(PRESETS))}", "use one of these names"
        )
    return PRESETS[name]


def _like(base: Preset, name: str, **changes: Any) -> Preset:
    return dataclasses.replace(base, name=name, **changes)


# ------------------------------------------------------------------------------------------- DSB

_DSB = "Jiang, Hu and Song, NeurIPS 2022, section 6"

# "The learning rate is initialized to 0.1 and is decreased by a factor of 5 every 30,000
# iterations": 30 000 · 128 / 50 000 = 76.8 epochs. The paper names no weight decay.
_EVERY_30_000 = (76.8, 153.6, 230.4)
_DSB_CIFAR = Preset(
    name="dsb-cifar",
    source=_DSB,
    method=DSB,
    format="shuffled_block",
    params={"block_shape": (16, 16)},  # "block size 16 achieves a good tradeoff"
    options={"alpha": 0.3, "delta_t": 100},
    t_end=75_000,
    training=Training(
        data="CIFAR-10/100", images=_CIFAR, epochs=250, batch_size=128, learning_rate=0.1,
        drops=_EVERY_30_000, factor=0.2, momentum=0.9,
    ),
)  # fmt: skip
# "A linear warm up reaching its maximum value of 0.1 at epoch 5 which is then dropped by a factor
# of 10 at epochs 30, 70, 90."
_DSB_IMAGENET = _like(
    _DSB_CIFAR,
    "dsb-imagenet",
    options={"alpha": 0.3, "delta_t": 1600},
    t_end=400_000,
    training=Training(
        data="ImageNet", images=_IMAGENET, epochs=100, batch_size=256, learning_rate=0.1,
        drops=(30, 70, 90), factor=0.1, warmup=5, momentum=0.9,
    ),
)  # fmt: skip

# ------------------------------------------------------------------------------------------ RigL

# Evci et al., ICML 2020, section 4 and appendices; what they leave out is from the authors' code
# (google-research/rigl): Nesterov momentum, 97 656 steps on CIFAR-10, drops at 30, 60 and 90
# thousand, weight decay 5e-4.
_RIGL = "Evci et al., ICML 2020, and the authors' code"
_RIGL_CIFAR = Preset(
    name="rigl",
    source=_RIGL,
    method=RigL,
    format="csr",
    options={"alpha": 0.3, "delta_t": 100},
    t_end=75_000,
    training=Training(
        data="CIFAR-10", images=_CIFAR, epochs=250, batch_size=128, learning_rate=0.1,
        drops=_EVERY_30_000, factor=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4,
    ),
)  # fmt: skip
# 32 000 steps of 4096 images, learning rate 1.6 after five epochs of warm-up, drops by ten at
# epochs 30, 70 and 90, weight decay 1e-4, label smoothing 0.1, T_end = 25 000.
_RIGL_IMAGENET = _like(
    _RIGL_CIFAR,
    "rigl-imagenet",
    t_end=25_000,
    training=Training(
        data="ImageNet", images=_IMAGENET, epochs=102, batch_size=4096, learning_rate=1.6,
        drops=(30, 70, 90), factor=0.1, warmup=5, momentum=0.9, nesterov=True, weight_decay=1e-4,
        label_smoothing=0.1,
    ),
)  # fmt: skip

# ----------------------------------------------------------------------------------------- SRigL

# Lasby et al., ICLR 2024; the training is from the authors' configurations
# (calgaryml/condensed-sparsity, configs/): RigL's on CIFAR-10 with plain momentum.
_SRIGL = "Lasby et al., ICLR 2024, and the authors' configurations"
_SRIGL_CIFAR = Preset(
    name="srigl",
    source=_SRIGL,
    method=SRigL,
    format="condensed",
    options={"alpha": 0.3, "delta_t": 100, "gamma_sal": 0.3},
    t_end=0.75,
    training=dataclasses.replace(_RIGL_CIFAR.training, nesterov=False),
)
# 512 images for RigL's 4096: an eighth of the learning rate, eight times as many steps between
# updates.
_SRIGL_IMAGENET = _like(
    _SRIGL_CIFAR,
    "srigl-imagenet",
    options={"alpha": 0.3, "delta_t": 800, "gamma_sal": 0.3},
    training=dataclasses.replace(
        _RIGL_IMAGENET.training, batch_size=512, learning_rate=0.2, nesterov=False
    ),
)
# "0.95 for vision transformers"; 150 epochs of torchvision's recipe for ViT-B/16.
_SRIGL_VIT = _like(
    _SRIGL_CIFAR,
    "srigl-vit",
    options={"alpha": 0.3, "delta_t": 100, "gamma_sal": 0.95},
    training=Training(
        data="ImageNet", images=_IMAGENET, epochs=150, batch_size=4096, learning_rate=3e-3,
        warmup=16, warmup_from=0.033, cosine=True, optimizer_class=torch.optim.AdamW,
        weight_decay=0.3, label_smoothing=0.11, clip_norm=1.0,
    ),
)  # fmt: skip

# ------------------------------------------------------------------------------------------ HRBP

# Section 5.1: eight dense blocks of at least eight rows, s = 4/9 for 3 x 3 kernels (the format's
# own defaults), ERK; "SGD" without a momentum or a weight decay.
_HRBP_CIFAR = Preset(
    name="hrbp-cifar",
    source="Ma et al., HRBP, 2024, section 5.1",
    method=Static,
    format="hrbp",
    training=Training(
        data="CIFAR-10/100", images=_CIFAR, epochs=160, batch_size=128, learning_rate=0.1,
        drops=(80, 120), factor=0.1,
    ),
)  # fmt: skip
# "We adopt the Pytorch official implementation": its batches, momentum and weight decay.
_HRBP_IMAGENET = _like(
    _HRBP_CIFAR,
    "hrbp-imagenet",
    training=Training(
        data="ImageNet", images=_IMAGENET, epochs=100, batch_size=256, learning_rate=0.1,
        drops=(30, 60, 90), factor=0.1, momentum=0.9, weight_decay=1e-4,
    ),
)  # fmt: skip
# Section 5.3: "all sparse training hyperparameters in [10]", which is RigL.
_HRBP_DYNAMIC = _like(
    _HRBP_CIFAR,
    "hrbp-cifar-dynamic",
    method=HRBP,
    options={"alpha": 0.3, "delta_t": 100},
    t_end=0.75,
)
# Baselines of section 5.2. Regrouping [21]: columns of similar rows, those with the most weights of
# the mask. Random channels: whole outputs, as blocks of one row and all columns.
_REGROUPING = {"row_groups": 8, "block_shape": (1, 1), "min_overlap": 0.0}
_CHANNELS = {"block_shape": (1, 2**31 - 1), "aligned": True}


# -------------------------------------------------------------------------------------- Advances

# "Stopping rewiring after half of training (v = 0.5) often provides the best results" (3.3);
# warm-up and drops of appendix B.1, "standard pipelines" otherwise: torch's for ImageNet.
_REWIRE = Preset(
    name="rewire-imagenet",
    source="Advances in sparse training, section 3 and appendix B.1",
    method=Rewire,
    format="csr",
    options={"mode": "fix", "v": 0.5, "interval": 1},
    distribution="uniform",
    training=Training(
        data="ImageNet", images=_IMAGENET, epochs=90, batch_size=256, learning_rate=0.1,
        drops=(30, 60, 80), factor=0.1, warmup=5, momentum=0.9, weight_decay=1e-4,
    ),
)  # fmt: skip


def _known(*presets: Preset) -> Mapping[str, Preset]:
    return MappingProxyType({found.name: found for found in presets})


PRESETS: Mapping[str, Preset] = _known(
    _DSB_CIFAR,
    _DSB_IMAGENET,
    _like(_DSB_CIFAR, "ssb-cifar", method=SSB, t_end=None),
    _like(_DSB_IMAGENET, "ssb-imagenet", method=SSB, t_end=None),
    _like(_DSB_CIFAR, "dnsb-cifar", method=DNSB, params={**_DSB_CIFAR.params, "aligned": True}),
    _RIGL_CIFAR,
    _RIGL_IMAGENET,
    _like(_RIGL_CIFAR, "set", method=SET),
    _like(_RIGL_IMAGENET, "set-imagenet", method=SET),
    _SRIGL_CIFAR,
    _SRIGL_IMAGENET,
    _SRIGL_VIT,
    _REWIRE,
    _HRBP_CIFAR,
    _HRBP_IMAGENET,
    _HRBP_DYNAMIC,
    _like(_HRBP_CIFAR, "hrbp-unstructured", format="csr"),
    _like(_HRBP_CIFAR, "hrbp-channels", format="shuffled_block", params=_CHANNELS),
    _like(_HRBP_CIFAR, "hrbp-regrouping", format="shuffled_block", params=_REGROUPING),
)
"""Every preset by name; the last three are baselines of HRBP: start them from random scores, or
with ``scores=`` of :func:`snip` and :func:`grasp`."""
