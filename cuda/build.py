"""How nvcc is called: for setup.py, which builds ``spfmt/cuda/libspfmt_cuda.so`` where it is found.

``SPFMT_CUDA`` is ``auto`` (the default: built where there is an nvcc), ``0`` or ``1``, and
``SPFMT_CUDA_ARCHS`` narrows the architectures, for instance to ``80,90``.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ARCHS = ("80", "90", "100")  # GPUs of 86 and 89 run the code of 80
FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-Wall,-Wextra"]
LINK = ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--version-script=cuda/exports.map"]


def find_nvcc(default: str = "auto") -> str | None:
    """Return the nvcc to build with, None for a build without CUDA; stop where it is missed."""
    wanted = os.environ.get("SPFMT_CUDA", default)
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"SPFMT_CUDA={wanted}: expected auto, 0 or 1; unset it to build where nvcc is")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME", "")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else None
    found = found or shutil.which("nvcc")
    if found is None and wanted == "1":
        sys.exit(
            "SPFMT_CUDA=1: found no nvcc, neither in CUDA_HOME/bin nor on PATH. Install the CUDA "
            "toolkit (12.0 or newer) and set CUDA_HOME, or set SPFMT_CUDA=0 to build for CPUs only."
        )
    return found


def architectures(nvcc: str) -> list[str]:
    """Return what to compile for: of the usual ones those that this nvcc knows, or those named."""
    told = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    known = re.findall(r"compute_(\d+)", told.stdout)
    named = os.environ.get("SPFMT_CUDA_ARCHS", "").replace(",", " ").split()
    unknown = [arch for arch in named if arch not in known or int(arch) < int(ARCHS[0])]
    if unknown:
        sys.exit(
            f"SPFMT_CUDA_ARCHS={' '.join(named)}: expected numbers from {ARCHS[0]} on that {nvcc} "
            f"knows ({', '.join(known)}); leave out {', '.join(unknown)}"
        )
    return sorted(named or [arch for arch in ARCHS if arch in known], key=int)


def flags(nvcc: str) -> list[str]:
    """Return nvcc's flags; the newest architecture comes as PTX, too, for GPUs still to come."""
    archs = architectures(nvcc)
    codes = {arch: f"sm_{arch}" for arch in archs}
    codes[archs[-1]] = f"[sm_{archs[-1]},compute_{archs[-1]}]"
    generate = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes.items()]
    told = subprocess.run([nvcc, "--help"], check=True, capture_output=True, text=True).stdout
    small = ["--compress-mode=size"] if "--compress-mode" in told else []  # from 12.8 on
    return [*FLAGS, *small, *generate]


def library_folders(nvcc: str) -> list[str]:
    """Return where the toolkit of an nvcc keeps its libraries."""
    told = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    (line,) = re.findall(r"^#\$ LIBRARIES=(.*)$", told.stderr, re.MULTILINE)
    places = re.findall(r'"-L([^"]+)"', line)
    return [place for place in places if Path(place, "libcudart_static.a").exists()]


def compile_object(nvcc: str, source: str, found: Path, flags: list[str]) -> str:
    """Compile one file to an object, unless nothing changed since that was done."""
    if source.endswith("_sm90.cu"):  # instructions that no other architecture has
        flags = [flag for flag in flags if not flag.startswith("-gencode")]
        flags.append("-gencode=arch=compute_90a,code=sm_90a")
    command = [nvcc, *flags, "-c", source, "-o", str(found)]
    stamp = found.with_suffix(".command")
    inputs = [source, *map(str, Path("cuda").glob("*.h"))]
    newest = max(os.stat(path).st_mtime for path in inputs)
    done = found.exists() and stamp.exists() and stamp.read_text() == repr(command)
    if done and found.stat().st_mtime >= newest:
        return str(found)
    found.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    if subprocess.run(command).returncode:
        sys.exit(
            f"nvcc could not compile {source} (its messages are above). Set SPFMT_CUDA=0 to build "
            "for CPUs only."
        )
    stamp.write_text(repr(command))
    return str(found)
