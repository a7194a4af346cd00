"""Rewire against plain loops written from the paper: algorithm 1, appendices B and E."""

from __future__ import annotations

import copy
import gc
import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from train_cases import assert_resumes, train  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.formats import CSR, NM, ShuffledBlock  # noqa: E402
from spfmt.torch import Participating, SparseConv2d, SparseLinear, participate  # noqa: E402
from spfmt.train import SET, Rewire  # noqa: E402
from spfmt.train.schedule import IntervalSchedule  # noqa: E402

# ------------------------------------------------------------------- who participates, in loops


def largest(weight, count):
    """The `count` largest magnitudes; of equal ones the first."""
    places = sorted(np.ndindex(weight.shape), key=lambda p: (-abs(weight[p]), p))
    mask = np.zeros(weight.shape, bool)
    for place in places[:count]:
        mask[place] = True
    return mask


def n_of_m(weight, n, m):
    """The n largest of every m input channels, at every cell of a kernel by itself."""
    mask = np.zeros(weight.shape, bool)
    rows, channels, *cells = weight.shape
    for row, start in itertools.product(range(rows), range(0, channels, m)):
        for cell in np.ndindex(*cells):
            group = range(start, min(start + m, channels))
            best = sorted(group, key=lambda c: (-abs(weight[(row, c, *cell)]), c))[:n]
            for c in best:
                mask[(row, c, *cell)] = True
    return mask


def patterns_2_4():
    """All 4 x 4 masks with two in every row and column, rows' combinations in order."""
    pairs = list(itertools.combinations(range(4), 2))
    for rows in itertools.product(pairs, repeat=4):
        tile = np.zeros((4, 4), bool)
        for i, pair in enumerate(rows):
            tile[i, list(pair)] = True
        if (tile.sum(0) == 2).all():
            yield tile


def tiles_2_4(weight):
    """Of the 90 patterns of every tile the one of largest 1-norm, the first of equal ones."""
    patterns = list(patterns_2_4())
    assert len(patterns) == 90
    mask = np.zeros(weight.shape, bool)
    for r, c in itertools.product(range(0, weight.shape[0], 4), range(0, weight.shape[1], 4)):
        tile = np.abs(weight[r : r + 4, c : c + 4])
        norms = [(tile * pattern).sum() for pattern in patterns]
        mask[r : r + 4, c : c + 4] = patterns[int(np.argmax(norms))]
    return mask


def grid_blocks(weight, shape, budget, p=math.inf):
    """Fewest blocks of the grid of largest p-norm that hold the budget; of equal ones the first."""
    rows, cols = weight.shape
    blocks = [
        (slice(r, r + shape[0]), slice(c, c + shape[1]))
        for r in range(0, rows, shape[0])
        for c in range(0, cols, shape[1])
    ]

    def norm(block):
        part = np.abs(weight[block])
        return part.max() if p == math.inf else (part**p).sum() ** (1 / p)

    mask = np.zeros(weight.shape, bool)
    for block in sorted(blocks, key=norm, reverse=True):  # stable
        if mask.sum() >= budget:
            break
        mask[block] = True
    return mask


STRUCTURES = {
    "csr": ({"format": "csr", "density": 0.25}, lambda w: largest(w, round(0.25 * w.size))),
    "2:4": ({"format": "nm", "n": 2, "m": 4}, lambda w: n_of_m(w, 2, 4)),
    "1:3": ({"format": "nm", "n": 1, "m": 3}, lambda w: n_of_m(w, 1, 3)),
    "2:4 in 2D": ({"format": "nm", "n": 2, "m": 4, "transposable": 1}, tiles_2_4),
    "blocks": (
        {"format": "shuffled_block", "density": 0.4, "block_shape": (2, 4)},
        lambda w: grid_blocks(w, (2, 4), round(0.4 * w.size)),
    ),
    "ragged blocks": (
        {"format": "shuffled_block", "density": 0.3, "block_shape": (3, 5)},
        lambda w: grid_blocks(w, (3, 5), round(0.3 * w.size)),
    ),
}


def algorithm_1(weight, choose, inputs, grads, *, mode, lr, momentum, v, z, beta, lambda_w, scale,
                interval):  # fmt: skip
    """Weights and masks after every step, of SGD with momentum, in float64."""
    weight, buffer, masks = weight.copy(), None, []
    mask = choose(weight)
    for t, (x, dy) in enumerate(zip(inputs, grads, strict=True), start=1):
        gradient = dy.T @ x
        gradient = np.where(mask, gradient, scale * gradient)
        if mode == "sr_ste":
            gradient = gradient + lambda_w * np.where(mask, 0, weight)
        buffer = gradient if buffer is None else momentum * buffer + gradient
        weight = weight - lr * buffer
        fixed = (mode == "fix" and t >= v) or mode == "no_explore"
        if fixed or (mode == "reset" and t % z == 0):
            weight = np.where(mask, weight, 0)
        if mode == "regularize":
            weight = np.where(mask, weight, weight - beta * weight)
        if not fixed and t % interval == 0:
            mask = choose(weight)
        masks.append((weight, mask))
    return masks


def mask_of(layer):
    mask = np.zeros(layer.weight.numel(), bool)
    mask[layer.positions()] = True
    return mask.reshape(layer.weight.shape)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "mode", ["fix", "reset", "regularize", "sr_ste", "no_exploit", "no_explore"]
)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    interval=st.integers(1, 3),
    v=st.integers(1, 6),
    z=st.integers(1, 4),
    scale=st.sampled_from([1.0, 0.5, 0.0]),
    spread=st.sampled_from([1, 3, 100]),
    seed=st.integers(0, 2**32 - 1),
)
def test_steps_are_those_of_algorithm_1(structure, mode, interval, v, z, scale, spread, seed):
    """All numbers are short binary fractions, so that sums are exact and ties are ties."""
    rng = np.random.default_rng(seed)
    options, choose = STRUCTURES[structure]
    rows, cols, steps = 8, 12, 6
    start = rng.integers(-spread, spread + 1, (rows, cols)) / 4
    inputs = rng.integers(-2, 3, (steps, 3, cols)).astype(float)
    grads = rng.integers(-2, 3, (steps, 3, rows)).astype(float)
    numbers = {"v": v, "z": z, "beta": 0.25, "lambda_w": 0.5, "interval": interval}
    expected = algorithm_1(start, choose, inputs, grads, mode=mode, lr=0.25, momentum=0.5,
                           scale=scale, **numbers)  # fmt: skip

    model = nn.Sequential(nn.Linear(cols, rows, bias=False, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(start))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    method = Rewire(model, optimizer, mode=mode, gradient_scale=scale, include="*", **numbers,
                    **options)  # fmt: skip
    before = choose(start)
    np.testing.assert_array_equal(mask_of(model[0]), before)
    for x, dy, (weight, mask) in zip(inputs, grads, expected, strict=True):
        optimizer.zero_grad()
        images = torch.from_numpy(x).requires_grad_()
        y = model(images)
        held = np.where(before, model[0].weight.detach().numpy(), 0)
        np.testing.assert_array_equal(y.detach().numpy(), x @ held.T)
        y.backward(torch.from_numpy(dy))
        np.testing.assert_array_equal(images.grad.numpy(), dy @ held)
        optimizer.step()
        assert method.step() == (not np.array_equal(before, mask))
        np.testing.assert_array_equal(model[0].weight.detach().numpy(), weight)
        np.testing.assert_array_equal(mask_of(model[0]), mask)
        before = mask


@pytest.mark.parametrize("structure", ["2:4", "1:3"])
def test_groups_of_convolutions_run_along_their_input_channels(structure):
    options, choose = STRUCTURES[structure]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 4, 3))
    method = Rewire(model, torch.optim.SGD(model.parameters(), lr=0.1), include="*",
                    mode="no_exploit", **options)  # fmt: skip
    for _ in range(3):
        np.testing.assert_array_equal(mask_of(model[0]), choose(model[0].weight.detach().numpy()))
        with torch.no_grad():
            model[0].weight.normal_()
        assert method.step()


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("shape", [(8, 12), (7, 10)])
def test_blocks_of_largest_p_norm(p, shape):
    weight = np.random.default_rng(int(10 * p)).standard_normal(shape)
    found = ShuffledBlock.from_magnitudes(weight, 0.4, block_shape=(2, 4), aligned=True, norm=p)
    expected = grid_blocks(weight, (2, 4), round(0.4 * weight.size), p)
    np.testing.assert_array_equal(found.mask(), expected)


def test_every_rewiring_counts_and_what_participated_is_remembered():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    method = Rewire(model, torch.optim.SGD(model.parameters(), lr=0.1), density=0.25,
                    mode="no_exploit", include="0")  # fmt: skip
    changes = []
    for row in ([4, 3, 2, 1], [4, 3, 2, 1], [4, 5, 2, 1], [4, 3, 2, 5], [9, 3, 2, 5]):
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([row]))
        changes.append(method.step())
    assert changes[1:] == [False, True, True, True]
    assert method.updates == sum(changes)
    summary = method.summary()
    assert summary.layers[0].exploration >= 3 / 4
    assert summary.layers[0].density == summary.layers[0].target_density == 0.25
    assert f"5 steps, {sum(changes)} updates" in str(summary)


# ---------------------------------------------------------------------------------- exploitation


def network(seed: int = 0, steps=(), **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(inplace=True), nn.Linear(48, 48), nn.ReLU(),
                          nn.Linear(48, 8))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **dict(steps))
    options = {"density": 0.25, "total_steps": 12, **options}
    return model, optimizer, Rewire(model, optimizer, **options)


def batches(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(16, 32, generator=generator)


def test_regularisation_ignores_the_learning_rate_and_sr_ste_does_not():
    for mode, shrinks in (("regularize", True), ("sr_ste", False)):
        model = nn.Sequential(nn.Linear(4, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[8.0, 4.0, 4.0, 4.0]]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        method = Rewire(model, optimizer, density=0.25, mode=mode, beta=0.5, lambda_w=0.5,
                        include="0")  # fmt: skip
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        gradient = [1.0, 1.0, 1.0, 1.0] if shrinks else [1.0, 3.0, 3.0, 3.0]
        assert model[0].weight.grad.tolist() == [gradient]
        method.step()
        assert model[0].weight.tolist() == [
            [8.0, 2.0, 2.0, 2.0] if shrinks else [8.0, 4.0, 4.0, 4.0]
        ]


@pytest.mark.parametrize("how", ["closure", "closure by name", "maximize", "scaled"])
def test_sr_ste_decays_whatever_way_the_optimizer_comes_to_its_gradients(how):
    def trained(how: str) -> torch.Tensor:
        steps = {"maximize": how == "maximize", "fused": how == "scaled"}
        model, optimizer, method = network(mode="sr_ste", lambda_w=0.5, steps=steps)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=how == "scaled")
        generator, sign = torch.Generator().manual_seed(1), -1 if how == "maximize" else 1

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = scaler.scale(sign * model(batches(generator)).square().mean())
            loss.backward()
            return loss

        for _ in range(3):
            if how == "closure":
                optimizer.step(closure)
            elif how == "closure by name":
                optimizer.step(closure=closure)
            else:
                closure()
                scaler.step(optimizer)
                scaler.update()
            method.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(trained(how), trained("plain"))


def test_resets_leave_the_state_of_the_optimizer_alone():
    model, optimizer, method = network(mode="reset", z=1)
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state[model[2].weight])
    outside = ~mask_of(model[2])
    method.step()
    assert not model[2].weight.detach().numpy()[outside].any()
    for name, value in optimizer.state[model[2].weight].items():
        assert torch.equal(value, state[name]), name
    assert state["exp_avg"].numpy()[outside].any()


def test_once_fixed_sparse_kernels_compute_the_gradients():
    model, optimizer, method = network(mode="fix", v=2)
    outside = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 32)).square().sum().backward()
        gradient = model[2].weight.grad.numpy()
        outside.append(bool(gradient[~mask_of(model[2])].any()))
        assert gradient[mask_of(model[2])].any()
        optimizer.step()
        method.step()
    assert outside == [True, False, False, False]  # what step 2 changes outside, it makes zero


def test_frozen_layers_stay_as_they_are():
    model, optimizer, method = network(mode="regularize", beta=0.5)
    model[2].weight.requires_grad_(False)
    before, mask = model[2].weight.clone(), mask_of(model[2])
    assert train(model, optimizer, method, 3, batches) == [False] * 3
    assert torch.equal(model[2].weight, before)
    np.testing.assert_array_equal(mask_of(model[2]), mask)


def test_a_model_learns_what_its_dense_form_does_not_hold():
    """A sparse map whose support is not known at the start is found."""
    torch.manual_seed(0)
    teacher = torch.zeros(16, 32)
    teacher.flatten()[torch.randperm(512)[:51]] = torch.randn(51).sign()
    model = nn.Sequential(nn.Linear(32, 16, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = Rewire(model, optimizer, density=0.1, include="*", total_steps=400)
    for _ in range(400):
        x = torch.randn(64, 32)
        optimizer.zero_grad()
        loss = (model(x) - x @ teacher.T).square().sum(1).mean()
        loss.backward()
        optimizer.step()
        method.step()
    assert loss.item() < 1e-6
    np.testing.assert_array_equal(mask_of(model[0]), teacher.numpy() != 0)


# ---------------------------------------------------------------------------- the model, the state


def test_weights_stay_the_same_parameters_of_the_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 48), nn.Linear(48, 8))
    weights = [layer.weight for layer in model]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    method = Rewire(model, optimizer, density=0.25, total_steps=4)
    train(model, optimizer, method, 4, batches)
    assert all(layer.weight is weight for layer, weight in zip(model, weights, strict=True))
    assert {id(p) for p in model.parameters()} == {
        id(p) for group in optimizer.param_groups for p in group["params"]
    }
    assert set(optimizer.state) == set(model.parameters())


@pytest.mark.parametrize("options", [
    {"mode": "fix"},
    {"mode": "reset", "z": 3, "interval": 2},
    {"mode": "regularize", "gradient_scale": 0.5, "format": "nm", "density": None, "n": 2, "m": 4},
    {"mode": "sr_ste", "format": "shuffled_block", "block_shape": (4, 4)},
])  # fmt: skip
def test_resuming_gives_the_same_bits(options):
    for steps in ((4, 5), (8, 3)):  # before the structure is fixed, and behind
        assert_resumes(lambda seed: network(seed, **options), batches, steps)


def test_a_state_of_other_layers_is_refused():
    state = network()[2].state_dict()
    other = network(include=["2", "4"])[2]
    with pytest.raises(FormatError, match="state of layers 2;"):
        other.load_state_dict(state)
    assert other.steps == 0


def test_layers_that_are_there_are_taken_over():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    participate(model, "nm", n=2, m=4, include="1")
    method = Rewire(model, torch.optim.SGD(model.parameters(), lr=0.1), mode="no_exploit")
    assert list(method.layers) == ["1"]
    assert method.report is None


def test_finished_models_hold_ordinary_sparse_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(),
                          nn.Linear(64, 32), nn.Linear(32, 4))  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = Rewire(model, optimizer, density=0.25, total_steps=3)
    x = torch.randn(2, 3, 6, 6)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        method.step()
    expected, biases = model(x), [model[1].bias, model[3].bias]
    report = method.finish()
    assert [(row.name, row.nnz) for row in report.taken] == [("1", 576), ("3", 512)]
    assert type(model[1]) is SparseConv2d
    assert type(model[3]) is SparseLinear
    assert [model[1].bias, model[3].bias] == biases
    torch.testing.assert_close(model(x), expected)
    assert SET(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=900).layers
    with pytest.raises(FormatError, match="finished"):
        method.step()


def test_a_layer_that_is_the_model_is_not_finished():
    model = Participating(nn.Linear(16, 16), density=0.5)
    method = Rewire(model, torch.optim.SGD(model.parameters(), lr=0.1), mode="reset")
    with pytest.raises(FormatError, match=r"to_sparse\(\)"):
        method.finish()
    assert list(method.layers) == [""]


def test_transformers_multiply_with_what_participates():
    """The fast path of torch would read the whole `linear1.weight`."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model, x = nn.TransformerEncoder(block, 2).eval(), torch.randn(3, 5, 16)
    dense = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = Rewire(model, optimizer, density=0.2, include="*", mode="no_exploit")
    expected = model(x)
    assert (expected - dense).abs().max() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        method.finish()
        torch.testing.assert_close(model(x), expected)


def test_finished_sr_ste_leaves_the_optimizer_alone():
    _model, optimizer, method = network(mode="sr_ste")
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    method.finish()
    assert not optimizer._optimizer_step_pre_hooks


def test_sr_ste_that_is_gone_decays_nothing():
    model, optimizer, method = network(mode="sr_ste", lambda_w=0.5)
    model(torch.ones(1, 32)).sum().backward()
    gradient = model[2].weight.grad.clone()
    del method
    gc.collect()
    optimizer.step()
    assert torch.equal(model[2].weight.grad, gradient)


# ------------------------------------------------------------------------- what stays dense


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 32, bias=False)


def test_what_stays_dense_by_default():
    convolutions = nn.Sequential(
        nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3, groups=32),
        nn.Conv2d(32, 24, 1), nn.Conv2d(24, 32, 1), nn.Conv2d(32, 32, 3, groups=2),
        nn.Linear(32, 32), nn.Linear(32, 10),
    )  # fmt: skip
    report = participate(convolutions, density=0.5)
    assert [row.name for row in report.taken] == ["1", "3", "5", "6"]
    reasons = {row.name: row.reason for row in report.left}
    assert "first layer" in reasons["0"]
    assert "head" in reasons["7"]
    assert "1 input channels" in reasons["2"]
    assert "24 input channels" in reasons["4"]
    report = participate(Transformer(), density=0.5)
    assert [row.name for row in report.taken] == ["up", "down"]
    tied = Transformer()
    tied.head.weight = tied.embedding.weight
    assert [row.name for row in participate(tied, density=0.5, include="*").taken] == ["up", "down"]


def test_what_is_named_is_taken_and_what_does_not_fit_is_reported():
    model = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    report = participate(model, density={"0": 0.5, "2": 0.25})
    assert [row.density for row in report.taken] == [0.5, 0.25]
    assert report.left[0].reason == "not named in density"
    model = nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    report = participate(model, "nm", density=0.5, n=5, m=4, include="*")
    assert not report.taken
    assert all("n=5" in row.reason for row in report.left)


@pytest.mark.parametrize("compiled", [False, True])
def test_wrapped_models_are_changed_inside(compiled):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    wrapped = nn.DataParallel(model)
    if compiled:
        wrapped = torch.compile(model, backend="eager")
    method = Rewire(wrapped, torch.optim.SGD(model.parameters(), lr=0.1), density=0.5,
                    mode="no_exploit")  # fmt: skip
    assert type(model[1]) is Participating
    assert list(method.layers) == ["1"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiled_models_go_on_after_a_change():
    model, optimizer, method = network(mode="no_exploit")
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(4, 32)
    for _ in range(3):
        optimizer.zero_grad()
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        y.square().sum().backward()
        gradient = model[2].weight.grad.clone()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        torch.testing.assert_close(model[2].weight.grad, gradient)
        optimizer.step()
        assert method.step()


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "explore"}, "mode='explore'"),
        ({"mode": "reset", "z": 0}, "z=0"),
        ({"mode": "regularize", "beta": 1.5}, "beta=1.5"),
        ({"mode": "sr_ste", "lambda_w": -1.0}, "lambda_w=-1.0"),
        ({"gradient_scale": 2.0, "total_steps": 4}, "gradient_scale=2.0"),
        ({"interval": 0, "total_steps": 4}, "interval=0"),
        ({}, "v=0.5 with total_steps=None"),
        ({"v": -1}, "v=-1"),
        ({"mode": "reset", "z": 1.5}, "z=1.5"),
        ({"mode": "reset", "interval": 1.5}, "interval=1.5"),
        ({"density": None, "v": 1}, "no density"),
        ({"exclude": "*", "v": 1}, "excluded"),
        ({"density": "keep", "v": 1}, "density='keep'"),
        ({"sparsity": 0.5, "v": 1}, "exactly one of them"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(options, message):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FormatError, match=message):
        Rewire(model, optimizer, **{"density": 0.5, **options})
    assert all(type(layer) is nn.Linear for layer in model)


def test_options_of_layers_need_a_density():
    model = nn.Sequential(nn.Linear(16, 16))
    participate(model, density=0.5, include="*")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FormatError, match="format, block_shape without a density"):
        Rewire(model, optimizer, v=1, format="shuffled_block", block_shape=(4, 4))
    with pytest.raises(FormatError, match="exclude without a density"):
        Rewire(model, optimizer, v=1, exclude="0")


def test_an_optimizer_that_cannot_be_hooked_does_not_do_for_sr_ste():
    class Wrapper:
        def __init__(self, inner):
            self.inner, self.param_groups = inner, inner.param_groups

    model = nn.Sequential(nn.Linear(16, 16))
    optimizer = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(FormatError, match="register_step_pre_hook"):
        Rewire(model, optimizer, density=0.5, mode="sr_ste", include="*")
    assert type(model[0]) is nn.Linear
    assert Rewire(model, optimizer, density=0.5, mode="regularize", include="*").layers


def test_a_step_follows_an_optimizer_s():
    model, optimizer, method = network()
    train(model, optimizer, method, 1, batches)
    with pytest.raises(FormatError, match=r"without an optimizer\.step"):
        method.step()
    assert method.steps == 1


def test_printed():
    model, optimizer, method = network(mode="reset")
    train(model, optimizer, method, 2, batches)
    lines = str(method).splitlines()
    assert lines[0] == "Rewire, reset, IntervalSchedule(interval=1, end=None)"
    assert lines[-2].startswith("0 stays dense: the first layer")
    assert lines[-1].startswith("4 stays dense: the last layer")


def test_an_optimizer_without_the_weights_is_refused():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    with pytest.raises(FormatError, match=r"an optimizer without 1\.weight"):
        Rewire(model, torch.optim.SGD(model[0].parameters(), lr=0.1), density=0.5, v=1)
    assert type(model[1]) is nn.Linear


def test_nan_weights_are_refused():
    model, _, method = network(mode="no_exploit")
    with torch.no_grad():
        model[2].weight[0, 1] = float("nan")
    with pytest.raises(FormatError, match="NaN in scores"):
        method.step()


def test_intervals():
    assert [t for t in range(12) if IntervalSchedule(4).is_update(t)] == [4, 8]
    for half in (0.5, np.float32(0.5)):  # not a step, that would end at once
        assert IntervalSchedule.until(half, 10, interval=1).end == 5
    assert not IntervalSchedule(1).ended(10**9)


# ------------------------------------------------------------------- formats that rank magnitudes


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 70),
    density=st.floats(0, 1),
    spread=st.sampled_from([0, 1, 3, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_magnitudes_are_ranked_as_their_absolute_values(dtype, rows, cols, density, spread, seed):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-spread, spread + 1, (rows, cols)).astype(dtype)
    weight[rng.random((rows, cols)) < 0.2] *= -0.0
    weight[rng.random((rows, cols)) < 0.1] = -np.inf
    scores = np.abs(weight)
    found = CSR.from_magnitudes(weight, density)
    np.testing.assert_array_equal(found.mask(), largest(scores, round(density * scores.size)))
    for n, m in ((0, 4), (1, 4), (2, 4), (3, 4), (4, 4), (2, 5)):
        found = NM.from_magnitudes(weight, n=n, m=m)
        np.testing.assert_array_equal(found.mask(), n_of_m(scores, n, m))
    block = {"block_shape": (2, 3), "aligned": True, "norm": math.inf}
    found = ShuffledBlock.from_magnitudes(weight, density, **block)
    np.testing.assert_array_equal(
        found.mask(), grid_blocks(scores, (2, 3), round(density * scores.size))
    )
    found.validate()


def test_a_norm_below_one_is_refused():
    with pytest.raises(FormatError, match=r"norm=0\.5"):
        ShuffledBlock.from_scores(np.ones((4, 4)), 0.5, aligned=True, norm=0.5)
