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
from spfmt.onnx import _folding  # noqa: E402
from spfmt.onnx._folding import fold_batch_norms  # noqa: E402
from spfmt.onnx._fusion import graphs_of  # noqa: E402


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
    for name, count, number in (
        ("ones", 4, 1), ("zeros", 4, 0), ("huge", 4, 1e38), ("tiny", 4, 1e-40), ("five", 5, 1)
    ):  # fmt: skip
        arrays[name] = np.full(count, number, np.float32)

    def model(names: str, training: int = 0) -> Any:
        numbers = {"stride": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1]}
        nodes = [
            helper.make_node(
                "SparseConvolution", ["values", "structure", "x"], ["z"], domain=sonnx.DOMAIN,
                activation="", groups=1, shape=[4, 4, 3, 3], **numbers,
            ),
            helper.make_node(
                "BatchNormalization", ["z", *names.split()], ["y"],
                epsilon=0.0, training_mode=training,
            ),
        ]  # fmt: skip
        info = helper.make_tensor_value_info
        ends = [info(name, onnx.TensorProto.FLOAT, [2, 4, "h", "w"]) for name in ("x", "y")]
        stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], stored))

    refused = (
        (model("ones ones zeros zeros"), "not be finite"),
        (model("huge ones zeros tiny"), "not be finite"),  # but in float64
        (model("ones ones zeros x"), "computed by the graph"),
        (model("ones ones zeros ones", training=1), "statistics of the batch"),
        (model("five five five five"), "5 channels, and the convolution 4"),
    )
    for proto, reason in refused:
        fold_batch_norms(proto)
        assert reason in warned(caplog)[-1]
        assert len(proto.graph.node) == 2
    fold_batch_norms(sound := model("ones ones zeros ones"))
    assert [node.op_type for node in sound.graph.node] == ["SparseConvolution"]
    assert len(warned(caplog)) == len(refused)


class Columns(nn.Module):
    """Batch norms of the columns of an image, on both sides of its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(5) for _ in range(2))
        self.conv = conv(1, 1, 1, density=1.0)

    def forward(self, x: Any) -> Any:
        image = self.norms[0](x).unsqueeze(-2).unsqueeze(2)
        return self.norms[1](self.conv(image).squeeze(2).squeeze(-2))


def test_batch_norms_of_other_axes_stay(tmp_path: Path) -> None:
    model = settled(Columns(), 4, 5)
    ops = exported(model, torch.randn(2, 5), tmp_path / "net.onnx")
    assert ops.count("BatchNormalization") == 2


def test_attributes_without_a_graph_are_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They were searched for batch norms, each as long as the whole model."""
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    branch = helper.make_graph([helper.make_node("Elu", ["x"], ["y"], alpha=1.0)], "b", [], outputs)
    branches = {"then_branch": branch, "else_branch": branch}
    nodes = [helper.make_node("If", ["c"], ["x"], **branches), *branch.node]
    graph = helper.make_graph(nodes, "g", [], outputs)
    assert [inner.name for inner in graphs_of(graph)] == ["g", "b", "b"]
    monkeypatch.setattr(_folding, "_Folder", None)
    fold_batch_norms(helper.make_model(graph))
