"""What a method may observe on the step of an update, and that other steps know nothing of it."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_averages import network  # noqa: E402
from test_followers import in_two_processes  # noqa: E402
from torch import nn  # noqa: E402
from train_cases import stepped  # noqa: E402

from spfmt import train  # noqa: E402
from spfmt.errors import FormatError  # noqa: E402
from spfmt.torch import SparseLinear  # noqa: E402
from spfmt.train import DSB, SET  # noqa: E402


class RigL(SET):
    """Grows where the dense gradient is largest (Evci et al., 2020): SET with one override."""

    def observes(self, name, layer):
        return "batches"

    def grow_scores(self, layer, tensor):
        self.last = self.observed(layer).weight_grad()
        return (self.last.abs() / self.last.abs().max()).numpy().reshape(-1)


class Norms(SET):
    def observes(self, name, layer):
        return "norms" if name == "0" else None

    def grow_scores(self, layer, tensor):
        if layer.in_features == 32:
            found = self.observed(layer)
            self.last = found.input_norms, found.output_grad_norms
        return super().grow_scores(layer, tensor)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


def make(method: type = RigL, model: nn.Module | None = None, **options):
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, method(model, optimizer, **{"delta_t": 3, "t_end": 100, **options})


def backward(model, x):
    model(x).square().mean().backward()


def test_hooks_exist_on_the_step_of_an_update_alone():
    model, optimizer, method = make()
    plain = hooks(model)
    for step in range(1, 10):
        assert method.observing is (step % 3 == 0)
        assert hooks(model) - plain == (2 if step % 3 == 0 else 0)
        optimizer.zero_grad()
        backward(model, torch.randn(8, 32))
        optimizer.step()
        assert method.step() is (step % 3 == 0)
    model, _, method = make(SET, delta_t=1)
    assert hooks(model) == 0
    assert not method.observing


def test_the_dense_gradient_is_that_of_a_dense_layer():
    model, _, method = make(delta_t=1)
    x = [torch.randn(2, 5, 32), torch.randn(7, 32)]  # accumulated over calls of two shapes
    dense = [nn.Linear(32, 48), nn.Linear(48, 8)]
    for linear, layer in zip(dense, (model[0], model[2]), strict=True):
        linear.load_state_dict(layer.to_linear().state_dict())
    twin = nn.Sequential(dense[0], nn.ReLU(), dense[1])
    for part in x:
        backward(model, part)
        backward(twin, part)
    before = [model[0].tensor().mask(), model[2].tensor().mask()]
    found = method.observed(model[0])
    torch.testing.assert_close(found.weight_grad(), dense[0].weight.grad)
    torch.testing.assert_close(found.weight_grad(), found.output_grads.T @ found.inputs)
    assert torch.equal(found.inputs, torch.cat([part.reshape(-1, 32) for part in x]))
    torch.testing.assert_close(found.input_norms, found.inputs.norm(dim=0))
    assert stepped(method)
    torch.testing.assert_close(method.last, dense[1].weight.grad)
    grown = model[2].tensor().mask() & ~before[1]
    free = dense[1].weight.grad.abs().numpy()
    assert grown.any()
    assert free[grown].mean() > free[~before[1]].mean()


def test_norms_alone():
    model, _, method = make(Norms, delta_t=1)
    x = torch.randn(8, 32, requires_grad=True)
    seen = []
    model[0].register_full_backward_hook(lambda _m, _i, grads: seen.append(grads[0]))
    backward(model, x)
    assert hooks(model) == 2
    with pytest.raises(FormatError, match="batches"):
        method.observed(model[0]).weight_grad()
    assert stepped(method)
    torch.testing.assert_close(method.last[0], x.detach().norm(dim=0))
    torch.testing.assert_close(method.last[1], seen[0].norm(dim=0))


def test_nothing_recorded_is_an_error():
    model, _, method = make(delta_t=1)
    before = model[0].tensor()
    with torch.no_grad():
        model(torch.zeros(1, 32))
    with pytest.raises(FormatError, match=r"outside torch\.compile"):
        stepped(method)
    assert model[0].tensor() == before

    class Wrong(SET):
        def observes(self, name, layer):
            return "everything"

    with pytest.raises(FormatError, match="'everything'"):
        make(Wrong, delta_t=1)


def test_calls_by_keyword_are_recorded_and_fused_activations_refused():
    model, _, method = make(delta_t=1)
    x = torch.randn(8, 32)
    model[0](x=x).sum().backward()
    assert torch.equal(method.observed(model[0]).inputs, x)
    with pytest.raises(FormatError, match="activation='relu'"):
        model[0](x, activation="relu")
    with torch.no_grad():
        model[0](x, activation="relu")  # nothing to record


def test_a_resumed_trainer_observes_its_next_step():
    _, _, method = make()
    stepped(method)
    stepped(method)
    _, _, other = make()
    assert not other.observing
    other.load_state_dict(method.state_dict())
    assert other.observing


def test_frozen_layers_are_not_observed():
    model = network()
    model[0].requires_grad_(False)
    make(model=model, delta_t=1)
    assert hooks(model) == 1


def _ranks(rank: int) -> None:
    model = network()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    method = RigL(ddp, optimizer, delta_t=1, t_end=100)
    torch.manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        backward(ddp, torch.randn(8, 32))
        positions, values = model[2].positions(), model[2].values.grad.clone()
        optimizer.step()
        assert method.step()
        # DDP's mean over the ranks is what the values' gradient is, too.
        torch.testing.assert_close(method.last.reshape(-1)[positions], values[: len(positions)])
    masks = [None, None]
    torch.distributed.all_gather_object(masks, model[0].tensor().mask())
    np.testing.assert_array_equal(*masks)
    _ranks_see_norms_of_all(rank)


BLOCKS = {"block_shape": (4, 4)}
EVERY = {"delta_t": 1, "t_end": 1000}
METHODS = (
    (train.SET, EVERY),
    (train.RigL, EVERY),
    (train.SRigL, EVERY),
    (train.SampledGrowth, {"samples": 3, **EVERY}),
    (train.DSB, {**BLOCKS, **EVERY}),
    (train.DNSB, {**BLOCKS, **EVERY}),
    (train.HRBP, {"groups": 2, **EVERY}),
    (train.GradualPruning, {"delta_t": 1, "t_end": 60}),
    (train.GradualPruning, {"delta_t": 1, "t_end": 60, "scope": "model"}),
    (train.Rewire, {"mode": "regularize"}),
)
"""Every method that moves weights, with an update after every step."""


def _ranks_move_alike(rank: int) -> None:
    """After 50 updates of each method ranks hold one topology, the same weights and state."""
    for kind, options in METHODS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        method = kind(model, optimizer, density=0.3, include="*", **options)
        ddp = nn.parallel.DistributedDataParallel(model)
        for step in range(52):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(2 * step + rank)
            x = torch.randn(8 - 3 * rank, 32, generator=generator)
            nn.functional.cross_entropy(ddp(x), x[:, :8].argmax(1)).backward()
            optimizer.step()
            method.step()
        assert method.updates >= 50, kind
        held = [*model.state_dict().values()]
        held += [t for p in model.parameters() for t in optimizer.state[p].values()]
        ranks = [None, None]
        torch.distributed.all_gather_object(ranks, held)
        assert all(torch.equal(*pair) for pair in zip(*ranks, strict=True)), kind


def test_ranks_move_alike():
    in_two_processes(_ranks_move_alike)


def _ranks_whose_choices_differ(rank: int) -> None:
    """As processors that round differently would: the first rank's choice holds."""

    class Own(train.RigL):
        def gradient(self, layer):
            return np.random.default_rng(rank).random(layer.shape, np.float32)

    model = network()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    method = Own(ddp, optimizer, delta_t=1, t_end=100)
    backward(ddp, torch.randn(8, 32, generator=torch.Generator().manual_seed(0)))
    optimizer.step()
    assert method.step()
    states = [None, None]
    torch.distributed.all_gather_object(states, model.state_dict())
    assert all(torch.equal(*pair) for pair in zip(*(s.values() for s in states), strict=True))
    model = network("condensed")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FormatError, match="different gamma_sal"):
        train.SRigL(model, optimizer, gamma_sal=0.1 * rank, t_end=900)


def test_the_first_rank_decides():
    in_two_processes(_ranks_whose_choices_differ)


def _ranks_see_norms_of_all(rank: int) -> None:
    model = nn.Sequential(SparseLinear(32, 16, format="shuffled_block", density=0.2,
                                       block_shape=(4, 4)))  # fmt: skip
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    method = DSB(ddp, optimizer, delta_t=1, t_end=100)
    x = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    backward(ddp, x[rank])
    found = method.observed(model[0]).input_norms
    torch.testing.assert_close(found, x.abs().sum((0, 1)))
    optimizer.step()
    assert method.step()
    states = [None, None]
    torch.distributed.all_gather_object(states, (model[0].positions(), model[0].tensor().values))
    for parts in zip(*states, strict=True):
        np.testing.assert_array_equal(*parts)


def test_ranks_observe_the_whole_batch():
    in_two_processes(_ranks)


def test_a_layer_in_float64():
    model = nn.Sequential(SparseLinear(16, 12, density=0.25, dtype=torch.float64))
    model, _, method = make(model=model, delta_t=1)
    backward(model, torch.randn(3, 16, dtype=torch.float64))
    assert method.observed(model[0]).weight_grad().dtype == torch.float64


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("kind", ["l1_norms", "batches"])
def test_gradients_that_were_thrown_away_are_not_seen(to_none, kind):
    """SAM's first pass, or a discriminator that gradients went through on their way."""
    model, optimizer, method = make(delta_t=1)
    observer, layer, x = method._observer, model[0], torch.randn(8, 32)
    observer.stop()
    observer.watch(layer, kind)
    backward(model, 5 * torch.randn(8, 32))
    optimizer.zero_grad(set_to_none=to_none)
    backward(model, x)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # writes gradients, and throws none away
    backward(model, x)
    seen = observer.of(layer)
    observer.stop()
    observer.watch(layer, kind)
    for _ in range(2):
        backward(model, x)
    again = observer.of(layer)
    assert torch.equal(seen.input_norms, again.input_norms)
    assert torch.equal(seen.output_grad_norms, again.output_grad_norms)
    assert kind != "batches" or torch.equal(seen.weight_grad(), again.weight_grad())


def test_a_layer_called_twice_in_one_pass_counts_twice():
    layer = SparseLinear(8, 8, density=0.5)
    observer = train.observe.Observer()
    observer.watch(layer, "batches")
    x = torch.randn(4, 8, requires_grad=True)
    layer(layer(x)).square().sum().backward()
    assert len(observer.of(layer)._whole()) == 2
