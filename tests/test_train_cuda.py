"""Training methods on CUDA devices: with emulated kernels on the CPU, and on a real device."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_cuda_cases import Place  # noqa: E402

from spfmt import train  # noqa: E402
from spfmt.torch import densify  # noqa: E402

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SET": (train.SET, {}),
    "RigL": (train.RigL, {}),
    "SRigL": (train.SRigL, {"gamma_sal": 0.3}),
    "DSB": (train.DSB, {"block_shape": (4, 4)}),
    "DNSB": (train.DNSB, {"block_shape": (4, 4)}),
    "HRBP": (train.HRBP, {"groups": 24, "alpha": 0.6}),
    "SampledGrowth": (train.SampledGrowth, {"samples": 4}),
    "GradualPruning": (train.GradualPruning, {"format": "nm"}),
    "Rewire": (train.Rewire, {"format": "csr"}),
}


def model(place: Place) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 4)).to(place.device)


def batch(place: Place) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 32, generator=generator).to(place.device)
    return x, x[:, :4].argmax(1)


def trained(network: Any, method: Any, optimizer: Any, place: Place, steps: int) -> list[float]:
    x, label = batch(place)
    losses = []
    for _ in range(steps):
        with place.on():
            loss = nn.functional.cross_entropy(network(x), label)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        method.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_every_method_moves_weights_and_learns(name: str, place: Place) -> None:
    cls, options = METHODS[name]
    network = model(place)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9)
    how = {} if name == "Rewire" else {"delta_t": 3}
    method = cls(network, optimizer, density=0.3, include="0", total_steps=40, **how, **options)
    losses = trained(network, method, optimizer, place, 30)
    assert losses[-1] < losses[0] / 2
    assert method.updates >= 5
    layer = network[0]
    assert all(t.device.type == place.device.partition(":")[0] for t in layer.state_dict().values())
    assert layer.tensor().nnz == layer.nnz <= 0.32 * 32 * 48
    x, _ = batch(place)
    with place.on(), torch.no_grad():
        y = network(x)
    densify(network)
    torch.testing.assert_close(y, network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["RigL", "DSB", "Rewire"])
def test_convolutions_train(name: str, place: Place) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 4, 2),
    ).to(place.device)  # fmt: skip
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    how = {} if name == "Rewire" else {"delta_t": 2}
    cls: Any = getattr(train, name)
    method = cls(
        network, optimizer, format="shuffled_block", block_shape=(4, 4), density=0.4,
        exclude=["0", "5"], total_steps=20, **how,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, 6, 6, generator=generator).to(place.device)
    label = (x[:, 0, :3].mean((1, 2)) > 0).long()
    losses = []
    for _ in range(12):
        with place.on():
            loss = nn.functional.cross_entropy(network(x), label)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        method.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert method.updates > 2
    with place.on(), torch.no_grad():
        y = network(x)
    densify(network)
    with torch.backends.cudnn.flags(allow_tf32=False):
        torch.testing.assert_close(y, network(x), rtol=1e-4, atol=1e-5)


def test_a_state_goes_on_elsewhere(place: Place) -> None:
    def made(device: str) -> tuple[Any, Any, Any]:
        network = model(Place("cpu")).to(device)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        return network, optimizer, train.RigL(
            network, optimizer, density=0.3, exclude="2", format="csr", delta_t=2, t_end=30
        )  # fmt: skip

    network, optimizer, method = made(place.device)
    trained(network, method, optimizer, place, 5)
    other, other_optimizer, other_method = made("cpu")
    other.load_state_dict(network.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    other_method.load_state_dict(method.state_dict())
    x, _ = batch(Place("cpu"))
    with place.on(), torch.no_grad():
        y = network(x.to(place.device)).cpu()
    torch.testing.assert_close(y, other(x), rtol=1e-4, atol=1e-5)
    trained(other, other_method, other_optimizer, Place("cpu"), 4)
    assert other_method.updates > method.updates
