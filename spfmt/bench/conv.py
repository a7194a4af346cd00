"""Convolutions as contenders: ours, and the dense ones that they are compared with."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from spfmt.bench.baselines import NotMeasured, quiet_options, require
from spfmt.bench.contenders import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    LAYER,
    Case,
    Contender,
    ImageGeometry,
    Setting,
    named,
)
from spfmt.bench.exact import Exact, convolution
from spfmt.bench.layer import layer_contender
from spfmt.bench.work import Work, image_work
from spfmt.convolution import Convolution, conv2d, conv2d_input, conv2d_weight
from spfmt.formats import SparseTensor

if TYPE_CHECKING:
    import torch

__all__ = ["ImageSetting", "dense", "ours", "output_size", "sparse_layer", "sparseprop"]

Array = npt.NDArray[np.float32]


class ImageSetting(Setting):
    """A case with images for operands: X (N, C_in, H, W) and dY (N, C_out, Ho, Wo)."""

    PASSES: ClassVar[tuple[str, str, str]] = ("conv2d", "conv2d_input", "conv2d_weight")

    @property
    def geometry(self) -> ImageGeometry:
        """The case's."""
        assert self.case.geometry is not None
        return self.case.geometry

    @property
    def size(self) -> tuple[int, int]:
        """(Ho, Wo)."""
        return output_size(self.case)

    @cached_property
    def x(self) -> Array:
        """(N, C_in, H, W)."""
        channels = self.case.shape[1] * self.geometry.groups
        return self._operand(1, self.case.batch, channels, *self.geometry.size)

    @cached_property
    def dy(self) -> Array:
        """(N, C_out, Ho, Wo)."""
        return self._operand(2, self.case.batch, self.case.shape[0], *self.size)

    @cached_property
    def _last(self) -> tuple[Array, Array]:
        return _channels_last(self.x), _channels_last(self.dy)

    def operands(self, layout: str) -> tuple[Array, Array]:
        """Return X and dY, channels last in memory where the layout says so."""
        return self._last if layout == CHANNELS_LAST else (self.x, self.dy)

    def _compute(self, op: str, weight: SparseTensor | Array) -> Exact:
        g = self.geometry
        return convolution(op, weight, self.x, self.dy, g.stride, g.padding, g.groups)

    def _one_pass(self, weight: SparseTensor | Array) -> Work:
        return image_work(weight, self.case.batch * self.size[0] * self.size[1], self._cells)

    @property
    def _cells(self) -> int:
        return self.x.size + self.dy.size


def output_size(case: Case) -> tuple[int, int]:
    """Return (Ho, Wo) of a convolution.

    Raises
    ------
    FormatError
        Where the kernel does not fit the maps, or the groups the channels.
    """
    g = case.geometry
    assert g is not None
    how = Convolution.of(case.shape, g.stride, g.padding, 1, g.groups)
    return how.sizes(*g.size)


def _channels_last(x: Array) -> Array:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def _of_images(setting: Setting) -> ImageSetting:
    assert isinstance(setting, ImageSetting)
    return setting


# -------------------------------------------------------------------------------------- ours


def ours(
    setting: Setting, a: SparseTensor, layout: str = CHANNELS_FIRST, backend: str = "auto"
) -> Contender:
    """Return one of our products as a user calls it, on numpy arrays.

    Parameters
    ----------
    setting : ImageSetting
        Its case is one of the three products.
    a : SparseTensor
    layout : {"NCHW", "NHWC"}
    backend : str
        As in :func:`spfmt.conv2d`.
    """
    geometry = _of_images(setting).geometry
    x, dy = setting.operands(layout)
    options: dict[str, Any] = _options(geometry)
    name, isa = named(a, backend, options)
    calls: dict[str, Callable[[], Any]] = {
        "conv2d": lambda: conv2d(a, x, **options),
        "conv2d_input": lambda: conv2d_input(a, dy, geometry.size, **options),
        "conv2d_weight": lambda: conv2d_weight(a, dy, x, **options),
    }
    flat = setting.case.op == "conv2d_weight"
    results = (lambda y: (np.asarray(y).reshape(-1),)) if flat else None
    return setting.contender(
        name, "sparse", a, calls[setting.case.op], layout=layout, results=results, isa=isa
    )


def _options(geometry: ImageGeometry) -> dict[str, Any]:
    return {
        "stride": geometry.stride,
        "padding": geometry.padding,
        "groups": geometry.groups,
    }


def sparse_layer(setting: Setting, a: SparseTensor, layout: str) -> Contender:
    """Return `SparseConv2d` with a weight."""
    import torch

    from spfmt.torch import SparseConv2d

    options = _options(_of_images(setting).geometry)
    layer = SparseConv2d.from_tensor(a, torch.zeros(a.shape[0]), **options)
    name = f"{a.label()} SparseConv2d"
    return layer_contender(setting, name, "sparse", a, layer, layer.values, layout)


# ------------------------------------------------------------------------------------- dense


def torch_dense(setting: Setting, *, layout: str) -> Contender:
    """Dense convolution in torch (oneDNN), images and weight in one layout."""
    torch = require("torch")
    images = _of_images(setting)
    if setting.case.op == LAYER:
        layer, weight = _dense_layer(images, layout)
        name = "torch nn.Conv2d"
        return layer_contender(setting, name, "dense", setting.dense, layer, weight, layout)
    x, dy = (torch.from_numpy(a) for a in setting.operands(layout))
    w = torch.from_numpy(setting.dense).to(memory_format=_memory_format(layout))
    g = images.geometry
    rest = (g.stride,) * 2, (g.padding,) * 2, (1, 1), False, (0, 0), g.groups
    backward = torch.ops.aten.convolution_backward
    calls: dict[str, Callable[[], Any]] = {
        "conv2d": lambda: torch.nn.functional.conv2d(x, w, **_options(g)),
        "conv2d_input": lambda: backward(dy, x, w, None, *rest, (True, False, False))[0],
        "conv2d_weight": lambda: backward(dy, x, w, None, *rest, (False, True, False))[1],
    }
    call = calls[setting.case.op]
    return setting.contender("torch dense", "dense", setting.dense, call, layout=layout)


def _dense_layer(setting: ImageSetting, layout: str) -> tuple[torch.nn.Conv2d, torch.nn.Parameter]:
    import torch

    rows, channels, *kernel = setting.case.shape
    options = _options(setting.geometry)
    size = kernel[0], kernel[1]
    layer = torch.nn.Conv2d(channels * setting.geometry.groups, rows, size, **options)
    weight = torch.from_numpy(setting.dense).clone(memory_format=_memory_format(layout))
    layer.weight = parameter = torch.nn.Parameter(weight)
    torch.nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer, parameter


def _memory_format(layout: str) -> Any:
    import torch

    return torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format


def onnx_dense(setting: Setting) -> Contender:
    """Dense convolution in ONNX Runtime: one Conv, whose weight is packed beforehand."""
    ort = require("onnxruntime")
    require("onnx")
    model = dense_convolution(setting.dense, _of_images(setting).geometry)
    run = ort.InferenceSession(model, quiet_options(setting.case.threads)).run
    feed = {"x": setting.x}
    return setting.contender(
        "onnxruntime dense",
        "dense",
        setting.dense,
        lambda: run(None, feed),
        layout=CHANNELS_FIRST,
        results=lambda outputs: outputs,
    )


def dense_convolution(weight: Array, geometry: ImageGeometry) -> bytes:
    """Return an ONNX model of one dense convolution from ``x`` to ``y``."""
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(
        "Conv",
        ["x", "w"],
        ["y"],
        strides=[geometry.stride] * 2,
        pads=[geometry.padding] * 4,
        group=geometry.groups,
    )
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in ("x", "y")
    ]
    graph = helper.make_graph(
        [node], "dense", values[:1], values[1:], [numpy_helper.from_array(weight, "w")]
    )
    opsets = [helper.make_opsetid("", 17)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return model


Dense = Callable[[Setting], Contender]

_TORCH: Mapping[str, Dense] = {
    "torch NCHW": functools.partial(torch_dense, layout=CHANNELS_FIRST),
    "torch NHWC": functools.partial(torch_dense, layout=CHANNELS_LAST),
}


def dense(case: Case) -> Mapping[str, Dense]:
    """Return makers of the dense convolutions by name; ONNX Runtime's runs forward only."""
    return {**_TORCH, "onnxruntime": onnx_dense} if case.op == "conv2d" else _TORCH


# -------------------------------------------------------------------------------------- peers


def sparseprop(setting: Setting, a: SparseTensor) -> Contender:
    """SparseProp's convolution, by the faster of its two kernels, as its own code chooses."""
    modules, torch = require("sparseprop"), require("torch")
    g = _of_images(setting).geometry
    if g.groups > 1 or a.shape[2] != a.shape[3]:
        raise NotMeasured("is for square kernels and one group")
    if setting.case.batch % 8:
        raise NotMeasured("is wrong for batches that are no multiple of 8 (0.1.14)")
    x = torch.from_numpy(setting.x)
    dense = torch.from_numpy(a.to_dense())

    def make(over: bool) -> Any:
        bias = torch.nn.Parameter(torch.zeros(a.shape[0]))
        return modules.SparseConv2d(dense, bias, g.padding, g.stride, over)

    def seconds(layer: Any) -> float:
        layer(x)
        start = time.perf_counter()
        layer(x)
        return time.perf_counter() - start

    layer = min((make(over) for over in (False, True)), key=seconds)
    if setting.case.op == LAYER:
        return layer_contender(
            setting, "SparseProp", "baseline", a, layer, layer.W_val, CHANNELS_FIRST
        )

    def forward() -> Any:
        with torch.no_grad():
            return layer(x)

    return setting.contender("SparseProp", "baseline", a, forward, layout=CHANNELS_FIRST)
