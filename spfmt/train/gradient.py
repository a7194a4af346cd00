"""What the methods share that grow by the dense gradient: it is there where a layer moves."""

from __future__ import annotations

from spfmt.torch.module import SparseModule
from spfmt.train.base import SparseTrainer
from spfmt.train.choice import Floats, magnitudes_of
from spfmt.train.observe import Observe

__all__ = ["GradientTrainer"]


class GradientTrainer(SparseTrainer):
    """Base of the methods that grow weights where the gradient of the dense weight is large.

    On the step of an update, and on no other, inputs and output gradients of the layers that move
    are recorded; the update then computes one layer's dense gradient (R, C) after the other. Under
    gradient accumulation it is the sum over the calls, under DDP the mean over the ranks.
    Parameters are those of :class:`SparseTrainer`.
    """

    def observes(self, name: str, layer: SparseModule) -> Observe | None:
        """Ask for what the dense gradient needs."""
        return "batches"

    def gradient(self, layer: SparseModule) -> Floats:
        """Return the magnitudes of the layer's dense gradient on this step, (R, C).

        Raises
        ------
        FormatError
            Where nothing was recorded; NotFinite, which leaves the layer as it is, where a gradient
            is not finite.
        """
        return magnitudes_of(self.observed(layer).weight_grad())
