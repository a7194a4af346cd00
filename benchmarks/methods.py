"""Every training method on one task: ``python -m benchmarks.methods --data DIR --out DIR``.

Runs ``spfmt train`` on the recipes of examples/recipes, once for each way of training, each in a
process of its own, two seeds:

- ``digits``: 64 → 512 → 512 → 10 on scikit-learn's digits, a tenth of the weights, 15 epochs
- ``mnist``: 784 → 1024 → 1024 → 10, a twentieth of the weights, 10 epochs
- ``prune``: the trained ResNet-20 that ``--weights`` names, on CIFAR-10, pruned to a fifth and a
  tenth in each format, three epochs; then its inference in ONNX Runtime, one thread, dense and
  pruned ones in turn

Runs that are there already are not repeated, and one that was stopped goes on. ``--json FILE``
writes the record, or runs only the rows that it lacks and adds them; latencies of "prune" are
measured of all its rows again, from the networks in ``--out``. docs/training.md is generated from
docs/training-….json of the first two and docs/pruning-….json of the last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from spfmt._files import replace_file
from spfmt.bench import machine

RECIPES = Path(__file__).resolve().parent.parent / "examples" / "recipes"
# The recipe of each suite, and what all its rows change in it.
SUITES: dict[str, tuple[str, tuple[str, ...]]] = {
    "digits": ("digits-srigl", ("method.gamma_sal=",)),
    "mnist": (
        "mnist-dsb",
        ("model.hidden=[1024,1024]", "method.density=0.05", "format.name=", "format.block_shape="),
    ),
    "prune": ("cifar10-gradual", ("train.epochs=3",)),
}
SUMMARY = "summary.json"
LOTTERY = "Lottery, CSR"  # two trainings, which no recipe says
# Hidden neurons of a dense network with as many weights as the sparse ones: `train.small_width`.
SMALL = {"digits": 153, "mnist": 113}

# What each row changes, too.
_DENSE = (
    "method.name=dense", "method.density=", "method.distribution=", "method.exclude=",
    "method.delta_t=", "method.alpha=", "method.t_end=",
)  # fmt: skip
_REWIRE = ("method.name=rewire", "method.delta_t=", "method.alpha=")
METHODS: dict[str, tuple[str, ...]] = {
    "dense": _DENSE,
    "static, CSR": ("method.name=static",),
    "SNIP, CSR": ("method.name=static", "method.distribution=", "method.scores=snip"),
    "GraSP, CSR": (
        "method.name=static",
        "method.distribution=",
        "method.scores=grasp",
        "method.reset=true",
    ),
    "SET, CSR": ("method.name=set",),
    "random channels": (
        "method.name=static",
        "format.name=shuffled_block",
        "format.block_shape=[1,2147483647]",
        "format.aligned=true",
    ),
    "regrouping": (
        "method.name=static",
        "format.name=shuffled_block",
        "format.block_shape=[1,1]",
        "format.row_groups=8",
        "format.min_overlap=0",
    ),
    "RigL, CSR": ("method.name=rigl",),
    "RigL, N:M": ("method.name=rigl", "format.name=nm"),
    "SRigL": ("method.name=srigl",),
    "SSB": ("method.name=ssb", "format.block_shape=[8,8]"),
    "DNSB": ("method.name=dnsb", "format.block_shape=[8,8]"),
    "DSB": ("method.name=dsb", "format.block_shape=[8,8]"),
    "SampledGrowth": ("method.name=sampled", "method.samples=4"),
    "HRBP, static": ("method.name=static", "format.name=hrbp"),
    "HRBP, static, 64 groups": ("method.name=static", "format.name=hrbp", "format.groups=64"),
    "HRBP, dynamic": ("method.name=hrbp",),
    "Rewire, CSR": _REWIRE,
    "Rewire, N:M": (*_REWIRE, "format.name=nm"),
    "gradual, CSR": ("method.name=gradual", "method.alpha="),
}
REWIRE = {
    "Rewire, reset": (*_REWIRE, "method.mode=reset", "method.z=100"),
    "Rewire, regularize": (*_REWIRE, "method.mode=regularize"),
    "Rewire, SR-STE": (*_REWIRE, "method.mode=sr_ste"),
    "Rewire, no exploit": (*_REWIRE, "method.mode=no_exploit"),
    "Rewire, no explore": (*_REWIRE, "method.mode=no_explore"),
}
FORMATS: dict[str, tuple[str, ...]] = {
    name: (f"format.name={name}",) for name in ("csr", "condensed", "nm", "shuffled_block", "hrbp")
} | {"shuffled_block 16x1": ("format.name=shuffled_block", "format.block_shape=[16,1]")}
DENSITIES = (0.2, 0.1)
BATCHES = (1, 64)


def rows(suite: str, weights: Path | None) -> dict[str, tuple[str, ...]]:
    """Return the rows of a suite, and the changes of its recipe that make each of them."""
    if suite != "prune":
        width = SMALL[suite]
        small = (*_DENSE, f"model.hidden=[{width},{width}]")
        modes = REWIRE if suite == "digits" else {}
        return METHODS | modes | {"small": small, LOTTERY: ("method.name=static",)}
    begin = f"model.weights={weights}"
    pruned = {
        f"{format}, {density:g}": (begin, *changes, f"method.density={density}")
        for density in DENSITIES
        for format, changes in FORMATS.items()
    }
    return {"dense": (begin, *_DENSE, "format.name="), **pruned}


def train(suite: str, changes: Sequence[str], data: Path | None, out: Path) -> dict[str, Any]:
    """Run a recipe to its end in a process of its own, and return its summary."""
    recipe, changes = _recipe(suite, changes)
    command = [sys.executable, "-m", "spfmt.cli", "train", str(recipe)]
    command += ["--out", str(out), "--resume", "--quiet"]
    command += [] if data is None else ["--data", str(data)]
    for change in changes:
        command += ["--set", change]
    subprocess.run(command, check=True)
    return _summary(out)


def lottery(suite: str, changes: Sequence[str], data: Path | None, out: Path) -> dict[str, Any]:
    """Train dense, then the ticket that this draws, in a process of its own; return its summary."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(_lottery, suite, changes, data, out).result()
    return _summary(out)


def _lottery(suite: str, changes: Sequence[str], data: Path | None, out: Path) -> None:
    """Write the summary of all seeds' tickets, unless it is there; of another recipe it is not."""
    import torch

    from spfmt.recipes import load_images, load_recipe, runner
    from spfmt.recipes.results import claimed, settle, write_text

    sparse, dense = (
        load_recipe(*_recipe(suite, more), data_dir=None if data is None else str(data))
        for more in (changes, (*changes, *_DENSE))
    )
    images = load_images(sparse.data)
    with claimed(out, sparse, resume=True):
        if (out / SUMMARY).exists():
            return
        torch.set_num_threads(sparse.train.threads or torch.get_num_threads())
        results = tuple(_ticket(dense, sparse, images, seed) for seed in sparse.seeds)
        settle(out, sparse)
        write_text(out / SUMMARY, json.dumps(runner.Summary(out, results).as_json()))


def _ticket(dense: Any, sparse: Any, images: Any, seed: int) -> Any:
    """Train dense, and again from its hundredth on with the weights that were large in the end.

    The result is that of the second training, a run of the sparse recipe from other weights.
    """
    from spfmt.recipes.run import SeedRun, forget_peak
    from spfmt.recipes.runner import seed_result
    from spfmt.train import Lottery

    first = SeedRun(dense, images, seed)
    ticket = Lottery(first.model, total_steps=first.steps)
    while not first.finished:
        first.step()
        ticket.step()
    run = SeedRun(sparse, images, seed)
    densities = {name: layer.target_density for name, layer in run.method.layers.items()}
    ticket.draw("csr", densities)
    begun = {"model": ticket.model.state_dict(), "done": ticket.rewind}
    run.load_state_dict({**run.state_dict(), **begun})
    del first, ticket, begun  # what the dense training took is not the ticket's
    forget_peak()
    while not run.finished:
        run.step()
    run.test()
    return seed_result(run, [run.record(tested=True)])


def _folder(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-").replace(":", "")


def _name(weights: Path | None) -> str:
    """Return what a record calls the weights: where they lie is nobody else's matter."""
    return "" if weights is None else weights.name


def _recipe(suite: str, changes: Sequence[str]) -> tuple[Path, list[str]]:
    name, common = SUITES[suite]
    return RECIPES / f"{name}.toml", [*common, *changes]


def _summary(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / SUMMARY).read_text())
    return summary


def latencies(folders: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Return milliseconds of each run's network in ONNX Runtime, one thread, by batch."""
    import numpy as np

    import spfmt.onnx
    from spfmt.bench.baselines import quiet_options
    from spfmt.bench.timing import interleave

    sessions = [
        spfmt.onnx.session(folder / "seed-0" / "model.onnx", session_options=quiet_options(1))
        for folder in folders.values()
    ]
    found = {}
    for batch in BATCHES:
        x = np.random.default_rng(0).random((batch, 3, 32, 32), np.float32)
        calls = [_call(session, x) for session in sessions]
        times = [timing.median / 1e3 for timing in interleave(calls, seconds=20.0)]
        found[str(batch)] = dict(zip(folders, times, strict=True))
    return found


def _call(session: Any, x: Any) -> Any:
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--suite", choices=list(SUITES), action="append", help="may be repeated (default: all)")
    add("--data", type=Path, metavar="DIR", help="with the files of MNIST and CIFAR-10")
    add("--weights", type=Path, metavar="FILE", help="of the trained ResNet-20")
    add("--out", type=Path, required=True, metavar="DIR", help="results of every run")
    add("--only", default="", metavar="TEXT", help="only rows whose name has this text")
    add("--json", type=Path, metavar="FILE", help="write the record to this file")
    args = parser.parse_args()
    here = {"machine": machine.describe(), "versions": machine.versions()}
    record: dict[str, Any] = here
    if args.json and args.json.exists():
        record = json.loads(args.json.read_text())
    for suite in args.suite or SUITES:
        found, folders = record.setdefault(suite, {}), {}
        data = None if suite == "digits" else args.data  # those come with scikit-learn
        for name, changes in rows(suite, args.weights).items():
            if args.only in name and name not in found:
                folders[name] = args.out / suite / _folder(name)
                run = lottery if name == LOTTERY else train
                summary = run(suite, changes, data, folders[name])
                told = [c.replace(str(args.weights), _name(args.weights)) for c in changes]
                found[name] = {"changes": told, "cpu": here["machine"]["cpu"], **summary}
        if suite == "prune" and folders:  # those that are compared are measured at once
            every = {name: args.out / suite / _folder(name) for name in found}
            record["latencies"] = latencies(every)
    if args.json:
        replace_file(str(args.json), (json.dumps(record, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
