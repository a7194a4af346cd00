"""How tables of a recipe are read: every key has a type, and what is wrong is said in one line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING
from typing import Any, TypeVar

from spfmt.errors import FormatError, format_error

__all__ = [
    "key",
    "keywords",
    "options",
    "read_options",
    "read_table",
    "read_value",
    "toml",
    "unknown_key",
    "whole",
]

T = TypeVar("T")
_UNFIT = re.compile("[\0\ud800-\udfff]")  # what no name of a file can hold
_LARGEST = 1e30  # weights have 32 bits, and optimizers multiply


def key(default: Any = MISSING, **limits: Any) -> Any:
    """Declare a key and its limits, those of `read_value`; required without a default."""
    return dataclasses.field(default=default, metadata=limits)


def options() -> Any:
    """Declare the field ``options``: it takes every key that the table does not name itself."""
    return dataclasses.field(default_factory=dict, metadata={"options": True})


def whole(low: int, high: int = 2**31 - 1) -> dict[str, Any]:
    """Return the limits of whole numbers from `low` to `high`."""
    words = f"a whole number from {low} to {high}"
    return {"expected": words, "accepts": lambda v: low <= v <= high}


def read_value(
    name: str,
    value: Any,
    hint: Any,
    *,
    expected: str = "",
    accepts: Callable[[Any], bool] = lambda item: True,
    known: Iterable[str] = (),
    alone: bool = False,
) -> Any:
    """Return a value, as TOML gives it, as the recipe holds it: of the annotated type `hint`.

    Parameters
    ----------
    expected, accepts : str, callable
        What the value, or every item of a list, must be besides, in words and in code.
    known : iterable of str
        All the words that are accepted.
    alone : bool
        Whether an item stands for a list of one.
    """
    known = [*known, *_choices(hint)]
    fits, found = _fit(hint, [value] if alone and not isinstance(value, list) else value)
    items = found if isinstance(found, tuple) else (found,)
    if not fits or not all(accepts(v) and (not known or v in known) for v in items):
        near = difflib.get_close_matches(value if isinstance(value, str) else "", known, 1)
        words = _words(hint, f"one of {', '.join(known)}" if known else expected)
        fix = f"did you mean {near[0]!r}?" if near else f"change {name}"
        raise format_error(f"{name} = {toml(value)}", words, fix)
    return found


def read_table(cls: type[T], table: Any, name: str) -> T:
    """Read a table of a recipe into a dataclass whose fields are of `key` and `options`."""
    if not isinstance(table, Mapping):
        raise format_error(f"{name} = {toml(table)}", "a table", f"write [{name}] above its keys")
    hints, every = typing.get_type_hints(cls), dataclasses.fields(cls)  # type: ignore[arg-type]
    fields = {field.name: field for field in every if "options" not in field.metadata}
    others = {k: v for k, v in table.items() if k not in fields}
    if others and len(fields) == len(every):
        raise unknown_key(name, next(iter(others)), fields)
    for field in fields.values():
        if field.default is MISSING and field.name not in table:
            raise format_error(
                f"a recipe without {name}.{field.name}",
                f"it below [{name}]",
                f"write {field.name} = …",
            )
    read = {
        k: read_value(f"{name}.{k}", table[k], hints[k], **field.metadata)
        for k, field in fields.items()
        if k in table
    }
    return cls(**read, **({"options": others} if len(fields) < len(every) else {}))


def unknown_key(table: str, name: str, known: Iterable[str]) -> FormatError:
    """Build the error for a key that a table, or the recipe, does not have; it suggests another."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    return format_error(
        f"the unknown key {table and table + '.'}{name}",
        f"one of {', '.join(names)}" if names else f"no keys in [{table}] besides its name",
        f"did you mean {near[0]!r}?" if near else "leave it out",
    )


# ---------------------------------------------------------------------------- keywords and types


def read_options(
    given: Mapping[str, Any], name: str, known: Mapping[str, Any], more: Iterable[str] = ()
) -> dict[str, Any]:
    """Check keys of the table `name` that are keywords of a function, see `keywords`.

    The table has the keys `more` besides, which an error may suggest.
    """
    for option in given:
        if option not in known:
            raise unknown_key(name, option, [*known, *more])
    return {k: read_value(f"{name}.{k}", value, known[k]) for k, value in given.items()}


def keywords(*functions: Callable[..., Any], without: Iterable[str] = ()) -> dict[str, Any]:
    """Return the keyword-only parameters of functions and their annotations."""
    found: dict[str, Any] = {}
    for function in functions:
        hints = typing.get_type_hints(function)
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                found.setdefault(parameter.name, hints.get(parameter.name, Any))
    return {k: hint for k, hint in found.items() if k not in set(without)}


def _fit(hint: Any, value: Any) -> tuple[bool, Any]:
    """Tell whether a value is of an annotated type, and return it as that type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        fitting = [found for fits, found in (_fit(h, value) for h in inner) if fits]
        same = [found for found in fitting if type(found) is type(value)]  # 1 stays a whole number
        return bool(fitting), (same or fitting or [value])[0]
    if origin is typing.Literal:
        return value in inner, value
    if hint is float and _is_number(value):
        fits = abs(value) <= _LARGEST
        return fits, float(value) if fits else value
    if hint is int:
        return _is_whole(value), value
    if hint is bool:
        return isinstance(value, bool), value
    if hint is str and isinstance(value, str):
        return bool(value) and not _UNFIT.search(value), value
    if origin is tuple and isinstance(value, list) and value:
        hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        parts = [_fit(h, v) for h, v in zip(hints, value, strict=False)]
        return len(hints) == len(value) and all(f for f, _ in parts), tuple(v for _, v in parts)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping), value
    return False, value  # nothing that a recipe can write


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _choices(hint: Any) -> list[str]:
    """Return the words that an annotated type lists."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return list(inner)
    return [word for h in inner for word in _choices(h)]


_WORDS = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}


def _words(hint: Any, item: str) -> str:
    """Return in words what a recipe can write for an annotated type, or for an item of a list."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(filter(None, (_words(h, item) for h in inner))))
    if origin is tuple:
        size = "" if Ellipsis in inner else f" of {len(inner)}"
        return f"a list{size}, each {_words(inner[0], item)}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a table"
    return "" if hint is types.NoneType else item or _WORDS.get(hint, "")


# -------------------------------------------------------------------------------------- writing


def toml(value: Any) -> str:
    """Write a value as TOML does."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, int) and abs(value) >= 2**63:
        return hex(value)  # Python refuses to write thousands of digits
    return repr(value)
