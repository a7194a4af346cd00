"""Keys of a recipe that contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spfmt.errors import format_error
from spfmt.recipes.data import DATA_SETS
from spfmt.recipes.schema import toml

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spfmt.recipes.recipe import Recipe
    from spfmt.recipes.tables import Data, Optimizer

__all__ = ["check"]


def check(recipe: Recipe) -> None:
    """Raise a FormatError for keys that contradict each other, or that are missing together."""
    if len(set(recipe.seeds)) < len(recipe.seeds):
        raise format_error(f"seeds = {toml(recipe.seeds)}", "each seed once", "drop the second")
    _check_data(recipe.data)
    _check_method(recipe)
    _one_of("train", "epochs", "steps", recipe.train)
    _check_optimizer(recipe.optimizer)
    _check_rate(recipe)


def _one_of(table: str, first: str, second: str, held: Any) -> None:
    given = [name for name in (first, second) if getattr(held, name) is not None]
    if len(given) != 1:
        both = f"{table}.{first} and {table}.{second}"
        raise format_error(
            both if given else f"neither {both.replace('and', 'nor')}",
            "exactly one of them",
            f"write {table}.{first} alone",
        )


def _refuse(table: Any, keys: Iterable[str], where: str, other: str) -> None:
    """Refuse keys that mean something elsewhere alone."""
    for key in keys:
        if getattr(table, key) not in (None, ()):
            name = f"{type(table).__name__.lower()}.{key}"
            raise format_error(f"{name} {where}", f"it with {other}", f"leave out {name}")


def _check_data(data: Data) -> None:
    known, where = DATA_SETS[data.name], f"for {data.name}"
    if known.built_in:
        _refuse(data, ["dir"], where, "others: this one comes with scikit-learn")
    if data.augment and not known.augments:
        names = ", ".join(name for name, other in DATA_SETS.items() if other.augments)
        raise format_error(
            f"data.augment = true {where}",
            f"it with {names}: a mirrored or shifted digit is another one",
            "leave it out",
        )
    if data.name != "folder":
        _refuse(data, ["size", "test_share"], where, "folder")
    if (data.mean is None) != (data.std is None):
        raise format_error("one of data.mean and data.std", "both or neither", "add the other")


def _check_method(recipe: Recipe) -> None:
    method = recipe.method
    if method.name == "dense":
        given = [name for name, _ in recipe.entries() if name.startswith(("method.", "format."))]
        if len(given) > 1:  # method.name is one of them
            raise format_error(
                f'{given[1]} with method.name = "dense"',
                "no such key: nothing is sparse",
                f"leave out {', '.join(given[1:])}",
            )
        return
    implied = [name for name in ("n", "fan_in") if name in recipe.format.options]
    if not implied:
        _one_of("method", "density", "sparsity", method)
    elif method.density is not None or method.sparsity is not None:
        raise format_error(
            f"method.{'sparsity' if method.density is None else 'density'} and format.{implied[0]}",
            "one of them: both say how many weights stay",
            f"leave out format.{implied[0]}",
        )


def _check_optimizer(optimizer: Optimizer) -> None:
    sgd = optimizer.name == "sgd"
    foreign = ("betas", "eps") if sgd else ("momentum", "nesterov")
    where = f"with optimizer.name = {toml(optimizer.name)}"
    _refuse(optimizer, foreign, where, "adam or adamw" if sgd else "sgd")
    if optimizer.nesterov and optimizer.momentum == 0:
        raise format_error(
            "optimizer.nesterov = true with optimizer.momentum = 0", "a momentum", "raise it"
        )


def _check_rate(recipe: Recipe) -> None:
    rate, length = recipe.rate, recipe.train.epochs or recipe.train.steps or 0
    unit = "epochs" if recipe.train.epochs else "steps"
    if rate.name != "drops":
        _refuse(rate, ["at", "factor"], f"with rate.name = {toml(rate.name)}", '"drops"')
    elif not rate.at:
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
