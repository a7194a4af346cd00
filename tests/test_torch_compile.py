"""Products inside graphs compiled by Inductor: called directly, never stale, still explained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from format_cases import OPTIONS
from fresh_python import run_python

torch = pytest.importorskip("torch")

from test_torch_ops import WRITES  # noqa: E402
from torch import nn  # noqa: E402
from torch._inductor.lowering import lowerings  # noqa: E402
from torch._inductor.utils import run_and_get_code  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.torch import SparseLinear, _compiled, spmm, spmm_t, values  # noqa: E402

# torch.compile imports parts of torch that use its own deprecated torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    """Generate code anew: what an older version of spfmt left on disk is not under test."""
    inductor = torch._inductor.config.patch(fx_graph_cache=False)
    torch._dynamo.reset()
    with inductor, torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


def layer(format: str = "condensed", seed: int = 0, **options: Any) -> SparseLinear:
    options = {"density": 0.3, **OPTIONS[format], **options}
    generator = torch.Generator().manual_seed(seed)
    return SparseLinear(16, 12, format=format, generator=generator, **options)


def code_of(call: Callable[[], Any]) -> tuple[Any, str]:
    result, code = run_and_get_code(call)
    return result, "\n".join(code)


def assert_direct(code: str, *functions: str) -> None:
    assert "torch.ops.spfmt" not in code
    assert all(f"{function}(" in code for function in functions)


# ------------------------------------------------------------------------------- what is called


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("format", OPTIONS)
def test_both_passes_call_functions_and_agree(format: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(
        layer(format, dtype=dtype),
        SparseLinear(12, 8, format="csr", density=0.4, bias=False, dtype=dtype),
    )
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 16, dtype=dtype, requires_grad=True)
    inputs = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), inputs)
    got, code = code_of(lambda: torch.autograd.grad(compiled(x).square().sum(), inputs))
    assert_direct(code, "spmm_into_v1", "spmm_t_into_v1", "sddmm_into_v1")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        y, code = code_of(lambda: compiled(x))
        assert_direct(code, "spmm_into_v1")
        torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_a_fused_activation_is_part_of_the_call(activation: str) -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(3, 2, 16)
    with torch.no_grad():
        y, code = code_of(lambda: compiled(x, activation=activation))
        assert_direct(code, "spmm_into_v1")
        assert f"activation='{activation}'" in code
        torch.testing.assert_close(y, module(x, activation=activation))


def test_spare_capacity_gets_no_gradient() -> None:
    module = layer("csr", capacity=80)
    module.compile(fullgraph=True)
    module(torch.randn(4, 16)).sum().backward()
    assert torch.count_nonzero(module.values.grad[: module.nnz]) > 0
    assert torch.count_nonzero(module.values.grad[module.nnz :]) == 0


def test_any_strides_of_inputs_and_gradients() -> None:
    module = layer()
    compiled = torch.compile(lambda x: module(x).t(), fullgraph=True, dynamic=False)
    for x in (
        torch.randn(16, 6).t(),
        torch.randn(6, 32)[:, ::2],
        torch.randn(1, 16).expand(6, 16),
        torch.randn(7, 16)[1:],
    ):
        x = x.detach().requires_grad_()
        y = compiled(x)
        torch.testing.assert_close(y, module(x).t())
        weights = torch.randn_like(y).t().contiguous().t()
        got = torch.autograd.grad(y, x, weights)
        torch.testing.assert_close(got, torch.autograd.grad(module(x).t(), x, weights))


def test_one_graph_for_every_batch() -> None:
    module = layer("shuffled_block")
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    compiled(torch.randn(5, 16))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (2, 9, 64):
            x = torch.randn(batch, 16)
            torch.testing.assert_close(compiled(x), module(x))
    for batch in (0, 1):
        x = torch.randn(batch, 16)
        torch.testing.assert_close(compiled(x), module(x))


def test_autocast_computes_in_float32() -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, module(x.float()).bfloat16())


def test_a_profiler_names_the_operator() -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(2, 16)
    compiled(x)
    with torch.profiler.profile() as profile:
        y = compiled(x)
    assert "spfmt::spmm" in {event.name for event in profile.events()}
    torch.testing.assert_close(y, module(x))


def test_debug_logging_names_the_kernel(caplog: pytest.LogCaptureFixture) -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(2, 16)
    with torch.no_grad(), caplog.at_level(logging.DEBUG, logger="spfmt"):
        y = compiled(x)
    assert any("spmm lists float32: kernel" in message for message in caplog.messages)
    torch.testing.assert_close(y, module(x))


# ------------------------------------------------------------------------------------- identity


def test_every_write_to_the_values_is_seen() -> None:
    module = SparseLinear(
        40, 30, format="shuffled_block", density=0.3, bias=False, block_shape=(8, 4)
    )
    compiled = torch.compile(module, fullgraph=True)
    x = torch.eye(40)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            before = compiled(x).detach().clone()
        for write in WRITES:
            write(module)
            with mode():
                after = compiled(x).detach().clone()
            assert not torch.equal(before, after), write.__name__
            torch.testing.assert_close(after.T, torch.from_numpy(module.tensor().to_dense()))
            before = after


@pytest.mark.parametrize("transposed", [False, True])
def test_writes_of_generated_code_are_seen(transposed: bool) -> None:
    """It writes in place without advancing the version, and here where no sample is taken."""
    module = SparseLinear(256, 256, format="csr", density=0.25, bias=False)
    shape, structure, last = module.shape, module.structure, module.nnz - 2
    product = spmm_t if transposed else spmm

    def multiply(values: Any, x: Any) -> Any:
        return product(values, structure, x, shape=shape)

    def write_between(values: Any, x: Any) -> Any:
        before = multiply(values, x)
        values[last] = -100.0
        return before, multiply(values, x)

    def write_before(values: Any, x: Any) -> Any:
        values[last] = 50.0
        return multiply(values, x)

    x = torch.randn(64, 256)
    with torch.no_grad():
        values = module.values.detach().clone()
        same = values.clone()
        for function in (write_between, write_before):
            multiply(values, x)  # packed and remembered
            result, code = code_of(lambda f=function: torch.compile(f, fullgraph=True)(values, x))
            assert_direct(code, f"{product.__name__}_into_v1")
            torch.testing.assert_close(result, function(same, x))


def test_values_that_a_graph_computes_are_never_taken_for_others() -> None:
    """Generated code gives one buffer to several tensors, one after the other."""
    module = SparseLinear(256, 256, format="csr", density=0.25, bias=False)
    masks = torch.ones(3, module.capacity)
    masks[1, module.nnz - 2] = -100.0
    masks[2, module.nnz - 2] = 50.0

    def chain(values: Any, masks: Any, x: Any) -> Any:
        for mask in masks:
            scaled = values * mask * x.sum().tanh()  # known only after the product before
            x = torch.tanh(spmm(scaled, module.structure, x, shape=module.shape))
        return x

    x = torch.randn(64, 256)
    with torch.no_grad():
        values = module.values.detach()
        result, code = code_of(lambda: torch.compile(chain, fullgraph=True)(values, masks, x))
        assert_direct(code, "spmm_into_v1")
        torch.testing.assert_close(result, chain(values, masks, x), rtol=1e-4, atol=1e-4)


def test_every_new_structure_is_seen_without_compiling_again() -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(4, 16, requires_grad=True)

    def compare() -> None:
        dense = torch.from_numpy(module.tensor().to_dense())
        y, weights = compiled(x), torch.randn(4, 12)
        torch.testing.assert_close(y, nn.functional.linear(x, dense, module.bias))
        (dx,) = torch.autograd.grad(y, x, weights)
        torch.testing.assert_close(dx, weights @ dense)

    compare()
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in (1, 2):
            module.set_structure(layer(seed=seed).tensor(), take_values=True)
            compare()
            other = layer(seed=10 + seed)  # as a broadcast of buffers writes it
            module.structure.data.copy_(other.structure)
            module.values.data.copy_(other.values.detach())
            compare()
            module.load_state_dict(layer(seed=20 + seed).state_dict())
            compare()


def test_steps_of_training_agree_with_eager_ones() -> None:
    models = [nn.Sequential(layer("nm"), nn.Tanh(), nn.Linear(12, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(32, 16), torch.randint(3, (32,))
    for model, call in ((models[0], models[0]), (models[1], torch.compile(models[1]))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(call(x), y).backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_freed_memory_that_comes_back_is_another_tensor() -> None:
    @torch.compile(fullgraph=True)
    def product(values: Any, structure: Any, x: Any) -> Any:
        return spmm(values, structure, x, shape=(24, 32))

    x, addresses = torch.eye(32), set()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(40):
            module = SparseLinear(
                32, 24, format="csr", density=0.25, bias=False, generator=generator
            )
            addresses.add((module.values.data_ptr(), module.structure.data_ptr()))
            y = product(module.values.detach(), module.structure, x)
            torch.testing.assert_close(y.T, torch.from_numpy(module.tensor().to_dense()))
            del module
    assert len(addresses) < 40  # otherwise this test has tested nothing


def test_inference_mode_and_inference_tensors() -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(4, 16)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), module(x))
        module.values.mul_(2)
        torch.testing.assert_close(compiled(x), module(x))
        inside = layer()
        compiled = torch.compile(inside, fullgraph=True)
        for seed in (1, 2):
            inside.values.mul_(2)
            torch.testing.assert_close(compiled(x), inside(x))
            inside.load_state_dict(layer(seed=seed).state_dict())
            torch.testing.assert_close(compiled(x), layer(seed=seed)(x))


# --------------------------------------------------------------------------------------- errors


def test_bad_operands_of_a_compiled_product_are_explained() -> None:
    @torch.compile(fullgraph=True, dynamic=True)
    def product(values: Any, structure: Any, x: Any, bias: Any = None) -> Any:
        return spmm(values, structure, x, bias, shape=(12, 16))

    module, x = layer("csr"), torch.randn(3, 16)
    values, structure = module.values.detach(), module.structure
    torch.testing.assert_close(product(values, structure, x, module.bias.detach()), module(x))
    with torch.no_grad():
        with pytest.raises(FormatError, match="at least"):
            product(values[:-1], structure, x)
        with pytest.raises(FormatError, match="checksum"):
            product(values, torch.cat([structure[:-1], structure[-1:] + 1]), x)
        with pytest.raises(FormatError, match=r"shape \(12, 16\)"):
            product(values, SparseLinear(12, 16, density=0.1).structure, x)
        odd = torch.frombuffer(bytearray(x.nbytes + 1), dtype=x.dtype, offset=1).reshape(x.shape)
        torch.testing.assert_close(
            product(values, structure, odd.copy_(x)), spmm(values, structure, x, shape=(12, 16))
        )
    for wrong in (torch.randn(3, 15), torch.randn(3, 16, dtype=torch.float64)):
        with pytest.raises(Exception, match="expected"):
            product(values, structure, wrong)


def test_the_next_product_after_an_error_is_right() -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(2, 16)
    with torch.no_grad():
        good = module.structure.clone()
        y = compiled(x)
        module.structure[-1] += 1
        with pytest.raises(FormatError, match="checksum"):
            compiled(x)
        module.structure.copy_(good)
        torch.testing.assert_close(compiled(x), y)


# --------------------------------------------------------------- torch versions that lack something


def test_inductor_is_not_imported_before_anybody_compiles() -> None:
    code = (
        "import sys, torch\n"
        "from spfmt.torch import SparseConv2d, SparseLinear\n"
        "SparseConv2d(4, 4, 3, density=0.5)(torch.zeros(1, 4, 5, 5)).sum().backward()\n"
        "layer = SparseLinear(8, 8, density=0.5)\n"
        "layer(torch.zeros(1, 8)).sum().backward()\n"
        "assert 'spfmt.torch._lowerings' not in sys.modules\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "assert 'torch._inductor.lowering' not in sys.modules\n"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_the_dispatcher_is_the_announced_alternative(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(_compiled, "_lowered", False)
    monkeypatch.setattr(_compiled, "importlib", SimpleNamespace(import_module=missing))
    for name in ("spmm", "spmm_t", "sddmm"):
        monkeypatch.delitem(lowerings, getattr(torch.ops.spfmt, name).default, raising=False)
    module = layer()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(2, 16)
    with caplog.at_level(logging.WARNING, logger="spfmt.torch"):
        y, code = code_of(lambda: compiled(x))
    assert "torch.ops.spfmt.spmm" in code
    assert [m for m in caplog.messages if "dispatcher" in m and "no spfmt.torch" in m]
    torch.testing.assert_close(y, module(x))


def test_torch_without_its_table_of_functions(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Tensor:
        pass

    monkeypatch.setattr(values, "Tensor", Tensor)
    with caplog.at_level(logging.INFO, logger="spfmt.torch"):
        assert not values._connect()
    assert "DLPack" in caplog.text
    monkeypatch.setattr(values._kernels, "multiply_tensors", lambda *_: None)
    monkeypatch.setattr(values._kernels, "sample_tensors", lambda *_: None)
    module = layer()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(3, 16, requires_grad=True)
    dense = torch.from_numpy(module.tensor().to_dense())
    for call in (module, compiled):
        y, weights = call(x), torch.randn(3, 12)
        torch.testing.assert_close(y, nn.functional.linear(x, dense, module.bias))
        (dx,) = torch.autograd.grad(y, x, weights)
        torch.testing.assert_close(dx, weights @ dense)
        with torch.no_grad():
            torch.testing.assert_close(call(x, activation="relu"), y.detach().relu())
