"""The tables of a recipe: which keys there are, what they accept, and their defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spfmt.recipes.data import DATA_SETS
from spfmt.recipes.schema import Kind, choice, flag, key, list_of, number, options, text, whole

__all__ = ["TABLES", "Data", "Format", "Method", "Model", "Optimizer", "Output", "Rate", "Train"]


def _share() -> Kind:
    return number("a number between 0 and 1, neither of them", lambda v: 0 < v < 1)


def _least(low: float) -> Kind:
    return number(f"a number from {low:g} on", lambda v: low <= v < math.inf)


def _positive() -> Kind:
    return number("a number above 0", lambda v: 0 < v < math.inf)


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

    name: str = key(choice(*DATA_SETS))
    dir: str | None = key(text(), None)
    augment: bool = key(flag(), False)
    size: int | None = key(whole(1, 4096), None)
    test_share: float | None = key(_share(), None)
    mean: tuple[float, ...] | None = key(list_of(_least(0)), None)
    std: tuple[float, ...] | None = key(list_of(_positive()), None)


@dataclass(frozen=True)
class Model:
    """``[model]``: the network.

    Attributes
    ----------
    name : str
        "mlp", "lenet", or a network of `spfmt.models`.
    weights : str, optional
        File (.safetensors or .npz) of a trained state to begin with.
    options : mapping
        Other keywords of the network (width, hidden, …).
    """

    name: str = key(text())
    weights: str | None = key(text(), None)
    options: Mapping[str, Any] = options()


@dataclass(frozen=True)
class Method:
    """``[method]``: how the weights get and stay sparse.

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

    name: str = key(text())
    density: float | None = key(_share(), None)
    sparsity: float | None = key(_share(), None)
    distribution: str | None = key(choice("uniform", "erk"), None)
    scores: str | None = key(choice("random", "magnitude", "snip", "grasp"), None)
    include: tuple[str, ...] = key(list_of(text(), alone=True), ())
    exclude: tuple[str, ...] = key(list_of(text(), alone=True), ())
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

    name: str | None = key(text(), None)
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
    """

    epochs: int | None = key(whole(1), None)
    steps: int | None = key(whole(1), None)
    batch_size: int = key(whole(1), 128)
    threads: int | None = key(whole(1, 1024), None)
    log_every: int = key(whole(1), 50)
    checkpoint_every: int = key(whole(1), 500)
    evaluate_every: int = key(whole(1), 1)


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

    name: str = key(choice("sgd", "adam", "adamw"))
    lr: float = key(_positive())
    weight_decay: float = key(_least(0), 0.0)
    momentum: float | None = key(number("a number in [0, 1)", lambda v: 0 <= v < 1), None)
    nesterov: bool | None = key(flag(), None)
    betas: tuple[float, ...] | None = key(
        list_of(number("a number in [0, 1)", lambda v: 0 <= v < 1), length=2), None
    )
    eps: float | None = key(_positive(), None)


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

    name: str = key(choice("constant", "cosine", "drops"), "constant")
    at: tuple[float, ...] = key(list_of(_positive()), ())
    factor: float | None = key(_share(), None)
    warmup: float = key(_least(0), 0.0)


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

    onnx: bool = key(flag(), True)
    curves: bool = key(flag(), True)


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
