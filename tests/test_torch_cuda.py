"""The operators on CUDA devices: on CPU tensors with the emulated kernels, and on a real device.

Tests with the parameter `place` run in both; those marked ``cuda`` need a device.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from format_cases import OPTIONS

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch_cuda_cases import DTYPES, Emulated, OnEmulation, Place, check, check_replay  # noqa: E402

from spfmt.cuda import library  # noqa: E402
from spfmt.errors import DeviceError, FormatError, KernelNotFound  # noqa: E402
from spfmt.formats import get_format  # noqa: E402
from spfmt.torch import SparseLinear, cuda, freeze, sddmm, spmm, spmm_t, words  # noqa: E402
from spfmt.torch.words import Structures  # noqa: E402

R, C = 40, 48


@pytest.fixture(params=OPTIONS)
def format(request: pytest.FixtureRequest) -> str:
    return request.param


def make(
    format: str = "condensed", device: str = "cpu", dtype: Any = torch.float32, **options: Any
) -> SparseLinear:
    generator = torch.Generator().manual_seed(0)
    options = {"density": 0.25, **OPTIONS[format], **options}
    layer = SparseLinear(C, R, format=format, generator=generator, **options)
    return layer.to(device=device, dtype=dtype)


def another(layer: SparseLinear, seed: int = 7) -> Any:
    """Return another structure for a layer."""
    cls, rng = get_format(layer.format), np.random.default_rng(seed)
    return cls.from_scores(rng.random(layer.shape), layer.target_density, **layer.format_params)


def dense(layer: SparseLinear) -> torch.Tensor:
    """Return a layer's weight in float64, on the CPU."""
    flat = torch.zeros(math.prod(layer.shape), dtype=torch.float64)
    flat[torch.from_numpy(layer.positions())] = layer.values.detach().double().cpu()[: layer.nnz]
    return flat.view(layer.shape)


def random(*shape: int, like: SparseLinear, seed: int = 1) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(like.values)


def check_layer(layer: SparseLinear, batch: int, place: Place, tf32: bool = False) -> None:
    """Check a layer's result and all gradients."""
    rows, columns = layer.shape
    x, dy = random(batch, columns, like=layer), random(batch, rows, like=layer, seed=2)
    x.requires_grad_()
    layer.zero_grad()
    with place.on():
        y = layer(x)
        y.backward(dy)
    w, x64, dy64 = dense(layer), x.detach().double().cpu(), dy.double().cpu()
    bias = layer.bias.detach().double().cpu()
    check(y, x64 @ w.T + bias, x64.abs() @ w.abs().T + bias.abs(), columns + 1, tf32)
    check(x.grad, dy64 @ w, dy64.abs() @ w.abs(), rows, tf32)
    where = torch.from_numpy(layer.positions())
    got = layer.values.grad
    want, size = (dy64.T @ x64).flatten()[where], (dy64.abs().T @ x64.abs()).flatten()[where]
    check(got[: layer.nnz], want, size, batch, tf32)
    assert not got[layer.nnz :].any()
    assert y.dtype == x.grad.dtype == got.dtype == layer.values.dtype


# ----------------------------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_compute_forward_and_backward(format: str, dtype: Any, place: Place) -> None:
    layer = make(format, place.device, dtype, capacity=R * C // 2)
    for batch in (1, 5, 16, 17, 64):
        check_layer(layer, batch, place)


def test_tf32_where_torch_allows_it(emulated: Emulated) -> None:
    place = Place("cpu")
    place._emulated = emulated
    layer = make("shuffled_block")
    x = random(17, C, like=layer)
    results = []
    for tf32 in (False, True):
        emulated.tf32 = tf32
        check_layer(layer, 17, place, tf32)
        with place.on():
            results.append(layer(x))
    assert not torch.equal(*results)


@pytest.mark.parametrize("height", [16, 64, 100, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_every_height(height: int, dtype: Any, place: Place) -> None:
    tensor = get_format("shuffled_block").random(
        (201, 131), 0.3, np.random.default_rng(0), block_shape=(height, 3)
    )
    layer = SparseLinear.from_tensor(tensor, torch.zeros(201)).to(place.device, dtype)
    for batch in (7, 65, 129):
        check_layer(layer, batch, place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sanitized(format: str, dtype: Any, place: Place) -> None:
    """A short run of both passes; what benchmarks/gpu.sh runs under compute-sanitizer."""
    layer = make(format, place.device, dtype)
    for batch in (5, 33):
        check_layer(layer, batch, place)


@pytest.mark.parametrize("rows", [64, 128])
def test_wgmma_where_it_is_wanted(rows: int, place: Place) -> None:
    options = {"format": "shuffled_block", "block_shape": (rows, 4), "density": 0.3}
    layer = SparseLinear(96, 128, dtype=torch.bfloat16, device=place.device, **options)
    x = random(72, 96, like=layer)
    with place.on(), torch.no_grad():
        want = layer(x)
        if not place.uses_wgmma():
            pytest.skip("the device has no wgmma")
        got = layer(x)
        assert torch.equal(layer(x[:9]), want[:9])  # for few samples as before
    torch.testing.assert_close(got, want, rtol=2.0**-7, atol=1e-3)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_follow(activation: str, place: Place) -> None:
    layer = make("csr", place.device)
    x = random(3, C, like=layer)
    with place.on():
        trained = layer(x, activation=activation)
        with torch.no_grad():
            y = layer(x, activation=activation)
            z = layer(x)
    assert torch.equal(trained, y)
    wanted = {"relu": torch.relu, "silu": nn.functional.silu, "gelu": nn.functional.gelu}
    tanh = nn.GELU(approximate="tanh")
    torch.testing.assert_close(y, wanted.get(activation, tanh)(z))


@pytest.mark.parametrize("batch", [3, 40])
def test_any_strides(format: str, batch: int, place: Place) -> None:
    layer = make(format, place.device)
    plain = random(batch, C, like=layer)
    turned = plain.T.contiguous().T
    padded = random(batch, 2 * C + 1, like=layer)[:, 1 : 2 * C : 2]
    row = plain[:1].expand(batch, C)
    every_other = random(2 * batch, C, like=layer)[::2]
    with place.on(), torch.no_grad():
        for x in (plain, turned, padded, row, every_other):
            assert torch.equal(layer(x), layer(x.clone(memory_format=torch.contiguous_format)))


def test_empty_operands(format: str, place: Place) -> None:
    layer = make(format, place.device)
    x = random(0, C, like=layer).requires_grad_()
    with place.on():
        y = layer(x)
        y.sum().backward()
    assert y.shape == (0, R)
    assert x.grad.shape == (0, C)
    assert not layer.values.grad.any()


def test_empty_layers(place: Place) -> None:
    for rows, cols in ((0, 4), (4, 0), (4, 3)):
        tensor = get_format("csr").from_dense(np.zeros((rows, cols), np.float32))
        layer = SparseLinear.from_tensor(tensor, torch.ones(rows), capacity=2).to(place.device)
        x = torch.ones(2, cols, device=place.device, requires_grad=True)
        with place.on():
            y = layer(x)
            y.sum().backward()
        assert torch.equal(y.cpu(), torch.ones(2, rows))
        assert not x.grad.any()
        assert not layer.values.grad.any()


def test_frozen_layers(place: Place) -> None:
    layer = make("nm", place.device)
    x = random(4, C, like=layer)
    with place.on(), torch.no_grad():
        assert torch.equal(layer(x), freeze(layer)(x))


# ------------------------------------------------------------------------------------- misuse


def test_operands_that_do_not_fit(emulated: Emulated) -> None:
    products, layer = emulated.products, make("csr")
    values, structure = layer.values.detach(), layer.structure
    x = torch.zeros(2, C)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((values, structure, x[:, 1:], None, (R, C)), "x of shape"),
        ((values, structure, x.half(), None, (R, C)), "one dtype"),
        ((values, structure, x, torch.zeros(R + 1), (R, C)), "bias"),
        ((values[:9], structure, x, None, (R, C)), "9 values"),
        ((values, structure, x.new_zeros(2, R), None, (C, R)), "structure of shape"),
        ((values, torch.zeros(40, dtype=torch.int32), x, None, (R, C)), "magic"),
        ((values, structure, x.to("meta"), None, (R, C)), "one device"),
        ((values, structure, x, None, (R, C), "swish"), "swish"),
    ]
    for operands, message in cases:
        with pytest.raises(FormatError, match=message):
            products.spmm(*operands)
    with pytest.raises(KernelNotFound, match=r"float64.*float16 on CUDA.*\.float\(\)"):
        products.spmm(values.double(), structure, x.double(), None, (R, C))
    with pytest.raises(FormatError, match="at least"):
        products.sddmm(structure, torch.zeros(2, R), x, (R, C), 3)


def test_tensors_of_cuda_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_found", lambda: (None, "not here; fix: there"))
    cuda.products.cache_clear()
    try:
        with pytest.raises(KernelNotFound, match="no CUDA kernels: not here; fix: there"):
            cuda.spmm_cuda()
    finally:
        cuda.products.cache_clear()
    table = torch._C._dispatch_dump("spfmt::spmm")
    assert "CUDA" in table


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_shapes_are_known_before_there_is_a_device(dtype: Any) -> None:
    # Without gradients: torch without CUDA aborts where autograd meets such tensors.
    with FakeTensorMode():
        values, x, bias, dy = (
            torch.empty(s, dtype=dtype, device="cuda") for s in (9, (3, C), R, (3, R))
        )
        structure = torch.empty(50, dtype=torch.int32, device="cuda")
        calls = {
            (3, R): lambda: spmm(values, structure, x, bias, shape=(R, C)),
            (3, C): lambda: spmm_t(values, structure, dy, shape=(R, C)),
            (9,): lambda: sddmm(structure, dy, x, shape=(R, C), capacity=9),
        }
        for shape, call in calls.items():
            if dtype == torch.float64:
                with pytest.raises(KernelNotFound, match=r"float64.*float16 on CUDA"):
                    call()
                continue
            y = call()
            assert (tuple(y.shape), y.dtype, y.device.type) == (shape, dtype, "cuda")


def test_autocast_computes_in_its_dtype() -> None:
    from spfmt.torch import ops

    seen = []

    def op(*operands: Any) -> torch.Tensor:
        seen.extend(t.dtype for t in operands if isinstance(t, torch.Tensor))
        return operands[2]

    values, structure = torch.zeros(3), torch.zeros(3, dtype=torch.int32)
    wanted = torch.get_autocast_dtype("cuda")
    y = ops._autocast(op, "cuda")(values, structure, torch.zeros(2).bfloat16(), None, (2, 2))
    assert seen == [wanted, torch.int32, wanted]
    assert y.dtype == wanted
    y = ops._autocast(op, "cuda")(values.double(), structure, torch.zeros(2).double())
    assert y.dtype == torch.float64


# ------------------------------------------------------------------------- what is known of words


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count how often words are read."""
    count = [0]
    decode = words.decode_structure

    def counted(array: Any) -> Any:
        count[0] += 1
        return decode(array)

    monkeypatch.setattr(words, "decode_structure", counted)
    monkeypatch.setattr(words, "EVERY", 1e9)
    return count


def test_words_are_read_once(emulated: Emulated, read: list[int]) -> None:
    layer = make()
    x = random(3, C, like=layer).requires_grad_()
    with OnEmulation(emulated.products):
        for _ in range(3):
            layer(x).sum().backward()
    assert read == [1]


def test_a_moved_structure_is_seen(format: str, place: Place) -> None:
    layer = make(format, place.device)
    check_layer(layer, 5, place)
    layer.set_structure(another(layer))
    check_layer(layer, 5, place)
    layer.load_state_dict(make(format).state_dict())
    check_layer(layer, 5, place)


def test_counted_writes_are_seen(place: Place) -> None:
    layer, other = make("csr", place.device), make("csr", place.device)
    other.set_structure(another(other))
    for write in (
        lambda: layer.structure.copy_(other.structure),
        lambda: layer.structure.detach()[:].copy_(other.structure),
        lambda: torch._foreach_copy_([layer.structure.view(-1)], [other.structure]),
    ):
        layer.structure.copy_(make("csr", place.device).structure)
        check_layer(layer, 5, place)
        with torch.no_grad():
            write()
        assert np.array_equal(layer.positions(), other.positions())
        check_layer(layer, 5, place)


def test_equal_content_is_compared_where_it_lies(read: list[int]) -> None:
    layer, structures = make(), Structures(lambda: False)
    found = structures.of(layer.structure)
    for _ in range(4):  # DDP broadcasts buffers before every forward pass
        layer.structure.copy_(layer.structure.clone())
        assert structures.of(layer.structure) is found
    assert read == [2]  # once after the first write, of which nothing was known to compare with
    layer.structure.copy_(torch.from_numpy(layer._words_of(another(layer))))
    assert structures.of(layer.structure) is not found


def test_uncounted_writes_are_found_late(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, capturing = make("csr"), [False]
    structures = Structures(lambda: capturing[0])
    other = torch.from_numpy(layer._words_of(another(layer)))
    found = structures.of(layer.structure)
    layer.structure.data.copy_(other)
    assert structures.of(layer.structure) is found  # torch counted nothing
    monkeypatch.setattr(words, "EVERY", 0)
    capturing[0] = True
    assert structures.of(layer.structure) is found  # nothing arrives in a capture
    capturing[0] = False
    with pytest.raises(FormatError, match=r"without torch counting.*set_structure"):
        structures.of(layer.structure)
    assert np.array_equal(structures.of(layer.structure).flat_indices(), layer.positions())


def test_corrupt_words_raise_every_time() -> None:
    layer, structures = make("csr"), Structures(lambda: False)
    structures.of(layer.structure)
    layer.structure[7] += 1
    for _ in range(2):
        with pytest.raises(FormatError, match="checksum"):
            structures.of(layer.structure)


def test_tensors_that_died_are_forgotten(read: list[int]) -> None:
    structures, layer = Structures(lambda: False), make()
    for _ in range(20):  # tensors and memory come to lie where others were
        structure = layer.structure.clone()
        structures.of(structure)
    del structure
    gc.collect()
    assert not structures._known
    assert read == [20]


def test_tensors_of_inference_are_compared(read: list[int]) -> None:
    structures = Structures(lambda: False)
    with torch.inference_mode():
        layer = make("csr")
        for _ in range(3):
            found = structures.of(layer.structure)
        layer.structure.copy_(torch.from_numpy(layer._words_of(another(layer))))
        assert structures.of(layer.structure) is not found
    assert read == [3]


def test_what_is_written_need_not_be_read(read: list[int]) -> None:
    structures, layer = Structures(lambda: False), make("csr")
    structures.know(layer.structure, layer._decoded(), layer.structure.numpy())
    assert structures.of(layer.structure) is layer._decoded()
    assert read == [0]


# -------------------------------------------------------------------- captures, streams, uploads


def captured(emulated: Emulated) -> contextlib.AbstractContextManager[None]:
    @contextlib.contextmanager
    def capture() -> Iterator[None]:
        emulated.capturing = True
        yield
        emulated.capturing = False

    return capture()


def test_a_capture_needs_what_was_there_before(emulated: Emulated) -> None:
    layer = make("csr")
    products, values = emulated.products, layer.values.detach()
    x, dy = random(3, C, like=layer), random(3, R, like=layer)
    with captured(emulated), pytest.raises(DeviceError, match=r"not known while.*once before"):
        products.spmm(values, layer.structure, x, None, (R, C))
    y = products.spmm(values, layer.structure, x, None, (R, C))
    with captured(emulated):
        assert torch.equal(products.spmm(values, layer.structure, x, None, (R, C)), y)
        with pytest.raises(DeviceError, match=r"not on cpu while.*backward passes"):
            products.spmm_t(values, layer.structure, dy, (R, C))
    layer.set_structure(another(layer))
    with captured(emulated), pytest.raises(DeviceError, match="once before"):
        products.spmm(values, layer.structure, x, None, (R, C))


def test_what_a_graph_captured_stays(emulated: Emulated) -> None:
    uploads = emulated.products._uploads
    for capture in (False, True):
        layer = make("csr")
        structure, where = layer._decoded(), torch.device("cpu")
        uploads.get(structure, False, where)
        if capture:
            with captured(emulated):
                uploads.get(structure, False, where)
        del layer, structure
        gc.collect()
        assert not uploads._of
        assert len(uploads._captured) == capture


def test_uploads_wait_for_the_streams_that_use_them(emulated: Emulated) -> None:
    uploads, structure = emulated.products._uploads, make("csr")._decoded()
    found = uploads.get(structure, False, torch.device("cpu"))
    assert not emulated.kept
    for emulated.number in (5, 5, 0, 6):
        assert uploads.get(structure, False, torch.device("cpu")) is found
    assert [id(t) for t in emulated.kept] == [id(t) for t in (*found.tensors, *found.tensors)]


# ------------------------------------------------------------------------------ on a real device


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
def test_a_graph_replays_on_new_operands(format: str) -> None:
    layer = make(format, "cuda")
    check_replay(layer, random(20, C, like=layer), random(20, R, like=layer))


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_capture_of_a_fresh_layer_says_what_to_do() -> None:
    layer = make("csr", "cuda")
    x = random(3, C, like=layer)
    torch.cuda.synchronize()
    with pytest.raises(DeviceError, match="once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        layer(x)


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
def test_products_run_on_the_current_stream() -> None:
    layer = make("shuffled_block", "cuda")
    x = torch.zeros(64, C, device="cuda")
    with torch.no_grad():
        layer(x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            x.normal_()
            y = layer(x)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(y, layer(x))


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
def test_products_wait_for_nothing() -> None:
    layer = make("nm", "cuda")
    x = random(20, C, like=layer).requires_grad_()
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
def test_what_a_layer_wrote_is_not_read(read: list[int]) -> None:
    layer = make("csr", "cuda")
    x = random(5, C, like=layer)
    layer(x)
    assert read == [1]
    layer.set_structure(another(layer))
    layer(x)
    assert read == [1]


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_a_device(dtype: Any) -> None:
    layer = make("condensed", "cuda")
    x = random(20, C, like=layer)
    with torch.autocast("cuda", dtype=dtype):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert layer.values.grad.dtype == torch.float32
    assert torch.equal(y, layer.to(dtype)(x.to(dtype)))


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
def test_the_other_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    place = Place("cuda:1")
    check_layer(make("hrbp", "cuda:1"), 20, place)
    check_layer(make("csr", "cuda:1"), 5, place)


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_on_a_device() -> None:
    layer = make("csr", "cuda")
    x = random(20, C, like=layer)
    torch.testing.assert_close(torch.compile(layer)(x), layer(x))
    layer.set_structure(another(layer))
    torch.testing.assert_close(torch.compile(layer)(x), layer(x))


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
def test_operators_keep_torchs_rules_on_a_device(format: str) -> None:
    layer = make(format, "cuda")
    x, dy = random(20, C, like=layer).requires_grad_(), random(20, R, like=layer)
    values, structure, shape = layer.values, layer.structure, [R, C]
    ops = torch.ops.spfmt
    torch.library.opcheck(ops.spmm, (values, structure, x, layer.bias, shape))
    torch.library.opcheck(ops.spmm_t, (values, structure, dy, shape))
    torch.library.opcheck(ops.sddmm, (structure, dy, x, shape, layer.capacity))
