"""Which kernel runs: the table, the choice, and plans that hold a structure for the kernels.

A kernel is one row (op, layout, dtype, ISA) of one table, which knows no formats: each lowers to
one of two layouts. Nothing falls back in silence: a product without a kernel raises
:class:`~spfmt.errors.KernelNotFound`, which lists what exists.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import spfmt._kernels as _kernels

from . import cost, threads
from ._memory import aligned, is_aligned
from .activations import activation_code, apply_activation
from .cuda import library as cuda
from .errors import FormatError, KernelNotFound, format_error
from .formats._layout import Groups, Lists

Array = npt.NDArray[Any]
Layout = Lists | Groups

OPS, CONVOLUTIONS = cost.OPS, cost.CONVOLUTIONS
LEVELS = ("scalar", "avx2", "avx512")
EMULATED = tuple(_kernels.emulated_levels())  # right but slow; none but in a build for tests
logger = logging.getLogger("spfmt")


@dataclass(frozen=True)
class Kernel:
    """One row of the kernel table.

    Attributes
    ----------
    op, layout, dtype, isa : str
        What it computes, on which layout of a structure (``"lists"`` or ``"groups"``), in which
        dtype, with which instructions: of CUDA the least compute capability.
    device : {"cpu", "cuda"}
    available : bool
        Whether this machine can run it.
    reason : str
        Why not, empty if it can.
    """

    op: str
    layout: str
    dtype: str
    isa: str
    device: str
    available: bool
    reason: str


def _read_table() -> tuple[Kernel, ...]:
    return tuple(
        Kernel(op, layout, dtype, isa, "cpu", ok, "" if ok else f"this CPU lacks {isa}")
        for op, layout, dtype, isa, ok in _kernels.kernel_table()
    )


_TABLE = _read_table()
_selected: dict[tuple[str, str, str, str], Kernel] = {}


def kernels(
    op: str | None = None,
    layout: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> list[Kernel]:
    """List a device's kernel table, ``"cpu"`` or ``"cuda"``, filtered by op, layout and dtype.

    Raises
    ------
    FormatError
        For another device.

    Examples
    --------
    >>> sorted({k.dtype for k in kernels("conv2d", "groups", device="cuda")})
    ['bfloat16', 'float16', 'float32']
    """
    if device not in ("cpu", "cuda"):
        raise format_error(f"device={device!r}", "'cpu' or 'cuda'", "name one of them")
    return [
        k
        for k in (_TABLE if device == "cpu" else _cuda_table())
        if op in (None, k.op) and layout in (None, k.layout) and dtype in (None, k.dtype)
    ]


def _cuda_table() -> tuple[Kernel, ...]:
    """Read the table of CUDA kernels, which asks the driver whether there is a device."""
    here, why = cuda.available(), cuda.why_not()
    return tuple(
        Kernel(op, layout, dtype, cuda.LEVEL, "cuda", here, why)
        for layout, ops in cuda.OPS.items()
        for op in ops
        for dtype in cuda.DTYPES
    )


def active_isa() -> str:
    """Return the instruction-set level in use: the CPU's best, or what ``SPFMT_ISA`` forces.

    A level that the build only emulates is in use where it is forced, never by itself.

    Raises
    ------
    FormatError
        If ``SPFMT_ISA`` names no level, or one that this CPU lacks.
    """
    try:
        return str(_kernels.active_isa())
    except ValueError as error:
        raise FormatError(f"{error}; fix: unset SPFMT_ISA to use this CPU's best level") from None


def timed_isa() -> str:
    """Return :func:`active_isa` to callers that measure its speed.

    Raises
    ------
    FormatError
        If ``SPFMT_ISA`` is invalid, or forces a level that this build only emulates.
    """
    isa = active_isa()
    if isa in EMULATED:
        raise format_error(
            f"a measurement at level {isa!r}, which this build emulates (SPFMT_EMULATE)",
            "the level's own instructions",
            "unset SPFMT_ISA, or build without SPFMT_EMULATE for a CPU that has the level",
        )
    return isa


def select(op: str, layout: str, dtype: str, backend: str = "auto") -> Kernel:
    """Return the kernel that a product would run.

    Parameters
    ----------
    op : str
        A product of a matrix (`OPS`) or of images (`CONVOLUTIONS`).
    layout : {"lists", "groups"}
        Layout of the structure, as ``tensor.layout().name`` tells it.
    dtype : str
        numpy dtype name of values and operands, e.g. ``"float32"``.
    backend : str
        ``"auto"`` takes the highest level at or below :func:`active_isa` that has the dtype; a
        level (``"scalar"``, ``"avx2"``, ``"avx512"``) takes exactly that one.

    Raises
    ------
    KernelNotFound
        If no row fits; the message lists the rows that came closest and the way out.
    FormatError
        If `backend` is no level, or ``SPFMT_ISA`` is invalid.
    """
    if backend == "auto":
        wanted = LEVELS[LEVELS.index(active_isa()) :: -1]
    elif backend in LEVELS:
        wanted = (backend,)
    else:
        raise format_error(
            f"backend {backend!r}",
            f"'auto', 'reference' or one of {LEVELS}",
            "leave it out for the best kernel",
        )
    rows = {k.isa: k for k in kernels(op, layout, dtype)}
    for isa in wanted:
        if isa in rows and rows[isa].available:
            return rows[isa]
    raise KernelNotFound(_no_kernel(op, layout, dtype, wanted))


def _no_kernel(op: str, layout: str, dtype: str, wanted: tuple[str, ...]) -> str:
    near = kernels(op, layout) or kernels(op) or list(_TABLE)
    lines = [
        f"  {k.op} {k.layout} {k.dtype} {k.isa}: "
        + (k.reason or ("other level" if k.dtype == dtype else "other dtype"))
        for k in near
    ]
    fix = (
        "Use backend='auto' or unset SPFMT_ISA."
        if kernels(op, layout, dtype)
        else "Convert with astype('float32'), or use backend='reference' (numpy, dense, slow)."
    )
    return (
        f"no kernel for {op} of {layout} in {dtype} at level {' or '.join(wanted)}. Existing:\n"
        + "\n".join(lines)
        + f"\n{fix}"
    )


def show_config() -> str:
    """Return a readable summary: versions, CPU level, threads, CUDA, and the kernel table."""
    from . import __version__

    lines = [
        f"spfmt {__version__}, numpy {np.__version__}",
        f"instruction set: {_labelled(active_isa())} "
        f"(available: {', '.join(map(_labelled, _available_levels()))}; "
        "force one with SPFMT_ISA)",
        f"threads: {threads.get_num_threads()}",
        f"CUDA: {_cuda()}",
        f"{'layout':<9}{'op':<15}{'dtype':<9}levels",
    ]
    for layout, op, dtype in dict.fromkeys((k.layout, k.op, k.dtype) for k in _TABLE):
        levels = [
            _labelled(k.isa) if k.available else f"({k.isa})" for k in kernels(op, layout, dtype)
        ]
        lines.append(f"{layout:<9}{op:<15}{dtype:<9}{' '.join(levels)}")
    return "\n".join(lines)


def _cuda() -> str:
    """Say how many CUDA devices can compute, or why none can."""
    if not cuda.available():
        return f"none; {cuda.why_not()}"
    count = cuda.load().devices()
    return f"{count} device{'s' * (count > 1)} (float32, bfloat16, float16)"


def _labelled(isa: str) -> str:
    return f"{isa}[emulated]" if isa in EMULATED else isa


def _available_levels() -> list[str]:
    return [isa for isa in LEVELS if any(k.isa == isa and k.available for k in _TABLE)]


class Plan:
    """A structure made ready for the kernels; what they make of it is built once and kept.

    Parameters
    ----------
    layout : Lists or Groups
        The structure as kernels see it.

    Notes
    -----
    Thread-safe. `values` arguments are contiguous arrays of any shape with at least ``layout.nnz``
    elements; what lies behind them (spare capacity) is ignored. They are multiplied as they are in
    memory at the call, whoever wrote them. A `constant` promises that equal numbers mean equal
    content, so that packed copies of them are reused without a look (see
    :func:`spfmt.formats.new_version`); None promises nothing, and ``_kernels.WRITTEN`` says that
    they are written before each product, so that they are never packed.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.shape = (layout.rows, layout.cols)
        self.nnz = int(layout.nnz)
        self._compiled: Any = None
        self._calls: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (self.layout,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # frozen: a copy would only build the same again

    @property
    def nbytes(self) -> int:
        """Bytes of the compiled structure and of all that was built from it so far."""
        return 0 if self._compiled is None else int(self._compiled.nbytes)

    @property
    def padding(self) -> float:
        """Places per nonzero of the placement for small batches at the active level, 1 at best.

        Kernels for a few samples multiply 16 rows side by side, and a row that has no nonzero for
        a step multiplies by zero. Builds the placement if it is not there yet. Groups of rows that
        share their columns need no padding.
        """
        return float(self.compiled.padding)

    @property
    def compiled(self) -> Any:
        """The core's plan."""
        if self._compiled is None:  # without a lock, which a forked child could inherit locked
            self._compiled = _compile(self.layout)
        return self._compiled

    def choice(
        self,
        op: str,
        kernel: Kernel,
        batch: int,
        threads: int,
        geometry: cost.Geometry | None = None,
    ) -> cost.Choice:
        """Return how a kernel would run a product; :meth:`explain` says it in words."""
        # Images are turned as they are packed: no other structure stands for the transpose.
        summary = _kernels.summary(self.compiled, op if geometry is None else "spmm")
        return cost.choose(kernel.isa, op, summary, batch, threads, kernel.dtype, geometry)

    def explain(
        self,
        batch: int,
        threads: int | None = None,
        op: str | None = None,
        *,
        dtype: str = "float32",
        backend: str = "auto",
        geometry: cost.Geometry | None = None,
    ) -> str:
        """Say in one line which variant of which kernel would run, and the time predicted for it.

        Parameters
        ----------
        batch : int
            Number of samples, at least 1.
        threads : int, optional
            Threads that may be used; :func:`spfmt.get_num_threads` by default.
        op : str, optional
            "spmm" (the default), "spmm_t" or "sddmm"; with a geometry "conv2d" (the default),
            "conv2d_input" or "conv2d_weight".
        dtype, backend : str
            As in :func:`select`.
        geometry : Geometry, optional
            Of a convolution: ``Convolution.of(a.shape, stride, padding).geometry(height, width)``
            (`spfmt.convolution`); layers know theirs.

        Raises
        ------
        FormatError
            If `batch` or `threads` is no positive int, or `op` no product of this kind.
        KernelNotFound
            If no kernel would run.
        """
        ops = OPS if geometry is None else CONVOLUTIONS
        op = ops[0] if op is None else op
        batch, used = cost.check_workload(batch, threads, op, ops)
        kernel = select(op, self.layout.name, dtype, backend)
        if geometry is not None:
            cost.check_geometry(geometry, self.shape)
        choice = self.choice(op, kernel, batch, used, geometry)
        maps = "" if geometry is None else f" of {geometry.y[0]} x {geometry.x[0]} maps"
        return (
            f"{op} {self.layout.name} {dtype}, batch {batch}{maps}: kernel {kernel.isa}, "
            f"{choice.variant}, {choice.threads} of {used} threads, "
            f"{cost.duration(choice.seconds)} predicted"
        )

    def spmm(
        self,
        values: Array,
        x: Array,
        *,
        bias: Array | None = None,
        activation: str | None = None,
        batch_first: bool = False,
        out: Array | None = None,
        backend: str = "auto",
        constant: int | None = None,
    ) -> Array:
        """Compute Y = f(A X + bias), f and bias optional; see :func:`spfmt.spmm`."""
        code = 0 if activation is None else activation_code(activation)
        if backend == "auto" and not logger.isEnabledFor(logging.DEBUG):
            y: Array | None = (self._calls or self._bind())[0](
                0, values, constant, x, bias, code, batch_first, out, threads._override, None
            )
            if y is not None:
                return y
        if bias is not None:
            bias = self.bias_like(bias, np.asarray(values).dtype)
        return self._multiply(
            "spmm", values, x, bias, batch_first, out, backend, constant, activation
        )

    def spmm_t(
        self,
        values: Array,
        dy: Array,
        *,
        batch_first: bool = False,
        out: Array | None = None,
        backend: str = "auto",
        constant: int | None = None,
    ) -> Array:
        """Compute dX = Aᵀ dY; see :func:`spfmt.spmm_t`."""
        if backend == "auto" and not logger.isEnabledFor(logging.DEBUG):
            dx: Array | None = (self._calls or self._bind())[0](
                1, values, constant, dy, None, 0, batch_first, out, threads._override, None
            )
            if dx is not None:
                return dx
        return self._multiply("spmm_t", values, dy, None, batch_first, out, backend, constant)

    def sddmm(
        self,
        dy: Array,
        x: Array,
        *,
        batch_first: bool = False,
        out: Array | None = None,
        backend: str = "auto",
    ) -> Array:
        """Compute the values' gradient, (nnz,) or `out` (zero behind nnz); see `spfmt.sddmm`."""
        if backend == "auto" and not logger.isEnabledFor(logging.DEBUG):
            gradient: Array | None = (self._calls or self._bind())[1](
                dy, x, batch_first, out, threads._override, None
            )
            if gradient is not None:
                return gradient
        rows, cols = self.shape
        dy, x = np.asarray(dy), np.asarray(x)
        dy2 = _features_first(dy, rows, batch_first, "dY")
        x2 = _features_first(x, cols, batch_first, "X")
        if dy2.shape[1] != x2.shape[1]:
            raise format_error(
                f"dY with {dy2.shape[1]} and X with {x2.shape[1]} samples",
                "the same number",
                "pass the X of the forward pass and the gradient of its result",
            )
        same_dtype(dy.dtype, x.dtype, "dY", "X")
        if out is not None:
            self._check_gradient_out(out, dy, x)
        if backend == "reference":
            found = self._reference_sddmm(dy2, x2)
        else:
            level = self._level("sddmm", backend, dy.dtype, dy2.shape[1])
            found = self._call(1, dy2, x2, False, None, threads._override, level)
        if out is None:
            return found
        out[: self.nnz] = found
        out[self.nnz :] = 0
        return out

    def capsule(self) -> Any:
        """Return the compiled plan as other compiled code holds it."""
        return (self._calls or self._bind())[0].__self__

    def _bind(self) -> Any:
        self._calls = _kernels.bind(self.compiled)
        return self._calls

    def _multiply(
        self,
        op: str,
        values: Array,
        x: Array,
        bias: Array | None,
        batch_first: bool,
        out: Array | None,
        backend: str,
        constant: int | None,
        activation: str | None = None,
    ) -> Array:
        """Go the long way: make operands plain or say what is wrong with them, then compute."""
        x = np.asarray(x)
        n_in, n_out = (self.shape[1], self.shape[0]) if op == "spmm" else self.shape
        flat = self._flat_values(values)
        same_dtype(x.dtype, flat.dtype, "X" if op == "spmm" else "dY", "A")
        operand = _features_first(x, n_in, batch_first, "X" if op == "spmm" else "dY")
        if out is not None:
            check_own_memory(out, x, flat, *(() if bias is None else (bias,)))
            _check_result(out, x, n_out, batch_first)
        batched = batch_first and x.ndim == 2
        if backend == "reference":
            result = self._reference(op, flat, operand, bias, activation)
            result = result.T if batched else result
        else:
            level = self._level(op, backend, flat.dtype, operand.shape[1])
            operand = operand.T if batched else operand
            code, number = activation_code(activation), 0 if op == "spmm" else 1
            most = threads._override
            result = self._call(
                0, number, flat, constant, operand, bias, code, batched, None, most, level
            )
        result = result[:, 0] if x.ndim == 1 else result
        if out is None:
            placed = result.flags.c_contiguous and is_aligned(result)
            return result if placed else aligned(result, result.dtype)
        out[...] = result
        return out

    def _level(self, op: str, backend: str, dtype: np.dtype[Any], batch: int) -> int:
        """Return the number of the level that runs, or raise; say so in the log."""
        kernel = select(op, self.layout.name, dtype_name(dtype), backend)
        if logger.isEnabledFor(logging.DEBUG):
            choice = self.choice(op, kernel, batch, threads.get_num_threads())
            logger.debug(
                "%s %s %s: kernel %s, %d x %d, nnz %d, batch %d, %s, %d threads",
                op, self.layout.name, kernel.dtype, kernel.isa, *self.shape, self.nnz, batch,
                choice.variant, choice.threads,
            )  # fmt: skip
        return LEVELS.index(kernel.isa)

    def _call(self, which: int, *arguments: Any) -> Array:
        """Call a bound function with operands that are plain by now."""
        result: Array | None = (self._calls or self._bind())[which](*arguments)
        if result is None:
            raise RuntimeError("got operands that were checked and are not plain; please report it")
        return result

    def _flat_values(self, values: Array) -> Array:
        values = np.asarray(values)
        if values.size < self.nnz:
            raise format_error(
                f"values with {values.size} elements",
                f"at least {self.nnz}, one per position of the structure",
                "use the tensor's own values, or with_values()",
            )
        return _plain(values).reshape(-1)

    def bias_like(self, bias: Array, dtype: np.dtype[Any]) -> Array:
        """Return a bias as the kernels take it; it has one element per row, of this dtype."""
        bias = np.asarray(bias)
        if bias.shape != (self.shape[0],):
            raise format_error(
                f"bias of shape {bias.shape}",
                f"({self.shape[0]},)",
                "pass one element per row of A",
            )
        same_dtype(bias.dtype, dtype, "bias", "values")
        return _plain(bias)

    def _check_gradient_out(self, out: Array, dy: Array, x: Array) -> None:
        if out.ndim != 1 or out.size < self.nnz or not out.flags.c_contiguous:
            raise format_error(
                f"out of shape {out.shape}",
                f"a contiguous vector of at least {self.nnz} elements",
                "make it as long as the values",
            )
        same_dtype(out.dtype, dy.dtype, "out", "dY")
        check_own_memory(out, dy, x)

    def _dense(self, values: Array) -> npt.NDArray[np.float64]:
        dense = np.zeros(self.shape)
        dense[self.layout.coordinates()] = values[: self.nnz].astype(np.float64)
        return dense

    def _reference(
        self, op: str, values: Array, x: Array, bias: Array | None, activation: str | None
    ) -> Array:
        dense = self._dense(values)
        result = (dense if op == "spmm" else dense.T) @ x.astype(np.float64)
        if bias is not None:
            result = result + bias.astype(np.float64)[:, None]
        return np.asarray(apply_activation(activation, result), dtype=x.dtype)

    def _reference_sddmm(self, dy: Array, x: Array) -> Array:
        full = dy.astype(np.float64) @ x.astype(np.float64).T
        return aligned(full[self.layout.coordinates()], dy.dtype)


def _compile(layout: Layout) -> Any:
    if isinstance(layout, Lists):
        return _kernels.lists_plan(layout.rows, layout.cols, layout.indptr, layout.col_indices)
    return _kernels.groups_plan(
        layout.rows,
        layout.cols,
        layout.row_perm,
        layout.row_ptr,
        layout.col_begin,
        layout.col_end,
        layout.col_indices,
        layout.value_ptr,
    )


def same_dtype(got: np.dtype[Any], want: np.dtype[Any], name: str, other: str) -> None:
    """Raise FormatError where two operands differ in dtype."""
    if got != want:
        raise format_error(
            f"{name} of dtype {got} beside {other} of {want}",
            "one dtype for all operands",
            f"convert with astype({str(want)!r})",
        )


@functools.cache  # numpy builds the name at every call: a tenth of a small product's time
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the name in the kernel table, which means the machine's byte order."""
    return dtype.name if dtype.isnative else dtype.str


def _plain(a: Array) -> Array:
    """Return `a`, or a copy where its elements are not one after the other at whole addresses."""
    return a if a.flags.c_contiguous and a.flags.aligned else np.array(a, order="C")


def splits_elements(a: Array) -> bool:
    """Tell whether pointer arithmetic in elements would miss some, as in a packed record."""
    return not a.flags.aligned or any(s % a.itemsize for s in a.strides)


def check_own_memory(out: Array, *operands: Array) -> None:
    """Refuse an `out` that cannot be written, or whose writing would change an operand."""
    if not isinstance(out, np.ndarray):
        raise format_error(f"out of type {type(out).__name__}", "an array", "pass a numpy array")
    if not out.flags.writeable:
        raise format_error("a read-only out", "a writable array", "pass a copy")
    # Bounds alone would refuse neighbouring columns of one buffer; the exact test has its limit.
    limit: Any = 10_000  # numpy's stubs know of 0 and -1 only
    shared = any(np.may_share_memory(out, a, max_work=limit) for a in operands)
    if shared or splits_elements(out):
        raise format_error(
            "an out that shares memory with an operand, or splits elements",
            "memory of its own",
            "let it be allocated",
        )


def _features_first(x: Array, features: int, batch_first: bool, name: str) -> Array:
    """View `x` as (features, samples), checking its shape; a vector is one sample."""
    if x.ndim == 1:
        view = x[:, None]
    elif x.ndim == 2:
        view = x.T if batch_first else x
    else:
        raise format_error(
            f"{name} with {x.ndim} dimensions", "1 or 2", "flatten leading dimensions first"
        )
    if view.shape[0] != features:
        layout = "(batch, features)" if batch_first else "(features, batch)"
        raise format_error(
            f"{name} of shape {x.shape}",
            f"{layout} with {features} features",
            f"pass batch_first={not batch_first} if samples run along the other axis",
        )
    return np.array(view, order="C") if splits_elements(view) else view


def _check_result(out: Array, x: Array, features: int, batch_first: bool) -> None:
    """Check the array that receives the result, in the layout that `x` came in."""
    shape: tuple[int, ...] = (features,)
    if x.ndim == 2:
        shape = (x.shape[0], features) if batch_first else (features, x.shape[1])
    if out.shape != shape:
        raise format_error(f"out of shape {out.shape}", f"{shape}", "let it be allocated")
    same_dtype(out.dtype, x.dtype, "out", "the operand")
