"""A recipe that takes a moment: what the tests of recipes change one key of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spfmt.recipes import Recipe, read_recipe
from spfmt.recipes.recipe import _apply

TINY = """
seeds = 0

[data]
name = "digits"

[model]
name = "mlp"
hidden = [32, 24]

[method]
name = "srigl"
density = 0.25
exclude = "output"
delta_t = 3

[train]
steps = 20
batch_size = 48
threads = 1
log_every = 4
checkpoint_every = 6

[optimizer]
name = "sgd"
lr = 0.1

[output]
onnx = false
curves = false
"""

TIMES = ("seconds_per_step", "peak_memory")
"""What differs between two runs that are the same."""


def recipe(*changes: str, without: Iterable[str] = ()) -> Recipe:
    """Read the tiny recipe with changes as of ``--set``, and without some keys."""
    return read_recipe(tables(*changes, without=without))


def tables(*changes: str, without: Iterable[str] = ()) -> dict[str, Any]:
    """Return the tiny recipe's tables with changes."""
    import tomllib

    found = tomllib.loads(TINY)
    for name in without:
        table, _, key = name.partition(".")
        del found[table][key]
    for change in changes:
        _apply(found, change)
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a seed's metrics, without what differs between equal runs."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
