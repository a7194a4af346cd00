"""Builds the C++ core once and links it into the Python module and the ONNX Runtime library.

Where nvcc is found, the CUDA kernels are built, too (``SPFMT_CUDA=auto|0|1``, cuda/build.py).

Every instruction-set level is always built, each file with its own flags; the level is chosen at
run time. Set ``SPFMT_SANITIZE=address,undefined`` for a sanitizer build of the C++ code, and
``SPFMT_EMULATE=avx512`` for one whose AVX-512 kernels run on any CPU with AVX2: both are for tests.
"""

import os
import platform
import runpy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from pybind11 import get_include
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CORE = sorted(
    str(p) for d in ("core", "cost", "lists", "groups") for p in Path("cpp", d).glob("*.cpp")
)
ORT = sorted(str(p) for p in Path("cpp/ort").glob("*.cpp"))
HEADERS = sorted(str(p) for place in ("cpp", "bindings") for p in Path(place).rglob("*.h"))
SANITIZE = os.environ.get("SPFMT_SANITIZE", "")
EMULATE = os.environ.get("SPFMT_EMULATE", "")
CORE_FLAGS = runpy.run_path("cpp/flags.py")
ISA_FLAGS: dict[str, list[str]] = CORE_FLAGS["ISA_FLAGS"]
EMULATED_FLAGS: dict[str, list[str]] = CORE_FLAGS["EMULATED_FLAGS"]
FLAGS: list[str] = [*CORE_FLAGS["FLAGS"]]
LINK: list[str] = []
if SANITIZE:  # lines in reports need no more than -g1
    FLAGS += ["-g1", "-O1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}"]
    LINK += [f"-fsanitize={SANITIZE}"]
else:
    FLAGS += ["-g0"]  # Python's own flags ask for debug information, ten times the code

if EMULATE:
    if EMULATE not in EMULATED_FLAGS:
        sys.exit(f"SPFMT_EMULATE={EMULATE}: expected one of {', '.join(EMULATED_FLAGS)}, or unset")
    ISA_FLAGS[EMULATE] = EMULATED_FLAGS[EMULATE]
    FLAGS += [f"-DSPFMT_EMULATE_{EMULATE.upper()}"]

ORT_LIBRARY = "spfmt.onnx.libspfmt_ort"
CUDA_LIBRARY = "spfmt.cuda.libspfmt_cuda"
LIBRARIES = (ORT_LIBRARY, CUDA_LIBRARY)  # no Python modules: no ABI tag, no init function
CUDA = runpy.run_path("cuda/build.py")
CUDA_SOURCES = sorted(str(p) for p in Path("cuda").glob("*.cu"))
NVCC: str | None = CUDA["find_nvcc"]("0" if SANITIZE else "auto")


def check_platform() -> None:
    """Stop with a readable message where the kernels cannot be built."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        sys.exit(
            "spfmt builds on Linux x86-64 only for now: got "
            f"{sys.platform} on {platform.machine()}. Its kernels are AVX2 and AVX-512 code and "
            "its build uses the GCC command line. Build on a Linux x86-64 machine or container."
        )


class BuildExt(build_ext):
    """Compiles the core to objects first, then links them into the extensions that use them."""

    def build_extensions(self) -> None:
        check_platform()
        sources = [(f"cpp/isa/{isa}.cpp", FLAGS + flags) for isa, flags in ISA_FLAGS.items()]
        sources += [(source, FLAGS) for source in CORE]  # the levels take longest: they go first
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = pool.map(self._compiler_of_kernels(), CUDA_SOURCES if NVCC else [])
            core = list(pool.map(self._compile, *zip(*sources, strict=True)))
            objects = {"spfmt._kernels": core, ORT_LIBRARY: core, CUDA_LIBRARY: list(kernels)}
        for ext in self.extensions:
            ext.extra_objects = objects.get(ext.name, [])
            ext.depends = [*ext.depends, *ext.extra_objects]  # relink when only these changed
        super().build_extensions()

    def _compiler_of_kernels(self) -> Callable[[str], str]:
        """Return what makes an object of a .cu file."""
        flags = CUDA["flags"](NVCC) if NVCC else []
        folder = Path(self.build_temp, "cuda")

        def compile(source: str) -> str:
            place = folder / f"{Path(source).stem}.o"
            return str(CUDA["compile_object"](NVCC, source, place, flags))

        return compile

    def _compile(self, source: str, flags: list[str]) -> str:
        (found,) = self.compiler.compile(
            [source], output_dir=self.build_temp, extra_postargs=flags, depends=HEADERS
        )
        return found

    def get_ext_filename(self, fullname: str) -> str:
        if any(fullname in (name, name.rpartition(".")[2]) for name in LIBRARIES):
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return [] if ext.name in LIBRARIES else super().get_export_symbols(ext)


extensions = [
    Extension(
        "spfmt._kernels",
        [f"bindings/{name}.cpp" for name in ("arrays", "cost", "images", "kernels", "tensors")],
        include_dirs=[get_include()],
        extra_compile_args=[*FLAGS, "-fopenmp"],
        # Plain -fopenmp links libgomp.so.1, the name torch ships its own copy under: whichever is
        # loaded first serves both, so there is one thread pool and torch.set_num_threads counts.
        extra_link_args=[*LINK, "-fopenmp"],
        depends=HEADERS,
    ),
    *cythonize(
        [
            Extension(
                f"spfmt.structure._{name}",
                [f"bindings/{name}.pyx"],
                include_dirs=["bindings"],
                depends=HEADERS,
                extra_compile_args=["-O3", "-fvisibility=hidden"],
            )
            for name in ("growth", "hrbp", "positions", "rows", "selection")
        ],
        include_path=["bindings"],
        language_level=3,
    ),
]
if ORT:
    extensions.append(
        Extension(
            ORT_LIBRARY,
            ORT,
            extra_compile_args=FLAGS,
            extra_link_args=[*LINK, "-Wl,--version-script=cpp/ort/exports.map"],
            depends=HEADERS,
            language="c++",
        )
    )
if NVCC:
    extensions.append(
        Extension(
            CUDA_LIBRARY,
            [],  # objects, which nvcc makes
            library_dirs=CUDA["library_folders"](NVCC),
            extra_link_args=CUDA["LINK"],
            depends=["cuda/exports.map"],
            language="c++",
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt})
