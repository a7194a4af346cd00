"""Training methods: schedule, SET on every format, optimizer state, resuming, compiled models."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from train_cases import FORMATS, Single, assert_moved, first_dropped, stepped  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.formats import CSR  # noqa: E402
from spfmt.torch import SparseLinear, sparsify  # noqa: E402
from spfmt.train import DSB, SET, SSB, CosineSchedule, RigL, Static  # noqa: E402


@pytest.fixture(params=FORMATS)
def format(request) -> str:
    return request.param


def network(format: str = "condensed", seed: int = 0, density: float = 0.25) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    sparsify(model, format, density=density, scores="random", reset=True, generator=generator,
             **FORMATS[format])  # fmt: skip
    return model


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 32, generator=generator)
    return x, x[:, :8].argmax(1)


def train(model, optimizer, method, steps) -> list[bool]:
    changed = []
    for _ in range(steps):
        x, y = batch(method.steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        changed.append(method.step())
    return changed


# ---------------------------------------------------------------------------------- schedule


def test_schedule_worked_table():
    """Eq. 1 of DSB with alpha 0.4, N = 100, T_end = 400: 20 (1 + cos(pi t / 400)), rounded down."""
    schedule = CosineSchedule(alpha=0.4, delta_t=100, t_end=400)
    table = {0: 40, 100: 34, 200: 20, 300: 5, 400: 0, 500: 0}
    assert {t: schedule.n_drop(t, 100) for t in table} == table
    assert [t for t in range(600) if schedule.is_update(t)] == [100, 200, 300]
    assert schedule.drop_fraction(100) == pytest.approx(0.2 * (1 + math.sqrt(0.5)))


def test_schedule_end_as_step_or_fraction():
    until = CosineSchedule.until
    assert until(0.75, 1000, alpha=0.3, delta_t=10).t_end == 750
    assert until(600, None, alpha=0.3, delta_t=10).t_end == 600
    for wrong in ((0.5, None), (1.5, 100), (0.0, 100)):
        with pytest.raises(FormatError, match="total_steps"):
            until(*wrong, alpha=0.3, delta_t=10)
    for wrong in ({"alpha": 2.0}, {"delta_t": 0}, {"delta_t": 1.5}, {"t_end": -1}):
        with pytest.raises(FormatError):
            CosineSchedule(**wrong)


# --------------------------------------------------------------------------------------- SET


class GrowWhere(SET):
    """SET with the random numbers of a worked example."""

    grow: np.ndarray

    def grow_scores(self, layer, tensor):
        return self.grow.reshape(-1).astype(np.float32)


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        # Weights 1..6 lie in columns 0 and 1; column 3 has the largest grow scores, then column 2.
        (0.0, [[1, 2, 0, 0], [3, 4, 0, 0], [5, 6, 0, 0]]),
        (1 / 6, [[0, 2, 0, 9], [3, 4, 0, 0], [5, 6, 0, 0]]),
        (0.5, [[0, 0, 0, 9], [0, 4, 0, 9], [5, 6, 0, 9]]),
        (5 / 6, [[0, 0, 9, 9], [0, 0, 9, 9], [0, 6, 0, 9]]),
    ],
)
def test_worked_table_of_masks(fraction, expected):
    """A drop fraction gives one mask; kept weights keep their values and grown ones are zero."""
    weight = np.array([[1, 2, 0, 0], [3, 4, 0, 0], [5, 6, 0, 0]], np.float32)
    model = nn.Sequential(SparseLinear.from_tensor(CSR.from_dense(weight)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = GrowWhere(model, optimizer, alpha=fraction, delta_t=1, t_end=10**9)
    method.grow = np.array([[0.5, 0.5, 0.7, 0.95], [0.5, 0.5, 0.6, 0.94], [0.5, 0.5, 0.1, 0.93]])
    assert stepped(method) is (fraction > 0)
    tensor = model[0].tensor()
    expected = np.array(expected)
    np.testing.assert_array_equal(tensor.mask(), expected != 0)
    np.testing.assert_array_equal(tensor.to_dense(), np.where(expected == 9, 0, expected))


def test_a_dropped_weight_that_is_drawn_again_starts_from_zero():
    model = nn.Sequential(SparseLinear.from_tensor(CSR.from_dense(np.array([[1.0, 2.0, 0.0]]))))
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = GrowWhere(model, optimizer, alpha=0.5, delta_t=1, t_end=10**9)
    model[0].values.grad = torch.ones(2, dtype=torch.float64)
    optimizer.state[model[0].values]["momentum_buffer"] = torch.tensor([3.0, 4.0]).double()
    method.grow = np.array([[0.9, 0.1, 0.5]])
    assert not stepped(method)  # the topology is the same, the weight is not
    assert model[0].tensor().to_dense().tolist() == [[0.0, 2.0, 0.0]]
    assert model[0].tensor().mask().tolist() == [[True, True, False]]
    assert optimizer.state[model[0].values]["momentum_buffer"].tolist() == [0.0, 4.0]
    assert model[0].values.grad.tolist() == [0.0, 1.0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 8),
    density=st.floats(0.2, 0.9),
    share=st.floats(0.05, 1.0),
    spread=st.sampled_from([0, 1, 3, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_updates_are_those_of_plain_loops(rows, cols, density, share, spread, seed):
    """Algorithm 1 on unstructured weights; whole numbers make ties of weights and of draws."""
    rng = np.random.default_rng(seed)
    tensor = CSR.from_scores(rng.random((rows, cols)), density)
    values = rng.integers(-spread, spread + 1, tensor.nnz).astype(np.float32)
    case = Single(GrowWhere, tensor.with_values(values), share)
    case.method.grow = grow = rng.integers(1, spread + 2, (rows, cols)) / (spread + 2)
    before, after = case.move(np.zeros((rows, cols)))
    count = math.floor(share * before.mask.sum() + 1e-9)
    if count == 0 or before.mask.all():
        assert_moved(before, after, before.mask, before.mask)
        return
    kept = first_dropped(before, count)
    mask = kept.copy()
    for _, place in sorted((-grow[p], p) for p in np.ndindex(rows, cols) if not kept[p])[:count]:
        mask[place] = True
    assert_moved(before, after, kept, mask)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropped_weights_that_come_back_are_zero(format, share):
    """On a coarse format most of them do: with their block, or in their row."""
    tensor = network(format)[0].tensor()
    weights = np.random.default_rng(0).permutation(tensor.nnz).astype(np.float32) + 1
    case = Single(SET, tensor.with_values(weights), share)
    before, after = case.move(np.zeros(tensor.shape))
    kept = first_dropped(before, math.floor(share * tensor.nnz + 1e-9))
    assert_moved(before, after, kept, after.mask)
    again = before.mask & ~kept & after.mask
    assert format in ("csr", "condensed", "nm") or again.any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_values_and_state_follow_their_weights(format, name):
    model = network(format)
    optimizer = OPTIMIZERS[name](model.parameters())
    method = SET(model, optimizer, alpha=0.3, delta_t=4, t_end=100)
    assert train(model, optimizer, method, 3) == [False] * 3
    layer = model[0]
    x, y = batch(3)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()

    def dense(state):
        tensor = layer.tensor()
        return tensor.with_values(state[: tensor.nnz].detach().numpy()).to_dense()

    def states():
        held = optimizer.state[layer.values].items()
        tensors = {k: v for k, v in held if v.shape == layer.values.shape}
        return {"values": layer.values, "grad": layer.values.grad, **tensors}

    before, mask = {k: dense(v) for k, v in states().items()}, layer.tensor().mask()
    identity = id(layer.values), layer.values.data_ptr(), layer.structure.data_ptr(), layer.capacity
    assert stepped(method) is True
    after, new_mask = {k: dense(v) for k, v in states().items()}, layer.tensor().mask()
    assert len(after) >= 3
    assert identity == (
        id(layer.values), layer.values.data_ptr(), layer.structure.data_ptr(), layer.capacity
    )  # fmt: skip
    assert (mask != new_mask).any()
    kept = mask & new_mask & (after["values"] != 0)
    for key in after:
        np.testing.assert_array_equal(after[key][kept], before[key][kept])
        assert not after[key][new_mask & ~mask].any()
    np.testing.assert_array_equal(
        kept, mask & new_mask & (after["values"] == before["values"]) & kept
    )


def test_budget_holds_and_shape_of_change(format):
    model = network(format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    budget = [layer.nnz for layer in model if isinstance(layer, SparseLinear)]
    method = SET(model, optimizer, alpha=0.3, delta_t=2, total_steps=40, t_end=0.5)
    changed = train(model, optimizer, method, 24)
    steps = [i + 1 for i, c in enumerate(changed) if c]
    # The last, smallest updates can be below what a coarse format is able to change.
    assert steps[:5] == [2, 4, 6, 8, 10]
    assert set(steps) <= set(range(2, 19, 2))
    assert [layer.nnz for layer in model if isinstance(layer, SparseLinear)] == budget
    model[0].tensor().validate()
    assert method.summary().exploration > 0.3


def test_about_the_scheduled_share_moves(format):
    model = network(format)
    method = SET(
        model, torch.optim.SGD(model.parameters(), lr=0.1), alpha=0.3, delta_t=1, t_end=10**9
    )
    mask = model[0].tensor().mask()
    stepped(method)
    moved = (mask & ~model[0].tensor().mask()).sum() / mask.sum()
    # Regrouping rows into blocks moves more than what was dropped.
    assert 0.1 <= moved <= (0.6 if format == "shuffled_block" else 0.45)


def test_blocks_of_odd_sizes_hold_their_budget_within_the_capacity():
    model = nn.Sequential(nn.Linear(13, 10))
    sparsify(model, "shuffled_block", density=0.4, block_shape=(4, 4), scores="random",
             generator=torch.Generator().manual_seed(0))  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SET(model, optimizer, alpha=0.5, delta_t=1, t_end=50)
    for _ in range(30):
        stepped(method)
        assert 52 <= model[0].nnz <= model[0].capacity < 52 + 16
    exact = nn.Sequential(SparseLinear.from_tensor(model[0].tensor()))  # without room
    method = SET(exact, torch.optim.SGD(exact.parameters(), lr=0.1), alpha=0.5, delta_t=1, t_end=50)
    for _ in range(10):
        stepped(method)
        assert 0 < exact[0].nnz <= exact[0].capacity


def test_of_equal_magnitudes_the_first_are_dropped():
    weight = np.array([[3.0, 1.0, 1.0, 2.0, 1.0, 0.0]], np.float32)
    model = nn.Sequential(SparseLinear.from_tensor(CSR.from_dense(weight, weight > 0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = GrowWhere(model, optimizer, alpha=0.4, delta_t=1, t_end=10**9)
    method.grow = np.array([[0.1, 0.2, 0.3, 0.1, 0.4, 0.9]])
    assert stepped(method)  # two of three equal ones go; positions 5 and 2 come
    assert model[0].tensor().to_dense().tolist() == [[3.0, 0.0, 0.0, 2.0, 1.0, 0.0]]
    assert model[0].tensor().mask().tolist() == [[True, False, True, True, True, True]]


def test_trained_zeros_are_ordinary_weights():
    model = network("condensed")
    with torch.no_grad():
        model[0].values.zero_()
    fan_in, nnz = model[0].tensor().fan_in, model[0].nnz
    method = SET(model, torch.optim.SGD(model.parameters(), lr=0.1), delta_t=1, t_end=100)
    assert stepped(method)
    assert (model[0].tensor().fan_in, model[0].nnz) == (fan_in, nnz)


def test_it_learns():
    model = network("condensed", density=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = SET(model, optimizer, delta_t=10, total_steps=150)
    train(model, optimizer, method, 150)
    x = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
    assert (model(x).argmax(1) == x[:, :8].argmax(1)).float().mean() > 0.6


# ---------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumes_bit_for_bit(format, name):
    arguments = {"delta_t": 3, "t_end": 40, "seed": 5}
    model = network(format)
    optimizer = OPTIMIZERS[name](model.parameters())
    method = SET(model, optimizer, **arguments)
    train(model, optimizer, method, 7)
    file = io.BytesIO()
    parts = (model, optimizer, method)
    torch.save([part.state_dict() for part in parts], file)
    train(model, optimizer, method, 8)

    twin = network(format, seed=1)  # another structure, other values
    twin_optimizer = OPTIMIZERS[name](twin.parameters())
    twin_method = SET(twin, twin_optimizer, **{**arguments, "seed": 99})
    file.seek(0)
    for part, state in zip((twin, twin_optimizer, twin_method), torch.load(file), strict=True):
        part.load_state_dict(state)
    train(twin, twin_optimizer, twin_method, 8)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert str(method.summary()) == str(twin_method.summary())


def test_state_of_another_model_is_refused():
    methods = []
    for model in (network(), nn.Sequential(SparseLinear(8, 8, density=0.5))):
        methods.append(SET(model, torch.optim.SGD(model.parameters(), lr=0.1), t_end=1000))
    with pytest.raises(FormatError, match="sparsify"):
        methods[0].load_state_dict(methods[1].state_dict())
    state = methods[0].state_dict()
    for wrong, match in [
        ({"generator": torch.zeros(3)}, "generator is missing or damaged"),
        ({"steps": -3}, "steps=-3"),
        ({"updates": "x"}, "updates='x'"),
        ({"method": "RigL"}, "the state of RigL; expected .* SET"),
    ]:
        with pytest.raises(FormatError, match=match):
            methods[0].load_state_dict({**state, "steps": 7, **wrong})
    for name in state:
        part = {key: entry for key, entry in state.items() if key != name}
        with pytest.raises(FormatError, match=name):
            methods[0].load_state_dict({**part, **({} if name == "steps" else {"steps": 7})})
    with pytest.raises(FormatError, match="without method, steps, updates, explored"):
        methods[0].load_state_dict({})
    assert methods[0].steps == 0


# ------------------------------------------------------------------------- surroundings, errors


def test_compiled_model_survives_without_recompiling():
    model = network("shuffled_block")
    twin = copy.deepcopy(model)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    runs = []
    for net, forward in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        method = SET(net, optimizer, delta_t=2, t_end=100)
        assert sum(train(forward, optimizer, method, 6)) == 3
        runs.append(net.state_dict())
    for a, b in zip(*(run.values() for run in runs), strict=True):
        torch.testing.assert_close(a, b)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("cls", [RigL, DSB])
def test_methods_that_observe_keep_one_graph(cls):
    """With the idiom of docs/training.md: the model itself on the steps of updates."""
    model = network("shuffled_block" if cls is DSB else "csr")
    twin = copy.deepcopy(model)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    runs = []
    for net, forward in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        method = cls(net, optimizer, delta_t=3, t_end=100)
        for _ in range(4):  # the step of an update follows two others
            train(forward, optimizer, method, 2)
            assert method.observing
            assert train(net, optimizer, method, 1) == [True]
        runs.append(net.state_dict())
    for a, b in zip(*(run.values() for run in runs), strict=True):
        torch.testing.assert_close(a, b)
    assert graphs.frame_count == 1


def test_gradient_accumulation_and_clipping():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = SET(model, optimizer, delta_t=2, t_end=100)
    for step in range(4):
        for part in range(2):
            x, y = batch(10 * step + part)
            nn.functional.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert method.step() is (step % 2 == 1)
        optimizer.zero_grad()


def test_same_seed_same_topology_on_all_ranks():
    masks = []
    for _ in range(2):
        model = network()
        method = SET(model, torch.optim.SGD(model.parameters(), lr=0.1), delta_t=1, t_end=9, seed=4)
        torch.manual_seed(int(torch.randint(100, (1,))))  # the global generator plays no part
        stepped(method)
        masks.append(model[0].tensor().mask())
    np.testing.assert_array_equal(*masks)


def test_summary_prints_a_row_per_layer():
    model = network("shuffled_block")
    method = SET(model, torch.optim.SGD(model.parameters(), lr=0.1), t_end=1000)
    rows = list(method.summary())
    assert [r.name for r in rows] == ["0", "2"]
    assert rows[0].exploration == rows[0].density == model[0].density
    assert rows[0].active_rows <= 48
    assert rows[0].target_density == 0.25
    text = str(method.summary())
    for part in ("48x32", "shuffled_block", "block_shape=(4, 4)", "explored", "0 updates"):
        assert part in text


def test_frozen_layers_stay_as_they_are():
    model = network()
    model[0].requires_grad_(False)
    frozen = model[0].tensor()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameters in (trained, list(model.parameters())):
        optimizer = torch.optim.AdamW(parameters)
        method = SET(model, optimizer, delta_t=1, t_end=10)
        assert train(model, optimizer, method, 2) == [True, True]
        assert model[0].tensor() == frozen


def test_full_layers_keep_their_weights(format):
    model = network(format)
    model[2] = SparseLinear.from_linear(nn.Linear(48, 8), format=format, density=1.0,
                                        **FORMATS[format])  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = SET(model, optimizer, delta_t=1, t_end=10)
    full = model[2].tensor()
    assert train(model, optimizer, method, 2) == [True, True]
    assert model[2].tensor() == full


def test_misuse_is_an_error():
    dense = nn.Linear(4, 4)
    with pytest.raises(FormatError, match="no density"):
        SET(dense, torch.optim.SGD(dense.parameters(), lr=0.1), t_end=1000)
    model = nn.Sequential(nn.Linear(8, 8))
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsify(model, "csr", density=0.5)
    with pytest.raises(FormatError, match="make the optimizer after"):
        SET(model, early, t_end=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FormatError, match="total_steps"):
        SET(model, optimizer)
    for options, match in [
        ({"t_end": 1000, "total_steps": 0}, "total_steps=0"),
        ({"t_end": 1000, "delta_t": True}, "delta_t=True"),
        ({"t_end": 1000, "seed": None}, "seed=None"),
        ({"total_steps": 120}, "delta_t=100 and t_end=90 with total_steps=120"),
        ({"t_end": 0}, "SET would never update.*train with Static"),
        ({"t_end": 100}, "delta_t < t_end"),
    ]:
        with pytest.raises(FormatError, match=match):
            SET(model, optimizer, **options)
    assert SET(model, optimizer, t_end=101).schedule.updates == 1
    for method in (Static, SSB):
        blocks = nn.Sequential(nn.Linear(32, 32))
        optimizer = torch.optim.SGD(blocks.parameters(), lr=0.1)
        assert not method(blocks, optimizer, density=0.5, t_end=0).schedule.updates


def test_a_layer_has_one_method_at_a_time():
    """The one that was made last: notebooks make them again under the name of the first."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = (SET(model, optimizer, delta_t=1, t_end=9) for _ in range(2))
    with pytest.raises(FormatError, match="after SET was made for its layer 0"):
        stepped(first)
    assert first.steps == 0
    assert stepped(second)


def test_state_that_cannot_follow_is_refused_before_anything_moves():
    model = nn.Sequential(SparseLinear(16, 16, density=0.25), nn.Linear(16, 2))
    with pytest.raises(FormatError, match="L-BFGS"):
        SET(model, torch.optim.LBFGS(model.parameters()), t_end=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SET(model, optimizer, delta_t=1, t_end=10)
    optimizer.state[model[0].values]["factors"] = torch.ones(7)
    before = model[0].tensor()
    with pytest.raises(FormatError, match="element-wise"):
        stepped(method)
    assert model[0].tensor() == before
