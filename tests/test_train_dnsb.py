"""DNSB against a slow version of its update, written from the paper's section 4 and METHODS.

The paper gives DNSB no algorithm: it is DSB without the shuffling, so that blocks, X and Y lie on a
grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from train_cases import Array, stepped  # noqa: E402

from spfmt.formats import ShuffledBlock  # noqa: E402
from spfmt.torch import SparseConv2d, SparseLinear  # noqa: E402
from spfmt.train import DNSB  # noqa: E402

Block = tuple[slice, slice]


# ------------------------------------------------------------------------------ the slow version


def grid(shape: tuple[int, int], height: int, width: int) -> list[Block]:
    """The blocks of a grid, row after row of them; the last ones may be short."""
    rows, cols = shape
    return [
        (slice(r, min(r + height, rows)), slice(c, min(c + width, cols)))
        for r in range(0, rows, height)
        for c in range(0, cols, width)
    ]


def candidates_of(weight: Array, order: Array, k: int) -> Array:
    """The k smallest ``|w|`` as a mask; `order` numbers the weights, -1 where there is none."""
    places = [tuple(p) for p in np.argwhere(order >= 0)]
    places.sort(key=lambda p: (abs(weight[p]), order[p]))
    small = np.zeros(weight.shape, bool)
    for place in places[:k]:
        small[place] = True
    return small


def dropped_of(small: Array, blocks: list[Block], aware: bool) -> Array:
    """Section 4, "Block-aware drop criterion": half of a line in a block goes, and no less."""
    gone = np.zeros_like(small)
    for block in blocks:
        part = small[block]
        rows = part.sum(1, keepdims=True) >= part.shape[1] / 2
        cols = part.sum(0, keepdims=True) >= part.shape[0] / 2
        gone[block] = part & (rows | cols) if aware else part
    return gone


def grown_of(active: Array, d_out: Array, seen: Array, shape: tuple[int, int], count: int) -> Array:
    """Section 4, "Block-wise grow criterion", by looking at all blocks of X and Y.

    `seen` are the norms of In, (G, C): the rows of each of G groups of a convolution see others.
    """
    product = d_out[:, None] * np.repeat(seen, len(d_out) // len(seen), axis=0)

    def rank(block: Block) -> tuple[Any, ...]:
        x, y = d_out[block[0]].sum(), seen[:, block[1]].sum()  # of equal products the larger X
        return -product[block].sum(), -x, block[0].start, -y, block[1].start

    grown = np.zeros_like(active)
    for rows, cols in sorted(grid(active.shape, *shape), key=rank):
        free = [
            (r, c)
            for r in range(rows.start, rows.stop)
            for c in range(cols.start, cols.stop)
            if not active[r, c]
        ]
        free.sort(key=lambda place: -product[place])  # what the last block has too much is least
        for place in free[: count - grown.sum()]:
            grown[place] = True
    return grown


def kept_of(scores: Array, blocks: list[Block], budget: int) -> Array:
    """The blocks of largest l1 norm, of equal ones the first, until they hold the budget."""
    mask = np.zeros(scores.shape, bool)
    for block in sorted(blocks, key=lambda b: -scores[b].sum()):
        if mask.sum() >= budget:
            break
        mask[block] = True
    return mask


@dataclass
class Update:
    """What an update does, as masks: to weights that stay, and to the next structure."""

    kept: Array
    mask: Array


def reference(
    weight: Array, order: Array, d_out: Array, seen: Array, *, k: int, aware: bool,
    block_shape: tuple[int, int], grow_shape: tuple[int, int] | None, budget: int,
) -> Update:  # fmt: skip
    """Drop, grow, and keep the best blocks of the grid."""
    blocks, active = grid(weight.shape, *block_shape), order >= 0
    gone = dropped_of(candidates_of(weight, order, k), blocks, aware)
    if not gone.any():
        return Update(active, active)
    kept = active & ~gone
    grown = grown_of(kept, d_out, seen, grow_shape or block_shape, int(gone.sum()))
    scores = np.where(kept, abs(weight), 0) + np.where(grown, abs(weight).max(), 0)
    return Update(kept, kept_of(scores, blocks, budget))


# ------------------------------------------------------------------------------------ the cases


def trained(layer: Any, x: torch.Tensor, dy: torch.Tensor, **options: Any) -> tuple[Any, DNSB]:
    """A layer that saw a batch and its gradient, with a momentum, just before an update."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    method = DNSB(layer, optimizer, delta_t=1, t_end=10**9, **options)
    (layer(x) * dy).sum().backward()
    optimizer.step()
    return optimizer, method


def dense(layer: Any, flat: torch.Tensor) -> Array:
    """Numbers of a layer's weights, each at its position; zero elsewhere."""
    found = np.zeros(layer.tensor().matrix_shape)
    found.reshape(-1)[layer.positions()] = flat[: layer.nnz].detach().numpy()
    return found


def test_an_update_by_hand():
    """Two small weights of one block make another one, of large norms, win its place."""
    weight = np.array([[5, 5, 0, 0], [1, 1, 0, 0], [0, 0, 9, 9], [0, 0, 9, 8]], np.float32)
    tensor = ShuffledBlock.from_scores(
        abs(weight), 0.5, block_shape=(2, 2), aligned=True, values=weight
    )
    layer = SparseLinear.from_tensor(tensor, aligned=True)
    x, dy = torch.tensor([[4.0, 4, 1, 1]]), torch.tensor([[1.0, 1, 5, 5]])
    optimizer, method = trained(layer, x, dy, alpha=0.25)
    momentum = optimizer.state[layer.values]["momentum_buffer"]
    assert stepped(method)
    # The two ones go; (2, 0) and (2, 1) grow where 5·4 is the largest product. With 9 each, that
    # block has 18 and the upper left one 10.
    expected = np.kron([[0, 0], [1, 1]], np.ones((2, 2)))
    np.testing.assert_array_equal(layer.tensor().mask(), expected != 0)
    np.testing.assert_array_equal(dense(layer, layer.values)[2:, :2], 0)
    np.testing.assert_array_equal(dense(layer, layer.values)[2:, 2:], weight[2:, 2:])
    np.testing.assert_array_equal(dense(layer, momentum)[2:], [[0, 0, 5, 5], [0, 0, 5, 5]])


@st.composite
def cases(draw):
    kernel = draw(st.sampled_from([None, None, (1, 1), (2, 3)]))
    sizes = st.integers(1, 5)
    return {
        "rows": draw(st.integers(1, 16)),
        "cols": draw(st.integers(1, 14)),
        "kernel": kernel,
        "groups": draw(st.sampled_from([1, 1, 2, 4])) if kernel else 1,
        "block_shape": (draw(sizes), draw(sizes)),
        "grow_shape": draw(st.none() | st.tuples(sizes, sizes)),
        "density": draw(st.sampled_from([0.1, 0.3, 0.5, 0.8])),
        "alpha": draw(st.sampled_from([0.1, 0.3, 0.6, 1.0])),
        "aware": draw(st.booleans()),
        "largest": draw(st.sampled_from([2, 4, 1000])),  # few different numbers make ties
        "seen": draw(st.sampled_from([2, 5, 100])),
        "seed": draw(st.integers(0, 10**6)),
    }


def layer_of(case: dict[str, Any], rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """A layer with whole numbers for weights, a batch and a gradient of whole numbers."""
    kernel, groups = case["kernel"], case["groups"]
    shape = (case["rows"] * groups, case["cols"], *(kernel or ()))
    tensor = ShuffledBlock.from_scores(
        rng.integers(0, 9, shape), case["density"], block_shape=case["block_shape"], aligned=True
    )
    assume(0 < tensor.nnz < np.prod(shape))
    signs = rng.choice([-1, 1], tensor.nnz)
    tensor = tensor.with_values((rng.integers(1, case["largest"], tensor.nnz) * signs).astype("f4"))
    cls, how = (SparseConv2d, {"padding": 1, "groups": groups}) if kernel else (SparseLinear, {})
    layer = cls.from_tensor(
        tensor, capacity=int(np.prod(shape)), target_density=case["density"], aligned=True, **how
    )
    size = (3, case["cols"] * groups, 4, 5) if kernel else (3, case["cols"])
    x = torch.from_numpy(rng.integers(1 - case["seen"], case["seen"], size).astype("f4"))
    with torch.no_grad():
        y = layer(x)
    dy = torch.from_numpy(rng.integers(1 - case["seen"], case["seen"], y.shape).astype("f4"))
    return layer, x, dy


def norms_of(layer: Any, x: torch.Tensor, dy: torch.Tensor, groups: int) -> tuple[Array, Array]:
    """Sums of magnitudes over batch and space, of In by group."""
    if isinstance(layer, SparseConv2d):
        x = nn.functional.unfold(x, layer.kernel_size, padding=1).transpose(1, 2).flatten(0, 1)
        dy = dy.movedim(1, -1).flatten(0, 2)
    return dy.abs().double().sum(0).numpy(), x.abs().double().sum(0).numpy().reshape(groups, -1)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_update_is_that_of_the_slow_version(case):
    layer, x, dy = layer_of(case, np.random.default_rng(case["seed"]))
    optimizer, method = trained(
        layer, x, dy, alpha=case["alpha"], block_aware=case["aware"], grow_shape=case["grow_shape"]
    )
    momentum = optimizer.state[layer.values]["momentum_buffer"]
    before = dense(layer, layer.values), dense(layer, momentum)
    order = dense(layer, torch.arange(1, layer.nnz + 1)).astype(int) - 1
    d_out, seen = norms_of(layer, x, dy, case["groups"])
    expected = reference(
        before[0], order, d_out, seen, k=int(case["alpha"] * layer.nnz + 1e-9),
        aware=case["aware"], block_shape=case["block_shape"], grow_shape=case["grow_shape"],
        budget=round(case["density"] * order.size),
    )  # fmt: skip
    changed = stepped(method)
    assert changed == (expected.mask != (order >= 0)).any()
    layer.tensor().validate()
    np.testing.assert_array_equal(layer.tensor().mask().reshape(order.shape), expected.mask)
    momentum = optimizer.state[layer.values]["momentum_buffer"]
    for old, now in zip(before, (layer.values, momentum), strict=True):
        stays = np.where(expected.kept & expected.mask, old, 0)
        np.testing.assert_array_equal(dense(layer, now), stays)
        assert not now[layer.nnz :].any()
