"""How tables of a recipe are read: every key has a kind, and what is wrong is said in one line."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

from spfmt.errors import FormatError, format_error

__all__ = [
    "Kind",
    "choice",
    "flag",
    "key",
    "keywords",
    "list_of",
    "number",
    "options",
    "read_options",
    "read_table",
    "text",
    "toml",
    "unknown_key",
    "whole",
]

T = TypeVar("T")
_SURROGATE = re.compile("[\ud800-\udfff]")  # what no file can hold: bytes that were no text
_LARGEST = 1e30  # weights have 32 bits, and optimizers multiply


def _as_it_is(value: Any) -> Any:
    """Return the value."""
    return value


@dataclass(frozen=True)
class Kind:
    """What a key accepts.

    Attributes
    ----------
    expected : str
        In words, for the error.
    accepts : callable
    convert : callable
        From what TOML gives to what the recipe holds.
    known : tuple of str
        Where only some words are accepted: they, from which the error suggests the nearest.
    """

    expected: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] = _as_it_is
    known: tuple[str, ...] = ()

    def read(self, name: str, value: Any) -> Any:
        """Return a value as the recipe holds it, or raise a FormatError that names the key."""
        if not self.accepts(value):
            near = difflib.get_close_matches(str(value), self.known, 1)
            fix = f"did you mean {near[0]!r}?" if near else f"change {name}"
            raise format_error(f"{name} = {toml(value)}", self.expected, fix)
        return self.convert(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def whole(low: int, high: int = 2**31 - 1) -> Kind:
    """Return the kind of whole numbers from `low` to `high`."""
    return Kind(f"a whole number from {low} to {high}", lambda v: _is_whole(v) and low <= v <= high)


def number(expected: str, accepts: Callable[[float], bool]) -> Kind:
    """Return the kind of numbers that satisfy a condition; NaN and infinity never do."""

    def fits(value: Any) -> bool:
        return _is_number(value) and abs(value) <= _LARGEST and accepts(float(value))

    return Kind(expected, fits, float)


def text() -> Kind:
    """Return the kind of texts that are not empty."""
    return Kind("a text", lambda v: isinstance(v, str) and bool(v) and not _SURROGATE.search(v))


def flag() -> Kind:
    """Return the kind of true and false."""
    return Kind("true or false", lambda v: isinstance(v, bool))


def choice(*names: str) -> Kind:
    """Return the kind of some words."""
    return Kind(f"one of {', '.join(names)}", lambda v: v in names, known=names)


def list_of(item: Kind, *, alone: bool = False, length: int | None = None) -> Kind:
    """Return the kind of lists; `alone` takes an item for a list of one."""

    def listed(value: Any) -> list[Any]:
        return [value] if alone and not isinstance(value, list) else value

    def accepts(value: Any) -> bool:
        found = listed(value)
        fits = isinstance(found, list) and all(map(item.accepts, found)) and bool(found)
        return fits and length in (None, len(found))

    size = "" if length is None else f" of {length}"
    expected = f"a list{size}, each {item.expected}"
    return Kind(expected, accepts, lambda value: tuple(map(item.convert, listed(value))))


def key(kind: Kind, default: Any = MISSING) -> Any:
    """Declare a key of a table as a field of its dataclass; without a default it is required."""
    return dataclasses.field(default=default, metadata={"kind": kind})


def options() -> Any:
    """Declare the field that takes every key that the table does not name itself."""
    return dataclasses.field(default_factory=dict, metadata={"options": True})


def read_table(cls: type[T], table: Any, name: str) -> T:
    """Read a table of a recipe.

    Parameters
    ----------
    cls : dataclass
        Whose fields were declared with `key` and `options`.
    table : mapping
    name : str
        Of the table, for errors.

    Raises
    ------
    FormatError
        For no table, an unknown or missing key, or a value that its key does not accept.
    """
    if not isinstance(table, Mapping):
        raise format_error(f"{name} = {toml(table)}", "a table", f"write [{name}] above its keys")
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    kinds = {field.name: field.metadata["kind"] for field in fields if "kind" in field.metadata}
    rest = next((field.name for field in fields if "options" in field.metadata), None)
    others = {k: v for k, v in table.items() if k not in kinds}
    if others and rest is None:
        raise unknown_key(name, next(iter(others)), kinds)
    for field in fields:
        if field.default is MISSING and field.name in kinds and field.name not in table:
            raise format_error(
                f"a recipe without {name}.{field.name}",
                kinds[field.name].expected,
                f"write {field.name} = … below [{name}]",
            )
    read = {k: kind.read(f"{name}.{k}", table[k]) for k, kind in kinds.items() if k in table}
    return cls(**read, **({rest: others} if rest else {}))


def unknown_key(table: str, name: str, known: Iterable[str]) -> FormatError:
    """Build the error for a key that a table, or the recipe, does not have; it suggests another."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1)
    return format_error(
        f"the unknown key {table and table + '.'}{name}",
        f"one of {', '.join(names)}" if names else f"no keys in [{table}] besides its name",
        f"did you mean {near[0]!r}?" if near else "leave it out",
    )


# ------------------------------------------------------------------------- keywords of functions


def read_options(
    given: Mapping[str, Any], name: str, known: Mapping[str, Any], more: Iterable[str] = ()
) -> dict[str, Any]:
    """Check keys of a table that are keywords of a function or of a class.

    Parameters
    ----------
    given : mapping
    name : str
        Of the table.
    known : mapping of str to type
        Keywords and their annotations, see `keywords`.
    more : iterable of str
        Keys that the table has besides, for the suggestion.

    Returns
    -------
    dict
        Lists are tuples where the function takes those.
    """
    found = {}
    for option, value in given.items():
        if option not in known:
            raise unknown_key(name, option, [*known, *more])
        fits, converted = _fit(known[option], value)
        if not fits:
            expected = _words(known[option])
            raise format_error(
                f"{name}.{option} = {toml(value)}", expected, f"change {name}.{option}"
            )
        found[option] = converted
    return found


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
    if hint is Any or isinstance(hint, TypeVar):
        return True, value
    if origin in (typing.Union, types.UnionType):
        fitting = [found for fits, found in (_fit(h, value) for h in inner) if fits]
        return bool(fitting), (fitting or [value])[0]
    if origin is typing.Literal:
        return value in inner, value
    if hint is float:
        return _is_number(value), value
    if hint is int:
        return _is_whole(value), value
    if hint in (str, bool):
        return isinstance(value, hint), value
    if origin is tuple and isinstance(value, list):
        hints = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        parts = [_fit(h, v) for h, v in zip(hints, value, strict=False)]
        return len(hints) == len(value) and all(f for f, _ in parts), tuple(v for _, v in parts)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping), value
    return False, value  # nothing that a recipe can write


_WORDS = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}


def _words(hint: Any) -> str:
    """Return in words what a recipe can write for an annotated type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = dict.fromkeys(filter(None, map(_words, inner)))
        return " or ".join(words)
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if origin is tuple:
        return f"a list like {'[…]' if Ellipsis in inner else [*map(_words, inner)]}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a table"
    return _WORDS.get(hint, "")


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
    return repr(value)
