"""Methods by name; a new one is one line of `METHODS`."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from spfmt import train
from spfmt.errors import format_error
from spfmt.formats import FORMATS
from spfmt.recipes.recipe import Recipe
from spfmt.recipes.schema import keywords, read_options, read_value, unknown_key
from spfmt.torch.survey import survey

__all__ = ["DENSE", "METHODS", "Trainer", "build_method", "method_options"]

DENSE = "dense"
"""The name of plain training, without a method."""


Trainer = train.SparseTrainer | train.Rewire
"""What a recipe trains with."""

METHODS: dict[str, type[Any]] = {
    "static": train.Static,
    "set": train.SET,
    "rigl": train.RigL,
    "srigl": train.SRigL,
    "dsb": train.DSB,
    "dnsb": train.DNSB,
    "ssb": train.SSB,
    "hrbp": train.HRBP,
    "gradual": train.GradualPruning,
    "sampled": train.SampledGrowth,
    "rewire": train.Rewire,
}
"""Every method that a recipe can name, besides `DENSE`; one with a ``finish()`` is ended by it."""

# What the other keys of a recipe say, and what only code can pass.
_OWN = (
    "density", "sparsity", "distribution", "scores", "include", "exclude", "format", "seed",
    "total_steps", "averages", "process_group", "schedule",
)  # fmt: skip
_KEYS = ("density", "sparsity", "distribution", "scores", "include", "exclude")
_SALIENCIES = {"snip": train.snip, "grasp": train.grasp}


def method_options(recipe: Recipe) -> dict[str, Any]:
    """Check ``[method]`` and ``[format]``, and return what the method's class takes."""
    method, format = recipe.method, recipe.format
    if method.name == DENSE:
        return {}
    read_value("method.name", method.name, str, known=(*METHODS, DENSE))
    cls = METHODS[method.name]
    taken = _keywords(cls)
    known = {key: hint for key, hint in taken.items() if key not in _OWN}
    more = ("name", *(key for key in _KEYS if key in taken))
    given = read_options(method.options, "method", known, more)
    name = read_value("format.name", format.name or _default_format(cls), str, known=FORMATS)
    every = keywords(FORMATS[name].from_scores).items()
    params = {key: hint for key, hint in every if hint is not Any}  # arrays: no recipe has those
    params = read_options(format.options, "format", params, ("name",))
    named = {name: getattr(method, name) for name in _KEYS if getattr(method, name)}
    if inspect.Parameter.empty is getattr(_own(cls, "density"), "default", None):  # needs one
        if "sparsity" in named:
            named["density"] = 1.0 - named.pop("sparsity")
        if "density" not in named:
            raise format_error(
                f"method.name = {method.name!r} without method.density", "where it ends", "write it"
            )
    for key in named:
        if key not in taken:
            raise unknown_key("method", key, (*more, *known))
    return {**named, **({"format": format.name} if format.name else {}), **given, **params}


def _keywords(cls: type) -> dict[str, Any]:
    """Return what a class's constructor takes, and what those of its bases do."""
    inits = [base.__dict__["__init__"] for base in cls.__mro__ if "__init__" in base.__dict__]
    return keywords(*inits[:-1])  # the last one is that of object


def _own(cls: type, name: str) -> inspect.Parameter | None:
    return inspect.signature(cls).parameters.get(name)


def _default_format(cls: type) -> str:
    """Return the format of a method whose recipe names none."""
    own = _own(cls, "format")
    name: str = getattr(cls, "FORMAT", None) or (own.default if own else "csr")
    return name


def build_method(
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    seed: int,
    batch: tuple[Tensor, Tensor],
) -> Trainer | None:
    """Make the model sparse, as the recipe's method wants it; None for dense training.

    SNIP and GraSP tell from `batch`, images and classes, where to begin.

    Raises
    ------
    FormatError
        As `method_options`; where the method cannot train the model, or a pattern of
        ``method.include`` or ``method.exclude`` names no layer.
    """
    if recipe.method.name == DENSE:
        return None
    _check_patterns(recipe, [name for entry in survey(model) for name in entry.names])
    cls, options = METHODS[recipe.method.name], method_options(recipe)
    taken = _keywords(cls)
    if "seed" in taken:  # one without draws nothing
        options["seed"] = seed
    if "reset" in taken and recipe.model.weights is not None:
        options.setdefault("reset", False)  # random scores would draw the trained weights anew
    if recipe.method.scores in _SALIENCIES:
        options |= _saliency(recipe, model, batch)
    method: Trainer = cls(model, optimizer, total_steps=steps, **options)
    return method


def _saliency(recipe: Recipe, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Return scores of the dense model, and densities as their ranking over all layers has them.

    The densities are the recipe's where it says how they are spread, or where n:m do.
    """
    method = recipe.method
    given = {name: getattr(method, name) or None for name in ("include", "exclude")}
    scores = _SALIENCIES[str(method.scores)](model, _loss, [batch], **given)
    share = method.density if method.sparsity is None else 1.0 - method.sparsity
    if method.distribution is not None or share is None:
        return {"scores": scores}
    return {"scores": scores, "density": scores.densities(share), "sparsity": None}


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _check_patterns(recipe: Recipe, layers: list[str]) -> None:
    """Refuse a pattern without a layer: a slip of the pen would train another network."""
    for key in ("include", "exclude"):
        for pattern in getattr(recipe.method, key):
            if not fnmatch.filter(layers, pattern):
                near = difflib.get_close_matches(pattern, layers, 1)
                raise format_error(
                    f"{pattern!r} in method.{key}, which names no layer",
                    f"a glob on {', '.join(layers)}",
                    f"did you mean {near[0]!r}?" if near else "change it",
                )
