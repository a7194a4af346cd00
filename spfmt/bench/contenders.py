"""What is timed: a call, what it should return, and how much work it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from spfmt.bench.exact import Exact, product
from spfmt.bench.work import Work, dense_work, sparse_work
from spfmt.formats import SparseTensor
from spfmt.ops import sddmm, spmm, spmm_t

__all__ = ["BATCH_FIRST", "FEATURES_FIRST", "LAYER", "OPS", "Case", "Contender", "Setting", "ours"]

Array = npt.NDArray[np.float32]

LAYER = "forward+backward"
OPS = ("spmm", "spmm_t", "sddmm", LAYER)
BATCH_FIRST, FEATURES_FIRST = "(B, C)", "(C, B)"


@dataclass(frozen=True)
class Case:
    """One question: which product, at which sizes.

    Attributes
    ----------
    shape : (int, int)
        (R, C): a layer from C to R features.
    density : float
        Share of stored weights.
    batch, threads : int
    op : str
        One of `OPS`: a product through ``spfmt.spmm`` and so on, or a linear layer's forward and
        backward pass through torch's autograd.
    source : str
        Where the weights come from; "" is random.
    """

    shape: tuple[int, int]
    density: float
    batch: int
    threads: int = 1
    op: str = "spmm"
    source: str = ""

    def __str__(self) -> str:
        rows, cols = self.shape
        threads = f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        source = f"{self.source}: " if self.source else ""
        return f"{source}{cols} -> {rows}, {self.op}, batch {self.batch}, {threads}"


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes
    ----------
    name : str
    kind : {"sparse", "dense", "baseline"}
        Ours; a dense layer, which is what speed-ups refer to; anything else.
    call : callable
        What is timed.
    results : callable
        Turns what `call` returned into arrays with samples first.
    exact : sequence of Exact
        What `results` must yield.
    work : Work
    nnz : int
        Weights that take part.
    layout : str
        How the dense operands lie in memory, ``"(B, C)"`` or ``"(C, B)"``.
    isa : str
        Instruction-set level where it is forced, else "".
    """

    name: str
    kind: str
    call: Callable[[], Any]
    results: Callable[[Any], Sequence[Any]]
    exact: Sequence[Exact]
    work: Work
    nnz: int
    layout: str = BATCH_FIRST
    isa: str = ""

    def check(self) -> None:
        """Run once and compare with float64.

        Raises
        ------
        WrongResult
        """
        got = self.results(self.call())
        for exact, array in zip(self.exact, got, strict=True):
            exact.require(f"{self.name}, {self.layout}", array)


@functools.lru_cache(maxsize=1)  # cases of one shape follow each other
def _dense_weight(shape: tuple[int, int]) -> Array:
    return np.random.default_rng(3).standard_normal(shape, dtype=np.float32)


@dataclass
class Setting:
    """A case with its operands, and float64 results that contenders of one weight share.

    Attributes
    ----------
    case : Case
    """

    case: Case
    _exact: dict[tuple[int, str], tuple[Any, Exact]] = field(default_factory=dict, repr=False)

    @cached_property
    def x(self) -> Array:
        """(B, C)."""
        return self._operand(1, self.case.shape[1])

    @cached_property
    def dy(self) -> Array:
        """(B, R)."""
        return self._operand(2, self.case.shape[0])

    @cached_property
    def x_features(self) -> Array:
        """(C, B)."""
        return np.ascontiguousarray(self.x.T)

    @cached_property
    def dy_features(self) -> Array:
        """(R, B)."""
        return np.ascontiguousarray(self.dy.T)

    @property
    def dense(self) -> Array:
        """(R, C): the dense layer's weight."""
        return _dense_weight(self.case.shape)

    def _operand(self, seed: int, features: int) -> Array:
        rng = np.random.default_rng(seed)
        return rng.standard_normal((self.case.batch, features), dtype=np.float32)

    def exact(self, weight: SparseTensor | Array, op: str | None = None) -> Exact:
        """Float64 result of a product; computed once for each weight."""
        op = op or self.case.op
        key = id(weight), op
        if key not in self._exact:  # the weight is kept, so that no other one gets its id
            self._exact[key] = weight, product(op, weight, self.x, self.dy)
        return self._exact[key][1]

    def work(self, weight: SparseTensor | Array) -> Work:
        """Work of the case with a weight."""
        batch, passes = self.case.batch, 3 if self.case.op == LAYER else 1
        if isinstance(weight, SparseTensor):
            return sparse_work(weight, batch).times(passes)
        return dense_work(weight.shape[0], weight.shape[1], batch).times(passes)

    def contender(
        self,
        name: str,
        kind: str,
        weight: SparseTensor | Array,
        call: Callable[[], Any],
        *,
        layout: str = BATCH_FIRST,
        results: Callable[[Any], Sequence[Any]] | None = None,
        exact: Sequence[Exact] | None = None,
        isa: str = "",
    ) -> Contender:
        """Make a contender that multiplies with `weight`; by default it returns the one result."""
        turned = layout == FEATURES_FIRST and self.case.op != "sddmm"
        return Contender(
            name,
            kind,
            call,
            results or (lambda y: (np.asarray(y).T if turned else np.asarray(y),)),
            (self.exact(weight),) if exact is None else exact,
            self.work(weight),
            weight.nnz if isinstance(weight, SparseTensor) else weight.size,
            layout,
            isa,
        )


def ours(
    setting: Setting, a: SparseTensor, layout: str = BATCH_FIRST, backend: str = "auto"
) -> Contender:
    """Return one of our products as a user calls it, on numpy arrays.

    Parameters
    ----------
    setting : Setting
        Its case is one of the three products.
    a : SparseTensor
    layout : {"(B, C)", "(C, B)"}
    backend : str
        As in :func:`spfmt.spmm`.
    """
    first = layout == BATCH_FIRST
    x = setting.x if first else setting.x_features
    dy = setting.dy if first else setting.dy_features
    options: dict[str, Any] = {"batch_first": first}
    name, isa = a.label(), ""
    if backend != "auto":
        options["backend"] = isa = backend
        name += f" [{backend}]"
    calls: dict[str, Callable[[], Any]] = {
        "spmm": lambda: spmm(a, x, **options),
        "spmm_t": lambda: spmm_t(a, dy, **options),
        "sddmm": lambda: sddmm(a, dy, x, **options),
    }
    results = (lambda y: (np.asarray(y).reshape(-1),)) if setting.case.op == "sddmm" else None
    return setting.contender(
        name, "sparse", a, calls[setting.case.op], layout=layout, results=results, isa=isa
    )
