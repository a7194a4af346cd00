"""The sparse formats: one file each, and the registry that names them."""

from __future__ import annotations

from typing import Any

from spfmt.errors import format_error
from spfmt.formats._base import SparseTensor, Structure, Transposed, new_version
from spfmt.formats._coords import Coordinates
from spfmt.formats._io import load, read_metadata, save
from spfmt.formats._layout import ROW_TILE, Layout, Groups, Lists
from spfmt.formats._words import decode, decode_structure, encode, words_capacity
from spfmt.formats.condensed import Condensed
from spfmt.formats.csr import CSR
from spfmt.formats.hrbp import HRBP
from spfmt.formats.nm import NM
from spfmt.formats.shuffled_block import ShuffledBlock

__all__ = [
    "CSR",
    "FORMATS",
    "HRBP",
    "NM",
    "ROW_TILE",
    "Condensed",
    "Coordinates",
    "Layout",
    "Groups",
    "Lists",
    "ShuffledBlock",
    "SparseTensor",
    "Structure",
    "Transposed",
    "decode",
    "decode_structure",
    "encode",
    "get_format",
    "load",
    "new_version",
    "read_metadata",
    "save",
    "words_capacity",
]

FORMATS: dict[str, type[SparseTensor]] = {
    cls.format: cls for cls in (Condensed, NM, ShuffledBlock, HRBP, CSR)
}
"""Every format by its name."""


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
