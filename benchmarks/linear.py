"""Sparse against dense linear layers: ``python -m benchmarks.linear``.

Every result is compared with float64 before it is timed. Contenders then take turns in one process;
the tables show medians, the first and ninth decile, the ratio to the *faster* of torch's and ONNX
Runtime's dense layers, and the share of the roof that the machine's ceilings, measured in the same
process, leave to that product. Each side is called as its user would: ``spfmt.spmm`` on arrays,
``F.linear`` on tensors, ``session.run``.

``--suite all --json FILE`` takes about ten minutes; ``python docs/generate.py`` makes the results
page and its figures of that file. For shapes of your own there is ``spfmt bench``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import suites
from spfmt.bench import Session
from spfmt.bench.baselines import absent
from spfmt.bench.machine import versions
from spfmt.bench.record import check_target, make_record, write_record
from spfmt.errors import SpfmtError

NAMES = (*suites.SUITES, "real")


def main(argv: Sequence[str] | None = None) -> int:
    """Run suites; return 0, or 1 where a result was wrong."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.json:
        try:
            check_target(args.json)
        except SpfmtError as error:
            parser.error(str(error))
    wanted = _wanted(args.suite)
    session = Session(args.seconds, lambda line: print(line, flush=True))
    session.machine["cpu"] = args.cpu or session.machine["cpu"]
    _introduce(session)
    start = time.perf_counter()
    try:
        for name in wanted:
            _run(session, name, args.data)
    except SpfmtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{time.perf_counter() - start:.0f} s")
    if args.json:
        write_record(make_record(session, suites=wanted), args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--suite",
        default="layers",
        type=_names,
        help=f"comma-separated: all, or any of {', '.join(NAMES)} (default: layers)",
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=1.5, help="for each case (default: 1.5)"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--cpu", help="its name for the record, where the system's is vague")
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("SPFMT_DATA"),
        help="directory with the archives of the suite 'real' (default: $SPFMT_DATA)",
    )
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - {"all", *NAMES})
    if unknown:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}; expected {', '.join(NAMES)}")
    return names


def _seconds(text: str) -> float:
    seconds = float(text)  # argparse explains what is no number
    if not 0.0 <= seconds <= 3600.0:  # nan neither: it would never end
        raise argparse.ArgumentTypeError(f"got {text}; expected seconds from 0 to 3600")
    return seconds


def _wanted(names: Sequence[str]) -> list[str]:
    """Suites to run, each once, in the order of the table."""
    return [name for name in NAMES if name in names or "all" in names]


def _run(session: Session, name: str, data: Path | None) -> None:
    print(f"\n==== {name} ====", flush=True)
    if name != "real":
        suites.SUITES[name](session)
    elif data is None:
        session.skip("suite real", "neither --data nor SPFMT_DATA names a directory")
    else:
        suites.real(session, data)


def _introduce(session: Session) -> None:
    about = session.machine
    print(f"{about['cpu']}, {about['cores']} CPUs, {about['isa']}, commit {about['commit'] or '?'}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    for package, reason in absent().items():
        print(f"absent: {package} ({reason})")


if __name__ == "__main__":
    sys.exit(main())
