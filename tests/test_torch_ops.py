"""The torch operators: products and gradients, fakes, compile, export, errors, caching."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from format_cases import LAYOUTS, OPTIONS
from fresh_python import run_python

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad  # noqa: E402

from spfmt.errors import FormatError, KernelNotFound  # noqa: E402
from spfmt.formats import get_format  # noqa: E402
from spfmt.torch import SparseLinear, ops, sddmm, spmm, spmm_t  # noqa: E402
from spfmt.torch import values as values_module  # noqa: E402

# torch.compile imports parts of torch that use its own deprecated torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

R, C = 12, 16


def make(format: str, *, dtype=torch.float64, extra: int = 3, density: float = 0.25):
    """Return values (with spare capacity), structure words and the dense weight."""
    rng = np.random.default_rng(0)
    scores = rng.random((R, C))
    tensor = get_format(format).from_scores(scores, density, values=scores, **OPTIONS[format])
    layer = SparseLinear.from_tensor(tensor, capacity=tensor.nnz + extra, dtype=dtype)
    return layer.values, layer.structure, torch.from_numpy(tensor.to_dense()).to(dtype)


@pytest.fixture(params=LAYOUTS.values())
def format(request) -> str:
    return request.param


# ---------------------------------------------------------------------------------- products


def test_products_match_dense(format):
    values, structure, dense = make(format)
    x, dy, bias = (torch.randn(s, dtype=torch.float64) for s in ((5, C), (5, R), (R,)))
    weight = {"shape": (R, C)}
    torch.testing.assert_close(spmm(values, structure, x, bias, **weight), x @ dense.T + bias)
    torch.testing.assert_close(spmm(values, structure, x, **weight), x @ dense.T)
    torch.testing.assert_close(spmm_t(values, structure, dy, **weight), dy @ dense)
    got = sddmm(structure, dy, x, capacity=values.numel(), **weight)
    rows, cols = np.nonzero(dense.numpy())
    full = dy.T @ x
    assert torch.count_nonzero(got[-3:]) == 0
    torch.testing.assert_close(got.sum(), full[rows, cols].sum())


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_any_strides_and_batch(format, batch):
    values, structure, dense = make(format)
    weight = {"shape": (R, C)}
    column_major = torch.randn(C, batch, dtype=torch.float64).T
    strided = torch.randn(batch, 2 * C, dtype=torch.float64)[:, ::2]
    expanded = torch.randn(1, C, dtype=torch.float64).expand(batch, C)
    for x in (column_major, strided, expanded):
        torch.testing.assert_close(spmm(values, structure, x, **weight), x @ dense.T)


@pytest.mark.parametrize("which", ["values", "x", "bias"])
def test_elements_at_odd_addresses_are_moved(which):
    values, structure, dense = make("csr", extra=0)
    operands = {
        "values": values.detach(),
        "x": torch.randn(3, C, dtype=torch.float64),
        "bias": torch.randn(R, dtype=torch.float64),
    }
    good = operands[which]
    odd = torch.frombuffer(bytearray(good.nbytes + 1), dtype=good.dtype, offset=1)
    operands[which] = odd.reshape(good.shape).copy_(good)
    y = spmm(operands["values"], structure, operands["x"], operands["bias"], shape=(R, C))
    torch.testing.assert_close(y, operands["x"] @ dense.T + operands["bias"])


# --------------------------------------------------------------------------------- gradients


def test_gradcheck(format):
    values, structure, _ = make(format, extra=0)
    x, dy = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, C), (3, R)))
    bias = torch.randn(R, dtype=torch.float64, requires_grad=True)
    weight = {"shape": (R, C)}
    check = torch.autograd.gradcheck
    assert check(lambda v, x, b: spmm(v, structure, x, b, **weight), (values, x, bias))
    assert check(lambda v, dy: spmm_t(v, structure, dy, **weight), (values, dy))
    capacity = values.numel()
    assert check(lambda dy, x: sddmm(structure, dy, x, capacity=capacity, **weight), (dy, x))


def test_unused_capacity_has_zero_gradient():
    values, structure, _ = make("csr", extra=5)
    x = torch.randn(4, C, dtype=torch.float64)
    spmm(values, structure, x, shape=(R, C)).sum().backward()
    assert torch.count_nonzero(values.grad[-5:]) == 0
    assert torch.count_nonzero(values.grad[:-5]) > 0


@pytest.mark.parametrize("wants", ["values", "x", "bias"])
def test_backward_computes_only_what_is_asked(wants, monkeypatch):
    values, structure, _ = make("csr")
    operands = {
        "values": values.detach(),
        "x": torch.randn(3, C, dtype=torch.float64),
        "bias": torch.randn(R, dtype=torch.float64),
    }
    operands[wants].requires_grad_()
    called = []
    for name in ("sddmm", "spmm_t"):
        op = getattr(ops, f"_{name}")
        monkeypatch.setattr(
            ops, f"_{name}", lambda *a, op=op, name=name, **k: (called.append(name), op(*a, **k))[1]
        )
    y = spmm(operands["values"], structure, operands["x"], operands["bias"], shape=(R, C))
    y.sum().backward()
    assert called == {"values": ["sddmm"], "x": ["spmm_t"], "bias": []}[wants]
    assert operands[wants].grad is not None


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("strided", [False, True])
def test_values_that_are_trained_are_never_packed(batch, strided):
    """Packing them costs more than a small product, and the next step has others."""
    layer = SparseLinear(64, 48, density=0.2)
    x = torch.randn(batch, 128)[:, ::2] if strided else torch.randn(batch, 64)
    x.requires_grad_()
    plan, nnz = layer._decoded().plan, layer.nnz
    y = layer(x)
    y.square().sum().backward()
    trained = plan.nbytes
    layer(x, activation="gelu").square().sum().backward()
    assert plan.nbytes == trained
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)
    assert plan.nbytes >= trained + 4 * nnz  # which evaluation does


def test_saves_only_what_backward_needs():
    values, structure, _ = make("csr")
    x = torch.randn(3, C, dtype=torch.float64)
    alive = weakref.ref(x)
    y = spmm(values.detach(), structure, x, torch.zeros(R, dtype=x.dtype, requires_grad=True),
             shape=(R, C))  # fmt: skip
    del x
    gc.collect()
    assert alive() is None
    assert y.requires_grad


@pytest.mark.parametrize("recording", [True, False])
def test_forward_mode_raises_and_never_drops_a_tangent(format, recording):
    values, structure, _ = make(format)
    x, tangent = torch.randn(2, C, dtype=torch.float64), torch.ones(2, C, dtype=torch.float64)

    def product(v, x):
        return spmm(v, structure, x, shape=(R, C))

    with torch.set_grad_enabled(recording):
        with pytest.raises(RuntimeError, match="forward mode"):
            torch.func.jvp(lambda x: product(values, x), (x,), (tangent,))
        with forward_ad.dual_level():
            with pytest.raises(RuntimeError, match="forward mode"):
                product(forward_ad.make_dual(values.detach(), values.detach()), x)
            product(values, x)  # no tangent, nothing to lose


@pytest.mark.parametrize("wrt", ["x", "values"])
def test_double_backward_raises(wrt):
    values, structure, _ = make("condensed")
    x = torch.randn(3, C, dtype=torch.float64, requires_grad=True)
    y = spmm(values, structure, x, shape=(R, C))
    (gradient,) = torch.autograd.grad(y.sum(), x if wrt == "x" else values, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


# ------------------------------------------------------------------- opcheck, compile, export


def test_opcheck(format):
    values, structure, _ = make(format)
    x, dy = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, C), (3, R)))
    bias = torch.randn(R, dtype=torch.float64, requires_grad=True)
    registered, shape = torch.ops.spfmt, [R, C]
    torch.library.opcheck(registered.spmm.default, (values, structure, x, bias, shape))
    torch.library.opcheck(registered.spmm.default, (values.detach(), structure, x, None, shape))
    torch.library.opcheck(registered.spmm_t.default, (values, structure, dy, shape))
    torch.library.opcheck(registered.sddmm.default, (structure, dy, x, shape, values.numel()))


def test_compile_forward_and_backward():
    layers = torch.nn.Sequential(
        SparseLinear(16, 24, format="nm", density=0.25, m=4),
        torch.nn.GELU(),
        SparseLinear(24, 8, format="shuffled_block", density=0.3, block_shape=(4, 4)),
    )
    compiled = torch.compile(layers, fullgraph=True)
    x = torch.randn(5, 16, requires_grad=True)
    expected = torch.autograd.grad(layers(x).square().sum(), [x, *layers.parameters()])
    got = torch.autograd.grad(compiled(x).square().sum(), [x, *layers.parameters()])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_export_with_dynamic_batch():
    model = torch.nn.Sequential(SparseLinear(16, 8, density=0.25), torch.nn.ReLU())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.randn(4, 3, 16),), dynamic_shapes=({0: batch},))
    assert "spfmt.spmm" in program.graph_module.code
    for size in (1, 9):
        x = torch.randn(size, 3, 16)
        torch.testing.assert_close(program.module()(x), model(x))


# -------------------------------------------------------------------------------- activations

TORCH_ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
def test_activations_and_their_gradients(format, activation):
    values, structure, dense = make(format, extra=0)
    weight = {"shape": (R, C)}
    x, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, C), (R,)))
    expected = TORCH_ACTIVATIONS[activation](x @ dense.T + bias)
    with torch.no_grad():
        fused = spmm(values, structure, x, bias, activation=activation, **weight)
    recorded = spmm(values, structure, x, bias, activation=activation, **weight)
    torch.testing.assert_close(fused, expected.detach())
    torch.testing.assert_close(recorded, expected)

    def composed(v, x, b):
        return spmm(v, structure, x, b, activation=activation, **weight)

    def operator(v, x, b):
        return torch.ops.spfmt.spmm(v, structure, x, b, (R, C), activation)

    for function in (composed, operator):
        assert torch.autograd.gradcheck(function, (values, x, bias))


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
def test_opcheck_of_fused_products(activation):
    values, structure, _ = make("condensed", dtype=torch.float32)
    x, bias = torch.randn(3, C, requires_grad=True), torch.randn(R, requires_grad=True)
    for operands in ((values, structure, x, bias), (values, structure, x.detach(), None)):
        torch.library.opcheck(torch.ops.spfmt.spmm, (*operands, (R, C), activation))


def test_fused_products_refuse_second_derivatives():
    values, structure, _ = make("csr")
    x = torch.randn(3, C, dtype=torch.float64, requires_grad=True)
    y = torch.ops.spfmt.spmm(values, structure, x, None, (R, C), "silu")
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_layers_with_activations_compile():
    layer = SparseLinear(16, 24, density=0.25)
    x = torch.randn(5, 2, 16)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
            got = compiled(x, activation="gelu")
            torch.testing.assert_close(got, torch.nn.functional.gelu(layer(x)))
    with pytest.raises(FormatError, match="activation='elu'"):
        layer(x, activation="elu")
    assert list(layer.state_dict()) == ["values", "bias", "structure"]


def test_activations_are_fused_where_no_gradient_is_recorded(monkeypatch):
    layer = SparseLinear(16, 24, density=0.25)
    called = []
    product = ops._spmm
    monkeypatch.setattr(ops, "_spmm", lambda *args: called.append(args[5:]) or product(*args))
    layer(torch.zeros(1, 16), activation="relu").sum().backward()
    with torch.no_grad():
        layer(torch.zeros(1, 16), activation="relu")
    layer.requires_grad_(False)(torch.zeros(1, 16), activation="relu")
    assert called == [(), ("relu",), ("relu",)]


# ------------------------------------------------------------------------------------ errors


def test_errors_are_clear():
    values, structure, _ = make("csr")
    weight = {"shape": (R, C)}
    good = torch.randn(3, C, dtype=torch.float64)
    cases = [
        ((values, structure, good[:, 1:]), r"\(3, 15\).*\(B, 16\)"),
        ((values, structure, good[None]), r"\(1, 3, 16\)"),
        ((values, structure, good.float()), "float32"),
        ((values, structure, good, torch.zeros(R + 1, dtype=torch.float64)), "bias"),
        ((values[:3], structure, good), "3 values"),
        ((values, structure.long(), good), "int64"),
        ((values, torch.zeros(40, dtype=torch.int32), good), "magic"),
    ]
    for operands, message in cases:
        with pytest.raises(FormatError, match=message):
            spmm(*operands, **weight)
    with pytest.raises(FormatError, match=r"shape \(12, 16\)"):
        spmm(values, structure, torch.randn(3, R, dtype=good.dtype), shape=(C, R))
    with pytest.raises(FormatError, match="one batch size"):
        sddmm(structure, good[:2, :R], good, capacity=values.numel(), **weight)
    with pytest.raises(FormatError, match="one device"):
        spmm(values, structure, good.to("meta"), **weight)


@pytest.mark.parametrize("shape", [(12,), (12, 16, 1), (2**70, 16), (-1, 16), (12.0, 16), None])
def test_what_is_no_shape_is_refused(shape):
    values, structure, _ = make("csr")
    x, dy = torch.zeros(1, C, dtype=torch.float64), torch.zeros(1, R, dtype=torch.float64)
    weight = {"shape": shape}
    for call in (
        lambda: spmm(values.detach(), structure, x, **weight),
        lambda: spmm(values, structure, x, **weight),
        lambda: spmm_t(values.detach(), structure, dy, **weight),
        lambda: sddmm(structure, dy, x, capacity=values.numel(), **weight),
    ):
        with pytest.raises(FormatError, match=r"shape .*; expected two ints.*fix:"):
            call()


@pytest.mark.parametrize("freed", ["values", "structure", "x", "bias"])
def test_a_freed_storage_is_refused(freed):
    """Sharded modules free their parameters so; torch's own operators raise too."""
    values, structure, _ = make("csr")
    operands = {
        "values": values.detach().clone(),
        "structure": structure.clone(),
        "x": torch.randn(3, C, dtype=torch.float64),
        "bias": torch.randn(R, dtype=torch.float64),
    }
    operands[freed].untyped_storage().resize_(0)
    values, structure, x, bias = operands.values()
    weight = {"shape": (R, C)}
    dy = torch.randn(3, R, dtype=torch.float64)
    calls = [
        lambda: spmm(values, structure, x, bias, **weight),
        lambda: spmm(values, structure, x, bias, activation="relu", **weight),
    ]
    if freed in ("values", "structure"):
        calls.append(lambda: spmm_t(values, structure, dy, **weight))
    if freed in ("structure", "x"):
        calls.append(lambda: sddmm(structure, dy, x, capacity=values.numel(), **weight))
    for call in calls:
        with pytest.raises(FormatError, match="freed"):
            call()


def test_capacity_may_be_any_integer():
    values, structure, _ = make("csr")
    dy, x = torch.randn(3, R, dtype=torch.float64), torch.randn(3, C, dtype=torch.float64)
    weight = {"shape": (R, C)}
    expected = sddmm(structure, dy, x, capacity=values.numel(), **weight)
    found = sddmm(structure, dy, x, capacity=np.int64(values.numel()), **weight)
    torch.testing.assert_close(found, expected)


def test_corrupt_words_are_refused():
    values, structure, _ = make("csr")
    broken = structure.clone()
    broken[-1] ^= 1
    with pytest.raises(FormatError):
        spmm(values, broken, torch.zeros(1, C, dtype=torch.float64), shape=(R, C))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_has_no_kernel(dtype):
    values, structure, _ = make("csr", dtype=dtype)
    with pytest.raises(KernelNotFound, match="autocast"):
        spmm(values, structure, torch.zeros(1, C, dtype=dtype), shape=(R, C))


def test_autocast_computes_in_float32_and_returns_its_own_dtype():
    values, structure, dense = make("csr", dtype=torch.float32)
    x = torch.randn(3, C).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = spmm(values, structure, x, shape=(R, C))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, (x.float() @ dense.T).bfloat16())
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert values.grad.dtype == torch.float32


def test_autocast_leaves_doubles():
    values, structure, dense = make("csr", dtype=torch.float64)
    x = torch.randn(3, C, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = spmm(values, structure, x, shape=(R, C))
        assert y.dtype == torch.nn.functional.linear(x, dense).dtype == torch.float64
        with pytest.raises(FormatError, match="float64"):
            spmm(values, structure, x.float(), shape=(R, C))
    torch.testing.assert_close(y, x @ dense.T)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    layer = SparseLinear(16, 12, density=0.25)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(5, 16, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * layer.nnz * 5


def test_vmap_and_vectorized_jacobians(format):
    values, structure, dense = make(format, extra=2)
    x = torch.randn(4, 3, C, dtype=torch.float64)
    product = lambda v, x: spmm(v, structure, x, shape=(R, C))  # noqa: E731
    mapped = torch.func.vmap(lambda x: product(values, x))
    torch.testing.assert_close(mapped(x), x @ dense.T)
    several = torch.stack([values.detach(), 2 * values.detach()])
    torch.testing.assert_close(
        torch.func.vmap(lambda v: product(v, x[0]))(several),
        torch.stack([x[0] @ dense.T, 2 * x[0] @ dense.T]),
    )
    jacobian = torch.autograd.functional.jacobian
    for wrt in (lambda x: product(values, x), lambda v: product(v, x[0])):
        at = x[0] if wrt.__code__.co_varnames[0] == "x" else values.detach()
        torch.testing.assert_close(jacobian(wrt, at, vectorize=True), jacobian(wrt, at))


# -------------------------------------------------------------------------- identity, caching


def forward(layer: SparseLinear) -> torch.Tensor:
    """Return the layer's dense weight as its own product sees it."""
    return layer(torch.eye(layer.in_features, dtype=layer.values.dtype)).T


def optimizer_step(layer):
    layer.values.grad = torch.ones_like(layer.values)
    torch.optim.SGD([layer.values], lr=0.5).step()


def fused_step(layer):
    layer.values.grad = torch.ones_like(layer.values)
    torch.optim.AdamW([layer.values], lr=0.5, fused=True).step()


def no_grad_add(layer):
    with torch.no_grad():
        layer.values[3] += 1.0


def inference_add(layer):
    with torch.inference_mode():
        layer.values[3].add_(1.0)


def data_copy(layer):
    layer.values.data.copy_(torch.randn_like(layer.values))


def data_mul(layer):
    layer.values.data.mul_(0.5)


def data_swap(layer):
    layer.values.data = torch.randn_like(layer.values)


def numpy_write(layer):
    layer.values.detach().numpy()[:] *= 2


def load(layer):
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["values"] += 1
    layer.load_state_dict(state)


def one_data_write(layer):
    layer.values.data[1] += 7.0


def view_write(layer):
    layer.values.detach().view(-1)[2].sub_(3.0)


def preserved_version(layer):
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(layer.values):
        layer.values[4] += 5.0


WRITES = [optimizer_step, fused_step, no_grad_add, inference_add, data_copy, data_mul, data_swap,
          numpy_write, load, one_data_write, view_write, preserved_version]  # fmt: skip


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES, ids=lambda w: w.__name__)
def test_every_write_is_seen(write, mode, format):
    layer = SparseLinear(40, 30, format=format, density=0.3, bias=False)
    for _ in range(2):
        with mode():
            before = forward(layer).clone()
        write(layer)
        with mode():
            after = forward(layer)
        assert not torch.equal(before, after)
        expected = torch.from_numpy(layer.tensor().to_dense())
        torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("batch", [1, 8])
def test_constant_values_are_known_until_they_are_written(batch):
    layer = SparseLinear(40, 30, density=0.3, bias=False)
    values, x = layer.values.detach().clone(), torch.randn(batch, 40)
    product = lambda: spmm(values, layer.structure, x, shape=(30, 40))  # noqa: E731
    before = product()
    promise = values_module.Constant(values)
    values = promise.values
    torch.testing.assert_close(product(), before, rtol=0, atol=0)
    values.numpy()[:] *= 2  # breaks the promise, unseen: small batches use what was packed
    torch.testing.assert_close(product(), before)
    values[0] += 0  # a counted write ends it
    torch.testing.assert_close(product(), 2 * before)
    del promise
    gc.collect()
    values.numpy()[:] *= 2
    torch.testing.assert_close(product(), 4 * before)


def test_writing_the_same_structure_again_keeps_what_was_compiled():
    """DDP broadcasts buffers before every forward pass."""
    layer = SparseLinear(16, 12, density=0.25)
    layer(torch.zeros(1, 16))
    compiled = values_module.compiled_structure(layer.structure)
    layer.structure.copy_(layer.structure.clone())
    assert values_module.compiled_structure(layer.structure) is compiled


def test_a_reused_address_is_not_mistaken_for_the_old_tensor():
    """Free and allocate values and structures of one size until addresses come back (ABA)."""
    x = torch.eye(32)
    generator = torch.Generator().manual_seed(0)
    addresses = set()
    with torch.no_grad():
        for _ in range(50):
            layer = SparseLinear(32, 24, density=0.25, bias=False, generator=generator)
            addresses.add((layer.values.data_ptr(), layer.structure.data_ptr()))
            torch.testing.assert_close(layer(x).T, torch.from_numpy(layer.tensor().to_dense()))
            del layer
    assert len(addresses) < 50  # otherwise this test has tested nothing


def test_plans_of_dead_structures_are_dropped():
    layers = [SparseLinear(8, 8, density=0.5) for _ in range(5)]
    for layer in layers:
        layer(torch.zeros(1, 8))
    del layer, layers
    gc.collect()
    keep = SparseLinear(8, 8, density=0.5)
    keep(torch.zeros(1, 8))
    assert all(not entry.is_dead() for entry in values_module._compiled.values())


def test_inference_tensors_work_and_are_never_stale():
    with torch.inference_mode():
        layer = SparseLinear(16, 12, density=0.25, bias=False)
        for _ in range(2):
            layer.values.mul_(2)
            dense = torch.from_numpy(layer.tensor().to_dense())
            torch.testing.assert_close(forward(layer), dense)
        other = SparseLinear(16, 12, density=0.25, bias=False)
        layer.structure.copy_(other.structure)
        layer.values.copy_(other.values)
        torch.testing.assert_close(forward(layer), forward(other))


def test_without_torch_the_import_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import spfmt\n"
        "for name in ('torch', 'train'):\n"
        "    try: getattr(spfmt, name)\n"
        "    except spfmt.MissingDependency as error: assert 'pip install' in str(error), error\n"
        "    else: raise AssertionError(name)\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
