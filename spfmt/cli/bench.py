"""``spfmt bench``: shapes, formats, sparsities, batches and threads of your own."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from spfmt.bench import (
    BATCH_FIRST,
    CHANNELS_FIRST,
    CHANNELS_LAST,
    CONVOLUTIONS,
    FEATURES_FIRST,
    LAYER,
    OPS,
    Case,
    ImageGeometry,
    Session,
    Spec,
    parse_spec,
)
from spfmt.bench.baselines import BASELINES, absent
from spfmt.bench.conv import output_size
from spfmt.bench.machine import available_cpus, available_memory
from spfmt.bench.record import check_target, make_record, write_record
from spfmt.errors import FormatError, MissingDependency, format_error
from spfmt.formats import FORMATS

__all__ = ["add_parser"]

T = TypeVar("T")

_OPS = {op: op for op in (*OPS, *CONVOLUTIONS) if op != LAYER} | {"layer": LAYER}
_LAYOUTS = {
    "bc": (BATCH_FIRST,),
    "cb": (FEATURES_FIRST,),
    "nchw": (CHANNELS_FIRST,),
    "nhwc": (CHANNELS_LAST,),
}
_BOTH = {"shape": (BATCH_FIRST, FEATURES_FIRST), "conv": (CHANNELS_FIRST, CHANNELS_LAST)}
_MOST_FEATURES = 1 << 24
_MOST_SAMPLES = 1 << 16
_ABOUT = """\
Time sparse against dense layers, linear ones or convolutions, on this machine. Every result is
compared with float64 before it is timed; contenders take turns in one process. Shown are medians,
first and ninth decile, the ratio to the fastest dense layer, and the share of the roof that the
machine's ceilings, measured first, leave to that product.

  spfmt bench --shape 4096x1024 --format condensed,nm:2:4 --sparsity 0.8,0.9 --batch 1,64
  spfmt bench --conv 128x64x3x3 --map 32x32 --stride 2 --op conv2d,layer --batch 1,64
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
        "conv": (_kernel, None, "instead: outputs x inputs x kernel, as nn.Conv2d.weight.shape"),
        "map": (_map, None, "height x width of a convolution's input"),
        "format": (_spec, ",".join(FORMATS), "also nm:2:4, nm:16, shuffled_block:8x32"),
        "sparsity": (_share, "0.9", "shares of weights that go"),
        "batch": (_samples, "1,64,256", "samples per call"),
        "threads": (_threads, "1", "up to the CPUs of this machine"),
        "op": (_op, None, f"{', '.join(_OPS)}; layer is forward and backward through autograd"),
    }
    either = bench.add_mutually_exclusive_group()
    for name, (parse, default, text) in lists.items():
        known = "spmm, or conv2d" if name == "op" else default
        text = f"{text}; comma-separated" + (f" (default: {known})" if known else "")
        add = (either if name in ("shape", "conv") else bench).add_argument
        add(f"--{name}", type=_list(parse), default=default, metavar="LIST", help=text)
    _add_options(bench)
    bench.set_defaults(run=run)


def _add_options(bench: argparse.ArgumentParser) -> None:
    add = bench.add_argument
    add("--stride", type=_step, metavar="N", help="of convolutions, along both axes (default: 1)")
    add("--padding", type=_zeros, metavar="N", help="on every side (default: half of the kernel)")
    add("--groups", type=_step, metavar="N", help="of channels that do not meet (default: 1)")
    text = "of the dense operands: (B, C), (C, B) or both, of images nchw, nhwc or both"
    add("--layout", choices=[*_LAYOUTS, "both"], help=f"{text} (default: bc, or nchw)")
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
    cases, layouts = list(_cases(args)), _layouts(args)
    for case in cases:
        _check_memory(case)
    session = Session(args.seconds, lambda line: print(line, flush=True))
    _introduce(session, args.baselines)
    compare = list(BASELINES) if args.baselines else []
    for case in cases:
        session.measure(case, args.format, suite="user", layouts=layouts, compare=compare)
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
    ops = args.op or ["conv2d" if args.conv else "spmm"]
    _check_kind(args, ops)
    axes = _layers(args), densities, ops, args.threads, args.batch
    for (shape, geometry), density, op, threads, batch in itertools.product(*axes):
        case = Case(shape, round(density, 12), batch, threads, op, geometry=geometry)
        if geometry is not None:
            output_size(case)  # raises where the kernel does not fit
        yield case


def _layers(args: argparse.Namespace) -> list[tuple[tuple[int, ...], ImageGeometry | None]]:
    if not args.conv:
        return [(shape, None) for shape in args.shape]
    return [(shape, _geometry(args, shape, size)) for shape in args.conv for size in args.map]


def _geometry(
    args: argparse.Namespace, shape: tuple[int, ...], size: tuple[int, int]
) -> ImageGeometry:
    padding = args.padding
    if padding is None:
        if shape[2] != shape[3]:
            raise format_error(
                f"a kernel of {shape[2]}x{shape[3]}", "--padding with it", "add --padding 0"
            )
        padding = shape[2] // 2
    return ImageGeometry(size, args.stride or 1, padding, args.groups or 1)


def _check_kind(args: argparse.Namespace, ops: list[str]) -> None:
    """Refuse options of the other kind of layer."""
    if args.conv and not args.map:
        raise format_error("--conv without --map", "the size of its input", "add --map 32x32")
    given = [name for name in ("map", "stride", "padding", "groups") if _has(args, name)]
    if given and not args.conv:
        raise format_error(
            f"--{given[0]} without --conv", "it with a convolution", "add --conv 64x64x3x3"
        )
    known = CONVOLUTIONS if args.conv else OPS
    wrong = [op for op in ops if op not in known]
    if wrong:
        names = ", ".join("layer" if op == LAYER else op for op in known)
        raise format_error(f"--op {wrong[0]}", f"{names} for this layer", f"choose --op {known[0]}")


def _has(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name) is not None


def _layouts(args: argparse.Namespace) -> tuple[str, ...]:
    kind = "conv" if args.conv else "shape"
    if args.layout is None:
        return _BOTH[kind][:1]
    layouts = _BOTH[kind] if args.layout == "both" else _LAYOUTS[args.layout]
    if layouts[0] not in _BOTH[kind]:
        names = [name for name, of in _LAYOUTS.items() if of[0] in _BOTH[kind]]
        raise format_error(
            f"--layout {args.layout}", f"{', '.join(names)} or both for this layer", "choose one"
        )
    return layouts


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
    rows, cols = case.shape[0], math.prod(case.shape[1:])
    needed = 4 * (3 * rows * cols + 4 * _numbers(case) * case.batch)
    memory = available_memory()
    if needed > memory:
        raise format_error(
            f"{'x'.join(map(str, case.shape))} at batch {case.batch}, some {needed / 1e9:.0f} GB "
            "with a dense layer to compare with",
            f"at most the {memory / 1e9:.0f} GB that are free",
            "choose a smaller shape or batch",
        )


def _numbers(case: Case) -> int:
    """Of X and Y for one sample."""
    if case.geometry is None:
        return sum(case.shape)
    channels = case.shape[1] * case.geometry.groups
    return channels * math.prod(case.geometry.size) + case.shape[0] * math.prod(output_size(case))


def _list(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Make a parser of comma-separated entries; errors name the entry."""

    def entries(text: str) -> list[T]:
        return [parse(part.strip()) for part in text.split(",")]

    return entries


def _bad(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"got {text!r}; expected {expected}")


def _whole(text: str, most: int, least: int = 1) -> int:
    value = int(text) if text.isascii() and text.isdecimal() else -1
    if not least <= value <= most:
        raise _bad(text, f"a whole number from {least} to {most}")
    return value


def _sizes(text: str, count: int, expected: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) != count:
        raise _bad(text, expected)
    return tuple(_whole(part, _MOST_FEATURES) for part in parts)


def _shape(text: str) -> tuple[int, ...]:
    return _sizes(text, 2, "outputs x inputs, such as 3072x768")


def _kernel(text: str) -> tuple[int, ...]:
    return _sizes(text, 4, "outputs x inputs x height x width, such as 64x64x3x3")


def _map(text: str) -> tuple[int, ...]:
    return _sizes(text, 2, "height x width, such as 32x32")


def _step(text: str) -> int:
    return _whole(text, _MOST_SAMPLES)


def _zeros(text: str) -> int:
    return _whole(text, _MOST_SAMPLES, 0)


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
