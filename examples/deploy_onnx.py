"""Export a sparse model to one ONNX file and run it with and without our kernels."""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import spfmt.onnx
from spfmt.torch import sparsify

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).eval()
print(sparsify(model, "nm", density=0.1, m=32))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.onnx"
    example = (torch.randn(1, 256),)
    spfmt.onnx.export(model, example, path, input_names=["x"], output_names=["y"])
    dense_bytes = 4 * 2 * 256 * 1024
    print(f"{path.name}: {path.stat().st_size} bytes; the dense weights alone take {dense_bytes}")

    x = np.random.default_rng(0).standard_normal((5, 256)).astype("float32")

    # With our library. An application that makes its sessions itself calls
    # spfmt.onnx.register(session_options), or loads spfmt.onnx.library_path() from any language.
    (fast,) = spfmt.onnx.session(path).run(None, {"x": x})

    # Without it: any ONNX Runtime runs the same file, at the speed of a dense model.
    (plain,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    np.testing.assert_allclose(fast, plain, rtol=1e-4, atol=1e-5)

    # The profile shows what ran.
    for library in (True, False):
        runs = spfmt.onnx.kernels_run(path, {"x": x}, library=library)
        print("with" if library else "without", "our library:", [run.op_type for run in runs])
