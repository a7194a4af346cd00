"""HRBP's block-wise updating: by hand, against plain loops, and on the runs of convolutions."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402
from train_cases import Single, assert_moved, assert_resumes, follow, stepped, train  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.formats import HRBP as Blocks  # noqa: E402
from spfmt.structure import hrbp_blocks, hrbp_structure  # noqa: E402
from spfmt.torch import SparseConv2d, SparseLinear, sparsify  # noqa: E402
from spfmt.train import HRBP, Static  # noqa: E402


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 16),
    )
    sparsify(model, "hrbp", density=0.25, scores="random", reset=True,
             generator=torch.Generator().manual_seed(seed))  # fmt: skip
    return model


def images(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(6, 3, 7, 7, generator=generator)


def sparse(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "structure")}


def most(number, *keys):
    """The indices of the largest by the first key, ties by the next ones, then the first."""
    order = sorted(range(len(keys[0])), key=lambda i: ([-key[i] for key in keys], i))
    return sorted(order[:number])


def fullest(number, counts, sums, rng):
    """The kernels of most weights, ties to the sums; what ties in both is drawn, of a whole tie."""
    least = sorted(counts, reverse=True)[number - 1]
    above = [i for i in range(len(counts)) if counts[i] > least]
    ties = [i for i in range(len(counts)) if counts[i] == least]
    if len(above) + len(ties) > number:
        ties = [ties[i] for i in rng.permutation(len(ties))]
    return above + sorted(ties, key=lambda i: -sums[i])[: number - len(above)]


def by_loops(before, gradient, count):
    """Section 4.2 in plain loops: what is kept row by row, and the mask of the next blocks."""
    tensor = before.tensor
    rows, cols = before.mask.shape
    cells = math.prod(tensor.shape[2:])
    kept, scores = before.mask.copy(), np.zeros((rows, cols))
    grown = []
    for r in range(rows):
        held = sorted((abs(before.weight[r, c]), c) for c in range(cols) if kept[r, c])
        for _, c in held[:count]:
            kept[r, c] = False
        free = sorted((-abs(gradient[r, c]), c) for c in range(cols) if not kept[r, c])
        grown += [(r, c) for _, c in free[:count]]
    largest = max(abs(before.weight).max(), 0) or 1
    scores[kept] = abs(before.weight[kept]) / largest
    largest = max((abs(gradient[p]) for p in grown), default=0) or 1
    m = kept.copy()
    for p in grown:
        m[p], scores[p] = True, abs(gradient[p]) / largest

    mask = np.zeros_like(m)
    channels, pattern = tensor.channel_indices.shape[1], tensor.pattern_indices.shape[1]
    rng = np.random.default_rng(0)
    for g in range(tensor.groups):
        group = sorted(tensor.row_perm[tensor.row_ptr[g] : tensor.row_ptr[g + 1]])
        parts = (len(group), cols // cells, cells)
        counts, sums = m[group].reshape(parts), scores[group].reshape(parts)
        totals = counts.sum(2).ravel(), sums.sum(2).ravel()
        kernels = fullest(len(group) * channels, *totals, rng)
        kernel_mask = np.zeros(parts[:2])
        kernel_mask.reshape(-1)[kernels] = 1
        chosen = most(channels, kernel_mask.sum(0), counts.sum((0, 2)), sums.sum((0, 2)))
        inside = (slice(None), chosen)
        found = most(pattern, counts[inside].sum((0, 1)), sums[inside].sum((0, 1)))
        for r in group:
            for channel in chosen:
                mask[r, [channel * cells + cell for cell in found]] = True
    return kept, mask


# ------------------------------------------------------------------------------------- by hand


def one_group(weight, **options):
    weight = np.array(weight, np.float32)
    return Single(HRBP, Blocks.from_dense(weight, groups=1), 0.5, **options)


def test_channels_move_where_the_rows_agree():
    case = one_group([[5, 1, 0, 0], [0.5, -6, 0, 0]])
    # Both rows drop their smaller weight and grow input 3: it has two weights, as no other.
    before, after = case.move(np.array([[1, 9, 2, 10], [0, 0, 2, 10]]))
    assert after.tensor.channel_indices.tolist() == [[1, 3]]  # 0 and 1 tie, and |-6| is larger
    np.testing.assert_array_equal(after.mask, [[0, 1, 0, 1], [0, 1, 0, 1]])
    np.testing.assert_array_equal(after.weight, [[0, 0, 0, 0], [0, -6, 0, 0]])
    assert_moved(before, after, abs(before.weight) >= 5, after.mask)


def test_channels_stay_where_the_rows_do_not_agree():
    case = one_group([[5, 1, 0, 0, 0], [6, 2, 0, 0, 0], [7, 3, 0, 0, 0]])
    gradient = np.array([[0, 0, 9, 0, 0], [0, 8, 0, 0, 0], [0, 7, 0, 0, 0]])
    before, after = case.move(gradient)
    np.testing.assert_array_equal(before.mask, after.mask)
    # What was dropped and grew again, and what only completes the block, start from zero.
    np.testing.assert_array_equal(after.weight[:, :2], [[5, 0], [6, 0], [7, 0]])
    assert case.method.updates == 0
    assert_moved(before, after, before.weight >= 5, before.mask)


def test_patterns_of_depthwise_kernels_move():
    weight = np.zeros((2, 1, 3, 3), np.float32)
    weight[:, 0, 0] = [[3, 4, 1], [3, 1, 4]]
    case = Single(HRBP, Blocks.from_dense(weight, groups=1), 1 / 3, groups=2, padding=1)
    x = torch.zeros(1, 2, 3, 3)
    x[:, :, 2, 2] = 1
    dy = torch.zeros(1, 2, 3, 3)
    dy[:, :, 1, 1] = 1  # meets the last cell alone
    case.layer(x).backward(dy)
    before = case.state()
    assert stepped(case.method)
    after = case.state()
    assert after.tensor.pattern_indices.tolist() == [[0, 1, 8]]  # 1 and 2 tie
    assert_moved(before, after, before.weight >= 3, after.mask)


# ------------------------------------------------------------------------- against plain loops


@pytest.mark.parametrize("kernel", [(), (1, 1), (2, 2), (3, 3)])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(2, 9),
    channels=st.integers(1, 5),
    groups=st.integers(1, 3),
    density=st.floats(0.15, 0.9),
    share=st.floats(0.1, 1.0),
    shared=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_updates_are_those_of_plain_loops(
    kernel, rows, channels, groups, density, share, shared, seed
):
    """Powers of two, so that sums are exact and many tie; gradients that rows share, or do not."""
    rng = np.random.default_rng(seed)
    shape = rows, channels, *kernel
    tensor = Blocks.from_scores(rng.random(shape), density, groups=min(groups, rows))
    case = Single(HRBP, tensor.with_values(powers(rng, tensor.nnz)), share)
    before = case.state()
    gradient = powers(rng, 1 if shared else rows, before.mask.shape[1])
    gradient = np.broadcast_to(gradient, before.mask.shape)
    case.method.gradient = lambda layer: np.abs(gradient).astype(np.float32)
    case.method.observed = lambda layer: None
    stepped(case.method)
    after = case.state()
    count = math.floor(share * (before.mask[0].sum()) + 1e-9)
    if count == 0 or before.mask.all():
        assert_moved(before, after, before.mask, before.mask)
        return
    assert_moved(before, after, *by_loops(before, gradient, count))
    for name in ("row_perm", "row_ptr"):
        np.testing.assert_array_equal(getattr(after.tensor, name), getattr(tensor, name))
    assert after.tensor.nnz == tensor.nnz


def powers(rng, *shape):
    return (rng.choice([-1, 1], shape) * rng.choice([0, 1, 2, 4, 8], shape)).astype(np.float32)


# -------------------------------------------------------------------------------------- structure


def test_blocks_of_given_groups_are_those_of_the_whole_procedure():
    """Where groups hold equally many kernels of the mask, forming it per group changes nothing."""
    rng = np.random.default_rng(0)
    shape = 8, 6, 3, 3
    label = rng.permutation(np.repeat([0, 1], 4))
    mask = np.zeros((8, 6, 9), bool)
    mask[np.ix_(label == 0, [0, 3, 4], [0, 1, 5, 8])] = True
    mask[np.ix_(label == 1, [1, 2, 5], [2, 3, 4, 7])] = True
    mask, scores = mask.reshape(8, -1), rng.random((8, 54))
    perm, ptr, channels, cells = hrbp_structure(mask, scores, shape, 12 / 54, groups=2)
    found = hrbp_blocks(mask, scores, shape, perm, ptr, 3, 4)
    np.testing.assert_array_equal(found[0], channels)
    np.testing.assert_array_equal(found[1], cells)
    for wrong in ([0, 4], [1, 8], [0, 0, 8], [[0, 8]], []):
        with pytest.raises(FormatError, match="row_ptr"):
            hrbp_blocks(mask, scores, shape, perm, wrong, 3, 4)
    for size in ((0, 4), (7, 4), (3, 0), (3, 10)):
        with pytest.raises(FormatError, match="n_c"):
            hrbp_blocks(mask, scores, shape, perm, ptr, *size)
    with pytest.raises(FormatError, match="row_perm"):
        hrbp_blocks(mask, scores, shape, np.zeros(8, int), ptr, 3, 4)


# ------------------------------------------------------------------------------------------- runs


def test_groups_and_budgets_hold_for_a_run():
    model = network()
    before = {name: layer.tensor() for name, layer in sparse(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = HRBP(model, optimizer, alpha=0.5, delta_t=2, t_end=60)
    assert any(train(model, optimizer, method, 30, images))
    moved = 0
    for name, layer in sparse(model).items():
        after, old = layer.tensor(), before[name]
        after.validate()
        np.testing.assert_array_equal(after.row_perm, old.row_perm)
        np.testing.assert_array_equal(after.row_ptr, old.row_ptr)
        assert after.channel_indices.shape == old.channel_indices.shape
        assert after.pattern_indices.shape == old.pattern_indices.shape
        moved += (after.mask() != old.mask()).any()
    assert moved >= 2


def test_it_learns_which_inputs_matter():
    """All rows need the same eight of 64 inputs, so whole blocks move there."""
    losses = {}
    for kind in (Static, HRBP):
        torch.manual_seed(0)
        matters = torch.arange(64) % 8 == 0
        teacher = torch.randn(16, 64) * matters
        layer = SparseLinear(64, 16, bias=False, format="hrbp", density=0.125, groups=2)
        model = nn.Sequential(layer)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        method = kind(model, optimizer, alpha=0.5, delta_t=10, total_steps=600)
        losses[kind] = follow(teacher, model, optimizer, method, 600)
    assert layer.tensor().mask()[:, matters.numpy()].mean() > 0.8
    assert losses[HRBP] < 0.3 * losses[Static]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    words = []
    x = torch.randint(-3, 4, (8, 4, 5, 5), generator=torch.Generator().manual_seed(0)).float()
    for parts in (1, 4):
        generator = torch.Generator().manual_seed(0)
        layer = SparseConv2d(4, 16, 3, format="hrbp", density=0.25, generator=generator)
        model = nn.Sequential(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        method = HRBP(model, optimizer, alpha=0.7, delta_t=1, t_end=100)
        for part in x.chunk(parts):
            layer(part).backward(part[:, :1, :3, :3].expand(-1, 16, -1, -1))
        assert stepped(method)
        words.append(layer.structure)
    assert torch.equal(*words)


def test_resumes_bit_for_bit():
    def make(seed):
        model = network(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, HRBP(model, optimizer, alpha=0.5, delta_t=2, t_end=60)

    assert_resumes(make, images, (9, 8))


def test_other_formats_are_refused():
    model = nn.Sequential(SparseLinear(32, 16, format="csr", density=0.25))
    with pytest.raises(FormatError, match="0 of format 'csr'; expected 'hrbp'"):
        HRBP(model, torch.optim.SGD(model.parameters(), lr=0.1), t_end=1000)
