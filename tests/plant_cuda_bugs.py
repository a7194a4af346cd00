"""Plants bugs in the CUDA kernels of groups, one at a time, and shows that the checks find each.

    python tests/plant_cuda_bugs.py

Kernels are compiled for bf16 and tiles of 64 rows alone, which takes about a second for a bug.
"""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import cuda_cases
import test_cuda_groups as table


class Bug(NamedTuple):
    """Text of a file that is replaced, wherever it stands, and the product that shows it."""

    name: str
    op: str
    file: str
    old: str
    new: str


_BARRIER = "    __syncthreads();\n    if (step"

BUGS = (
    Bug("no wait for copies", "spmm", "groups.h", "copy_wait<stages - 2>();", ""),
    Bug("a group too few is waited for", "spmm", "groups.h", "<stages - 2>", "<stages - 1>"),
    Bug("no barrier between stages", "spmm", "groups.h", _BARRIER, "    if (step"),
    Bug("a barrier in a branch", "spmm", "groups.h", _BARRIER,
        _BARRIER.replace("__", "if (threadIdx.x < 96) __")),
    Bug("a stage is filled while it is read", "spmm", "groups_spmm.cu",
        "step % kStages", "step % (kStages - 1)"),
    Bug("a lane leaves early", "spmm", "groups_spmm.cu",
        "if (!any) return;", "if (!any || threadIdx.x == 31) return;"),
    Bug("too little shared memory", "spmm", "groups_spmm.cu",
        "kStages * (Stage", "(kStages - 1) * (Stage"),
    Bug("chunks keep their places", "spmm", "groups.h", "(chunk ^ turn)", "(chunk + 0 * turn)"),
    Bug("fragments are swapped", "spmm", "groups.h",
        "side == Side::a ? matrix % 2 : matrix / 2", "matrix / 2"),
    Bug("columns beyond the list are gathered", "spmm", "groups.h",
        "row < count ? index[row] : -1", "row < count ? index[row] : 0"),
    Bug("values beyond the list are taken", "spmm", "groups.h", " && place < cols_", ""),
    Bug("a short band is read as a full one", "spmm", "groups.h",
        "int64_t{place} * height", "int64_t{place} * 16"),
    Bug("writes beyond the samples", "spmm", "groups_spmm.cu", "if (sample + i < y.n) to", "to"),
    Bug("writes beyond the rows", "spmm", "groups_spmm.cu", "any = place < count", "any = true"),
    Bug("neighbours trade the wrong halves", "spmm", "groups_spmm.cu",
        "odd ? first : second", "odd ? second : first"),
    Bug("samples beyond the last are multiplied", "sddmm", "groups.h",
        "any ? x.n - first : 0", "any ? x.stride - first : 0"),
    Bug("writes beyond the list", "sddmm", "groups_sddmm.cu", " && place < tile.cols", ""),
    Bug("sums are kept for the next piece", "spmm_t", "groups_spmm_t.cu", "    sums = {};", ""),
    Bug("sums are written before they are done", "spmm_t", "groups_spmm_t.cu",
        "  __syncthreads();\n  write_columns", "  write_columns"),
    Bug("records are read a step too late", "spmm_t", "groups_spmm_t.cu",
        "read(step + 2)", "read(step + 1)"),
)  # fmt: skip

# What is left out: the other dtypes and tiles, and an assertion that finds a bug by itself.
_LESS = (
    ("case DType::f16:\n      return body(Math<half, 1>{});", ""),
    (
        "if (static_cast<Precision>(precision) == Precision::tf32) return body(Math<float, 1>{});",
        "",
    ),
    ("return body(Math<float, 2>{});", "break;"),
    ("case 16:\n      return wide ? body(Warps<1, 4, 1, 2>{}) : body(Warps<1, 4, 1, 1>{});", ""),
    ("return wide ? body(Warps<2, 2, 2, 4>{}) : body(Warps<2, 2, 2, 2>{});\n    case 128:", ""),
    (
        "return wide ? body(Warps<4, 2, 2, 4>{}) : body(Warps<4, 2, 2, 2>{});",
        "return body(Warps<2, 2, 2, 2>{});",
    ),
    ("static_assert(apart", "static_assert(true || apart"),
)


class Workshop:
    """A copy of the kernels, less what the bugs do not need."""

    def __init__(self, folder: Path) -> None:
        self.sources = folder / "cuda"
        shutil.copytree(cuda_cases.CUDA, self.sources)
        for old, new in _LESS:
            self._replace("groups.h", old, new)
        (self.sources / "first.h").write_text('#include "device.h"\n')
        self._compile("-x", "c++-header", "first.h", "-o", "first.h.gch")
        self._compile("-x", "c++", "-c", "api.cu", "-o", "api.o")

    def library(self, op: str, bug: Bug | None = None) -> Path:
        """Compile the kernels of a product, with a bug."""
        before = (self.sources / bug.file).read_text() if bug else ""
        if bug:
            self._replace(bug.file, bug.old, bug.new)
        found = self.sources / "bug.so"
        kernels = ("-include", "first.h", "-x", "c++", f"groups_{op}.cu")
        self._compile("-w", "-shared", *kernels, "-x", "none", "api.o", "-o", str(found))
        if bug:
            (self.sources / bug.file).write_text(before)
        return found

    def _replace(self, name: str, old: str, new: str) -> None:
        text = (self.sources / name).read_text()
        if old not in text:
            raise ValueError(f"{name} has no {old!r}")
        (self.sources / name).write_text(text.replace(old, new))

    def _compile(self, *arguments: str) -> None:
        flags = [flag for flag in cuda_cases.FLAGS if flag not in ("-shared", "-Werror")]
        subprocess.run(["g++", *flags, "-I.", *arguments], check=True, cwd=self.sources)


def check(library: Path, op: str) -> None:
    """Fail as the tests would; a short table, in every order."""
    bugged = cuda_cases.Emulated(library)
    cuda_cases.library = table.library = lambda: bugged
    problems = [table.Problem.of(c, "bf16", "tf32") for c in table.CASES if c.most_rows == 64]
    for order, late in cuda_cases.ORDERS:
        cuda_cases.emulate(order, late)
        for problem in problems:
            problem.check(op)
    table.check_not_finite(table.Problem.of(table.NOT_FINITE, "bf16", "tf32"), op)
    table.check_conflicts(table.Problem.of(table.Case(64, 96, 128, 64), "bf16", "tf32"), op)


def complaint(library: Path, op: str) -> str:
    """Return what the checks say; in a process of its own, which a bug may end."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def tell() -> None:
        try:
            check(library, op)
            sender.send("")
        except (AssertionError, RuntimeError) as error:
            sender.send(str(error).split("\n")[0] or "an assertion")

    process = context.Process(target=tell)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return "a crash"
    finally:
        process.join()


def main() -> int:
    """Print what finds each bug; how many nobody finds, and how many sound kernels are blamed."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for op in ("spmm", "spmm_t", "sddmm"):
            said = complaint(workshop.library(op), op)
            wrong += bool(said)
            print(f"{op + ' as it is':40} {said or 'sound'}")
        for bug in BUGS:
            said = complaint(workshop.library(bug.op, bug), bug.op)
            wrong += not said
            print(f"{bug.name:40} {said[:120] or 'NOT FOUND'}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
