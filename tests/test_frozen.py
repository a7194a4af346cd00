"""Frozen layers: the same map, nobody can write it, and what products take for granted holds."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from format_cases import LAYOUTS

torch = pytest.importorskip("torch")

from spfmt.torch import FrozenLinear, SparseLinear, densify, freeze, sparsify, unfreeze  # noqa: E402

# torch.compile imports parts of torch that use its own deprecated torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def network(format: str = "csr") -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.ReLU(), torch.nn.Linear(30, 8))
    sparsify(model, format, density=0.3)
    return model


@pytest.mark.parametrize("format", LAYOUTS.values())
@pytest.mark.parametrize("batch", [1, 8, 40])
def test_the_same_map_and_gradients(format: str, batch: int) -> None:
    model, x = network(format), torch.randn(batch, 40, requires_grad=True)
    expected = model(x)
    wanted = torch.autograd.grad(expected.square().sum(), [x, model[0].bias])
    assert freeze(model) is model
    assert [type(m) for m in model][::2] == [FrozenLinear] * 2
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
    got = torch.autograd.grad(model(x).square().sum(), [x, model[0].bias])
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)


def test_nobody_writes_frozen_values() -> None:
    model, x = network(), torch.randn(1, 40)
    old = model[0].values
    freeze(model)
    expected = model(x)
    with torch.no_grad():
        old.mul_(2)  # no longer the model's
    for write in ("values", "weight"):
        with pytest.raises(AttributeError, match=r"unfreeze\(model\)"):
            getattr(model[0], write)
        with pytest.raises(AttributeError, match=r"unfreeze\(model\)"):
            setattr(model[0], write, old)
    state = model.state_dict()
    state["0.values"].data.zero_()  # a copy
    with pytest.raises(RuntimeError, match=r"unfreeze\(model\).*then load"):
        model.load_state_dict(state)
    assert {name for name, _ in model.named_parameters()} == {"0.bias", "2.bias"}
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_copies_and_conversions_hold_their_own_values() -> None:
    model, x = freeze(network()), torch.randn(2, 40)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), expected)
    double = copy.deepcopy(model).double()
    torch.testing.assert_close(double(x.double()).float(), expected)
    assert double[0].tensor().dtype == np.float64
    torch.testing.assert_close(model(x), expected)
    del double, twin
    gc.collect()
    torch.testing.assert_close(model(x), expected)


def test_addresses_are_not_mistaken_for_values_that_were_frozen_there() -> None:
    x = torch.eye(32)[:8]
    with torch.no_grad():
        for seed in range(50):
            generator = torch.Generator().manual_seed(seed)
            layer = SparseLinear(32, 24, density=0.25, bias=False, generator=generator)
            dense = torch.from_numpy(layer.tensor().to_dense())
            frozen = freeze(layer)
            torch.testing.assert_close(frozen(x).T, dense[:, :8])
            torch.testing.assert_close(layer(x).T, dense[:, :8])
            del layer, frozen


def test_memory_that_was_promised_goes_to_no_other_tensor() -> None:
    layer = freeze(network()[0])
    values = layer._constant.values
    address, nbytes = values.data_ptr(), values.numel() * values.element_size()
    importlib.import_module("torch.multiprocessing")  # teaches this pickler to send tensors
    assert ForkingPickler.dumps(layer)  # what a queue does with a model
    assert values.data_ptr() == address
    layer.share_memory()
    assert values.is_shared()
    others = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(200)]
    assert address not in {other.data_ptr() for other in others}
    x = torch.randn(3, 40)
    before = layer(x)
    values.data.mul_(2)  # at another place than was promised
    torch.testing.assert_close(layer(x) - layer.bias, 2 * (before - layer.bias))


def test_a_model_frozen_in_inference_mode_counts_writes() -> None:
    model, x = network(), torch.randn(1, 40)
    with torch.inference_mode():
        freeze(model)
        model(x)
    values = model[0]._constant.values
    assert not values.is_inference()
    assert not values.requires_grad
    values.mul_(2)
    torch.testing.assert_close(
        model[0].tensor().to_dense() @ x[0].numpy() + model[0].bias.detach().numpy(),
        model[0](x)[0].detach().numpy(),
    )


def test_what_is_not_a_map_survives() -> None:
    class Twice(SparseLinear):
        def forward(self, x: torch.Tensor, **options) -> torch.Tensor:
            return 2 * super().forward(x, **options)

    layer, seen = network()[0], []
    layer.values.requires_grad_(False)
    layer.register_forward_hook(lambda *call: seen.append(1))
    frozen = freeze(layer)
    frozen(torch.randn(2, 40))
    thawed = unfreeze(frozen)
    thawed(torch.randn(2, 40))
    assert len(seen) == 2
    assert not thawed.values.requires_grad
    model = torch.nn.Sequential(Twice(16, 8, density=0.5))
    assert type(freeze(model)[0]) is Twice


def test_unfrozen_layers_are_what_they_were() -> None:
    model = network("nm")
    before, params = model.state_dict(), model[0].format_params
    unfreeze(freeze(model))
    assert type(model[0]) is SparseLinear
    assert model[0].format_params == params
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)
    model.load_state_dict(freeze(network("nm")).state_dict())
    with torch.no_grad():
        model[0].values.mul_(2)  # writable again


def test_frozen_models_become_dense_and_are_exported(tmp_path) -> None:
    model, x = freeze(network()), torch.randn(2, 40)
    expected = model(x).detach()
    onnx = pytest.importorskip("spfmt.onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    session = onnx.session(onnx.export(model, (x,), tmp_path / "net.onnx"))
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert "frozen" in str(model)
    densify(model)
    assert [type(m) for m in model][::2] == [torch.nn.Linear] * 2
    torch.testing.assert_close(model(x).detach(), expected)


def test_models_of_one_layer() -> None:
    layer = SparseLinear(16, 8, density=0.5)
    frozen = freeze(layer)
    assert isinstance(frozen, FrozenLinear)
    assert isinstance(unfreeze(frozen), SparseLinear)
    shared = torch.nn.Sequential(layer, torch.nn.Identity(), layer.__class__(8, 16, density=0.5))
    shared.append(shared[0])
    freeze(shared)
    assert shared[0] is shared[3]
