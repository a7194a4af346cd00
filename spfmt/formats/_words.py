"""Structure words: a whole structure as one int32 array.

A torch module keeps its structure in a single buffer of fixed length. The words describe
themselves (version 1)::

    magic  version  used  checksum  format_id  ndim  shape…  n_params  params…  n_arrays
    per array: ndim  dims…  data…

``used`` counts the words up to the last array, ``checksum`` is the CRC-32 of the words behind it,
and zeros fill the rest of the buffer. Pointer arrays are stored as differences, which fit 32 bits
where the pointers do not; their dims are those of the differences.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from spfmt.errors import FormatError, format_error
from spfmt.formats._base import SparseTensor, Structure
from spfmt.formats._checks import INT32_MAX, Array, Shape, as_int, check_shape, plain_array

__all__ = ["decode", "decode_structure", "encode", "words_capacity"]

Words = npt.NDArray[np.int32]

MAGIC = 0x53504657  # "SPFW"
VERSION = 1
FIXED = 4  # magic, version, used, checksum


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
    shape, params = structure.shape, tuple(structure.params.values())
    head = [tensor.FORMAT_ID, len(shape), *shape, len(params), *params, len(tensor.STRUCTURE)]
    parts: list[Array] = [np.array(head, np.int64)]
    for name in tensor.STRUCTURE:
        array = structure[name]
        stored = np.diff(array) if name in tensor.POINTERS else array
        parts += [np.array([stored.ndim, *stored.shape], np.int64), stored.reshape(-1)]
    used = FIXED + sum(part.size for part in parts)
    length = used if capacity is None else as_int("capacity", capacity, 0)
    if used > min(length, INT32_MAX):
        raise format_error(
            f"a structure of {used} words",
            f"at most {length} (the capacity)",
            "take the capacity from words_capacity(format, shape, nnz, params)",
        )
    words = np.zeros(length, np.int32)
    np.concatenate(parts, out=words[FIXED:used], casting="unsafe")
    words[:FIXED] = MAGIC, VERSION, used, _checksum(words[FIXED:used])
    return words


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
    reader = _Reader(np.ascontiguousarray(array))
    cls = _format_of_id(reader.number())
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
    return Structure(cls, shape, arrays, params)


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
    from spfmt.formats import get_format

    cls, sizes = get_format(format), check_shape(shape)
    given = dict(params or {})
    header = FIXED + 2 + len(sizes) + 1 + len(cls.PARAMS) + 1 + len(cls.NDIMS) + sum(cls.NDIMS)
    return header + cls._most_words(sizes, as_int("nnz_capacity", nnz_capacity, 0, 2**62), given)


class _Reader:
    """Walks over words and refuses to read behind their end."""

    def __init__(self, words: Words) -> None:
        if words.size < FIXED or words[0] != MAGIC:
            raise _corrupt("no structure words (the magic number is missing)", "spfmt's words")
        if words[1] != VERSION:
            raise _corrupt(f"version {int(words[1])}", f"version {VERSION}")
        used = int(words[2])
        if not FIXED <= used <= words.size:
            raise _corrupt(f"{words.size} words", f"{used}, as their header says")
        self.words = words[:used]
        self.place = FIXED
        if words[used:].any() or int(words[3]) != _checksum(self.words[FIXED:]):
            raise _corrupt("words whose checksum is wrong", "the words that encode wrote")

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


def _checksum(words: Words) -> int:
    return int(np.array(zlib.crc32(words.tobytes()), np.uint32).view(np.int32))


def _format_of_id(number: int) -> type[SparseTensor]:
    from spfmt.formats import FORMATS

    for cls in FORMATS.values():
        if number == cls.FORMAT_ID:
            return cls
    raise _corrupt(f"format id {number}", "the id of a format of this version")


def _corrupt(got: str, expected: str) -> FormatError:
    return format_error(
        f"structure words with {got}", expected, "encode the tensor again, or load the state again"
    )
