"""The engine of ``spfmt bench`` and of the suites in ``benchmarks/``.

A `Session` measures one `Case` after the other: every contender's result is compared with float64
before it is timed, contenders take turns, and each time is shown beside the ceilings of the machine
(`spfmt.ceilings`) measured in the same process. Needs numpy; torch, ONNX Runtime, scipy and peers
take part where they are installed, and the report says which are not.
"""

from __future__ import annotations

from spfmt.bench.contenders import (
    BATCH_FIRST,
    CHANNELS_FIRST,
    CHANNELS_LAST,
    CONVOLUTIONS,
    FEATURES_FIRST,
    LAYER,
    OPS,
    Case,
    ImageGeometry,
)
from spfmt.bench.exact import WrongResult
from spfmt.bench.rows import Row
from spfmt.bench.session import Session
from spfmt.bench.weights import Spec, parse_spec, random_weight

__all__ = [
    "BATCH_FIRST",
    "CHANNELS_FIRST",
    "CHANNELS_LAST",
    "CONVOLUTIONS",
    "FEATURES_FIRST",
    "LAYER",
    "OPS",
    "Case",
    "ImageGeometry",
    "Row",
    "Session",
    "Spec",
    "WrongResult",
    "parse_spec",
    "random_weight",
]
