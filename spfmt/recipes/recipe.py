"""A recipe: everything that a training run depends on, read from TOML and checked key by key."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spfmt.errors import FormatError, MissingDependency, format_error
from spfmt.recipes.contradictions import check
from spfmt.recipes.schema import read_table, read_value, toml, unknown_key, whole
from spfmt.recipes.tables import (
    TABLES,
    Data,
    Format,
    Method,
    Model,
    Optimizer,
    Output,
    Rate,
    Train,
)
from spfmt.train.presets import PRESETS

__all__ = ["Recipe", "differences", "load_recipe", "read_recipe"]


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
        check(self)

    def entries(self) -> Iterator[tuple[str, Any]]:
        """Yield every key that has a value, as ``table.key``, and its value."""
        yield "seeds", self.seeds
        for name in TABLES:
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


_ANY = {"errors": "surrogatepass"}  # arguments that are no text: their kind says so


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
        text without quotes. ``table.key=`` takes the key away.
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
        if name not in (*TABLES, "seeds"):
            raise unknown_key("", name, (*TABLES, "seeds"))
    tables = _written_out(tables)
    read: dict[str, Any] = {
        name: read_table(cls, tables.get(name, {}), name) for name, cls in TABLES.items()
    }
    given = tables.get("seeds", 0)
    seeds = read_value("seeds", given, tuple[int, ...], alone=True, **whole(0))
    return Recipe(**read, seeds=seeds)


def _written_out(tables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace ``method.preset`` by the keys that it stands for; those that are given stay."""
    method, format = tables.get("method", {}), tables.get("format", {})
    if not (isinstance(method, Mapping) and isinstance(format, Mapping) and "preset" in method):
        return tables
    found = PRESETS[read_value("method.preset", method["preset"], str, known=PRESETS)]
    own: dict[str, Any] = {
        "name": found.method.__name__.lower(),
        "distribution": found.distribution,
    }
    own |= found.options
    if found.t_end is not None:
        own["t_end"] = found.end  # of this run, whatever its length
    own |= {key: value for key, value in method.items() if key != "preset"}
    if format.get("name", found.format) == found.format:
        params = {k: list(v) if isinstance(v, tuple) else v for k, v in found.params.items()}
        format = {"name": found.format, **params, **format}
    return {**tables, "method": own, "format": format}


def _parse(data: bytes, where: str, errors: str = "strict") -> dict[str, Any]:
    try:
        tomllib = importlib.import_module("tomllib")
    except ImportError:
        raise MissingDependency(
            "got a Python without tomllib; expected Python 3.11 or later for recipes; fix: upgrade"
        ) from None
    try:
        found: dict[str, Any] = tomllib.loads(data.decode(errors=errors))
    except (ValueError, RecursionError) as error:  # also of bytes that are no text
        raise format_error(f"{where}, which is no TOML: {error}", "TOML", "mend it") from None
    return found


def _apply(tables: dict[str, Any], change: str) -> None:
    """Write ``table.key=value`` into tables."""
    name, equals, value = change.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise format_error(f"--set {change}", "table.key=value", "write --set method.density=0.1")
    try:
        read = _parse(f"value = {value}".encode(**_ANY), "", **_ANY)["value"]
    except FormatError:
        read = value.strip()  # a text needs no quotes
    for part in parts[:-1]:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise format_error(f"--set {change}", f"{part} to be a table", "name a key of a table")
    if value.strip():
        tables[parts[-1]] = read
    else:
        tables.pop(parts[-1], None)


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
