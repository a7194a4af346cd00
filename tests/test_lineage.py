"""Which copies of a model are averages, when that is told late or never, and who stays alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from test_averages import assert_kept_weights_agree, blend, dense, network, resting  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn  # noqa: E402
from train_cases import stepped  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.torch import SparseModule  # noqa: E402
from spfmt.train import SET, Static  # noqa: E402

UNCLEAR = "averages="


@torch.no_grad()
def blend_parameters(average: nn.Module, model: nn.Module) -> None:
    for mean, now in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(now, 0.1)


@torch.no_grad()
def blend_data(average: nn.Module, model: nn.Module) -> None:
    """As scripts of many years do it: torch counts no such write."""
    for mean, now in zip(average.parameters(), model.parameters(), strict=True):
        mean.data.mul_(0.9).add_(now.data, alpha=0.1)


def shift(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].values += model[0].values != 0


def optimise(model: nn.Module, steps: int = 2, optimizer=None, **options) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(**options)
        model(x).square().mean().backward()
        optimizer.step()


def alone(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, SparseModule):
            layer.stand_alone()


# ------------------------------------------------------------------------------------- resuming


class Run:
    """A run whose topology moves at every fourth step, with an average by torch."""

    def __init__(self, use_buffers: bool, named: bool) -> None:
        self.model = network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.method = SET(self.model, self.optimizer, delta_t=4, t_end=100)
        fn = get_ema_multi_avg_fn(0.9)
        self.average = AveragedModel(self.model, multi_avg_fn=fn, use_buffers=use_buffers)
        if named:
            self.method.add_averages(self.average)

    @property
    def parts(self):
        return self.model, self.optimizer, self.method, self.average

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            (self.model(x) - x[:, :8]).square().mean().backward()
            self.optimizer.step()
            self.method.step()
            self.average.update_parameters(self.model)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("cut", range(3, 9))  # steps 4 and 8 move
def test_a_run_that_resumes_has_the_same_average_or_says_so(cut, use_buffers, named, order):
    whole = Run(use_buffers, named)
    whole.steps(0, cut)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole.parts], file)
    whole.steps(cut, 14)
    file.seek(0)
    states, resumed = torch.load(file, weights_only=True), Run(use_buffers, named)
    for i in order:
        resumed.parts[i].load_state_dict(states[i])
    if not named and cut % 4 == 3:  # the first event moves the model: too early to tell
        before = resumed.model[0].positions()
        with pytest.raises(FormatError, match=r"add_averages\(\.\.\.\)"):
            resumed.steps(cut, 14)
        assert (resumed.model[0].positions() == before).all()
        return
    resumed.steps(cut, 14)
    for a, b in ((whole.model, resumed.model), (whole.average, resumed.average)):
        for mine, other in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            assert torch.equal(mine, other)


def test_an_average_that_is_loaded_within_its_run_goes_on():
    model = network()
    average = AveragedModel(model)
    average.update_parameters(model)
    shift(model)
    average.update_parameters(model)
    average.load_state_dict(copy.deepcopy(average.state_dict()))
    assert stepped(resting(model))
    assert torch.equal(average.module[0].structure, model[0].structure)


def test_states_loaded_from_the_model_or_its_average_are_saved_ones():
    model = network()
    method = resting(model)
    average, *kept = (copy.deepcopy(model) for _ in range(4))
    shift(model)
    blend(average, model)
    best, best_average, late = kept
    best.load_state_dict(model.state_dict())
    best_average.load_state_dict(average.state_dict())
    saved = [dense(copied[0]) for copied in kept]
    assert stepped(method)
    late.load_state_dict(best.state_dict())  # on what is the old structure now
    assert stepped(method)
    assert torch.equal(dense(best[0]), saved[0])
    assert torch.equal(dense(best_average[0]), saved[1])
    assert torch.equal(average[0].structure, model[0].structure)


def test_models_that_are_pickled_or_copied_together_go_on_together():
    model = network()
    resting(model)
    average, best = copy.deepcopy(model), copy.deepcopy(model)
    shift(model)
    blend(average, model)
    pairs = [(model, average, best), (average, best, model)]
    taken = [*map(copy.deepcopy, pairs), *(pickle.loads(pickle.dumps(pair)) for pair in pairs)]
    taken[1], taken[3] = ((c, a, b) for a, b, c in (taken[1], taken[3]))
    for original, mean, saved in [*taken, pairs[0]]:
        before = dense(saved[0])
        others = [(own, dense(own[0])) for three in taken for own in three if own is not original]
        assert stepped(resting(original))
        assert torch.equal(mean[0].structure, original[0].structure)
        assert_kept_weights_agree_but_for(mean, original)
        assert torch.equal(dense(saved[0]), before)
        for own, known in others:
            assert own is mean or torch.equal(dense(own[0]), known)


def assert_kept_weights_agree_but_for(average: nn.Module, model: nn.Module) -> None:
    """After one average of weights and the same plus 1, 0.9 is missing."""
    now = dense(model[0])
    kept = now != 0
    torch.testing.assert_close(dense(average[0])[kept] + 0.9, now[kept])


# ---------------------------------------------------------------------- averages of parameters


@pytest.mark.parametrize("update", [blend_parameters, blend_data])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("turned", ["copy", "original", "twin"])
def test_an_average_of_parameters_is_refused_until_it_is_named(turned, late, update):
    first = network()
    second = copy.deepcopy(first)
    model, average = {
        "copy": (first, second),
        "original": (second, first),
        "twin": (second, copy.deepcopy(first)),
    }[turned]
    del first, second
    method = resting(model)
    if late:
        assert stepped(method)
    shift(model)
    update(average, model)
    before, values = model[0].positions(), model[0].values.clone()
    for _ in range(2):
        with pytest.raises(FormatError, match=UNCLEAR):
            stepped(method)
        with pytest.raises(FormatError, match=UNCLEAR):
            model[0].averages()
        with pytest.raises(FormatError, match=UNCLEAR):
            model[0].set_structure(network(seed=1)[0].tensor())
        assert (model[0].positions() == before).all()
        assert torch.equal(model[0].values, values)
    if late:
        with pytest.raises(FormatError, match="other positions"):
            method.add_averages(average)
        average.load_state_dict(model.state_dict())
    method.add_averages(average)
    for _ in range(3):
        assert stepped(method)
        update(average, model)
    assert torch.equal(average[0].structure, model[0].structure)
    still = copy.deepcopy(model)
    with torch.no_grad():  # weights that stay are their own average, up to the shift before
        kept = dense(model[0]) != 0
        assert ((dense(average[0])[kept] - dense(still[0])[kept]).abs() <= 1).all()


def test_named_averages_of_parameters_are_right():
    model = network()
    average = copy.deepcopy(model)
    method = resting(model, averages=average)
    for _ in range(4):
        assert stepped(method)
        blend_parameters(average, model)
    assert_kept_weights_agree(average[0], model[0])
    with pytest.raises(FormatError, match="its own average"):
        method.add_averages(model)


def test_a_copy_that_is_said_to_stand_alone_stays():
    model = network()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].values.mul_(0.5)
    method, before = resting(model), dense(changed[0])
    with pytest.raises(FormatError, match=r"stand_alone\(\)"):
        stepped(method)
    alone(changed)
    assert stepped(method)
    assert torch.equal(dense(changed[0]), before)


# --------------------------------------------------------------------------- who is independent


def test_a_kept_copy_of_another_run_is_no_concern():
    x = torch.randn(2, 32)
    kept = []
    for _ in range(2):
        model = network()
        kept.append(copy.deepcopy(model))
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        method = resting(model)
        for _ in range(5):
            average.update_parameters(model)
            assert stepped(method)
            average(x)
        assert_kept_weights_agree(average.module[0], model[0])
        kept.append((model, average))


@pytest.mark.parametrize("trained", ["copy", "original", "twin"])
def test_what_an_optimizer_trains_is_no_average(trained):
    first = network()
    second = copy.deepcopy(first)
    third = copy.deepcopy(first)
    model, other = {
        "copy": (first, second), "original": (second, first), "twin": (second, third)
    }[trained]  # fmt: skip
    own = AveragedModel(other)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    method = resting(model)
    optimise(other, optimizer=optimizer)
    own.update_parameters(other)
    before, mean = dense(other[0]), dense(own.module[0])
    for _ in range(2):
        assert stepped(method)
    assert torch.equal(dense(other[0]), before)
    assert torch.equal(dense(own.module[0]), mean)


def test_two_trainers_of_one_start_have_their_own_averages():
    start = network()
    runs = []
    for kind in (SET, Static, SET):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        method = kind(model, optimizer, delta_t=1, t_end=100)
        runs.append((model, AveragedModel(model), method))
    for _ in range(3):
        for model, average, method in runs:
            average.update_parameters(model)
            assert stepped(method) or isinstance(method, Static)
            assert torch.equal(average.module[0].structure, model[0].structure)
    assert torch.equal(dense(start[0]), dense(runs[1][0][0]))


def test_gradients_that_nobody_clears_make_no_average_independent():
    """A teacher that is called without no_grad gets gradients, and nobody looks at them."""
    model = network()
    teacher = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = resting(model)
    for _ in range(3):
        x = torch.randn(4, 32)
        optimizer.zero_grad()
        (model(x) - teacher(x) - x[:, :8]).square().mean().backward()
        optimizer.step()
        blend_parameters(teacher, model)
    with pytest.raises(FormatError, match=UNCLEAR):
        stepped(method)


def test_a_trained_copy_whose_words_are_written_is_unclear():
    model = network()
    other = copy.deepcopy(model)
    optimise(other)
    other[0].structure.copy_(other[0].structure.clone())  # by DDP, or by who keeps it in step
    method = resting(model)
    with pytest.raises(FormatError, match="was trained"):
        stepped(method)
    alone(other)
    assert stepped(method)


def test_a_trained_copy_can_be_compiled_converted_and_pickled():
    model = network()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    optimise(compiled)
    half, loaded = copy.deepcopy(model).to(torch.bfloat16), pickle.loads(pickle.dumps(model))
    shallow = copy.copy(model[0])
    method = resting(model)
    before = [dense(compiled._orig_mod[0]), half[0].values.clone(), dense(loaded[0])]
    assert stepped(method)
    after = [dense(compiled._orig_mod[0]), half[0].values, dense(loaded[0])]
    assert all(map(torch.equal, before, after))
    assert torch.equal(dense(shallow), dense(model[0]))


def test_averages_on_other_terms_follow():
    """Of another type, seldom updated, with its own function, with statistics of its own."""
    model = nn.Sequential(*network(), nn.BatchNorm1d(8))
    double = copy.deepcopy(model).double()
    seldom = AveragedModel(model, avg_fn=lambda mean, now, n: 0.5 * mean + 0.5 * now)
    method = resting(model)
    for step in range(6):
        if step % 3 == 0:
            seldom.update_parameters(model)
            blend(double, model)
        assert stepped(method)
    update_bn([torch.randn(4, 32)], seldom)
    for average in (double, seldom.module):
        assert torch.equal(average[0].structure, model[0].structure)
        kept = dense(model[0]) != 0
        mean, now = dense(average[0])[kept], dense(model[0])[kept]
        torch.testing.assert_close(mean.float(), now)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_blocks_that_are_repeated_in_a_model_have_their_own_averages(early, use_buffers):
    block = network("csr")[0]
    model = nn.Sequential(block, *(copy.deepcopy(block) for _ in range(2)))
    for layer in model:
        layer.structure.copy_(layer.structure.clone())  # as DDP does when it begins
    method = None if early else resting(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    method = method or resting(model)
    for _ in range(4):
        average.update_parameters(model)
        assert stepped(method)
    best, file = copy.deepcopy(average), io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    average.load_state_dict(torch.load(file, weights_only=True))
    saved = [dense(layer) for layer in best.module]
    assert stepped(method)
    for mean, layer in zip(average.module, model, strict=True):
        assert_kept_weights_agree(mean, layer)
    assert all(map(torch.equal, saved, map(dense, best.module)))
