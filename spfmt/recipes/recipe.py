"""A recipe: everything that a training run depends on, read from TOML and checked key by key."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spfmt.errors import FormatError, MissingDependency, format_error
from spfmt.recipes.data import DATA_SETS
from spfmt.recipes.schema import (
    Kind,
    choice,
    flag,
    key,
    list_of,
    number,
    options,
    read_table,
    text,
    toml,
    unknown_key,
    whole,
)

__all__ = [
    "Data",
    "Format",
    "Method",
    "Model",
    "Optimizer",
    "Output",
    "Rate",
    "Recipe",
    "Train",
    "differences",
    "load_recipe",
    "read_recipe",
]


def _share() -> Kind:
    return number("a number between 0 and 1, neither of them", lambda v: 0 < v < 1)


def _least(low: float) -> Kind:
    return number(f"a number from {low:g} on", lambda v: low <= v < math.inf)


def _positive() -> Kind:
    return number("a number above 0", lambda v: 0 < v < math.inf)


@dataclass(frozen=True)
class Data:
    """``[data]``: images and their classes.

    Attributes
    ----------
    name : str
        Of the data set.
    dir : str, optional
        Directory of its files. ``--data`` comes before it, the environment's SPFMT_DATA after.
    augment : bool
        Crops of images padded by four pixels, every other one mirrored.
    size : int, optional
        Of "folder": height and width that images are scaled to.
    test_share : float, optional
        Of "folder" without a test directory: share of every class that is held back, 0.2.
    mean, std : tuple of float, optional
        Of every channel, of pixels in [0, 1]; by default those of the training images.
    """

    name: str = key(choice(*DATA_SETS))
    dir: str | None = key(text(), None)
    augment: bool = key(flag(), False)
    size: int | None = key(whole(1, 4096), None)
    test_share: float | None = key(_share(), None)
    mean: tuple[float, ...] | None = key(list_of(_least(0)), None)
    std: tuple[float, ...] | None = key(list_of(_positive()), None)


@dataclass(frozen=True)
class Model:
    """``[model]``: the network.

    Attributes
    ----------
    name : str
        "mlp", "lenet", or a network of `spfmt.models`.
    weights : str, optional
        File (.safetensors or .npz) of a trained state to begin with.
    options : mapping
        Other keywords of the network (width, hidden, …).
    """

    name: str = key(text())
    weights: str | None = key(text(), None)
    options: Mapping[str, Any] = options()


@dataclass(frozen=True)
class Method:
    """``[method]``: how the weights get and stay sparse.

    Attributes
    ----------
    name : str
        Of a method, or "dense".
    density, sparsity : float, optional
        Share of weights that stay or that go: one of the two.
    distribution : {"uniform", "erk"}, optional
        Of the density over the layers.
    include, exclude : tuple of str
        Globs on the names of layers.
    options : mapping
        Other keywords of the method (delta_t, gamma_sal, …).
    """

    name: str = key(text())
    density: float | None = key(_share(), None)
    sparsity: float | None = key(_share(), None)
    distribution: str | None = key(choice("uniform", "erk"), None)
    include: tuple[str, ...] = key(list_of(text(), alone=True), ())
    exclude: tuple[str, ...] = key(list_of(text(), alone=True), ())
    options: Mapping[str, Any] = options()


@dataclass(frozen=True)
class Format:
    """``[format]``: the structure of sparse weights.

    Attributes
    ----------
    name : str, optional
        By default the one that the method trains, or "csr".
    options : mapping
        Parameters of the format (block_shape, n, m, …).
    """

    name: str | None = key(text(), None)
    options: Mapping[str, Any] = options()


@dataclass(frozen=True)
class Train:
    """``[train]``: how long, how many at once.

    Attributes
    ----------
    epochs, steps : int, optional
        Length of the run: one of the two.
    batch_size : int
    threads : int, optional
        Of torch and of our kernels; what the machine gives by default.
    log_every, checkpoint_every : int
        Steps between two lines of metrics, and between two checkpoints.
    evaluate_every : int
        Epochs between two evaluations; the last epoch always has one.
    """

    epochs: int | None = key(whole(1), None)
    steps: int | None = key(whole(1), None)
    batch_size: int = key(whole(1), 128)
    threads: int | None = key(whole(1, 1024), None)
    log_every: int = key(whole(1), 50)
    checkpoint_every: int = key(whole(1), 500)
    evaluate_every: int = key(whole(1), 1)


@dataclass(frozen=True)
class Optimizer:
    """``[optimizer]``: SGD, Adam or AdamW; biases and norms do not decay.

    Attributes
    ----------
    name : {"sgd", "adam", "adamw"}
    lr : float
    weight_decay : float
    momentum, nesterov : float, bool, optional
        Of SGD: 0.9 and false.
    betas, eps : (float, float), float, optional
        Of Adam and AdamW: torch's.
    """

    name: str = key(choice("sgd", "adam", "adamw"))
    lr: float = key(_positive())
    weight_decay: float = key(_least(0), 0.0)
    momentum: float | None = key(number("a number in [0, 1)", lambda v: 0 <= v < 1), None)
    nesterov: bool | None = key(flag(), None)
    betas: tuple[float, ...] | None = key(
        list_of(number("a number in [0, 1)", lambda v: 0 <= v < 1), length=2), None
    )
    eps: float | None = key(_positive(), None)


@dataclass(frozen=True)
class Rate:
    """``[rate]``: the learning rate over the run; times are epochs, or steps where the run is.

    Attributes
    ----------
    name : {"constant", "cosine", "drops"}
        The cosine ends at zero; drops multiply by `factor` at the times `at`.
    at : tuple of float
    factor : float
    warmup : float
        Time in which the rate rises from zero, linearly.
    """

    name: str = key(choice("constant", "cosine", "drops"), "constant")
    at: tuple[float, ...] = key(list_of(_positive()), ())
    factor: float | None = key(_share(), None)
    warmup: float = key(_least(0), 0.0)


@dataclass(frozen=True)
class Output:
    """``[output]``: what is written besides metrics and checkpoints.

    Attributes
    ----------
    onnx : bool
        The trained model as ONNX (needs onnx and onnxscript).
    curves : bool
        Curves as PNG (needs matplotlib).
    """

    onnx: bool = key(flag(), True)
    curves: bool = key(flag(), True)


@dataclass(frozen=True)
class Recipe:
    """A whole recipe; see `load_recipe`.

    Attributes
    ----------
    seeds : tuple of int
        One run each.
    data, model, method, format, train, optimizer, rate, output
        Its tables.
    """

    data: Data
    model: Model
    method: Method
    format: Format
    train: Train
    optimizer: Optimizer
    rate: Rate
    output: Output
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for check in (_check_seeds, _check_data, _check_method, _check_length, _check_optimizer):
            check(self)
        _check_rate(self)

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Yield every key that has a value, as ``table.key``, and its value."""
        yield "seeds", self.seeds
        for name in _TABLES:
            table = getattr(self, name)
            for field in dataclasses.fields(table):
                value = getattr(table, field.name)
                inner = value if "options" in field.metadata else {field.name: value}
                for option, given in inner.items():
                    if given is not None and given != ():
                        yield f"{name}.{option}", given

    def to_toml(self) -> str:
        """Write the recipe with all its defaults; reading it gives an equal one."""
        lines, table = [], ""
        for name, value in self.entries():
            place, _, option = name.rpartition(".")
            if place != table:
                table = place
                lines += ["", f"[{table}]"]
            lines.append(f"{option} = {toml(value)}")
        return "\n".join(lines) + "\n"


_TABLES: dict[str, type] = {
    "data": Data,
    "model": Model,
    "method": Method,
    "format": Format,
    "train": Train,
    "optimizer": Optimizer,
    "rate": Rate,
    "output": Output,
}
_SEEDS = list_of(whole(0), alone=True)


# -------------------------------------------------------------------------------------- reading


def load_recipe(
    path: str | os.PathLike[str], changes: Sequence[str] = (), *, data_dir: str | None = None
) -> Recipe:
    """Read a recipe from a file.

    Parameters
    ----------
    path : path
        A TOML file.
    changes : sequence of str
        ``table.key=value`` each, which replace what the file says; a value is one of TOML, or a
        text without quotes.
    data_dir : str, optional
        Replaces ``data.dir``.

    Raises
    ------
    FormatError
        For a file that is no TOML, unknown or missing keys, values of a wrong type or out of range,
        and keys that contradict each other.
    OSError
        For a file that cannot be read.
    """
    tables = _parse(Path(path).read_bytes(), f"the recipe {os.fspath(path)}")
    for change in changes:
        _apply(tables, change)
    if data_dir is not None:
        _apply(tables, f"data.dir={toml(data_dir)}")
    return read_recipe(tables)


def read_recipe(tables: Mapping[str, Any]) -> Recipe:
    """Check the tables of a recipe; see `load_recipe` for the errors."""
    for name in tables:
        if name not in (*_TABLES, "seeds"):
            raise unknown_key("", name, (*_TABLES, "seeds"))
    read: dict[str, Any] = {
        name: read_table(cls, tables.get(name, {}), name) for name, cls in _TABLES.items()
    }
    return Recipe(**read, seeds=_SEEDS.read("seeds", tables.get("seeds", 0)))


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        tomllib = importlib.import_module("tomllib")
    except ImportError:
        raise MissingDependency(
            "got a Python without tomllib; expected Python 3.11 or later for recipes; fix: upgrade"
        ) from None
    try:
        found: dict[str, Any] = tomllib.loads(data.decode())
    except ValueError as error:  # also of bytes that are no text
        raise format_error(f"{where}, which is no TOML: {error}", "TOML", "mend it") from None
    return found


def _apply(tables: dict[str, Any], change: str) -> None:
    """Write ``table.key=value`` into tables."""
    name, equals, value = change.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise format_error(f"--set {change}", "table.key=value", "write --set method.density=0.1")
    try:
        read = _parse(f"value = {value}".encode(), "")["value"]
    except FormatError:
        read = value.strip()  # a text needs no quotes
    for part in parts[:-1]:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise format_error(f"--set {change}", f"{part} to be a table", "name a key of a table")
    tables[parts[-1]] = read


def differences(recipe: Recipe, other: Recipe) -> list[str]:
    """Say in which keys two recipes differ; where the data lies is no difference."""
    mine, theirs = dict(recipe.entries()), dict(other.entries())
    names = [name for name in (mine | theirs) if name != "data.dir"]
    return [
        f"{name} ({_told(mine, name)}, there {_told(theirs, name)})"
        for name in names
        if _told(mine, name) != _told(theirs, name)
    ]


def _told(keys: Mapping[str, Any], name: str) -> str:
    return toml(keys[name]) if name in keys else "not given"


# ------------------------------------------------------------------------------- contradictions


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
