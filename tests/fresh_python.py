"""Run code in a new interpreter that sees spfmt as this one does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import spfmt


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process; the working directory is empty, so that it shadows nothing."""
    place = str(Path(spfmt.__file__).parent.parent)
    path = os.pathsep.join([place, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as directory:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": path, **env},
            capture_output=True,
            text=True,
        )
