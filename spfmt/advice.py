"""`advise`: which format and kernel will be fastest for a weight here, or that dense will be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import spfmt._kernels as _kernels

from . import cost
from .convert import convert
from .convolution import Convolution
from .cost import CONVOLUTIONS, OPS, Geometry, check_workload
from .dispatch import active_isa
from .errors import FormatError, KernelNotFound, MissingDependency, SpfmtError, format_error
from .formats import CSR, FORMATS, SparseTensor

__all__ = ["Advice", "Candidate", "advise"]

_BLOCK = 16  # rows of a band
_SAMPLE_ROWS = 128
_SAMPLE_CELLS = 2**20
_MOST_CELLS = _SAMPLE_CELLS // _BLOCK  # of a convolution's kernel


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
        Name of the kernel variant, of several in training joined by +; for dense the empty string.
    threads : int
        How many would be used.
    density : float
        Share of stored positions, padding of the format included.
    seconds : float
        Predicted time of the product, or of all three in training, values packed already.
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
        (R, C), or (C_out, C_in / groups, Kh, Kw).
    op : str
    batch, threads : int
    isa : str
        Instruction-set level of the kernels.
    geometry : Geometry or None
        Of a convolution.
    """

    candidates: tuple[Candidate, ...]
    excluded: tuple[tuple[str, str], ...]
    shape: tuple[int, ...]
    op: str
    batch: int
    threads: int
    isa: str
    geometry: Geometry | None = None

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
        maps = ""
        if self.geometry is not None:
            maps = f" on maps of {self.geometry.y[0]} x {self.geometry.x[0]}"
        lines = [
            f"{self.op} with a {' x '.join(map(str, self.shape))} weight{maps}, "
            f"batch {self.batch}, {self.threads} thread(s), {self.isa}: {self.format}",
            f"{'format':<16}{'kernel':<12}{'density':>8}{'time':>10}{'speed-up':>10}  as",
        ]
        lines += [
            f"{c.format:<16}{c.variant or '-':<12}{c.density:>8.3g}{cost.duration(c.seconds):>10}"
            f"{c.speedup:>9.2f}x  {c.description}"
            for c in self.candidates
        ]
        lines += [f"{name:<16}{reason.partition(';')[0]}" for name, reason in self.excluded]
        return "\n".join([*lines, "predicted by the cost model"])


@dataclass(frozen=True)
class _Workload:
    ops: tuple[str, ...]
    batch: int
    threads: int
    isa: str
    geometry: Geometry | None

    @property
    def summary_op(self) -> str:
        """The product whose orientation of the structure counts: images are turned elsewhere."""
        return self.ops[0] if self.geometry is None else "spmm"

    def dense(self, shape: tuple[int, int]) -> float:
        if self.geometry is None:
            return float(_kernels.dense_seconds(*shape, self.batch, self.threads))
        given = shape, self.batch, self.threads, self.geometry
        return sum(cost.dense_image_seconds(op, *given) for op in self.ops)

    def candidate(
        self, name: str, description: str, summary: Any, stored: float, dense: float
    ) -> Candidate:
        choices = [
            cost.choose(self.isa, op, summary, self.batch, self.threads, geometry=self.geometry)
            for op in self.ops
        ]
        seconds = sum(choice.seconds for choice in choices)
        return Candidate(
            name,
            description,
            "+".join(dict.fromkeys(choice.variant for choice in choices)),
            max(choice.threads for choice in choices),
            stored,
            seconds,
            dense / seconds if seconds else float("inf"),
        )


def advise(
    weight: Any,
    density: float | None = None,
    *,
    batch: int = 1,
    threads: int | None = None,
    formats: Iterable[str] | None = None,
    op: str | None = None,
    size: int | tuple[int, int] | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    device: str = "cpu",
) -> Advice:
    """Predict which format and kernel are fastest for a weight on this machine.

    Parameters
    ----------
    weight : (R, C), SparseTensor, or dense array of shape (R, C)
        A shape, or a dense weight, with `density`: what each format would bring if the weight were
        pruned to it. A sparse tensor: its own kernels, and what a conversion would bring. A dense
        weight without `density`: its nonzeros as they are. The weight of a convolution is
        (C_out, C_in / groups, Kh, Kw).
    density : float, optional
        Share of positions to keep, in (0, 1].
    batch : int
        Samples per product, or images.
    threads : int, optional
        Threads that may be used; :func:`spfmt.get_num_threads` by default.
    formats : iterable of str, optional
        Formats to compare; all by default. Dense always takes part.
    op : str, optional
        "spmm", the forward product and default, or "spmm_t" or "sddmm" of the backward pass. Of a
        convolution "conv2d", the default, "conv2d_input" or "conv2d_weight", or "training" for all
        three together.
    size : int or (int, int), optional
        (H, W) of the maps of X: asks about a convolution.
    stride, padding, dilation, groups
        Of the convolution; as for :func:`spfmt.conv2d`.
    device : {"cpu"}
        Of no other are there predictions: docs/cuda.md counts where dense wins on a GPU.

    Returns
    -------
    Advice
        ``format`` is ``"dense"`` where dense wins.

    Raises
    ------
    FormatError
        If an argument is illegal, or no format can hold the weight.
    KernelNotFound
        For a device whose kernels nobody has timed yet.

    Notes
    -----
    float32; times are those of calls from numpy with (batch, features) operands or (N, C, H, W)
    images, with values that were packed before. Nothing is measured and nothing is written:
    predictions are those of the cost model. See docs/advise.md for the model and for how far off it
    is.

    Examples
    --------
    >>> import spfmt
    >>> advice = spfmt.advise((3072, 768), density=0.1, batch=256)
    >>> advice.format in spfmt.formats.FORMATS and advice.speedup > 1
    True
    >>> conv = spfmt.advise((64, 64, 3, 3), 0.1, batch=64, size=32, padding=1, op="training")
    >>> conv.format in spfmt.formats.FORMATS and conv.speedup > 1
    True
    """
    if device != "cpu":
        raise KernelNotFound(
            f"got device={device!r}; predictions exist for the CPU: nobody has timed kernels of "
            "others; fix: see docs/cuda.md for counts, or run python -m benchmarks.cuda"
        )
    if size is None and (stride, padding, dilation, groups) != (1, 0, 1, 1):
        raise format_error(
            "options of a convolution without a size", "size=(H, W), of the maps of X", "pass both"
        )
    op = ("spmm" if size is None else "conv2d") if op is None else op
    ops = OPS if size is None else (*CONVOLUTIONS, "training")
    batch, used = check_workload(batch, threads, op, ops)
    names = _checked_formats(formats)
    shape, tensor = _read_weight(weight, density, images=size is not None)
    geometry = None
    if size is not None:
        how = Convolution.of(shape, stride, padding, dilation, groups)
        geometry = how.geometry(*_pair_of(size))
    isa = active_isa()
    work = _Workload(CONVOLUTIONS if op == "training" else (op,), batch, used, isa, geometry)
    dense = work.dense((shape[0], math.prod(shape[1:])))
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
    return Advice(tuple(found), tuple(excluded), shape, op, batch, used, isa, geometry)


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


def _pair_of(size: Any) -> tuple[Any, Any]:
    if np.ndim(size) == 0:
        return size, size
    if len(size) != 2:
        raise format_error(f"size={size!r}", "an int or (H, W)", "pass the size of the maps of X")
    height, width = size
    return height, width


def _checked_density(density: float | None) -> float:
    if isinstance(density, (int, float, np.number)) and 0.0 < float(density) <= 1.0:
        return float(density)
    raise format_error(
        f"density={density!r}",
        "the share of weights to keep, in (0, 1]",
        "pass density=0.1, or a weight with zeros",
    )


def _read_weight(
    weight: Any, density: float | None, images: bool
) -> tuple[tuple[int, ...], SparseTensor | None]:
    """Return the shape, and the tensor where the weight's own pattern is what counts."""
    if isinstance(weight, SparseTensor):
        if density is not None:
            raise format_error(
                f"density={density} beside a sparse tensor",
                "one of them: the tensor has its own",
                "pass tensor.shape and a density to ask about another",
            )
        return _checked_shape(weight.shape, images), weight
    if isinstance(weight, (tuple, list)):
        return _checked_shape(tuple(weight), images), None
    shape = tuple(getattr(weight, "shape", ()))
    if density is not None:
        return _checked_shape(shape, images), None
    try:
        tensor = convert(weight, CSR)
    except SpfmtError as error:
        raise format_error(
            f"a weight of type {type(weight).__name__}",
            "a shape (R, C), a sparse tensor or a dense weight",
            str(error),
        ) from None
    return _checked_shape(tensor.shape, images), tensor


def _checked_shape(shape: tuple[Any, ...], images: bool) -> tuple[int, ...]:
    whole = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in shape)
    sizes = (*shape[:1], math.prod(shape[1:])) if whole else ()
    legal = bool(sizes) and all(n >= 1 for n in shape) and all(n < 2**31 for n in sizes)
    if images and (len(shape) != 4 or not legal or math.prod(shape[2:]) > _MOST_CELLS):
        raise format_error(
            f"a weight of shape {shape} with a size of maps",
            "(C_out, C_in / groups, Kh, Kw), positive sizes with at most "
            f"{_MOST_CELLS} cells of a kernel",
            "leave size out for a linear layer",
        )
    if not images and (len(shape) != 2 or not legal):
        raise format_error(
            f"a weight of shape {shape}",
            "(R, C), two positive sizes below 2**31",
            "pass size=(H, W), of the maps of X, where it is a convolution's",
        )
    return tuple(int(n) for n in shape)


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
    summary = _kernels.summary(held.plan.compiled, work.summary_op)
    padding = held.nnz - tensor.nnz
    text = "as it is" if own else "converted"
    if padding:
        text += f", {padding} zeros added"
    return work.candidate(name, text, summary, held.density, dense)


def _for_shape(
    work: _Workload, shape: tuple[int, ...], density: float, names: tuple[str, ...], dense: float
) -> Iterator[Candidate]:
    """Predict random structures of every format, of which a sample is made."""
    for name in names:
        sample, summary = _expected(FORMATS[name], shape, density, work.summary_op)
        stored = summary.nnz / math.prod(shape)
        yield work.candidate(name, sample.caption(), summary, stored, dense)


def _expected(
    cls: type[SparseTensor], shape: tuple[int, ...], density: float, op: str
) -> tuple[SparseTensor, Any]:
    """A sample of a random structure's rows, and the summary that the whole would have."""
    rows, channels, *kernel = shape
    cells = math.prod(kernel)
    cols, width = channels * cells, min(channels, _SAMPLE_CELLS // _BLOCK // cells) * cells
    height = min(rows, _SAMPLE_ROWS, max(_BLOCK, _SAMPLE_CELLS // width // _BLOCK * _BLOCK))
    sample = _sample(cls, (height, width // cells, *kernel), density)
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


def _sample(cls: type[SparseTensor], shape: tuple[int, ...], density: float) -> SparseTensor:
    return cls.random(shape, density, np.random.default_rng(0), **cls.parse_spec("") or {})
