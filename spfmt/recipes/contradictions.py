"""Keys of a recipe that contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spfmt.errors import format_error
from spfmt.recipes.data import DATA_SETS
from spfmt.recipes.schema import toml

if TYPE_CHECKING:
    from spfmt.recipes.recipe import Recipe

__all__ = ["check"]


def check(recipe: Recipe) -> None:
    """Raise a FormatError for keys that contradict each other, or that are missing together."""
    _check_seeds(recipe)
    _check_data(recipe)
    _check_method(recipe)
    _check_length(recipe)
    _check_optimizer(recipe)
    _check_rate(recipe)


def _one_of(table: str, first: str, second: str, held: Any, needed: bool = True) -> None:
    given = [name for name in (first, second) if getattr(held, name) is not None]
    if len(given) == 2 or (needed and not given):
        got = f"{table}.{first} and {table}.{second}" if given else "neither"
        raise format_error(
            f"{got}{'' if given else f' {table}.{first} nor {table}.{second}'}",
            "exactly one of them",
            f"write {table}.{first} alone",
        )


def _check_seeds(recipe: Recipe) -> None:
    if len(set(recipe.seeds)) < len(recipe.seeds):
        raise format_error(f"seeds = {toml(recipe.seeds)}", "each seed once", "drop the second")


def _check_data(recipe: Recipe) -> None:
    data, known = recipe.data, DATA_SETS[recipe.data.name]
    if data.dir is not None and known.built_in:
        raise format_error(
            f"data.dir for {data.name}",
            "none: it comes with scikit-learn",
            "leave out data.dir or --data",
        )
    if data.augment and not known.augments:
        names = ", ".join(name for name, other in DATA_SETS.items() if other.augments)
        raise format_error(
            f"data.augment = true for {data.name}",
            f"it with {names}: a mirrored or shifted digit is another one",
            "leave it out",
        )
    for name in ("size", "test_share"):
        if getattr(data, name) is not None and data.name != "folder":
            raise format_error(f"data.{name} for {data.name}", "it with folder", "leave it out")
    if (data.mean is None) != (data.std is None):
        raise format_error("one of data.mean and data.std", "both or neither", "add the other")


def _check_method(recipe: Recipe) -> None:
    method, format = recipe.method, recipe.format
    if method.name == "dense":
        given = [name for name, _ in recipe.entries() if name.startswith(("method.", "format."))]
        if len(given) > 1:  # method.name is one of them
            raise format_error(
                f'{given[1]} with method.name = "dense"',
                "no such key: nothing is sparse",
                f"leave out {', '.join(given[1:])}",
            )
        return
    implied = not {"n", "fan_in"}.isdisjoint(format.options)
    _one_of("method", "density", "sparsity", method, needed=not implied)


def _check_length(recipe: Recipe) -> None:
    _one_of("train", "epochs", "steps", recipe.train)


def _check_optimizer(recipe: Recipe) -> None:
    optimizer = recipe.optimizer
    foreign = ("betas", "eps") if optimizer.name == "sgd" else ("momentum", "nesterov")
    for name in foreign:
        if getattr(optimizer, name) is not None:
            raise format_error(
                f"optimizer.{name} with optimizer.name = {toml(optimizer.name)}",
                f"it with {'adam or adamw' if optimizer.name == 'sgd' else 'sgd'}",
                f"leave out optimizer.{name}",
            )
    if optimizer.nesterov and optimizer.momentum == 0:
        raise format_error(
            "optimizer.nesterov = true with optimizer.momentum = 0", "a momentum", "raise it"
        )


def _check_rate(recipe: Recipe) -> None:
    rate, length = recipe.rate, recipe.train.epochs or recipe.train.steps or 0
    unit = "epochs" if recipe.train.epochs else "steps"
    if rate.name != "drops" and (rate.at or rate.factor is not None):
        raise format_error(
            f"rate.{'at' if rate.at else 'factor'} with rate.name = {toml(rate.name)}",
            'it with "drops"',
            'write rate.name = "drops", or leave it out',
        )
    if rate.name == "drops" and not rate.at:
        raise format_error(
            'rate.name = "drops" without rate.at', "the times of the drops", "add rate.at = [40]"
        )
    if list(rate.at) != sorted(set(rate.at)) or any(t >= length for t in rate.at):
        raise format_error(
            f"rate.at = {toml(rate.at)}",
            f"ascending times before the end after {length} {unit}",
            "change rate.at",
        )
    if rate.warmup >= length:
        raise format_error(
            f"rate.warmup = {rate.warmup:g}", f"less than all {length} {unit}", "lower it"
        )
