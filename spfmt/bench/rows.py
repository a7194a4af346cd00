"""Rows of numbers, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spfmt.bench.contenders import Case, Contender, ImageGeometry
from spfmt.bench.machine import highest_level
from spfmt.bench.timing import Timing
from spfmt.ceilings import Ceilings
from spfmt.dispatch import active_isa

__all__ = ["Row", "make_rows", "rounded", "table"]

_BUSY = 0.1  # share of waiting that is worth a word


@dataclass(frozen=True)
class Row:
    """One measured contender.

    Attributes
    ----------
    suite : str
        The part of the benchmark that asked.
    name, kind, layout : str
        As in `Contender`.
    source : str
        Where the weights come from; "" is random.
    shape : tuple of int
        (R, C), or (C_out, C_in / groups, Kh, Kw).
    geometry : ImageGeometry or None
        Of a convolution.
    asked, density : float
        Density of the case, and of this contender: weights that take part, over all.
    batch, threads : int
    op, isa : str
        Product; instruction-set level whose ceilings are the roof.
    us, low, high : float
        Microseconds of one call: median, first and ninth decile.
    samples : int
    shared, left_out, waited : float, bool, float
        Share of samples in which something else used the core, and whether they do not count;
        share of the time in which other programs had it; see `Timing`.
    gflops, gbytes : float
        Operations and bytes that are needed at least (`spfmt.bench.work`), per second, in 1e9.
    roof : float
        Share of the roof: `gflops` over the highest possible with these bytes.
    level : str
        Where the working set lives.
    speedup : float or None
        The fastest dense layer's median over this one; None where no dense layer was measured.
    """

    suite: str
    name: str
    kind: str
    layout: str
    source: str
    shape: tuple[int, ...]
    geometry: ImageGeometry | None
    asked: float
    density: float
    batch: int
    threads: int
    op: str
    isa: str
    us: float
    low: float
    high: float
    samples: int
    shared: float
    left_out: bool
    waited: float
    gflops: float
    gbytes: float
    roof: float
    level: str
    speedup: float | None

    def as_json(self) -> dict[str, Any]:
        """Return the fields, rounded to what a timing can mean."""
        return {k: rounded(v) for k, v in asdict(self).items()}


def rounded(value: Any) -> Any:
    """Return a number with four digits; what else there is stays as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def make_rows(
    suite: str,
    case: Case,
    measured: Sequence[tuple[Contender, Timing]],
    roof: Callable[[str, int], Ceilings],
) -> list[Row]:
    """Turn one case's timings into rows.

    Parameters
    ----------
    suite : str
    case : Case
    measured : sequence of (Contender, Timing)
    roof : callable
        Gives the ceilings of a level and a number of threads.
    """
    best = min((t.median for c, t in measured if c.kind == "dense"), default=None)
    return [_row(suite, case, c, t, best, roof) for c, t in measured]


def _row(
    suite: str,
    case: Case,
    c: Contender,
    t: Timing,
    best: float | None,
    roof: Callable[[str, int], Ceilings],
) -> Row:
    isa = c.isa or (active_isa() if c.kind == "sparse" else highest_level())
    ceilings = roof(isa, case.threads)
    gflops = c.work.flops / t.median / 1e3
    return Row(
        suite=suite,
        name=c.name,
        kind=c.kind,
        layout=c.layout,
        source=case.source,
        shape=case.shape,
        geometry=case.geometry,
        asked=case.density,
        density=c.nnz / math.prod(case.shape),
        batch=case.batch,
        threads=case.threads,
        op=case.op,
        isa=isa,
        us=t.median,
        low=t.low,
        high=t.high,
        samples=t.samples,
        shared=t.shared,
        left_out=t.left_out,
        waited=t.waited,
        gflops=gflops,
        gbytes=c.work.nbytes / t.median / 1e3,
        # By times, not rates: a weight without nonzeros has a rate of zero.
        roof=ceilings.seconds(c.work.flops, c.work.nbytes) * 1e6 / t.median,
        level=ceilings.level(c.work.nbytes).name,
        speedup=None if best is None else best / t.median,
    )


def table(case: Case, rows: Sequence[Row]) -> Iterator[str]:
    """Yield one case's rows as lines of text."""
    scale, unit = (1e3, "ms") if max((r.us for r in rows), default=0.0) > 1e5 else (1.0, "us")
    yield f"\n{case}"
    yield (
        f"  {'':<42}{'density':>8}{'median':>12}{'10 to 90 %':>20}{'x dense':>9}"
        f"{'GFLOP/s':>9}{'GB/s':>7}{'of roof':>9}"
    )
    for r in rows:
        ratio = "" if r.speedup is None else f"{r.speedup:.2f}"
        yield (
            f"  {f'{r.name}, {r.layout}':<42}{100 * r.density:>6.1f} %{r.us / scale:>9.1f} {unit}"
            f"{f'{r.low / scale:.1f} to {r.high / scale:.1f}':>20}{ratio:>9}"
            f"{r.gflops:>9.1f}{r.gbytes:>7.1f}{100 * r.roof:>7.0f} %"
        )
    shared = max((r.shared for r in rows), default=0.0)
    if shared > _BUSY:
        left = "which are left out" if rows[0].left_out else "too many to leave out"
        yield f"  (something shared the core in up to {100 * shared:.0f} % of the samples, {left})"
    waited = max((r.waited for r in rows), default=0.0)
    if waited > _BUSY:
        yield (
            f"  (other programs had the core for up to {100 * waited:.0f} % of a contender's time: "
            "repeat on a quiet machine)"
        )
