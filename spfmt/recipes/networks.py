"""Networks by name: linear layers for small images, and those of `spfmt.models`."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spfmt import models
from spfmt.errors import format_error
from spfmt.recipes.readers import read_arrays
from spfmt.recipes.schema import keywords, read_options, read_value
from spfmt.recipes.tables import Model

__all__ = ["NETWORKS", "build_network", "mlp", "network_options"]


def mlp(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    image_size: int = 28,
    hidden: tuple[int, ...] = (300, 100),
) -> nn.Module:
    """Linear layers with ReLUs between them; 300 and 100 neurons are LeNet-300-100.

    Parameters
    ----------
    num_classes, in_channels : int
        Outputs, and channels of the images.
    image_size : int
        Height and width of the images.
    hidden : tuple of int
        Neurons of the hidden layers, which are named hidden1, hidden2, …; the last is "output".

    Returns
    -------
    nn.Module
        Maps images (N, in_channels, image_size, image_size) to (N, num_classes).

    References
    ----------
    LeCun et al., *Gradient-Based Learning Applied to Document Recognition*, 1998, section III.B.
    """
    if any(size < 1 for size in hidden):
        raise format_error(f"hidden={list(hidden)}", "at least one neuron in each", "change it")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    size = in_channels * image_size**2
    for i, width in enumerate(hidden, start=1):
        layers[f"hidden{i}"] = nn.Linear(size, width)
        layers[f"relu{i}"] = nn.ReLU()
        size = width
    layers["output"] = nn.Linear(size, num_classes)
    return nn.Sequential(layers)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    **{name: getattr(models, name) for name in models.__all__},
}
"""Every network that a recipe can name."""

_FROM_DATA = ("num_classes", "in_channels", "image_size")


def network_options(model: Model) -> dict[str, Any]:
    """Check name and options of ``[model]``."""
    read_value("model.name", model.name, str, known=NETWORKS)
    known = keywords(NETWORKS[model.name], without=_FROM_DATA)
    return read_options(model.options, "model", known, ("name", "weights"))


def build_network(
    model: Model, shape: tuple[int, int, int], classes: int, batch: int = 2
) -> nn.Module:
    """Make the network of a recipe for images (channels, height, width).

    It is tried with `batch` images, the fewest that it is trained on at once.

    Raises
    ------
    FormatError
        Where the network is too large or cannot take such images, or its weights do not fit.
    OSError
        Where the weights cannot be read.
    """
    channels, height, width = shape
    factory = NETWORKS[model.name]
    options: dict[str, Any] = {"num_classes": classes, "in_channels": channels}
    if "image_size" in keywords(factory):
        if height != width:
            raise format_error(
                f"images of {height} x {width} pixels", "square ones", "set data.size"
            )
        options["image_size"] = height
    options |= network_options(model)
    try:
        network = factory(**options)
    except (RuntimeError, TypeError, MemoryError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise format_error(
            f"model.name = {model.name!r} with {options} ({reason})", "what fits", "make it smaller"
        ) from None
    _try(network, model.name, (min(batch, 2), *shape))
    if model.weights is not None:
        _load(network, Path(os.path.expanduser(model.weights)))
    return network


def _try(network: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Show a copy of the network images, before anything is trained."""
    network = copy.deepcopy(network)  # a batch norm would count them
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(shape))
            if shape[0] == 1:  # of which a batch norm may have no variance
                network.train()(torch.zeros(shape))
    except (RuntimeError, ValueError) as error:
        size = " x ".join(map(str, shape[1:]))
        raise format_error(
            f"images of {size} for model.name = {name!r} ({str(error).splitlines()[0]})",
            "larger ones, as those networks are made for",
            "use mlp for small images"
            + (", or another train.batch_size: the last batch has one image" * (shape[0] == 1)),
        ) from None


def _load(network: nn.Module, path: Path) -> None:
    """Load a trained state of the dense network."""
    state = _read_state(path)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise format_error(
            f"model.weights = {str(path)!r}: {reason if len(reason) < 400 else reason[:400] + '…'}",
            "the names and shapes of the network's state_dict",
            "check model.name and its options",
        ) from None


def _read_state(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".npz":
        arrays = read_arrays(path)
        bad = [f"{name} of {a.dtype}" for name, a in arrays.items() if a.dtype.kind not in "fiu"]
        if bad:
            raise format_error(
                f"model.weights = {str(path)!r} with {bad[0]}", "numbers", "save them again"
            )
        native = {name: a.astype(a.dtype.newbyteorder("=")) for name, a in arrays.items()}
        return {name: torch.from_numpy(a) for name, a in native.items()}
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        state: dict[str, Tensor] = load(path.read_bytes())
    except SafetensorError as error:
        raise format_error(
            f"model.weights = {str(path)!r}, which cannot be read ({error})",
            "a file of type .safetensors or .npz",
            "save the state_dict again",
        ) from None
    return state
