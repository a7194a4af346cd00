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

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import command, suites
from spfmt.bench import Session

NAMES = (*suites.SUITES, "real")


def main(argv: Sequence[str] | None = None) -> int:
    """Run suites; return 0, or 1 where a result was wrong."""
    parser = command.make_parser("linear", __doc__, NAMES, "layers")
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("SPFMT_DATA"),
        help="directory with the archives of the suite 'real' (default: $SPFMT_DATA)",
    )
    args = parser.parse_args(argv)
    real = {"real": lambda session: _real(session, args.data)}
    return command.run(parser, args, {**suites.SUITES, **real})


def _real(session: Session, data: Path | None) -> None:
    if data is None:
        session.skip("suite real", "neither --data nor SPFMT_DATA names a directory")
    else:
        suites.real(session, data)


if __name__ == "__main__":
    sys.exit(main())
