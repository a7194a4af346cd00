"""Our declaration of ONNX Runtime's C API agrees with a real header, where one is found.

Set ``SPFMT_ORT_INCLUDE`` to the folder of ``onnxruntime_c_api.h`` (Debian's libonnxruntime-dev has
one), or install it where the compiler looks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from fresh_python import run_python

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "cpp" / "ort" / "ort_api.h"
PLACES = [
    *filter(None, [os.environ.get("SPFMT_ORT_INCLUDE")]),
    "/usr/include/onnxruntime",
    "/usr/include/onnxruntime/core/session",
    "/usr/local/include/onnxruntime",
    "/usr/local/include/onnxruntime/core/session",
    "/usr/include",
    "/usr/local/include",
]
PROGRAM = r"""
#include "onnxruntime_c_api.h"
#include "ort_api.h"

namespace ours = spfmt::ort;

#define CHECK_SLOT(function, slot)                                                        \
  static_assert(offsetof(::OrtApi, function) == (slot) * sizeof(void*), #function);       \
  static_assert(offsetof(ours::Api, function) == offsetof(::OrtApi, function), #function);
SPFMT_ORT_API_SLOTS(CHECK_SLOT)
#if ORT_API_VERSION >= 24
static_assert(ours::kShapesVersion == 24, "the condition above");
SPFMT_ORT_SHAPES_SLOTS(CHECK_SLOT)
#endif

#define CHECK_FIELD(field) \
  static_assert(offsetof(ours::CustomOp, field) == offsetof(::OrtCustomOp, field), #field);
SPFMT_ORT_CUSTOM_OP_FIELDS(CHECK_FIELD)

static_assert(offsetof(ours::ApiBase, GetApi) == offsetof(::OrtApiBase, GetApi), "GetApi");
static_assert(offsetof(ours::ApiBase, GetVersionString) == offsetof(::OrtApiBase, GetVersionString),
              "GetVersionString");
static_assert(ORT_API_VERSION >= ours::kApiVersion, "the header is older than the pinned version");

#define CHECK_VALUE(ours_value, theirs) \
  static_assert(static_cast<int>(ours_value) == static_cast<int>(theirs), #theirs);
CHECK_VALUE(ours::ErrorCode::fail, ORT_FAIL)
CHECK_VALUE(ours::ErrorCode::invalid_argument, ORT_INVALID_ARGUMENT)
CHECK_VALUE(ours::ErrorCode::runtime_exception, ORT_RUNTIME_EXCEPTION)
CHECK_VALUE(ours::ElementType::undefined, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED)
CHECK_VALUE(ours::ElementType::f32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
CHECK_VALUE(ours::ElementType::u16, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16)
CHECK_VALUE(ours::ElementType::i32, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32)
CHECK_VALUE(ours::ElementType::f64, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE)
CHECK_VALUE(ours::Characteristic::required, INPUT_OUTPUT_REQUIRED)
CHECK_VALUE(ours::MemoryType::standard, OrtMemTypeDefault)
CHECK_VALUE(ours::OpAttrType::ints, ORT_OP_ATTR_INTS)
"""


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not found:
        pytest.skip("no C++ compiler: set CXX")
    return found


def compile_only(program: str, *includes: Path) -> subprocess.CompletedProcess[str]:
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wno-invalid-offsetof", "-fsyntax-only"]
    folders = [f"-I{folder}" for folder in includes]
    return subprocess.run(
        [*compiler().split(), *flags, *folders, "-x", "c++", "-"],
        input=program,
        capture_output=True,
        text=True,
        check=False,
    )


def test_our_slots_are_where_we_say() -> None:
    done = compile_only('#include "ort_api.h"\n', OURS.parent)
    assert (done.returncode, done.stderr) == (0, "")


def test_our_slots_are_those_of_a_real_header() -> None:
    folder = next((p for p in map(Path, PLACES) if (p / "onnxruntime_c_api.h").is_file()), None)
    if folder is None:
        pytest.skip("no onnxruntime_c_api.h: set SPFMT_ORT_INCLUDE to its folder")
    done = compile_only(PROGRAM, OURS.parent, folder)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_check_would_notice() -> None:
    moved = OURS.read_text().replace("X(AddCustomOpDomain, 28)", "X(AddCustomOpDomain, 29)")
    done = compile_only(moved.replace("#pragma once", ""))
    assert done.returncode != 0
    assert "AddCustomOpDomain" in done.stderr


# A runtime that says to be an older one, and does not know what came later.
OLD_RUNTIME = r"""
#include <dlfcn.h>

#include "ort_api.h"
using namespace spfmt::ort;

static const ApiBase* real;
static const Api* old_api(uint32_t version) {
  return version > 23 ? nullptr : real->GetApi(version);
}

extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(
    SessionOptions* options, const ApiBase* base) {
  real = base;
  static const ApiBase old{old_api, [] { return "VERSION"; }};
  void* library = dlopen("LIBRARY", RTLD_NOW);
  using Register = Status* (*)(SessionOptions*, const ApiBase*);
  return reinterpret_cast<Register>(dlsym(library, "RegisterCustomOps"))(options, &old);
}
"""
ONE_LAYER = """if True:
    import onnxruntime
    from onnx_cases import bias_of, check, one_layer, samples, weight
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library("LIBRARY")
    for format in ("csr", "hrbp"):
        tensor = weight(format, 37, 19)
        model = one_layer(tensor, bias_of(tensor), rank_known=False)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        for lead in ((), (3,), (2, 0), (2, 1, 4)):
            x = samples(tensor, *lead)
            check(session.run(None, {"x": x})[0], x, tensor, bias_of(tensor))
    print("done")
    """


@pytest.mark.parametrize("version", ["1.17.3", "1.23.2", "garbage"])
def test_a_runtime_without_the_later_functions_runs_without_them(
    version: str, tmp_path: Path
) -> None:
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    import spfmt
    import spfmt.onnx

    program = OLD_RUNTIME.replace("VERSION", version)
    program = program.replace("LIBRARY", spfmt.onnx.library_path())
    library = tmp_path / "old_runtime.so"
    flags = ["-std=c++17", "-shared", "-fPIC", f"-I{OURS.parent}", "-x", "c++", "-"]
    subprocess.run(
        [*compiler().split(), *flags, "-o", str(library), "-ldl"],
        input=program, text=True, check=True,
    )  # fmt: skip
    folders = (Path(spfmt.__file__).parents[1], Path(__file__).parent)
    path = os.pathsep.join(map(str, folders))
    done = run_python(ONE_LAYER.replace("LIBRARY", str(library)), PYTHONPATH=path)
    assert done.stdout.strip() == "done", done.stderr
