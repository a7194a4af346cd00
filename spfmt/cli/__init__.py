"""The command line: ``spfmt demo``, ``train``, ``bench``, ``info``, ``inspect``.

It sits on top of everything and holds no logic of its own; each command imports what it needs, so
that ``spfmt info`` and ``spfmt inspect`` work where only numpy and safetensors are installed.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import spfmt
from spfmt.cli import bench, train
from spfmt.errors import FormatError, MissingDependency, SpfmtError

__all__ = ["main"]

_USAGE, _FAILED, _INTERRUPTED = 2, 1, 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse would print the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        Exit code: 0; 1 where the demo found a wrong result or a training diverged; 2 for input that
        cannot be used, which is explained in one line on stderr; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "x" still gets its table
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FormatError, MissingDependency, OSError) as error:
        return _complain(error, _USAGE)
    except SpfmtError as error:
        return _complain(error, _FAILED)
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _complain(error: Exception, code: int) -> int:
    print(f"spfmt: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="spfmt", description="Sparse weights from training to deployment.")
    parser.add_argument("--version", action="version", version=f"spfmt {spfmt.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    train.add_parser(commands)
    bench.add_parser(commands)
    info = commands.add_parser("info", help="show versions, CPU level, threads and kernels")
    info.set_defaults(run=lambda args: print(spfmt.show_config()))
    inspect = commands.add_parser("inspect", help="check a saved tensor and show what is in it")
    inspect.add_argument("file", type=Path, metavar="FILE", help="what tensor.save() wrote")
    inspect.set_defaults(run=_inspect)
    return parser


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    text = "train, save, export and time a small network in every format, on real data"
    demo = commands.add_parser(
        "demo",
        help=text,
        description=f"{text[0].upper()}{text[1:]} (scikit-learn's handwritten digits; nothing is "
        "downloaded). Takes about a minute on two cores.",
    )
    demo.add_argument("--out", type=Path, metavar="DIR", help="keep models, results.json, demo.png")
    share = demo.add_mutually_exclusive_group()
    share.add_argument(
        "--density", type=_share, default=0.1, help="share of weights that stay (default: 0.1)"
    )
    share.add_argument(
        "--sparsity", type=_share, help="share of weights that go, instead of --density"
    )
    demo.add_argument("--seed", type=_seed, default=0, help="of everything random (default: 0)")
    demo.add_argument(
        "--quick", action="store_true", help="a tiny network, to see that all of it works"
    )
    demo.set_defaults(run=_demo)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 < share < 1.0:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a number between 0 and 1")
    return share


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number below 2**31")
    return int(text)


def _demo(args: argparse.Namespace) -> None:
    from spfmt.cli.demo import demo

    density = args.density if args.sparsity is None else 1.0 - args.sparsity
    demo(args.out, density=density, seed=args.seed, quick=args.quick)


def _inspect(args: argparse.Namespace) -> None:
    from spfmt.cli.inspect import describe

    print(describe(args.file))
