"""Checkpoints: all that a run needs to go on bit for bit, in a file that is whole or not there."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import spfmt
from spfmt._files import replace_file
from spfmt.errors import format_error

__all__ = ["load_checkpoint", "random_state", "save_checkpoint", "set_random_state"]

VERSION = 1


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers and texts; the file is whole, or what it was before."""
    buffer = io.BytesIO()
    torch.save({**state, "version": VERSION, "spfmt": spfmt.__version__}, buffer)
    replace_file(os.path.realpath(path), buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, which cannot run code; a damaged one is a FormatError."""
    data = path.read_bytes()
    try:
        damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()  # torch does not look at checksums
        if damaged:
            raise zipfile.BadZipFile(f"{damaged} is not what was written")
        state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
        version = state["version"]
    except Exception as error:  # a damaged pickle fails in any way there is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise format_error(
            f"the checkpoint {path}, which cannot be read ({reason})",
            "what a run wrote",
            "remove it: the run then begins again",
        ) from None
    if version != VERSION:
        raise format_error(
            f"the checkpoint {path} of version {version}", f"version {VERSION}", "upgrade spfmt"
        )
    return state


def random_state() -> dict[str, Any]:
    """Return the state of every global generator: torch's, numpy's and Python's."""
    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the global generators where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
