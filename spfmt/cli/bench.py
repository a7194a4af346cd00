"""``spfmt bench``: shapes, formats, sparsities, batches and threads of your own."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from spfmt.bench import (
    BATCH_FIRST,
    FEATURES_FIRST,
    LAYER,
    Case,
    Session,
    Spec,
    parse_spec,
)
from spfmt.bench.baselines import BASELINES, absent
from spfmt.bench.machine import available_cpus, available_memory
from spfmt.bench.record import check_target, make_record, write_record
from spfmt.errors import FormatError, MissingDependency, format_error
from spfmt.formats import FORMATS

__all__ = ["add_parser"]

T = TypeVar("T")

_OPS = {"spmm": "spmm", "spmm_t": "spmm_t", "sddmm": "sddmm", "layer": LAYER}
_LAYOUTS = {
    "bc": (BATCH_FIRST,),
    "cb": (FEATURES_FIRST,),
    "both": (BATCH_FIRST, FEATURES_FIRST),
}
_MOST_FEATURES = 1 << 24
_MOST_SAMPLES = 1 << 16
_ABOUT = """\
Time sparse against dense linear layers on this machine. Every result is compared with float64
before it is timed; contenders take turns in one process. Shown are medians, first and ninth decile,
the ratio to the fastest dense layer, and the share of the roof that the machine's ceilings,
measured first, leave to that product.

  spfmt bench --shape 4096x1024 --format condensed,nm:2:4 --sparsity 0.8,0.9 --batch 1,64
"""


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to the command line."""
    bench = commands.add_parser(
        "bench",
        help="time sparse against dense layers, for shapes and formats of your own",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lists = {
        "shape": (_shape, "3072x768", "outputs x inputs, as nn.Linear.weight.shape"),
        "format": (_spec, ",".join(FORMATS), "also nm:2:4, nm:16, shuffled_block:8x32"),
        "sparsity": (_share, "0.9", "shares of weights that go"),
        "batch": (_samples, "1,64,256", "samples per call"),
        "threads": (_threads, "1", "up to the CPUs of this machine"),
        "op": (_op, "spmm", f"{', '.join(_OPS)}; layer is forward and backward through autograd"),
    }
    for name, (parse, default, text) in lists.items():
        text = f"{text}; comma-separated (default: {default})"
        bench.add_argument(
            f"--{name}", type=_list(parse), default=default, metavar="LIST", help=text
        )
    _add_options(bench)
    bench.set_defaults(run=run)


def _add_options(bench: argparse.ArgumentParser) -> None:
    add = bench.add_argument
    text = "of the dense operands: (B, C), (C, B) or both (default: bc)"
    add("--layout", choices=list(_LAYOUTS), default="bc", help=text)
    text = f"compare with other ways too: {', '.join(BASELINES)}"
    add("--baselines", action="store_true", help=text)
    add("--seconds", type=_seconds, default=2.0, help="for each case (default: 2)")
    add("--json", type=Path, metavar="FILE", help="write the results to this file")
    add("--figures", type=Path, metavar="DIR", help="draw them there as PNG (matplotlib)")


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for.

    Raises
    ------
    FormatError
        For sizes beyond this machine, or an output that cannot be written; before anything is
        measured.
    MissingDependency
        Where the layer's passes are asked for without torch, or figures without matplotlib.
    WrongResult
        Where a contender's result is wrong.
    """
    _check_outputs(args.json, args.figures)
    cases = list(_cases(args))
    for case in cases:
        _check_memory(case)
    session = Session(args.seconds, lambda line: print(line, flush=True))
    _introduce(session, args.baselines)
    compare = list(BASELINES) if args.baselines else []
    for case in cases:
        session.measure(
            case, args.format, suite="user", layouts=_LAYOUTS[args.layout], compare=compare
        )
    record = make_record(session)
    if args.json:
        write_record(record, args.json)
        print(f"\nwrote {args.json}")
    if args.figures:
        from spfmt.bench.figures import draw_all

        for path in draw_all(record, args.figures):
            print(f"drew {path}")


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    densities = [1 - share for share in args.sparsity]
    axes = args.shape, densities, args.op, args.threads, args.batch
    for shape, density, op, threads, batch in itertools.product(*axes):
        yield Case(shape, round(density, 12), batch, threads, op)


def _introduce(session: Session, all_baselines: bool) -> None:
    about = session.machine
    print(f"{about['cpu']}, {about['cores']} CPUs, {about['isa']}")
    for package, reason in absent().items():
        if all_baselines or package in ("torch", "onnxruntime", "onnx"):
            print(f"absent: {package} ({reason})")


def _check_outputs(json: Path | None, figures: Path | None) -> None:
    """Refuse before the measurement what would lose it afterwards."""
    if json is not None:
        check_target(json)
    if figures is not None:
        if find_spec("matplotlib") is None:
            raise MissingDependency(
                "got --figures without matplotlib; expected it installed; run: pip install "
                "'spfmt[demo]'"
            )
        figures.mkdir(parents=True, exist_ok=True)


def _check_memory(case: Case) -> None:
    """Refuse weights whose dense form, with scores and a copy, does not fit."""
    rows, cols = case.shape
    needed = 4 * (3 * rows * cols + 4 * (rows + cols) * case.batch)
    memory = available_memory()
    if needed > memory:
        raise format_error(
            f"{rows}x{cols} at batch {case.batch}, some {needed / 1e9:.0f} GB with a dense layer "
            "to compare with",
            f"at most the {memory / 1e9:.0f} GB that are free",
            "choose a smaller shape or batch",
        )


def _list(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Make a parser of comma-separated entries; errors name the entry."""

    def entries(text: str) -> list[T]:
        return [parse(part.strip()) for part in text.split(",")]

    return entries


def _bad(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"got {text!r}; expected {expected}")


def _whole(text: str, most: int) -> int:
    value = int(text) if text.isascii() and text.isdecimal() else 0
    if not 1 <= value <= most:
        raise _bad(text, f"a whole number from 1 to {most}")
    return value


def _shape(text: str) -> tuple[int, int]:
    rows, cross, cols = text.partition("x")
    if not cross:
        raise _bad(text, "outputs x inputs, such as 3072x768")
    return _whole(rows, _MOST_FEATURES), _whole(cols, _MOST_FEATURES)


def _spec(text: str) -> Spec:
    try:
        return parse_spec(text)
    except FormatError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0.0 < share < 1.0:
        raise _bad(text, "a number between 0 and 1")
    return share


def _samples(text: str) -> int:
    return _whole(text, _MOST_SAMPLES)


def _threads(text: str) -> int:
    return _whole(text, available_cpus())


def _op(text: str) -> str:
    if text not in _OPS:
        raise _bad(text, ", ".join(_OPS))
    return _OPS[text]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= 3600.0:
        raise _bad(text, "seconds from 0 to 3600")
    return seconds
