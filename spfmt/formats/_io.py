"""Files: one safetensors file per tensor (file format version 1).

Tensors: the structure arrays by name, as uint16 where they fit and int32 or int64 otherwise, and
``values``. Metadata, all strings: ``spfmt_format``, ``spfmt_version``, ``shape`` and ``params``
(JSON), ``spfmt_crc32`` (of format, shape and params, then the tensors in the order of the format,
``values`` last), and what the user adds.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from spfmt._files import replace_file
from spfmt.errors import FormatError, MissingDependency, format_error
from spfmt.formats._base import SparseTensor
from spfmt.formats._checks import Array, value_dtype
from spfmt.formats._registry import FORMATS

__all__ = ["load", "read_metadata", "save"]

VERSION = 1
RESERVED = ("shape", "params")
PREFIX = "spfmt_"
UINT16_MAX = int(np.iinfo(np.uint16).max)
INDEX_DTYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64}
VALUE_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Path = str | os.PathLike[str]


def save(tensor: SparseTensor, path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensor` to a safetensors file.

    The file appears whole or not at all: it is written beside `path`, flushed to the disk and
    renamed.

    Parameters
    ----------
    tensor : SparseTensor
    path : path-like
    metadata : mapping of str to str, optional
        Notes of the user, see `read_metadata`.

    Raises
    ------
    FormatError
        For metadata that is not text or takes a reserved name, and for a `path` that is a folder,
        a device or a pipe.
    OSError
        For a folder that is missing or cannot be written to.
    """
    target = os.path.realpath(os.fsdecode(path))
    if os.path.exists(target) and not os.path.isfile(target):
        raise format_error(
            f"path {target!r}, a folder, device or pipe", "a file, old or new", "add a file name"
        )
    notes = _check_notes({} if metadata is None else metadata)
    arrays = {name: _narrow(array) for name, array in tensor.structure().items()}
    arrays["values"] = tensor.values
    header = {
        "spfmt_format": tensor.format,
        "spfmt_version": str(VERSION),
        "shape": json.dumps(tensor.shape),
        "params": json.dumps(tensor.params()),
    }
    header["spfmt_crc32"] = str(_checksum(header, arrays.values()))
    header.update(notes)
    replace_file(target, _safetensors("numpy").save(arrays, metadata=header))


def load(path: Path) -> SparseTensor:
    """Read a tensor of any format from a file that `save` wrote.

    Raises
    ------
    FormatError
        For a file that is truncated, corrupt, foreign or of a newer version.
    OSError
        For a file that cannot be opened.
    """
    entries, header = _read(path)
    cls = _format_of(header, path)
    tensors = {name: _tensor(path, name, entry) for name, entry in entries}
    _check_tensors(cls, tensors, header, path)
    try:
        shape, params = json.loads(header["shape"]), json.loads(header["params"])
        arrays = {name: tensors[name] for name in cls.STRUCTURE}
        return cls._from_parts(shape, arrays, params, tensors["values"])
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _bad_file(path, f"damaged: {error}", "a legal structure") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The notes that the user gave to `save`."""
    _, header = _read(path)
    _format_of(header, path)
    return {
        name: text
        for name, text in header.items()
        if name not in RESERVED and not name.startswith(PREFIX)
    }


def _safetensors(module: str) -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise MissingDependency(
            "got no package safetensors; expected it for saving and loading; "
            "fix: pip install safetensors"
        ) from None
    return safetensors.numpy if module == "numpy" else safetensors


def _narrow(array: Array) -> Array:
    """Structure array in the smallest stored dtype; indices are never negative."""
    if int(array.max(initial=0)) <= UINT16_MAX:
        return array.astype(np.uint16)
    return array


def _checksum(header: Mapping[str, str], arrays: Iterable[Array]) -> int:
    text = "\n".join(header.get(name, "") for name in ("spfmt_format", *RESERVED))
    crc = zlib.crc32(text.encode())
    for array in arrays:
        crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc)
    return crc


def _check_notes(metadata: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(metadata, Mapping):
        raise format_error(
            f"metadata of type {type(metadata).__name__}",
            "a mapping of text to text",
            "pass a dict",
        )
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise format_error(
                f"metadata {name!r}: {text!r}", "text for names and values", "convert to str"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in name + text):
            raise format_error(
                f"metadata {name!r}: {text!r}", "text that UTF-8 can hold", "drop the surrogates"
            )
        if name in RESERVED or name.startswith(PREFIX):
            raise format_error(
                f"metadata named {name!r}",
                f"a name besides {', '.join(RESERVED)} that does not start with {PREFIX}",
                "rename it",
            )
    return dict(metadata)


def _read(path: Path) -> tuple[list[tuple[str, Any]], dict[str, str]]:
    """Names and raw tensors of a safetensors file, and its metadata."""
    package = _safetensors("package")
    with open(path, "rb") as file:
        data = file.read()
    try:
        entries = package.deserialize(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (package.SafetensorError, ValueError) as error:
        raise _bad_file(path, f"truncated, corrupt or foreign: {error}", "safetensors") from error
    return entries, dict(header)


def _tensor(path: Path, name: str, entry: Mapping[str, Any]) -> Array:
    stored = entry["dtype"]
    if name == "values" and stored in VALUE_DTYPES:
        dtype = value_dtype(VALUE_DTYPES[stored])
    elif name != "values" and stored in INDEX_DTYPES:
        dtype = np.dtype(INDEX_DTYPES[stored])
    else:
        known = VALUE_DTYPES if name == "values" else INDEX_DTYPES
        raise _bad_file(path, f"{name!r} of type {stored}", f"one of {', '.join(known)}")
    return np.frombuffer(entry["data"], dtype=dtype).reshape(entry["shape"])


def _format_of(header: Mapping[str, str], path: Path) -> type[SparseTensor]:
    version, name = header.get("spfmt_version", ""), header.get("spfmt_format")
    # The length first: int() refuses thousands of digits with an error of its own.
    if name is None or len(version) > 9 or not version.isdecimal() or int(version) < 1:
        raise _bad_file(path, "without spfmt's metadata (a foreign file)", "a file of spfmt")
    if int(version) > VERSION:
        raise format_error(
            f"{os.fspath(path)!r} of file version {version}",
            f"at most version {VERSION}",
            "upgrade spfmt, or save the file with an older one",
        )
    if name not in FORMATS:
        raise _bad_file(path, f"of format {name!r}", f"one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _check_tensors(
    cls: type[SparseTensor], tensors: Mapping[str, Array], header: Mapping[str, str], path: Path
) -> None:
    names = (*cls.STRUCTURE, "values")
    if set(tensors) != set(names):
        raise _bad_file(path, f"with tensors {sorted(tensors)}", f"{sorted(names)}")
    if header.get("spfmt_crc32") != str(_checksum(header, (tensors[name] for name in names))):
        raise _bad_file(path, "whose checksum is wrong (corrupt)", "the bytes that save wrote")


def _bad_file(path: Path, got: str, expected: str) -> FormatError:
    return format_error(
        f"file {os.fspath(path)!r} {got}", expected, "save the tensor again with tensor.save(path)"
    )
