"""Single layers whose dense gradient is known, moved once: what training methods are checked on."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spfmt.formats import SparseTensor
from spfmt.torch import SparseConv2d, SparseLinear
from spfmt.torch.module import SparseModule
from spfmt.train import SparseTrainer

Array = NDArray[Any]

FORMATS: dict[str, dict[str, Any]] = {
    "condensed": {},
    "nm": {"m": 8},
    "shuffled_block": {"block_shape": (4, 4)},
    "hrbp": {"groups": 2},
    "csr": {},
}
"""Every format, and parameters that fit small layers."""


@torch.no_grad()
def stepped(method: SparseTrainer) -> bool:
    """Let a method step as after a step of its optimizer that wrote the weights they were."""
    for layer in method.layers.values():
        layer.values.add_(0.0)
    return method.step()


@dataclass
class State:
    """A layer's weight, mask and momentum as dense matrices, and its structure."""

    tensor: SparseTensor
    weight: Array
    mask: Array
    momentum: Array


class Single:
    """One layer with an optimizer that changes nothing, and a method due at every step.

    Parameters
    ----------
    method : type of SparseTrainer
    tensor : SparseTensor
        The weight; a 4-D one is that of a convolution.
    share : float
        Of the weights that an update drops.
    """

    def __init__(self, method: type, tensor: SparseTensor, share: float, **options: Any) -> None:
        layers = {2: SparseLinear, 4: SparseConv2d}
        how = {name: options.pop(name) for name in ("groups", "padding") if name in options}
        self.layer: SparseModule = layers[len(tensor.shape)].from_tensor(tensor, **how)
        self.model = nn.Sequential(self.layer)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)
        values = self.layer.values
        self.optimizer.state[values]["momentum_buffer"] = torch.arange(1.0, len(values) + 1).to(
            values
        )
        schedule = {"alpha": share, "delta_t": 1, "t_end": 10**9}  # the cosine is 1
        self.method: SparseTrainer = method(self.model, self.optimizer, **schedule, **options)

    def state(self) -> State:
        tensor = self.layer.tensor()
        rows = tensor.shape[0]

        def dense(flat: torch.Tensor) -> Array:
            held = flat[: tensor.nnz].detach().numpy()
            return tensor.with_values(held).to_dense().reshape(rows, -1)

        momentum = self.optimizer.state[self.layer.values]["momentum_buffer"]
        mask = tensor.mask().reshape(rows, -1)
        return State(tensor, dense(self.layer.values), mask, dense(momentum))

    def backward(self, gradient: Array) -> None:
        """Let a linear layer see a batch that gives its dense weight this gradient, exactly."""
        dtype = self.layer.values.dtype
        y = self.layer(torch.eye(gradient.shape[1], dtype=dtype))
        y.backward(torch.from_numpy(np.ascontiguousarray(gradient.T)).to(dtype))

    def move(self, gradient: Array) -> tuple[State, State]:
        """Update once, and return the states before and after."""
        before = self.state()
        self.backward(gradient)
        stepped(self.method)
        self.optimizer.zero_grad()
        return before, self.state()


def assert_moved(before: State, after: State, kept: Array, mask: Array) -> None:
    """Kept weights keep value and momentum; all others of the new mask are zero in both."""
    np.testing.assert_array_equal(after.mask, mask)
    for old, new in ((before.weight, after.weight), (before.momentum, after.momentum)):
        np.testing.assert_array_equal(new, np.where(kept & mask, old, 0))
    after.tensor.validate()


def first_dropped(before: State, count: int) -> Array:
    """The mask without its `count` smallest magnitudes, of equal ones the first, in plain loops."""
    places = [(abs(before.weight[p]), p) for p in zip(*np.nonzero(before.mask), strict=True)]
    kept = before.mask.copy()
    for _, place in sorted(places)[:count]:
        kept[place] = False
    return kept


def train(model: nn.Module, optimizer: Any, method: SparseTrainer, steps: int, inputs: Any) -> list:
    """Train on batches that follow from the number of the step; tell which steps moved weights."""
    changed = []
    for _ in range(steps):
        x = inputs(torch.Generator().manual_seed(method.steps))
        optimizer.zero_grad()
        y = model(x)
        nn.functional.cross_entropy(y, x.flatten(1)[:, : y.shape[1]].argmax(1)).backward()
        optimizer.step()
        changed.append(method.step())
    return changed


def follow(
    teacher: torch.Tensor, model: nn.Module, optimizer: Any, method: SparseTrainer, steps: int
) -> float:
    """Learn a linear map (R, 64) from random batches, and return the last loss."""
    for _ in range(steps):
        x = torch.randn(64, teacher.shape[1])
        loss = (model(x) - x @ teacher.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.step()
    return float(loss.item())


def assert_resumes(make: Any, inputs: Any, steps: tuple[int, int]) -> None:
    """Save after some steps, go on in another trainer, and end with the same bits.

    `make(seed)` returns a model, its optimizer and its method; `inputs(generator)` a batch.
    """
    whole = make(0)
    assert any(train(*whole, steps[0], inputs))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)
    train(*whole, steps[1], inputs)
    file.seek(0)
    resumed = make(1)
    train(*resumed, 1, inputs)  # somewhere else before it is loaded
    for part, state in zip(resumed, torch.load(file), strict=True):
        part.load_state_dict(state)
    train(*resumed, steps[1], inputs)
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[name]), name
    assert str(whole[2].summary()) == str(resumed[2].summary())
