"""Sparse convolutions as modules: precision, errors, making, copies, writes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from format_cases import LAYOUTS, OPTIONS

torch = pytest.importorskip("torch")

from test_torch_conv import GEOMETRIES, check, make, of_sequences  # noqa: E402
from test_torch_ops import TORCH_ACTIVATIONS, WRITES  # noqa: E402
from torch import nn  # noqa: E402

from spfmt.errors import FormatError, KernelNotFound  # noqa: E402
from spfmt.formats import CSR, get_format  # noqa: E402
from spfmt.torch import (  # noqa: E402
    SparseConv1d,
    SparseConv2d,
    conv2d,
    conv2d_input,
    conv2d_weight,
    convolution,
    freeze,
)

# torch.compile imports parts of torch that use its own deprecated torch.jit.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # of torch's dense layers
]

C, R = 8, 12


@pytest.fixture(params=OPTIONS)
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -------------------------------------------------------------------- precision, activations


@pytest.mark.parametrize("dims", [1, 2])
def test_autocast_returns_the_dtype_of_dense_layers(dims: int) -> None:
    layer = make(dims=dims)
    dense = layer.to_conv()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, C, *(9, 8)[-dims:]).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
            assert y.dtype == dense(x).dtype == torch.bfloat16
        assert torch.equal(y, layer(x.float()).bfloat16())
        y.sum().backward()
        assert x.grad.dtype == dtype
        assert layer.values.grad.dtype == torch.float32


@pytest.mark.parametrize("dims", [1, 2])
def test_autocast_leaves_doubles(dims: int) -> None:
    layer = make(dims=dims, dtype=torch.float64)
    dense, x = layer.to_conv(), torch.randn(3, C, *(9, 8)[-dims:], dtype=torch.float64)
    want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
        assert got.dtype == dense(x).dtype == torch.float64
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_has_no_kernel(dtype: torch.dtype) -> None:
    x = torch.randn(2, C, 5, 6).to(dtype)
    for layer in (make().to(dtype), make(dtype=dtype)):
        with pytest.raises(KernelNotFound, match="autocast"):
            layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    dy, how = torch.zeros(2, R, 3, 4, dtype=dtype), {"shape": layer.shape}
    with pytest.raises(KernelNotFound, match="conv2d_input"):
        conv2d_input(layer.values, layer.structure, dy, (5, 6), **how)
    with pytest.raises(KernelNotFound, match="conv2d_weight"):
        conv2d_weight(layer.structure, dy, x, capacity=layer.capacity, **how)


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
@pytest.mark.parametrize("dims", [1, 2])
def test_activations(layout: str, dims: int, activation: str) -> None:
    layer = make(layout, dims=dims, padding=1)
    x = torch.randn(2, C, *(9, 8)[-dims:], requires_grad=True)
    want = TORCH_ACTIVATIONS[activation](layer(x))
    got = layer(x, activation=activation)
    torch.testing.assert_close(got, want)
    inputs = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, activation=activation), want)
    with pytest.raises(FormatError, match="activation='elu'"):
        layer(x, activation="elu")


def test_activations_are_fused_where_no_gradient_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x, called = make(), torch.zeros(1, C, 4, 4), []
    product = convolution._conv2d
    monkeypatch.setattr(
        convolution, "_conv2d", lambda *args: called.append(args[9:]) or product(*args)
    )
    layer(x, activation="relu").sum().backward()
    with torch.no_grad():
        layer(x, activation="relu")
    assert called == [(), ("relu",)]


# ------------------------------------------------------------------------------------ errors


def error_of(call: Callable[[], Any]) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whichever the dense layer raises)
        call()
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 3},
        {"groups": 0},
        {"rows": 7, "groups": 2},
        {"padding": "some"},
        {"padding": "same", "stride": 2},
        {"padding_mode": "none"},
        {"kernel": 2.5},
        {"kernel": "3"},
        {"channels": -4},
        {"bias": True, "padding": "same", "stride": (2, 2)},
    ],
    ids=str,
)
def test_wrong_options_raise_as_in_dense_layers(dims: int, wrong: dict[str, Any]) -> None:
    options = {"channels": C, "rows": R, "kernel": 3, **wrong}
    sizes = [options.pop(name) for name in ("channels", "rows", "kernel")]
    dense, sparse = ((nn.Conv1d, SparseConv1d), (nn.Conv2d, SparseConv2d))[dims - 1]
    want = error_of(lambda: dense(*sizes, **options))
    assert error_of(lambda: sparse(*sizes, density=0.5, **options)) == want


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
def test_numbers_for_other_dimensions_are_refused(dims: int, name: str) -> None:
    """Dense layers raise only when they are called."""
    kind = (SparseConv1d, SparseConv2d)[dims - 1]
    options = {"kernel_size": 3, "density": 0.5}
    for count in {1, 2, 3, 4} - {1, dims} | ({1} if name == "kernel_size" and dims == 2 else set()):
        with pytest.raises(FormatError, match=f"{name}.*{dims} dimensions"):
            kind(C, R, **{**options, name: (1,) * count})


WRONG_IMAGES = [
    ((2, C + 1, 6, 7), {}),
    ((C + 1, 6, 7), {}),
    ((7,), {}),
    ((), {}),
    ((1, 1, 2, C, 6, 7), {}),
    ((2, C, 2, 2), {}),
    ((2, C, 0, 0), {}),
    ((2, C // 2, 6, 7), {"groups": 2}),
    ((2, C, 6, 7), {"padding": -1}),
    ((2, C, 6, 7), {"stride": 0}),
    ((2, C, 6, 7), {"dilation": 0}),
    ((2, C, 6, 7), {"stride": -2}),
    ((2, C + 1, 6, 7), {"padding": 1, "padding_mode": "circular"}),
    ((7,), {"padding": 1, "padding_mode": "reflect"}),
    ((2, C, 6, 7), {"padding": 9, "padding_mode": "reflect"}),
    ((2, C, 6, 7), {"padding": 9, "padding_mode": "circular"}),
    ((2, C + 1, 6, 7), {"padding": "same"}),
]


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "options"), WRONG_IMAGES, ids=str)
def test_wrong_images_raise_as_in_dense_layers(
    shape: tuple[int, ...], options: dict[str, Any], bias: bool, dims: int
) -> None:
    shape = shape[:-1] if dims == 1 and len(shape) > 1 else shape
    layer = make(dims=dims, bias=bias, **options)
    x = torch.zeros(shape)
    assert error_of(lambda: layer(x)) == error_of(lambda: layer.to_conv()(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_wrong_dtypes_raise_as_in_dense_layers(dtype: torch.dtype, bias: bool) -> None:
    for options in ({}, {"padding_mode": "replicate", "padding": 1}):
        layer, x = make(bias=bias, **options), torch.zeros(2, C, 6, 7, dtype=dtype)
        assert error_of(lambda layer=layer, x=x: layer(x)) == error_of(
            lambda layer=layer, x=x: layer.to_conv()(x)
        )


@pytest.mark.parametrize("bias", [True, False])
def test_what_dense_layers_cannot_explain(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not even asked, for they would compute."""
    monkeypatch.delattr(nn.Conv2d, "forward")
    layer, x = make("csr", bias=bias), torch.zeros(2, C, 6, 7)
    with pytest.raises(FormatError, match="one device"):
        layer(x.to("meta"))
    layer.structure.fill_(3)
    with pytest.raises(FormatError, match="magic"):
        layer(x)
    with torch.autocast("cpu"), pytest.raises(FormatError, match="magic"):
        layer(x.bfloat16())
    with pytest.raises(AttributeError, match="missing"):
        _ = layer.missing


def test_errors_of_operators_are_clear() -> None:
    layer = make("csr")
    values, structure = layer.values.detach(), layer.structure
    x, dy = torch.randn(2, C, 6, 7), torch.randn(2, R, 4, 5)
    how: dict[str, Any] = {"shape": layer.shape}
    for call, message in (
        (lambda: conv2d(values, structure, x[:, 1:], **how), r"\(2, 7, 6, 7\).*\(N, 8, H, W\)"),
        (lambda: conv2d(values, structure, x[0], **how), r"\(8, 6, 7\)"),
        (lambda: conv2d(values, structure, x.double(), **how), "float64"),
        (lambda: conv2d(values, structure, x, torch.zeros(R + 1), **how), "bias"),
        (lambda: conv2d(values[:3], structure, x, **how), "3 values"),
        (lambda: conv2d(values, structure.long(), x, **how), "int64"),
        (lambda: conv2d(values, torch.zeros(40, dtype=torch.int32), x, **how), "magic"),
        (lambda: conv2d(values, structure, x, shape=(R, C, 2, 2)), "a structure of shape"),
        (lambda: conv2d(values, structure, x, shape=(R, C, 1, 9), padding=4), r"\(12, 8, 3, 3\)"),
        (lambda: conv2d(values, structure, x, shape=(R, C)), "4|Kh"),
        (lambda: conv2d(values, structure, x, stride=(0, 1), **how), "stride"),
        (lambda: conv2d(values, structure, x, padding=(1, 1, 1, -1), **how), "padding"),
        (lambda: conv2d(values, structure, x, dilation=(1,), **how), "dilation"),
        (lambda: conv2d(values, structure, x, groups=5, **how), "groups"),
        (lambda: conv2d(values, structure, x[..., :2], **how), "no smaller than the kernel"),
        (lambda: conv2d(values, structure, x.to("meta"), **how), "one device"),
        (lambda: conv2d_input(values, structure, dy, (6, 8), **how), "4 x 5.*4 x 6"),
        (lambda: conv2d_input(values, structure, dy[:, 1:], (6, 7), **how), r"\(N, 12, H, W\)"),
        (lambda: conv2d_weight(structure, dy[:1], x, capacity=999, **how), "one batch size"),
        (lambda: conv2d_weight(structure, dy, x, capacity=3, **how), "3 values"),
        (lambda: conv2d_weight(structure, dy, x[..., 1:], capacity=999, **how), "4 x 5.*4 x 4"),
    ):
        with pytest.raises(FormatError, match=message):
            call()


@pytest.mark.parametrize(
    "how", [{"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"padding": (1, 2)}],
    ids=str,
)  # fmt: skip
def test_operators_read_numbers_alike_whoever_looks(how: dict[str, Any]) -> None:
    layer = make("csr")
    values, structure, x = layer.values.detach(), layer.structure, torch.randn(2, C, 6, 7)
    options = {"shape": list(layer.shape), **how}

    def all_three() -> list[Any]:
        y = conv2d(values, structure, x, **options)
        capacity = layer.capacity
        return [
            y,
            conv2d_input(values, structure, y, (6, 7), **options),
            conv2d_weight(structure, y, x, capacity=capacity, **options),
        ]

    want = all_three()
    torch.testing.assert_close(want[0], nn.functional.conv2d(x, layer.to_conv().weight, **how))
    with torch.profiler.profile():
        assert all(map(torch.equal, all_three(), want))
    compiled = torch.compile(all_three, backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(), want))


@pytest.mark.parametrize("freed", ["values", "structure", "x", "bias"])
def test_a_freed_storage_is_refused(freed: str) -> None:
    layer = make("csr")
    operands = {
        "values": layer.values.detach().clone(),
        "structure": layer.structure.clone(),
        "x": torch.randn(2, C, 6, 7),
        "bias": torch.randn(R),
    }
    operands[freed].untyped_storage().resize_(0)
    with pytest.raises(FormatError, match="freed"):
        conv2d(*operands.values(), shape=layer.shape)


# -------------------------------------------------------------------------- making, converting


def test_layers_hold_what_dense_ones_hold() -> None:
    options = {"stride": (1, 2), "padding": (2, 1), "dilation": 2, "groups": 2}
    layer = make(padding_mode="reflect", **options)
    dense = nn.Conv2d(C, R, 3, padding_mode="reflect", **options)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
                 "groups", "padding_mode"):  # fmt: skip
        assert getattr(layer, name) == getattr(dense, name)
    text = repr(layer)
    assert repr(dense)[:-1].removeprefix("Conv2d") in text
    for part in ("SparseConv2d", "bias=True", "format=csr", "nnz=", "capacity="):
        assert part in text
    assert layer.weight.shape == dense.weight.shape
    assert layer.weight.dtype == torch.float32
    assert layer.shape == tuple(dense.weight.shape)
    assert "structure not loaded" in repr(make(device="meta"))


def test_weights_of_sequences_have_three_dimensions() -> None:
    layer = make(dims=1)
    assert layer.shape == (R, C, 1, 3)
    assert layer.weight.shape == layer.to_conv().weight.shape == (R, C, 3)


def test_density_or_what_stands_for_it() -> None:
    assert make("csr", density=None, sparsity=0.75).density == 0.25
    for wrong in ({"sparsity": 0.5}, {"density": None}):
        with pytest.raises(FormatError, match="exactly one"):
            make("csr", **wrong)
    layer = SparseConv2d(C, R, 3, format="nm", n=1, m=4)
    assert layer.density == 0.25
    assert SparseConv2d(C, R, 3, format="condensed", fan_in=5).nnz == 5 * R
    assert make("hrbp", groups=2).tensor().row_ptr.size - 1 == OPTIONS["hrbp"]["groups"]


def test_same_generator_same_layer(format: str) -> None:
    a, b, c = (make(format, seed=seed) for seed in (1, 1, 2))
    assert a.tensor() == b.tensor()
    assert torch.equal(a.bias, b.bias)
    assert a.tensor() != c.tensor()


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_from_conv_and_back(format: str, dims: int, order: torch.memory_format) -> None:
    options: dict[str, Any] = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    dense = ((nn.Conv1d, nn.Conv2d)[dims - 1])(C, R, 3, **options, padding_mode="circular")
    dense.weight.requires_grad_(False)
    if dims == 2:
        dense = dense.to(memory_format=order)
    layer = type(make(dims=dims)).from_conv(
        dense.eval(), format=format, density=0.25, **OPTIONS[format]
    )
    weight = dense.weight.detach()
    flat = weight.reshape(layer.shape)
    mask = torch.from_numpy(layer.tensor().mask())
    expected = get_format(format).project(flat.abs().numpy(), 0.25, **OPTIONS[format])
    assert torch.equal(mask, torch.from_numpy(expected))
    back = layer.to_conv()
    assert type(back) is type(dense)
    assert torch.equal(back.weight, weight * mask.reshape(weight.shape))
    assert repr(back) == repr(dense)
    for module in (layer, back):
        assert module.bias is dense.bias
        assert not module.training
    assert not layer.values.requires_grad
    assert not back.weight.requires_grad
    assert type(layer).from_conv(back.train(), density=1.0).training
    x = torch.randn(2, C, *(9, 8)[-dims:])
    torch.testing.assert_close(layer(x), back(x))


@pytest.mark.parametrize("dims", [1, 2])
def test_from_tensor_and_back(format: str, dims: int) -> None:
    kind = type(make(dims=dims))
    tensor = make(format, dims=dims, groups=2).tensor()
    bias = nn.Parameter(torch.ones(R))
    layer = kind.from_tensor(tensor, bias, capacity=tensor.nnz + 7, groups=2, stride=2, padding=1)
    assert layer.tensor() == tensor
    assert layer.bias is bias
    assert layer.capacity == tensor.nnz + 7
    assert layer.in_channels == C
    assert (layer.stride, layer.padding) == ((2,) * dims, (1,) * dims)
    check(layer, torch.randn(2, C, *(9, 8)[-dims:]))
    with pytest.raises(FormatError, match="capacity"):
        kind.from_tensor(tensor, capacity=1)
    with pytest.raises(FormatError, match="bias"):
        kind.from_tensor(tensor, torch.ones(3))
    with pytest.raises(ValueError, match="divisible by groups"):
        kind.from_tensor(tensor, groups=5)


class Standardized(nn.Conv2d):
    """Convolves with another weight than the one it holds."""


@pytest.mark.parametrize("kind", [SparseConv1d, SparseConv2d])
def test_layers_that_compute_something_else_are_refused(kind: Any) -> None:
    others = [nn.ConvTranspose2d, nn.ConvTranspose1d, Standardized, nn.Conv3d]
    for other in (*others, {SparseConv1d: nn.Conv2d, SparseConv2d: nn.Conv1d}[kind]):
        with pytest.raises(FormatError, match=f"got a {other.__name__}.*{kind.DENSE.__name__}"):
            kind.from_conv(other(8, 8, 3, padding=1), density=0.5)


@pytest.mark.parametrize("dims", [1, 2])
def test_from_dense_takes_the_parameters_of_the_format(dims: int) -> None:
    dense = (nn.Conv1d, nn.Conv2d)[dims - 1](C, R, 3)
    kind, how = type(make(dims=dims)), {"format": "hrbp", "density": 0.3}
    got = kind.from_dense(dense, format_params=OPTIONS["hrbp"], **how)
    assert got.tensor() == kind.from_conv(dense, **OPTIONS["hrbp"], **how).tensor()


@pytest.mark.parametrize("dims", [1, 2])
def test_options_written_later_count_where_they_do_in_dense_layers(dims: int) -> None:
    """Networks with dilated kernels are often made so of others."""
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    x = torch.randn(2, C, *(9, 8)[-dims:])
    for mode in ("zeros", "circular"):
        dense = kind(C, R, 3, padding=1, padding_mode=mode)
        dense.dilation = dense.padding = (2,) * dims
        layer = type(make(dims=dims)).from_conv(dense, density=1.0)
        for padding in ((2,) * dims, (0,) * dims, (1,), 3, "same"):
            layer.padding = dense.padding = padding
            for stride in ((1,) * dims, 2) if padding != "same" else (1,):
                layer.stride = dense.stride = stride
                y = dense(x)
                torch.testing.assert_close(layer(x), y)
                check(layer, x)
                (want,) = torch.autograd.grad(y.sum(), dense.weight)
                got = layer.dense_gradient(x, torch.ones_like(y))
                torch.testing.assert_close(got, want.flatten(1))
                inputs, outputs = layer.samples(x, torch.ones_like(y))
                torch.testing.assert_close(outputs.T @ inputs, want.flatten(1))
                assert layer.explain(2, size=x.shape[2:]).startswith("conv2d")


def test_tensors_that_are_no_kernels_are_refused() -> None:
    matrix = CSR.from_dense(np.eye(4, dtype=np.float32))
    for kind in (SparseConv1d, SparseConv2d):
        with pytest.raises(FormatError, match=r"\(4, 4\)"):
            kind.from_tensor(matrix)
    with pytest.raises(FormatError, match="3 x 3"):
        SparseConv1d.from_tensor(make().tensor())
    with pytest.raises(FormatError, match=r"scores of shape \(4, 4, 3, 3\)"):
        SparseConv2d.from_conv(nn.Conv2d(C, R, 3), density=0.5, scores=torch.rand(4, 4, 3, 3))


def test_initial_values_are_scaled_by_each_rows_fan_in() -> None:
    layer = make("condensed", rows=64, fan_in=16, density=None)
    assert 0.2 < layer.values.abs().max() <= 0.25
    assert 0.2 < layer.bias.abs().max() <= 0.25


def test_on_meta_and_loaded() -> None:
    source = make("nm", seed=1)
    with torch.device("meta"):
        inside = make("nm", seed=3)
    for target in (make("nm", seed=2).to("meta"), make("nm", seed=2, device="meta"), inside):
        assert target.values.is_meta
        assert target.structure.is_meta
        assert target(torch.zeros(3, C, 5, 6, device="meta")).shape == (3, R, 3, 4)
        target.load_state_dict(source.state_dict(), assign=True)
        assert target.tensor() == source.tensor()


def test_copies_are_independent(format: str) -> None:
    layer, x = make(format, padding="same", padding_mode="circular"), torch.randn(2, C, 5, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.tensor() == layer.tensor()
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            twin.values.zero_()
        assert not torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("dims", [1, 2])
def test_a_state_dict_through_a_file(format: str, dims: int) -> None:
    source, target = (make(format, dims=dims, seed=seed) for seed in (1, 2))
    x = torch.randn(2, C, *(5, 6)[-dims:])
    target(x)  # compiles the structure that is about to go
    held, buffer = (target.values, target.structure), io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert (target.values, target.structure) == held
    assert target.tensor() == source.tensor()
    assert torch.equal(target(x), source(x))


def test_wrong_checkpoints_change_nothing() -> None:
    target = make("csr", seed=2)
    before = target.tensor()
    for message, other in {
        "got a nm structure": make("nm"),
        r"\(12, 8, 1, 3\)": make("csr", (1, 3)),
        r"\(12, 24, 3, 1\)": make("csr", (3, 1), channels=24),
        "capacity": make("csr", density=0.5),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict(other.state_dict(), strict=False)
        assert target.tensor() == before


def test_module_conversions(layout: str) -> None:
    layer, x = make(layout), torch.randn(2, C, 5, 6)
    double = copy.deepcopy(layer).double()
    assert double.structure.dtype == torch.int32
    check(double, x.double())
    torch.testing.assert_close(double(x.double()).float(), layer(x))


def test_functional_call_with_other_values() -> None:
    layer, x = make(bias=False), torch.randn(2, C, 5, 6)
    doubled = {"values": layer.values.detach() * 2}
    for _ in range(2):
        torch.testing.assert_close(torch.func.functional_call(layer, doubled, (x,)), 2 * layer(x))


def test_freeze_leaves_convolutions() -> None:
    model = nn.Sequential(make(), nn.Flatten(), nn.Linear(4, 4))
    assert freeze(model)[0] is model[0]
    assert type(freeze(model[0])) is SparseConv2d


# ------------------------------------------------------------------------ identity of the weight


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES, ids=lambda w: w.__name__)
def test_every_write_is_seen(write: Any, mode: Any, layout: str) -> None:
    layer, x = make(layout, bias=False), torch.randn(1, C, 5, 6)
    for _ in range(2):
        with mode():
            before = layer(x).clone()
        write(layer)
        with mode():
            after = layer(x)
            assert not torch.equal(before, after)
            torch.testing.assert_close(after, layer.to_conv()(x))


def test_inference_tensors_work_and_are_never_stale() -> None:
    x = torch.randn(2, C, 5, 6)
    with torch.inference_mode():
        layer = make()
        for seed in (1, 2):
            layer.values.mul_(2)
            torch.testing.assert_close(layer(x), layer.to_conv()(x))
            layer.load_state_dict(make(seed=seed).state_dict())
            assert torch.equal(layer(x), make(seed=seed)(x))


@pytest.mark.parametrize("dims", [1, 2])
def test_set_structure_moves_values_and_keeps_objects(format: str, dims: int) -> None:
    layer = make(format, dims=dims, capacity=400, padding=1)
    new = make(format, dims=dims, seed=5).tensor()
    x = torch.randn(2, C, *(5, 6)[-dims:])
    before = layer.to_conv().weight
    held = (layer.values, layer.structure, layer.values.data_ptr(), layer.structure.data_ptr())
    layer(x)
    layer.set_structure(new)
    assert held[:2] == (layer.values, layer.structure)
    assert held[2:] == (layer.values.data_ptr(), layer.structure.data_ptr())
    mask = torch.from_numpy(new.mask()).reshape(before.shape)
    assert torch.equal(layer.to_conv().weight, before * mask)
    check(layer, x)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dims", [1, 2])
def test_samples_are_what_was_multiplied(dims: int, geometry: str) -> None:
    kernel, options = GEOMETRIES[geometry]
    if dims == 1:
        kernel, options = of_sequences(kernel, options)
    layer = make("csr", kernel, dims=dims, dtype=torch.float64, **options)
    for lead in ((2,), ()):
        x = torch.randn(*lead, layer.in_channels, *(9, 8)[-dims:], dtype=torch.float64)
        if layer.groups != 1:
            with pytest.raises(FormatError, match="groups"):
                layer.samples(x, x)
            return
        dense = layer.to_conv()
        y = dense(x)
        dy = torch.randn_like(y)
        inputs, outputs = layer.samples(x, dy)
        (want,) = torch.autograd.grad(y, dense.weight, dy)
        torch.testing.assert_close((outputs.T @ inputs).reshape(want.shape), want)
