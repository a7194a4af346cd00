"""ONNX operators of the domain ``spfmt``: a linear layer and a convolution per layout, with bodies.

A file written by spfmt holds, per sparse layer, one node such as ``spfmt::ListsLinear`` and, once
per operator, a model-local function of the same name. A runtime that knows the operator (ONNX
Runtime with our library) runs the sparse kernel; any other one runs the function. Every body places
the values in a zero matrix and multiplies, or convolves: all of it but the product is constant, so
ONNX Runtime folds it into one dense product while it loads the file.

The operators know the two layouts that kernels see and no format: a format lowers to one of them,
once, for the CPU and for ONNX alike. Which format a weight had is told to people, in the node's
``doc_string``.

Version 1 of the domain; an operator whose meaning has to change will get a new name, because ONNX
Runtime runs the kernels of version 1 for later versions too. All operators have the inputs ``X``,
then those below, then ``bias`` (R,); the output ``Y``. ``X``, ``values``, ``bias`` and ``Y`` have
one type, float32 or float64. Every input but ``X`` must be constant. Indices are uint16 when all of
one input fit, else int32; pointers are int32. For a weight of R rows::

    Lists...   values (nnz,)  indptr (R + 1,)  col_indices (nnz,)
    Groups...  values (nnz,)  row_perm (R,)  row_ptr (B + 1,)
               col_begin (B,)  col_end (B,)  col_indices (T,)

Row r of lists has the values ``indptr[r]:indptr[r+1]``, at ascending columns. Groups have B bands
of 1 to 16 rows: band b holds the rows ``row_perm[row_ptr[b]:row_ptr[b+1]]`` at the columns
``col_indices[col_begin[b]:col_end[b]]``, its values follow those of the bands before it, column
after column (see `spfmt.formats`). What is done with the weight, and its attributes, all required::

    ...Linear  X (..., in_features), Y (..., out_features), R = out_features
               in_features, out_features
    ...Conv    X (N, in_channels, H, W), Y (N, out_channels, Ho, Wo), R = out_channels
               in_channels, out_channels, and kernel_shape, strides, pads, dilations, group of
               ONNX's Conv; column (c Kh + ky) Kw + kx is cell (ky, kx) of channel c of the group
    ...ConvAdd the same, plus a last input ``addend`` of Y's shape: the other branch of a residual

Each name with one of the suffixes Relu, Gelu, GeluTanh, Silu is the same product followed by that
activation; its body is the operator without the suffix and standard operators. (Other names, not an
attribute: a library that does not know an attribute would ignore it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from spfmt.activations import ACTIVATIONS, activation_code
from spfmt.convolution import Convolution
from spfmt.errors import format_error
from spfmt.onnx import _bodies
from spfmt.onnx._deps import require

if TYPE_CHECKING:
    import onnx

    from spfmt.formats import SparseTensor

__all__ = [
    "CONVOLUTIONS",
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
    """One operator: its name, its constant inputs, its attributes and their types, its body.

    `operands` are the inputs around the constant ones: X, then the bias and what follows it.
    """

    op_type: str
    inputs: tuple[str, ...]
    attributes: dict[str, str]
    body: str
    operands: tuple[str, ...] = ("X", "bias")

    @property
    def all_inputs(self) -> str:
        """All inputs in order."""
        x, *rest = self.operands
        return ", ".join((x, *self.inputs, *rest))

    def call(self, y: str) -> str:
        """Return the line of a body that calls the operator with its own inputs."""
        attributes = ", ".join(f"{a}: {kind} = @{a}" for a, kind in self.attributes.items())
        return f"    {y} = {DOMAIN}.{self.op_type} <{attributes}> ({self.all_inputs})\n"


_LAYOUTS = {
    "lists": ("Lists", ("values", "indptr", "col_indices"), _bodies.LISTS),
    "groups": (
        "Groups",
        ("values", "row_perm", "row_ptr", "col_begin", "col_end", "col_indices"),
        _bodies.GROUPS,
    ),
}


def _operators(
    suffix: str, attributes: dict[str, str], around: tuple[str, str]
) -> dict[str, Operator]:
    begin, end = around
    return {
        layout: Operator(prefix + suffix, inputs, attributes, begin + places + end)
        for layout, (prefix, inputs, places) in _LAYOUTS.items()
    }


OPERATORS = _operators("Linear", {"in_features": "int", "out_features": "int"}, _bodies.LINEAR)
"""Operators of linear layers by the name of their layout."""

CONVOLUTIONS = _operators(
    "Conv",
    {"in_channels": "int", "out_channels": "int", "group": "int"}
    | dict.fromkeys(("kernel_shape", "strides", "pads", "dilations"), "ints"),
    _bodies.CONV,
)
"""Operators of convolutions by the name of their layout."""

RESIDUALS = {
    layout: Operator(
        f"{conv.op_type}Add",
        conv.inputs,
        conv.attributes,
        conv.call("product") + "    Y = Add (product, addend)\n",
        (*conv.operands, "addend"),
    )
    for layout, conv in CONVOLUTIONS.items()
}
"""Operators of convolutions that something is added to, by the name of their layout."""

BASE_TYPES = tuple(
    o.op_type for table in (OPERATORS, CONVOLUTIONS, RESIDUALS) for o in table.values()
)

OP_TYPES = tuple(
    base + suffix
    for base in BASE_TYPES
    for suffix in ("", *(name.title().replace("_", "") for name in ACTIVATIONS))
)
"""Every name of an operator, with and without an activation."""


def function(
    layout: str,
    opset: int = MIN_OPSET,
    activation: str | None = None,
    *,
    convolution: bool = False,
    adds: bool = False,
) -> onnx.FunctionProto:
    """The model-local function of a layout's operator: its meaning in standard operators.

    Parameters
    ----------
    layout : {"lists", "groups"}
    opset : int
        Version of ONNX's standard operators; it must equal the one the model imports.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        The function of the operator that ends with this activation; it calls the one without.
    convolution : bool
        The layout's convolution instead of its linear layer.
    adds : bool
        The convolution with an addend; its function calls the one without.

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
    operator = _operator(layout, convolution, adds)
    name = op_type(layout, activation, convolution=convolution, adds=adds)
    body, ending = operator.body, ""
    if activation is not None:
        body = operator.call("Z") + _bodies.ACTIVATIONS[activation]
        ending = f", followed by {activation}"
    domains = f', "{DOMAIN}" : {VERSION}' if adds or activation is not None else ""
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}{domains}]>\n'
        f"{name} <{', '.join(operator.attributes)}> ({operator.all_inputs}) => (Y)\n{{{body}}}"
    )
    proto = parser.parse_function(text)
    meaning = "Conv(X, W) + bias" if convolution else "X @ W.T + bias"
    meaning += " + addend" if adds else ""
    proto.doc_string = f"Y = {meaning}, W a sparse weight as {layout} of spfmt{ending}."
    return cast("onnx.FunctionProto", proto)


def op_type(
    layout: str, activation: str | None = None, *, convolution: bool = False, adds: bool = False
) -> str:
    """Name of the operator of a layout and an activation, as ``"ListsLinearRelu"``.

    Raises
    ------
    FormatError
        When no layout or no activation has the name.
    """
    activation_code(activation)
    suffix = "" if activation is None else activation.title().replace("_", "")
    return _operator(layout, convolution, adds).op_type + suffix


def activation_function(activation: str, opset: int = MIN_OPSET) -> onnx.FunctionProto:
    """A function ``(Z) => (Y)`` of standard operators, named like the activation in our domain."""
    text = (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{activation} (Z) => (Y)\n{{{_bodies.ACTIVATIONS[activation]}}}"
    )
    return cast("onnx.FunctionProto", require("onnx.parser").parse_function(text))


def lower(tensor: SparseTensor) -> dict[str, Array]:
    """Turn a weight into an operator's constant inputs, in order, ``values`` first.

    Parameters
    ----------
    tensor : SparseTensor
        A weight of any format, a matrix or a convolution's, float32 or float64.

    Raises
    ------
    FormatError
        When its dtype has no operator, or it is too large.
    """
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
    tensor: SparseTensor,
    x: str,
    bias: str,
    y: str,
    *,
    name: str,
    activation: str | None = None,
    convolution: Convolution | None = None,
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    """A node that applies a weight, with the initializers that it reads.

    Parameters
    ----------
    tensor : SparseTensor
        The weight, (out_features, in_features) or (C_out, C_in / groups, Kh, Kw).
    x, bias, y : str
        Names of the input (..., in_features) or (N, C_in, H, W), the bias, one number per row, and
        the output.
    name : str
        Name of the node; its initializers are called ``name.input``.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        Applied to the product.
    convolution : Convolution, optional
        Of a weight with four dimensions: stride, padding, dilation and groups. By default one
        group, stride 1 and no padding.

    Returns
    -------
    (onnx.NodeProto, list of onnx.TensorProto)

    Raises
    ------
    FormatError
        When the weight cannot be lowered (see `lower`), its kernel is not that of `convolution`, or
        no activation has the name.
    MissingDependency
        When onnx is not installed.
    """
    require("onnx")
    numpy_helper = require("onnx.numpy_helper")
    inputs = lower(tensor)
    names = [f"{name}.{key}" for key in inputs]
    arrays = (np.ascontiguousarray(array) for array in inputs.values())
    tensors = [
        numpy_helper.from_array(array, key) for array, key in zip(arrays, names, strict=True)
    ]
    node = node_of(tensor, [x, *names, bias], y, name, activation, tensor.shape, convolution)
    return node, tensors


def node_of(
    tensor: SparseTensor,
    inputs: list[str],
    y: str,
    name: str,
    activation: str | None,
    shape: Sequence[int],
    convolution: Convolution | None,
    adds: bool = False,
) -> onnx.NodeProto:
    """Return a node on inputs that exist, for a weight that is used in this shape."""
    convolved = len(shape) == 4
    node: onnx.NodeProto = require("onnx").helper.make_node(
        op_type(tensor.layout().name, activation, convolution=convolved, adds=adds),
        inputs,
        [y],
        name=name,
        domain=DOMAIN,
        **(_of_convolution(shape, convolution) if convolved else _of_matrix(shape, convolution)),
    )
    node.doc_string = repr(tensor)
    return node


def _of_matrix(shape: Sequence[int], convolution: Convolution | None) -> dict[str, Any]:
    if convolution is not None:
        raise format_error(
            f"a convolution of a weight of shape {tuple(shape)}",
            "(C_out, C_in / groups, Kh, Kw)",
            "leave it out",
        )
    return {"in_features": int(shape[1]), "out_features": int(shape[0])}


def _of_convolution(shape: Sequence[int], convolution: Convolution | None) -> dict[str, Any]:
    how = Convolution.of(shape) if convolution is None else convolution
    if how.kernel != tuple(shape[2:]) or shape[0] % how.groups:
        raise format_error(
            f"a weight of shape {tuple(shape)} for {how}",
            "the same kernel, and groups that divide the rows",
            "make it with Convolution.of(tensor.shape, ...)",
        )
    return {
        "in_channels": int(shape[1]) * how.groups,
        "out_channels": int(shape[0]),
        "group": how.groups,
        "kernel_shape": how.kernel,
        "strides": how.stride,
        "pads": how.padding,
        "dilations": how.dilation,
    }


def _operator(layout: str, convolution: bool = False, adds: bool = False) -> Operator:
    table = RESIDUALS if adds else CONVOLUTIONS if convolution else OPERATORS
    try:
        return table[layout]
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
