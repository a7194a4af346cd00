"""What a layer sees on one step: inputs and output gradients, recorded by hooks for that step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spfmt.errors import format_error
from spfmt.formats import Condensed
from spfmt.torch.module import SparseModule
from spfmt.torch.ops import sddmm
from spfmt.train.ranks import world_size

__all__ = ["Observation", "Observe", "Observer"]

Observe = Literal["norms", "l1_norms", "batches"]

_ORDERS = {"norms": 2, "l1_norms": 1, "batches": 2}


class Observation:
    """What was recorded of one layer, over all calls of the step (gradient accumulation, too).

    Calls whose gradients were thrown away before others came (by ``zero_grad`` between the two
    passes of SAM, or for a discriminator that only passed gradients on) do not count.

    With a process group of several ranks, norms and `weight_grad` are those of all ranks together,
    and every rank must ask for them; batches are the rank's own.
    """

    def __init__(self, kind: Observe, layer: SparseModule, group: Any = None) -> None:
        self.kind, self.group = kind, group
        self._layer = layer
        self._batches: list[tuple[Tensor, Tensor]] = []  # as the layer saw them
        self._order = _ORDERS[kind]
        self._sums: tuple[Tensor, Tensor] | None = None
        self._landed: tuple[Tensor, int] | None = None

    def land(self, values: Tensor) -> None:
        """Note that ``values.grad`` holds the gradients of all calls so far."""
        assert values.grad is not None
        self._landed = values.grad, values.grad._version

    def _forget_what_was_thrown_away(self) -> None:
        if self._landed is None:
            return
        (grad, version), self._landed = self._landed, None
        now = self._layer.values.grad
        untouched = now is grad and now._version == version
        if not untouched and (now is None or not now.any()):
            self._batches.clear()
            self._sums = None

    def record(self, x: Tensor, dy: Tensor) -> None:
        """Add a call of the layer: its input, and the gradient of its output."""
        self._forget_what_was_thrown_away()
        if self.kind == "batches":
            self._batches.append((x, dy))
            return
        sums, old = self._layer.power_sums(x, dy, self._order), self._sums
        self._sums = sums if old is None else (old[0] + sums[0], old[1] + sums[1])

    @property
    def empty(self) -> bool:
        """Whether no call was recorded."""
        return not self._batches and self._sums is None

    @property
    def inputs(self) -> Tensor:
        """Inputs, (samples, C), of all calls; of a convolution, unfolded."""
        return torch.cat([self._layer.samples(*call)[0] for call in self._whole()])

    @property
    def output_grads(self) -> Tensor:
        """Gradients of the outputs, (samples, R), of all calls."""
        return torch.cat([self._layer.samples(*call)[1] for call in self._whole()])

    @property
    def input_norms(self) -> Tensor:
        """Norm of every input feature over the samples, (C,): l1 of "l1_norms", else Euclidean."""
        return self._norms(0)

    @property
    def output_grad_norms(self) -> Tensor:
        """Norm of every output's gradient over the samples, (R,): as `input_norms`."""
        return self._norms(1)

    def weight_grad(self) -> Tensor:
        """Compute the dense gradient of the weight, ``dY.T @ X``, (R, C); mean over the ranks."""
        first, *others = self._whole()
        total = self._layer.dense_gradient(*first)
        for call in others:  # never more than two of its size, however many calls there were
            total += self._layer.dense_gradient(*call)
        return self._over_ranks(total).div_(world_size(self.group))

    def grad_at(self, rows: NDArray[Any], columns: NDArray[Any]) -> Tensor:
        """Compute the gradient of the weight (R, C) at some positions, and nowhere else.

        Parameters
        ----------
        rows : ndarray of int, shape (n,)
        columns : ndarray of int, shape (n, k)
            Ascending in each row.

        Returns
        -------
        Tensor, shape (n, k), float32
            Mean over the ranks.
        """
        shape = rows.size, math.prod(self._layer.shape[1:])
        sample = Condensed(shape, np.arange(rows.size), columns, np.zeros(columns.shape))
        structure, total = torch.from_numpy(sample.encode()), torch.zeros(sample.nnz)
        where = torch.from_numpy(rows.astype(np.int64))
        for call in self._whole():
            x, dy = (part.float() for part in self._layer.samples(*call))
            total += sddmm(structure, dy[:, where], x, shape=shape, capacity=sample.nnz)
        return self._over_ranks(total).div_(world_size(self.group)).reshape(columns.shape)

    def _norms(self, which: int) -> Tensor:
        if self._sums is not None:
            total = self._sums[which].clone()
        else:
            sums = [self._layer.power_sums(*call, self._order) for call in self._whole()]
            total = torch.stack([pair[which] for pair in sums]).sum(0)
        total = self._over_ranks(total)
        return total if self._order == 1 else total.sqrt()

    def _over_ranks(self, total: Tensor) -> Tensor:
        """Add what the ranks found."""
        if world_size(self.group) > 1:
            torch.distributed.all_reduce(total, group=self.group)
        return total

    def _whole(self) -> list[tuple[Tensor, Tensor]]:
        if self.kind != "batches":
            raise format_error(
                "norms alone", "batches", 'return "batches" from observes(name, layer)'
            )
        return self._batches


class Observer:
    """Hooks on layers, from `watch` to `stop`."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._found: dict[int, Observation] = {}
        self._hooks: list[Any] = []

    @property
    def active(self) -> bool:
        """Whether any hook exists."""
        return bool(self._hooks)

    def watch(self, layer: SparseModule, kind: Observe | None) -> None:
        """Record the calls of a layer from now on; nothing where `kind` is None."""
        if kind is None:
            return
        if kind not in _ORDERS:
            kinds = ", ".join(map(repr, _ORDERS))
            raise format_error(f"observes {kind!r}", f"{kinds} or None", "use one")
        found = self._found[id(layer)] = Observation(kind, layer, self._group)
        self._hooks.append(layer.register_forward_hook(_recorder(found), with_kwargs=True))
        landed = layer.values.register_post_accumulate_grad_hook(found.land)  # type: ignore[no-untyped-call]
        self._hooks.append(landed)

    def stop(self) -> None:
        """Remove every hook and forget what was recorded."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._found.clear()

    def of(self, layer: SparseModule) -> Observation:
        """Return what was recorded of a layer, or say why there is nothing."""
        found = self._found.get(id(layer))
        if found is None or found.empty:
            raise format_error(
                "no call of the layer that was recorded before this update",
                "a forward and backward pass of the model itself, outside torch.compile",
                "say what to record in observes(name, layer); where trainer.observing is True, "
                "call the model that was compiled, not the compiled one",
            )
        return found


def _recorder(found: Observation) -> Callable[..., None]:
    def forward_hook(
        layer: SparseModule, args: tuple[Tensor, ...], options: dict[str, Any], y: Tensor
    ) -> None:
        if not y.requires_grad:
            return
        if options.get("activation") is not None:  # y is not what the weight gives
            raise format_error(
                f"a call of an observed layer with activation={options['activation']!r}",
                "none",
                "apply the activation to the layer's output",
            )
        x = (args[0] if args else options["x"]).detach()

        def record(dy: Tensor) -> None:
            found.record(x, dy.detach())

        y.register_hook(record)  # type: ignore[no-untyped-call]

    return forward_hook
