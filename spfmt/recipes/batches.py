"""Training images in a random order that a run can go on with from any step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from spfmt.recipes.data import Images

__all__ = ["Batches", "augment", "held_back"]

_SEED_OFFSET = 0xDA7A_0000  # not the numbers that weights are drawn with
_PAD = 4


class Batches:
    """Batches of the training images, shuffled anew in every epoch; the last is what is left.

    Attributes
    ----------
    epoch : int
        Epochs that are complete.
    position : int
        Images of the present epoch that were given.
    """

    def __init__(self, images: Images, batch_size: int, seed: int, augmented: bool) -> None:
        self._x, self._y = torch.from_numpy(images.x), torch.from_numpy(images.y)
        self._images, self._size, self._augmented = images, batch_size, augmented
        self._generator = torch.Generator().manual_seed(_SEED_OFFSET + seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self.epoch, self.position = 0, 0

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._x) // self._size)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the next images (n, channels, height, width), float32, and their classes."""
        if self.position == 0:
            self._order = torch.randperm(len(self._x), generator=self._generator)
        chosen = self._order[self.position : self.position + self._size]
        self.position += len(chosen)
        if self.position == len(self._x):
            self.epoch, self.position = self.epoch + 1, 0
        x = self._x[chosen]
        if self._augmented:
            x = augment(x, self._generator)
        return scaled(x, self._images), self._y[chosen]

    def state_dict(self) -> dict[str, Any]:
        """Return the order of this epoch, the place in it and the generator."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "order": self._order,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another run's `state_dict` was taken."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = state["order"]
        self._generator.set_state(state["generator"])


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Crop every image out of itself with four black pixels on each side, and mirror half of them.

    As He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, section 4.2; `x` is
    (n, channels, height, width).
    """
    n, channels, height, width = x.shape
    padded = torch.nn.functional.pad(x, (_PAD,) * 4)
    top, left = torch.randint(2 * _PAD + 1, (2, n, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.rand((n, 1), generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    image, channel = torch.arange(n).view(-1, 1, 1, 1), torch.arange(channels).view(1, -1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def scaled(x: Tensor, images: Images) -> Tensor:
    """Return pixels as the network gets them: mean 0, deviation 1 in every channel."""
    mean, std = (torch.from_numpy(a).view(1, -1, 1, 1) for a in (images.mean, images.std))
    return (x.float() / images.top - mean) / std


def held_back(images: Images, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the test images in their order, and their classes."""
    for start in range(0, len(images.x_test), batch_size):
        part = slice(start, start + batch_size)
        x, y = torch.from_numpy(images.x_test[part]), torch.from_numpy(images.y_test[part])
        yield scaled(x, images), y
