"""Gradual magnitude pruning: the schedule by hand, exact budgets, every format."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from train_cases import FORMATS, assert_resumes, train  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.torch import SparseConv2d, sparsify  # noqa: E402
from spfmt.train import CubicSchedule, GradualPruning, layer_densities  # noqa: E402


def network(format: str = "csr", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    sparsify(model, format, density=1.0, **FORMATS[format])
    return model


def made(format: str = "csr", seed: int = 0, **options):
    model = network(format, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"density": 0.25, "delta_t": 2, "t_end": 10, **options}
    return model, optimizer, GradualPruning(model, optimizer, **options)


def inputs(generator):
    return torch.randn(16, 32, generator=generator)


def test_the_schedule_by_hand() -> None:
    """Eq. 1 with t0 = 4, n = 3, Δt = 10: a third, two thirds, all of the way."""
    schedule = CubicSchedule(t_start=4, delta_t=10, t_end=39)
    assert schedule.updates == 3
    assert [t for t in range(60) if schedule.is_update(t)] == [14, 24, 34]
    left = [schedule.left(t) for t in (0, 4, 14, 24, 34, 50)]
    assert left == pytest.approx([1, 1, (2 / 3) ** 3, (1 / 3) ** 3, 0, 0])
    s_i, s_f = 0.2, 0.9
    s_14 = s_f + (s_i - s_f) * (1 - 10 / 30) ** 3
    assert s_f + (s_i - s_f) * schedule.left(14) == pytest.approx(s_14)


def test_budgets_are_exact_and_the_largest_stay() -> None:
    model, optimizer, method = made()
    size = 32 * 48
    for step in range(1, 13):
        held = set(model[0].positions().tolist())
        x = inputs(torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        old = dict(zip(model[0].positions().tolist(), model[0].values.tolist(), strict=False))
        method.step()
        kept = set(model[0].positions().tolist())
        assert kept <= held
        left = (1 - min(step, 10) // 2 * 2 / 10) ** 3
        assert model[0].nnz == round((0.25 + 0.75 * left) * size)
        gone = held - kept
        if gone:
            assert max(abs(old[p]) for p in gone) <= min(abs(old[p]) for p in kept)
        now = dict(zip(model[0].positions().tolist(), model[0].values.tolist(), strict=False))
        assert all(now[p] == old[p] for p in kept)
        momentum = optimizer.state[model[0].values]["momentum_buffer"]
        assert not momentum[model[0].nnz :].any()


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_shrinks_to_its_density(format: str) -> None:
    model, optimizer, method = made(format)
    counts = [[layer.nnz for layer in method.layers.values()]]
    for _ in range(12):
        train(model, optimizer, method, 1, inputs)
        counts.append([layer.nnz for layer in method.layers.values()])
    falling = np.diff(counts, axis=0)
    assert (falling <= 0).all()
    for layer in method.layers.values():
        assert 0.15 <= layer.density <= 0.3
        layer.tensor().validate()


def test_the_largest_of_the_whole_model_stay() -> None:
    model, optimizer, method = made(scope="model")
    with torch.no_grad():
        model[2].values.mul_(3)
    for _ in range(10):
        before = [abs(layer.values[: layer.nnz].detach()) for layer in method.layers.values()]
        optimizer.zero_grad()
        for layer in method.layers.values():
            layer.values.grad = torch.zeros_like(layer.values)
        optimizer.step()
        method.step()
        budget = sum(method.budget(name, min(method.steps, 10)) for name in method.layers)
        held = [layer.nnz for layer in method.layers.values()]
        if method.steps % 2 == 0:
            assert sum(held) == budget
            every = torch.cat(before).sort(descending=True).values
            kept = [(b >= every[budget - 1]).sum().item() for b in before]
            assert held == kept
    assert model[2].density > 2 * model[0].density
    assert sum(held) == round(0.25 * 32 * 48) + round(0.25 * 48 * 8)
    with pytest.raises(FormatError, match="scope"):
        made(scope="all")


def test_convolutions_and_densities_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        SparseConv2d(4, 8, 3, density=1.0, format="csr"),
        SparseConv2d(8, 6, 3, density=1.0, format="csr"),
    )
    optimizer = torch.optim.AdamW(model.parameters())
    method = GradualPruning(model, optimizer, density={"0": 0.5, "1": 0.1}, delta_t=1, t_end=3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4, 8, 8)).square().mean().backward()
        optimizer.step()
        method.step()
    assert [layer.nnz for layer in model] == [144, round(0.1 * 8 * 6 * 9)]


def test_a_run_resumes_to_the_same_bits() -> None:
    assert_resumes(lambda seed: made(seed=seed), inputs, (5, 6))


def test_pruned_networks_still_learn() -> None:
    model, optimizer, method = made(delta_t=10, t_end=150)
    x = torch.randn(512, 32)
    y = x[:, :8].argmax(1)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        method.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.9
    assert method.layers["0"].density == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density=0.0 for 0"),
        ({"density": 1.0}, "density=1.0 for 0"),
        ({"density": {"0": 0.5}}, "densities of 0"),
        ({"density": {"0": 0.5, "2": 0.5, "7": 0.5}}, "densities of 0, 2, 7"),
        ({"t_end": 0.5}, "t_end=0.5 with total_steps=None"),
        ({"t_end": 1}, "room for an update"),
        ({"t_start": -1}, "t_start=-1"),
        ({"delta_t": 0}, "delta_t=0"),
        ({"delta_t": 1.5}, "delta_t=1.5"),
    ],
)
def test_bad_input(options, message) -> None:
    with pytest.raises(FormatError, match=message):
        made(**options)


def test_layers_that_are_sparser_already_are_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16))
    sparsify(model, "csr", density=0.1)
    with pytest.raises(FormatError, match="less than what it has"):
        GradualPruning(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.2, t_end=200)


def test_densities_of_erk_can_be_given() -> None:
    model = network()
    shapes = {name: layer.shape for name, layer in model.named_children() if name != "1"}
    densities = layer_densities(shapes, 0.3, "erk")
    assert densities["0"] < densities["2"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = GradualPruning(model, optimizer, density=densities, delta_t=1, t_end=1)
    train(model, optimizer, method, 1, inputs)
    assert sum(layer.nnz for layer in method.layers.values()) == round(0.3 * (32 * 48 + 48 * 8))


@pytest.mark.parametrize(
    "option", [{"sparsity": 0.5}, {"reset": True}, {"scores": "magnitude"}, {"alpha": 0.3}]
)
def test_options_of_other_methods_are_refused(option) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FormatError, match=f"{next(iter(option))}=.* for gradual pruning"):
        GradualPruning(model, optimizer, density=0.5, t_end=100, **option)
    assert type(model[0]) is nn.Linear
