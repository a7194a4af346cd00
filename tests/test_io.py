"""Files and structure words: round trips, and what damaged input gets."""

from __future__ import annotations

import gc
import json
import os
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from format_cases import MAKERS, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from spfmt.errors import FormatError
from spfmt.formats import (
    CSR,
    FORMATS,
    HEADER,
    NM,
    Condensed,
    SparseTensor,
    _words,
    decode,
    decode_structure,
    encode,
    load,
    read_metadata,
    words_capacity,
)
from spfmt.formats import _io as io
from spfmt.structure._positions import content_hash

NAMES = sorted(FORMATS)


def sample(name: str = "condensed", seed: int = 3) -> SparseTensor:
    return MAKERS[name]((9, 14), np.random.default_rng(seed)).astype("float32")


# ---- files -------------------------------------------------------------------------------------


@given(a=tensors())
@settings(max_examples=80, deadline=None)
def test_a_file_holds_the_tensor(a: SparseTensor, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    a.save(path)
    assert load(path) == a
    assert type(a).load(str(path)) == a
    assert os.listdir(path.parent) == ["a.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_and_nan_survive(name: str, tmp_path: Path) -> None:
    a = sample(name).astype("bfloat16")
    values = a.values.copy()
    values.reshape(-1)[:1] = np.nan
    a = a.with_values(values)
    a.save(tmp_path / "a")
    assert load(tmp_path / "a") == a
    assert load(tmp_path / "a").dtype == ml_dtypes.bfloat16


def test_indices_are_narrow_where_they_fit(tmp_path: Path) -> None:
    small = Condensed((2, 65536), [0], [[0, 65535]], [[1.0, 2.0]])
    large = Condensed((2, 65537), [0], [[0, 65536]], [[1.0, 2.0]])
    for tensor, dtype in ((small, np.uint16), (large, np.int32)):
        tensor.save(tmp_path / "a")
        stored = safetensors.numpy.load_file(tmp_path / "a")
        assert stored["col_indices"].dtype == dtype
        assert stored["row_indices"].dtype == np.uint16
        assert load(tmp_path / "a") == tensor


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a"
    sample().save(path, metadata={"layer": "fc1", "note": "ü"})
    assert read_metadata(path) == {"layer": "fc1", "note": "ü"}
    for bad in ({"shape": "1"}, {"spfmt_x": "1"}, {"a": 1}, {2: "a"}, ["a"], {"a": "\ud800"}):
        with pytest.raises(FormatError, match="metadata"):
            sample(seed=4).save(path, metadata=bad)  # type: ignore[arg-type]
    assert load(path) == sample()


def test_load_checks_the_format(tmp_path: Path) -> None:
    sample().save(tmp_path / "a")
    with pytest.raises(FormatError, match=r"'condensed'.*expected format 'csr'"):
        CSR.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")


@pytest.mark.parametrize("name", NAMES)
def test_every_truncation_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    sample(name).save(path)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError, match="truncated, corrupt or foreign"):
            load(path)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_flipped_bit_goes_unnoticed(
    name: str, data: st.DataObject, tmp_path_factory: Any
) -> None:
    path = tmp_path_factory.mktemp("flip") / "a"
    a = sample(name)
    a.save(path, metadata={"x": "y"})
    blob = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(blob) - 1))
    blob[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(blob)
    try:
        found = load(path)
    except FormatError:
        return
    assert found == a  # padding spaces and the user's notes are not data


@given(blob=st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_foreign_bytes_are_refused(blob: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("foreign") / "a"
    path.write_bytes(blob)
    with pytest.raises(FormatError):
        load(path)


def test_safetensors_of_another_program_are_refused(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"weight": np.ones((2, 2), np.float32)}, tmp_path / "a")
    with pytest.raises(FormatError, match="a foreign file"):
        load(tmp_path / "a")
    with pytest.raises(FormatError, match="a foreign file"):
        read_metadata(tmp_path / "a")


def rewritten(path: Path, change: dict[str, Any], tensors_change: dict[str, Any]) -> None:
    """Write the sample's file again with other metadata and tensors, and a right checksum."""
    a = sample()
    arrays: dict[str, Any] = {k: v.astype(np.uint16) for k, v in a.structure().items()}
    arrays = {**arrays, "values": a.values, **tensors_change}
    arrays = {k: v for k, v in arrays.items() if v is not None}
    names = [k for k in ("row_indices", "col_indices", "values") if k in arrays]
    header = {
        "spfmt_format": "condensed",
        "spfmt_version": "1",
        "shape": json.dumps(a.shape),
        "params": json.dumps(a.params()),
        **change,
    }
    known = {k: v for k, v in header.items() if v is not None}
    checksum = io._checksum(known, (arrays[k] for k in names))
    header.setdefault("spfmt_crc32", str(checksum))
    metadata = {k: v for k, v in header.items() if v is not None}
    safetensors.numpy.save_file(arrays, path, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "tensors_change", "message"),
    [
        ({"spfmt_version": "2"}, {}, "version 2.*upgrade"),
        ({"spfmt_version": "x"}, {}, "foreign"),
        ({"spfmt_version": "0"}, {}, "foreign"),
        ({"spfmt_version": "9" * 5000}, {}, "foreign"),
        ({"shape": "[" * 100_000}, {}, "damaged"),
        ({"params": '{"a":' * 100_000}, {}, "damaged"),
        ({"spfmt_version": None}, {}, "foreign"),
        ({"spfmt_format": None}, {}, "foreign"),
        ({"spfmt_format": "ell"}, {}, "'ell'.*condensed"),
        ({"spfmt_format": "csr"}, {}, "with tensors"),
        ({"spfmt_crc32": "1"}, {}, "checksum"),
        ({"spfmt_crc32": None}, {}, "checksum"),
        ({"shape": None}, {}, "damaged"),
        ({"shape": "[9"}, {}, "damaged"),
        ({"shape": "9"}, {}, "damaged"),
        ({"shape": "[9, 2]"}, {}, "damaged.*number of columns"),
        ({"params": "[]"}, {}, "damaged"),
        ({"params": "{}"}, {}, "damaged"),
        ({"params": '{"fan_in": 1}'}, {}, "damaged"),
        ({}, {"extra": np.zeros(3, np.int32)}, "with tensors"),
        ({}, {"values": None}, "with tensors"),
        ({}, {"values": np.zeros(3, np.float32)}, "damaged.*values of shape"),
        ({}, {"values": np.zeros((3, 3), np.int32)}, "'values' of type I32"),
        ({}, {"row_indices": np.zeros(3, np.float32)}, "'row_indices' of type F32"),
        ({}, {"row_indices": np.full(sample().structure()["row_indices"].shape, -1)}, "damaged"),
    ],
)
def test_damaged_and_newer_files_are_refused(
    change: dict[str, Any], tensors_change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rewritten(tmp_path / "a", {}, {})
    assert load(tmp_path / "a") == sample()
    rewritten(tmp_path / "b", change, tensors_change)
    with pytest.raises(FormatError, match=message):
        load(tmp_path / "b")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_save_leaves_what_was_there(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    sample().save(path)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        sample(seed=4).save(path)
    monkeypatch.undo()
    assert load(path) == sample()
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(FileNotFoundError):
        sample().save(tmp_path / "missing" / "a")


def test_only_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("folder", "pipe", "link"):
        with pytest.raises(FormatError, match="a folder, device or pipe"):
            sample().save(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_any_legal_file_name_can_be_written(tmp_path: Path) -> None:
    longest = tmp_path / ("\N{CJK UNIFIED IDEOGRAPH-5B57}" * 85)  # 255 bytes
    sample().save(longest)
    assert load(longest) == sample()
    sample().save(os.fsencode(tmp_path / "bytes"))  # type: ignore[arg-type]
    assert load(tmp_path / "bytes") == sample()


def test_readers_never_see_a_half_written_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    choices = [sample(seed=seed) for seed in range(3)]
    choices[0].save(path)
    stop = threading.Event()

    def write() -> None:
        turn = 0
        while not stop.is_set():
            choices[turn % 3].save(path)
            turn += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(50):
            assert load(path) in choices
    finally:
        stop.set()
        writer.join()


def test_save_obeys_the_umask_and_follows_links(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    old = os.umask(0o027)
    try:
        sample().save(link)
    finally:
        os.umask(old)
    assert link.is_symlink()
    assert load(target) == sample()
    assert target.stat().st_mode & 0o777 == 0o640


# ---- structure words ---------------------------------------------------------------------------


@given(a=tensors(), spare=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_words_hold_the_structure(a: SparseTensor, spare: int) -> None:
    words = encode(a)
    assert words.dtype == np.int32
    longer = a.encode(words.size + spare)
    assert not longer[words.size :].any()
    assert decode_structure(longer) is a._structure  # it lives: it is not decoded again
    _words._living.clear()
    found = decode_structure(longer)
    assert found is not a._structure
    cls, shape, structure, params = decode(longer)
    assert cls._from_parts(shape, structure, params, a.values) == a
    assert found.same_as(a._structure)
    assert (found.nnz, found.shape, found.matrix_shape) == (a.nnz, a.shape, a.matrix_shape)
    np.testing.assert_array_equal(found.flat_indices(), a._structure.flat_indices())


@given(a=tensors(), spare=st.integers(0, 30), known=st.booleans())
@settings(max_examples=200, deadline=None)
def test_capacity_is_enough(a: SparseTensor, spare: int, known: bool) -> None:
    capacity = words_capacity(a.format, a.shape, a.nnz + spare, a.params() if known else None)
    assert encode(a).size <= capacity


def test_capacity_is_tight_for_real_layers() -> None:
    rng = np.random.default_rng(0)
    a = NM((64, 64), 1, 32, rng.integers(0, 32, (64, 2)) + np.array([0, 32]), np.zeros((64, 2)))
    assert words_capacity("nm", a.shape, a.nnz, a.params()) == a.encode().size
    with pytest.raises(FormatError, match="capacity"):
        a.encode(a.encode().size - 1)
    with pytest.raises(FormatError, match="nnz_capacity"):
        words_capacity("nm", a.shape, -1)


@pytest.mark.parametrize("name", NAMES)
def test_damaged_words_are_refused(name: str) -> None:
    words = sample(name).encode(300)
    used = int(words[2])
    for place in range(used):
        for change in (1, -1, 2**20):
            bad = words.copy()
            bad[place] += change
            with pytest.raises(FormatError, match="words"):
                decode(bad)
    for length in range(used):
        with pytest.raises(FormatError, match="structure words"):
            decode(words[:length])
    bad = words.copy()
    bad[used] = 1
    with pytest.raises(FormatError, match="checksum"):
        decode(bad)
    with pytest.raises(FormatError, match="1-D int32"):
        decode(words.astype(np.int64))
    with pytest.raises(FormatError, match="1-D int32"):
        decode(words[None])


@given(place=st.integers(HEADER, 60), value=st.integers(-(2**31), 2**31 - 1))
@settings(max_examples=150, deadline=None)
def test_words_with_a_right_checksum_are_still_checked(place: int, value: int) -> None:
    for name in NAMES:
        words = sample(name).encode(200)
        used = int(words[2])
        words[min(place, used - 1)] = value
        words[:HEADER] = _words._header(words[HEADER:used])
        try:
            found = decode_structure(words)
        except FormatError:
            continue
        if found.matrix_shape[0] > 10**6:  # legal, but its layout takes gigabytes
            continue
        rows, cols = found.layout.coordinates()
        assert (rows < found.matrix_shape[0]).all()
        assert (cols < found.matrix_shape[1]).all()


@pytest.mark.parametrize("name", NAMES)
def test_words_of_a_known_header_are_compared_whole(name: str) -> None:
    a = sample(name)
    words = a.encode(300)
    for place in range(HEADER, int(words[2])):
        bad = words.copy()
        bad[place] ^= 1
        with pytest.raises(FormatError, match="checksum"):
            decode_structure(bad)
    assert decode_structure(words) is a._structure
    number = id(a._structure)
    del a  # nothing is kept alive
    gc.collect()
    assert all(id(known) != number for known in _words._living.values())


def test_one_changed_word_changes_the_hash() -> None:
    words = np.random.default_rng(0).integers(-(2**31), 2**31, 70).astype(np.int32)
    for size in (0, 1, 2, 3, 7, 8, 9, 15, 70):
        hashes = {content_hash(words[:size])}
        for place in range(size):
            for bit in range(32):
                changed = words[:size].copy()
                changed.view(np.uint32)[place] ^= np.uint32(1 << bit)
                hashes.add(content_hash(changed))
        assert len(hashes) == 1 + 32 * size
    assert content_hash(words) == content_hash(words.copy())
    assert content_hash(np.zeros(8, np.int32)) != content_hash(np.zeros(16, np.int32))


def test_strided_words_are_read() -> None:
    a = sample()
    _words._living.clear()
    assert decode_structure(np.repeat(a.encode(), 2)[::2]).same_as(a._structure)
