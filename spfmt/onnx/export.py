"""torch model to ONNX file: sparse layers become nodes of the domain ``spfmt``.

The model goes through ``torch.onnx.export``, where every sparse product becomes a placeholder that
still holds capacity and structure words. A batch norm beside a sparse convolution is folded into
it, and an activation that alone reads a product joins it. Then each placeholder is replaced by its
layout's operator with just the arrays that it needs (see `spfmt.onnx.functions`).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from spfmt._files import replace_file
from spfmt.convolution import Convolution
from spfmt.errors import SpfmtError, format_error
from spfmt.formats import decode_structure
from spfmt.onnx._deps import require
from spfmt.onnx._folding import fold_batch_norms
from spfmt.onnx._fusion import (
    CONVOLUTION,
    fuse_activations,
    fuse_sums,
    is_product,
    nodes_of,
    text_of,
    translations,
)
from spfmt.onnx.functions import (
    DOMAIN,
    MIN_OPSET,
    SPARSE_NODES,
    VERSION,
    function,
    make_node,
    node_of,
)

if TYPE_CHECKING:
    import onnx
    import torch

    from spfmt.formats import SparseTensor

__all__ = ["ExportError", "export"]

_MAX_BYTES = 2**31 - 1  # of a protobuf message


class ExportError(SpfmtError, RuntimeError):
    """A model cannot be written as an ONNX file."""


def export(
    model: torch.nn.Module,
    args: Any,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int = MIN_OPSET,
    inline: bool = False,
) -> Path:
    """Write a model of sparse and ordinary layers as one ONNX file.

    The file runs in any ONNX Runtime from 1.16 on, at dense speed; where our library is registered
    (`spfmt.onnx.session`), from 1.17 on, the sparse kernels run. The model is exported in
    evaluation mode; its own mode is left as it is. The file appears whole or not at all.

    Batch norms beside sparse convolutions become part of their values and biases. Where one must
    stay, because the convolution pads what it returns or somebody else reads what lies between, the
    logger ``spfmt.onnx`` says which and why.

    Parameters
    ----------
    model : torch.nn.Module
        On the CPU, float32 or float64.
    args : Tensor or tuple
        Example inputs, as the model is called.
    path : path
        The file to write.
    kwargs : mapping, optional
        Example keyword inputs.
    dynamic_batch : bool
        The first dimension of every input tensor is the batch and may have any size. False fixes
        all sizes to those of the example.
    dynamic_shapes : optional
        As in ``torch.export``; replaces `dynamic_batch`.
    input_names, output_names : sequence of str, optional
        Names in the file; torch's by default.
    opset : int
        Version of ONNX's standard operators, 18 or later.
    inline : bool
        True writes the standard operators in place of our nodes: a plain file for runtimes that do
        not know model-local functions, such as OpenVINO. Our kernels cannot run it.

    Returns
    -------
    pathlib.Path
        The path.

    Raises
    ------
    ExportError
        When torch cannot translate a layer, a sparse weight is not a constant, or the file would
        be larger than 2 GiB.
    FormatError
        When a sparse weight has no operator (see `lower`), a layer is a `Participating` one, or
        `opset` or the names do not fit.
    OSError
        When `path` cannot be written; what is wrong with it is found before the export begins.
    MissingDependency
        When torch, onnx or onnxscript is missing.
    """
    for module in ("torch", "onnx", "onnxscript"):
        require(module)
    path = _writable(path)
    _check_opset(opset)
    model = require("spfmt.torch.wrappers").unwrapped(model)
    _check_layers(model)
    arguments = args if isinstance(args, tuple) else (args,)
    keywords = dict(kwargs or {})
    if dynamic_shapes is None and dynamic_batch:
        arguments, keywords = _at_least_two((arguments, keywords))
        dynamic_shapes = _batch_shapes(model, arguments, keywords)
    proto = _translate(
        model,
        arguments,
        kwargs=keywords,
        dynamic_shapes=dynamic_shapes,
        input_names=input_names,
        output_names=output_names,
        opset_version=opset,
    )
    _check_names("input_names", input_names, proto.graph.input)
    _check_names("output_names", output_names, proto.graph.output)
    fold_batch_norms(proto)
    fuse_sums(proto)
    proto = fuse_activations(proto, opset)
    _replace_placeholders(proto, opset)
    replace_file(os.path.realpath(path), _finish(proto, inline).SerializeToString())
    return path


def _writable(path: str | os.PathLike[str]) -> Path:
    """Return where to write, or say at once why nothing can be written there."""
    path = Path(path)
    got = f"got path {str(path)!r}"
    if path.is_dir():
        raise IsADirectoryError(f"{got}, a folder; expected a file; fix: add a name, model.onnx")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{got} in a folder that does not exist; expected an existing one; fix: make "
            f"{str(path.parent)!r} first"
        )
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(
            f"{got} in a folder that you may not write to; expected a writable one; fix: choose "
            "another"
        )
    return path


def _check_opset(opset: int) -> None:
    latest = require("onnx").defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= latest:
        raise format_error(
            f"opset={opset}", f"{MIN_OPSET} to {latest}, which this onnx knows", "leave it out"
        )


def _check_layers(model: torch.nn.Module) -> None:
    kind = require("spfmt.torch.participating").Participating
    found = [name for name, layer in model.named_modules() if isinstance(layer, kind)]
    if found:
        raise format_error(
            f"layers that hold more weights than participate: {', '.join(found)}",
            "sparse layers",
            "call finish() of the Rewire that trained them",
        )


def _check_names(argument: str, names: Sequence[str] | None, found: Sequence[Any]) -> None:
    if isinstance(names, str) or (names is not None and len(names) > len(found)):
        raise format_error(
            f"{argument}={names!r}",
            f"a list of at most {len(found)} names",
            "pass one name for each tensor, in the model's order",
        )


def _at_least_two(inputs: Any) -> Any:
    """Double examples of batch size one: torch takes sizes 0 and 1 for constants."""
    torch = require("torch")
    pytree = require("torch.utils._pytree")

    def has_batch(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.ndim > 0

    def double(value: Any) -> Any:
        if not has_batch(value):
            return value
        example = value if len(value) else value.new_zeros((1, *value.shape[1:]))
        return example.repeat_interleave(2, 0)

    if any(has_batch(leaf) and len(leaf) > 1 for leaf in pytree.tree_leaves(inputs)):
        return inputs
    return pytree.tree_map(double, inputs)


def _batch_shapes(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``dynamic_shapes`` that call the first dimension of every tensor ``batch``."""
    torch = require("torch")
    pytree = require("torch.utils._pytree")

    def shape(value: Any) -> dict[int, str] | None:
        return {0: "batch"} if isinstance(value, torch.Tensor) and value.ndim else None

    signature = inspect.signature(model.forward)
    kinds = {p.kind for p in signature.parameters.values()}
    if not kwargs and inspect.Parameter.VAR_POSITIONAL not in kinds:
        return pytree.tree_map(shape, args)
    return pytree.tree_map(shape, dict(signature.bind(*args, **kwargs).arguments))


def _translate(model: Any, args: tuple[Any, ...], **options: Any) -> onnx.ModelProto:
    """``torch.onnx.export`` with placeholders for the sparse products."""
    torch = require("torch")
    require("spfmt.torch")  # defines the operators
    if not options["kwargs"] and args and isinstance(args[-1], dict):
        args = (*args, {})  # torch takes a dictionary at the end for the keyword arguments
    with _evaluating(model), _quiet():
        try:
            program = torch.onnx.export(
                model,
                args,
                dynamo=True,
                verbose=False,
                custom_translation_table=translations(),
                **options,
            )
            return cast("onnx.ModelProto", program.model_proto)
        except Exception as error:
            raise ExportError(
                f"got a {type(model).__name__} that torch.onnx.export cannot translate "
                f"({_cause(error)}); {_way_out(error)}"
            ) from error


def _way_out(error: Exception) -> str:
    """Return what was expected and how to get there."""
    text = str(error)
    if (
        "dynamic_shapes" in text
        or "user-specified ranges" in text
        or "Constraints violated" in text
    ):
        return (
            "expected the first dimension of every input tensor to be a batch of any size; pass "
            "dynamic_shapes as for torch.export (None for an input without a batch, "
            "({0: 'batch'}, None) for instance), or dynamic_batch=False"
        )
    return (
        "expected sparse and ordinary layers; rewrite or leave out the layer that is named, "
        "or export it apart"
    )


def _cause(error: Exception) -> str:
    """Return what went wrong in torch's exporter, without its advice to torch's developers."""
    _, marker, summary = str(error).partition("## Exception summary")
    text = summary if marker else f"{type(error).__name__}: {error}"
    text = re.sub(r"\x1b\[[0-9;]*m|\(Refer to the full stack trace.*", "", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    lines = [line.strip() for line in text.splitlines() if line.strip(" \u2b06\ufe0f")]
    return " | ".join(lines[:6])


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave errors alone, hold back the exporter's remarks on torch's own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _replace_placeholders(proto: onnx.ModelProto, opset: int) -> None:
    """Turn placeholders into the layouts' operators and add those operators' functions."""
    replace = _Replacer(proto.graph)
    for node in list(nodes_of(proto.graph)):
        if is_product(node):
            replace(node)
    if any(node.domain == DOMAIN for f in proto.functions for node in f.node):
        raise ExportError(
            "got a sparse layer inside a function of the graph; expected it in the graph itself; "
            "call the layer outside of torch.cond and loops"
        )
    replace.drop_unused()
    # A function with an activation calls the one without, one with an addend that without.
    called = {(convolved, adds, layout, "") for convolved, adds, layout, _ in replace.used}
    called |= {(convolved, False, layout, "") for convolved, _, layout, _ in replace.used}
    for convolved, adds, layout, activation in sorted(called | replace.used):
        proto.functions.append(
            function(layout, opset, activation or None, convolution=convolved, adds=adds)
        )


class _Replacer:
    """Replaces placeholders in place; layers that share a weight share its initializers."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.taken = set(self.initializers)
        self.lowered: dict[tuple[str, str], tuple[SparseTensor, str, list[str]]] = {}
        self.zeros: dict[tuple[int, int], str] = {}
        self.used: set[tuple[bool, bool, str, str]] = set()  # convolved, adds, layout, activation

    def __call__(self, node: onnx.NodeProto) -> None:
        values, structure, x, *rest = node.input
        if (values, structure) not in self.lowered:
            tensor = self._tensor(values, structure, node.name)
            self.lowered[values, structure] = tensor, *self._lower(tensor, structure)
        tensor, layer, names = self.lowered[values, structure]
        activation = text_of(node, "activation").s.decode()
        shape, how = _convolution(node) if node.op_type == CONVOLUTION else (tensor.shape, None)
        bias = rest[0] if rest and rest[0] else self._zero_bias(values, tensor)
        addend = rest[1:]
        self.used.add((how is not None, bool(addend), tensor.layout().name, activation))
        name, output = f"{layer}/{node.name}", node.output[0]
        kind = activation or None
        inputs = [x, *names, bias, *addend]
        node.CopyFrom(node_of(tensor, inputs, output, name, kind, shape, how, bool(addend)))

    def _array(self, name: str, node: str) -> Any:
        if name not in self.initializers:
            raise ExportError(
                f"got a sparse layer ({node}) whose weight the graph computes ({name}); expected "
                "parameters of the model; export a model whose weights do not depend on its input"
            )
        return require("onnx.numpy_helper").to_array(self.initializers[name])

    def _tensor(self, values: str, structure: str, node: str) -> SparseTensor:
        found = decode_structure(self._array(structure, node))
        # Behind nnz lies unused capacity of the training, which no file needs.
        used = self._array(values, node)[: found.nnz]
        return found.tensor(used)

    def _lower(self, tensor: SparseTensor, structure: str) -> tuple[str, list[str]]:
        """Store a weight; return the layer's name and those of the initializers."""
        prefix = structure.removesuffix(".structure").removesuffix("structure") or "sparse"
        name, number = prefix, 1
        while any(taken.startswith(f"{name}.sparse.") for taken in self.taken):
            number += 1
            name = f"{prefix}_{number}"
        _, tensors = make_node(tensor, "", "", "", name=f"{name}.sparse")
        self.graph.initializer.extend(tensors)
        self.taken.update(tensor.name for tensor in tensors)
        return name, [tensor.name for tensor in tensors]

    def _zero_bias(self, values: str, tensor: SparseTensor) -> str:
        rows = tensor.matrix_shape[0]
        dtype = self.initializers[values].data_type
        if (rows, dtype) not in self.zeros:
            onnx = require("onnx")
            name = f"spfmt.no_bias.{len(self.zeros)}"
            array = np.zeros(rows, onnx.helper.tensor_dtype_to_np_dtype(dtype))
            self.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
            self.zeros[rows, dtype] = name
        return self.zeros[rows, dtype]

    def drop_unused(self) -> None:
        """Remove capacity and structure words that nothing refers to any more."""
        used = {name for node in nodes_of(self.graph) for name in node.input}
        used.update(output.name for output in self.graph.output)
        replaced = {name for pair in self.lowered for name in pair}
        for field in (self.graph.initializer, self.graph.value_info):
            kept = [item for item in field if item.name in used or item.name not in replaced]
            del field[:]
            field.extend(kept)


def _convolution(node: onnx.NodeProto) -> tuple[list[int], Convolution]:
    """Return the weight's shape and the geometry that a placeholder of a convolution tells."""
    ints = {a.name: list(a.ints) for a in node.attribute}
    groups = next(a.i for a in node.attribute if a.name == "groups")
    shape = ints["shape"]
    rest = (ints["stride"], ints["padding"], ints["dilation"], groups)
    return shape, Convolution.of(shape, *rest)


def _finish(proto: onnx.ModelProto, inline: bool) -> onnx.ModelProto:
    """Strip what only debugging needs, lower the IR version, inline, check."""
    onnx = require("onnx")
    # Names of initializers there would only repeat them, and break onnxruntime's quantization.
    stored = {tensor.name for tensor in proto.graph.initializer}
    described = [info for info in proto.graph.value_info if info.name not in stored]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(described)
    # torch's notes hold paths of the machine that exported, and need a newer IR version.
    for item in (proto.graph, *proto.graph.value_info, *nodes_of(proto.graph)):
        item.ClearField("metadata_props")
    if inline:
        proto = require("onnx.inliner").inline_local_functions(proto)
        kept = [opset for opset in proto.opset_import if opset.domain != DOMAIN]
        del proto.opset_import[:]
        proto.opset_import.extend(kept)
        _drop_unused_constants(proto.graph)
    else:
        if all(opset.domain != DOMAIN for opset in proto.opset_import):
            proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
        count = sum(node.domain == DOMAIN for node in nodes_of(proto.graph))
        onnx.helper.set_model_props(proto, {SPARSE_NODES: str(count)})
    known = [opset for opset in proto.opset_import if opset.domain != DOMAIN]
    proto.ir_version = max(8, onnx.helper.find_min_ir_version_for(known, ignore_unknown=True))
    size = proto.ByteSize()
    if size > _MAX_BYTES:
        raise ExportError(
            f"got a model of {size / 2**30:.1f} GiB; expected at most 2 GiB, all that one ONNX "
            "file can hold; raise the sparsity or export the model in parts"
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ExportError(
            f"got a graph that onnx refuses ({error}); expected a sound one; please report this "
            "model to spfmt"
        ) from error
    return proto


def _drop_unused_constants(graph: onnx.GraphProto) -> None:
    """Remove what the bodies have in common and one of them does not need: runtimes warn of it."""
    used = {name for node in nodes_of(graph) for name in node.input}
    used.update(output.name for output in graph.output)
    kept = [n for n in graph.node if n.op_type != "Constant" or used.intersection(n.output)]
    del graph.node[:]
    graph.node.extend(kept)
