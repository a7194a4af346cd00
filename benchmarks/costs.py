"""What a call costs besides its kernel: Python on the way, and packing after a change of values."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from spfmt.bench import BATCH_FIRST, Case, Session, parse_spec
from spfmt.bench.baselines import available
from spfmt.bench.contenders import Contender, Setting
from spfmt.formats import SparseTensor, new_version
from spfmt.structure.packing import group_rows, slice_padding

TINY = (16, 16)
SHAPE = (3072, 768)
CHUNK = 32  # columns that a lookup table in registers holds


def costs(session: Session) -> None:
    """One 16 x 16 block, whose kernel takes nanoseconds; new values; row grouping."""
    block = session.weight(parse_spec("shuffled_block"), TINY, 1.0)
    session.measure(
        Case(TINY, 1.0, 1), weights=[block], suite="costs", dense=False, extra=_through_torch(block)
    )
    for name in ("nm", "condensed", "csr"):
        a = session.weight(parse_spec(name), SHAPE, 0.1)
        for batch in (1, 64):
            session.measure(
                Case(SHAPE, 0.1, batch),
                weights=[a],
                suite="costs",
                layouts=(BATCH_FIRST,),
                dense=False,
                extra=lambda setting, a=a: [_new_values(setting, a)],
            )
    session.facts.update(_grouping(session.weight(parse_spec("condensed"), SHAPE, 0.1)))


def _through_torch(a: SparseTensor):
    """Make `SparseLinear`'s call without gradients, where torch is installed."""
    if not available("torch"):
        return None

    def make(setting: Setting) -> Sequence[Contender]:
        import torch

        from spfmt.torch import SparseLinear

        layer = SparseLinear.from_tensor(a, bias=None)
        x = torch.from_numpy(setting.x)
        for p in layer.parameters():
            p.requires_grad_(False)
        return [setting.contender("SparseLinear, no gradient", "sparse", a, lambda: layer(x))]

    return make


def _new_values(setting: Setting, a: SparseTensor) -> Contender:
    """A product whose values are new to the kernels at every call, as after a training step."""

    def call() -> np.ndarray:
        return a.plan.spmm(a.values, setting.x, batch_first=True, version=new_version())

    return setting.contender(f"{a.format}, new values", "sparse", a, call)


def _grouping(a: SparseTensor) -> dict[str, float]:
    """Padding of random constant fan-in with and without greedy row grouping, and its time."""
    rows, cols = a.matrix_shape
    counts = np.zeros((rows, -(-cols // CHUNK)), np.uint8)
    row, col = a.plan.layout.coordinates()
    np.add.at(counts, (row, col // CHUNK), 1)
    start = time.perf_counter()
    order = group_rows(counts)
    seconds = time.perf_counter() - start
    return {
        "padding of condensed, rows in order": slice_padding(counts),
        "padding of condensed, rows grouped": slice_padding(counts, order),
        "padding of condensed, as the kernels have it": a.plan.padding,
        "seconds to group rows": seconds,
    }
