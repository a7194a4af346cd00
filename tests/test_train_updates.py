"""An update is all or nothing, in every method: what it lacks is known before anything moves."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from spfmt import train  # noqa: E402
from spfmt.errors import FormatError  # noqa: E402

OPTIONS = {
    "SET": {},
    "RigL": {},
    "SRigL": {},
    "HRBP": {},
    "DSB": {"block_shape": (4, 4)},
    "DNSB": {"block_shape": (4, 4)},
    "SampledGrowth": {"samples": 2},
    "GradualPruning": {},
}
OBSERVING = [name for name in OPTIONS if name not in ("SET", "GradualPruning")]


class Network(nn.Module):
    """Three layers of which the second can be left out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x, skip=False):
        x = self.a(x).relu()
        return self.c(x if skip else self.b(x).relu())


def made(name, **options):
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"density": 0.3, "delta_t": 2, "t_end": 100, **OPTIONS[name], **options}
    return model, optimizer, getattr(train, name)(model, optimizer, **options)


def positions(method):
    return {name: layer.positions().tolist() for name, layer in method.layers.items()}


def backward(model, factor=1.0, **how):
    (factor * model(torch.randn(8, 32), **how).square().mean()).backward()


def one_step(model, optimizer, method, **how):
    optimizer.zero_grad()
    backward(model, **how)
    optimizer.step()
    return method.step()


@pytest.mark.parametrize("name", OBSERVING)
def test_a_layer_that_was_not_called_stops_all(name):
    parts = made(name)
    one_step(*parts)
    before = positions(parts[2])
    with pytest.raises(FormatError, match=r"no recorded call of b .*skip no layer"):
        one_step(*parts, skip=True)
    assert positions(parts[2]) == before
    assert not one_step(*parts)  # training goes on, to the next update
    assert one_step(*parts)


@pytest.mark.parametrize("name", OBSERVING)
def test_a_layer_that_was_unfrozen_just_now_stops_all(name):
    model, optimizer, method = made(name)
    model.b.values.requires_grad_(False)
    one_step(model, optimizer, method)
    model.b.values.requires_grad_(True)
    before = positions(method)
    with pytest.raises(FormatError, match=r"no recorded call of b .*unfreeze"):
        one_step(model, optimizer, method)
    assert positions(method) == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", OPTIONS)
def test_weights_that_are_not_finite_stop_all(name, bad):
    model, optimizer, method = made(name)
    one_step(model, optimizer, method)
    before = positions(method)
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    with torch.no_grad():
        model.c.values[3] = bad
    with pytest.raises(FormatError, match="weights of c that are NaN or infinite"):
        method.step()
    assert positions(method) == before


@pytest.mark.parametrize("name", OBSERVING)
def test_a_step_that_a_gradient_scaler_skips_moves_nothing(name, caplog):
    model, optimizer, method = made(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    changed = []
    for step in range(4):
        optimizer.zero_grad()
        loss = scaler.scale(model(torch.randn(8, 32)).square().mean())
        (loss * (math.inf if step == 1 else 1.0)).backward()
        before = positions(method)
        scaler.step(optimizer)
        scaler.update()
        changed.append(method.step())
        assert (positions(method) == before) is not changed[-1]
    assert changed == [False, False, False, True]
    for layer in method.layers:
        assert f"{layer} stays as it is" in caplog.text


@pytest.mark.parametrize("name", OBSERVING)
def test_without_a_scaler_the_weights_are_ruined_and_say_so(name):
    parts = made(name)
    one_step(*parts)
    before = positions(parts[2])
    with pytest.raises(FormatError, match="weights of a that are NaN"):
        one_step(*parts, factor=math.inf)
    assert positions(parts[2]) == before
