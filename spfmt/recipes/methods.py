"""Methods by name; a new one is one line of `METHODS`."""

from __future__ import annotations

import difflib
import fnmatch
from typing import Any

import torch
from torch import nn

from spfmt import train
from spfmt.errors import format_error
from spfmt.formats import FORMATS
from spfmt.recipes.recipe import Recipe
from spfmt.recipes.schema import choice, keywords, read_options
from spfmt.train import SparseTrainer

__all__ = ["DENSE", "METHODS", "build_method", "method_options"]

DENSE = "dense"
"""The name of plain training, without a method."""

METHODS: dict[str, type[SparseTrainer]] = {
    "static": train.Static,
    "set": train.SET,
    "rigl": train.RigL,
    "srigl": train.SRigL,
    "dsb": train.DSB,
    "dnsb": train.DNSB,
    "ssb": train.SSB,
    "hrbp": train.HRBP,
    "gradual": train.GradualPruning,
}
"""Every method that a recipe can name, besides `DENSE`."""

# What the other keys of a recipe say, and what only code can pass.
_OWN = (
    "density", "sparsity", "distribution", "include", "exclude", "format", "seed", "total_steps",
    "averages", "process_group", "schedule",
)  # fmt: skip


def method_options(recipe: Recipe) -> dict[str, Any]:
    """Check ``[method]`` and ``[format]``, and return what the method's class takes.

    Raises
    ------
    FormatError
        For an unknown method or format, or a keyword that it does not have or that is of another
        type.
    """
    method, format = recipe.method, recipe.format
    if method.name == DENSE:
        return {}
    choice(*METHODS, DENSE).read("method.name", method.name)
    cls = METHODS[method.name]
    # A class that passes **options on to its base takes what the base takes.
    inits = [base.__dict__["__init__"] for base in cls.__mro__ if "__init__" in base.__dict__]
    known = keywords(*inits[:-1], without=_OWN)
    more = ("name", "density", "sparsity", "distribution", "include", "exclude")
    given = read_options(method.options, "method", known, more)
    name = choice(*FORMATS).read("format.name", format.name or cls.FORMAT)
    params = read_options(format.options, "format", keywords(FORMATS[name].from_scores), ("name",))
    keys = ("density", "sparsity", "distribution", "include", "exclude")
    named = {name: getattr(method, name) for name in keys if getattr(method, name)}
    return {**named, **({"format": format.name} if format.name else {}), **given, **params}


def build_method(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int
) -> SparseTrainer | None:
    """Make the model sparse, as the recipe's method wants it; None for dense training.

    Raises
    ------
    FormatError
        As `method_options`; where the method cannot train the model, or a pattern of
        ``method.include`` or ``method.exclude`` names no layer.
    """
    if recipe.method.name == DENSE:
        return None
    options = method_options(recipe)
    method = METHODS[recipe.method.name](model, optimizer, total_steps=steps, seed=seed, **options)
    assert method.report is not None
    _check_patterns(recipe, [name for row in method.report for name in (row.name, *row.aliases)])
    return method


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
