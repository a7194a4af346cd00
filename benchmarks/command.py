"""What the benchmarks' command lines share: options, suites in order, the record."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spfmt.bench import Session
from spfmt.bench.baselines import absent
from spfmt.bench.machine import versions
from spfmt.bench.record import check_target, make_record, write_record
from spfmt.errors import SpfmtError

Suite = Callable[[Session], None]


def make_parser(
    module: str, about: str | None, names: Sequence[str], default: str, seconds: float = 1.5
) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark has.

    Parameters
    ----------
    module : str
        As in ``python -m benchmarks.<module>``.
    about : str
    names : sequence of str
        The suites.
    default : str
        The suite without ``--suite``.
    seconds : float
        For each case, without ``--seconds``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    text = f"comma-separated: all, or any of {', '.join(names)} (default: {default})"
    add("--suite", default=default, type=lambda text: _names(text, names), help=text)
    add("--only", default="", metavar="TEXT", help="only cases whose heading has this text")
    text = f"for each case (default: {seconds})"
    add("--seconds", type=_seconds, default=seconds, help=text)
    add("--json", type=Path, help="write the results to this file")
    add("--cpu", help="its name for the record, where the system's is vague")
    return parser


def _names(text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - {"all", *known})
    if unknown:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}; expected {', '.join(known)}")
    return [name for name in known if name in names or "all" in names]


def _seconds(text: str) -> float:
    seconds = float(text)  # argparse explains what is no number
    if not 0.0 <= seconds <= 3600.0:  # nan neither: it would never end
        raise argparse.ArgumentTypeError(f"got {text}; expected seconds from 0 to 3600")
    return seconds


def run(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    suites: Mapping[str, Suite],
    more: Mapping[str, Sequence[Any]] | None = None,
) -> int:
    """Run the suites that were asked for; return 0, or 1 where a result was wrong.

    Parameters
    ----------
    parser, args
        See `make_parser`.
    suites : mapping of str to callable
        In the order in which they run.
    more : mapping of str to rows, optional
        Further entries of the record, which suites fill.
    """
    if args.json:
        try:
            check_target(args.json)
        except SpfmtError as error:
            parser.error(str(error))
    session = Session(args.seconds, lambda line: print(line, flush=True), args.only)
    session.machine["cpu"] = args.cpu or session.machine["cpu"]
    _introduce(session)
    start = time.perf_counter()
    try:
        for name in args.suite:
            print(f"\n==== {name} ====", flush=True)
            suites[name](session)
    except SpfmtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{time.perf_counter() - start:.0f} s")
    if args.json:
        extra = {key: [row.as_json() for row in rows] for key, rows in (more or {}).items()}
        write_record(make_record(session, suites=args.suite, **extra), args.json)
    return 0


def _introduce(session: Session) -> None:
    about = session.machine
    print(f"{about['cpu']}, {about['cores']} CPUs, {about['isa']}, commit {about['commit'] or '?'}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    for package, reason in absent().items():
        print(f"absent: {package} ({reason})")
