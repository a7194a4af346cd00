"""Plants bugs in the CUDA kernels, one at a time, and shows that the checks find each.

    python tests/plant_cuda_bugs.py [words of a bug's name]

Kernels of groups are compiled for bf16 and tiles of 64 rows alone, those of lists for float32.
"""

from __future__ import annotations

import multiprocessing
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import cuda_cases
import test_cuda_conv as conv
import test_cuda_groups as groups
import test_cuda_lists as lists


class Bug(NamedTuple):
    """Text of a file that is replaced, wherever it stands, and the checks that find it."""

    name: str
    check: str
    file: str
    old: str
    new: str


_BARRIER = "    __syncthreads();\n    if (step"

BUGS = (
    Bug("no wait for copies", "groups_spmm", "groups.h", "copy_wait<stages - 2>();", ""),
    Bug("a group too few is waited for", "groups_spmm", "groups.h", "<stages - 2>", "<stages - 1>"),
    Bug("no barrier between stages", "groups_spmm", "groups.h", _BARRIER, "    if (step"),
    Bug("a barrier in a branch", "groups_spmm", "groups.h", _BARRIER,
        _BARRIER.replace("__", "if (threadIdx.x < 96) __")),
    Bug("a stage is filled while it is read", "groups_spmm", "groups_spmm.cu",
        "step % kStages", "step % (kStages - 1)"),
    Bug("a lane leaves early", "groups_spmm", "groups_spmm.cu",
        "if (!any) return;", "if (!any || threadIdx.x == 31) return;"),
    Bug("too little shared memory", "groups_spmm", "groups_spmm.cu",
        "kStages * (Stage", "(kStages - 1) * (Stage"),
    Bug("chunks keep their places", "groups_spmm", "operands.h",
        "(chunk ^ turn)", "(chunk + 0 * turn)"),
    Bug("fragments are swapped", "groups_spmm", "groups.h",
        "side == Side::a ? matrix % 2 : matrix / 2", "matrix / 2"),
    Bug("columns beyond the list are gathered", "groups_spmm", "operands.h",
        "{ return -1; }", "{ return 0; }"),
    Bug("values beyond the list are taken", "groups_spmm", "operands.h", " && place < cols_", ""),
    Bug("a short band is read as a full one", "groups_spmm", "operands.h",
        "int64_t{place} * height", "int64_t{place} * 16"),
    Bug("writes beyond the samples", "groups_spmm", "operands.h", "if (i < count) to", "to"),
    Bug("writes beyond the rows", "groups_spmm", "groups.h",
        "any = at < count", "any = true"),
    Bug("neighbours trade the wrong halves", "groups_spmm", "groups.h",
        "odd ? first : second", "odd ? second : first"),
    Bug("samples beyond the last are multiplied", "groups_sddmm", "operands.h",
        "any ? samples - place : 0", "any ? stride_ - place : 0"),
    Bug("writes beyond the list", "groups_sddmm", "groups_sddmm.cu", " && place < tile.cols", ""),
    Bug("sums are kept for the next piece", "groups_spmm_t", "groups_spmm_t.cu",
        "    sums = {};", ""),
    Bug("sums are written before they are done", "groups_spmm_t", "groups_spmm_t.cu",
        "  __syncthreads();\n  write_columns", "  write_columns"),
    Bug("records are read a step too late", "groups_spmm_t", "groups_spmm_t.cu",
        "read(step + 2)", "read(step + 1)"),
    Bug("taps look beside the maps", "conv_spmm", "operands.h",
        "static_cast<unsigned>(place.across + row.across) < static_cast<unsigned>(maps_.width)",
        "true"),
    Bug("a tap beyond the list is one", "conv_spmm", "operands.h",
        "{0, INT16_MIN, 0}", "{0, 0, 0}"),
    Bug("elements keep the first one's pixel", "conv_spmm", "operands.h",
        "++i, place = next(place)) {\n        const", "++i) {\n        const"),
    Bug("a new row of pixels begins behind the last", "conv_spmm", "operands.h",
        "      p.across = 0;\n", ""),
    Bug("pixels beyond the last are written", "conv_spmm", "operands.h",
        "place.down == kBeyond ? 0 : maps_", "maps_"),
    Bug("a stride is forgotten", "conv_spmm", "operands.h",
        "across * step_across_, s", "across, s"),
    Bug("images beyond the batch are multiplied", "conv_sddmm", "operands.h",
        "any ? maps_.batch - place.sample : 0", "any ? grid_.per_pixel - place.sample : 0"),
    Bug("all parts sum the first one's samples", "conv_sddmm", "groups_sddmm.cu",
        "(begin + step)", "step"),
    Bug("parts are written over each other", "conv_sddmm", "groups_sddmm.cu",
        "values + part * parts.nnz", "values"),
    Bug("all pixels take the first one's cells", "conv_spmm_t", "groups_spmm_t.cu",
        "(stride[1] * down + across) *", "0 *"),
    Bug("pixels of dX lie side by side", "conv_spmm_t", "groups_spmm_t.cu",
        "  maps.column *= stride[1];\n", ""),
    Bug("dY is looked at on the other side", "conv_spmm_t", "groups_spmm_t.cu",
        "found_.down, found_.across}", "found_.across, found_.down}"),
    Bug("nobody waits for the products of four warps", "sm90_spmm", "groups_sm90.cu",
        "    group_wait();\n", ""),
    Bug("chunks keep their places for wgmma", "sm90_spmm", "groups_sm90.cu",
        "(chunk ^ row) & 7", "chunk & 7"),
    Bug("four warps take the others' values", "sm90_spmm", "groups_sm90.cu",
        "stage + group *", "stage + 0 *"),
    Bug("the depth is not gone along", "sm90_spmm", "groups_sm90.cu",
        "stage + S::kA + depth * 128", "stage + S::kA"),
    Bug("nobody waits until X is in shared memory", "lists_small", "lists_small.cu",
        "  __syncthreads();\n", ""),
    Bug("a shuffle goes to the wrong lane", "lists_small", "lists.h",
        "shuffle_xor(sum[0], kBits)", "shuffle_xor(sum[0], kBits ^ 3)"),
    Bug("two lanes go on with the same half", "lists_small", "lists.h",
        "shuffle_xor(second ? sum[i] : sum[kHalf + i], kBits)",
        "shuffle_xor(second ? sum[kHalf + i] : sum[i], kBits)"),
    Bug("lanes without a row leave before the others' shuffles", "lists_small", "lists_small.cu",
        "    if (row < a.rows) add_row", "    if (row >= a.rows) return;\n    add_row"),
    Bug("a team without positions leaves before the others' shuffles",
        "lists_sddmm", "lists_sddmm.cu",
        "    const T* x[kBatch];\n", "    if (mine >= end) break;\n    const T* x[kBatch];\n"),
    Bug("samples beyond n are read", "lists_sddmm", "lists_sddmm.cu",
        "s + kVector <= n; s +=", "s < n; s +="),
    Bug("positions behind the last row are read", "lists_sddmm", "lists_sddmm.cu",
        "col_indices[mine + i < end ? mine + i : end - 1]", "col_indices[mine + i]"),
    Bug("samples beyond n are written, from lanes over positions", "lists_small", "lists_small.cu",
        "if (s < o.n) o.y.at", "o.y.at"),
    Bug("samples beyond n are written, from lanes over samples", "lists_spmm", "lists.h",
        "    if (i < left) to[i]", "    to[i]"),
    Bug("the positions behind the fours are forgotten, by lanes over positions",
        "lists_small", "lists_small.cu",
        "if (lane < 2 * kFour && edge", "if (lane < kFour && edge"),
    Bug("the positions behind the fours are forgotten, by lanes over samples",
        "lists_spmm", "lists_spmm.cu",
        "p = range.last; p < range.end;", "p = range.last; p < range.last;"),
    Bug("fours begin in the row before", "lists_spmm", "lists.h",
        "up = (begin + kFour - 1) / kFour", "up = begin / kFour"),
    Bug("vectors are loaded where nothing is aligned", "lists_small", "lists.h",
        "if (vectors) return", "if (true) return"),
    Bug("vectors of samples are loaded at odd strides", "lists_sddmm", "lists.h",
        " || m.feature_stride % n != 0", ""),
    Bug("the source of fours is ignored", "lists_spmm", "lists.h",
        "    if (source) {", "    if (false) {"),
    Bug("the source of other positions is ignored", "lists_spmm", "lists.h",
        "values[source ? source[p] : p]", "values[p]"),
    Bug("blocks of the same samples take the same rows", "lists_small", "lists_small.cu",
        "* gridDim.x + blockIdx.x", "* gridDim.x"),
    Bug("less shared memory than X needs", "lists_small", "lists_small.cu",
        "staged_bytes<T>(a.cols, kSamples), a", "staged_bytes<T>(a.cols, kSamples) / 2, a"),
)  # fmt: skip

# What is left out of files: other dtypes and tiles, and an assertion that finds a bug by itself.
_LESS = (
    ("groups.h", "case DType::f16:\n      return body(Math<half, 1>{});", ""),
    (
        "groups.h",
        "if (static_cast<Precision>(precision) == Precision::tf32) return body(Math<float, 1>{});",
        "",
    ),
    ("groups.h", "return body(Math<float, 2>{});", "break;"),
    (
        "groups.h",
        "case 16:\n      return wide ? body(Warps<1, 4, 1, 2>{}) : body(Warps<1, 4, 1, 1>{});",
        "",
    ),
    (
        "groups.h",
        "return wide ? body(Warps<2, 2, 2, 4>{}) : body(Warps<2, 2, 2, 2>{});\n    case 128:",
        "",
    ),
    (
        "groups.h",
        "return wide ? body(Warps<4, 2, 2, 4>{}) : body(Warps<4, 2, 2, 2>{});",
        "return body(Warps<2, 2, 2, 2>{});",
    ),
    ("operands.h", "static_assert(apart", "static_assert(true || apart"),
    ("lists.h", "return f(bf16(), device);", "break;"),
    ("lists.h", "return f(half(), device);", "break;"),
)
_SOUND = ("api", "lists_small")  # what others call


class Workshop:
    """A copy of the kernels, less what the bugs do not need."""

    def __init__(self, folder: Path) -> None:
        self.sources = folder / "cuda"
        shutil.copytree(cuda_cases.CUDA, self.sources)
        for less in _LESS:
            self._replace(*less)
        (self.sources / "first.h").write_text('#include "device.h"\n')
        self._compile("-x", "c++-header", "first.h", "-o", "first.h.gch")
        for name in _SOUND:
            self._compile("-x", "c++", "-c", f"{name}.cu", "-o", f"{name}.o")

    def library(self, check: str, bug: Bug | None = None) -> Path:
        """Compile the kernels that a check runs, with a bug."""
        before = (self.sources / bug.file).read_text() if bug else ""
        if bug:
            self._replace(bug.file, bug.old, bug.new)
        found = self.sources / "bug.so"
        of, op = check.split("_", 1)
        kernel = {"conv": f"groups_{op}", "sm90": "groups_sm90"}.get(of, check)
        sound = [f"{name}.o" for name in _SOUND if name != kernel]
        kernels = ("-include", "first.h", "-x", "c++", f"{kernel}.cu")
        self._compile("-w", "-shared", *kernels, "-x", "none", *sound, "-o", str(found))
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


def check_groups(op: str) -> None:
    """Fail as the tests of groups would."""
    problems = [groups.Problem.of(c, "bf16", "tf32") for c in groups.CASES if c.most_rows == 64]
    _in_every_order(lambda: [problem.check(op) for problem in problems])
    groups.check_not_finite(groups.Problem.of(groups.NOT_FINITE, "bf16", "tf32"), op)
    groups.check_conflicts(groups.Problem.of(groups.Case(64, 96, 128, 64), "bf16", "tf32"), op)


def check_four_warps(op: str) -> None:
    """Fail as the tests of wgmma would."""
    problems = [groups.Problem.of(case, "bf16", "tf32") for case in groups.SM90]
    _in_every_order(lambda: [problem.check(f"{op}_sm90") for problem in problems])


def check_convolutions(op: str) -> None:
    """Fail as the tests of convolutions would."""
    cases = [replace(conv.CASES[i], most_rows=64) for i in (1, 3, 4, 5, 7, 11)]
    problems = [conv.Unfolded(case, "bf16", "tf32") for case in cases]
    _in_every_order(lambda: [problem.check(op) for problem in problems])
    conv.check_not_finite(op)


def check_lists(op: str) -> None:
    """Fail as the tests of lists would."""
    _in_every_order(lambda: [_list_products(op, name) for name in ("short", "long", "nm")])
    _list_products(op, "skewed")


def _list_products(op: str, name: str) -> None:
    for offset, transposed in ((0, False), (1, False), (0, op != "sddmm"), (2, op != "sddmm")):
        weight = lists.Weight(lists.STRUCTURES[name](), "f32", transposed, offset)
        if op == "sddmm":
            for n, more in ((7, (1, 1)), (33, (3, 5)), (65, (3, 3))):
                lists.sddmm(weight, "f32", n, offset, more)
            continue
        for n, more in ((1, 3), (3, 1), (16, 0)) if op == "small" else ((7, 1), (33, 3), (130, 1)):
            lists.spmm(weight, "f32", n, small=op == "small", offset=offset, more=more)


def _in_every_order(run: Callable[[], object]) -> None:
    for order, late in cuda_cases.ORDERS:
        cuda_cases.emulate(order, late)
        run()
    cuda_cases.emulate()


def check(library: Path, name: str) -> None:
    """Fail as the tests would; a short table, in every order."""
    bugged = cuda_cases.Emulated(library)
    cuda_cases.library = groups.library = lambda: bugged
    of, op = name.split("_", 1)
    checks = {
        "groups": check_groups, "conv": check_convolutions, "lists": check_lists,
        "sm90": check_four_warps,
    }  # fmt: skip
    checks[of](op)


def complaint(library: Path, name: str) -> str:
    """Return what the checks say; in a process of its own, which a bug may end."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def tell() -> None:
        try:
            check(library, name)
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
    wrong, words = 0, " ".join(sys.argv[1:])
    bugs = [bug for bug in BUGS if words in bug.name]
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        for name in dict.fromkeys(bug.check for bug in bugs):
            said = complaint(workshop.library(name), name)
            wrong += bool(said)
            print(f"{name + ' as it is':40} {said or 'sound'}", flush=True)
        for bug in bugs:
            said = complaint(workshop.library(bug.check, bug), bug.check)
            wrong += not said
            print(f"{bug.name:40} {said[:120] or 'NOT FOUND'}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
