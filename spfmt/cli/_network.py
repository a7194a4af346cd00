"""The demo's data, its network, and how it is trained: dense, or sparse with SET."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spfmt.formats import FORMATS
from spfmt.torch import SparseModule, sparsify
from spfmt.train import SET

__all__ = [
    "HIDDEN",
    "PARAMS",
    "PIXELS",
    "Digits",
    "Settings",
    "build",
    "load_digits",
    "prune",
    "train",
]

PARAMS: Mapping[str, Mapping[str, Any]] = {
    name: found.parse_spec("") or {} for name, found in FORMATS.items()
}
"""The formats of the demo, each with the parameters that its search gets."""

HIDDEN = ("hidden1", "hidden2")
"""The layers that become sparse."""

PIXELS, _CLASSES = 64, 10
# Noise on the pixels makes 1437 images enough for a network this wide, dense or sparse.
_NOISE = 0.2


@dataclass(frozen=True)
class Settings:
    """What a run does.

    Attributes
    ----------
    density : float
        Share of the hidden weights that stays.
    seed : int
        Of the split, the weights, the structures and the order of the images.
    width : int
        Neurons of each hidden layer.
    epochs, batch_size : int
        Of the training.
    rounds : int
        Of the latency measurement.
    channels, conv_epochs : int
        Of the network of convolutions.
    """

    density: float = 0.1
    seed: int = 0
    width: int = 1024
    epochs: int = 15
    batch_size: int = 64
    rounds: int = 40
    channels: int = 64
    conv_epochs: int = 5

    @property
    def layers(self) -> tuple[int, ...]:
        """Sizes of the network's layers, from the pixels to the classes."""
        return (PIXELS, *(self.width,) * (len(HIDDEN) + 1), _CLASSES)


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: images (n, 64) in [0, 1], float32, and their classes (n,), int64."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def load_digits(seed: int) -> Digits:
    """Read scikit-learn's 1797 digits, one fifth of each class for the test."""
    from sklearn import datasets, model_selection

    x, y = datasets.load_digits(return_X_y=True)
    parts = model_selection.train_test_split(
        x.astype("float32") / 16, y.astype("int64"), test_size=0.2, stratify=y, random_state=seed
    )
    x, x_test, y, y_test = map(torch.from_numpy, parts)
    return Digits(x, y, x_test, y_test)


def build(settings: Settings, format: str | None) -> nn.Sequential:
    """Make the untrained network, dense or with sparse hidden layers.

    The first layer (few inputs) and the last (few outputs) stay dense, as they do in the papers:
    they hold little of the weights and much of the information. All networks start from the same
    dense weights; the structures are random and SET moves them.
    """
    torch.manual_seed(settings.seed)
    names = ("input", *HIDDEN, "output")
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    sizes = settings.layers
    for name, size, next_size in zip(names, sizes[:-1], sizes[1:], strict=True):
        modules[name] = nn.Linear(size, next_size)
        if name != "output":
            modules[f"{name}_relu"] = nn.ReLU()
    model = nn.Sequential(modules)
    if format is not None:
        prune(model, format, HIDDEN, settings)
    return model


def prune(model: nn.Module, format: str, layers: Sequence[str], settings: Settings) -> None:
    """Make layers sparse: random structures, new values."""
    sparsify(
        model,
        format,
        density=dict.fromkeys(layers, settings.density),
        scores="random",
        reset=True,
        generator=torch.Generator().manual_seed(settings.seed),
        **PARAMS[format],
    )


def train(
    model: nn.Sequential, data: Digits, settings: Settings, on_epoch: Callable[[int], None]
) -> None:
    """Train with AdamW and a one-cycle rate; sparse layers are rewired by SET on the way."""
    batches = -(-len(data.x) // settings.batch_size)
    steps = settings.epochs * batches
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    method = None
    if any(isinstance(module, SparseModule) for module in model):
        method = SET(model, optimizer, delta_t=20, total_steps=steps, seed=settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    for epoch in range(settings.epochs):
        order = torch.randperm(len(data.x), generator=generator)
        for chosen in torch.split(order, settings.batch_size):
            noise = torch.randn((len(chosen), PIXELS), generator=generator)
            optimizer.zero_grad()
            outputs = model(data.x[chosen] + _NOISE * noise)
            loss = nn.functional.cross_entropy(outputs, data.y[chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rate.step()
            if method is not None:
                method.step()
        on_epoch(epoch + 1)
    model.eval()
