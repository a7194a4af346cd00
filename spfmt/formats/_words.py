"""Structure words: a whole structure as one int32 array.

A torch module keeps its structure in a single buffer of fixed length. The words describe
themselves (version 1)::

    magic  version  used  hash_low  hash_high
    n_name  name…  ndim  shape…  n_params  params…  n_arrays
    per array: ndim  dims…  data…

``used`` counts the words up to the last array, the two words of the hash stand for all that follows
them (`content_hash` in ``bindings/positions.pyx``), and zeros fill the rest of the buffer. ``name``
is the format's name in ASCII, four bytes a word. Pointer arrays are stored as differences, which
fit 32 bits where the pointers do not; their dims are those of the differences.

The header stands for the structure: buffers with equal headers hold the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from spfmt.errors import FormatError, format_error
from spfmt.formats._base import SparseTensor
from spfmt.formats._checks import Array, Shape, check_shape
from spfmt.formats._registry import FORMATS, get_format
from spfmt.formats._structure import Structure
from spfmt.structure._checks import INT32_MAX, as_int, plain_array
from spfmt.structure._positions import content_hash

__all__ = ["HEADER", "decode", "decode_structure", "encode", "words_capacity"]

Words = npt.NDArray[np.int32]

MAGIC = 0x53504657  # "SPFW"
VERSION = 1
HEADER = 5
"""Words of the header: magic, version, used, hash_low, hash_high."""

# Structures that live and have been words. What a module has just been given is not decoded and
# checked anew; nothing is kept alive for it.
_living: WeakValueDictionary[bytes, Structure] = WeakValueDictionary()


def encode(tensor: SparseTensor, capacity: int | None = None) -> Words:
    """Structure of `tensor` as int32 words.

    Parameters
    ----------
    tensor : SparseTensor
    capacity : int, optional
        Length of the result; zeros fill what the structure does not need. By default the length
        is exactly what it needs.

    Returns
    -------
    ndarray of int32, shape (capacity,)

    Raises
    ------
    FormatError
        If the structure needs more words than `capacity`.
    """
    structure = tensor._structure
    parts = _parts(structure)
    used = HEADER + sum(part.size for part in parts)
    length = used if capacity is None else as_int("capacity", capacity, 0)
    if used > min(length, INT32_MAX):
        raise format_error(
            f"a structure of {used} words",
            f"at most {length} (the capacity)",
            "take the capacity from words_capacity(format, shape, nnz, params)",
        )
    words = np.zeros(length, np.int32)
    np.concatenate(parts, out=words[HEADER:used], casting="unsafe")
    words[:HEADER] = _header(words[HEADER:used])
    _living[words[:HEADER].tobytes()] = structure
    return words


def _header(content: Words) -> Words:
    """The header of words that are `content` behind it."""
    hashed = np.array([content_hash(content)], "<u8").view("<i4")
    return np.array([MAGIC, VERSION, HEADER + content.size, *hashed], np.int32)


def _parts(structure: Structure) -> list[Array]:
    """All that follows the header, one array after the other."""
    name = structure.cls.format.encode()
    named = np.frombuffer(name + bytes(-len(name) % 4), "<i4")
    shape, params, names = structure.shape, structure.params.values(), structure.cls.STRUCTURE
    sizes = [len(shape), *shape, len(params), *params, len(names)]
    parts = [np.array([named.size]), named, np.array(sizes, np.int64)]
    for array_name in names:
        array = structure[array_name]
        stored = np.diff(array) if array_name in structure.cls.POINTERS else array
        parts += [np.array([stored.ndim, *stored.shape], np.int64), stored.reshape(-1)]
    return parts


def _is_content(structure: Structure, content: Words) -> bool:
    """Whether words behind a header are those of `structure`: all are compared."""
    at = 0
    for part in _parts(structure):
        if not np.array_equal(content[at : at + part.size], part):
            return False
        at += part.size
    return at == content.size


def decode(words: Any) -> tuple[type[SparseTensor], Shape, dict[str, Array], dict[str, int]]:
    """Format class, shape, structure arrays and parameters of structure words.

    Raises
    ------
    FormatError
        For words that are truncated, corrupt, of another version, or of an illegal structure.
    """
    found = decode_structure(words)
    return found.cls, found.shape, dict(found.arrays), dict(found.params)


def decode_structure(words: Any) -> Structure:
    """The checked structure of structure words: its layout, plan and nnz without any values."""
    array = plain_array("structure words", words)
    if array.dtype != np.int32 or array.ndim != 1:
        raise _corrupt(f"dtype {array.dtype} and shape {array.shape}", "a 1-D int32 array")
    content = _content(np.ascontiguousarray(array))
    header = array[:HEADER].tobytes()
    known = _living.get(header)
    registered = known is not None and FORMATS.get(known.cls.format) is known.cls
    if known is not None and registered and _is_content(known, content):
        return known
    reader = _Reader(content)
    cls = _format_named(reader.numbers())
    shape = tuple(reader.numbers())
    params = dict(zip(cls.PARAMS, reader.numbers(len(cls.PARAMS)), strict=True))
    if reader.number() != len(cls.STRUCTURE):
        raise _corrupt("a wrong number of arrays", f"{len(cls.STRUCTURE)} for {cls.__name__}")
    arrays: dict[str, Array] = {}
    for name, ndim in zip(cls.STRUCTURE, cls.NDIMS, strict=True):
        stored = reader.array(reader.numbers(ndim))
        if name in cls.POINTERS:
            stored = np.concatenate([np.zeros(1, np.int64), np.cumsum(stored, dtype=np.int64)])
        arrays[name] = stored
    reader.finish()
    found = _living[header] = Structure(cls, shape, arrays, params)
    return found


def words_capacity(
    format: str | type[SparseTensor],
    shape: Any,
    nnz_capacity: int,
    params: Mapping[str, int] | None = None,
) -> int:
    """A number of words that holds every structure of a format up to some number of values.

    Parameters
    ----------
    format : str or type of SparseTensor
    shape : tuple of int
        Shape of the weight.
    nnz_capacity : int
        Most stored positions.
    params : mapping of str to int, optional
        The format's parameters, as `SparseTensor.params` gives them; they make the bound tighter.
    """
    cls, sizes = get_format(format), check_shape(shape)
    nnz = as_int("nnz_capacity", nnz_capacity, 0, 2**62)
    named = 1 + -(-len(cls.format) // 4)
    head = 1 + len(sizes) + 1 + len(cls.PARAMS) + 1 + len(cls.NDIMS) + sum(cls.NDIMS)
    return HEADER + named + head + cls._most_words(sizes, nnz, dict(params or {}))


def _content(words: Words) -> Words:
    """The words behind a header that says the truth about them."""
    if words.size < HEADER or words[0] != MAGIC:
        raise _corrupt("no structure words (the magic number is missing)", "spfmt's words")
    if words[1] != VERSION:
        raise _corrupt(f"version {int(words[1])}", f"version {VERSION}")
    used = int(words[2])
    if not HEADER <= used <= words.size:
        raise _corrupt(f"{words.size} words", f"{used}, as their header says")
    content = words[HEADER:used]
    if words[used:].any() or not np.array_equal(words[:HEADER], _header(content)):
        raise _corrupt("words whose checksum is wrong", "the words that encode wrote")
    return content


class _Reader:
    """Walks over words and refuses to read behind their end."""

    def __init__(self, words: Words) -> None:
        self.words, self.place = words, 0

    def number(self) -> int:
        return int(self.array([1])[0])

    def numbers(self, expected: int | None = None) -> list[int]:
        count = self.number()
        if count < 0 or (expected is not None and count != expected):
            raise _corrupt(f"a list of {count}", f"a list of {expected}")
        return [int(word) for word in self.array([count])]

    def array(self, dims: list[int]) -> Array:
        size = 1
        for dim in dims:
            size *= dim
        if min(dims, default=0) < 0 or size > self.words.size - self.place:
            raise _corrupt(f"an array of shape {dims}", "arrays that fit the words")
        self.place += size
        return self.words[self.place - size : self.place].reshape(dims)

    def finish(self) -> None:
        if self.place != self.words.size:
            raise _corrupt(f"{self.words.size - self.place} words too many", "no words at the end")


def _format_named(letters: list[int]) -> type[SparseTensor]:
    name = np.array(letters, "<i4").tobytes().rstrip(b"\0").decode("ascii", "replace")
    if name in FORMATS:
        return FORMATS[name]
    raise _corrupt(f"format {name!r}", f"one of {', '.join(FORMATS)}")


def _corrupt(got: str, expected: str) -> FormatError:
    return format_error(
        f"structure words with {got}", expected, "encode the tensor again, or load the state again"
    )
