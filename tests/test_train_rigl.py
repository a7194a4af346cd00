"""RigL on every format against plain loops, and the static baseline."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from train_cases import (  # noqa: E402
    FORMATS,
    Single,
    assert_moved,
    assert_resumes,
    first_dropped,
    follow,
    stepped,
    train,
)

from spfmt.errors import FormatError  # noqa: E402
from spfmt.formats import CSR, HRBP, NM, Condensed, ShuffledBlock  # noqa: E402
from spfmt.torch import SparseLinear, sparsify  # noqa: E402
from spfmt.train import RigL, Static  # noqa: E402
from spfmt.train.choice import free_positions  # noqa: E402


@pytest.fixture(params=FORMATS)
def format(request) -> str:
    return request.param


def network(format: str = "csr", seed: int = 0, density: float = 0.25) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    sparsify(model, format, density=density, scores="random", reset=True,
             generator=torch.Generator().manual_seed(seed), **FORMATS[format])  # fmt: skip
    return model


def convolutions(format: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=1 if format == "hrbp" else 2),
        nn.ReLU(),
        nn.Conv2d(24, 8, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    sparsify(model, format, density=0.25, scores="random", reset=True,
             generator=torch.Generator().manual_seed(seed), **FORMATS[format])  # fmt: skip
    return model


def batches(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(16, 32, generator=generator)


def images(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(6, 3, 7, 7, generator=generator)


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) for m in model if isinstance(m, SparseLinear)]


def grown_by_loops(kept, gradient, lists):
    """Fill lists of positions up to a number each, by |gradient|, of equal ones the first."""
    mask = kept.copy()
    for places, number in lists:
        free = sorted((-abs(gradient[p]), p) for p in places if not kept[p])
        held = sum(bool(kept[p]) for p in places)
        for _, place in free[: number - held]:
            mask[place] = True
    return mask


def lists_of(tensor):
    """The positions that a format counts together, and how many of them hold a weight."""
    rows, cols = tensor.matrix_shape
    mask = tensor.mask().reshape(rows, cols)
    if tensor.format == "csr":
        parts = [[(r, c) for r in range(rows) for c in range(cols)]]
    elif tensor.format == "condensed":
        parts = [[(r, c) for c in range(cols)] for r in range(rows)]
    else:
        starts = range(0, cols, tensor.m)
        parts = [[(r, c) for c in range(s, s + tensor.m)] for r in range(rows) for s in starts]
    return [(part, sum(bool(mask[p]) for p in part)) for part in parts]


# ------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        # Weights 1..6 lie in columns 0 and 1; 9 marks what grew. The gradient is large at (2, 1),
        # which stays, at (1, 1), (0, 3), (1, 3) and (0, 0), and 3 at (0, 2) before (1, 2).
        (0.0, [[1, 2, 0, 0], [3, 4, 0, 0], [5, 6, 0, 0]]),
        (1 / 6, [[0, 2, 0, 9], [3, 4, 0, 0], [5, 6, 0, 0]]),
        (0.5, [[9, 0, 0, 9], [0, 4, 0, 9], [5, 6, 0, 0]]),
        (5 / 6, [[9, 0, 9, 9], [0, 9, 0, 9], [0, 6, 0, 0]]),
    ],
)
def test_worked_table_of_masks(fraction, expected):
    weight = np.array([[1, 2, 0, 0], [3, 4, 0, 0], [5, 6, 0, 0]], np.float32)
    gradient = np.array([[7, 1, -3, 9], [1, -99, 3, -8], [1, 100, 2, 2]])
    case = Single(RigL, CSR.from_dense(weight), fraction)
    before, after = case.move(gradient)
    marks = np.array(expected)
    kept = (marks != 0) & (marks != 9)
    assert_moved(before, after, kept, marks != 0)
    assert case.method.updates == (fraction > 0)


def test_a_dropped_weight_that_grows_again_starts_from_zero():
    case = Single(RigL, CSR.from_dense(np.array([[1.0, 2.0, 0.0]], np.float32)), 0.5)
    before, after = case.move(np.array([[5.0, 0.0, 1.0]]))
    np.testing.assert_array_equal(before.mask, after.mask)
    assert after.weight.tolist() == [[0.0, 2.0, 0.0]]
    assert after.momentum.tolist() == [[0.0, 2.0, 0.0]]
    assert case.method.updates == 0  # the topology is the same, the weight is not


# ------------------------------------------------------------------------- against plain loops

MAKERS = {
    "csr": lambda scores, share: CSR.from_scores(scores, share),
    "condensed": lambda scores, share: Condensed.from_scores(scores, share),
    "nm": lambda scores, share: NM.from_scores(scores, share, m=4),
}


@pytest.mark.parametrize("format", MAKERS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 6),
    quarters=st.integers(1, 3),
    density=st.floats(0.2, 0.9),
    share=st.floats(0.05, 1.0),
    spread=st.sampled_from([0, 1, 3, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_updates_are_those_of_plain_loops(format, rows, quarters, density, share, spread, seed):
    """Integers of a small spread make ties; spread 0 makes all gradients zero."""
    rng = np.random.default_rng(seed)
    shape = rows, 4 * quarters
    tensor = MAKERS[format](rng.random(shape, np.float32), density)
    weights = rng.integers(-spread - 1, spread + 2, tensor.nnz).astype(np.float32)
    case = Single(RigL, tensor.with_values(weights), share)
    gradient = rng.integers(-spread, spread + 1, shape)
    before, after = case.move(gradient)
    count = math.floor(share * before.mask.sum() + 1e-9)
    if count == 0 or before.mask.all():
        assert_moved(before, after, before.mask, before.mask)
        return
    kept = first_dropped(before, count)
    assert_moved(before, after, kept, grown_by_loops(kept, gradient, lists_of(before.tensor)))


def test_the_order_holds_where_sums_would_lose_it():
    weight = np.zeros((1, 8), np.float32)
    weight[0, :3] = [1e-15, 1e15, 2e-15]
    case = Single(RigL, CSR.from_dense(weight), 2 / 3)
    gradient = np.array([[0, 0, 0, 3e-15, 1e20, 2e-15, 4e-15, 0]], np.float32)
    before, after = case.move(gradient)
    assert np.flatnonzero(after.mask).tolist() == [1, 4, 6]
    assert_moved(before, after, before.weight == weight[0, 1], after.mask)


def test_weights_in_float64_are_ranked_in_float64():
    weight = np.array([[1 + 1e-12, 1.0, 1 + 2e-12, 0.0]])
    case = Single(RigL, CSR.from_dense(weight), 1 / 3)
    before, after = case.move(np.array([[1 + 1e-12, 1.0, 1.0, 1 + 1e-13]]))
    assert_moved(before, after, weight > 1, np.array([[True, False, True, True]]))


@pytest.mark.parametrize("format", ["csr", "condensed"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_against_plain_loops(format, groups):
    rng = np.random.default_rng(groups)
    shape = 6, 4 // groups, 3, 3
    tensor = MAKERS[format](rng.random(shape, np.float32), 1 / 3)
    tensor = tensor.with_values(rng.integers(-3, 4, tensor.nnz).astype(np.float32))
    case = Single(RigL, tensor, 0.4, groups=groups, padding=1)
    before = case.state()
    dense = case.layer.to_dense()
    x = torch.from_numpy(rng.integers(-2, 3, (3, 4, 5, 5)).astype(np.float32))
    dy = torch.from_numpy(rng.integers(-2, 3, (3, 6, 5, 5)).astype(np.float32))
    dense(x).backward(dy)
    case.layer(x[:1]).backward(dy[:1])  # accumulated over two calls
    case.layer(x[1:]).backward(dy[1:])
    assert stepped(case.method)
    kept = first_dropped(before, math.floor(0.4 * tensor.nnz))
    gradient = dense.weight.grad.numpy().reshape(6, -1)
    assert_moved(before, case.state(), kept, grown_by_loops(kept, gradient, lists_of(tensor)))


# --------------------------------------------------------------------------- formats of blocks


def test_blocks_grow_where_their_gradient_is():
    """The block that keeps least goes; the free one of the largest gradients comes as a whole."""
    weight = np.zeros((4, 8), np.float32)
    weight[:2, :2] = [[5, 6], [7, 8]]
    weight[2:, 4:6] = [[1, 2], [3, 4]]
    case = Single(RigL, ShuffledBlock.from_dense(weight, block_shape=(2, 2)), 1 / 4)
    gradient = np.ones((4, 8))
    gradient[:2, :2] = 9  # of weights, so they do not count
    gradient[2:, 6:] = 3
    before, after = case.move(gradient)
    mask = np.zeros((4, 8), bool)
    mask[:2, :2] = mask[2:, 6:] = True
    assert_moved(before, after, before.weight > 2, mask)


def test_where_every_group_would_change_the_larger_gradients_do():
    """Two weights are dropped; a channel has two in each group, so that one group grows."""
    weight = np.zeros((4, 4), np.float32)
    weight[:2, :2] = [[8, 7], [8, 7]]
    weight[2:, 2:] = [[8, 1], [8, 1]]
    case = Single(RigL, HRBP.from_dense(weight, groups=2), 1 / 4)
    gradient = np.zeros((4, 4))
    gradient[:2, 2], gradient[2:, 0] = 5, 9
    before, after = case.move(gradient)
    assert_moved(
        before, after, before.weight > 1, np.array([[1, 1, 0, 0]] * 2 + [[1, 0, 1, 0]] * 2)
    )


def test_free_positions_hold_no_weight(format):
    layer = network(format)[0]
    scores = np.zeros(48 * 32, np.float32)
    scores[layer.positions()] = 1.0
    found = free_positions(layer, layer.tensor(), scores, layer.positions(), 200)
    assert not np.isin(found, layer.positions()).any()


def test_values_and_state_follow_on_every_format(format):
    """Kept weights and those dropped: whatever was not kept is zero, with zero momentum."""
    model = network(format)
    tensor = model[0].tensor()
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5):
        values = rng.standard_normal(tensor.nnz, np.float32)
        case = Single(RigL, tensor.with_values(values), share)
        case.layer.format_params = dict(model[0].format_params)
        before, after = case.move(rng.standard_normal((48, 32)))
        assert after.mask.sum() == before.mask.sum()
        assert_moved(before, after, first_dropped(before, int(share * tensor.nnz)), after.mask)
        if share == 0.5:
            assert (after.mask != before.mask).any()


def test_budgets_hold_for_a_run(format):
    model = network(format)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    budgets = [model[0].nnz, model[2].nnz]
    method = RigL(model, optimizer, delta_t=2, t_end=40)
    changed = train(model, optimizer, method, 24, batches)
    assert set(np.flatnonzero(changed) + 1) <= set(range(2, 40, 2))
    assert sum(changed) >= 6
    assert [model[0].nnz, model[2].nnz] == budgets
    for layer in (model[0], model[2]):
        layer.tensor().validate()
        positions = layer.positions()
        assert np.unique(positions).size == positions.size


def test_blocks_of_odd_sizes_never_exceed_the_capacity():
    model = nn.Sequential(nn.Linear(13, 10))
    sparsify(model, "shuffled_block", density=0.4, block_shape=(4, 4), scores="random",
             generator=torch.Generator().manual_seed(0))  # fmt: skip
    method = RigL(
        model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.5, delta_t=1, t_end=50
    )
    for _ in range(20):
        model(torch.randn(4, 13)).square().sum().backward()
        stepped(method)
        assert 0 < model[0].nnz <= model[0].capacity


# ---------------------------------------------------------------------------------- the gradient


def test_it_learns_which_inputs_matter(format):
    """Eight of 64 inputs make the output; RigL finds their columns, a static structure cannot."""
    losses, found = {}, {}
    for kind in (Static, RigL):
        torch.manual_seed(0)
        matters = torch.arange(64) % 8 == 0
        teacher = torch.randn(16, 64) * matters
        layer = SparseLinear(64, 16, format=format, density=0.125, **FORMATS[format])
        model = nn.Sequential(layer)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        method = kind(model, optimizer, delta_t=10, total_steps=250)
        losses[kind] = follow(teacher, model, optimizer, method, 250)
        found[kind] = layer.tensor().mask()[:, matters.numpy()].mean()
    assert found[Static] < 0.3
    assert found[RigL] > 0.8
    assert losses[RigL] < 0.3 * losses[Static]


def test_accumulated_gradients_are_those_of_the_whole_batch(format):
    masks = []
    x = torch.randint(-3, 4, (8, 32), generator=torch.Generator().manual_seed(0)).float()
    for parts in (1, 4):
        model = network(format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = RigL(model[:1], optimizer, alpha=0.6, delta_t=1, t_end=100)
        for part in x.chunk(parts):
            model[0](part).backward(part.repeat(1, 2)[:, :48])
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert method.step()
        masks.append(model[0].tensor().mask())
    np.testing.assert_array_equal(*masks)


def test_only_layers_that_move_are_observed_and_only_then():
    model = network("csr")
    full = SparseLinear.from_linear(nn.Linear(8, 8), format="csr", density=1.0)
    few = SparseLinear(8, 8, format="csr", density=0.1)  # 6 weights, of which 0.1 drops none
    frozen = SparseLinear(8, 8, format="csr", density=0.5)
    frozen.requires_grad_(False)
    model = nn.Sequential(*model, full, few, frozen)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = RigL(model, optimizer, alpha=0.1, delta_t=3, t_end=100)
    still = [layer.tensor() for layer in (full, few, frozen)]
    for step in range(1, 7):
        assert hooks(model) == ([1, 1, 0, 0, 0] if step % 3 == 0 else [0] * 5)
        model(torch.randn(4, 32)).sum().backward()
        assert stepped(method) is (step % 3 == 0)
    assert [layer.tensor() for layer in (full, few, frozen)] == still


def test_an_update_without_a_gradient_moves_nothing():
    model = network("csr")
    method = RigL(model, torch.optim.SGD(model.parameters(), lr=0.1), delta_t=1, t_end=100)
    before = [model[0].tensor(), model[2].tensor()]
    model[0](torch.randn(4, 32)).sum().backward()  # the second layer sees nothing
    with pytest.raises(FormatError, match=r"outside torch\.compile"):
        stepped(method)
    assert [model[0].tensor(), model[2].tensor()] == before


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_that_are_not_finite_leave_a_layer_alone(bad, caplog):
    case = Single(RigL, CSR.from_dense(np.eye(4, dtype=np.float32)), 0.5)
    gradient = np.ones((4, 4))
    gradient[1, 2] = bad
    before = case.layer.tensor()
    case.move(gradient)
    assert case.layer.tensor() == before
    assert "0 stays as it is: what was observed on the step of its update is not finite" in (
        caplog.text
    )


def test_bfloat16_under_autocast():
    model = network("csr")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = RigL(model, optimizer, delta_t=1, t_end=100)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(8, 32)).square().mean()
        loss.backward()
        optimizer.step()
        assert method.step()


# ------------------------------------------------------------------------------------- resuming


def test_resumes_bit_for_bit(format):
    def make(seed):
        model = network(format, seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, RigL(model, optimizer, delta_t=2, t_end=40)

    assert_resumes(make, batches, (5, 6))


@pytest.mark.parametrize("format", ["csr", "nm", "hrbp"])
def test_convolutions_resume_bit_for_bit(format):
    def make(seed):
        model = convolutions(format, seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, RigL(model, optimizer, delta_t=2, t_end=40)

    assert_resumes(make, images, (4, 4))


# --------------------------------------------------------------------------------------- static


def test_static_never_moves_and_never_looks(format):
    model = network(format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = Static(model, optimizer, delta_t=1, total_steps=8)
    words = [model[0].structure.clone(), model[2].structure.clone()]
    for _ in range(4):
        assert not any(hooks(model))
        assert train(model, optimizer, method, 1, batches) == [False]
    assert method.update() is False
    assert all(map(torch.equal, words, (model[0].structure, model[2].structure)))
    assert method.summary().updates == 0
    assert method.summary().layers[0].exploration == model[0].density


def test_static_resumes():
    def make(seed):
        model = network("csr", seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, Static(model, optimizer, delta_t=1, t_end=10)

    model, optimizer, method = make(0)
    train(model, optimizer, method, 3, batches)
    twin = make(1)
    for part, other in zip(twin, (model, optimizer, method), strict=True):
        part.load_state_dict(copy.deepcopy(other.state_dict()))
    train(*twin, 2, batches)
    train(model, optimizer, method, 2, batches)
    assert all(map(torch.equal, model.state_dict().values(), twin[0].state_dict().values()))
    assert twin[2].steps == 5
