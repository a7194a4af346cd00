"""``spfmt train recipe.toml``: train what a recipe says, and go on after a stop."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]

_ABOUT = """\
Train what a recipe says: data set, network, method, density, seeds. The results directory gets the
recipe with all its defaults, metrics as JSON lines, curves, and the trained models as safetensors
and ONNX. A run that was stopped, however, goes on with --resume from its last checkpoint, to the
same bits.

  spfmt train examples/recipes/digits-srigl.toml --out digits
  spfmt train cifar10.toml --data ~/data --set method.density=0.05 --set seeds=[0,1,2] --resume
"""


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to the command line."""
    train = commands.add_parser(
        "train",
        help="train a sparse network as a recipe says, with checkpoints and results",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = train.add_argument
    add("recipe", type=Path, metavar="RECIPE", help="a file of TOML")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="replace a key (may be repeated); KEY= takes it away")  # fmt: skip
    add("--data", metavar="DIR", help="of the data set's files (default: SPFMT_DATA)")
    add("--out", type=Path, metavar="DIR", help="results (default: runs/ and the recipe's name)")
    add("--resume", action="store_true", help="go on with what is there, or begin")
    add("--quiet", action="store_true", help="print the summary alone")
    add("--json", type=Path, metavar="FILE", help="also write the summary to this file")
    train.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run a recipe and print its summary.

    Raises
    ------
    FormatError, MissingDependency, Diverged, OSError
        As :func:`spfmt.recipes.run_recipe`.
    """
    from spfmt.bench.record import check_target

    if args.json:
        check_target(args.json)
    from spfmt.cli._train_progress import watcher
    from spfmt.recipes import load_recipe, run_recipe

    recipe = load_recipe(args.recipe, args.changes, data_dir=args.data)
    out = args.out or Path("runs") / args.recipe.stem
    try:
        with watcher(recipe, quiet=args.quiet) as seen:
            summary = run_recipe(recipe, out, resume=args.resume, watcher=seen)
    except KeyboardInterrupt:
        print(f"spfmt: stopped; --resume --out {out} goes on", file=sys.stderr)
        raise
    print(summary)
    print(f"Results are in {out}.")
    if args.json:
        args.json.write_text(json.dumps(summary.as_json(), indent=1) + "\n", encoding="utf-8")
