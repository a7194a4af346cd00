"""The CUDA library: how it is built, found and called, and what is said where it is not there."""

from __future__ import annotations

import ctypes
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_cases
import numpy as np
import pytest

import spfmt
from spfmt.cuda import library
from spfmt.errors import DeviceError, KernelNotFound

ROOT = Path(__file__).resolve().parent.parent
BUILD = runpy.run_path(str(ROOT / "cuda/build.py"))
NVCC = shutil.which("nvcc")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Let what is found be looked for anew."""
    library._found.cache_clear()
    yield
    library._found.cache_clear()


@pytest.fixture(scope="module")
def emulated() -> library.Library:
    cuda_cases.library()  # skips without g++
    return library.Library(cuda_cases.build())


# ------------------------------------------------------------------------------------- found


def test_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "libspfmt_cuda.so")
    assert not library.available()
    assert "SPFMT_CUDA=1" in library.why_not()
    with pytest.raises(KernelNotFound, match=r"without CUDA kernels.*fix: .*SPFMT_CUDA=1"):
        library.load()
    assert f"CUDA: none; {library.why_not()}" in spfmt.show_config()


def test_no_library_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "libspfmt_cuda.so"
    broken.write_bytes(b"nothing")
    monkeypatch.setattr(library, "PATH", broken)
    assert "cannot be opened" in library.why_not()


@pytest.mark.parametrize(
    ("driver", "reason"), [(False, "no NVIDIA driver"), (True, "CUDA_VISIBLE_DEVICES")]
)
def test_no_device(
    monkeypatch: pytest.MonkeyPatch, emulated: library.Library, driver: bool, reason: str
) -> None:
    monkeypatch.setattr(library, "PATH", Path(emulated._opened._name))
    monkeypatch.setattr(library.Library, "devices", lambda self: 0)
    opened = ctypes.CDLL

    def open_driver(name: str) -> Any:
        if name != "libcuda.so.1":
            return opened(name)
        if not driver:
            raise OSError(name)
        return None

    monkeypatch.setattr(ctypes, "CDLL", open_driver)
    assert not library.available()
    assert reason in library.why_not()
    with pytest.raises(KernelNotFound, match=f"{reason}.*CPU"):
        library.load()


def test_found(monkeypatch: pytest.MonkeyPatch, emulated: library.Library) -> None:
    monkeypatch.setattr(library, "PATH", Path(emulated._opened._name))
    assert library.available()
    assert library.why_not() == ""
    assert library.load() is library.load()
    assert "CUDA: 1 device (float32, bfloat16, float16)" in spfmt.show_config()


def test_nothing_is_opened_at_import() -> None:
    from fresh_python import run_python

    code = "import spfmt.cuda.library as l; print(l._found.cache_info().currsize)"
    assert run_python(code).stdout == "0\n"


# ------------------------------------------------------------------------------------ called


def _c_types(declaration: str) -> list[Any]:
    """Return the types of a C function's parameters, as ctypes would have them."""
    names = {
        "int": ctypes.c_int,
        "int32_t": ctypes.c_int32,
        "int64_t": ctypes.c_int64,
        "int32_t*": library.Stride,
    }
    structs = {name: ctypes.POINTER(getattr(library, name)) for name in ("Tiles", "Lists", "Maps")}
    found = []
    for parameter in declaration.split(","):
        words = parameter.strip().removeprefix("const ")
        kind = words if words in names else words.rsplit(" ", 1)[0]  # some have no name
        struct = re.fullmatch(r"spfmt::cuda::(\w+)\*", kind)
        pointer = ctypes.c_void_p if kind.endswith("*") else None
        found.append(structs[struct[1]] if struct else names.get(kind) or pointer)
    return found


def test_functions_are_declared_as_the_header_has_them() -> None:
    text = (ROOT / "cuda/api.h").read_text()
    declared = {
        name: " ".join(parameters.split())
        for name, parameters in re.findall(r"int spfmt_cuda_(\w+)\(([^)]*)\);", text)
    }
    assert set(library._FUNCTIONS) == set(declared) - {"devices"}
    for name, types in library._FUNCTIONS.items():
        assert types == _c_types(declared[name]), name


@pytest.mark.parametrize("name", ["Tiles", "Lists", "Maps"])
def test_structs_are_as_the_header_has_them(name: str) -> None:
    text = (ROOT / "cuda/api.h").read_text()
    (body,) = re.findall(rf"struct {name} {{(.*?)}};", text, re.DOTALL)
    kinds = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32}
    want = []
    for line in re.sub(r"//[^\n]*", "", body).split(";"):
        kind, _, names = line.strip().removeprefix("const ").partition(" ")
        want += [kinds.get(kind, ctypes.c_void_p)] * (names.count(",") + bool(names))
    assert [kind for _, kind in getattr(library, name)._fields_] == want


def test_errors_have_their_text_and_a_way_out(emulated: library.Library) -> None:
    x = np.zeros((2, 2), np.float32)
    pointer = x.ctypes.data
    with pytest.raises(DeviceError, match=r"spfmt_cuda_transpose failed: .*fix: "):
        emulated.call("transpose", 7, 7, pointer, 2, 2, 2, pointer, 2, 0)
    with pytest.raises(AttributeError, match="spfmt_cuda_nothing"):
        emulated.call("nothing")


# ------------------------------------------------------------------------------------- built


@pytest.fixture
def built_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call a function of cuda/build.py with environment variables."""

    def call(name: str, *arguments: Any, **env: str) -> Any:
        for variable in ("SPFMT_CUDA", "SPFMT_CUDA_ARCHS"):
            monkeypatch.delenv(variable, raising=False)
        for variable, value in env.items():
            monkeypatch.setenv(variable, value)
        return BUILD[name](*arguments)

    return call


def test_where_there_is_no_nvcc(built_with: Any, tmp_path: Path) -> None:
    nowhere = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    assert built_with("find_nvcc", **nowhere) is None
    with pytest.raises(SystemExit, match=r"found no nvcc.*CUDA_HOME.*SPFMT_CUDA=0"):
        built_with("find_nvcc", SPFMT_CUDA="1", **nowhere)
    with pytest.raises(SystemExit, match="expected auto, 0 or 1"):
        built_with("find_nvcc", SPFMT_CUDA="yes", **nowhere)


def test_where_there_is_an_nvcc(built_with: Any, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    home = {"CUDA_HOME": str(tmp_path), "PATH": "/nowhere"}
    assert built_with("find_nvcc", **home) == str(nvcc)
    assert built_with("find_nvcc", SPFMT_CUDA="0", **home) is None
    assert built_with("find_nvcc", "0", **home) is None  # of a build with sanitizers
    assert built_with("find_nvcc", "0", SPFMT_CUDA="1", **home) == str(nvcc)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_flags(built_with: Any) -> None:
    flags = built_with("flags", NVCC, SPFMT_CUDA_ARCHS="90, 80")
    assert flags[-2:] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    usual = built_with("architectures", NVCC)
    assert set(usual) <= set(BUILD["ARCHS"])
    for wrong in ("75", "9000", "sm_80"):
        with pytest.raises(SystemExit, match=f"leave out {wrong}"):
            built_with("flags", NVCC, SPFMT_CUDA_ARCHS=wrong)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_objects_are_made_again_only_after_a_change(
    built_with: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, found = tmp_path / "cuda/one.cu", tmp_path / "build/one.o"
    source.parent.mkdir()
    source.write_text("int one() { return 1; }\n")
    flags = built_with("flags", NVCC, SPFMT_CUDA_ARCHS="80")
    made = []
    for change in (None, None, "flags", "source"):
        if change == "flags":
            flags = [*flags, "-DTWO"]
        if change == "source":
            source.touch()
        BUILD["compile_object"](NVCC, str(source), found, flags)
        made.append(found.stat().st_mtime_ns)
    assert made[0] == made[1] < made[2] < made[3]
    source.write_text("int one() { return two; }\n")
    with pytest.raises(SystemExit, match=r"could not compile .*one\.cu.*SPFMT_CUDA=0"):
        BUILD["compile_object"](NVCC, str(source), found, flags)


@pytest.mark.skipif(not library.PATH.exists(), reason="built without CUDA")
def test_the_library_exports_its_functions_only() -> None:
    told = subprocess.run(
        ["nm", "-D", "--defined-only", str(library.PATH)],
        check=True,
        capture_output=True,
        text=True,
    )
    names = {line.split()[-1] for line in told.stdout.splitlines()}
    assert names == {f"spfmt_cuda_{name}" for name in (*library._FUNCTIONS, "error", "devices")}
