"""ONNX operators of the domain ``spfmt``: one per format, each with a standard-operator body.

A file written by spfmt holds, per sparse layer, one node such as ``spfmt::NMLinear`` and, once per
operator, a model-local function of the same name. A runtime that knows the operator (ONNX Runtime
with our library) runs the sparse kernel; any other one runs the function. Every body places the
values in a zero matrix and multiplies: all of it but the product is constant, so ONNX Runtime
folds it into one dense ``Gemm`` while it loads the file.

Version 1 of the domain; an operator whose meaning has to change will get a new name, because ONNX
Runtime runs the kernels of version 1 for later versions too. All operators have the inputs ``X``
(..., in_features), then those below, then ``bias`` (out_features,); the output ``Y`` (...,
out_features); the attributes ``in_features`` and ``out_features``. ``X``, ``values``, ``bias`` and
``Y`` have one type, float32 or float64. Every input but ``X`` must be constant. Indices are uint16
when all of one input fit, else int32; pointers are int32. With R = out_features::

    CondensedLinear      values (n_active, k)  row_indices (n_active,)  col_indices (n_active, k)
    NMLinear             values (R, K)  col_indices (R, K)                      attributes n, m
    CSRLinear            values (nnz,)  indptr (R + 1,)  col_indices (nnz,)
    ShuffledBlockLinear  values (T, S)  group_ptr (G + 1,)  col_indices (T,)  row_positions (R,)
    HRBPLinear           values (G, K, S)  channel_indices (G, n_channels)
                         pattern_indices (G, n_cells)  row_positions (R,)       attribute cells

Each name with one of the suffixes Relu, Gelu, GeluTanh, Silu is the same product followed by that
activation; its body is the operator without the suffix and standard operators. (Other names, not an
attribute: a library that does not know an attribute would ignore it.)

The last two have G groups of at most S rows. A row of their values belongs to one column of one
group and holds one value per row of the group, zeros behind the rows of a short group. Row r of the
matrix is row ``row_positions[r] % S`` of group ``row_positions[r] // S``. The columns of a group of
HRBP are ``channel * cells + cell``, channel after channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from spfmt.activations import activation_code
from spfmt.errors import format_error
from spfmt.formats._layout import Groups
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


# Every body computes `weight`, the dense matrix turned to (in_features, out_features), from zeros
# and `places`. What is as large as the dense matrix is written as seldom as possible: ONNX Runtime
# keeps all of it while it loads a file.
_BEGIN = """
    zero = Constant <value = int64[1] {0}> ()
    one = Constant <value = int64[1] {1}> ()
    minus_one = Constant <value = int64[1] {-1}> ()
    first = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    zero_float = Constant <value_float = 0.0> ()
    zero_value = CastLike (zero_float, values)
    c_scalar = Constant <value_int: int = @in_features> ()
    r_scalar = Constant <value_int: int = @out_features> ()
    c = Reshape (c_scalar, one)
    r = Reshape (r_scalar, one)
"""
_END = """
    product = MatMul (X, weight)
    Y = Add (product, bias)
"""
# Value i goes to column columns[i] of a row: row_column[i], broadcast to the shape of the values.
_PLACE_ROWS = """
    values_shape = Shape (values)
    rows = Expand (row_column, values_shape)
    row_places = Unsqueeze (rows, minus_one)
    column_places = Unsqueeze (columns, minus_one)
    places = Concat <axis = -1> (column_places, row_places)
    c_r = Concat <axis = 0> (c, r)
    zeros = Expand (zero_value, c_r)
    weight = ScatterND (zeros, places, values)
"""
# Run i of S values is column columns[i] of the S rows of group group[i]. Groups lie side by side,
# short ones padded to S rows; row_positions picks every row of the matrix from them.
_PLACE_GROUPS = """
    column_places = Unsqueeze (columns, minus_one)
    group_places = Unsqueeze (group, minus_one)
    places = Concat <axis = -1> (column_places, group_places)
    s = Shape <start = -1> (values)
    c_g_s = Concat <axis = 0> (c, groups, s)
    zeros = Expand (zero_value, c_g_s)
    grouped = ScatterND (zeros, places, values)
    g_s = Mul (groups, s)
    c_gs = Concat <axis = 0> (c, g_s)
    wide = Reshape <allowzero = 1> (grouped, c_gs)
    rows = Cast <to = 7> (row_positions)
    weight = Gather <axis = 1> (wide, rows)
"""
_SCALARS = """
    {name}_double = Constant <value = double {{{value}}}> ()
    {name} = CastLike ({name}_double, Z)
"""


def _scalars(**values: float) -> str:
    return "".join(_SCALARS.format(name=name, value=value) for name, value in values.items())


# Y from Z, in operators of opset 18 for every type; ONNX Runtime fuses what it knows.
_ACTIVATION_BODIES = {
    "relu": """
    Y = Relu (Z)
""",
    "gelu": _scalars(root_half=0.7071067811865476, one=1.0, half=0.5)
    + """
    scaled = Mul (Z, root_half)
    erf = Erf (scaled)
    above_zero = Add (erf, one)
    double = Mul (Z, above_zero)
    Y = Mul (double, half)
""",
    "gelu_tanh": _scalars(slope=0.7978845608028654, cubic=0.044715, three=3.0, one=1.0, half=0.5)
    + """
    cube = Pow (Z, three)
    bend = Mul (cube, cubic)
    sum = Add (Z, bend)
    scaled = Mul (sum, slope)
    tanh = Tanh (scaled)
    above_zero = Add (tanh, one)
    double = Mul (Z, above_zero)
    Y = Mul (double, half)
""",
    "silu": """
    gate = Sigmoid (Z)
    Y = Mul (Z, gate)
""",
}
# From pointers (n + 1,) to the list that each entry belongs to: one step up at every start.
_EXPAND_POINTERS = """
    pointers = Cast <to = 7> ({pointers})
    starts = Slice (pointers, one, minus_one)
    starts_shape = Shape (starts)
    steps = Expand (step, starts_shape)
    count = Shape <start = 0, end = 1> (values)
    count_1 = Add (count, one)
    flat = Expand (first, count_1)
    jumps = ScatterElements <axis = 0, reduction = "add"> (flat, starts, steps)
    all_owners = CumSum (jumps, first)
    {owner} = Slice (all_owners, zero, count)
    columns = Cast <to = 7> (col_indices)
"""
_CONDENSED = """
    row_ids = Cast <to = 7> (row_indices)
    row_column = Unsqueeze (row_ids, minus_one)
    columns = Cast <to = 7> (col_indices)
"""
_NM = """
    row_ids = Range (first, r_scalar, step)
    row_column = Unsqueeze (row_ids, minus_one)
    columns = Cast <to = 7> (col_indices)
"""
_GROUP_COUNT = """
    n_pointers = Shape (group_ptr)
    groups = Sub (n_pointers, one)
"""
_HRBP = """
    channels = Cast <to = 7> (channel_indices)
    patterns = Cast <to = 7> (pattern_indices)
    cells = Constant <value_int: int = @cells> ()
    channel_starts = Mul (channels, cells)
    channel_column = Unsqueeze (channel_starts, minus_one)
    pattern_row = Unsqueeze (patterns, one)
    grid = Add (channel_column, pattern_row)
    groups = Shape <start = 0, end = 1> (values)
    groups_columns = Shape <start = 0, end = 2> (values)
    columns = Reshape <allowzero = 1> (grid, groups_columns)
    groups_scalar = Squeeze (groups)
    group_ids = Range (first, groups_scalar, step)
    group_column = Unsqueeze (group_ids, minus_one)
    group = Expand (group_column, groups_columns)
"""


def function(
    format: str, opset: int = MIN_OPSET, activation: str | None = None
) -> onnx.FunctionProto:
    """The model-local function of a format's operator: its meaning in standard operators.

    Parameters
    ----------
    format : str
        Name of a format, such as ``"nm"``.
    opset : int
        Version of ONNX's standard operators; it must equal the one the model imports.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        The function of the operator that ends with this activation; it calls the one without.

    Returns
    -------
    onnx.FunctionProto

    Raises
    ------
    FormatError
        When no operator exists for the format, or no activation has the name.
    MissingDependency
        When onnx is not installed.
    """
    parser = require("onnx.parser")
    operator = _operator(format)
    name = op_type(format, activation)
    inputs = ", ".join(("X", *operator.inputs, "bias"))
    body, domains, ending = f"{_BEGIN}{operator.body}{_END}", "", ""
    if activation is not None:
        attributes = ", ".join(f"{a}: int = @{a}" for a in operator.attributes)
        product = f"    Z = {DOMAIN}.{operator.op_type} <{attributes}> ({inputs})\n"
        body = product + _ACTIVATION_BODIES[activation]
        domains, ending = f', "{DOMAIN}" : {VERSION}', f", followed by {activation}"
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}{domains}]>\n'
        f"{name} <{', '.join(operator.attributes)}> ({inputs}) => (Y)\n{{{body}}}"
    )
    proto = parser.parse_function(text)
    proto.doc_string = (
        f"Y = X @ W.T + bias, W a sparse weight in the format {format!r} of spfmt{ending}."
    )
    return cast("onnx.FunctionProto", proto)


def op_type(format: str, activation: str | None = None) -> str:
    """Name of the operator of a format and an activation, as ``"NMLinearRelu"``.

    Raises
    ------
    FormatError
        When no operator exists for the format, or no activation has the name.
    """
    activation_code(activation)
    suffix = "" if activation is None else activation.title().replace("_", "")
    return _operator(format).op_type + suffix


def activation_function(activation: str, opset: int = MIN_OPSET) -> onnx.FunctionProto:
    """A function ``(Z) => (Y)`` of standard operators, named like the activation in our domain."""
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{activation} (Z) => (Y)\n{{{_ACTIVATION_BODIES[activation]}}}"
    )
    return cast("onnx.FunctionProto", require("onnx.parser").parse_function(text))


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
    tensor: SparseTensor, x: str, bias: str, y: str, *, name: str, activation: str | None = None
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
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        Applied to the product.

    Returns
    -------
    (onnx.NodeProto, list of onnx.TensorProto)

    Raises
    ------
    FormatError
        When the weight cannot be lowered (see `lower`), or no activation has the name.
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
        op_type(tensor.format, activation),
        [x, *names, bias],
        [y],
        name=name,
        domain=DOMAIN,
        **lowered.attributes,
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
    assert isinstance(layout, Groups)
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


_ROW_OWNERS = _EXPAND_POINTERS.format(pointers="indptr", owner="row_column")
_GROUP_OWNERS = _EXPAND_POINTERS.format(pointers="group_ptr", owner="group")
_SIZES = ("in_features", "out_features")

OPERATORS: dict[str, Operator] = {
    "condensed": Operator(
        "CondensedLinear",
        ("values", "row_indices", "col_indices"),
        _SIZES,
        _CONDENSED + _PLACE_ROWS,
        _lower_condensed,
    ),
    "nm": Operator(
        "NMLinear", ("values", "col_indices"), (*_SIZES, "n", "m"), _NM + _PLACE_ROWS, _lower_nm
    ),
    "shuffled_block": Operator(
        "ShuffledBlockLinear",
        ("values", "group_ptr", "col_indices", "row_positions"),
        _SIZES,
        _GROUP_COUNT + _GROUP_OWNERS + _PLACE_GROUPS,
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
        _ROW_OWNERS + _PLACE_ROWS,
        _lower_csr,
    ),
}
"""Every operator by the name of its format."""
