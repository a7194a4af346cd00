"""Plants bugs in the CUDA kernels of lists, one at a time, and shows what their tests say.

python tests/plant_cuda_list_bugs.py [words of a bug's name]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cuda_cases import CUDA

TESTS = Path(__file__).with_name("test_cuda_lists.py")

# Name, file, old text, new text.
BUGS = [
    (
        "nobody waits until X is in shared memory",
        "lists_small.cu",
        "  __syncthreads();\n",
        "",
    ),
    (
        "a shuffle goes to the wrong lane",
        "lists.h",
        "shuffle_xor(sum[0], kBits)",
        "shuffle_xor(sum[0], kBits ^ 3)",
    ),
    (
        "two lanes go on with the same half",
        "lists.h",
        "shuffle_xor(second ? sum[i] : sum[kHalf + i], kBits)",
        "shuffle_xor(second ? sum[kHalf + i] : sum[i], kBits)",
    ),
    (
        "lanes without a row leave before the others' shuffles",
        "lists_small.cu",
        "    if (row < a.rows) add_row",
        "    if (row >= a.rows) return;\n    add_row",
    ),
    (
        "a team without positions leaves before the others' shuffles",
        "lists_sddmm.cu",
        "    const T* x[kBatch];\n",
        "    if (mine >= end) break;\n    const T* x[kBatch];\n",
    ),
    (
        "samples beyond n are read",
        "lists_sddmm.cu",
        "s + kVector <= n; s +=",
        "s < n; s +=",
    ),
    (
        "positions behind the last row are read",
        "lists_sddmm.cu",
        "col_indices[mine + i < end ? mine + i : end - 1]",
        "col_indices[mine + i]",
    ),
    (
        "samples beyond n are written, from lanes over positions",
        "lists_small.cu",
        "if (s < o.n) o.y.at",
        "o.y.at",
    ),
    (
        "samples beyond n are written, from lanes over samples",
        "lists.h",
        "    if (i < left) to[i]",
        "    to[i]",
    ),
    (
        "the positions behind the fours are forgotten, by lanes over positions",
        "lists_small.cu",
        "if (lane < 2 * kFour && edge",
        "if (lane < kFour && edge",
    ),
    (
        "the positions behind the fours are forgotten, by lanes over samples",
        "lists_spmm.cu",
        "p = range.last; p < range.end;",
        "p = range.last; p < range.last;",
    ),
    (
        "fours begin in the row before",
        "lists.h",
        "up = (begin + kFour - 1) / kFour",
        "up = begin / kFour",
    ),
    (
        "vectors are loaded where nothing is aligned",
        "lists.h",
        "if (vectors) return",
        "if (true) return",
    ),
    (
        "vectors of samples are loaded at odd strides",
        "lists.h",
        " || m.feature_stride % n != 0",
        "",
    ),
    (
        "the source of fours is ignored",
        "lists.h",
        "    if (source) {",
        "    if (false) {",
    ),
    (
        "the source of other positions is ignored",
        "lists.h",
        "values[source ? source[p] : p]",
        "values[p]",
    ),
    (
        "blocks of the same samples take the same rows",
        "lists_small.cu",
        "* gridDim.x + blockIdx.x",
        "* gridDim.x",
    ),
    (
        "less shared memory than X needs",
        "lists_small.cu",
        "staged_bytes<T>(a.cols, kSamples), a",
        "staged_bytes<T>(a.cols, kSamples) / 2, a",
    ),
]


def find(file: str, old: str, new: str) -> str:
    """Return what the tests say of kernels with a bug, "" where they pass."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(shutil.copytree(CUDA, Path(folder) / "cuda"))
        text = (sources / file).read_text()
        assert text.count(old) == 1, (file, old)
        (sources / file).write_text(text.replace(old, new))
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", str(TESTS)],
            env={**os.environ, "SPFMT_CUDA_SOURCES": str(sources)},
            capture_output=True,
            text=True,
        )
    errors = re.findall(r"^E +(.+)|(Fatal Python error.+)", run.stdout + run.stderr, re.M)
    return ("".join(errors[0]) if errors else "?") if run.returncode else ""


if __name__ == "__main__":
    missed = 0
    for name, *bug in BUGS:
        if " ".join(sys.argv[1:]) in name:
            said = find(*bug)
            missed += not said
            print(f"{name}: {said or 'NOT FOUND'}", flush=True)
    sys.exit(missed)
