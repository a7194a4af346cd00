"""Past torch's dispatcher where nothing looks into a call, through it everywhere else."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from spfmt import _kernels  # noqa: E402
from spfmt.torch import SparseLinear, ops  # noqa: E402


@pytest.fixture
def layer():
    return SparseLinear(16, 12, density=0.3, generator=torch.Generator().manual_seed(0))


def test_eager_and_dispatched_agree_with_gradients(layer, monkeypatch):
    x = torch.randn(4, 16, requires_grad=True)
    parameters = [x, layer.values, layer.bias]
    quick = torch.autograd.grad(layer(x).square().sum(), parameters)
    monkeypatch.setattr(ops, "_is_unobserved", lambda: False)
    long = torch.autograd.grad(layer(x).square().sum(), parameters)
    for a, b in zip(quick, long, strict=True):
        torch.testing.assert_close(a, b)  # they may pack values or not, which orders sums otherwise


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
    assert ops._is_ordinary(x, None, torch.nn.Parameter(x))
    assert not ops._is_ordinary(x.as_subclass(Sub))
    assert not ops._is_ordinary(x.to("meta"))
    assert not ops._is_ordinary(torch._neg_view(x))
    assert not ops._is_ordinary(x.to_sparse())
    assert not ops._is_ordinary(torch._efficientzerotensor((2, 3)))
    assert ops._is_unobserved()
    with torch.autocast("cpu"):
        assert not ops._is_unobserved()


def test_compiled_products_check_their_arguments(layer):
    x, out = torch.randn(2, 16), torch.full((2, 12), 7.0)
    values, structure = layer.values.detach(), layer.structure
    weight = values, structure, x, None, (12, 16)
    multiply, sample = _kernels.multiply_tensors, _kernels.sample_tensors
    for function in (multiply, sample):
        with pytest.raises(TypeError):
            function()
    for op in (-1, 2):
        with pytest.raises(IndexError, match="operation"):
            multiply(op, *weight, 0, None, 1, False)
    for op, activation in ((0, 5), (0, -1), (1, 1)):
        with pytest.raises(IndexError, match="activation"):
            multiply(op, *weight, activation, None, 1, False)
    assert multiply(0, *weight, 0, out, 1, False) is out
    torch.testing.assert_close(out, layer(x).detach() - layer.bias.detach())
    with pytest.raises(TypeError):
        _kernels.use_torch(torch.Tensor)


def declined(layer):
    """Yield operands of spmm, (values, structure, x, bias, shape, out), with one flaw."""
    good = {
        "values": layer.values.detach(), "structure": layer.structure, "x": torch.randn(3, 16),
        "bias": torch.randn(12), "shape": (12, 16), "out": torch.ones(3, 12),
    }  # fmt: skip
    yield good
    flaws = [
        ("values", [good["values"][:-1], good["values"].double(), good["values"].repeat(2)[::2]]),
        ("values", [good["values"].view(1, -1), None, good["values"].numpy()]),
        ("structure", [layer.structure.long(), layer.structure.view(1, -1), None]),
        ("x", [torch.randn(16), torch.randn(3, 15), torch.randn(3, 16).double(), None]),
        ("x", [torch.randn(3, 16).to("meta"), torch.randn(3, 16).to_sparse(), "x"]),
        ("x", [torch._neg_view(torch.randn(3, 16)), torch._efficientzerotensor((3, 16))]),
        ("bias", [torch.randn(11), torch.randn(12).double(), torch.randn(24)[::2], 0]),
        ("shape", [(16, 12), (12,), "ab", None, (12.0, 16), ("12", "16"), (12, None)]),
        ("shape", [(2**70, 16), (12 + 2**64, 16), (-1, 16)]),
        ("out", [torch.ones(3, 11), torch.ones(2, 12), torch.ones(36), torch.ones(3, 12).half()]),
    ]
    for name, values in flaws:
        for value in values:
            yield {**good, name: value}


def test_compiled_products_decline_what_is_not_plain(layer):
    results = []
    for case in declined(layer):
        operands = [case[n] for n in ("values", "structure", "x", "bias", "shape")]
        out = case["out"].fill_(1)
        results.append(_kernels.multiply_tensors(0, *operands, 0, out, 1, False))
        assert (out == 1).all() == (results[-1] is None)  # declined before anything was written
    assert results[0] is not None
    assert results[1:] == [None] * (len(results) - 1)


def test_compiled_gradients_decline_what_is_not_plain(layer):
    x, dy, weight = torch.randn(3, 16), torch.randn(3, 12), ((12, 16),)
    sample, words, nnz = _kernels.sample_tensors, layer.structure, layer.nnz
    assert sample(words, dy, x, *weight, nnz, None, 1).shape == (nnz,)
    assert sample(words, dy, x, *weight, nnz - 1, None, 1) is None
    assert sample(words, dy[:2], x, *weight, nnz, None, 1) is None
    assert sample(words, x, dy, *weight, nnz, None, 1) is None
    assert sample(words, dy.double(), x, *weight, nnz, None, 1) is None
    out = torch.ones(2 * nnz)
    assert sample(words, dy, x, *weight, None, out[: nnz - 1], 1) is None
    assert sample(words, dy, x, *weight, None, out[::2], 1) is None
    assert (out == 1).all()
    assert sample(words, dy, x, *weight, None, out, 1) is out
    assert torch.count_nonzero(out[nnz:]) == 0


def test_lazily_negated_input(layer):
    x = torch.randn(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(layer(torch._neg_view(x)), layer(-x))


def test_strided_bias(layer):
    bias = torch.randn(24)[::2]
    x = torch.zeros(2, 16)
    y = ops.spmm(layer.values, layer.structure, x, bias, shape=layer.shape)
    torch.testing.assert_close(y.detach(), bias.expand(2, 12))


def test_nothing_is_recorded_inside_the_kernel_of_another_operator(layer):
    @torch.library.custom_op("spfmt_test::wrapped", mutates_args=())
    def wrapped(x: torch.Tensor) -> torch.Tensor:
        y = layer(x)
        assert not y.requires_grad
        return y

    wrapped(torch.randn(2, 16, requires_grad=True))
