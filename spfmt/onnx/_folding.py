"""Batch norms beside sparse convolutions: into their values and bias.

In evaluation a batch norm is y = scale x + shift for each channel (Ioffe and Szegedy 2015, section
3.1). Behind a convolution it scales the rows of the weight. In front of one it scales the columns,
and its shift adds to the bias; but a convolution that pads surrounds what the batch norm returned
with zeros, which no bias can make of a shift: then only a shift of zero is folded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spfmt.formats import decode_structure
from spfmt.onnx._deps import require
from spfmt.onnx._fusion import CONVOLUTION, bypass, graphs_of, is_product, readers_of, text_of

if TYPE_CHECKING:
    import onnx

__all__ = ["fold_batch_norms"]

Array = NDArray[Any]
_log = logging.getLogger("spfmt.onnx")


class _Kept(Exception):
    """Why a batch norm stays a node of its own."""


def fold_batch_norms(proto: onnx.ModelProto) -> None:
    """Fold every batch norm that can be folded into a neighbour.

    Logger ``spfmt.onnx``, INFO: what was folded; WARNING: what was not, and why.
    """
    for graph in graphs_of(proto.graph):
        norms = [n for n in graph.node if (n.domain, n.op_type) == ("", "BatchNormalization")]
        if norms:
            fold = _Folder(proto.graph, graph)
            for norm in norms:
                fold(norm)
    _drop_unread(proto.graph)


class _Folder:
    """Folds batch norms of one graph."""

    def __init__(self, main: onnx.GraphProto, graph: onnx.GraphProto) -> None:
        self.main, self.graph = main, graph
        self.initializers = {tensor.name: tensor for tensor in main.initializer}
        self.constants = {
            node.output[0]: node.attribute[0].t
            for node in graph.node
            if node.op_type == "Constant" and node.attribute[0].name == "value"
        }
        self.readers = readers_of(main)
        self.producers = {name: node for node in graph.node for name in node.output}

    def __call__(self, norm: onnx.NodeProto) -> None:
        before, after = self._before(norm), self._after(norm)
        kept = []
        for place, found in (("behind", before), ("in front of", after)):
            if found is None:
                continue
            conv, alone = found
            try:
                with np.errstate(all="ignore"):  # what is not finite is refused by name
                    self._fold(norm, conv, alone, place == "behind")
            except _Kept as why:
                kept.append(f"{place} the sparse convolution {conv.name}: {why}")
            else:
                _log.info("%s: folded %s the convolution %s", norm.name, place, conv.name)
                return
        for text in kept:
            _log.warning("the batch norm %s stays, %s", norm.name, text)

    # ------------------------------------------------------------------------------ neighbours

    def _before(self, norm: onnx.NodeProto) -> tuple[onnx.NodeProto, bool] | None:
        """Return the convolution whose result a batch norm takes, and whether nobody else does."""
        name, alone = norm.input[0], True
        while name in self.producers:
            alone &= self.readers[name] == 1
            source = self.producers[name]
            if is_product(source):
                return (source, alone) if source.op_type == CONVOLUTION else None
            if not self._drops_rows(source, "Squeeze"):
                return None
            name = source.input[0]
        return None

    def _after(self, norm: onnx.NodeProto) -> tuple[onnx.NodeProto, bool] | None:
        """Return a convolution that takes a batch norm's result, and whether nobody else does."""
        name, alone = norm.output[0], True
        while True:
            alone &= self.readers[name] == 1
            takers = [node for node in self.graph.node if name in node.input]
            for taker in takers:
                if is_product(taker) and taker.op_type == CONVOLUTION and taker.input[2] == name:
                    return taker, alone
            moves = [node for node in takers if self._drops_rows(node, "Unsqueeze")]
            if not moves:
                return None
            name = moves[0].output[0]

    def _drops_rows(self, node: onnx.NodeProto, kind: str) -> bool:
        """Tell whether a node only takes away, or gives, the one row of a sequence's images."""
        if node.domain or node.op_type != kind or len(node.input) != 2:
            return False
        axes = self.constants.get(node.input[1], self.initializers.get(node.input[1]))
        if axes is None:
            return False
        # Counted from the front: from the back the same number may mean the channels.
        return bool(require("onnx.numpy_helper").to_array(axes).reshape(-1).tolist() == [2])

    # --------------------------------------------------------------------------------- folding

    def _array(self, name: str, what: str) -> Array:
        if name not in self.initializers:
            raise _Kept(f"{what} is computed by the graph")
        found: Array = require("onnx.numpy_helper").to_array(self.initializers[name])
        return found

    def _scale_and_shift(self, norm: onnx.NodeProto) -> tuple[Array, Array]:
        options = {a.name: a for a in norm.attribute}
        if "training_mode" in options and options["training_mode"].i:
            raise _Kept("it uses the statistics of the batch; a model in evaluation would not")
        epsilon = options["epsilon"].f if "epsilon" in options else 1e-5
        weight, bias, mean, var = (
            self._array(name, "one of its parameters").astype(np.float64) for name in norm.input[1:]
        )
        scale = weight / np.sqrt(var + epsilon)
        return scale, bias - mean * scale

    def _fold(self, norm: onnx.NodeProto, conv: onnx.NodeProto, alone: bool, behind: bool) -> None:
        scale, shift = self._scale_and_shift(norm)
        if not alone:
            raise _Kept("another node reads what lies between them")
        if behind and text_of(conv, "activation").s:
            raise _Kept("the convolution applies an activation first")
        rows_of_y, per_group, *_ = _ints(conv, "shape")
        channels = rows_of_y if behind else per_group * _groups(conv)
        if scale.size != channels:
            raise _Kept(f"it has {scale.size} channels, and the convolution {channels} there")
        values = self._array(conv.input[0], "the weight")
        structure = decode_structure(self._array(conv.input[1], "the structure"))
        tensor = structure.tensor(values[: structure.nnz])
        rows, cols = tensor.layout().coordinates()
        wide = tensor.values.reshape(-1).astype(np.float64)
        has_bias = len(conv.input) > 3 and bool(conv.input[3])
        old: Any = self._array(conv.input[3], "the bias").astype(np.float64) if has_bias else 0.0
        if behind:
            folded, offset = wide * scale[rows], old * scale + shift
        else:
            channel = _channels(conv, rows, cols)
            if shift.any() and any(_ints(conv, "padding")):
                raise _Kept("the zeros that the convolution pads with come after its shift")
            folded = wide * scale[channel]
            moved = np.bincount(rows, wide * shift[channel], minlength=tensor.matrix_shape[0])
            offset = old + moved
        folded, offset = folded.astype(values.dtype), offset.astype(values.dtype)
        if not (np.isfinite(folded).all() and np.isfinite(offset).all()):
            raise _Kept("the result would not be finite")
        self._put(conv, folded, offset)
        self._take_out(norm, conv, behind)

    def _put(self, conv: onnx.NodeProto, values: Array, bias: Array) -> None:
        """Give a convolution values and a bias of its own: others may use the ones it had."""
        rest = [""] * (4 - len(conv.input))
        conv.input.extend(rest)
        for place, array, name in ((0, values, conv.input[0]), (3, bias, "bias")):
            fresh = f"{conv.name}.{name}.folded"
            while fresh in self.initializers:
                fresh += "_"
            tensor = require("onnx.numpy_helper").from_array(array, fresh)
            self.main.initializer.append(tensor)
            self.initializers[fresh] = self.main.initializer[-1]
            conv.input[place] = fresh

    def _take_out(self, norm: onnx.NodeProto, conv: onnx.NodeProto, behind: bool) -> None:
        if behind:
            bypass(self.graph, norm, self.producers)
            return
        # Whoever made the batch norm's input may have other readers: its name stays.
        for node in self.graph.node:
            for i, name in enumerate(node.input):
                if name == norm.output[0]:
                    node.input[i] = norm.input[0]
        self.graph.node.remove(norm)
        for info in [i for i in self.graph.value_info if i.name == norm.output[0]]:
            self.graph.value_info.remove(info)
        del self.producers[norm.output[0]]
        self.readers = readers_of(self.main)


def _ints(conv: onnx.NodeProto, name: str) -> list[int]:
    return next(list(a.ints) for a in conv.attribute if a.name == name)


def _groups(conv: onnx.NodeProto) -> int:
    return next(int(a.i) for a in conv.attribute if a.name == "groups")


def _channels(conv: onnx.NodeProto, rows: Array, cols: Array) -> Array:
    """Return the channel of X that each value of a weight multiplies."""
    shape = _ints(conv, "shape")
    group = rows // (shape[0] // _groups(conv))
    found: Array = group * shape[1] + cols // (shape[2] * shape[3])
    return found


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove parameters that were folded, unless others read them."""
    readers = readers_of(graph)
    fields: Iterator[Any] = iter((graph.initializer, graph.value_info))
    stored = {tensor.name for tensor in graph.initializer}
    for field in fields:
        kept = [item for item in field if readers[item.name] or item.name not in stored]
        del field[:]
        field.extend(kept)
