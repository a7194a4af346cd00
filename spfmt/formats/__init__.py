"""The sparse formats: one file each; each registers itself by its name."""

from __future__ import annotations

from spfmt.formats._base import SparseTensor, Transposed, new_version
from spfmt.formats._coords import Coordinates
from spfmt.formats._io import load, read_metadata, save
from spfmt.formats._layout import BAND, Groups, Layout, Lists
from spfmt.formats._registry import FORMATS, get_format, register
from spfmt.formats._structure import Structure
from spfmt.formats._words import HEADER, decode, decode_structure, encode, words_capacity
from spfmt.formats.condensed import Condensed
from spfmt.formats.csr import CSR
from spfmt.formats.hrbp import HRBP
from spfmt.formats.nm import NM
from spfmt.formats.shuffled_block import ShuffledBlock

__all__ = [
    "BAND",
    "CSR",
    "FORMATS",
    "HEADER",
    "HRBP",
    "NM",
    "Condensed",
    "Coordinates",
    "Groups",
    "Layout",
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
    "register",
    "save",
    "words_capacity",
]
