"""Settings of the papers: what they make, and the numbers that the papers print."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.train import (  # noqa: E402
    PRESETS,
    CosineSchedule,
    Rewire,
    preset,
    random_saliency,
    snip,
)

DYNAMIC = {"Rewire", "DSB", "DNSB", "RigL", "SET", "SRigL", "HRBP"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, stride=2, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 32),
    )  # fmt: skip


def loss(model, seed):
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(x), x.flatten(1)[:, :32].argmax(1))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains(name):
    found = preset(name)
    assert found.name == name
    model = network()
    optimizer = found.training.optimizer(model.parameters())
    every = {} if found.method is Rewire else {"delta_t": 2}
    method = found.make(model, optimizer, density=0.3, total_steps=20, **every)
    assert type(method) is found.method
    assert {layer.format for layer in method.layers.values()} == {found.format}
    for key, value in found.options.items():
        if hasattr(method, key):
            assert getattr(method, key) == value
    scheduler = found.training.scheduler(optimizer, 20)
    changed = []
    for step in range(8):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        scheduler.step()
        changed.append(method.step())
    assert any(changed) is (found.method.__name__ in DYNAMIC)
    total = sum(layer.nnz for layer in method.layers.values())
    assert 0.25 < method.report.density < 0.4
    assert total > 0


# As printed: batch, epochs, learning rate, update interval, end of updates.
PRINTED = {
    "dsb-cifar": (128, 250, 0.1, 100, 75_000),
    "dsb-imagenet": (256, 100, 0.1, 1600, 400_000),
    "rigl": (128, 250, 0.1, 100, 75_000),
    "rigl-imagenet": (4096, 102, 1.6, 100, 25_000),
    "hrbp-cifar-dynamic": (128, 160, 0.1, 100, 46_875),
}


@pytest.mark.parametrize("name", PRINTED)
def test_numbers_are_those_of_the_paper(name):
    found, model = preset(name), network()
    training = found.training
    method = found.make(model, torch.optim.SGD(model.parameters(), lr=0.1), sparsity=0.7)
    schedule = method.schedule
    assert isinstance(schedule, CosineSchedule)
    assert (schedule.alpha, method.report.density) == (0.3, pytest.approx(0.3, abs=0.06))
    numbers = training.batch_size, training.epochs, training.learning_rate
    assert (*numbers, schedule.delta_t, schedule.t_end) == PRINTED[name]


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("dsb-cifar", {0: 0.1, 76: 0.1, 77: 0.02, 154: 0.004, 231: 0.0008}),
        ("dsb-imagenet", {0: 0, 2.5: 0.05, 5: 0.1, 29: 0.1, 30: 0.01, 70: 1e-3, 95: 1e-4}),
        ("hrbp-cifar", {0: 0.1, 79: 0.1, 80: 0.01, 120: 0.001, 159: 0.001}),
        ("hrbp-imagenet", {29: 0.1, 30: 0.01, 60: 0.001, 90: 0.0001}),
        ("srigl-imagenet", {5: 0.2, 30: 0.02}),
        ("srigl-vit", {0: 9.9e-5, 16: 3e-3, 83: 1.5e-3, 150: 0}),
    ],
)
def test_learning_rates_by_hand(name, rates):
    training = preset(name).training
    found = {
        epoch: training.learning_rate * training.share(epoch / training.epochs) for epoch in rates
    }
    assert found == pytest.approx(rates)


def test_steps_of_the_runs():
    assert preset("rigl").training.steps == 97_656  # as the authors' code says
    assert preset("srigl-vit").training.steps == 46_918
    assert preset("dsb-cifar").training.drops[0] * 50_000 / 128 == pytest.approx(30_000)


def test_shorter_runs_end_their_updates_at_the_same_share():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = preset("dsb-imagenet").make(model, optimizer, density=0.3, total_steps=10_000)
    assert method.schedule.t_end == 7993  # 400 000 of 500 456
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = preset("srigl").make(
        model, optimizer, density=0.3, total_steps=1000, alpha=0.5, gamma_sal=0.1
    )
    assert (method.schedule.alpha, method.gamma_sal, method.schedule.t_end) == (0.5, 0.1, 750)


def test_a_sparse_model_and_densities_by_name_are_taken():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scores = snip(model, loss, [0])
    densities = scores.densities(0.3)
    first = preset("hrbp-cifar").make(model, optimizer, density=densities, scores=scores)
    again = preset("hrbp-cifar-dynamic").make(model, optimizer, total_steps=1000)
    assert set(first.layers) == set(again.layers) == set(densities)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    densities = {"2": 0.2}
    masks = random_saliency(model).masks(densities)
    method = preset("hrbp-regrouping").make(model, optimizer, density=densities, scores=masks)
    tensor = method.layers["2"].tensor()
    assert tensor.block_shape == (8, 1)
    kept = tensor.mask() & (masks["2"].numpy().reshape(tensor.shape) > 0)
    assert kept.sum() > 1.5 * 0.2 * tensor.nnz  # columns of the mask, not any


def test_channels_are_whole_outputs():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = preset("hrbp-channels").make(model, optimizer, density=0.25, distribution="uniform")
    for layer in method.layers.values():
        mask = layer.tensor().mask().reshape(layer.shape[0], -1)
        assert mask.all(1).sum() == mask.any(1).sum() == layer.shape[0] // 4


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(FormatError, match=r"preset 'dsb'; expected one of dnsb-cifar, dsb-cifar, "):
        preset("dsb")
    with pytest.raises(TypeError):
        PRESETS["mine"] = preset("dsb-cifar")
    with pytest.raises(TypeError):
        preset("dsb-cifar").options["alpha"] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("dsb-cifar").method = None
