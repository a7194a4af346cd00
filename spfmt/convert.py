"""Any weight to any other: spfmt's formats, numpy, scipy and torch.

Everything goes through the coordinates of the stored positions. A conversion never drops a
value: it is exact, or it adds stored zeros and reports them, or it raises.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from spfmt.errors import MissingDependency, format_error
from spfmt.formats import FORMATS, Coordinates, SparseTensor, get_format
from spfmt.formats._checks import (
    VALUE_DTYPES,
    Array,
    Shape,
    as_int,
    check_pointer,
    check_range,
    check_shape,
    float_array,
    matrix_shape,
    value_dtype,
)

__all__ = ["ConversionReport", "convert"]

_TORCH_LAYOUTS = ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")

MANY = 2**26
"""Above so many stored values, padding is checked before it is made."""

logger = logging.getLogger("spfmt")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes
    ----------
    source, target : str
        Names of the forms.
    nnz_in, nnz_out : int
        Stored positions before and after. A dense target stores no pattern and counts as exact.
    """

    source: str
    target: str
    nnz_in: int
    nnz_out: int

    @property
    def padding(self) -> int:
        """Number of stored zeros that the target needed."""
        return self.nnz_out - self.nnz_in


def convert(
    a: Any,
    to: str | type[SparseTensor],
    *,
    return_report: bool = False,
    max_padding: float | None = 1.0,
    shape: Any = None,
    **params: Any,
) -> Any:
    """Convert a weight to another form, exactly.

    Parameters
    ----------
    a : SparseTensor, numpy array, scipy sparse array or torch tensor
        Floating values. The pattern of a sparse input is what it stores, explicit zeros included;
        that of a dense input is its nonzeros (a NaN is a nonzero). Duplicate entries of a COO
        input are summed, as its meaning is.
    to : str or type of SparseTensor
        A format, or "dense", "scipy_csr", "scipy_bsr", "scipy_coo", "torch_dense", "torch_csr",
        "torch_bsr", "torch_coo". The sparse forms of scipy and torch hold the (R, C) matrix.
    return_report : bool
        Return ``(result, ConversionReport)``.
    max_padding : float, optional
        Most stored zeros that may be added, as a multiple of the input's stored positions; None
        for no limit.
    shape : tuple of int, optional
        Shape (C_out, C_in, Kh, Kw) to read the matrix of a convolution as.
    **params
        Options of the target: those of the format's `from_dense`; ``blocksize`` of a BSR target.

    Raises
    ------
    FormatError
        For a source that is broken or of an unsupported dtype. Else names the first row, group or
        block that the target cannot hold, or the one with the most padding, and the way out.
    MissingDependency
        If the target's package is not installed.

    Examples
    --------
    >>> import numpy as np, spfmt
    >>> spfmt.convert(np.eye(4, dtype="float32"), "condensed")
    Condensed(4x4, fan_in=1, active 4/4, density 0.25, float32)
    """
    target = _target_name(to)
    _check_limit(max_padding)
    source, coords = _read(a)
    if shape is not None:
        coords = _reshaped(coords, shape)
    if source == target and not params and shape is None:
        result, nnz_out = _own(a), coords.nnz
    elif target in FORMATS:
        result = _to_format(FORMATS[target], coords, params, max_padding)
        nnz_out = result.nnz
    else:
        _check_params(_WRITERS[target], params, target)
        result, nnz_out = _WRITERS[target](coords, **params)
        if nnz_out > coords.nnz:
            _check_padding(coords, nnz_out, max_padding, f"target {target}")
    report = ConversionReport(source, target, coords.nnz, nnz_out)
    if report.padding:
        logger.info("%s to %s: %d stored zeros added", source, target, report.padding)
    return (result, report) if return_report else result


def _own(a: Any) -> Any:
    """`a` as a result: itself if nobody can change it, else a copy."""
    if isinstance(a, SparseTensor):
        return a
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(a, torch.Tensor):
        return a.detach().clone()
    return a.copy() if hasattr(a, "tocoo") else np.array(a)


def _check_limit(max_padding: Any) -> None:
    numeric = isinstance(max_padding, (int, float, np.number))
    if max_padding is not None and not (numeric and max_padding >= 0):
        raise format_error(
            f"max_padding={max_padding!r}", "a number >= 0, or None for no limit", "pass e.g. 1.0"
        )


def _target_name(to: Any) -> str:
    if isinstance(to, str) and to in _WRITERS:
        return to
    if isinstance(to, str) and to not in FORMATS:
        names = ", ".join([*FORMATS, *_WRITERS])
        raise format_error(f"target {to!r}", f"one of {names}", "use one of these names")
    return get_format(to).format


def _reshaped(coords: Coordinates, shape: Any) -> Coordinates:
    sizes = check_shape(shape)
    if matrix_shape(sizes) != coords.matrix_shape:
        raise format_error(
            f"shape {sizes}, a matrix of {matrix_shape(sizes)}",
            f"a matrix of {coords.matrix_shape}",
            "pass the shape of the weight that the matrix comes from",
        )
    return Coordinates(sizes, coords.rows, coords.cols, coords.values)


def _check_params(function: Callable[..., Any], params: dict[str, Any], target: str) -> None:
    known = [name for name in inspect.signature(function).parameters if name != "coords"]
    for name in params:
        if name not in known:
            raise format_error(
                f"parameter {name!r} for {target}", f"one of {known}", "remove or rename it"
            )


def _to_format(
    cls: type[SparseTensor],
    coords: Coordinates,
    params: dict[str, Any],
    max_padding: float | None,
) -> SparseTensor:
    _check_params(cls._from_coordinates, params, cls.format)
    least = cls._least_nnz(coords)
    if least > MANY and not _few(coords, least, max_padding):
        # Before it takes all memory. One long row sets the length of all rows.
        row = int(np.bincount(coords.rows).argmax())
        _check_padding(coords, least, max_padding, f"{cls.format} (row {row} is the longest)")
    result = cls._from_coordinates(coords, **params)
    if result.nnz > coords.nnz and not _few(coords, result.nnz, max_padding):
        unit, of_row = result.unit_of_rows()
        stored, _ = result.layout().coordinates()
        units = int(of_row.max()) + 1
        added = np.bincount(of_row[stored], minlength=units)
        added -= np.bincount(of_row[coords.rows], minlength=units)
        worst = int(added.argmax())
        where = f"{cls.format}, most of them ({int(added[worst])}) in {unit} {worst}"
        _check_padding(coords, result.nnz, max_padding, where)
    return result


def _few(coords: Coordinates, nnz_out: int, max_padding: float | None) -> bool:
    return max_padding is None or nnz_out - coords.nnz <= max_padding * coords.nnz


def _check_padding(
    coords: Coordinates, nnz_out: int, max_padding: float | None, where: str
) -> None:
    if not _few(coords, nnz_out, max_padding):
        raise format_error(
            f"{nnz_out - coords.nnz} padding zeros for {coords.nnz} stored values in {where}",
            f"at most max_padding={max_padding} times the stored values",
            "prune to the target's structure with project(scores, density), choose other "
            "parameters, or raise max_padding (None for no limit)",
        )


# ---- reading -----------------------------------------------------------------------------------


def _read(a: Any) -> tuple[str, Coordinates]:
    """Name of the form of `a`, and its coordinates."""
    if isinstance(a, SparseTensor):
        return a.format, a.coordinates()
    # An object of a package can only exist once the package is loaded.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(a, torch.Tensor):
        return _read_torch(a)
    sparse = sys.modules.get("scipy.sparse")
    if sparse is not None and sparse.issparse(a):
        return f"scipy_{a.format}", _read_scipy(a)
    return "dense", Coordinates.of_dense(a)


def _read_scipy(a: Any) -> Coordinates:
    if a.ndim != 2:
        raise format_error(f"a scipy array of shape {a.shape}", "two axes", "reshape it")
    float_array("values", np.zeros(0, a.dtype))
    try:
        matrix = a.copy()  # the checks and the sum below work in place
        if hasattr(matrix, "check_format"):
            matrix.check_format(full_check=True)
        coo = matrix.tocoo(copy=False)
    except (ValueError, IndexError) as error:
        raise format_error(
            f"a broken scipy {a.format} array ({error})", "legal indices", "build it again"
        ) from error
    coo.sum_duplicates()
    return Coordinates.of_unsorted(check_shape(a.shape), coo.row, coo.col, coo.data)


def _read_torch(a: Any) -> tuple[str, Coordinates]:
    layout = str(a.layout).rpartition(".")[2]
    if a.is_meta or a.is_nested or layout not in _TORCH_LAYOUTS:
        kind = "on the meta device" if a.is_meta else "nested" if a.is_nested else layout
        raise format_error(
            f"a torch tensor that is {kind}",
            f"one with data, of layout {', '.join(_TORCH_LAYOUTS)}",
            "load its data, or convert it with to_dense()",
        )
    a = a.detach().cpu()
    if layout == "strided":
        return "torch_dense", Coordinates.of_dense(_from_torch(a))
    shape = check_shape(a.shape)
    if layout == "sparse_coo":
        return "torch_coo", _read_torch_coo(a, shape)
    by_column = layout in ("sparse_csc", "sparse_bsc")
    if by_column:
        pointer, plain = a.ccol_indices().numpy(), a.row_indices().numpy()
    else:
        pointer, plain = a.crow_indices().numpy(), a.col_indices().numpy()
    values = _from_torch(a.values()).copy()  # what is made of them must not change with `a`
    name = f"torch_{layout.removeprefix('sparse_')}"
    return name, _of_compressed(shape, pointer, plain, values, by_column)


def _read_torch_coo(a: Any, shape: Shape) -> Coordinates:
    if a.sparse_dim() != 2 or a.dense_dim():
        raise format_error(
            f"a torch tensor with {a.sparse_dim()} sparse axes and {a.dense_dim()} dense ones",
            "two sparse axes",
            "reshape it to a matrix, and pass shape= for a convolution",
        )
    # Before coalescing: an index out of range could be summed into another position.
    rows, cols = a._indices().numpy()
    check_range("row indices", rows, shape[0], "rows")
    check_range("column indices", cols, shape[1], "columns")
    whole = a.coalesce()
    values = _from_torch(whole.values()).copy()
    rows, cols = whole.indices().numpy()
    return Coordinates.of_unsorted(shape, rows, cols, values)


def _of_compressed(
    shape: Shape, pointer: Array, plain: Array, values: Array, by_column: bool
) -> Coordinates:
    """Coordinates of CSR, CSC, BSR or BSC arrays; blocks are the last two axes of `values`."""
    if pointer.ndim != 1 or len(shape) != 2:
        raise format_error(f"a batched sparse tensor of shape {shape}", "one matrix", "split it")
    blocks = values if values.ndim == 3 else values.reshape(-1, 1, 1)
    height, width = blocks.shape[1:]
    if not height or not width or shape[0] % height or shape[1] % width:
        raise format_error(
            f"blocks of {height} x {width} in a matrix of {shape}",
            "a block size that divides the matrix",
            "build the tensor again with check_invariants=True",
        )
    if len(blocks) != plain.size:
        raise format_error(
            f"{len(blocks)} values or blocks for {plain.size} indices", "as many", "build it again"
        )
    across, along = shape[0] // height, shape[1] // width
    lists, length = (along, across) if by_column else (across, along)
    check_pointer("compressed indices", pointer, lists, plain.size)
    check_range("plain indices", plain, length, "blocks" if values.ndim == 3 else "columns or rows")
    outer = np.repeat(np.arange(lists, dtype=np.int64), np.diff(pointer))
    row, col = (plain, outer) if by_column else (outer, plain)
    rows = (row * height)[:, None, None] + np.arange(height)[:, None]
    cols = (col * width)[:, None, None] + np.arange(width)
    rows, cols = np.broadcast_to(rows, blocks.shape), np.broadcast_to(cols, blocks.shape)
    return Coordinates.of_unsorted(shape, rows.reshape(-1), cols.reshape(-1), blocks.reshape(-1))


def _from_torch(tensor: Any) -> Array:
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in VALUE_DTYPES:
        raise format_error(
            f"a torch tensor of dtype {dtype}",
            f"one of {', '.join(VALUE_DTYPES)}",
            "cast: tensor.float()",
        )
    plain = tensor.resolve_neg()
    if plain.dtype == torch.bfloat16:  # numpy has no such dtype of its own
        bits: Array = plain.contiguous().view(torch.int16).numpy()
        return bits.view(value_dtype("bfloat16"))
    return np.asarray(plain.numpy())


# ---- writing: each returns the result and its number of stored positions -----------------------


def _indptr(rows: Array, count: int) -> Array:
    return np.searchsorted(rows, np.arange(count + 1)).astype(np.int64)


def _to_dense(coords: Coordinates) -> tuple[Array, int]:
    rows, cols = coords.matrix_shape
    if rows * cols * coords.values.itemsize > np.iinfo(np.intp).max:
        raise format_error(
            f"a dense array of {rows} x {cols}", "a size that can be addressed", "stay sparse"
        )
    dense = np.zeros(rows * cols, coords.values.dtype)
    dense[coords.keys] = coords.values
    return dense.reshape(coords.shape), coords.nnz


def _to_blocks(coords: Coordinates, blocksize: Any) -> tuple[Array, Array, Array]:
    """BSR arrays: pointer, block columns, blocks (n, height, width)."""
    try:
        height, width = (as_int("blocksize", size, 1) for size in blocksize)
    except (TypeError, ValueError) as error:
        raise format_error(
            f"blocksize={blocksize!r}", "two positive integers", "pass e.g. blocksize=(4, 4)"
        ) from error
    rows, cols = coords.matrix_shape
    if rows % height or cols % width:
        raise format_error(
            f"blocksize {(height, width)} for a matrix of {(rows, cols)}",
            "a block size that divides the matrix",
            "choose another blocksize",
        )
    keys = coords.rows // height * max(1, cols // width) + coords.cols // width
    block_keys, place = np.unique(keys, return_inverse=True)
    blocks = np.zeros((block_keys.size, height, width), coords.values.dtype)
    blocks[place, coords.rows % height, coords.cols % width] = coords.values
    block_rows, block_cols = np.divmod(block_keys, max(1, cols // width))
    return _indptr(block_rows, rows // height), block_cols, blocks


def _scipy(coords: Coordinates) -> Any:
    """Module scipy.sparse, once it is known to hold the dtype."""
    try:
        import scipy.sparse
    except ImportError:
        raise _missing("scipy") from None
    if coords.values.dtype.name not in ("float32", "float64"):
        raise format_error(
            f"values of dtype {coords.values.dtype.name}",
            "float32 or float64, the ones that scipy.sparse computes with",
            "cast first: a.astype('float32')",
        )
    return scipy.sparse


def _to_scipy_csr(coords: Coordinates) -> tuple[Any, int]:
    sparse = _scipy(coords)
    arrays = (coords.values.copy(), coords.cols, _indptr(coords.rows, coords.matrix_shape[0]))
    return sparse.csr_array(arrays, shape=coords.matrix_shape), coords.nnz


def _to_scipy_coo(coords: Coordinates) -> tuple[Any, int]:
    sparse = _scipy(coords)
    arrays = (coords.values.copy(), (coords.rows, coords.cols))
    return sparse.coo_array(arrays, shape=coords.matrix_shape), coords.nnz


def _to_scipy_bsr(coords: Coordinates, blocksize: Any = (1, 1)) -> tuple[Any, int]:
    sparse = _scipy(coords)
    pointer, columns, blocks = _to_blocks(coords, blocksize)
    result = sparse.bsr_array((blocks, columns, pointer), shape=coords.matrix_shape)
    return result, blocks.size


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise _missing("torch") from None
    return torch


def _missing(package: str) -> MissingDependency:
    return MissingDependency(
        f"got a target of {package}, which is not installed; expected the package; "
        f"fix: pip install {package}"
    )


def _torch_values(values: Array) -> Any:
    torch = _torch()
    own = np.array(values, order="C")  # torch wants memory that it may write to
    if own.dtype.name == "bfloat16":
        return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(own)


def _to_torch_dense(coords: Coordinates) -> tuple[Any, int]:
    dense, nnz = _to_dense(coords)
    return _torch_values(dense), nnz


def _to_torch_coo(coords: Coordinates) -> tuple[Any, int]:
    torch = _torch()
    indices = torch.from_numpy(np.stack([coords.rows, coords.cols]))
    return torch.sparse_coo_tensor(
        indices,
        _torch_values(coords.values),
        coords.matrix_shape,
        is_coalesced=True,
        check_invariants=True,
    ), coords.nnz


def _to_torch_csr(coords: Coordinates) -> tuple[Any, int]:
    pointer = _indptr(coords.rows, coords.matrix_shape[0])
    return _torch_compressed(coords, pointer, coords.cols, coords.values, "sparse_csr"), coords.nnz


def _to_torch_bsr(coords: Coordinates, blocksize: Any = (1, 1)) -> tuple[Any, int]:
    pointer, columns, blocks = _to_blocks(coords, blocksize)
    return _torch_compressed(coords, pointer, columns, blocks, "sparse_bsr"), blocks.size


def _torch_compressed(
    coords: Coordinates, pointer: Array, columns: Array, values: Array, layout: str
) -> Any:
    import warnings

    torch = _torch()
    with warnings.catch_warnings():
        # torch calls these layouts a beta at their first use; the caller asked for one by name.
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
        return torch.sparse_compressed_tensor(
            torch.from_numpy(np.array(pointer, np.int64)),
            torch.from_numpy(np.array(columns, np.int64)),
            _torch_values(values),
            coords.matrix_shape,
            layout=getattr(torch, layout),
            check_invariants=True,
        )


_WRITERS: dict[str, Callable[..., tuple[Any, int]]] = {
    "dense": _to_dense,
    "scipy_csr": _to_scipy_csr,
    "scipy_bsr": _to_scipy_bsr,
    "scipy_coo": _to_scipy_coo,
    "torch_dense": _to_torch_dense,
    "torch_csr": _to_torch_csr,
    "torch_bsr": _to_torch_bsr,
    "torch_coo": _to_torch_coo,
}
