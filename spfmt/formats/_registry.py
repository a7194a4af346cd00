"""The registry: formats by their names. A format enters it where its class is defined."""

from __future__ import annotations

import inspect
import re
from typing import Any, TypeVar

from spfmt.errors import format_error
from spfmt.formats._base import SparseTensor

__all__ = ["FORMATS", "get_format", "register"]

Cls = TypeVar("Cls", bound=type[SparseTensor])

FORMATS: dict[str, type[SparseTensor]] = {}
"""Every format by its name."""


def register(cls: Cls) -> Cls:
    """Class decorator: make a format known by its name, everywhere at once.

    From then on files, conversion, products, layers, training, export and the command line take the
    name `cls.format`.

    Parameters
    ----------
    cls : type of SparseTensor
        Defines all that `SparseTensor` leaves open; `format` is 1 to 64 of a-z, 0-9 and _.

    Returns
    -------
    type of SparseTensor
        `cls`, unchanged.

    Raises
    ------
    FormatError
        For something else than a complete format, a bad name, and a name that is taken.

    Examples
    --------
    >>> from spfmt.formats import CSR, FORMATS, register
    >>> @register
    ... class Unstructured(CSR):
    ...     __slots__ = ()
    ...     format = "unstructured"
    >>> FORMATS.pop("unstructured").__name__
    'Unstructured'
    """
    if not (isinstance(cls, type) and issubclass(cls, SparseTensor)) or inspect.isabstract(cls):
        lacking = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
        raise format_error(
            f"{cls!r}" + (f" without {lacking}" if lacking else ""),
            "a class that defines all that SparseTensor leaves open",
            "see CSR for a short format",
        )
    name = getattr(cls, "format", None)
    if not isinstance(name, str) or not re.fullmatch("[a-z0-9_]{1,64}", name):
        raise format_error(
            f"{cls.__name__} with format = {name!r}",
            "1 to 64 of a-z, 0-9 and _",
            "name the format, as it shall stand in files",
        )
    if FORMATS.setdefault(name, cls) is not cls:
        raise format_error(
            f"{cls.__name__} with the name {name!r}, which {FORMATS[name].__name__} has",
            "a name that is not taken",
            f"choose another, or take the old one out first: FORMATS.pop({name!r})",
        )
    return cls


def get_format(name: Any) -> type[SparseTensor]:
    """The format of a name; a format class is returned as it is.

    Raises
    ------
    FormatError
        Lists the names that exist.
    """
    if isinstance(name, type) and issubclass(name, SparseTensor):
        return name
    if isinstance(name, str) and name in FORMATS:
        return FORMATS[name]
    raise format_error(f"format {name!r}", f"one of {', '.join(FORMATS)}", "use one of these names")
