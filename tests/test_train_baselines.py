"""Narrower models, lottery tickets, and how long weights remember."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.formats import CSR  # noqa: E402
from spfmt.torch import SparseConv2d, SparseLinear  # noqa: E402
from spfmt.train import Decorrelation, Lottery, decorrelation_times, small, small_width  # noqa: E402

# ---------------------------------------------------------------------------------------- SMALL


def convolutions(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2 * width, 10),
    )  # fmt: skip


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.dim() >= 2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    density=st.floats(0, 1),
    width=st.integers(1, 24),
    multiple=st.sampled_from([1, 2, 5]),
)
def test_the_width_is_the_one_of_all_that_comes_nearest(density, width, multiple):
    width *= multiple
    counts = {w: weights(convolutions(w)) for w in range(multiple, width + 1, multiple)}
    wanted = density * counts[width]
    expected = min(counts, key=lambda w: (abs(counts[w] - wanted), w))
    assert small_width(convolutions, density, width=width, multiple=multiple) == expected
    number = round(wanted)
    expected = min(counts, key=lambda w: (abs(counts[w] - number), w))
    assert small_width(convolutions, width=width, weights=number, multiple=multiple) == expected


def test_a_narrower_model_is_an_ordinary_one():
    model = small(convolutions, sparsity=0.75, width=32)
    assert abs(weights(model) / weights(convolutions(32)) - 0.25) < 0.02
    assert not any(p.is_meta for p in model.parameters())
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 8}, "exactly one of them"),
        ({"density": 0.5, "width": 0}, "width=0"),
        ({"density": 0.5, "width": 3, "multiple": 4}, "width=3"),
        ({"density": 0.5, "weights": 9, "width": 8}, "weights=9 and a density"),
        ({"weights": 10**9, "width": 8}, "weights=1000000000"),
    ],
)
def test_widths_that_cannot_be_are_refused(options, message):
    with pytest.raises(FormatError, match=message):
        small_width(convolutions, **options)


# -------------------------------------------------------------------------------------- LOTTERY


def trained(rewind, steps: int = 6, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ticket, states = Lottery(model, rewind=rewind, **options), []
    for _ in range(steps):
        states.append({name: t.clone() for name, t in model.state_dict().items()})
        optimizer.zero_grad()
        model(torch.randn(4, 2, 4, 4)).square().mean().backward()
        optimizer.step()
        ticket.step()
    return model, ticket, states


@pytest.mark.parametrize(("rewind", "step", "options"), [
    (0, 0, {}), (2, 2, {}), (0.5, 3, {"total_steps": 6}),
])  # fmt: skip
def test_a_ticket_has_late_structure_and_early_values(rewind, step, options):
    model, ticket, states = trained(rewind, **options)
    last = {name: t.clone() for name, t in model.state_dict().items()}
    report = ticket.draw("csr", density=0.25, include="*")
    assert [row.name for row in report.taken] == ["0", "3"]
    for layer, name, cls in ((model[0], "0", SparseConv2d), (model[3], "3", SparseLinear)):
        assert type(layer) is cls
        expected = CSR.from_scores(last[f"{name}.weight"].abs().numpy(), 0.25)
        np.testing.assert_array_equal(layer.positions(), expected.flat_indices())
        early = states[step][f"{name}.weight"].flatten()[torch.from_numpy(layer.positions())]
        assert torch.equal(layer.values, early)
        assert torch.equal(layer.bias, states[step][f"{name}.bias"])
    for name in ("weight", "running_mean", "num_batches_tracked"):
        assert torch.equal(model[1].state_dict()[name], states[step][f"1.{name}"])


def test_a_ticket_can_be_resumed():
    _, ticket, _ = trained(2, steps=3)
    model, other, _ = trained(2, steps=1)
    other.load_state_dict(ticket.state_dict())
    assert other.steps == 3
    other.draw("nm", n=1, m=4)
    torch.testing.assert_close(model[3].bias, ticket.state_dict()["recorded"]["3.bias"])


def test_tickets_that_cannot_be_drawn_leave_the_model_alone():
    model, ticket, _ = trained(9)
    with pytest.raises(FormatError, match="after step 6"):
        ticket.draw("csr", density=0.25)
    model, ticket, _ = trained(1)
    before = model[3].weight.clone()
    with pytest.raises(FormatError, match="exactly one"):
        ticket.draw("csr")
    assert torch.equal(model[3].weight, before)
    with pytest.raises(FormatError, match=r"rewind=0\.5"):
        Lottery(model, rewind=0.5)


# -------------------------------------------------------------------------------------- section 2


def first_lag(series) -> int:
    """Δ of one series by its definition."""
    steps = len(series)
    for lag in range(1, steps - 1):
        x, y = series[: steps - lag], series[lag:]
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            continue
        if np.corrcoef(x, y)[0, 1] <= 1e-9:
            return lag
    return steps


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.integers(0, 30),
    count=st.integers(0, 6),
    drift=st.sampled_from([0.0, 0.1, 1.0]),
    offset=st.sampled_from([0.0, 1e3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_decorrelation_is_that_of_the_definition(steps, count, drift, offset, seed):
    rng = np.random.default_rng(seed)
    series = rng.standard_normal((steps, count)).cumsum(0) + drift * np.arange(steps)[:, None]
    series = np.where(rng.random(count) < 0.2, 3.0, series) + offset  # some never move
    expected = [first_lag(column) for column in series.T]
    assert decorrelation_times(series).tolist() == expected


def test_decorrelation_by_hand():
    up, alternating, still = np.arange(6.0), np.array([1.0, -1] * 3), np.full(6, 2.0)
    wave = np.sin(np.arange(40) * 2 * np.pi / 20)  # a quarter of a period of 20
    assert decorrelation_times(np.stack([up, alternating, still], 1)).tolist() == [6, 1, 6]
    assert decorrelation_times(wave[:, None]).tolist() in ([5], [6])
    for bad in (np.zeros(3), [[np.nan]], [[np.inf]]):
        with pytest.raises(FormatError, match="history"):
            decorrelation_times(bad)


def test_recorded_weights_are_those_of_the_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    recorder = Decorrelation(model, samples=20, every=2)
    seen = []
    for step in range(1, 9):
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(8, 8))
        recorder.step()
        if step % 2 == 0:
            seen.append(model[0].weight.detach().flatten().clone())
    places = recorder._places["0.weight"]
    assert list(recorder.times()) == ["0.weight", "2.weight"]
    assert recorder.history("2.weight").shape == (4, 16)
    history = torch.stack(seen)[:, places].numpy()
    np.testing.assert_array_equal(recorder.history("0.weight"), history)
    np.testing.assert_array_equal(recorder.times()["0.weight"], 2 * decorrelation_times(history))
    np.testing.assert_array_equal(recorder.magnitudes()["0.weight"], np.abs(history[-1]))


def test_large_weights_of_a_training_remember_longer():
    """Half of the weights are pulled to a target, the others wander around zero."""
    torch.manual_seed(0)
    model = nn.Linear(32, 32, bias=False)
    target = torch.zeros(32, 32)
    target[:16] = torch.randn(16, 32).sign()
    with torch.no_grad():
        model.weight.zero_()
    recorder = Decorrelation(model, samples=512)
    for _ in range(200):
        with torch.no_grad():
            model.weight += 0.02 * (target - model.weight) + 0.02 * torch.randn(32, 32)
        recorder.step()
    magnitudes, medians = recorder.by_magnitude("weight", bins=4)
    assert (np.diff(magnitudes) > 0).all()
    assert ((medians >= 0) & (medians <= 1)).all()
    assert medians[-1] > medians[0]


def test_recorders_that_cannot_be_are_refused():
    with pytest.raises(FormatError, match="without weights"):
        Decorrelation(nn.LayerNorm(4))
    with pytest.raises(FormatError, match="samples=0"):
        Decorrelation(nn.Linear(4, 4), samples=0)
    empty = Decorrelation(nn.Linear(4, 4), every=3)
    for read in (empty.magnitudes, lambda: empty.by_magnitude("weight")):
        with pytest.raises(FormatError, match="no record after 0 steps; expected at least 3"):
            read()
