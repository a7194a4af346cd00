"""What follows sparse products: into the product's node where nothing else reads the product.

Products are linear layers and convolutions. During the translation every ReLU, GELU and SiLU of a
model is a placeholder that still has torch's name for it; afterwards it either becomes an attribute
of a product's placeholder or is written out in standard operators. What is added to a convolution,
the other branch of a residual, becomes its fifth input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from spfmt.onnx._deps import require
from spfmt.onnx.functions import DOMAIN, VERSION, activation_function

if TYPE_CHECKING:
    import onnx

__all__ = [
    "ACTIVATION",
    "CONVOLUTION",
    "PRODUCT",
    "bypass",
    "fuse_activations",
    "fuse_sums",
    "graphs_of",
    "is_product",
    "nodes_of",
    "readers_of",
    "text_of",
    "translations",
]

PRODUCT = "SparseProduct"
CONVOLUTION = "SparseConvolution"
ACTIVATION = "Activation"
# What moves elements and changes none; a sequence is convolved as an image of one row.
_MOVES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose")
_FLOATS = ("float", "double", "float16", "bfloat16")  # narrow products are refused when lowered


def translations() -> dict[Any, Any]:
    """Torch's operators and what they become: placeholders with the operators' own arguments."""
    torch = require("torch")
    inputs = {"values": "T", "structure": "tensor(int32)", "x": "T", "bias": "T"}
    product = _operator(PRODUCT, inputs, {"activation": "STRING"})
    numbers = dict.fromkeys(("shape", "stride", "padding", "dilation"), "INTS")
    convolution = _operator(
        CONVOLUTION, inputs, {"activation": "STRING", "groups": "INT", **numbers}
    )
    activation = _operator(ACTIVATION, {"z": "T"}, {"kind": "STRING"})

    def spmm(
        values: Any, structure: Any, x: Any, bias: Any, shape: Any, activation: str | None = None
    ) -> Any:
        return product(values, structure, x, bias, activation=activation or "")

    def conv2d(
        values: Any,
        structure: Any,
        x: Any,
        bias: Any,
        shape: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        activation: str | None = None,
    ) -> Any:
        how = {"shape": shape, "stride": stride, "padding": padding, "dilation": dilation}
        how = {key: [int(n) for n in value] for key, value in how.items()}
        kind = activation or ""
        return convolution(values, structure, x, bias, activation=kind, groups=groups, **how)

    def gelu(z: Any, approximate: str = "none") -> Any:
        return activation(z, kind="gelu" if approximate == "none" else "gelu_tanh")

    return {
        torch.ops.spfmt.spmm.default: spmm,
        torch.ops.spfmt.conv2d.default: conv2d,
        torch.ops.aten.relu.default: lambda z: activation(z, kind="relu"),
        torch.ops.aten.gelu.default: gelu,
        torch.ops.aten.silu.default: lambda z: activation(z, kind="silu"),
    }


def _operator(name: str, inputs: dict[str, str], attributes: dict[str, str]) -> Any:
    schema = require("onnx").defs.OpSchema
    values = require("onnxscript").values
    option = schema.FormalParameterOption
    formal = [
        schema.FormalParameter(
            key, kind, param_option=option.Optional if key == "bias" else option.Single
        )
        for key, kind in inputs.items()
    ]
    types = [
        f"tensor({t})" for t in (*_FLOATS, *(("int32", "int64") if name == ACTIVATION else ()))
    ]
    described = schema(
        name,
        DOMAIN,
        VERSION,
        inputs=formal,
        outputs=[schema.FormalParameter("y", "T")],
        type_constraints=[("T", types, "numbers")],
        attributes=[
            schema.Attribute(key, getattr(schema.AttrType, kind))
            for key, kind in attributes.items()
        ],
    )
    return values.Op(values.Opset(DOMAIN, VERSION), name, described)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes of a graph and of the graphs in its attributes."""
    for inner in graphs_of(graph):
        yield from inner.node


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the graphs in its attributes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):  # else reading it would make an empty one
                yield from graphs_of(attribute.g)
            for inner in attribute.graphs:
                yield from graphs_of(inner)


def readers_of(graph: onnx.GraphProto) -> Counter[str]:
    """How often each value is read, or handed out."""
    readers = Counter(name for node in nodes_of(graph) for name in node.input)
    for inner in graphs_of(graph):
        readers.update(output.name for output in inner.output)
    return readers


def is_product(node: onnx.NodeProto) -> bool:
    """Whether a node is the placeholder of a sparse layer."""
    return node.domain == DOMAIN and node.op_type in (PRODUCT, CONVOLUTION)


def fuse_sums(proto: onnx.ModelProto) -> None:
    """Let convolutions add what is added to their results, where both are of one shape.

    Sums are the same ones to the bit: what is added comes last, as it did.
    """
    readers = readers_of(proto.graph)
    for graph in graphs_of(proto.graph):
        producers = {name: node for node in graph.node for name in node.output}
        shapes = {info.name: _dims(info) for info in (*graph.value_info, *graph.input)}
        for node in [n for n in graph.node if (n.domain, n.op_type) == ("", "Add")]:
            product = _addable(node, producers, readers, shapes)
            if product is not None:
                (other,) = [name for name in node.input if name != product.output[0]]
                product.input.extend(["", other][len(product.input) - 3 :])
                _move_to(graph, product, node)
                producers[node.output[0]] = node


def _dims(info: onnx.ValueInfoProto) -> tuple[Any, ...]:
    """Sizes and names of a value's dimensions; unknown ones are equal to none."""
    dims = info.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or object() for d in dims)


def _addable(
    node: onnx.NodeProto,
    producers: dict[str, onnx.NodeProto],
    readers: Counter[str],
    shapes: dict[str, tuple[Any, ...]],
) -> onnx.NodeProto | None:
    """Return a convolution whose result a sum alone reads, beside a value of its shape, or None."""
    known = [shapes.get(name, ()) for name in node.input]
    if len(known[0]) != 4 or known[0] != known[1]:
        return None
    for name in reversed(node.input):
        found = producers.get(name)
        if found is None or readers[name] != 1 or not is_product(found):
            continue
        if len(found.input) < 5 and not text_of(found, "activation").s:
            return found
    return None


def _move_to(graph: onnx.GraphProto, product: onnx.NodeProto, node: onnx.NodeProto) -> None:
    """Put a product in the place of a node, whose result becomes its own."""
    del product.output[:]
    product.output.extend(node.output)
    node.CopyFrom(product)
    graph.node.remove(product)


def fuse_activations(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Fuse what can be fused and write out every other placeholder of an activation."""
    readers = readers_of(proto.graph)
    for graph in graphs_of(proto.graph):
        producers = {name: node for node in graph.node for name in node.output}
        for node in [n for n in graph.node if (n.domain, n.op_type) == (DOMAIN, ACTIVATION)]:
            product = _only_source(node, producers, readers)
            if product is not None:
                text_of(product, "activation").s = text_of(node, "kind").s
                bypass(graph, node, producers)
    return _written_out(proto, opset)


def text_of(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    """Return the attribute of a placeholder that is text."""
    found: onnx.AttributeProto = next(a for a in node.attribute if a.name == name)
    return found


def _only_source(
    node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], readers: Counter[str]
) -> onnx.NodeProto | None:
    """Return the product that an activation alone reads, maybe moved about, or None."""
    name = node.input[0]
    while name in producers and readers[name] == 1:
        source = producers[name]
        if is_product(source):
            return None if text_of(source, "activation").s else source
        if source.domain or source.op_type not in _MOVES:
            return None
        name = source.input[0]
    return None


def bypass(
    graph: onnx.GraphProto, node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]
) -> None:
    """Take a node out: what produced its input produces its output."""
    old, new = node.input[0], node.output[0]
    source = producers.pop(old)
    source.output[list(source.output).index(old)] = new
    producers[new] = source
    graph.node.remove(node)
    stale = [info for info in graph.value_info if info.name == old]
    for info in stale:
        graph.value_info.remove(info)


def _written_out(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Replace the remaining placeholders of activations by standard operators."""
    kinds = set()
    for node in nodes_of(proto.graph):
        if (node.domain, node.op_type) == (DOMAIN, ACTIVATION):
            kind = text_of(node, "kind").s.decode()
            del node.attribute[:]
            if kind == "relu":
                node.op_type, node.domain = "Relu", ""
                continue
            node.op_type = kind
            kinds.add(kind)
    if not kinds:
        return proto
    proto.functions.extend(activation_function(kind, opset) for kind in sorted(kinds))
    names = [(DOMAIN, kind) for kind in sorted(kinds)]
    return require("onnx.inliner").inline_selected_functions(proto, names)  # type: ignore[no-any-return]
