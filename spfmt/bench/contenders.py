"""What is timed: a call, what it should return, and how much work it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from spfmt.bench.exact import Exact, product
from spfmt.bench.work import Work, dense_work, sparse_work
from spfmt.formats import SparseTensor
from spfmt.ops import sddmm, spmm, spmm_t

__all__ = [
    "BATCH_FIRST",
    "CHANNELS_FIRST",
    "CHANNELS_LAST",
    "CONVOLUTIONS",
    "FEATURES_FIRST",
    "LAYER",
    "OPS",
    "Case",
    "Contender",
    "ImageGeometry",
    "Setting",
    "named",
    "ours",
]

Array = npt.NDArray[np.float32]

LAYER = "forward+backward"
OPS = ("spmm", "spmm_t", "sddmm", LAYER)
CONVOLUTIONS = ("conv2d", "conv2d_input", "conv2d_weight", LAYER)
BATCH_FIRST, FEATURES_FIRST = "(B, C)", "(C, B)"
CHANNELS_FIRST, CHANNELS_LAST = "NCHW", "NHWC"


@dataclass(frozen=True)
class ImageGeometry:
    """How a kernel moves over images.

    Attributes
    ----------
    size : (int, int)
        (H, W) of the maps of X.
    stride, padding, groups : int
        As ``nn.Conv2d`` has them, alike along both axes.
    """

    size: tuple[int, int]
    stride: int = 1
    padding: int = 0
    groups: int = 1

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.size[0]}x{self.size[1]} maps{stride}{groups}"


@dataclass(frozen=True)
class Case:
    """One question: which product, at which sizes.

    Attributes
    ----------
    shape : tuple of int
        (R, C): a layer from C to R features; of a convolution (C_out, C_in / groups, Kh, Kw).
    density : float
        Share of stored weights.
    batch, threads : int
    op : str
        One of `OPS`, with a geometry one of `CONVOLUTIONS`: a product through ``spfmt.spmm`` and so
        on, or a layer's forward and backward pass through torch's autograd.
    source : str
        Where the weights come from; "" is random.
    geometry : ImageGeometry, optional
        Of a convolution.
    """

    shape: tuple[int, ...]
    density: float
    batch: int
    threads: int = 1
    op: str = "spmm"
    source: str = ""
    geometry: ImageGeometry | None = None

    def __str__(self) -> str:
        rows, cols, *kernel = self.shape
        layer = f"{cols} -> {rows}"
        if self.geometry is not None:
            layer = f"{cols * self.geometry.groups} -> {rows}, {'x'.join(map(str, kernel))}"
            layer += f", {self.geometry}"
        threads = f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        source = f"{self.source}: " if self.source else ""
        return f"{source}{layer}, {self.op}, batch {self.batch}, {threads}"


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
    exact : callable
        Gives what `results` must yield.
    work : Work
    nnz : int
        Weights that take part.
    layout : str
        How the dense operands lie in memory, ``"(B, C)"`` or ``"(C, B)"``, images ``"NCHW"`` or
        ``"NHWC"``.
    isa : str
        Instruction-set level where it is forced, else "".
    """

    name: str
    kind: str
    call: Callable[[], Any]
    results: Callable[[Any], Sequence[Any]]
    exact: Callable[[], Sequence[Exact]]
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
        for exact, array in zip(self.exact(), got, strict=True):
            exact.require(f"{self.name}, {self.layout}", array)


@functools.lru_cache(maxsize=1)  # cases of one shape follow each other
def _dense_weight(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(3).standard_normal(shape, dtype=np.float32)


@dataclass
class Setting:
    """A case with its operands, and float64 results that contenders of one weight share.

    Attributes
    ----------
    case : Case
    PASSES : tuple of str
        Forward pass and both gradients: what a layer computes.
    """

    PASSES: ClassVar[tuple[str, str, str]] = ("spmm", "spmm_t", "sddmm")

    case: Case
    _exact: dict[str, tuple[Any, Exact]] = field(default_factory=dict, repr=False)

    @cached_property
    def x(self) -> Array:
        """(B, C)."""
        return self._operand(1, self.case.batch, self.case.shape[1])

    @cached_property
    def dy(self) -> Array:
        """(B, R)."""
        return self._operand(2, self.case.batch, self.case.shape[0])

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
        """The dense layer's weight, of the case's shape."""
        return _dense_weight(self.case.shape)

    def operands(self, layout: str) -> tuple[Array, Array]:
        """Return X and dY as a layout has them."""
        if layout == FEATURES_FIRST:
            return self.x_features, self.dy_features
        return self.x, self.dy

    def _operand(self, seed: int, *shape: int) -> Array:
        return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)

    def exact(self, weight: SparseTensor | Array, op: str | None = None) -> Exact:
        """Float64 result of a product; computed once for contenders of one weight in a row."""
        op = op or self.case.op
        if any(kept is not weight for kept, _ in self._exact.values()):
            self._exact.clear()  # hundreds of megabytes, of images
        if op not in self._exact:
            self._exact[op] = weight, self._compute(op, weight)
        return self._exact[op][1]

    def _compute(self, op: str, weight: SparseTensor | Array) -> Exact:
        return product(op, weight, self.x, self.dy)

    def work(self, weight: SparseTensor | Array) -> Work:
        """Work of the case with a weight."""
        return self._one_pass(weight).times(3 if self.case.op == LAYER else 1)

    def _one_pass(self, weight: SparseTensor | Array) -> Work:
        if isinstance(weight, SparseTensor):
            return sparse_work(weight, self.case.batch)
        return dense_work(weight.shape[0], weight.shape[1], self.case.batch)

    def contender(
        self,
        name: str,
        kind: str,
        weight: SparseTensor | Array,
        call: Callable[[], Any],
        *,
        layout: str = BATCH_FIRST,
        results: Callable[[Any], Sequence[Any]] | None = None,
        exact: Callable[[], Sequence[Exact]] | None = None,
        isa: str = "",
    ) -> Contender:
        """Make a contender that multiplies with `weight`; by default it returns the one result."""
        turned = layout == FEATURES_FIRST and self.case.op != "sddmm"
        exact = exact or (lambda: (self.exact(weight),))
        return Contender(
            name,
            kind,
            call,
            results or (lambda y: (np.asarray(y).T if turned else np.asarray(y),)),
            exact,
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
    x, dy = setting.operands(layout)
    options: dict[str, Any] = {"batch_first": layout == BATCH_FIRST}
    name, isa = named(a, backend, options)
    calls: dict[str, Callable[[], Any]] = {
        "spmm": lambda: spmm(a, x, **options),
        "spmm_t": lambda: spmm_t(a, dy, **options),
        "sddmm": lambda: sddmm(a, dy, x, **options),
    }
    results = (lambda y: (np.asarray(y).reshape(-1),)) if setting.case.op == "sddmm" else None
    return setting.contender(
        name, "sparse", a, calls[setting.case.op], layout=layout, results=results, isa=isa
    )


def named(a: SparseTensor, backend: str, options: dict[str, Any]) -> tuple[str, str]:
    """Return a contender's name and forced level; add the level to its options."""
    if backend == "auto":
        return a.label(), ""
    options["backend"] = backend
    return f"{a.label()} [{backend}]", backend
