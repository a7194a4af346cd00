"""Deployment in ONNX Runtime: one file that runs anywhere, and fast where our library is.

`export` writes a torch model, `session` opens it with our kernels, `register` and `library_path`
serve applications that make their sessions themselves, `kernels_run` shows what ran. Running needs
onnxruntime alone; exporting needs torch, onnx and onnxscript::

    spfmt.onnx.export(model, example, "model.onnx")
    session = spfmt.onnx.session("model.onnx")
    (y,) = session.run(None, {"x": x})
"""

from __future__ import annotations

from spfmt.onnx.export import ExportError, export
from spfmt.onnx.functions import (
    CONVOLUTIONS,
    DOMAIN,
    MIN_OPSET,
    OP_TYPES,
    OPERATORS,
    VERSION,
    function,
    lower,
    make_node,
)
from spfmt.onnx.session import (
    KernelRun,
    kernels_run,
    library_path,
    read_profile,
    register,
    session,
)

__all__ = [
    "CONVOLUTIONS",
    "DOMAIN",
    "MIN_OPSET",
    "OPERATORS",
    "OP_TYPES",
    "VERSION",
    "ExportError",
    "KernelRun",
    "export",
    "function",
    "kernels_run",
    "library_path",
    "lower",
    "make_node",
    "read_profile",
    "register",
    "session",
]
