"""Batch norms beside sparse convolutions are folded at export, or stay and say why."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from onnx import helper, numpy_helper  # noqa: E402
from test_onnx_conv import conv, exported, settled  # noqa: E402
from torch import nn  # noqa: E402

import spfmt.onnx as sonnx  # noqa: E402
from spfmt.onnx._folding import fold_batch_norms  # noqa: E402


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.message for r in caplog.records if r.name == "spfmt.onnx" and r.levelname == "WARNING"
    ]


def test_a_batch_norm_in_front_is_folded_where_nothing_is_padded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts: list[Any] = []
    for options in ({}, {"bias": False}, {"padding": 1}):
        parts += [nn.ReLU(), nn.BatchNorm2d(8), conv(8, 8, 3, groups=2, **options)]
    model = settled(nn.Sequential(*parts), 4, 8, 9, 9)
    x, path = torch.randn(2, 8, 9, 9), tmp_path / "net.onnx"
    folded = ["Relu", "ListsConvRelu", "ListsConvRelu"]
    with caplog.at_level(logging.INFO, "spfmt.onnx"):
        assert exported(model, x, path) == [*folded, "BatchNormalization", "ListsConv"]
    assert caplog.text.count("folded in front of") == 2
    (record,) = warned(caplog)
    assert "zeros that the convolution pads with" in record
    nn.init.zeros_(model[7].bias)
    nn.init.zeros_(model[7].running_mean)  # no shift: zeros stay zeros
    assert exported(model, x, path) == [*folded, "ListsConv"]


class Stubborn(nn.Module):
    """Batch norms that cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(4, 4, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: Any) -> Any:
        y = self.convs[0](x)
        y = torch.relu(y + self.norms[0](y))
        y = self.norms[1](torch.relu(self.convs[1](y)))
        return nn.functional.batch_norm(self.convs[2](y.sin()), None, None, training=True)


def test_batch_norms_that_must_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, model = tmp_path / "net.onnx", settled(Stubborn(), 4, 4, 7, 7)
    ops = exported(model, torch.randn(2, 4, 7, 7), path)
    assert ops[:2] == ["ListsConv", "BatchNormalization"]
    assert ops[4:6] == ["ListsConvRelu", "BatchNormalization"]
    assert "ListsConv" in ops[6:]
    # Of the second there is nothing to say, for it is no neighbour.
    first, last = warned(caplog)
    assert "another node reads what lies between them" in first
    assert "computed by the graph" in last


def test_no_batch_norm_is_folded_into_nonsense(caplog: pytest.LogCaptureFixture) -> None:
    layer = conv(4, 4, 3, bias=False)
    arrays = {name: value.detach().numpy() for name, value in layer.state_dict().items()}
    arrays["ones"], arrays["zeros"] = np.ones(4, np.float32), np.zeros(4, np.float32)

    def model(variance: str, training: int = 0) -> Any:
        numbers = {"stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1]}
        nodes = [
            helper.make_node(
                "SparseConvolution", ["values", "structure", "x"], ["z"], domain=sonnx.DOMAIN,
                activation="", groups=1, shape=[4, 4, 3, 3], **numbers,
            ),
            helper.make_node(
                "BatchNormalization", ["z", "ones", "ones", "zeros", variance], ["y"],
                epsilon=0.0, training_mode=training,
            ),
        ]  # fmt: skip
        info = helper.make_tensor_value_info
        ends = [info(name, onnx.TensorProto.FLOAT, [2, 4, "h", "w"]) for name in ("x", "y")]
        stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], stored))

    for proto, reason in (
        (model("zeros"), "not be finite"),
        (model("x"), "computed by the graph"),
        (model("ones", training=1), "statistics of the batch"),
    ):
        fold_batch_norms(proto)
        assert reason in warned(caplog)[-1]
        assert len(proto.graph.node) == 2
    fold_batch_norms(sound := model("ones"))
    assert [node.op_type for node in sound.graph.node] == ["SparseConvolution"]
    assert len(warned(caplog)) == 3
