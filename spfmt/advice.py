"""`advise`: which format and kernel will be fastest for a weight here, or that dense will be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import spfmt._kernels as _kernels

from . import cost
from .convert import convert
from .dispatch import active_isa, check_workload
from .errors import FormatError, MissingDependency, SpfmtError, format_error
from .formats import CSR, FORMATS, SparseTensor

__all__ = ["Advice", "Candidate", "advise"]

_BLOCK = 16  # rows of a band
_SAMPLE_ROWS = 128
_SAMPLE_CELLS = 2**20


@dataclass(frozen=True)
class Candidate:
    """One way to compute the product, and what it is predicted to take.

    Attributes
    ----------
    format : str
        A format's name, or ``"dense"``.
    description : str
        The parameters that were assumed, or how a given weight gets there.
    variant : str
        Name of the kernel variant; for dense the empty string.
    threads : int
        How many would be used.
    density : float
        Share of stored positions, padding of the format included.
    seconds : float
        Predicted time of one product, values packed already.
    speedup : float
        Dense time over this.
    """

    format: str
    description: str
    variant: str
    threads: int
    density: float
    seconds: float
    speedup: float


@dataclass(frozen=True)
class Advice:
    """What is fastest, and everything that was compared. Print it for a table.

    Attributes
    ----------
    format : str
        The fastest format's name, or ``"dense"``.
    variant : str
        Kernel variant that will run, empty for dense.
    seconds, speedup : float
        Predicted time, and dense time over it: 1.0 where dense wins.
    candidates : tuple of Candidate
        All that were compared, fastest first, dense among them.
    excluded : tuple of (str, str)
        Formats that cannot hold the weight, and why.
    shape : tuple of int
        (R, C).
    op : str
    batch, threads : int
    isa : str
        Instruction-set level of the kernels.
    """

    candidates: tuple[Candidate, ...]
    excluded: tuple[tuple[str, str], ...]
    shape: tuple[int, int]
    op: str
    batch: int
    threads: int
    isa: str

    @property
    def best(self) -> Candidate:
        """The fastest candidate."""
        return self.candidates[0]

    @property
    def format(self) -> str:
        """The fastest format's name, or ``"dense"``."""
        return self.best.format

    @property
    def variant(self) -> str:
        """Kernel variant of the fastest."""
        return self.best.variant

    @property
    def seconds(self) -> float:
        """Predicted time of the fastest."""
        return self.best.seconds

    @property
    def speedup(self) -> float:
        """Dense time over the fastest's."""
        return self.best.speedup

    def __str__(self) -> str:
        rows, cols = self.shape
        lines = [
            f"{self.op} with a {rows} x {cols} weight, batch {self.batch}, "
            f"{self.threads} thread(s), {self.isa}: {self.format}",
            f"{'format':<16}{'kernel':<9}{'density':>8}{'time':>10}{'speed-up':>10}  as",
        ]
        lines += [
            f"{c.format:<16}{c.variant or '-':<9}{c.density:>8.3g}{cost.duration(c.seconds):>10}"
            f"{c.speedup:>9.2f}x  {c.description}"
            for c in self.candidates
        ]
        lines += [f"{name:<16}{reason.partition(';')[0]}" for name, reason in self.excluded]
        return "\n".join([*lines, "predicted by the cost model"])


@dataclass(frozen=True)
class _Workload:
    op: str
    batch: int
    threads: int
    isa: str

    def candidate(
        self, name: str, description: str, summary: Any, stored: float, dense: float
    ) -> Candidate:
        choice = cost.choose(self.isa, self.op, summary, self.batch, self.threads)
        return Candidate(
            name,
            description,
            choice.variant,
            choice.threads,
            stored,
            choice.seconds,
            dense / choice.seconds if choice.seconds else float("inf"),
        )


def advise(
    weight: Any,
    density: float | None = None,
    *,
    batch: int = 1,
    threads: int | None = None,
    formats: Iterable[str] | None = None,
    op: str = "spmm",
) -> Advice:
    """Predict which format and kernel are fastest for a weight on this machine.

    Parameters
    ----------
    weight : (R, C), SparseTensor, or dense array of shape (R, C)
        A shape, or a dense weight, with `density`: what each format would bring if the weight were
        pruned to it. A sparse tensor: its own kernels, and what a conversion would bring. A dense
        weight without `density`: its nonzeros as they are.
    density : float, optional
        Share of positions to keep, in (0, 1].
    batch : int
        Samples per product.
    threads : int, optional
        Threads that may be used; :func:`spfmt.get_num_threads` by default.
    formats : iterable of str, optional
        Formats to compare; all by default. Dense always takes part.
    op : {"spmm", "spmm_t", "sddmm"}
        The forward product, or one of the two of the backward pass.

    Returns
    -------
    Advice
        ``format`` is ``"dense"`` where dense wins.

    Raises
    ------
    FormatError
        If an argument is illegal, or no format can hold the weight.

    Notes
    -----
    float32; times are those of calls from numpy with (batch, features) operands, with values that
    were packed before. Nothing is measured and nothing is written: predictions are those of the
    cost model. See docs/advise.md for the model and for how far off it is.

    Examples
    --------
    >>> import spfmt
    >>> advice = spfmt.advise((3072, 768), density=0.1, batch=256)
    >>> advice.format in spfmt.formats.FORMATS and advice.speedup > 1
    True
    """
    batch, used = check_workload(batch, threads, op)
    names = _checked_formats(formats)
    shape, tensor = _read_weight(weight, density)
    isa = active_isa()
    work = _Workload(op, batch, used, isa)
    dense = _kernels.dense_seconds(*shape, batch, used)
    found = [Candidate("dense", "", "", used, 1.0, dense, 1.0)]
    excluded: list[tuple[str, str]] = []
    if tensor is None:
        found += _for_shape(work, shape, _checked_density(density), names, dense)
    else:
        for name in names:
            candidate = _converted(work, tensor, name, dense, isinstance(weight, SparseTensor))
            if isinstance(candidate, Candidate):
                found.append(candidate)
            else:
                excluded.append((name, candidate))
    found.sort(key=lambda c: c.seconds)
    return Advice(tuple(found), tuple(excluded), shape, op, batch, used, isa)


# ------------------------------------------------------------------------------------ arguments


def _checked_formats(formats: Iterable[str] | None) -> tuple[str, ...]:
    if formats is None:
        return tuple(FORMATS)
    names = tuple(formats) if isinstance(formats, Iterable) else (formats,)
    known = all(isinstance(name, str) and name in FORMATS for name in names)
    if not known or isinstance(formats, str) or not isinstance(formats, Iterable):
        raise format_error(
            f"formats={formats!r}", f"a list of names among {sorted(FORMATS)}", "leave it out"
        )
    return tuple(dict.fromkeys(names))


def _checked_density(density: float | None) -> float:
    if isinstance(density, (int, float, np.number)) and 0.0 < float(density) <= 1.0:
        return float(density)
    raise format_error(
        f"density={density!r}",
        "the share of weights to keep, in (0, 1]",
        "pass density=0.1, or a weight with zeros",
    )


def _read_weight(weight: Any, density: float | None) -> tuple[tuple[int, int], SparseTensor | None]:
    """Return the matrix shape, and the tensor where the weight's own pattern is what counts."""
    if isinstance(weight, SparseTensor):
        if density is not None:
            raise format_error(
                f"density={density} beside a sparse tensor",
                "one of them: the tensor has its own",
                "pass tensor.matrix_shape and a density to ask about another",
            )
        return weight.matrix_shape, weight
    if isinstance(weight, (tuple, list)):
        return _checked_shape(tuple(weight)), None
    shape = tuple(getattr(weight, "shape", ()))
    if density is not None:
        return _checked_shape(shape), None
    try:
        tensor = convert(weight, CSR)
    except SpfmtError as error:
        raise format_error(
            f"a weight of type {type(weight).__name__}",
            "a shape (R, C), a sparse tensor or a dense weight",
            str(error),
        ) from None
    return tensor.matrix_shape, tensor


def _checked_shape(shape: tuple[Any, ...]) -> tuple[int, int]:
    whole = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in shape)
    if len(shape) != 2 or not whole or not all(1 <= n < 2**31 for n in shape):
        raise format_error(
            f"a weight of shape {shape}",
            "(R, C), two positive sizes below 2**31",
            "a convolution's weight counts as (out_channels, in_channels * kernel cells)",
        )
    return int(shape[0]), int(shape[1])


# ----------------------------------------------------------------------------------- candidates


def _converted(
    work: _Workload, tensor: SparseTensor, name: str, dense: float, given_sparse: bool
) -> Candidate | str:
    """Predict a tensor in a format, or say why it cannot be held in it."""
    own = given_sparse and name == tensor.format
    try:
        held = tensor if own else convert(tensor, name)
    except (FormatError, MissingDependency) as error:
        return str(error)
    summary = _kernels.summary(held.plan.compiled, work.op)
    padding = held.nnz - tensor.nnz
    text = "as it is" if own else "converted"
    if padding:
        text += f", {padding} zeros added"
    return work.candidate(name, text, summary, held.density, dense)


def _for_shape(
    work: _Workload, shape: tuple[int, int], density: float, names: tuple[str, ...], dense: float
) -> Iterator[Candidate]:
    """Predict random structures of every format, of which a sample is made."""
    for name in names:
        sample, summary = _expected(FORMATS[name], shape, density, work.op)
        stored = summary.nnz / (shape[0] * shape[1])
        yield work.candidate(name, sample.caption(), summary, stored, dense)


def _expected(
    cls: type[SparseTensor], shape: tuple[int, int], density: float, op: str
) -> tuple[SparseTensor, Any]:
    """A sample of a random structure's rows, and the summary that the whole would have."""
    rows, cols = shape
    width = min(cols, _SAMPLE_CELLS // _BLOCK)
    height = min(rows, _SAMPLE_ROWS, max(_BLOCK, _SAMPLE_CELLS // width // _BLOCK * _BLOCK))
    sample = _sample(cls, (height, width), density)
    nnz = round(sample.nnz * (rows / height) * (cols / width))
    found = _kernels.summary(sample.plan.compiled, "spmm")
    if op == "spmm_t" and found.layout == "lists":
        # The product takes the transposed lists: a sample of columns tells how those are padded.
        width = min(cols, _SAMPLE_ROWS)
        height = min(rows, _SAMPLE_CELLS // width)
        part = _sample(cls, (height, width), density)
        found = _kernels.summary(part.plan.compiled, op)
        rows, cols, height, width = cols, rows, width, height
    bands = -(-rows // _BLOCK) / -(-height // _BLOCK)
    kept = nnz / max(1, found.nnz) / (rows / height)  # per row, of what the sample has
    return sample, _kernels.Summary(
        found.layout, rows, cols, nnz, round(found.vectors * bands * kept),
        round(found.octet_places * (rows / height) * kept),
    )  # fmt: skip


def _sample(cls: type[SparseTensor], shape: tuple[int, int], density: float) -> SparseTensor:
    return cls.random(shape, density, np.random.default_rng(0), **cls.parse_spec("") or {})
