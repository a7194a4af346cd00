"""DSB against the paper: figures by hand, a slow reference of the whole update, what must hold."""

from __future__ import annotations

import heapq
import io
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from train_cases import stepped  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.formats import ShuffledBlock  # noqa: E402
from spfmt.structure.rows import order_rows  # noqa: E402
from spfmt.torch import SparseConv1d, SparseConv2d, SparseLinear, sparsify  # noqa: E402
from spfmt.train import DNSB, DSB, SET, SSB  # noqa: E402
from spfmt.train.dsb import best_first, block_aware, grow_in_blocks, sorted_groups  # noqa: E402

METHODS = {"DSB": (DSB, {}), "DNSB": (DNSB, {"aligned": True})}


def in_blocks(model: nn.Sequential, seed: int, **params: Any) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    sparsify(model, "shuffled_block", density=0.3, scores="random", reset=True, generator=generator,
             block_shape=(4, 4), **params)  # fmt: skip
    return model


def network(seed: int = 0, **params: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(37, 50), nn.ReLU(), nn.Linear(50, 8))
    return in_blocks(model, seed, **params)


def images(seed: int = 0, **params: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.ReLU(),
        nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    return in_blocks(model, seed, **params)


SHAPES = {"linear": (network, (37,)), "images": (images, (1, 9, 9))}


def sparse(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, SparseLinear | SparseConv2d)]


def train(model, optimizer, method, steps: int, parts: int = 1) -> list[bool]:
    size = (37,) if isinstance(model[0], SparseLinear) else (1, 9, 9)
    changed = []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(method.steps)
        x = torch.randn(16, *size, generator=generator)
        y = x.flatten(1)[:, :8].argmax(1)
        optimizer.zero_grad()
        for part in range(parts):
            share = slice(part * 16 // parts, (part + 1) * 16 // parts)
            nn.functional.cross_entropy(model(x[share]), y[share], reduction="sum").backward()
        optimizer.step()
        changed.append(method.step())
    return changed


# --------------------------------------------------------------------------- the paper's figures


def test_figure_5_isolated_small_weights_stay():
    """Of five candidates in a block the two go not that are alone in their row and their column."""
    small = np.array(
        [
            [1, 0, 1, 0],
            [0, 0, 0, 1],  # alone
            [0, 0, 1, 0],
            [0, 1, 0, 0],  # alone
        ]
    )
    weight = np.zeros((8, 6), np.float32)
    rows, columns = np.array([6, 1, 3, 0]), np.array([5, 2, 0, 4])
    weight[np.ix_(rows, columns)] = np.where(small, 1, 9)
    weight[np.ix_([2, 4, 5, 7], [1, 3])] = 9
    tensor = ShuffledBlock.from_dense(weight, weight != 0, block_shape=(4, 4))
    candidates = np.flatnonzero(tensor.values == 1)
    assert candidates.size == 5
    gone = tensor.flat_indices()[block_aware(tensor, candidates)]
    expected = [(rows[0], columns[0]), (rows[0], columns[2]), (rows[2], columns[2])]
    assert set(gone) == {r * 6 + c for r, c in expected}


@pytest.mark.parametrize(
    ("shape", "block_shape", "candidates", "gone"),
    [
        # A row of a block has S2 = 4 elements and half of them is two; a column has S1 = 2 or 6.
        ((2, 4), (2, 4), [(0, 0)], [(0, 0)]),
        ((6, 4), (6, 4), [(0, 0), (0, 1)], [(0, 0), (0, 1)]),
        ((6, 4), (6, 4), [(0, 0), (1, 0)], []),
        ((6, 4), (6, 4), [(0, 0), (1, 0), (5, 0)], [(0, 0), (1, 0), (5, 0)]),
        # Half of three is two, and of one and two it is one.
        ((3, 3), (3, 3), [(0, 0), (1, 1), (1, 2)], [(1, 1), (1, 2)]),
        ((5, 4), (1, 4), [(0, 0), (4, 3)], [(0, 0), (4, 3)]),
        ((4, 5), (4, 2), [(0, 0), (3, 3)], [(0, 0), (3, 3)]),
        # The second block is two columns wide, the second group one row high.
        ((4, 6), (4, 4), [(0, 0), (0, 5)], [(0, 5)]),
        ((5, 4), (4, 4), [(0, 0), (4, 3)], [(4, 3)]),
        # Bands cut rows of a group into sixteens; their columns are as high as the group.
        ((20, 4), (20, 4), [(r, 1) for r in range(0, 20, 2)], [(r, 1) for r in range(0, 20, 2)]),
        ((20, 4), (20, 4), [(r, 1) for r in range(0, 18, 2)], []),
    ],
)
def test_half_of_a_line_is_half_of_its_own_length(shape, block_shape, candidates, gone):
    tensor = ShuffledBlock.from_dense(
        np.ones(shape), block_shape=block_shape, row_perm=np.arange(shape[0])
    )
    place = {int(p): i for i, p in enumerate(tensor.flat_indices())}
    given = np.sort([place[r * shape[1] + c] for r, c in candidates])
    found = tensor.flat_indices()[block_aware(tensor, given)]
    assert sorted(found) == sorted(r * shape[1] + c for r, c in gone)


# Sorted inputs are 2, 1, 0, 3 and sorted gradients 0, 2, 3, 1 in all cases.
@pytest.mark.parametrize(
    ("inputs", "taken", "count", "grown"),
    [
        ([2, 3, 4, 1], [], 2, [(0, 2), (2, 2)]),  # b0, as in the figure
        ([2, 3, 4, 1], [], 4, [(0, 2), (2, 2), (0, 1), (2, 1)]),  # b1 = 7·3 > b4 = 3·4
        ([1, 2, 8, 0.5], [], 4, [(0, 2), (2, 2), (3, 2), (1, 2)]),  # b4 = 3·8 > b1 = 7·2
        ([2, 3, 4, 1], [(2, 2)], 2, [(0, 2), (0, 1)]),  # overlap counts not, surplus (2, 1) goes
        ([2, 3, 4, 1], [(0, 1)], 3, [(0, 2), (2, 2), (2, 1)]),
        ([2, 3, 4, 1], [(r, c) for r in range(4) for c in (0, 2, 3)], 9,
         [(0, 1), (2, 1), (3, 1), (1, 1)]),  # no more are free
    ],
)  # fmt: skip
def test_figure_6_blocks_grow_best_first(inputs, taken, count, grown):
    weights = np.zeros((4, 4), bool)
    for position in taken:
        weights[position] = True
    x, y = sorted_groups(np.array([4.0, 1, 3, 2]), 2), sorted_groups(np.array(inputs, float), 1)
    assert x.members.tolist() == [[0, 2], [3, 1]]
    assert y.members.tolist() == [[2], [1], [0], [3]]
    found = grow_in_blocks(x, y, weights, count)
    assert [divmod(int(p), 4) for p in found] == grown


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=9),
    st.lists(st.integers(0, 6), min_size=1, max_size=9),
    st.integers(0, 90),
)
def test_blocks_come_in_the_order_of_a_search_with_a_frontier(x, y, first):
    """As the paper says it: the two neighbours of a visited block join the frontier."""
    x, y = sorted(x, reverse=True), sorted(y, reverse=True)
    frontier, seen, visited = [(-x[0] * y[0], 0, 0)], {(0, 0)}, []
    while frontier:
        _, i, j = heapq.heappop(frontier)
        visited.append((i, j))
        for a, b in ((i, j + 1), (i + 1, j)):
            if a < len(x) and b < len(y) and (a, b) not in seen:
                seen.add((a, b))
                heapq.heappush(frontier, (-x[a] * y[b], a, b))
    pieces = best_first(np.array(x, float), np.array(y, float), first)  # 0 is as good as 1
    found = [tuple(cell) for piece in pieces for cell in piece.tolist()]
    assert found == visited


# ------------------------------------------------------------------- a slow reference of the update


def reference_drop(values, positions, blocks, cols, k, aware):
    """Section 4, "Block-aware drop criterion", with half of a line's own length."""
    by_size = sorted(range(len(values)), key=lambda i: (abs(values[i]), i))
    small = {positions[i] for i in by_size[:k]}
    dropped = set()
    for rows, columns in blocks:
        for r in rows:
            for c in columns:
                if r * cols + c in small:
                    in_row = sum(r * cols + other in small for other in columns)
                    in_column = sum(other * cols + c in small for other in rows)
                    enough = in_row >= len(columns) / 2 or in_column >= len(rows) / 2
                    if enough or not aware:
                        dropped.add(r * cols + c)
    return dropped


def reference_grow(active, d_out, seen, s_x, s_y, count):
    """Section 4, "Block-wise grow criterion": every block is looked at, and sorted.

    `seen` holds the norms of what the rows of each group of a convolution see.
    """
    cols, height = len(seen[0]), len(d_out) // len(seen)

    def product(place):
        return d_out[place[0]] * seen[place[0] // height][place[1]]

    d_in = [sum(group[c] for group in seen) for c in range(cols)]
    by_out = sorted(range(len(d_out)), key=lambda i: (-d_out[i], i))
    by_in = sorted(range(cols), key=lambda j: (-d_in[j], j))
    xs = [by_out[i : i + s_x] for i in range(0, len(by_out), s_x)]
    ys = [by_in[j : j + s_y] for j in range(0, len(by_in), s_y)]
    blocks = []
    for i, x in enumerate(xs):
        for j, y in enumerate(ys):
            blocks.append((-sum(product((r, c)) for r in x for c in y), i, j))
    grown = []
    for _, i, j in sorted(blocks):
        if len(grown) == count:
            break
        new = [(r, c) for r in xs[i] for c in ys[j] if r * cols + c not in active]
        new.sort(key=lambda place: -product(place))  # stable
        for r, c in new[: count - len(grown)]:
            grown.append(r * cols + c)
    return set(grown)


def reference_blocks(scores, perm, s1, s2, budget):
    """Section 4, "Shuffled blocking", from the order of the rows on: always the next best block."""
    rows, cols = scores.shape
    queues = []
    for begin in range(0, rows, s1):
        group = perm[begin : begin + s1]
        norm = [sum(scores[r, c] for r in group) for c in range(cols)]
        order = sorted(range(cols), key=lambda c: (-norm[c], c))
        runs = [order[c : c + s2] for c in range(0, cols, s2)]
        queues.append((group, [(sum(norm[c] for c in run), run) for run in runs]))
    mask, held = np.zeros((rows, cols), bool), 0
    while held < budget:
        best = max((q for q in queues if q[1]), key=lambda q: q[1][0][0])  # the first of equal ones
        group, runs = best
        _, run = runs.pop(0)
        mask[np.ix_(group, run)] = True
        held += len(group) * len(run)
    return mask


@st.composite
def cases(draw):
    s1, s2 = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return {
        "rows": draw(st.integers(1, 16)),
        "cols": draw(st.integers(1, 14)),
        "kernel": draw(st.sampled_from([None, None, (1, 1), (2, 3)])),
        "groups": draw(st.sampled_from([1, 1, 2, 4])),
        "block_shape": (s1, s2),
        "grow_shape": draw(st.none() | st.tuples(st.integers(1, 5), st.integers(1, 4))),
        "density": draw(st.sampled_from([0.1, 0.3, 0.5, 0.8])),
        "alpha": draw(st.sampled_from([0.1, 0.3, 0.6, 1.0])),
        "aware": draw(st.booleans()),
        "largest": draw(st.sampled_from([2, 6, 1000])),  # few different numbers make ties
        "method": draw(st.sampled_from(["densest", "fast", "paper"])),
        "own_capacity": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


def layer_of(case, rng):
    """A layer with whole numbers for weights, and a call of it with whole numbers."""
    kernel = case["kernel"]
    case["groups"] = groups = case["groups"] if kernel else 1
    case["rows"] *= groups
    shape = (case["rows"], case["cols"], *(kernel or ()))
    tensor = ShuffledBlock.from_scores(
        rng.integers(0, 9, shape), case["density"], block_shape=case["block_shape"]
    )
    assume(0 < tensor.nnz < np.prod(shape))
    signs = rng.choice([-1, 1], tensor.nnz)
    tensor = tensor.with_values((rng.integers(1, case["largest"], tensor.nnz) * signs).astype("f4"))
    make = SparseConv2d if kernel else SparseLinear
    # What a layer has by itself is enough for every structure that the reference finds.
    capacity = None if case["own_capacity"] else int(np.prod(shape))
    layer = make.from_tensor(
        tensor, capacity=capacity, target_density=case["density"],
        **({"padding": 1, "groups": groups} if kernel else {}), method=case["method"],
    )  # fmt: skip
    size = (3, case["cols"] * groups, 4, 5) if kernel else (3, case["cols"])
    x = torch.from_numpy(rng.integers(-4, 5, size).astype("f4"))
    with torch.no_grad():
        dy = torch.from_numpy(rng.integers(-4, 5, layer(x).shape).astype("f4"))
    return layer, x, dy


def norms_of(layer, x, dy):
    """Sum of magnitudes over batch and space, by unfolding."""
    if isinstance(layer, SparseConv2d):
        x = nn.functional.unfold(x, layer.kernel_size, padding=1).transpose(1, 2).flatten(0, 1)
        dy = dy.transpose(1, 3).flatten(0, 2)
    return dy.abs().sum(0).tolist(), x.abs().sum(0).tolist()


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_update_is_that_of_a_slow_reference(case):
    rng = np.random.default_rng(case["seed"])
    layer, x, dy = layer_of(case, rng)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    method = DSB(
        layer, optimizer, alpha=case["alpha"], delta_t=1, t_end=10**9,
        block_aware=case["aware"], grow_shape=case["grow_shape"],
    )  # fmt: skip
    (layer(x) * dy).sum().backward()
    optimizer.step()
    old, positions = layer.tensor(), layer.positions()
    rows, cols = old.matrix_shape
    momentum = optimizer.state[layer.values]["momentum_buffer"][: old.nnz].clone().numpy()
    before = {p: (w, m) for p, w, m in zip(positions, old.values, momentum, strict=True)}

    d_out, d_in = norms_of(layer, x, dy)
    blocks = [(r.tolist(), c.tolist()) for r, c, _ in old.blocks()]
    k = int(case["alpha"] * old.nnz + 1e-9)
    dropped = reference_drop(old.values, positions, blocks, cols, k, case["aware"])
    s_x, s_y = case["grow_shape"] or (case["block_shape"][0], 1)
    kept = set(before) - dropped
    seen = np.reshape(d_in, (case["groups"], cols)).tolist()
    grown = reference_grow(kept, d_out, seen, s_x, s_y, len(dropped))
    assert len(kept) + len(grown) == old.nnz

    changed = stepped(method)
    new = layer.tensor()
    new.validate()
    if not dropped:
        assert not changed
        assert new == old
        return
    scores = np.zeros(rows * cols)
    scores[list(grown)] = np.abs(old.values).max()
    scores[list(kept)] = [abs(before[p][0]) for p in kept]
    scores = scores.reshape(rows, cols)
    perm = order_rows(scores > 0, method=case["method"], group_size=case["block_shape"][0])
    np.testing.assert_array_equal(new.row_perm, perm)
    budget = round(case["density"] * rows * cols)
    mask = reference_blocks(scores, perm.tolist(), *case["block_shape"], budget)
    np.testing.assert_array_equal(new.mask().reshape(rows, cols), mask)
    now = optimizer.state[layer.values]["momentum_buffer"].numpy()
    for i, p in enumerate(layer.positions()):  # new ones zero in both
        assert (new.values[i], now[i]) == (before[p] if p in kept else (0, 0))
    assert not now[new.nnz :].any()
    assert not layer.values[new.nnz :].any()


# --------------------------------------------------------------------------------- what must hold


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_values_and_state_follow_their_weights(name, kind):
    method_class, params = METHODS[name]
    model = SHAPES[kind][0](**params)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = method_class(model, optimizer, delta_t=3, t_end=100)
    assert train(model, optimizer, method, 2) == [False, False]
    held = {}

    def contents(layer):
        state = optimizer.state[layer.values]
        parts = (layer.values, layer.values.grad, state["exp_avg"], state["exp_avg_sq"])
        columns = torch.stack([part.detach() for part in parts], 1)[: layer.nnz]
        return dict(zip(layer.positions().tolist(), columns.tolist(), strict=True))

    optimizer.register_step_post_hook(
        lambda *_: held.update({layer: contents(layer) for layer in sparse(model)})
    )
    assert train(model, optimizer, method, 1) == [True]
    for layer in sparse(model):
        after, before = contents(layer), held[layer]
        assert set(after) != set(before)
        for p, content in after.items():
            assert content in ([0] * 4, before.get(p))
        survived = sum(content == before.get(p) for p, content in after.items())
        assert survived > len(before) / 3  # shuffling again costs a small layer most


@example("DSB", 5, 17, 1, 1, 0.7, 0)  # 0.7 * 85 is below 59.5, and 0.7 * 5 * 17 is not
@example("DSB", 5, 13, 3, 5, 0.4, 1)
@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(list(METHODS)), st.integers(5, 24), st.integers(5, 24), st.integers(1, 6),
    st.integers(1, 6), st.sampled_from([0.15, 0.4, 0.7]), st.integers(0, 1000),
)  # fmt: skip
def test_budget_and_structure_hold(name, rows, cols, s1, s2, density, seed):
    method_class, params = METHODS[name]
    torch.manual_seed(seed)
    layer = SparseLinear(cols, rows, format="shuffled_block", density=density,
                         block_shape=(s1, s2), **params)  # fmt: skip
    assume(layer.nnz < rows * cols)
    blocks, capacity = layer.tensor().n_blocks, layer.capacity
    budget = round(density * (rows * cols))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    method = method_class(layer, optimizer, alpha=0.5, delta_t=1, t_end=100)
    for _ in range(4):
        optimizer.zero_grad()
        layer(torch.randn(4, cols)).square().sum().backward()
        optimizer.step()
        method.step()
        tensor = layer.tensor()
        tensor.validate()  # no column twice in a group, and every row in one
        assert np.unique(layer.positions()).size == tensor.nnz <= capacity
        if rows % s1 == 0 and cols % s2 == 0:
            assert tensor.n_blocks == blocks == -(-budget // (s1 * s2))
            assert tensor.nnz == blocks * s1 * s2 == capacity
        else:
            assert budget <= tensor.nnz < budget + s1 * s2
        if params:
            np.testing.assert_array_equal(tensor.row_perm, np.arange(rows))
            for _, columns, _ in tensor.blocks():
                start = columns[0]
                assert start % s2 == 0
                assert columns.tolist() == list(range(start, min(start + s2, cols)))


@pytest.mark.parametrize("size", [(1, 10**9), (10**9, 1), (1, 2**31 - 1)])
@pytest.mark.parametrize("name", METHODS)
def test_blocks_larger_than_the_layer_are_cut_to_it(name, size):
    method_class, params = METHODS[name]
    height, width = min(size[0], 12), min(size[1], 16)
    layer = SparseLinear(16, 12, format="shuffled_block", density=0.25, block_shape=size, **params)
    assert layer.nnz == layer.capacity == -(-48 // (height * width)) * height * width
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    method = method_class(layer, optimizer, alpha=1.0, delta_t=1, t_end=100)
    layer(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()
    method.step()
    assert layer.nnz == layer.capacity


def test_new_weights_survive_the_blocking():
    """They count as the largest weight, though they are zero; as the smallest, most would go."""
    shares = []
    for factor in (1.0, 1e-6):

        class Spy(DSB):
            def shuffle(self, layer, positions, magnitudes, factor=factor):
                new = ~np.isin(positions, layer.positions())
                assert positions.size == np.unique(positions).size == layer.nnz
                assert (magnitudes[new] == layer.values.abs().max().item()).all()
                magnitudes = np.where(new, factor * magnitudes, magnitudes)
                found = super().shuffle(layer, positions, magnitudes)
                shares.append(np.isin(positions[new], found.flat_indices()).mean())
                return found

        model = network()[:1]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        train(model, optimizer, Spy(model, optimizer, delta_t=1, t_end=10**9), 1)
    assert shares[0] > 0.7 > 2 * shares[1]


def test_isolated_candidates_are_spared_or_not():
    """Appendix A.2: without the rule more weights go."""
    grown = []
    for aware in (True, False):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        method = DSB(model, optimizer, delta_t=1, t_end=10**9, block_aware=aware)
        before = model[0].tensor().mask()
        train(model, optimizer, method, 1)
        grown.append((model[0].tensor().mask() & ~before).sum())
    assert 0 < grown[0] < grown[1]


def test_trained_zeros_are_weights():
    layer = SparseLinear(16, 24, format="shuffled_block", density=0.25, block_shape=(4, 4))
    with torch.no_grad():
        layer.values.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    method = DSB(layer, optimizer, alpha=0.2, delta_t=1, t_end=100, block_aware=False)
    before = layer.tensor().mask()
    layer(torch.randn(4, 16)).sum().backward()
    assert stepped(method)
    assert layer.nnz == 24 * 16 // 4
    assert (layer.tensor().mask() & before).sum() > 0.5 * before.sum()


def test_layers_may_keep_their_groups_of_rows():
    order = np.random.default_rng(0).permutation(24)
    layer = SparseLinear(16, 24, format="shuffled_block", density=0.25, block_shape=(4, 4),
                         row_perm=order)  # fmt: skip
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    method = DSB(layer, optimizer, alpha=0.5, delta_t=1, t_end=100)
    before = layer.tensor()
    layer(torch.randn(4, 16)).square().sum().backward()
    assert stepped(method)
    np.testing.assert_array_equal(layer.tensor().row_perm, order)
    assert layer.tensor().nnz == before.nnz


@pytest.mark.parametrize("name", METHODS)
def test_it_learns(name):
    method_class, params = METHODS[name]
    model = network(**params)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = method_class(model, optimizer, delta_t=10, total_steps=150)
    train(model, optimizer, method, 150)
    x = torch.randn(256, 37, generator=torch.Generator().manual_seed(10_000))
    assert (model(x).argmax(1) == x[:, :8].argmax(1)).float().mean() > 0.6


# ----------------------------------------------------------------------- observations, convolutions


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (SparseConv2d, {"kernel_size": 3, "padding": 1}),
        (SparseConv2d, {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2)}),
        (SparseConv1d, {"kernel_size": 3, "padding": 1, "stride": 2}),
    ],
)
def test_norms_are_l1_over_batch_and_space(make, options):
    layer = make(6, 8, **options, format="shuffled_block", density=0.4, block_shape=(4, 4))
    method = DSB(layer, torch.optim.SGD(layer.parameters(), lr=0.1), delta_t=1, t_end=100)
    calls = [torch.randn(n, 6, *(9, 10)[: len(layer.kernel_size)]) for n in (1, 3)]
    expected = [torch.zeros(6 * int(np.prod(layer.kernel_size))), torch.zeros(8)]
    for x in calls:
        y = layer(x)
        dy = torch.randn(y.shape)
        y.backward(dy)
        inputs, grads = layer.samples(x, dy)  # unfolded
        expected[0] += inputs.abs().sum(0)
        expected[1] += grads.abs().sum(0)
    found = method.observed(layer)
    torch.testing.assert_close(found.input_norms, expected[0])
    torch.testing.assert_close(found.output_grad_norms, expected[1])


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_accumulate(kind):
    """Two halves of a batch move weights as the whole batch does."""
    runs = []
    for parts in (1, 2):
        model = SHAPES[kind][0]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        method = DSB(model, optimizer, delta_t=1, t_end=100)
        assert train(model, optimizer, method, 1, parts) == [True]
        runs.append([layer.positions() for layer in sparse(model)])
    for whole, halves in zip(*runs, strict=True):
        np.testing.assert_array_equal(whole, halves)


def test_norms_that_overflow_leave_a_layer_alone(caplog):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = DSB(model, optimizer, delta_t=1, t_end=100)
    before = [layer.tensor() for layer in sparse(model)]
    (model(torch.randn(4, 37)) * torch.inf).sum().backward()
    assert not stepped(method)
    assert [layer.tensor() for layer in sparse(model)] == before
    assert "not finite" in caplog.text


def test_no_dense_weight_or_gradient_exists():
    """A mask, column sums of groups and less exist at a time in numpy; in torch nothing dense."""
    layer = SparseLinear(512, 512, format="shuffled_block", density=0.05)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    method = DSB(layer, optimizer, delta_t=1, t_end=10**9)
    largest = 0

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    for _ in range(2):  # the first imports, and fills caches
        layer(torch.randn(8, 512)).square().sum().backward()
        optimizer.step()
        tracemalloc.start()
        with Spy():
            assert method.step()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert largest <= layer.capacity + 1
    assert peak <= 512 * 512 * 3 + 80 * layer.nnz


# ------------------------------------------------------------------------------ resuming, baselines


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_resumes_bit_for_bit(name, kind):
    method_class, params = METHODS[name]

    def make(seed):
        model = SHAPES[kind][0](seed, **params)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, method_class(model, optimizer, delta_t=2, t_end=40)

    whole, resumed = make(0), make(1)  # another structure, other values
    train(*whole, 3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)
    file.seek(0)
    for part, state in zip(resumed, torch.load(file), strict=True):
        part.load_state_dict(state)
    assert train(*whole, 4) == train(*resumed, 4) == [True, False, True, False]
    for a, b in zip(whole[0].state_dict().values(), resumed[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert str(whole[2].summary()) == str(resumed[2].summary())


def test_static_blocks_never_move():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SSB(model, optimizer, delta_t=1, total_steps=10, block_aware=False)
    positions, values = model[0].positions(), model[0].values.detach().clone()
    assert train(model, optimizer, method, 4) == [False] * 4
    assert not method.update()
    assert not method.observing
    np.testing.assert_array_equal(model[0].positions(), positions)
    assert not torch.equal(model[0].values, values)  # trained all the same
    assert method.summary().updates == 0
    SSB(model, optimizer)


def test_the_grid_keeps_its_best_blocks():
    scores = np.zeros((5, 7))
    scores[0, 0], scores[4, 6], scores[2, 3], scores[3, 1] = 4, 9, 5, -7
    found = ShuffledBlock.from_scores(scores, 0.25, block_shape=(2, 3), aligned=True)
    assert found.n_blocks == 3
    expected = np.zeros((5, 7), bool)
    expected[4:, 6:] = expected[2:4, 3:6] = expected[:2, :3] = True
    np.testing.assert_array_equal(found.mask(), expected)
    assert ShuffledBlock.from_scores(scores, 0.0, block_shape=(2, 3), aligned=True).nnz == 0
    assert ShuffledBlock.from_scores(scores, 1.0, block_shape=(2, 3), aligned=True).nnz == 35
    for empty in ((0, 4), (3, 0)):
        assert ShuffledBlock.from_scores(np.zeros(empty), 0.5, aligned=True).nnz == 0
    drawn = ShuffledBlock.random((8, 8), 0.5, np.random.default_rng(0), block_shape=(2, 2),
                                 aligned=True)  # fmt: skip
    assert drawn.row_perm.tolist() == list(range(8))
    with pytest.raises(FormatError, match="row_perm together with aligned"):
        ShuffledBlock.from_scores(scores, 0.5, row_perm=np.arange(5), aligned=True)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("shape", [(24, 20), (21, 18), (12, 6, 3, 3)])
def test_sparse_weights_are_blocked_as_dense_scores(shape, aligned):
    rng = np.random.default_rng(0)
    scores = rng.integers(1, 50, shape) * (rng.random(shape) < 0.25)
    positions = rng.permutation(np.flatnonzero(scores))
    how = {"block_shape": (4, 3), "aligned": aligned}
    density = positions.size / scores.size
    dense = ShuffledBlock.from_scores(scores, density, **how).astype("f4")
    weights = positions, scores.reshape(-1)[positions]
    assert ShuffledBlock.from_weights(shape, *weights, density, **how) == dense
    for wrong, message in (
        ((positions[1:], weights[1]), "one per magnitude"),
        ((positions + scores.size, weights[1]), "the number of positions"),
        ((positions.astype(float), weights[1]), "integers"),
    ):
        with pytest.raises(FormatError, match=message):
            ShuffledBlock.from_weights(shape, *wrong, density, **how)


def test_set_trains_aligned_blocks_too():
    model = network(aligned=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert any(train(model, optimizer, SET(model, optimizer, delta_t=1, t_end=100), 3))
    np.testing.assert_array_equal(model[0].tensor().row_perm, np.arange(50))


@pytest.mark.parametrize("method", [DSB, DNSB])
@pytest.mark.parametrize("groups", [2, 12])
def test_convolutions_in_groups_are_trained(method, groups):
    """With the density of the method itself; twelve groups of twelve channels are depthwise."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 24, 3, groups=groups), nn.Flatten(),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = method(model, optimizer, density=0.3, block_shape=(4, 2), distribution="uniform",
                     delta_t=2, t_end=40)  # fmt: skip
    layer = trainer.layers["2"]
    before, held = layer.tensor().mask(), layer.nnz
    assert sum(train(model, optimizer, trainer, 12)) > 2
    after = layer.tensor()
    after.validate()
    assert after.nnz == held
    assert (after.mask() != before).any()


# ---------------------------------------------------------------------------------------- bad input


def test_layers_that_cannot_be_trained_are_refused():
    def made(method, layer, **options):
        model = nn.Sequential(layer)
        return method(model, torch.optim.SGD(model.parameters(), lr=0.1), t_end=1000, **options)

    for method in (DSB, DNSB, SSB):
        with pytest.raises(FormatError, match=r"'condensed'.*shuffled_block"):
            made(method, SparseLinear(8, 8, density=0.5))
    blocks = {"format": "shuffled_block", "density": 0.5, "block_shape": (4, 4)}
    with pytest.raises(FormatError, match=r"aligned=False.*train with DSB"):
        made(DNSB, SparseLinear(8, 8, **blocks))
    with pytest.raises(FormatError, match=r"aligned=True.*train with DNSB"):
        made(DSB, SparseLinear(8, 8, **blocks, aligned=True))
    for wrong in ((0, 1), (1, 1.5), 4, (1, 2, 3)):
        with pytest.raises(FormatError, match="S_"):
            made(DSB, SparseLinear(8, 8, **blocks), grow_shape=wrong)


def test_what_is_missing_or_not_a_number_changes_nothing():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = DSB(model, optimizer, delta_t=1, t_end=100)
    before = [layer.positions() for layer in sparse(model)]
    with pytest.raises(FormatError, match=r"outside torch\.compile"):
        stepped(method)
    model(torch.randn(4, 37)).sum().backward()
    with torch.no_grad():
        model[0].values[3] = torch.nan
    with pytest.raises(FormatError, match="weights of 0 that are NaN"):
        method.update()
    for layer, positions in zip(sparse(model), before, strict=True):
        np.testing.assert_array_equal(layer.positions(), positions)
