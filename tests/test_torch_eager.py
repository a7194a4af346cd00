"""Past torch's dispatcher where nothing looks into a call, through it everywhere else."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from spfmt.torch import SparseLinear, functional  # noqa: E402
from spfmt.torch._eager import is_ordinary, is_unobserved  # noqa: E402


@pytest.fixture
def layer():
    return SparseLinear(16, 12, density=0.3, generator=torch.Generator().manual_seed(0))


def test_eager_and_dispatched_agree_with_gradients(layer, monkeypatch):
    x = torch.randn(4, 16, requires_grad=True)
    parameters = [x, layer.values, layer.bias]
    quick = torch.autograd.grad(layer(x).square().sum(), parameters)
    monkeypatch.setattr(functional, "is_unobserved", lambda: False)
    long = torch.autograd.grad(layer(x).square().sum(), parameters)
    for a, b in zip(quick, long, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_modes_see_the_operator(layer):
    seen = []

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for mode in (Dispatch(), Function()):
        seen.clear()
        with mode:
            layer(torch.randn(2, 16))
        assert "spfmt.spmm.default" in seen


def test_profiler_names_the_operator(layer):
    with torch.profiler.profile() as profile:
        layer(torch.randn(2, 16))
    assert "spfmt::spmm" in {event.name for event in profile.events()}


def test_only_ordinary_tensors_are_quick():
    class Sub(torch.Tensor):
        pass

    x = torch.randn(2, 3)
    assert is_ordinary(x, None, torch.nn.Parameter(x))
    assert not is_ordinary(x.as_subclass(Sub))
    assert not is_ordinary(x.to("meta"))
    assert not is_ordinary(torch._neg_view(x))
    assert not is_ordinary(x.to_sparse())
    assert not is_ordinary(torch._efficientzerotensor((2, 3)))
    assert is_unobserved()
    with torch.autocast("cpu"):
        assert not is_unobserved()


def test_lazily_negated_input(layer):
    x = torch.randn(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(torch._neg_view(x)), layer(-x))


def test_strided_bias(layer):
    bias = torch.randn(24)[::2]
    x = torch.zeros(2, 16)
    y = functional.spmm(
        layer.values, layer.structure, x, bias, shape=layer.shape, format=layer.format
    )
    torch.testing.assert_close(y.detach(), bias.expand(2, 12))


def test_nothing_is_recorded_inside_the_kernel_of_another_operator(layer):
    @torch.library.custom_op("spfmt_test::wrapped", mutates_args=())
    def wrapped(x: torch.Tensor) -> torch.Tensor:
        y = layer(x)
        assert not y.requires_grad
        return y

    wrapped(torch.randn(2, 16, requires_grad=True))
