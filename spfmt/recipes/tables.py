"""The tables of a recipe: which keys there are, what they accept, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from spfmt.recipes.data import DATA_SETS
from spfmt.recipes.schema import key, options, whole

__all__ = ["TABLES", "Data", "Format", "Method", "Model", "Optimizer", "Output", "Rate", "Train"]

_SHARE: dict[str, Any] = {
    "expected": "a number between 0 and 1, neither of them", "accepts": lambda v: 0 < v < 1
}  # fmt: skip
_DECAY: dict[str, Any] = {"expected": "a number in [0, 1)", "accepts": lambda v: 0 <= v < 1}
_LEAST: dict[str, Any] = {"expected": "a number from 0 on", "accepts": lambda v: v >= 0}
_ABOVE: dict[str, Any] = {"expected": "a number above 0", "accepts": lambda v: v > 0}


@dataclass(frozen=True)
class Data:
    """``[data]``: images and their classes.

    Attributes
    ----------
    name : str
        Of the data set.
    dir : str, optional
        Directory of its files. ``--data`` comes before it, the environment's SPFMT_DATA after.
    augment : bool
        Crops of images padded by four pixels, every other one mirrored.
    size : int, optional
        Of "folder": height and width that images are scaled to.
    test_share : float, optional
        Of "folder" without a test directory: share of every class that is held back, 0.2.
    mean, std : tuple of float, optional
        Of every channel, of pixels in [0, 1]; by default those of the training images.
    """

    name: str = key(known=tuple(DATA_SETS))
    dir: str | None = None
    augment: bool = False
    size: int | None = key(None, **whole(1, 4096))
    test_share: float | None = key(None, **_SHARE)
    mean: tuple[float, ...] | None = key(None, **_LEAST)
    std: tuple[float, ...] | None = key(None, **_ABOVE)


@dataclass(frozen=True)
class Model:
    """``[model]``: the network.

    Attributes
    ----------
    name : str
        "mlp", or a network of `spfmt.models`.
    weights : str, optional
        File (.safetensors or .npz) of a trained state to begin with.
    options : mapping
        Other keywords of the network (width, hidden, …).
    """

    name: str
    weights: str | None = None
    options: Mapping[str, Any] = options()


@dataclass(frozen=True)
class Method:
    """``[method]``: how the weights get and stay sparse.

    A key ``preset`` names one of `spfmt.train.PRESETS`, whose method, options and format are then
    the defaults of this table and of ``[format]``.

    Attributes
    ----------
    name : str
        Of a method, or "dense".
    density, sparsity : float, optional
        Share of weights that stay or that go: one of the two.
    distribution : {"uniform", "erk"}, optional
        Of the density over the layers.
    scores : {"random", "magnitude", "snip", "grasp"}, optional
        Where the first weights are. SNIP and GraSP see one batch; they also spread the density over
        the layers, unless a distribution does.
    include, exclude : tuple of str
        Globs on the names of layers.
    options : mapping
        Other keywords of the method (delta_t, gamma_sal, …).
    """

    name: str
    density: float | None = key(None, **_SHARE)
    sparsity: float | None = key(None, **_SHARE)
    distribution: Literal["uniform", "erk"] | None = None
    scores: Literal["random", "magnitude", "snip", "grasp"] | None = None
    include: tuple[str, ...] = key((), alone=True)
    exclude: tuple[str, ...] = key((), alone=True)
    options: Mapping[str, Any] = options()


@dataclass(frozen=True)
class Format:
    """``[format]``: the structure of sparse weights.

    Attributes
    ----------
    name : str, optional
        By default the one that the method trains, or "csr".
    options : mapping
        Parameters of the format (block_shape, n, m, …).
    """

    name: str | None = None
    options: Mapping[str, Any] = options()


@dataclass(frozen=True)
class Train:
    """``[train]``: how long, how many at once.

    Attributes
    ----------
    epochs, steps : int, optional
        Length of the run: one of the two.
    batch_size : int
    threads : int, optional
        Of torch and of our kernels; what the machine gives by default.
    log_every, checkpoint_every : int
        Steps between two lines of metrics, and between two checkpoints.
    evaluate_every : int
        Epochs between two evaluations; the last epoch always has one.
    label_smoothing : float
        Of the loss that is trained.
    clip_norm : float, optional
        Largest norm of all gradients together.
    """

    epochs: int | None = key(None, **whole(1))
    steps: int | None = key(None, **whole(1))
    batch_size: int = key(128, **whole(1))
    threads: int | None = key(None, **whole(1, 1024))
    log_every: int = key(50, **whole(1))
    checkpoint_every: int = key(500, **whole(1))
    evaluate_every: int = key(1, **whole(1))
    label_smoothing: float = key(0.0, **_DECAY)
    clip_norm: float | None = key(None, **_ABOVE)


@dataclass(frozen=True)
class Optimizer:
    """``[optimizer]``: SGD, Adam or AdamW; biases and norms do not decay.

    Attributes
    ----------
    name : {"sgd", "adam", "adamw"}
    lr : float
    weight_decay : float
    momentum, nesterov : float, bool, optional
        Of SGD: 0.9 and false.
    betas, eps : (float, float), float, optional
        Of Adam and AdamW: torch's.
    """

    name: Literal["sgd", "adam", "adamw"]
    lr: float = key(**_ABOVE)
    weight_decay: float = key(0.0, **_LEAST)
    momentum: float | None = key(None, **_DECAY)
    nesterov: bool | None = None
    betas: tuple[float, float] | None = key(None, **_DECAY)
    eps: float | None = key(None, **_ABOVE)


@dataclass(frozen=True)
class Rate:
    """``[rate]``: the learning rate over the run; times are epochs, or steps where the run is.

    Attributes
    ----------
    name : {"constant", "cosine", "drops"}
        The cosine ends at zero; drops multiply by `factor` at the times `at`.
    at : tuple of float
    factor : float
    warmup : float
        Time in which the rate rises from zero, linearly.
    """

    name: Literal["constant", "cosine", "drops"] = "constant"
    at: tuple[float, ...] = key((), **_ABOVE)
    factor: float | None = key(None, **_SHARE)
    warmup: float = key(0.0, **_LEAST)


@dataclass(frozen=True)
class Output:
    """``[output]``: what is written besides metrics and checkpoints.

    Attributes
    ----------
    onnx : bool
        The trained model as ONNX (needs onnx and onnxscript).
    curves : bool
        Curves as PNG (needs matplotlib).
    """

    onnx: bool = True
    curves: bool = True


TABLES: dict[str, type] = {
    "data": Data,
    "model": Model,
    "method": Method,
    "format": Format,
    "train": Train,
    "optimizer": Optimizer,
    "rate": Rate,
    "output": Output,
}
