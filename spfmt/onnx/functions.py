"""ONNX operators of the domain ``spfmt``: one per format, each with a standard-operator body.

A file written by spfmt holds, per sparse layer, one node such as ``spfmt::NMLinear`` and, once per
operator, a model-local function of the same name. A runtime that knows the operator (ONNX Runtime
with our library) runs the sparse kernel; any other one runs the function. Every body places the
values in a zero matrix and multiplies: all of it but the product is constant, so ONNX Runtime
folds it into one dense ``Gemm`` while it loads the file.

Common to all operators: ``X`` (..., in_features), ``bias`` (out_features,), ``Y`` (...,
out_features); ``X``, ``values`` and ``bias`` have one type, float32 or float64. Every input but
``X`` must be constant. Index inputs are uint16 when all of them fit, else int32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from spfmt.errors import format_error
from spfmt.formats._layout import RowGroups
from spfmt.onnx._deps import require

if TYPE_CHECKING:
    import onnx

    from spfmt.formats import CSR, HRBP, NM, Condensed, ShuffledBlock, SparseTensor

__all__ = [
    "DOMAIN",
    "MIN_OPSET",
    "OPERATORS",
    "VERSION",
    "Lowered",
    "function",
    "lower",
    "make_node",
]

DOMAIN = "spfmt"
VERSION = 1
MIN_OPSET = 18

Array = NDArray[Any]


@dataclass(frozen=True)
class Lowered:
    """One weight as an operator sees it.

    Attributes
    ----------
    op_type : str
        Name of the operator in the domain ``spfmt``.
    inputs : dict of str to ndarray
        The constant inputs between ``X`` and ``bias``, in order; ``values`` is the first.
    attributes : dict of str to int
        The node's attributes.
    """

    op_type: str
    inputs: dict[str, Array]
    attributes: dict[str, int]


@dataclass(frozen=True)
class Operator:
    """One operator: signature, body in ONNX's text form, and how a weight becomes inputs."""

    op_type: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    body: str
    lower: Callable[[Any], tuple[dict[str, Array], dict[str, int]]]


# The bodies share a beginning (sizes as vectors of length one) and an end (the product). In
# between each computes `weight`, the dense matrix turned to (in_features, out_features).
_BEGIN = """
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    minus_one = Constant <value = int64[1] {-1}> ()
    c_scalar = Constant <value_int: int = @in_features> ()
    r_scalar = Constant <value_int: int = @out_features> ()
    c = Reshape (c_scalar, one)
    r = Reshape (r_scalar, one)
    c_r = Concat <axis = 0> (c, r)
"""
_END = """
    product = MatMul (X, weight)
    Y = Add (product, bias)
"""
# Values at flat positions `row * in_features + column` of the matrix.
_PLACE_FLAT = """
    size = Mul (r, c)
    zeros_f = ConstantOfShape <value = float[1] {0}> (size)
    zeros = CastLike (zeros_f, values)
    flat_positions = Reshape (positions, minus_one)
    flat_values = Reshape (values, minus_one)
    flat = ScatterElements <axis = 0> (zeros, flat_positions, flat_values)
    r_c = Concat <axis = 0> (r, c)
    matrix = Reshape <allowzero = 1> (flat, r_c)
    weight = Transpose <perm = [1, 0]> (matrix)
"""
# Row i of `entries` is column `columns[i]` of group `group[i]`: S values, one per row of the group.
# Groups are laid side by side, then `row_positions` picks every row of the matrix from them.
_PLACE_GROUPS = """
    group_start = Mul (group, c)
    places = Add (group_start, columns)
    places_1 = Unsqueeze (places, minus_one)
    size = Mul (groups, c)
    zeros_shape = Concat <axis = 0> (size, s)
    zeros_f = ConstantOfShape <value = float[1] {0}> (zeros_shape)
    zeros = CastLike (zeros_f, values)
    tall = ScatterND (zeros, places_1, entries)
    g_c_s = Concat <axis = 0> (groups, c, s)
    by_group = Reshape <allowzero = 1> (tall, g_c_s)
    by_column = Transpose <perm = [1, 0, 2]> (by_group)
    g_s = Mul (groups, s)
    c_gs = Concat <axis = 0> (c, g_s)
    wide = Reshape <allowzero = 1> (by_column, c_gs)
    rows = Cast <to = 7> (row_positions)
    weight = Gather <axis = 1> (wide, rows)
"""
# From pointers (n + 1,) to the list each of the `count` entries belongs to: a step at every start.
_EXPAND_POINTERS = """
    pointers = Cast <to = 7> ({pointers})
    starts = Slice (pointers, one, minus_one)
    starts_shape = Shape (starts)
    steps = ConstantOfShape <value = int64[1] {{1}}> (starts_shape)
    count = Shape <start = 0, end = 1> (values)
    count_1 = Add (count, one)
    flats = ConstantOfShape <value = int64[1] {{0}}> (count_1)
    jumps = ScatterElements <axis = 0, reduction = "add"> (flats, starts, steps)
    axis = Constant <value_int = 0> ()
    all_owners = CumSum (jumps, axis)
    {owner} = Slice (all_owners, zero, count)
"""

_CONDENSED = """
    row_ids = Cast <to = 7> (row_indices)
    row_starts = Mul (row_ids, c)
    column = Unsqueeze (row_starts, minus_one)
    columns = Cast <to = 7> (col_indices)
    positions = Add (column, columns)
"""
_NM = """
    first = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    row_ids = Range (first, r_scalar, step)
    row_starts = Mul (row_ids, c)
    column = Unsqueeze (row_starts, minus_one)
    columns = Cast <to = 7> (col_indices)
    positions = Add (column, columns)
"""
_CSR = """
    row_starts = Mul (row_ids, c)
    columns = Cast <to = 7> (col_indices)
    positions = Add (row_starts, columns)
"""
_SHUFFLED_BLOCK = """
    columns = Cast <to = 7> (col_indices)
    s = Shape <start = 1, end = 2> (values)
    n_pointers = Shape (group_ptr)
    groups = Sub (n_pointers, one)
    entries = Identity (values)
"""
_HRBP = """
    channels = Cast <to = 7> (channel_indices)
    patterns = Cast <to = 7> (pattern_indices)
    cells = Constant <value_int: int = @cells> ()
    channel_starts = Mul (channels, cells)
    channel_column = Unsqueeze (channel_starts, minus_one)
    pattern_row = Unsqueeze (patterns, one)
    grid = Add (channel_column, pattern_row)
    columns = Reshape (grid, minus_one)
    groups = Shape <start = 0, end = 1> (values)
    n_columns = Shape <start = 1, end = 2> (values)
    s = Shape <start = 2, end = 3> (values)
    first = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    groups_scalar = Squeeze (groups)
    group_ids = Range (first, groups_scalar, step)
    group_column = Unsqueeze (group_ids, minus_one)
    g_k = Concat <axis = 0> (groups, n_columns)
    group_grid = Expand (group_column, g_k)
    group = Reshape (group_grid, minus_one)
    count = Shape (columns)
    entries_shape = Concat <axis = 0> (count, s)
    entries = Reshape <allowzero = 1> (values, entries_shape)
"""


def function(format: str, opset: int = MIN_OPSET) -> onnx.FunctionProto:
    """The model-local function of a format's operator: its meaning in standard operators.

    Parameters
    ----------
    format : str
        Name of a format, such as ``"nm"``.
    opset : int
        Version of ONNX's standard operators; it must equal the one the model imports.

    Returns
    -------
    onnx.FunctionProto

    Raises
    ------
    FormatError
        When no operator exists for the format.
    MissingDependency
        When onnx is not installed.
    """
    parser = require("onnx.parser")
    operator = _operator(format)
    inputs = ", ".join(("X", *operator.inputs, "bias"))
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{operator.op_type} <{', '.join(operator.attributes)}> ({inputs}) => (Y)\n"
        f"{{{_BEGIN}{operator.body}{_END}}}"
    )
    proto = parser.parse_function(text)
    proto.doc_string = f"Y = X @ W.T + bias, W a sparse weight in the format {format!r} of spfmt."
    return cast("onnx.FunctionProto", proto)


def lower(tensor: SparseTensor) -> Lowered:
    """Turn a weight into an operator's constant inputs and attributes.

    Parameters
    ----------
    tensor : SparseTensor
        A weight of any format, two-dimensional, float32 or float64.

    Returns
    -------
    Lowered

    Raises
    ------
    FormatError
        When the weight is a convolution's, its dtype has no operator, or it is too large.
    """
    operator = _operator(tensor.format)
    if len(tensor.shape) != 2:
        raise format_error(
            f"a weight of shape {tensor.shape}",
            "two dimensions: the ONNX operators are linear layers",
            "export the convolution dense",
        )
    if tensor.values.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise format_error(
            f"values of dtype {tensor.values.dtype}",
            "float32 or float64",
            "convert the weight with astype('float32'), a module with .float()",
        )
    inputs, attributes = operator.lower(tensor)
    rows, cols = tensor.matrix_shape
    sizes = {"in_features": int(cols), "out_features": int(rows)}
    return Lowered(operator.op_type, inputs, {**sizes, **attributes})


def make_node(
    tensor: SparseTensor, x: str, bias: str, y: str, *, name: str
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """A node that applies a weight, with the initializers that it reads.

    Parameters
    ----------
    tensor : SparseTensor
        The weight, (out_features, in_features).
    x, bias, y : str
        Names of the input (..., in_features), the bias (out_features,) and the output.
    name : str
        Name of the node; its initializers are called ``name.input``.

    Returns
    -------
    (onnx.NodeProto, list of onnx.TensorProto)

    Raises
    ------
    FormatError
        When the weight cannot be lowered (see `lower`).
    MissingDependency
        When onnx is not installed.
    """
    onnx = require("onnx")
    numpy_helper = require("onnx.numpy_helper")
    lowered = lower(tensor)
    names = [f"{name}.{key}" for key in lowered.inputs]
    arrays = (np.ascontiguousarray(array) for array in lowered.inputs.values())
    tensors = [
        numpy_helper.from_array(array, key) for array, key in zip(arrays, names, strict=True)
    ]
    node = onnx.helper.make_node(
        lowered.op_type, [x, *names, bias], [y], name=name, domain=DOMAIN, **lowered.attributes
    )
    node.doc_string = repr(tensor)
    return node, tensors


def _operator(format: str) -> Operator:
    try:
        return OPERATORS[format]
    except KeyError:
        raise format_error(
            f"format {format!r}",
            f"one that has an ONNX operator: {', '.join(OPERATORS)}",
            "convert the weight to one of them",
        ) from None


def _indices(indices: Array) -> Array:
    """The smaller of uint16 and int32."""
    fits = indices.size == 0 or int(indices.max()) <= np.iinfo(np.uint16).max
    return indices.astype(np.uint16 if fits else np.int32)


def _pointers(pointers: Array) -> Array:
    if pointers[-1] > np.iinfo(np.int32).max:
        raise format_error(
            f"{int(pointers[-1])} stored values",
            "fewer than 2**31, as an ONNX file holds no more",
            "split the layer",
        )
    return pointers.astype(np.int32)


def _lower_condensed(tensor: Condensed) -> tuple[dict[str, Array], dict[str, int]]:
    inputs = {
        "values": tensor.values,
        "row_indices": _indices(tensor.row_indices),
        "col_indices": _indices(tensor.col_indices),
    }
    return inputs, {}


def _lower_nm(tensor: NM) -> tuple[dict[str, Array], dict[str, int]]:
    inputs = {"values": tensor.values, "col_indices": _indices(tensor.col_indices)}
    return inputs, {"n": int(tensor.n), "m": int(tensor.m)}


def _lower_csr(tensor: CSR) -> tuple[dict[str, Array], dict[str, int]]:
    inputs = {
        "values": tensor.values,
        "indptr": _pointers(tensor.indptr),
        "col_indices": _indices(tensor.col_indices),
    }
    return inputs, {}


def _lower_shuffled_block(tensor: ShuffledBlock) -> tuple[dict[str, Array], dict[str, int]]:
    rows, width = tensor.matrix_shape[0], int(tensor.block_shape[0])
    n_groups = len(tensor.group_ptr) - 1
    row_starts = np.minimum(np.arange(n_groups + 1) * width, rows)
    inputs = {
        "values": _entries(tensor, row_starts, np.asarray(tensor.group_ptr), width),
        "group_ptr": _pointers(tensor.group_ptr),
        "col_indices": _indices(tensor.col_indices),
        "row_positions": _row_positions(tensor.row_perm, row_starts, width),
    }
    return inputs, {}


def _lower_hrbp(tensor: HRBP) -> tuple[dict[str, Array], dict[str, int]]:
    row_starts = np.asarray(tensor.row_ptr)
    n_groups, n_channels = tensor.channel_indices.shape
    n_columns = n_channels * tensor.pattern_indices.shape[1]
    width = int(np.diff(row_starts).max(initial=0))
    entry_starts = np.arange(n_groups + 1) * n_columns
    entries = _entries(tensor, row_starts, entry_starts, width)
    inputs = {
        "values": entries.reshape(n_groups, n_columns, width),
        "channel_indices": _indices(tensor.channel_indices),
        "pattern_indices": _indices(tensor.pattern_indices),
        "row_positions": _row_positions(tensor.row_perm, row_starts, width),
    }
    return inputs, {"cells": 1}


def _entries(
    tensor: ShuffledBlock | HRBP, row_starts: Array, entry_starts: Array, width: int
) -> Array:
    """Values as one row per (group, column): (n_entries, width), short groups padded with zeros."""
    layout = tensor.layout()
    assert isinstance(layout, RowGroups)
    values = tensor.values.reshape(-1)
    entries = np.zeros((int(entry_starts[-1]), width), values.dtype)
    groups = np.searchsorted(row_starts, layout.row_ptr[:-1], side="right") - 1
    for tile, group in enumerate(groups):
        begin, end = layout.row_ptr[tile : tile + 2]
        start, stop = layout.value_ptr[tile : tile + 2]
        offset = int(begin - row_starts[group])
        block = values[start:stop].reshape(-1, int(end - begin))
        into = slice(int(entry_starts[group]), int(entry_starts[group + 1]))
        entries[into, offset : offset + block.shape[1]] = block
    return entries


def _row_positions(row_perm: Array, row_starts: Array, width: int) -> Array:
    """Where each row of the matrix stands when every group is padded to `width` rows."""
    order = np.arange(len(row_perm))
    groups = np.searchsorted(row_starts, order, side="right") - 1
    positions = np.empty(len(row_perm), np.int64)
    positions[row_perm] = groups * width + (order - row_starts[groups])
    return _indices(positions)


_GROUP_ENDS = _EXPAND_POINTERS.format(pointers="group_ptr", owner="group")
_ROW_ENDS = _EXPAND_POINTERS.format(pointers="indptr", owner="row_ids")
_SIZES = ("in_features", "out_features")

OPERATORS: dict[str, Operator] = {
    "condensed": Operator(
        "CondensedLinear",
        ("values", "row_indices", "col_indices"),
        _SIZES,
        _CONDENSED + _PLACE_FLAT,
        _lower_condensed,
    ),
    "nm": Operator(
        "NMLinear", ("values", "col_indices"), (*_SIZES, "n", "m"), _NM + _PLACE_FLAT, _lower_nm
    ),
    "shuffled_block": Operator(
        "ShuffledBlockLinear",
        ("values", "group_ptr", "col_indices", "row_positions"),
        _SIZES,
        _SHUFFLED_BLOCK + _GROUP_ENDS + _PLACE_GROUPS,
        _lower_shuffled_block,
    ),
    "hrbp": Operator(
        "HRBPLinear",
        ("values", "channel_indices", "pattern_indices", "row_positions"),
        (*_SIZES, "cells"),
        _HRBP + _PLACE_GROUPS,
        _lower_hrbp,
    ),
    "csr": Operator(
        "CSRLinear",
        ("values", "indptr", "col_indices"),
        _SIZES,
        _ROW_ENDS + _CSR + _PLACE_FLAT,
        _lower_csr,
    ),
}
