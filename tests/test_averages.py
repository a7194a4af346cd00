"""Averaged models and copies beside a structure that moves, and words that averaging damages."""

from __future__ import annotations

import copy
import logging

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402
from train_cases import stepped  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.torch import SparseLinear, sparsify  # noqa: E402
from spfmt.train import SET  # noqa: E402

PARAMS = {"shuffled_block": {"block_shape": (4, 4)}}


def network(format: str = "condensed", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    sparsify(model, format, density=0.25, scores="random", reset=True,
             generator=torch.Generator().manual_seed(seed), **PARAMS.get(format, {}))  # fmt: skip
    return model


def dense(layer: SparseLinear) -> torch.Tensor:
    return torch.from_numpy(layer.tensor().to_dense())


def resting(model: nn.Module, **options) -> SET:
    """A method that moves the topology at every step of an optimizer that changes nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return SET(model, optimizer, delta_t=1, t_end=100, **options)


@torch.no_grad()
def blend(average: nn.Module, model: nn.Module, decay: float = 0.9) -> None:
    """EMA over whole state_dicts, as many training scripts write it."""
    states = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    for mean, now in states:
        mean.copy_(decay * mean + (1 - decay) * now)


def assert_kept_weights_agree(average: SparseLinear, layer: SparseLinear) -> None:
    now = dense(layer)
    kept = now != 0  # they never changed, so their average is themselves
    assert kept.any()
    torch.testing.assert_close(dense(average)[kept], now[kept])


@pytest.mark.parametrize("format", ["condensed", "csr", "shuffled_block"])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_moves_along(format, use_buffers):
    model = network(format)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    average.update_parameters(model)
    method = resting(model)
    for _ in range(4):
        assert stepped(method)
        average.update_parameters(model)
    for twin, layer in ((average.module[0], model[0]), (average.module[2], model[2])):
        assert_kept_weights_agree(twin, layer)
    x = torch.randn(3, 32)
    average(x)  # words that were averaged are restored on the way
    assert torch.equal(average.module[0].structure, model[0].structure)


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_words_that_were_averaged_with_equal_ones_are_restored(decay, caplog):
    model = network()
    average, x = copy.deepcopy(model), torch.randn(3, 32)
    for _ in range(200):
        blend(average, model, decay)
    assert not torch.equal(average[0].structure, model[0].structure)
    with caplog.at_level(logging.WARNING, "spfmt"), torch.no_grad():
        torch.testing.assert_close(average(x), model(x))
    assert "restored" in caplog.text
    assert torch.equal(average[0].structure, model[0].structure)


def test_words_that_were_averaged_with_another_structure_are_refused():
    model = network()
    average = copy.deepcopy(model)
    assert stepped(resting(model))  # before the first average: the copy looks like a checkpoint
    blend(average, model, 0.9999)
    with pytest.raises(FormatError, match="averages="):
        average(torch.randn(3, 32))
    other = network(seed=1)
    blend(other, network(seed=2))
    with pytest.raises(FormatError, match="structure words"):
        other(torch.randn(3, 32))


def test_words_overwritten_after_the_original_moved_are_told(caplog):
    model = network()
    late = AveragedModel(model)
    assert stepped(resting(model))
    late.update_parameters(model)  # the first update copies everything, which is right
    with caplog.at_level(logging.WARNING, "spfmt"):
        assert torch.equal(dense(late.module[0]), dense(model[0]))
    assert "overwritten" in caplog.text


def test_saved_copies_stay_as_they_are():
    model = network()
    best, loaded, once = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    loaded.load_state_dict(model.state_dict())
    once.to(torch.float32)
    saved = dense(model[0]).clone()
    method = resting(model)
    for _ in range(3):
        assert stepped(method)
    assert not torch.equal(dense(model[0]) != 0, saved != 0)
    for copied in (best, loaded, once):
        assert torch.equal(dense(copied[0]), saved)


def test_an_average_of_an_average_moves_too():
    model = network()
    average = copy.deepcopy(model)
    second = copy.deepcopy(average)
    for target in (average, second):
        target.load_state_dict(model.state_dict())
        for mean, now in zip(target.buffers(), model.buffers(), strict=True):
            mean.copy_(now)
    assert stepped(resting(model))
    for twin in (average, second):
        assert torch.equal(twin[0].structure, model[0].structure)
        assert_kept_weights_agree(twin[0], model[0])


@pytest.mark.parametrize("broadcast", [False, True])
def test_a_copy_that_is_trained_itself_goes_its_own_way(broadcast):
    """Twins with one seed stand on equal structures, and yet neither is the other's average."""
    model = network()
    twin, alone = copy.deepcopy(model), network()
    methods = [resting(m) for m in (model, twin, alone)]
    for method in methods:
        if broadcast:
            for now in (twin, alone):
                now[0].structure.copy_(now[0].structure.clone())
        assert stepped(method)
    with torch.no_grad():
        for part in (twin[0], alone[0]):
            part.values.mul_(2)
            if broadcast:  # as DDP does with buffers, before every forward pass
                part.structure.copy_(part.structure.clone())
    for method in methods:
        assert stepped(method)
    assert torch.equal(dense(twin[0]), dense(alone[0]))


def test_a_restored_model_leaves_its_average_behind():
    model = network()
    start = copy.deepcopy(model.state_dict())
    average = copy.deepcopy(model)
    blend(average, model)
    assert stepped(resting(model))
    assert torch.equal(average[0].structure, model[0].structure)
    model.load_state_dict(start)
    blend(average, model, 0.9999)
    with pytest.raises(FormatError, match="averages="):
        average(torch.randn(3, 32))


def test_damaged_words_are_saved_whole_and_refused_by_compiled_graphs():
    model = network()
    x = torch.randn(3, 32)
    averages = [AveragedModel(model, use_buffers=True) for _ in range(2)]
    for average in averages:
        for _ in range(3):
            average.update_parameters(model)
        for buffer in (average.module[0].structure, average.module[2].structure):
            buffer[buffer > 2] -= 1  # as decays of 0.999 do it
    twin = network(seed=1)
    twin.load_state_dict(averages[0].module.state_dict())
    torch.testing.assert_close(twin(x), model(x))
    compiled = torch.compile(averages[1], backend="eager")
    with pytest.raises(FormatError, match="structure words"):
        compiled(x)
    averages[1](x)  # once outside
    torch.testing.assert_close(compiled(x), model(x))
