"""A dense model at the start of a run: layers made sparse, and the optimizer told of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spfmt.errors import format_error
from spfmt.torch.attention import set_fast_paths
from spfmt.torch.layer import implied_density, resolve_density
from spfmt.torch.module import SparseModule
from spfmt.torch.report import ModelReport
from spfmt.torch.sparsify import sparsify
from spfmt.torch.survey import Found, places, swap
from spfmt.torch.wrappers import changeable

if TYPE_CHECKING:
    from spfmt.train.base import SparseTrainer

__all__ = ["Start", "started"]


@dataclass(frozen=True)
class Start:
    """How a method makes a dense model sparse; see :class:`SparseTrainer` for the options."""

    density: Any = None
    sparsity: float | None = None
    format: str | None = None
    include: Any = None
    exclude: Any = None
    distribution: Any = None
    scores: Any = "random"
    reset: bool | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> bool:
        """Whether any layer shall be made."""
        return self != Start()

    def options(self, method: type[SparseTrainer], seed: int) -> dict[str, Any]:
        """Return the arguments of :func:`spfmt.torch.sparsify`.

        Raises
        ------
        FormatError
            For a density that leaves nothing to choose.
        TypeError
            For keywords that nobody knows.
        """
        implied = implied_density(self.params, (1, 1)) is not None
        given = self.density is not None or self.sparsity is not None
        if not (given or implied):
            self._nothing_asked(method)
        if given:
            self._check_density()
        spread = given and not isinstance(self.density, Mapping)
        random = self.scores == "random"
        own_format = self.format in (None, method.FORMAT)
        own = method.PARAMS if own_format else {}
        return {
            "format": self.format or method.FORMAT,
            "density": self.density,
            "sparsity": self.sparsity,
            "include": "*" if self.include is None else self.include,
            "exclude": self.exclude,
            "distribution": self.distribution or ("erk" if spread else "uniform"),
            "scores": self.scores,
            "reset": random if self.reset is None else self.reset,
            "generator": torch.Generator().manual_seed(seed),
            **own,
            **self.params,
        }

    def _nothing_asked(self, method: type) -> None:
        unknown = ", ".join(self.params)
        if unknown and self == Start(params=self.params):
            raise TypeError(f"{method.__name__}() got unexpected keyword arguments: {unknown}")
        raise format_error(
            "options of layers to make, and no density",
            "density or sparsity, or what stands for one: n and m, or fan_in",
            "pass density=0.1; a model that is sparse already needs none of these options",
        )

    def _check_density(self) -> None:
        """A layer without any weight, or with all, has nothing that could move."""
        named = self.density if isinstance(self.density, Mapping) else {"": self.density}
        for name, own in named.items():
            share = resolve_density(own, self.sparsity)
            if not 0.0 < share < 1.0:
                raise format_error(
                    f"a density of {share:g}{name and f' for {name}'}",
                    "more than 0 and less than 1",
                    "pass density=0.1; leave a layer dense with exclude=",
                )


@contextmanager
def started(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: Mapping[str, Any]
) -> Iterator[ModelReport]:
    """Make a model sparse, and let its optimizer hold the new parameters in place of the old.

    Parameters
    ----------
    model : nn.Module
    optimizer : torch.optim.Optimizer
        Holds the weights that are replaced, and no state of them that would be lost.
    options : mapping
        For :func:`spfmt.torch.sparsify`.

    Yields
    ------
    ModelReport

    Raises
    ------
    FormatError
        Where the optimizer does not fit. Model and optimizer are as they were then, and also where
        anything fails inside.
    """
    model = changeable(model)
    before = places(model)
    # Values and biases, which are the dense layers' own, are drawn when nothing can fail any more.
    report = sparsify(model, **{**options, "reset": False})
    groups = [list(group["params"]) for group in optimizer.param_groups]
    try:
        new = _replaced(before)
        _check(optimizer, new, keeps=not options["reset"])
        for group in optimizer.param_groups:
            group["params"] = [new[p][1].values if p in new else p for p in group["params"]]
        yield report
    except BaseException:
        for entry in before:
            swap(entry, entry.module)
        set_fast_paths(model)
        for group, params in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = params
        raise
    for old, (_, layer) in new.items():
        optimizer.state.pop(old, None)
        if options["reset"]:
            layer.reset_parameters(options["generator"])


def _replaced(before: Iterable[Found]) -> dict[Any, tuple[str, SparseModule]]:
    """Return, of every weight that was replaced, the name of its layer and the new layer."""
    found: dict[Any, tuple[str, SparseModule]] = {}
    for entry in before:
        layer: Any = getattr(*entry.places[0]) if entry.places else entry.module
        if layer is not entry.module:
            found[entry.module.weight] = entry.name, layer
    return found


def _check(optimizer: Any, new: Mapping[Any, tuple[str, SparseModule]], keeps: bool) -> None:
    held = {p for group in optimizer.param_groups for p in group["params"]}
    missing = [name for old, (name, _) in new.items() if old.requires_grad and old not in held]
    if missing:
        raise format_error(
            f"an optimizer without the weight of {', '.join(missing)}",
            "one that holds the model's parameters",
            "make the optimizer of this model's parameters, or sparsify(model, ...) first and then "
            "make it",
        )
    inner = [v for v in vars(optimizer).values() if hasattr(v, "param_groups")]
    if inner:
        raise format_error(
            f"a {type(optimizer).__name__}, which wraps {type(inner[0]).__name__}",
            "an optimizer of torch.optim, whose parameters can be replaced",
            "call sparsify(model, ...) first, then make the optimizer, and leave out density",
        )
    if keeps and any(optimizer.state.get(old) for old in new):
        raise format_error(
            "an optimizer with state of dense weights",
            "a new one",
            "make the optimizer anew, or pass reset=True to start from new weights",
        )
