"""SRigL: its steps by hand and against plain loops, ablation, the budget that holds, misuse."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402
from train_cases import Single, assert_moved, assert_resumes, first_dropped, follow, stepped, train  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.formats import Condensed  # noqa: E402
from spfmt.torch import SparseLinear, sparsify  # noqa: E402
from spfmt.train import RigL, SRigL, Static  # noqa: E402


def network(seed: int = 0, density: float = 0.125) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    sparsify(model, "condensed", density=density, scores="random", reset=True,
             generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return model


def convolutions(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(24, 8, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    sparsify(model, "condensed", density=0.15, scores="random", reset=True,
             generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return model


def batches(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(16, 32, generator=generator)


def images(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(6, 3, 7, 7, generator=generator)


def sparse(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "structure")}


def by_loops(before, gradient, n_drop, budget, gamma_sal):
    """METHODS' five steps in plain loops: the kept set before ablation, and the next mask."""
    rows, cols = before.mask.shape
    every = [(r, c) for r in range(rows) for c in range(cols)]
    kept = first_dropped(before, n_drop)
    outside = sorted((-abs(gradient[p]), p) for p in every if not before.mask[p])
    salient = [int(kept[r].sum()) for r in range(rows)]
    for _, (r, _) in outside[:n_drop]:
        salient[r] += 1

    threshold = max(1, math.floor(gamma_sal * (budget // rows) + 1e-9))
    active = [r for r in range(rows) if salient[r] >= threshold]
    while not active or budget // len(active) > cols:
        threshold -= 1
        active = [r for r in range(rows) if salient[r] >= threshold]
    fan_in = budget // len(active)

    mask = np.zeros_like(before.mask)
    for r in active:
        held = sorted((-abs(before.weight[r, c]), c) for c in range(cols) if kept[r, c])
        free = sorted((-abs(gradient[r, c]), c) for c in range(cols) if not kept[r, c])
        for _, c in (held[:fan_in] + free)[:fan_in]:
            mask[r, c] = True
    return kept, mask


# ------------------------------------------------------------------------------------- by hand


def worked_example():
    """Four neurons of three weights, six inputs; N = 12, and the threshold is floor(0.7 * 3)."""
    weight = np.zeros((4, 6), np.float32)
    weight[0, [0, 1, 2]] = [9, -8, 7]
    weight[1, [1, 2, 3]] = [6, 5, 0.5]
    weight[2, [0, 3, 5]] = [0.1, 0.2, 4]
    weight[3, [2, 4, 5]] = [-10, 3, 0.3]
    return Single(SRigL, Condensed.from_dense(weight), 1 / 3, gamma_sal=0.7)


def test_a_neuron_is_ablated_and_the_others_get_its_weights():
    case = worked_example()
    # 0.1, 0.2, 0.3 and 0.5 are dropped; outside the mask 20, 19, 18 and 17 are salient. Rows have
    # 3+1, 2+1, 1 and 2+2 salient weights: row 2 goes, and the fan-in is 12 // 3.
    gradient = np.zeros((4, 6))
    gradient[0, 5], gradient[1, 0], gradient[3, 0], gradient[3, 1] = 20, -19, 18, 17
    gradient[1, 3] = 99  # inside the mask, so not salient; dropped, it grows again
    gradient[2, 1], gradient[2, 5] = 16, 1000
    before, after = case.move(gradient)
    assert after.tensor.row_indices.tolist() == [0, 1, 3]
    assert after.tensor.col_indices.tolist() == [[0, 1, 2, 5], [0, 1, 2, 3], [0, 1, 2, 4]]
    expected = [[9, -8, 7, 0, 0, 0], [0, 6, 5, 0, 0, 0], [0] * 6, [0, 0, -10, 0, 3, 0]]
    np.testing.assert_array_equal(after.weight, expected)
    assert_moved(before, after, np.array(expected) != 0, after.mask)
    row = case.method.summary().layers[0]
    assert (row.active_rows, row.mean_fan_in) == (3, 4.0)


def test_an_ablated_neuron_comes_back_and_the_others_are_trimmed():
    case = worked_example()
    gradient = np.zeros((4, 6))
    gradient[0, 5], gradient[1, 0], gradient[3, 0], gradient[3, 1] = 20, 19, 18, 17
    gradient[1, 3] = 99
    case.move(gradient)
    with torch.no_grad():  # (0, 5) trained to 2; (1, 0), (1, 3), (3, 0), (3, 1) are zero
        case.layer.values[3] = 2.0
    # Those four go. Row 2 has four of the largest gradients: salient are 4, 2, 4 and 2. All rows
    # are active, k = 3: row 0 loses its 2, rows 1 and 3 fill up by one, row 2 by three.
    gradient = np.zeros((4, 6))
    gradient[2] = [30, 31, 32, 33, 0, 0]
    gradient[1, 4], gradient[3, 1] = 5, 6
    gradient[0, 3] = 7
    before, after = case.move(gradient)
    assert after.tensor.row_indices.tolist() == [0, 1, 2, 3]
    assert after.tensor.col_indices.tolist() == [[0, 1, 2], [1, 2, 4], [1, 2, 3], [1, 2, 4]]
    expected = [[9, -8, 7, 0, 0, 0], [0, 6, 5, 0, 0, 0], [0] * 6, [0, 0, -10, 0, 3, 0]]
    np.testing.assert_array_equal(after.weight, expected)
    assert_moved(before, after, np.array(expected) != 0, after.mask)


def test_the_threshold_is_lowered_until_the_fan_in_fits():
    """N = 8 in rows of three columns needs three active rows; two alone reach the threshold."""
    weight = np.array([[8, 7, 0], [0, 6, 5], [0.4, 0, 3], [0.1, 0, 0.2]], np.float32)
    case = Single(SRigL, Condensed.from_dense(weight), 3 / 8, gamma_sal=1.0)
    gradient = np.zeros((4, 3))
    gradient[0, 2], gradient[1, 0], gradient[3, 1] = 3, 2, 1  # 3, 3, 1 and 1 salient weights
    before, after = case.move(gradient)
    assert after.tensor.row_indices.tolist() == [0, 1, 2, 3]  # with a threshold of 1
    assert after.tensor.fan_in == 2
    gradient[3] = 0
    case = Single(SRigL, Condensed.from_dense(weight), 3 / 8, gamma_sal=1.0)
    gradient[2, 1] = 0.5  # 3, 3, 2 and 0
    before, after = case.move(gradient)
    assert after.tensor.row_indices.tolist() == [0, 1, 2]
    assert after.tensor.col_indices.tolist() == [[0, 1], [1, 2], [1, 2]]
    assert_moved(before, after, first_dropped(before, 3), after.mask)


# ------------------------------------------------------------------------- against plain loops


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 7),
    cols=st.integers(1, 9),
    fan_in=st.integers(1, 5),
    gamma_sal=st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]),
    share=st.floats(0.05, 1.0),
    spread=st.sampled_from([0, 1, 3, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_updates_are_those_of_plain_loops(rows, cols, fan_in, gamma_sal, share, spread, seed):
    """Three updates in a row; integers of a small spread make ties, spread 0 only ties."""
    rng = np.random.default_rng(seed)
    fan_in = min(fan_in, cols)
    tensor = Condensed.from_scores(rng.random((rows, cols)), 1.0, fan_in=fan_in)
    case = Single(SRigL, tensor, share, gamma_sal=gamma_sal)
    for _ in range(3):
        values = rng.integers(-spread, spread + 1, case.layer.nnz).astype(np.float32)
        with torch.no_grad():
            case.layer.values[: values.size] = torch.from_numpy(values)
        gradient = rng.integers(-spread, spread + 1, (rows, cols))
        before, after = case.move(gradient)
        count = math.floor(share * before.mask.sum() + 1e-9)
        if count == 0 or before.mask.all():
            assert_moved(before, after, before.mask, before.mask)
            continue
        assert_moved(before, after, *by_loops(before, gradient, count, fan_in * rows, gamma_sal))
        active = after.tensor.row_indices.size
        assert after.tensor.fan_in == fan_in * rows // active
        assert np.unique(case.layer.positions()).size == case.layer.nnz == after.mask.sum()


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_against_plain_loops(groups):
    rng = np.random.default_rng(groups)
    shape = 8, 4 // groups, 3, 3
    tensor = Condensed.from_scores(rng.random(shape, np.float32), 1 / 6)
    tensor = tensor.with_values(rng.integers(-3, 4, tensor.nnz).astype(np.float32))
    case = Single(SRigL, tensor, 0.4, gamma_sal=0.95, groups=groups, padding=1)
    ablated = 0
    for _ in range(4):
        before, dense = case.state(), case.layer.to_dense()
        x = torch.from_numpy(rng.integers(-2, 3, (3, 4, 5, 5)).astype(np.float32))
        dy = torch.from_numpy(rng.integers(-2, 3, (3, 8, 5, 5)).astype(np.float32))
        dense(x).backward(dy)
        for part in (slice(0, 1), slice(1, 3)):  # accumulated over two calls
            case.layer(x[part]).backward(dy[part])
        assert stepped(case.method)
        gradient = dense.weight.grad.numpy().reshape(8, -1)
        count = math.floor(0.4 * before.mask.sum())
        expected = by_loops(before, gradient, count, tensor.nnz, 0.95)
        assert_moved(before, case.state(), *expected)
        ablated += 8 - case.layer.tensor().row_indices.size
    assert ablated


# -------------------------------------------------------------------------------- over whole runs


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_budget_holds_over_many_updates(kind):
    make, inputs = {"linear": (network, batches), "convolution": (convolutions, images)}[kind]
    model = make()
    budgets = {name: layer.nnz for name, layer in sparse(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = SRigL(model, optimizer, gamma_sal=0.95, delta_t=1, t_end=200)
    assert method.budgets == budgets
    fewest = {name: layer.shape[0] for name, layer in sparse(model).items()}
    for _ in range(60):
        train(model, optimizer, method, 1, inputs)
        for name, layer in sparse(model).items():
            tensor = layer.tensor()
            tensor.validate()
            active = tensor.row_indices.size
            assert tensor.fan_in == budgets[name] // active
            assert budgets[name] - active < layer.nnz <= budgets[name]
            fewest[name] = min(fewest[name], active)
    assert any(fewest[name] < layer.shape[0] for name, layer in sparse(model).items())


def test_an_ablated_neuron_gives_its_bias():
    case = worked_example()
    case.layer.bias = nn.Parameter(torch.arange(4.0))
    gradient = np.zeros((4, 6))
    gradient[0, 5], gradient[1, 0], gradient[3, 0], gradient[3, 1] = 20, 19, 18, 17
    case.move(gradient)
    y = case.layer(torch.randn(5, 6))
    assert y.shape == (5, 4)
    assert torch.equal(y[:, 2], torch.full((5,), 2.0))


def test_averages_follow_and_spare_capacity_stays_zero():
    layer = SparseLinear(32, 48, format="condensed", density=0.125, capacity=300)
    model = nn.Sequential(layer)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = SRigL(model, optimizer, gamma_sal=0.95, delta_t=1, t_end=100)
    for _ in range(10):
        model(batches(torch.Generator().manual_seed(method.steps))).square().sum().backward()
        assert stepped(method)
        average.update_parameters(model)
    assert layer.tensor().row_indices.size < 48
    assert torch.equal(average.module[0].structure, layer.structure)
    assert not layer.values[layer.nnz :].any()
    kept = layer.values[: layer.nnz] != 0  # since the start, so their average is themselves
    assert kept.any()
    mean = average.module[0].values[: layer.nnz]
    torch.testing.assert_close(mean[kept], layer.values[: layer.nnz][kept])


def test_trained_zeros_are_ordinary_weights():
    case = worked_example()
    with torch.no_grad():
        case.layer.values.zero_()
    gradient = np.random.default_rng(0).standard_normal((4, 6))
    before, after = case.move(gradient)
    assert_moved(before, after, *by_loops(before, gradient, 4, 12, 0.7))


def test_it_learns_which_neurons_and_inputs_matter():
    """Half of the outputs are zero, an eighth of the inputs matter: N suffices for those alone."""
    losses = {}
    for kind in (Static, SRigL):
        torch.manual_seed(0)
        inputs, outputs = torch.arange(64) % 8 == 0, torch.arange(12) % 2 == 0
        teacher = torch.randn(12, 64) * inputs * outputs[:, None]
        model = nn.Sequential(SparseLinear(64, 12, bias=False, format="condensed", fan_in=4))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        options = {"gamma_sal": 0.8} if kind is SRigL else {}
        method = kind(model, optimizer, delta_t=10, total_steps=600, **options)
        losses[kind] = follow(teacher, model, optimizer, method, 600)
    tensor = model[0].tensor()
    assert set(np.flatnonzero(outputs.numpy())) <= set(tensor.row_indices.tolist())
    assert tensor.fan_in > 4
    assert losses[SRigL] < 0.2 * losses[Static]


# ------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_resumes_bit_for_bit(kind):
    build, inputs = {"linear": (network, batches), "convolution": (convolutions, images)}[kind]

    def make(seed):
        model = build(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, SRigL(model, optimizer, gamma_sal=0.95, delta_t=2, t_end=60)

    assert_resumes(make, inputs, (9, 8))


def test_a_trainer_of_an_ablated_model_has_the_budget_of_the_first():
    model = network(density=0.12)  # 3.84 of 32 and 5.76 of 48 per row: N // R is 3 and 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SRigL(model, optimizer, gamma_sal=0.95, delta_t=1, t_end=100)
    assert method.budgets == {"0": 3 * 48, "2": 5 * 8}
    train(model, optimizer, method, 20, batches)
    assert model[0].tensor().row_indices.size < 48
    later = SRigL(model, optimizer, gamma_sal=0.95, delta_t=1, t_end=100)
    assert later.budgets == method.budgets  # of the target, not of what is held now
    later.load_state_dict(method.state_dict())
    assert later.budgets == method.budgets


def test_states_of_other_runs_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SRigL(model, optimizer, delta_t=1, t_end=100)
    other = RigL(model, optimizer, delta_t=1, t_end=100).state_dict()
    state = method.state_dict()
    too_much = {**state, "budgets": {**state["budgets"], "0": 48 * 32}}
    for wrong in (other, too_much, {**state, "budgets": {"0": 48 * 4}}):
        with pytest.raises(FormatError, match="SRigL run"):
            method.load_state_dict({**wrong, "steps": 7})
        assert method.steps == 0


# ---------------------------------------------------------------------------------------- misuse


def test_misuse_is_an_error_at_construction():
    def refused(layer, match, **options):
        model = nn.Sequential(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(FormatError, match=match):
            SRigL(model, optimizer, t_end=1000, **options)

    for format, params in (("csr", {}), ("nm", {"m": 8}), ("hrbp", {})):
        layer = SparseLinear(32, 16, format=format, density=0.25, **params)
        refused(layer, f"0 of format '{format}'.*condensed")
    refused(SparseLinear(64, 32, density=0.01), "N = 20 weights for 32 rows")
    few = Condensed((4, 6), [1], [[0, 2, 3]], np.ones((1, 3), np.float32))
    refused(SparseLinear.from_tensor(few), "N = 3 weights for 4 rows")
    refused(SparseLinear.from_tensor(few, target_density=0.5), "room for 3 weights")
    for wrong in (-0.1, 1.1, math.nan):
        refused(SparseLinear(8, 8, density=0.5), "gamma_sal", gamma_sal=wrong)
