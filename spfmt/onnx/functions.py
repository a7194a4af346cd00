"""ONNX operators of the domain ``spfmt``: one per layout, each with a standard-operator body.

A file written by spfmt holds, per sparse layer, one node such as ``spfmt::ListsLinear`` and, once
per operator, a model-local function of the same name. A runtime that knows the operator (ONNX
Runtime with our library) runs the sparse kernel; any other one runs the function. Every body places
the values in a zero matrix and multiplies: all of it but the product is constant, so ONNX Runtime
folds it into one dense product while it loads the file.

The operators know the two layouts that kernels see and no format: a format lowers to one of them,
once, for the CPU and for ONNX alike. Which format a weight had is told to people, in the node's
``doc_string``.

Version 1 of the domain; an operator whose meaning has to change will get a new name, because ONNX
Runtime runs the kernels of version 1 for later versions too. All operators have the inputs ``X``
(..., in_features), then those below, then ``bias`` (out_features,); the output ``Y`` (...,
out_features); the attributes ``in_features`` and ``out_features``. ``X``, ``values``, ``bias`` and
``Y`` have one type, float32 or float64. Every input but ``X`` must be constant. Indices are uint16
when all of one input fit, else int32; pointers are int32. With R = out_features::

    ListsLinear   values (nnz,)  indptr (R + 1,)  col_indices (nnz,)
    GroupsLinear  values (nnz,)  row_perm (R,)  row_ptr (B + 1,)
                  col_begin (B,)  col_end (B,)  col_indices (T,)

Row r of lists has the values ``indptr[r]:indptr[r+1]``, at ascending columns. Groups have B bands
of 1 to 16 rows: band b holds the rows ``row_perm[row_ptr[b]:row_ptr[b+1]]`` at the columns
``col_indices[col_begin[b]:col_end[b]]``, its values follow those of the bands before it, column
after column (see `spfmt.formats`).

Each name with one of the suffixes Relu, Gelu, GeluTanh, Silu is the same product followed by that
activation; its body is the operator without the suffix and standard operators. (Other names, not an
attribute: a library that does not know an attribute would ignore it.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from spfmt.activations import ACTIVATIONS, activation_code
from spfmt.errors import format_error
from spfmt.onnx._deps import require

if TYPE_CHECKING:
    import onnx

    from spfmt.formats import SparseTensor

__all__ = [
    "DOMAIN",
    "MIN_OPSET",
    "OPERATORS",
    "OP_TYPES",
    "SPARSE_NODES",
    "VERSION",
    "function",
    "lower",
    "make_node",
]

DOMAIN = "spfmt"
VERSION = 1
MIN_OPSET = 18
SPARSE_NODES = "spfmt_sparse_nodes"
"""Key of a model's metadata: how many nodes of the domain `export` wrote."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Operator:
    """One operator: its name, its constant inputs, and the body that finds ``weight`` from them."""

    op_type: str
    inputs: tuple[str, ...]
    body: str


# Every body computes `weight`, the dense matrix turned to (in_features, out_features), from `rows`
# and `columns`, the place of each value. Of what is as large as the dense matrix there is as little
# as possible: ONNX Runtime keeps all of it while it loads a file.
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
    row_places = Unsqueeze (rows, minus_one)
    column_places = Unsqueeze (columns, minus_one)
    places = Concat <axis = -1> (column_places, row_places)
    c_r = Concat <axis = 0> (c, r)
    zeros = Expand (zero_value, c_r)
    weight = ScatterND (zeros, places, values)
    product = MatMul (X, weight)
    Y = Add (product, bias)
"""
# The owner of each value, from where the values of each owner begin: one step up at every start.
_OWNERS = """
    starts_shape = Shape (starts)
    steps = Expand (step, starts_shape)
    count = Shape (values)
    count_1 = Add (count, one)
    flat = Expand (first, count_1)
    jumps = ScatterElements <axis = 0, reduction = "add"> (flat, starts, steps)
    climbed = CumSum (jumps, first)
    all_owners = Sub (climbed, one)
    owner = Slice (all_owners, zero, count)
"""
_LISTS = (
    """
    pointers = Cast <to = 7> (indptr)
    starts = Slice (pointers, zero, minus_one)
"""
    + _OWNERS
    + """
    rows = Identity (owner)
    columns = Cast <to = 7> (col_indices)
"""
)
_GROUPS = (
    """
    last = Constant <value = int64[1] {9223372036854775807}> ()
    row_pointers = Cast <to = 7> (row_ptr)
    row_starts = Slice (row_pointers, zero, minus_one)
    row_ends = Slice (row_pointers, one, last)
    heights = Sub (row_ends, row_starts)
    begins = Cast <to = 7> (col_begin)
    ends = Cast <to = 7> (col_end)
    widths = Sub (ends, begins)
    sizes = Mul (heights, widths)
    stops = CumSum (sizes, first)
    starts = Sub (stops, sizes)
"""
    + _OWNERS
    + """
    count_scalar = Squeeze (count)
    positions = Range (first, count_scalar, step)
    own_start = Gather (starts, owner)
    offset = Sub (positions, own_start)
    height = Gather (heights, owner)
    column = Div (offset, height)
    row = Mod (offset, height)
    own_row_start = Gather (row_starts, owner)
    row_place = Add (own_row_start, row)
    perm = Cast <to = 7> (row_perm)
    rows = Gather (perm, row_place)
    own_begin = Gather (begins, owner)
    column_place = Add (own_begin, column)
    all_columns = Cast <to = 7> (col_indices)
    columns = Gather (all_columns, column_place)
"""
)
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
_SIZES = ("in_features", "out_features")

OPERATORS: dict[str, Operator] = {
    "lists": Operator("ListsLinear", ("values", "indptr", "col_indices"), _LISTS),
    "groups": Operator(
        "GroupsLinear",
        ("values", "row_perm", "row_ptr", "col_begin", "col_end", "col_indices"),
        _GROUPS,
    ),
}
"""Every operator by the name of its layout."""

OP_TYPES = tuple(
    operator.op_type + suffix
    for operator in OPERATORS.values()
    for suffix in ("", *(name.title().replace("_", "") for name in ACTIVATIONS))
)
"""Every name of an operator, with and without an activation."""


def function(
    layout: str, opset: int = MIN_OPSET, activation: str | None = None
) -> onnx.FunctionProto:
    """The model-local function of a layout's operator: its meaning in standard operators.

    Parameters
    ----------
    layout : {"lists", "groups"}
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
        When no layout or no activation has the name.
    MissingDependency
        When onnx is not installed.
    """
    parser = require("onnx.parser")
    operator = _operator(layout)
    name = op_type(layout, activation)
    inputs = ", ".join(("X", *operator.inputs, "bias"))
    body, domains, ending = f"{_BEGIN}{operator.body}{_END}", "", ""
    if activation is not None:
        attributes = ", ".join(f"{a}: int = @{a}" for a in _SIZES)
        product = f"    Z = {DOMAIN}.{operator.op_type} <{attributes}> ({inputs})\n"
        body = product + _ACTIVATION_BODIES[activation]
        domains, ending = f', "{DOMAIN}" : {VERSION}', f", followed by {activation}"
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}{domains}]>\n'
        f"{name} <{', '.join(_SIZES)}> ({inputs}) => (Y)\n{{{body}}}"
    )
    proto = parser.parse_function(text)
    proto.doc_string = f"Y = X @ W.T + bias, W a sparse weight as {layout} of spfmt{ending}."
    return cast("onnx.FunctionProto", proto)


def op_type(layout: str, activation: str | None = None) -> str:
    """Name of the operator of a layout and an activation, as ``"ListsLinearRelu"``.

    Raises
    ------
    FormatError
        When no layout or no activation has the name.
    """
    activation_code(activation)
    suffix = "" if activation is None else activation.title().replace("_", "")
    return _operator(layout).op_type + suffix


def activation_function(activation: str, opset: int = MIN_OPSET) -> onnx.FunctionProto:
    """A function ``(Z) => (Y)`` of standard operators, named like the activation in our domain."""
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{activation} (Z) => (Y)\n{{{_ACTIVATION_BODIES[activation]}}}"
    )
    return cast("onnx.FunctionProto", require("onnx.parser").parse_function(text))


def lower(tensor: SparseTensor) -> dict[str, Array]:
    """Turn a weight into an operator's constant inputs, in order, ``values`` first.

    Parameters
    ----------
    tensor : SparseTensor
        A weight of any format, two-dimensional, float32 or float64.

    Raises
    ------
    FormatError
        When the weight is a convolution's, its dtype has no operator, or it is too large.
    """
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
    layout = tensor.layout()
    narrowed = {"indptr": _pointers, "row_ptr": _pointers}
    inputs = {"values": tensor.values.reshape(-1)}
    for name in _operator(layout.name).inputs[1:]:
        inputs[name] = narrowed.get(name, _indices)(getattr(layout, name))
    return inputs


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
    inputs = lower(tensor)
    names = [f"{name}.{key}" for key in inputs]
    arrays = (np.ascontiguousarray(array) for array in inputs.values())
    tensors = [
        numpy_helper.from_array(array, key) for array, key in zip(arrays, names, strict=True)
    ]
    node = onnx.helper.make_node(
        op_type(tensor.layout().name, activation),
        [x, *names, bias],
        [y],
        name=name,
        domain=DOMAIN,
        in_features=int(tensor.matrix_shape[1]),
        out_features=int(tensor.matrix_shape[0]),
    )
    node.doc_string = repr(tensor)
    return node, tensors


def _operator(layout: str) -> Operator:
    try:
        return OPERATORS[layout]
    except KeyError:
        raise format_error(
            f"layout {layout!r}", f"one of {', '.join(OPERATORS)}", "pass tensor.layout().name"
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
