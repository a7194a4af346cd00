"""The hot loops of the AVX-512 and AVX2 objects are the instructions meant: no clock involved.

Every innermost loop that multiplies and adds belongs to a row of ``KERNELS``. A new kernel adds a
row; a failure prints the loop.
"""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from disassembly import CXX, Loop, compile_object, hot_loops

ROOT = Path(__file__).resolve().parents[1]
FLAGS = runpy.run_path(str(ROOT / "cpp" / "flags.py"))
REGISTER = {"avx512": "zmm", "avx2": "ymm"}
VECTORS = {"avx512": 1, "avx2": 2}  # registers that hold the sixteen lanes
MISSING = [tool for tool in (CXX[0], "objdump", "addr2line") if shutil.which(tool) is None]
SCALAR_RELOADS = 4  # addresses that an iteration may fetch from the stack

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture(scope="session", autouse=True)
def gcc() -> None:
    version = subprocess.run([*CXX, "--version"], check=True, capture_output=True, text=True).stdout
    if "Free Software Foundation" not in version:
        pytest.skip(
            f"the loops are described as GCC lays them out; CXX is {version.splitlines()[0]}"
        )


@dataclass(frozen=True)
class Kernel:
    """What the innermost loop of a function template holds.

    `fmas` maps the template's arguments behind the SIMD type to the 16-lane multiply-adds of one
    iteration; a compiler may unroll, so a loop has a multiple of them. None: not counted, for loops
    that the compiler peels and merges. `contains` maps a level to a mnemonic that must occur,
    `spills` a level to the reason why its loops cannot avoid the stack yet. `half`: eight samples
    are the lanes, so that AVX-512 has them in a ymm register too. `registers`: the arguments count
    the level's registers, however many lanes they have.
    """

    fmas: Callable[..., int] | None
    contains: dict[str, str] = field(default_factory=dict)
    spills: dict[str, str] = field(default_factory=dict)
    half: bool = False
    registers: bool = False


_CONSTANTS = {"avx2": "twenty constants beside the operands exceed sixteen registers"}

KERNELS = {
    "probe_fma": Kernel(lambda chains: chains),
    "band_panel": Kernel(lambda rows, vectors: rows * vectors, registers=True),
    "band_samples": Kernel(lambda samples, chains, columns, adjacent: samples),
    "last_columns": Kernel(lambda: 1),
    "band_t_panel": Kernel(lambda columns, vectors: columns * vectors, registers=True),
    "groups_t_bands_n": Kernel(lambda samples: samples),
    "band_dots": Kernel(lambda columns: 4 * columns),
    "pieces_panel": Kernel(lambda rows, vectors, first: rows * vectors),
    "slice_sums": Kernel(
        lambda width, steps, samples: steps * samples,
        contains={"avx512": "vperm[it]2ps", "avx2": "vpermps"},
        spills={"avx2": "four registers of a window beside the weights of four steps"},
    ),
    "slice_sum_masked": Kernel(
        lambda width: 1, contains={"avx512": "vperm[it]2ps", "avx2": "vpermps"}
    ),
    "band_tile": Kernel(
        lambda rows, width, whole: rows * width,
        spills={"avx2": "the mask of a narrow band beside twelve sums exceeds sixteen registers"},
    ),
    "groups_image_t": Kernel(lambda rows, width: rows * width),
    "gradient_columns": Kernel(lambda columns: columns),
    "image_pieces": Kernel(lambda rows, width, pieces, first: rows * width * pieces),
    "image_dots": Kernel(None),
    "quad_sums": Kernel(lambda: 16, contains=dict.fromkeys(REGISTER, "vpermilps"), half=True),
    "activate": Kernel(None, spills=_CONSTANTS),
    "image_add": Kernel(None, spills=_CONSTANTS),
    "dots": Kernel(
        None, spills={"avx2": "an unrolled row of sums and its reduction exceed sixteen registers"}
    ),
}


def faults(loop: Loop, isa: str, kernel: Kernel) -> list[str]:
    """What a loop lacks or has too much of, spills apart."""
    found = []
    mnemonics = [i.mnemonic for i in loop.body]
    register = "ymm" if kernel.half else REGISTER[isa]
    if other := [str(i) for i in loop.fmas if not i.uses(register)]:
        found.append(f"FMA not on {register}: {other}")
    if any(m.startswith("call") for m in mnemonics):
        found.append("a call")
    if any("gather" in m for m in mnemonics) and "gather" not in kernel.contains.get(isa, ""):
        found.append("a gather")
    wanted = kernel.contains.get(isa, "")
    if wanted and not any(re.fullmatch(wanted, m) for m in mnemonics):
        found.append(f"no {wanted}")
    if len(loop.scalar_reloads) > SCALAR_RELOADS:
        found.append(f"{len(loop.scalar_reloads)} scalars from the stack")
    if kernel.fmas:
        values = [int(a) if a.isdigit() else a == "true" for a in loop.arguments]
        vectors = 1 if kernel.half or kernel.registers else VECTORS[isa]
        expected = vectors * kernel.fmas(*values)
        if len(loop.fmas) % expected:
            found.append(f"{len(loop.fmas)} FMAs, not a multiple of {expected}")
    return found


@pytest.fixture(scope="session")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Loop]]:
    folder = tmp_path_factory.mktemp("objects")
    return {
        isa: hot_loops(
            compile_object(
                ROOT / "cpp" / "isa" / f"{isa}.cpp",
                folder / f"{isa}.o",
                FLAGS["FLAGS"] + FLAGS["ISA_FLAGS"][isa],
            )
        )
        for isa in REGISTER
    }


@pytest.mark.parametrize("isa", REGISTER)
def test_every_hot_loop_is_in_the_table(loops: dict[str, list[Loop]], isa: str) -> None:
    unknown = [str(loop) for loop in loops[isa] if loop.source not in KERNELS]
    assert not unknown, "add a row to KERNELS:\n" + "\n".join(unknown)


@pytest.mark.parametrize("isa", REGISTER)
@pytest.mark.parametrize("name", KERNELS)
def test_hot_loops_hold_the_instructions_meant(
    loops: dict[str, list[Loop]], isa: str, name: str
) -> None:
    mine = [loop for loop in loops[isa] if loop.source == name]
    assert mine, f"{name} has no loop with FMAs at {isa}: renamed, or unrolled away"
    wrong = [f"{fault}\n{loop}" for loop in mine for fault in faults(loop, isa, KERNELS[name])]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("isa", "name"),
    [
        pytest.param(
            isa,
            name,
            marks=[pytest.mark.xfail(strict=True, reason=kernel.spills[isa])]
            if isa in kernel.spills
            else [],
        )
        for isa in REGISTER
        for name, kernel in KERNELS.items()
    ],
)
def test_vectors_stay_in_registers(loops: dict[str, list[Loop]], isa: str, name: str) -> None:
    wrong = [
        "\n".join(["spills", *map(str, loop.vector_spills), "of", str(loop)])
        for loop in loops[isa]
        if loop.source == name and loop.vector_spills
    ]
    assert not wrong, "\n".join(wrong)


HEAD = """
#include <immintrin.h>
void loop(float* y, const float* x, const int* index, long n) {
"""
SNIPPETS = {
    "sound": """
  __m512 sum = _mm512_setzero_ps();
  for (long i = 0; i < n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  _mm512_storeu_ps(y, sum);
}""",
    "spill": """
  __m512 sum = _mm512_setzero_ps();
  volatile __m512 kept = sum;
  for (long i = 0; i < n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    kept = sum = _mm512_fmadd_ps(v, kept, sum);
  }
  _mm512_storeu_ps(y, sum);
}""",
    "gather": """
  __m512 sum = _mm512_setzero_ps();
  for (long i = 0; i < n; i += 16) {
    const __m512 v = _mm512_i32gather_ps(_mm512_loadu_si512(index + i), x, 4);
    sum = _mm512_fmadd_ps(v, v, sum);
  }
  _mm512_storeu_ps(y, sum);
}""",
    "narrow": """
  __m256 sum = _mm256_setzero_ps();
  for (long i = 0; i < n; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    sum = _mm256_fmadd_ps(v, v, sum);
  }
  _mm256_storeu_ps(y, sum);
}""",
    "scalar": """
  float sum = 0;
  for (long i = 0; i < n; ++i) sum = __builtin_fmaf(x[index[i]], x[i], sum);
  *y = sum;
}""",
}


def snippet_loops(folder: Path, name: str) -> list[Loop]:
    source = folder / f"{name}.cpp"
    source.write_text(HEAD + SNIPPETS[name])
    flags = FLAGS["FLAGS"] + FLAGS["ISA_FLAGS"]["avx512"]
    return hot_loops(compile_object(source, folder / f"{name}.o", flags))


def test_a_sound_loop_has_no_fault(tmp_path: Path) -> None:
    (loop,) = snippet_loops(tmp_path, "sound")
    assert faults(loop, "avx512", Kernel(lambda: 1)) == []
    assert loop.vector_spills == ()
    assert len(loop.fmas) == 1
    assert loop.source == "loop"


def test_the_guard_sees_a_spill(tmp_path: Path) -> None:
    (loop,) = snippet_loops(tmp_path, "spill")
    assert loop.vector_spills


@pytest.mark.parametrize(
    ("name", "kernel", "message"),
    [
        ("gather", Kernel(lambda: 1), "a gather"),
        ("narrow", Kernel(lambda: 1), "FMA not on zmm"),
        ("scalar", Kernel(lambda: 1), "FMA not on zmm"),
        ("sound", Kernel(lambda: 2), "1 FMAs, not a multiple of 2"),
        ("sound", Kernel(lambda: 1, {"avx512": "vperm[it]2ps"}), "no vperm"),
    ],
)
def test_the_guard_sees_what_is_wrong(
    tmp_path: Path, name: str, kernel: Kernel, message: str
) -> None:
    (loop,) = snippet_loops(tmp_path, name)
    assert any(fault.startswith(message) for fault in faults(loop, "avx512", kernel))
