"""Where weights begin: SNIP, GraSP and random scores of a dense model, before it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spfmt.errors import format_error
from spfmt.structure import topk_mask
from spfmt.structure._checks import as_density
from spfmt.torch.survey import Selector, as_dense, matches, selectors, survey, ties, why_unfit
from spfmt.torch.wrappers import unwrapped
from spfmt.train.ranks import world_size

__all__ = ["Saliency", "grasp", "random_saliency", "snip"]

_Loss = Callable[[nn.Module, Any], Tensor]
_Some = Selector | Iterable[Selector] | None


class Saliency(Mapping[str, Tensor]):
    """Scores of the weights of dense layers, by name: larger ones are worth more.

    They are comparable over the whole model. Pass them as ``scores=`` to :func:`sparsify` or to a
    method, with a density that is spread by "erk" or "uniform", or with :meth:`densities` of the
    ranking of all weights together.

    Parameters
    ----------
    scores : mapping of str to Tensor
        Of the shape of each weight; that of a linear layer, (out, in), for GPT-2's ``Conv1D``.

    Raises
    ------
    FormatError
        For a score that is not finite.

    Examples
    --------
    >>> import torch
    >>> a, b = torch.tensor([[9.0, 1.0], [8.0, 7.0]]), torch.tensor([[2.0, 0.0, 2.0, 1.0]])
    >>> scores = Saliency({"a": a, "b": b})
    >>> scores.densities(5 / 8)
    {'a': 0.75, 'b': 0.5}
    >>> scores.masks({"a": 0.5})["a"].tolist()
    [[1.0, 0.0], [1.0, 0.0]]
    """

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self._scores = {name: score.detach().to("cpu", torch.float32) for name, score in
                        scores.items()}  # fmt: skip
        bad = [name for name, score in self._scores.items() if not score.isfinite().all()]
        if bad:
            raise format_error(
                f"scores of {', '.join(bad)} that are not finite",
                "finite weights and gradients",
                "scale the loss down, and look for NaN in the data",
            )

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __call__(self, name: str, layer: Any) -> Tensor:
        """Return the scores of a layer, as :func:`sparsify` asks for them.

        Raises
        ------
        FormatError
            For a layer without scores, or of another shape.
        """
        score = self._scores.get(name)
        if score is None or score.shape != layer.weight.shape:
            raise format_error(
                f"no scores of {name}, {tuple(layer.weight.shape)}",
                f"one of {', '.join(self._scores)}, of its shape",
                "score the model that is made sparse, and exclude what was excluded there",
            )
        return score

    def densities(self, density: float) -> dict[str, float]:
        """Share a budget as the ranking of all weights together does.

        Parameters
        ----------
        density : float
            Of all layers together: round(density · weights) stay, of equal scores the first.

        Returns
        -------
        dict of str to float
            For ``density=`` of :func:`sparsify` or of a method. Layers that keep every weight are
            left out, so that they stay dense.

        Raises
        ------
        FormatError
            Where a layer would keep no weight, so that nothing passes through it.
        """
        sizes = np.array([score.numel() for score in self._scores.values()])
        every = np.concatenate([score.numpy().reshape(-1) for score in self._scores.values()])
        kept = topk_mask(every, round(as_density(density) * every.size))
        counts = [int(part.sum()) for part in np.split(kept, np.cumsum(sizes)[:-1])]
        shares = dict(zip(self._scores, zip(counts, sizes.tolist(), strict=True), strict=True))
        empty = [name for name, (count, _) in shares.items() if count == 0]
        if empty:
            raise format_error(
                f"a density of {density} that leaves no weight in {', '.join(empty)}",
                "some in every layer",
                "raise the density, exclude these layers, or spread it with distribution='erk'",
            )
        return {name: count / size for name, (count, size) in shares.items() if count < size}

    def masks(self, densities: Mapping[str, float]) -> Saliency:
        """Return the unstructured masks of the best scores, as scores of 0 and 1.

        A format that counts the weights of a mask (HRBP, regrouping) then counts those of exactly
        this mask, whatever the scores of the others.

        Parameters
        ----------
        densities : mapping of str to float
            Of the layers to take.
        """
        return Saliency({name: _mask(self[name], share) for name, share in densities.items()})


def _mask(score: Tensor, density: float) -> Tensor:
    kept = topk_mask(score.numpy(), round(as_density(density) * score.numel()))
    return torch.from_numpy(kept).float()


def snip(
    model: nn.Module,
    loss: _Loss,
    batches: Iterable[Any],
    *,
    include: _Some = None,
    exclude: _Some = None,
    process_group: Any = None,
) -> Saliency:
    """Connection sensitivity ``|w · ∂L/∂w|`` (SNIP; Lee, Ajanthan and Torr, ICLR 2019).

    The paper takes one batch and one backward pass, before training. Its scores are these divided
    by their sum, which ranks alike.

    Parameters
    ----------
    model : nn.Module
        Dense. It is called as it is, in training or evaluation mode; parameters, gradients and
        buffers stay what they are.
    loss : callable
        ``(model, batch) -> Tensor``, a scalar.
    batches : iterable
        Their losses are added.
    include, exclude : str, type, callable, or several of them, optional
        Which layers are scored: by default all that :func:`sparsify` can take.
    process_group : ProcessGroup, optional
        The ranks whose gradients are averaged; all by default.

    Returns
    -------
    Saliency

    Raises
    ------
    FormatError
        Without a layer or a batch, and for scores that are not finite.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from spfmt.torch import sparsify
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> batch = torch.randn(64, 16), torch.randint(4, (64,))
    >>> def loss(model, batch):
    ...     return nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> scores = snip(model, loss, [batch])
    >>> report = sparsify(model, "csr", scores.densities(0.1), scores=scores)
    >>> sum(row.nnz for row in report)
    64
    """
    model, weights = _weights(model, include, exclude)
    with _undisturbed(model):
        gradients = _gradients(model, loss, list(batches), weights, process_group)
    products = (w.detach().float() * g for w, g in zip(weights.values(), gradients, strict=True))
    return _saliency(model, weights, [product.abs() for product in products])


def grasp(
    model: nn.Module,
    loss: _Loss,
    batches: Iterable[Any],
    *,
    include: _Some = None,
    exclude: _Some = None,
    process_group: Any = None,
) -> Saliency:
    """Gradient signal preservation ``w · Hg`` (GraSP; Wang, Zhang and Grosse, ICLR 2020).

    Taking a weight away changes the gradient's squared norm by ``S = -w·Hg`` (eq. 8, up to a factor
    of two), with the gradient g and the Hessian H of the loss for the scored weights. The paper
    removes the weights of largest S; these scores are -S, so that larger ones are kept. The product
    Hg comes from a second backward pass through the first, as in the authors' code.

    Parameters are those of :func:`snip`; here batches are gone through twice. The authors take ten
    images of each class, and divide the outputs by 200 before the softmax: do so in `loss`.

    Returns
    -------
    Saliency

    Raises
    ------
    FormatError
        As :func:`snip`.
    RuntimeError
        Of torch, for an operator without a second derivative; the sparse layers of this library
        have none (score a dense copy).
    """
    model, weights = _weights(model, include, exclude)
    batches = list(batches)
    with _undisturbed(model), sdpa_kernel(SDPBackend.MATH):
        gradients = _gradients(model, loss, batches, weights, process_group)
        products = _hessian_products(model, loss, batches, weights, gradients)
    products = _over_ranks(products, process_group)
    both = zip(weights.values(), products, strict=True)
    return _saliency(model, weights, [w.detach().float() * hg for w, hg in both])


def random_saliency(
    model: nn.Module,
    generator: torch.Generator | None = None,
    *,
    include: _Some = None,
    exclude: _Some = None,
) -> Saliency:
    """Random scores in [0, 1) of every weight.

    Parameters
    ----------
    model, include, exclude
        As for :func:`snip`.
    generator : torch.Generator, optional
        Of the CPU.

    Returns
    -------
    Saliency
    """
    model, weights = _weights(model, include, exclude)
    drawn = [torch.rand(w.shape, generator=generator, device="cpu") for w in weights.values()]
    return _saliency(model, weights, drawn)


def _weights(
    model: nn.Module, include: _Some, exclude: _Some
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the model itself, without wrappers, and the weights that are scored."""
    model = unwrapped(model)
    found = survey(model)
    tied = ties(found)
    wanted, unwanted = selectors("*" if include is None else include), selectors(exclude)
    weights = {
        entry.name: entry.weights["weight"]
        for entry in found
        if not why_unfit(entry, tied)
        and matches(wanted, entry.names, entry.module)
        and not matches(unwanted, entry.names, entry.module)
        and entry.weights["weight"].requires_grad
    }
    if not weights:
        raise format_error(
            "a model without a layer to score",
            "dense linear layers or convolutions whose weights require gradients",
            "score the model before it is made sparse",
        )
    return model, weights


def _saliency(
    model: nn.Module, weights: Mapping[str, nn.Parameter], scores: Sequence[Tensor]
) -> Saliency:
    """Name the scores; those of a Conv1D, whose weight is (in, out), are turned."""
    modules = dict(model.named_modules())
    return Saliency(
        {
            name: score if as_dense(modules[name]) is modules[name] else score.t()
            for name, score in zip(weights, scores, strict=True)
        }
    )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put buffers (running statistics) back to what they were."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, content in before:
                buffer.copy_(content)


def _gradients(
    model: nn.Module,
    loss: _Loss,
    batches: Sequence[Any],
    weights: Mapping[str, nn.Parameter],
    group: Any,
) -> list[Tensor]:
    """Return the gradients of the sum of the losses, float32; mean over the ranks."""
    if not batches:
        raise format_error("no batches", "at least one", "pass [batch]")
    totals = [torch.zeros_like(w, dtype=torch.float32) for w in weights.values()]
    for batch in batches:
        _add(
            totals, torch.autograd.grad(loss(model, batch), [*weights.values()], allow_unused=True)
        )
    return _over_ranks(totals, group)


def _hessian_products(
    model: nn.Module,
    loss: _Loss,
    batches: Sequence[Any],
    weights: Mapping[str, nn.Parameter],
    gradients: Sequence[Tensor],
) -> list[Tensor]:
    """Return Hg of the sum of the losses."""
    totals = [torch.zeros_like(g) for g in gradients]
    for batch in batches:
        value = loss(model, batch)
        first = torch.autograd.grad(
            value, [*weights.values()], create_graph=True, allow_unused=True
        )
        parts = zip(first, gradients, strict=True)
        dots = [(a * g).sum() for a, g in parts if a is not None and a.requires_grad]
        if dots:
            total = torch.stack(dots).sum()
            _add(totals, torch.autograd.grad(total, [*weights.values()], allow_unused=True))
    return totals


def _add(totals: Sequence[Tensor], found: Sequence[Tensor | None]) -> None:
    for total, part in zip(totals, found, strict=True):
        if part is not None:
            total += part


def _over_ranks(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """Average over the ranks, which then choose alike."""
    count = world_size(group)
    if count > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor, group=group)
            tensor /= count
    return tensors
