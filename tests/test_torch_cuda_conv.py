"""Convolutions on CUDA devices: on CPU tensors with the emulated kernels, and on a real device."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch_cuda_cases import DTYPES, Emulated, Place, check, check_replay  # noqa: E402

from spfmt.errors import FormatError, KernelNotFound  # noqa: E402
from spfmt.torch import SparseConv1d, SparseConv2d, conv2d, cuda_convolution  # noqa: E402
from spfmt.torch.cuda_convolution import _Maps  # noqa: E402

GROUPS: dict[str, dict[str, Any]] = {
    "shuffled_block": {"block_shape": (16, 4)},
    "hrbp": {"format_params": {"groups": 2}},
}
GEOMETRY: tuple[dict[str, Any], ...] = (
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "padding": (0, 1), "stride": 2},
    {"kernel_size": 2, "dilation": 2, "stride": (1, 2), "padding": 1},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 1, "stride": 2},
)
C_OUT, C_IN = 40, 12


def make(
    format: str, device: str = "cpu", dtype: Any = torch.float32, layer: Any = SparseConv2d,
    **options: Any,
) -> Any:  # fmt: skip
    options = {"density": 0.3, "kernel_size": 3, **GROUPS.get(format, {}), **options}
    generator = torch.Generator().manual_seed(0)
    made = layer(C_IN, C_OUT, format=format, generator=generator, **options)
    return made.to(device=device, dtype=dtype)


def images(layer: Any, *shape: int, last: bool = False, seed: int = 1) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(layer.values)
    return drawn.to(memory_format=torch.channels_last) if last else drawn


def twin(layer: Any, absolute: bool = False) -> Any:
    """Return the dense layer in float64, or that of the absolute values."""
    flat = torch.zeros(math.prod(layer.shape), dtype=torch.float64)
    flat[torch.from_numpy(layer.positions())] = layer.values.detach().double().cpu()[: layer.nnz]
    dense = layer._blank()
    bias = layer.bias.detach().double().cpu()
    dense.weight = nn.Parameter((flat.abs() if absolute else flat).view(layer.dense_shape))
    dense.bias = nn.Parameter(bias.abs() if absolute else bias)
    return dense


def gradients(layer: Any, x: torch.Tensor, dy: torch.Tensor) -> tuple[Any, ...]:
    """Return a dense layer's result, and its gradients of x and of the weight."""
    x = x.detach().double().cpu().requires_grad_()
    y = layer(x)
    y.backward(dy.double().cpu())
    return y.detach(), x.grad, layer.weight.grad.flatten()


def check_layer(layer: Any, x: torch.Tensor, place: Place) -> None:
    """Check a layer's result and all gradients, and how they lie in memory."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    with place.on():
        y = layer(x)
        dy = images(layer, *y.shape, seed=2).contiguous(memory_format=_format(y))
        y.backward(dy)
    want = gradients(twin(layer), x, dy)
    size = gradients(twin(layer, absolute=True), x.detach().abs(), dy.abs())
    where = torch.from_numpy(layer.positions())
    terms = max(layer.shape[1] * 9 + 1, layer.shape[0] * 9)
    check(y, want[0], size[0], terms)
    check(x.grad, want[1], size[1], terms)
    got = layer.values.grad
    check(got[: layer.nnz], want[2][where], size[2][where], dy[:, 0].numel())
    assert not got[layer.nnz :].any()
    assert y.dtype == x.grad.dtype == got.dtype == layer.values.dtype
    if x.dim() == 4 and layer.padding_mode == "zeros":  # torch pads others, and forgets the order
        assert y.is_contiguous(memory_format=_format(x))


def _format(x: torch.Tensor) -> torch.memory_format:
    last = x.dim() == 4 and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


# ----------------------------------------------------------------------------------- products


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", GROUPS)
def test_layers_compute_forward_and_backward(
    format: str, dtype: Any, last: bool, place: Place
) -> None:
    layer = make(format, place.device, dtype, padding=1, capacity=C_OUT * C_IN * 5)
    for batch in (1, 3, 8, 11):
        check_layer(layer, images(layer, batch, C_IN, 6, 5, last=last), place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sanitized(dtype: Any, place: Place) -> None:
    """A short run of both passes; what benchmarks/gpu.sh runs under compute-sanitizer."""
    layer = make("shuffled_block", place.device, dtype, padding=1, stride=2)
    for batch in (3, 9):
        check_layer(layer, images(layer, batch, C_IN, 6, 5), place)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
def test_every_geometry(geometry: dict[str, Any], last: bool, place: Place) -> None:
    layer = make("shuffled_block", place.device, **geometry)
    for batch in (2, 4):
        check_layer(layer, images(layer, batch, C_IN, 7, 6, last=last), place)


def test_sums_of_many_samples_are_shared(place: Place) -> None:
    layer = make("hrbp", place.device, kernel_size=1)
    check_layer(layer, images(layer, 16, C_IN, 20, 20), place)


def test_sequences(place: Place) -> None:
    layer = make("shuffled_block", place.device, layer=SparseConv1d, kernel_size=5, padding=2)
    for shape in ((4, C_IN, 30), (1, C_IN, 9)):
        check_layer(layer, images(layer, *shape), place)


def test_any_strides(place: Place) -> None:
    layer = make("shuffled_block", place.device, padding=1)
    plain = images(layer, 4, C_IN, 6, 5)
    with place.on(), torch.no_grad():
        for x in (
            plain.transpose(2, 3).contiguous().transpose(2, 3),
            images(layer, 8, C_IN, 12, 5)[::2, :, 1::2],
            plain[:1].expand(4, -1, -1, -1),
            plain[0],
        ):
            assert torch.equal(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))


def test_activations_follow(place: Place) -> None:
    layer = make("shuffled_block", place.device)
    x = images(layer, 2, C_IN, 5, 5)
    with place.on(), torch.no_grad():
        assert torch.equal(layer(x, activation="relu"), layer(x).relu())


def test_empty_operands(place: Place) -> None:
    layer = make("hrbp", place.device)
    x = images(layer, 0, C_IN, 5, 5).requires_grad_()
    with place.on():
        y = layer(x)
        y.sum().backward()
    assert y.shape == (0, C_OUT, 3, 3)
    assert x.grad.shape == x.shape
    assert not layer.values.grad.any()


def test_networks_train(place: Place) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        make("shuffled_block", padding=1, stride=2), nn.BatchNorm2d(C_OUT), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C_OUT, 2),
    ).to(place.device)  # fmt: skip
    x = torch.randn(8, C_IN, 6, 6, device=place.device)
    label = torch.arange(8, device=place.device) % 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    for _ in range(20):
        with place.on():
            loss = nn.functional.cross_entropy(model(x), label)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ------------------------------------------------------------------------------------- misuse


def test_formats_of_lists_and_groups_of_channels_have_no_kernels(place: Place) -> None:
    layer = make("condensed", place.device)
    x = images(layer, 2, C_IN, 5, 5)
    with place.on(), pytest.raises(KernelNotFound, match=r"condensed on CUDA.*project.*densify"):
        layer(x)
    layer = make("shuffled_block", place.device, groups=2)
    with place.on(), pytest.raises(KernelNotFound, match=r"in 2 groups on CUDA.*\.cpu\(\)"):
        layer(x)


def test_operands_that_do_not_fit(emulated: Emulated) -> None:
    products, layer = emulated.products, make("shuffled_block")
    values, structure = layer.values.detach(), layer.structure
    how = ((C_OUT, C_IN, 3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    x = torch.zeros(2, C_IN, 5, 5)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((values, structure, x[:, 1:], None, *how), "x of shape"),
        ((values, structure, x.half(), None, *how), "one dtype"),
        ((values, structure, x, torch.zeros(3), *how), "bias"),
        ((values[:9], structure, x, None, *how), "9 values"),
        ((values, structure, x.to("meta"), None, *how), "one device"),
        ((values, structure, x[:, :, :2], None, *how), "maps no smaller"),
    ]
    for operands, message in cases:
        with pytest.raises(FormatError, match=message):
            products.conv2d(*operands)
    with pytest.raises(KernelNotFound, match=r"float64.*float16 on CUDA"):
        products.conv2d(values.double(), structure, x.double(), None, *how)
    wrong = torch.zeros(2, C_OUT, 9, 9)
    with pytest.raises(FormatError, match="dy with maps of 9 x 9"):
        products.conv2d_input(values, structure, wrong, how[0], (5, 5), *how[1:])
    with pytest.raises(FormatError, match="dy with maps of 9 x 9"):
        products.conv2d_weight(structure, wrong, x, how[0], layer.capacity, *how[1:])


def test_maps_that_kernels_cannot_count(place: Place) -> None:
    with pytest.raises(FormatError, match="pass fewer images"):
        _Maps(torch.empty(4096, 64, 112, 112, device="meta"))
    with pytest.raises(KernelNotFound, match=r"1 x 32768 pixels on CUDA.*32767"):
        _Maps(torch.empty(1, 1, 1, 2**15, device="meta"))
    # From row 32768 on, the kernel's pixels are beyond 16 bits: so are those of rows that are none.
    far = make("shuffled_block", place.device, kernel_size=1, stride=(4096, 1), padding=(20000, 0))
    with place.on(), torch.no_grad(), pytest.raises(KernelNotFound, match="padded maps"):
        far(images(far, 8, C_IN, 10, 4))
    wide = make("shuffled_block", place.device, kernel_size=1, stride=(4096, 1), padding=(8192, 0))
    check_layer(wide, images(wide, 8, C_IN, 10, 4), place)
    far = make("shuffled_block", place.device, kernel_size=1, stride=(65, 64))
    with place.on(), torch.no_grad(), pytest.raises(KernelNotFound, match="stride"):
        far(images(far, 1, C_IN, 70, 70))
    check_layer(make("hrbp", place.device, stride=9, padding=1), images(far, 2, C_IN, 5, 4), place)


def test_shapes_are_known_before_there_is_a_device() -> None:
    with FakeTensorMode():
        values, structure = (
            torch.empty(9, dtype=d, device="cuda") for d in (torch.bfloat16, torch.int32)
        )
        x = torch.empty(2, C_IN, 5, 5, dtype=torch.bfloat16, device="cuda")
        y = conv2d(values, structure, x, shape=(C_OUT, C_IN, 3, 3))
        assert (tuple(y.shape), y.dtype, y.device.type) == ((2, C_OUT, 3, 3), x.dtype, "cuda")


def test_operators_are_registered() -> None:
    for op in ("conv2d", "conv2d_input", "conv2d_weight"):
        assert "CUDA" in torch._C._dispatch_dump(f"spfmt::{op}")
        assert callable(getattr(cuda_convolution, f"{op}_cuda"))


# ------------------------------------------------------------------------------ on a real device


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("batch", [1, 5, 8])
def test_a_graph_replays_on_new_images(batch: int) -> None:
    layer = make("shuffled_block", "cuda", torch.bfloat16, padding=1)
    x = images(layer, batch, C_IN, 6, 5, last=True)
    check_replay(layer, x, images(layer, batch, C_OUT, 6, 5, last=True, seed=2))


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
def test_operators_keep_torchs_rules_on_a_device() -> None:
    layer = make("shuffled_block", "cuda")
    how = ([C_OUT, C_IN, 3, 3], [1, 1], [0, 0, 0, 0], [1, 1], 1)
    x = images(layer, 2, C_IN, 6, 5).requires_grad_()
    dy = images(layer, 2, C_OUT, 4, 3, seed=2)
    values, structure = layer.values, layer.structure
    ops = torch.ops.spfmt
    torch.library.opcheck(ops.conv2d, (values, structure, x, layer.bias, *how))
    torch.library.opcheck(ops.conv2d_input, (values, structure, dy, how[0], [6, 5], *how[1:]))
    torch.library.opcheck(ops.conv2d_weight, (structure, dy, x, how[0], layer.capacity, *how[1:]))


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_on_a_device() -> None:
    layer = make("hrbp", "cuda", padding=1)
    x = images(layer, 4, C_IN, 6, 5)
    torch.testing.assert_close(torch.compile(layer)(x), layer(x))


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
def test_autocast_on_a_device() -> None:
    layer = make("shuffled_block", "cuda")
    x = images(layer, 8, C_IN, 6, 5)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.values.grad.dtype == torch.float32
    assert torch.equal(y, layer.to(torch.bfloat16)(x.bfloat16()))
