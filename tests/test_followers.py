"""What moves with weights: state in wrapped optimizers, averages that are named, ranks, FSDP2."""

from __future__ import annotations

import copy
import os
import socket

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from test_averages import assert_kept_weights_agree, dense, network, resting  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel  # noqa: E402
from train_cases import stepped  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.torch import Participating, participate  # noqa: E402
from spfmt.train import SET, Rewire  # noqa: E402

# ------------------------------------------------------------------------------ wrapped optimizers


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer, which keeps the state, under whatever name."""

    def __init__(self, inner, name="base_optimizer", deeper=None):
        super().__init__(inner.param_groups, inner.defaults)
        setattr(self, name, inner)

    def step(self, closure=None):
        (inner,) = (v for v in vars(self).values() if isinstance(v, torch.optim.Optimizer))
        inner.step(closure)


class Hidden(torch.optim.Optimizer):
    """Keeps its momenta in a list of its own."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.momenta = [torch.zeros_like(p) for p in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for p, momentum in zip(self.param_groups[0]["params"], self.momenta, strict=True):
            p -= 0.1 * momentum.mul_(0.9).add_(p.grad)


class Engine:
    """What a fused implementation keeps beside the optimizer."""

    def __init__(self, params):
        self.flat = torch.zeros(sum(p.numel() for p in params))


class Fused(Hidden):
    def __init__(self, params):
        super().__init__(params)
        self.engine = Engine(self.param_groups[0]["params"])
        self.momenta = []


class Sign(torch.optim.Optimizer):
    """Has no state at all."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})
        self.constants = torch.ones(3)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p -= 0.01 * p.grad.sign()


def train(model, optimizer, method=None, steps=12):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 32, generator=generator)
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        if method is not None:
            method.step()
    return dense(model[0])


@pytest.mark.parametrize("name", ["optim", "optimizer", "base_optimizer", "anything"])
@pytest.mark.parametrize("depth", [1, 2])
def test_state_in_wrapped_optimizers_follows(name, depth):
    runs = []
    for wrapped in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(depth * wrapped):
            optimizer = Wrapper(optimizer, name)
        runs.append(train(model, optimizer, SET(model, optimizer, delta_t=3, t_end=100)))
    assert torch.equal(*runs)


def test_state_out_of_reach_is_refused_before_anything_moves():
    model = network()
    optimizer = Hidden(model.parameters())
    method = SET(model, optimizer, delta_t=1, t_end=100)
    before = model[0].tensor()
    train(model, optimizer, steps=1)
    trained = model[0].tensor()
    with pytest.raises(FormatError, match=r"Hidden\.momenta"):
        stepped(method)
    assert trained != before
    assert model[0].tensor() == trained


def test_state_in_an_object_beside_the_optimizer_is_refused():
    model = network()
    with pytest.raises(FormatError, match=r"Fused\.engine"):
        stepped(SET(model, Fused(model.parameters()), delta_t=1, t_end=100))


def test_an_optimizer_without_state_is_fine():
    model = network()
    optimizer = Sign(model.parameters())
    method = SET(model, optimizer, delta_t=1, t_end=100)
    train(model, optimizer, method, 3)
    assert method.updates == 3


def test_wrapped_lbfgs_is_refused():
    model = nn.Sequential(network()[0])
    with pytest.raises(FormatError, match="L-BFGS"):
        SET(model, Wrapper(torch.optim.LBFGS(model.parameters())), t_end=1000)


def test_a_layer_whose_parameter_was_replaced_is_refused():
    model = network()
    method = resting(model)
    model[0].values = nn.Parameter(model[0].values.detach().clone())
    before = dense(model[0])
    with pytest.raises(FormatError, match=r"0\.values"):
        stepped(method)
    assert torch.equal(dense(model[0]), before)


# ------------------------------------------------------------------------------ averages by name


def loaded(average: dict, like: nn.Module) -> nn.Module:
    model = copy.deepcopy(like)
    model.load_state_dict(average, strict=False)
    return model


@pytest.mark.parametrize("prefix", ["", "module."])
def test_mappings_follow(prefix):
    model = network()
    full = {prefix + k: v.clone() for k, v in model.state_dict().items()}
    weights = {prefix + k: v.detach().clone() for k, v in model.named_parameters()}
    method = resting(model, averages=[full, weights])
    for _ in range(3):
        assert stepped(method)
    plain = {key.removeprefix(prefix): value for key, value in full.items()}
    assert_kept_weights_agree(loaded(plain, model)[0], model[0])
    assert torch.equal(weights[prefix + "0.values"], full[prefix + "0.values"])
    assert torch.equal(plain["2.structure"], model[2].structure)


def test_models_follow_even_where_nobody_wrote_them():
    model = network()
    twin, average, other = copy.deepcopy(model), AveragedModel(model), network(seed=0)
    method = resting(model, averages=[twin, average, other])
    for _ in range(3):
        assert stepped(method)
        other.load_state_dict(other.state_dict())  # a run that goes on loads its averages
    for copied in (twin, average.module, other):
        assert torch.equal(copied[0].structure, model[0].structure)
        assert_kept_weights_agree(copied[0], model[0])
    saved = copy.deepcopy(twin)
    before = dense(saved[0])
    assert stepped(method)
    assert torch.equal(dense(saved[0]), before)


def test_averages_that_do_not_fit_are_refused():
    model = network()
    for wrong, message in [
        ({}, r"without 0\.values"),
        (nn.Linear(2, 2), r"Linear without 0\.values"),
        (3.0, "float"),
        (network(seed=1), "other positions"),
        ({"0.values": torch.zeros(3), "2.values": model[2].values}, "3 values"),
    ]:
        with pytest.raises((FormatError, TypeError), match=message):
            resting(model, averages=[wrong])
    state = {k: v.clone() for k, v in model.state_dict().items()}
    method = resting(model, averages=state)
    state.update({k: v.clone() for k, v in network(seed=1).state_dict().items()})
    before = dense(model[0])
    with pytest.raises(FormatError, match="other positions"):
        stepped(method)
    assert torch.equal(dense(model[0]), before)


# ------------------------------------------------------------------------------------ many ranks


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_two_processes(body) -> None:
    mp.spawn(_rank, args=(body, free_port()), nprocs=2)


def _rank(rank: int, body, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    body(rank)
    dist.barrier()  # or the other rank's calls would fail when this one has gone
    os._exit(0)  # taking gloo's threads down aborts once in some hundred runs: not what is tested


def _ranks_that_differ(rank: int) -> None:
    with pytest.raises(FormatError, match="different seed"):
        resting(network(), seed=rank)
    with pytest.raises(FormatError, match="different layers or structures"):
        resting(network(seed=rank))
    begun = nn.Sequential(nn.Linear(32, 32))
    optimizer = torch.optim.SGD(begun.parameters(), lr=0.1)
    with pytest.raises(FormatError, match="with different layers or structures;"):
        SET(begun, optimizer, density=0.1 + 0.1 * rank, t_end=1000)
    assert type(begun[0]) is nn.Linear
    own = [dist.new_group([r]) for r in (0, 1)][rank]
    resting(network(seed=rank), seed=rank, process_group=own)
    model = network()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
    method = SET(ddp, optimizer, delta_t=1, t_end=100)
    torch.manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        ddp(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        assert method.step()
    found = [None, None]
    dist.all_gather_object(found, dense(model[0]))
    assert torch.equal(*found)


def test_ranks_that_differ_are_refused():
    in_two_processes(_ranks_that_differ)


def _shard_optimizer_state(rank: int) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    runs = []
    for sharded in (False, True):
        model = network()
        if sharded:
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        runs.append(train(model, optimizer, SET(model, optimizer, delta_t=3, t_end=100)))
    assert torch.equal(*runs)


def test_zero_redundancy_optimizer():
    in_two_processes(_shard_optimizer_state)


def _fully_shard(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for moving in (False, True):
        runs = []
        for sharded in (False, True):
            model = network()
            if sharded:
                for layer in (model[0], model[2]):
                    fully_shard(layer)
                fully_shard(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            method = SET(model, optimizer, delta_t=3, t_end=100) if moving else None
            train(model, optimizer, method)
            assert method is None or method.updates == 4
            runs.append(model[0].tensor())
        np.testing.assert_array_equal(runs[0].mask(), runs[1].mask())
        np.testing.assert_allclose(runs[0].to_dense(), runs[1].to_dense(), rtol=1e-4, atol=1e-6)
    alone = fully_shard(network()[0])
    method = resting(nn.Sequential(alone))
    with torch.no_grad():
        alone(torch.zeros(1, 32))  # leaves the values of a root gathered: writes would be lost
    with pytest.raises(FormatError, match="reshard"):
        stepped(method)
    alone.reshard()
    assert stepped(method)
    _refuse_sharded_weights(fully_shard)


def _refuse_sharded_weights(fully_shard) -> None:
    dense = [fully_shard(nn.Sequential(nn.Linear(32, 32))) for _ in range(2)]
    taken = nn.Sequential(nn.Linear(32, 32))
    participate(taken, density=0.25, include="*")
    for model, method, options in (
        (dense[0], SET, {"density": 0.25, "t_end": 900}),
        (dense[1], Rewire, {"density": 0.25, "mode": "reset", "include": "*"}),
        (fully_shard(taken), Rewire, {"mode": "reset"}),
    ):
        with pytest.raises(FormatError, match="sharded"):
            method(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    with pytest.raises(FormatError, match="sharded"):
        Participating(dense[0][0], density=0.25)


def test_fsdp2_trains_and_moves():
    in_two_processes(_fully_shard)


def _rewire(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))
    alone = copy.deepcopy(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    runs = []
    for used, inner in ((ddp, model), (alone, alone)):
        optimizer = torch.optim.SGD(used.parameters(), lr=0.5, momentum=0.9)
        method = Rewire(used, optimizer, density=0.25, mode="no_exploit")
        for step in range(4):
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
            own = x[rank::2] if used is ddp else x
            optimizer.zero_grad()
            used(own).square().sum(1).mean().backward()
            optimizer.step()
            method.step()
        assert method.updates > 1
        runs.append((inner[2].weight.detach(), inner[2].positions()))
    torch.testing.assert_close(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])
    found = [None, None]
    dist.all_gather_object(found, runs[0])
    assert torch.equal(found[0][0], found[1][0])
    with pytest.raises(FormatError, match="different beta"):
        Rewire(alone, optimizer, beta=0.1 * (rank + 1), mode="regularize")


def test_all_weights_of_ranks_stay_equal():
    in_two_processes(_rewire)
