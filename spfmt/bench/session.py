"""Measurements of one process: cases in, rows of numbers out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import spfmt.threads
from spfmt.bench import baselines, conv
from spfmt.bench.baselines import BASELINES, NotMeasured
from spfmt.bench.contenders import (
    BATCH_FIRST,
    CHANNELS_FIRST,
    FEATURES_FIRST,
    LAYER,
    Case,
    Contender,
    Setting,
    ours,
)
from spfmt.bench.conv import ImageSetting
from spfmt.bench.machine import describe
from spfmt.bench.rows import Row, make_rows, table
from spfmt.bench.timing import Timing, interleave
from spfmt.bench.weights import Spec, random_weight
from spfmt.ceilings import Ceilings, measure_ceilings
from spfmt.errors import MissingDependency
from spfmt.formats import SparseTensor

__all__ = ["Session", "threads_restored", "use_threads"]


class Session:
    """Measures cases one after the other and keeps what they share.

    Parameters
    ----------
    seconds : float
        Time for each case.
    say : callable, optional
        Receives each line of the tables as they grow; None is silent.
    only : str
        Cases whose description (``str(case)``) lacks this text are passed over.

    Attributes
    ----------
    rows : list of Row
    skipped : dict of str to str
        What was not measured, and why.
    machine : dict
        Where, and on which commit, the session began.
    """

    def __init__(
        self, seconds: float, say: Callable[[str], None] | None = None, only: str = ""
    ) -> None:
        self.seconds = seconds
        self.only = only
        self.say = say or (lambda line: None)
        self.rows: list[Row] = []
        self.skipped: dict[str, str] = {}
        self.machine = describe()
        self._ceilings: dict[tuple[str, int], Ceilings] = {}
        self._weights: dict[Any, SparseTensor] = {}

    @property
    def ceilings(self) -> list[Ceilings]:
        """What was measured so far."""
        return list(self._ceilings.values())

    def roof(self, isa: str, threads: int) -> Ceilings:
        """Ceilings of a level and a number of threads, measured at their first use."""
        key = isa, threads
        if key not in self._ceilings:
            self._ceilings[key] = measure_ceilings(threads, isa)
            self.say(f"ceilings, {self._ceilings[key]}")
        return self._ceilings[key]

    def weight(self, spec: Spec, shape: tuple[int, ...], density: float) -> SparseTensor:
        """Random weight; those of one shape are kept, because cases differ mostly in the batch."""
        key = spec.format, tuple(spec.params.items()), shape, density
        if key not in self._weights:
            self._weights = {k: w for k, w in self._weights.items() if k[2] == shape}
            self._weights[key] = random_weight(spec, shape, density)
        return self._weights[key]

    def measure(
        self,
        cases: Case | Sequence[Case],
        specs: Sequence[Spec] = (),
        *,
        weights: Sequence[SparseTensor] = (),
        suite: str = "",
        layouts: Sequence[str] | None = None,
        backends: Sequence[str] = ("auto",),
        compare: Sequence[str] = (),
        dense: bool = True,
        extra: Callable[[Setting], Sequence[Contender]] | None = None,
    ) -> list[Row]:
        """Check, then time in turns, every contender.

        Parameters
        ----------
        cases : Case or sequence of Case
            Contenders of several cases take turns too, for ratios between the cases.
        specs : sequence of Spec
            Random weights to make.
        weights : sequence of SparseTensor, optional
            Further weights, of the case's shape.
        suite : str
            Noted in the rows.
        layouts, backends : sequence of str
            Of our products; both layouts of matrices by default, and NCHW of images. One sample of
            features lies in memory the same way in either layout.
        compare : sequence of str
            Names of `BASELINES`.
        dense : bool
            Whether dense layers take part; without them there are no speed-ups.
        extra : callable, optional
            Makes more contenders of each case.

        Returns
        -------
        list of Row
            Also appended to `rows`.

        Raises
        ------
        WrongResult
            Before anything is timed.
        MissingDependency
            Where a case needs torch and there is none.
        """
        cases = [cases] if isinstance(cases, Case) else cases
        cases = [case for case in cases if self.only in str(case)]
        found: list[tuple[Case, Contender]] = []
        for case in cases:
            _check_torch(case)
            setting = Setting(case) if case.geometry is None else ImageSetting(case)
            tensors = [*(self.weight(s, case.shape, case.density) for s in specs), *weights]
            contenders = self._dense(setting) if dense else []
            contenders += _ours(setting, tensors, layouts, backends)
            contenders += self._compared(setting, compare)
            contenders += extra(setting) if extra else []
            found += [(case, contender) for contender in contenders]
        timings = self._time(found)
        measured: list[Row] = []
        for case in cases:
            own = [(c, t) for (of, c), t in zip(found, timings, strict=True) if of is case]
            rows = make_rows(suite, case, own, self.roof)
            for line in table(case, rows):
                self.say(line)
            measured += rows
        self.rows += measured
        return measured

    def _time(self, found: Sequence[tuple[Case, Contender]]) -> list[Timing]:
        with threads_restored():
            for case, contender in found:
                use_threads(case.threads)
                contender.check()
            return interleave(
                [contender.call for _, contender in found],
                self.seconds,
                before=[functools.partial(use_threads, case.threads) for case, _ in found],
            )

    def _dense(self, setting: Setting) -> list[Contender]:
        found, missing = baselines.dense(setting)
        for name, reason in missing.items():
            self.skip(f"{name}, {setting.case}", reason)
        return found

    def _compared(self, setting: Setting, names: Sequence[str]) -> list[Contender]:
        found = []
        for name in names:
            format, make = BASELINES[name]
            weight = self.weight(Spec(format), setting.case.shape, setting.case.density)
            try:
                found.append(make(setting, weight))
            except NotMeasured as reason:
                self.skip(f"{name}, {setting.case}", str(reason))
        return found

    def skip(self, what: str, reason: str) -> None:
        """Note, and say, what is not measured and why."""
        if what not in self.skipped:
            self.skipped[what] = reason
            self.say(f"not measured: {what}: {reason}")


def _check_torch(case: Case) -> None:
    if case.op == LAYER and not baselines.available("torch"):
        raise MissingDependency(
            f"got a benchmark of {LAYER} without torch; expected torch, whose autograd runs it; "
            "run: pip install 'spfmt[torch]'"
        )


def _ours(
    setting: Setting,
    tensors: Sequence[SparseTensor],
    layouts: Sequence[str] | None,
    backends: Sequence[str],
) -> list[Contender]:
    case = setting.case
    if isinstance(setting, ImageSetting):
        layouts, make = (CHANNELS_FIRST,) if layouts is None else layouts, conv.ours
    else:
        layouts, make = (BATCH_FIRST, FEATURES_FIRST) if layouts is None else layouts, ours
        if case.batch == 1 or case.op == LAYER:  # one sample lies both ways; layers take (B, C)
            layouts = layouts[:1]
    if case.op == LAYER:
        from spfmt.bench.layer import sparse_layer

        layer = sparse_layer if case.geometry is None else conv.sparse_layer
        return [layer(setting, a, layout) for a in tensors for layout in layouts]
    return [make(setting, a, lay, be) for a in tensors for lay in layouts for be in backends]


def use_threads(threads: int) -> None:
    """Give spfmt, and torch where it takes part, a number of threads."""
    if spfmt.threads._override != threads:
        spfmt.threads.set_num_threads(threads)
    torch = baselines.loaded("torch")
    if torch is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """Leave the numbers of threads as they were."""
    torch = baselines.loaded("torch")
    own, theirs = spfmt.threads._override, torch.get_num_threads() if torch else 0
    try:
        yield
    finally:
        spfmt.threads.set_num_threads(own)
        if torch:
            torch.set_num_threads(theirs)
