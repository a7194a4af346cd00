"""Where a measurement was made: CPU, caches, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import spfmt
from spfmt.ceilings import cache_sizes
from spfmt.dispatch import EMULATED, LEVELS, kernels, timed_isa

__all__ = [
    "available_cpus",
    "available_memory",
    "commit",
    "cpu_name",
    "describe",
    "highest_level",
    "versions",
]

_PACKAGES = (
    "numpy",
    "torch",
    "onnx",
    "onnxruntime",
    "scipy",
    "sparse_dot_mkl",
    "sparseprop",
)  # fmt: skip


def available_cpus() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0))


def available_memory() -> int:
    """Return bytes of memory that programs can have now; half of all where it is not told."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.partition("MemAvailable:")[2].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cpu_name() -> str:
    """Return the CPU's name as the system reports it, with family and model where it is vague."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name") or platform.machine()
    if any(digit.isdigit() for digit in name):
        return name
    # Clouds cut the names of their CPUs; family and model still tell the generation.
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def highest_level() -> str:
    """Return the highest level of this CPU: what other libraries use, whatever SPFMT_ISA says."""
    levels = {k.isa for k in kernels() if k.available and k.isa not in EMULATED}
    return max(levels, key=LEVELS.index)


def commit() -> str:
    """Return the commit of a clone, ``-dirty`` if changed since; "" of an installed package."""
    folder = Path(spfmt.__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return ""  # a repository further up, around a virtual environment, is another project's
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def versions() -> dict[str, str]:
    """Return versions of Python, spfmt and of every package here that it is compared with."""
    found = {"python": platform.python_version(), "spfmt": spfmt.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, Any]:
    """Return what is needed to read a time later: CPU, cores, caches, level, system, commit.

    Raises
    ------
    FormatError
        If the level in use is emulated: times would say nothing of it.
    """
    return {
        "cpu": cpu_name(),
        "cores": available_cpus(),
        "isa": timed_isa(),
        "caches": cache_sizes(),
        "system": platform.platform(),
        "commit": commit(),
    }
