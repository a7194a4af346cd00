"""Our kernels inside ONNX Runtime, as contenders."""

from __future__ import annotations

from typing import Any

import numpy as np

from spfmt.bench.baselines import quiet_options
from spfmt.bench.contenders import Contender, Setting
from spfmt.formats import SparseTensor

__all__ = ["in_onnxruntime"]


def in_onnxruntime(setting: Setting, a: SparseTensor) -> Contender:
    """Return a one-layer model with a sparse weight, run by ONNX Runtime with our library.

    Needs onnx and onnxruntime; the case is a forward product.
    """
    from spfmt.onnx import session

    options = quiet_options(setting.case.threads)
    run = session(_one_layer(a), session_options=options).run
    feed = {"x": setting.x}
    return setting.contender(
        f"{a.label()} in onnxruntime",
        "sparse",
        a,
        lambda: run(None, feed),
        results=lambda outputs: outputs,
    )


def _one_layer(a: SparseTensor) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    from spfmt.onnx import DOMAIN, MIN_OPSET, VERSION, function, make_node

    rows, cols = a.matrix_shape
    node, tensors = make_node(a, "x", "bias", "y", name="layer")
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", cols])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", rows])],
        [*tensors, numpy_helper.from_array(np.zeros(rows, np.float32), "bias")],
    )
    opsets = [helper.make_opsetid("", MIN_OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model: Any = helper.make_model(
        graph, opset_imports=opsets, functions=[function(a.layout().name)], ir_version=8
    )
    content: bytes = model.SerializeToString()
    return content
