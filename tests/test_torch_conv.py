"""Sparse convolutions in torch, operators and layers, beside torch's own."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from format_cases import LAYOUTS, OPTIONS

torch = pytest.importorskip("torch")

from test_torch_ops import TORCH_ACTIVATIONS  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

from spfmt.torch import (  # noqa: E402
    SparseConv1d,
    SparseConv2d,
    conv2d,
    conv2d_input,
    conv2d_weight,
    convolution,
)

# torch.compile imports parts of torch that use its own deprecated torch.jit.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),  # of torch's dense layers
]

C, R = 8, 12


def make(
    format: str = "csr", kernel: Any = 3, *, dims: int = 2, channels: int = C, rows: int = R,
    seed: int = 0, **options: Any,
) -> Any:  # fmt: skip
    kind = SparseConv2d if dims == 2 else SparseConv1d
    options = {"density": 0.3, "format_params": OPTIONS[format], **options}
    generator = torch.Generator().manual_seed(seed)
    return kind(channels, rows, kernel, format=format, generator=generator, **options)


@pytest.fixture(params=OPTIONS)
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def products(layer: Any, x: Tensor, dy: Tensor, part: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Output and gradients of the dense layer in float64, every operand replaced by `part` of it.

    With absolute values they are the sizes of the sums that rounding errors are bounded by.
    """
    dense = copy.deepcopy(layer.to_conv()).double().requires_grad_()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(part(parameter))
    x = part(x.detach().double()).requires_grad_()
    y = dense(x)
    dx, dweight, *dbias = torch.autograd.grad(y, [x, *dense.parameters()], part(dy.double()))
    at = torch.from_numpy(layer.tensor().flat_indices())
    dvalues = dx.new_zeros(layer.capacity)
    dvalues[: at.numel()] = dweight.reshape(-1)[at]
    return [y.detach(), dx, dvalues, *dbias]


def check(layer: Any, x: Tensor) -> None:
    """Output and gradients are those of the dense layer within the bounds of sums in any order."""
    x = x.detach().requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]
    want, size = (products(layer, x, dy, part) for part in (torch.clone, torch.abs))
    rows, pixels = layer.out_channels, y.numel() // layer.out_channels
    fan_in, cells = math.prod(layer.shape[1:]), math.prod(layer.kernel_size)
    for a, b, total, terms in zip(got, want, size, (fan_in, rows * cells, pixels, pixels)):  # noqa: B905
        assert a.shape == b.shape
        bound = (terms + 4) * torch.finfo(a.dtype).eps * total  # 4: bias, or sums of padding
        assert ((a.double() - b).abs() <= bound).all()


# ---------------------------------------------------------------------------------- products

GEOMETRIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (3, {}),
    "padded": (3, {"padding": 1, "bias": False}),
    "one cell": (1, {}),
    "one cell, strided": (1, {"stride": 2}),
    "strided": (3, {"stride": 2, "padding": 1}),
    "all differ": ((2, 4), {"stride": (1, 3), "padding": (3, 2), "dilation": (2, 1)}),
    "one number in a tuple": (3, {"stride": (2,), "padding": (1,), "dilation": (2,)}),
    "same": ((3, 4), {"padding": "same", "dilation": (2, 1)}),
    "valid": ((2, 3), {"padding": "valid"}),
    "groups": (3, {"groups": 2, "padding": 1}),
    "depthwise": ((3, 5), {"groups": 4, "channels": 4, "padding": 2}),
    "all stored": (3, {"density": 1.0, "padding": 1}),
    "none stored": (3, {"density": 0.0, "padding": 1}),
    "circular": ((3, 5), {"padding": (1, 2), "padding_mode": "circular", "stride": 2}),
    "reflect": (3, {"padding": (2, 1), "padding_mode": "reflect", "groups": 2}),
    "replicate": ((4, 2), {"padding": "same", "padding_mode": "replicate"}),
}


def of_sequences(kernel: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    def last(n: Any) -> Any:
        return n[-1] if isinstance(n, tuple) and len(n) > 1 else n

    return last(kernel), {name: last(value) for name, value in options.items()}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dims", [1, 2])
def test_layers_match_dense_ones(format: str, dims: int, geometry: str) -> None:
    kernel, options = GEOMETRIES[geometry]
    if dims == 1:
        kernel, options = of_sequences(kernel, options)
    layer = make(format, kernel, dims=dims, **options)
    check(layer, torch.randn(3, layer.in_channels, *(9, 11)[-dims:]))
    check(layer, torch.randn(layer.in_channels, *(7, 6)[-dims:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 2, 17])
def test_batches(layout: str, batch: int, dtype: torch.dtype) -> None:
    for layer in (
        make(layout, padding=1, dtype=dtype, capacity=400),
        make(layout, 1, dtype=dtype),
        make(layout, dims=1, stride=2, dtype=dtype),
    ):
        check(layer, torch.randn(batch, C, *(5, 19)[-len(layer.kernel_size) :], dtype=dtype))


@pytest.mark.full
@pytest.mark.parametrize("kernel", [1, 2, 3, (1, 5), (5, 1), (4, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_geometry(format: str, dtype: torch.dtype, kernel: Any) -> None:
    grid = itertools.product(
        (1, 2, (1, 3)), (0, 1, (3, 0)), (1, (2, 1)), (1, 2, 4), ("zeros", "circular")
    )
    for stride, padding, dilation, groups, mode in grid:
        layer = make(
            format, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
            padding_mode=mode, dtype=dtype,
        )  # fmt: skip
        for size in ((9, 9), (13, 18), (10, 40)):
            for batch in (1, 3):
                x = torch.randn(batch, C, *size, dtype=dtype)
                check(layer, x)
                check(layer, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.full
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 33])
@pytest.mark.parametrize("channels", [1, 3, 16, 35])
def test_odd_numbers_of_channels(format: str, rows: int, channels: int) -> None:
    for kernel, padding in ((1, 0), (3, 1)):
        layer = make(format, kernel, rows=rows, channels=channels, padding=padding)
        for size in ((1, 1), (3, 2), (7, 7), (16, 17), (56, 56)):
            for batch in (1, 2, 16, 19):
                if batch * math.prod(size) < 5000 or batch == 1:
                    check(layer, torch.randn(batch, channels, *size))


def in_memory(x: Tensor) -> dict[str, Tensor]:
    """The same images in several orders of memory."""
    last = torch.channels_last
    n, c, h, w = x.shape
    return {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=last),
        "reversed": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "every other pixel": x.repeat_interleave(2, 3)[..., ::2],
        "some channels": torch.cat([x, x], 1).contiguous(memory_format=last)[:, :c],
        "expanded": x[:1].expand(n, c, h, w),
    }


@pytest.mark.parametrize(
    "shape", [(2, C, 5, 6), (1, C, 5, 6), (2, 1, 5, 6), (2, C, 1, 1), (3, C, 1, 6), (0, C, 5, 6),
              (1, 1, 1, 1)], ids=str
)  # fmt: skip
def test_outputs_lie_in_memory_as_those_of_dense_layers(layout: str, shape: Any) -> None:
    for kernel, options in ((1, {}), (3, {"padding": 1}), (3, {"padding": 1, "stride": 2})):
        layer = make(layout, kernel, channels=shape[1], **options)
        dense = layer.to_conv()
        for x in in_memory(torch.randn(shape)).values():
            assert layer(x).stride() == dense(x).stride()
            check(layer, x)


def test_channels_last_stays_through_both_passes(layout: str) -> None:
    layer = make(layout, padding=1)
    x = torch.randn(2, C, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    y.backward(torch.randn_like(y))
    for t in (y, x.grad):
        assert t.is_contiguous(memory_format=torch.channels_last)
        assert not t.is_contiguous()
    moved = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    assert torch.equal(moved(x), y)


def test_gradients_of_sums_and_of_slices(layout: str) -> None:
    """They have strides of zero, or strides that no tensor of their shape has."""
    layer, x = make(layout, padding=1), torch.randn(2, C, 5, 6)
    dense = layer.to_conv()
    for loss in (
        torch.sum,
        lambda y: y.mean((2, 3)).square().sum(),
        lambda y: (y[:, ::2, 1:].transpose(1, 3) * 2).square().sum(),
        lambda y: y.permute(1, 2, 3, 0).contiguous().square().sum(),
    ):
        got, want = (torch.autograd.grad(loss(module(x)), module.bias) for module in (layer, dense))
        torch.testing.assert_close(got, want)
        at = torch.from_numpy(layer.tensor().flat_indices())
        (got,) = torch.autograd.grad(loss(layer(x)), layer.values)
        (want,) = torch.autograd.grad(loss(dense(x)), dense.weight)
        torch.testing.assert_close(got, want.reshape(-1)[at])


@pytest.mark.parametrize("which", ["values", "x", "bias"])
def test_elements_at_odd_addresses(layout: str, which: str) -> None:
    layer = make(layout, padding=1)
    operands = {
        "values": layer.values.detach(),
        "x": torch.randn(2, C, 5, 6),
        "bias": layer.bias.detach(),
    }
    want = layer(operands["x"])
    good = operands[which]
    odd = torch.frombuffer(bytearray(good.nbytes + 1), dtype=good.dtype, offset=1)
    operands[which] = odd.reshape(good.shape).copy_(good)
    y = conv2d(
        operands["values"], layer.structure, operands["x"], operands["bias"],
        shape=layer.shape, padding=(1, 1, 1, 1),
    )  # fmt: skip
    assert torch.equal(y, want)


# -------------------------------------------------------------------------------- derivatives


def operands(format: str, groups: int = 1) -> tuple[Any, dict[str, Any]]:
    """A small layer in float64 and its geometry as the operators take it."""
    layer = make(
        format, (2, 3), rows=4, channels=4, groups=groups, density=0.5, dtype=torch.float64
    )
    geometry = {"stride": (2, 1), "padding": (1, 0, 0, 2), "dilation": (1, 2), "groups": groups}
    return layer, {"shape": layer.shape, **geometry}


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck(format: str, groups: int) -> None:
    layer, how = operands(format, groups)
    values, structure, capacity = layer.values, layer.structure, layer.capacity
    x, dy = leaf(1, 4, 3, 4), leaf(1, 4, 2, 2)
    check = torch.autograd.gradcheck
    assert check(lambda v, x, b: conv2d(v, structure, x, b, **how), (values, x, layer.bias))
    assert check(lambda v, dy: conv2d_input(v, structure, dy, (3, 4), **how), (values, dy))
    assert check(lambda dy, x: conv2d_weight(structure, dy, x, capacity=capacity, **how), (dy, x))


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
def test_gradcheck_of_fused_activations(activation: str) -> None:
    layer, how = operands("condensed", 2)
    numbers = list(how.values())

    def composed(v: Tensor, x: Tensor, b: Tensor) -> Tensor:
        return conv2d(v, layer.structure, x, b, activation=activation, **how)

    def operator(v: Tensor, x: Tensor, b: Tensor) -> Tensor:
        return torch.ops.spfmt.conv2d(v, layer.structure, x, b, *numbers, activation)

    for function in (composed, operator):
        assert torch.autograd.gradcheck(function, (layer.values, leaf(1, 4, 3, 4), layer.bias))


@pytest.mark.parametrize("wrt", ["values", "x", "bias"])
def test_double_backward_raises(wrt: str) -> None:
    layer, how = operands("csr")
    x = leaf(2, 4, 3, 4)
    inputs = {"values": layer.values, "x": x, "bias": layer.bias}
    for activation in (None, "silu"):
        y = torch.ops.spfmt.conv2d(
            layer.values, layer.structure, x, layer.bias, *how.values(), activation
        )
        (gradient,) = torch.autograd.grad(y.square().sum(), inputs[wrt], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.square().sum().backward()


def test_double_backward_of_the_gradients_raises() -> None:
    layer, how = operands("csr")
    x, dy, capacity = leaf(2, 4, 3, 4), leaf(2, 4, 2, 2), layer.capacity
    for result, inputs in (
        (conv2d_input(layer.values, layer.structure, dy, (3, 4), **how), [layer.values, dy]),
        (conv2d_weight(layer.structure, dy, x, capacity=capacity, **how), [dy, x]),
    ):
        for gradient in torch.autograd.grad(result.sum(), inputs, create_graph=True):
            with pytest.raises(RuntimeError, match="double backward"):
                gradient.square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("recording", [True, False])
def test_forward_mode_raises(recording: bool) -> None:
    layer, x = make(), torch.randn(1, C, 4, 4)
    with torch.set_grad_enabled(recording):
        with pytest.raises(RuntimeError, match="forward mode"):
            torch.func.jvp(layer, (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode"):
            layer(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("wants", ["values", "x", "bias"])
def test_backward_computes_only_what_is_asked(wants: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(padding=1), torch.randn(2, C, 5, 6)
    layer.requires_grad_(False)
    operands = {"values": layer.values, "x": x, "bias": layer.bias}
    operands[wants].requires_grad_()
    called = []
    for name in ("_conv2d_input", "_conv2d_weight"):
        op = getattr(convolution, name)
        monkeypatch.setattr(
            convolution, name, lambda *a, op=op, name=name: (called.append(name), op(*a))[1]
        )
    layer(x).sum().backward()
    assert called == {"values": ["_conv2d_weight"], "x": ["_conv2d_input"], "bias": []}[wants]
    assert operands[wants].grad is not None


def test_saves_only_what_backward_needs() -> None:
    layer, x = make(), torch.randn(2, C, 5, 6)
    layer.values.requires_grad_(False)
    alive = weakref.ref(x)
    y = layer(x)
    del x
    gc.collect()
    assert alive() is None
    assert y.requires_grad


def test_unused_capacity_has_zero_gradient(layout: str) -> None:
    layer = make(layout, capacity=400)
    layer(torch.randn(2, C, 5, 6)).sum().backward()
    assert torch.count_nonzero(layer.values.grad[layer.nnz :]) == 0
    assert torch.count_nonzero(layer.values.grad) > 0


def test_vmap_and_vectorized_jacobians(layout: str) -> None:
    layer = make(layout, padding=1, stride=2, dtype=torch.float64)
    x = torch.randn(3, 2, C, 5, 4, dtype=torch.float64)
    for images in (x, x[:, 0]):
        want = torch.stack([layer(image) for image in images])
        torch.testing.assert_close(torch.func.vmap(layer)(images), want)
    want = torch.stack([layer(image) for image in x], 1)
    torch.testing.assert_close(torch.func.vmap(layer, 3, 1)(x.movedim(0, 3)), want)
    several = torch.stack([layer.values.detach(), -layer.values.detach()])
    call = lambda values: torch.func.functional_call(layer, {"values": values}, (x[0],))  # noqa: E731
    want = torch.stack([call(values) for values in several])
    torch.testing.assert_close(torch.func.vmap(call)(several), want)
    jacobian = torch.autograd.functional.jacobian
    for function, at in ((layer, x[0, :1]), (call, several[0])):
        torch.testing.assert_close(jacobian(function, at, vectorize=True), jacobian(function, at))


# ------------------------------------------------------------------- opcheck, compile, export


@pytest.mark.parametrize(
    ("format", "order"),
    [("csr", torch.contiguous_format), ("shuffled_block", torch.channels_last)],
)
def test_opcheck(format: str, order: torch.memory_format) -> None:
    layer, how = operands(format)
    x, dy = (
        t.detach().contiguous(memory_format=order).requires_grad_()
        for t in (leaf(2, 4, 3, 4), leaf(2, 4, 2, 2))
    )
    (shape, *geometry), registered, check = how.values(), torch.ops.spfmt, torch.library.opcheck
    weight = layer.values, layer.structure
    check(registered.conv2d.default, (*weight, x, layer.bias, shape, *geometry))
    check(registered.conv2d.default, (*weight, x.detach(), None, shape, *geometry, "gelu"))
    check(registered.conv2d_input.default, (*weight, dy, shape, [3, 4], *geometry))
    check(
        registered.conv2d_weight.default,
        (layer.structure, dy, x, shape, layer.capacity, *geometry),
    )


@pytest.fixture
def fresh_graphs() -> Any:
    """Generate code anew: what an older version of spfmt left on disk is not under test."""
    torch._dynamo.reset()
    inductor = torch._inductor.config.patch(fx_graph_cache=False)
    with inductor, torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def agree(compiled: Any, layer: nn.Module, x: Tensor) -> None:
    """Both passes of a compiled module are those of the module itself."""
    results = []
    for module in (compiled, layer):
        x = x.detach().requires_grad_()
        y = module(x)
        results.append((y, *torch.autograd.grad(y.sum(), [x, *layer.parameters()])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert results[0][0].stride() == results[1][0].stride()


@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize(
    ("backend", "order"),
    [
        ("aot_eager", torch.contiguous_format),
        ("inductor", torch.channels_last),
        pytest.param("inductor", torch.contiguous_format, marks=pytest.mark.full),
    ],
)
def test_one_graph_for_every_batch_and_size(backend: str, order: torch.memory_format) -> None:
    layer = make("shuffled_block", padding=1, stride=2)
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=graphs, fullgraph=True, dynamic=True)
    for shape in ((2, C, 9, 10), (3, C, 12, 7), (5, C, 6, 11)):
        agree(compiled, layer, torch.randn(shape).contiguous(memory_format=order))
    assert graphs.frame_count == 1


@pytest.mark.usefixtures("fresh_graphs")
def test_sizes_become_dynamic_once() -> None:
    layer = make("csr", dims=1, padding="same", padding_mode="circular")
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    for batch, length in ((2, 9), (3, 12), (5, 6), (7, 31), (4, 8)):
        agree(compiled, layer, torch.randn(batch, C, length))
    assert graphs.frame_count == 2


@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("recording", [True, False])
def test_activations_and_single_images_compile(recording: bool) -> None:
    layer = make("condensed", dims=1)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(recording):
        for x in (torch.randn(C, 9), torch.randn(3, C, 9)):
            want = nn.functional.gelu(layer(x))
            torch.testing.assert_close(compiled(x, activation="gelu"), want)


@pytest.mark.usefixtures("fresh_graphs")
def test_a_compiled_layer_sees_values_and_structures(layout: str) -> None:
    layer = make(layout, padding=1)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    for seed in range(3):
        agree(compiled, layer, torch.randn(2, C, 5, 6))
        layer.set_structure(make(layout, seed=seed).tensor(), take_values=True)
        layer.values.data.mul_(2)
    assert graphs.frame_count == 1


@pytest.mark.usefixtures("fresh_graphs")
def test_a_compiled_layer_sees_options_written_later() -> None:
    layer, x = make(), torch.randn(2, C, 9, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for layer.padding in ((0, 0), (2, 1), "same"):
        agree(compiled, layer, x)


@pytest.mark.usefixtures("fresh_graphs")
def test_wrong_images_of_a_compiled_layer() -> None:
    compiled = torch.compile(make(), backend="aot_eager", fullgraph=True)
    for shape in ((2, C + 1, 5, 6), (C, 5), (2, C, 2, 2)):
        with pytest.raises(Exception, match="expected"):
            compiled(torch.randn(shape))


def test_export_with_dynamic_batch_and_size() -> None:
    model = nn.Sequential(make(padding=1, stride=2), nn.ReLU(), make("hrbp", 1, channels=R))
    batch, height, width = (
        torch.export.Dim(name, min=least, max=64) for name, least in (("n", 1), ("h", 3), ("w", 3))
    )
    program = torch.export.export(
        model, (torch.randn(4, C, 6, 7),), dynamic_shapes=({0: batch, 2: height, 3: width},)
    )
    assert program.graph_module.code.count("spfmt.conv2d") == 2
    for shape in ((1, C, 5, 5), (9, C, 12, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), model(x))


def test_symbolic_trace_keeps_a_layer_whole() -> None:
    model = nn.Sequential(make(), nn.ReLU(), make(dims=1))
    graph = torch.fx.symbolic_trace(model).graph
    assert [n.op for n in graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    sequence = make(dims=1)
    traced = torch.fx.symbolic_trace(nn.Sequential(sequence))
    x = torch.randn(2, C, 9)
    torch.testing.assert_close(traced(x), sequence(x))


def test_a_profiler_names_the_operators() -> None:
    layer, x = make(), torch.randn(2, C, 5, 6, requires_grad=True)
    with torch.profiler.profile() as profile:
        layer(x).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"spfmt::conv2d", "spfmt::conv2d_input", "spfmt::conv2d_weight"} <= names


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layer = make(groups=2, stride=2)
    with FlopCounterMode(display=False) as counter:
        y = layer(torch.randn(5, C, 9, 8, requires_grad=True))
        y.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * layer.nnz * (5 * 4 * 3)
