"""Large output layers: updates against plain loops, memory for the weights alone, real labels."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fresh_python import run_python  # noqa: E402
from torch import nn  # noqa: E402
from train_cases import Single, assert_moved, assert_resumes, stepped  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.formats import Condensed  # noqa: E402
from spfmt.torch import SparseConv2d, SparseLinear  # noqa: E402
from spfmt.train import SampledGrowth  # noqa: E402


def condensed(rows: int, cols: int, fan_in: int, seed: int, ablated: int = 0) -> Condensed:
    rng = np.random.default_rng(seed)
    active = np.sort(rng.permutation(rows)[: rows - ablated])
    columns = np.sort([rng.permutation(cols)[:fan_in] for _ in active], axis=1)
    values = rng.integers(-3, 4, columns.shape).astype(np.float32)  # small integers: many ties
    return Condensed((rows, cols), active, columns, values)


@pytest.mark.parametrize(("share", "ablated", "seed"), [(0.3, 0, 0), (0.5, 2, 1), (1.0, 1, 2)])
def test_where_all_are_drawn_the_largest_gradients_of_each_row_grow(share, ablated, seed):
    """Plain loops over rows; with so many samples every free position is drawn."""
    case = Single(SampledGrowth, condensed(7, 11, 4, seed, ablated), share, samples=100)
    gradient = np.random.default_rng(seed).integers(-4, 5, (7, 11)).astype(np.float64)
    before, after = case.move(gradient)
    kept, mask = before.mask.copy(), before.mask.copy()
    for row in range(7):
        columns = np.flatnonzero(before.mask[row])
        count = int(share * len(columns) + 1e-9)
        smallest = sorted(columns, key=lambda c: (abs(before.weight[row, c]), c))[:count]
        kept[row, smallest] = False
        free = np.flatnonzero(~kept[row]) if len(columns) else []
        grown = sorted(free, key=lambda c: (-abs(gradient[row, c]), c))[:count]
        mask[row] = kept[row]
        mask[row, grown] = True
    assert_moved(before, after, kept, mask)


@pytest.mark.parametrize("samples", [0, 2])
def test_what_is_drawn_is_free_and_each_column_is_equally_likely(samples):
    counts = np.zeros(12)
    for seed in range(150):
        tensor = condensed(6, 12, 3, 0)
        case = Single(SampledGrowth, tensor, 0.34, samples=samples, seed=seed)
        before, after = case.move(np.zeros((6, 12)))
        assert (after.mask.sum(1) == 3).all()
        assert (before.mask & after.mask).sum(1).min() >= 2
        counts += (after.mask & ~before.mask)[0]
    free = counts[np.flatnonzero(~before.mask[0])]
    if samples == 0:  # of 10 that are free, each about once in 10
        assert free.min() > 3
        assert free.max() < 35
    assert counts[np.flatnonzero(before.mask[0])].sum() == 0


def test_sampled_gradients_are_those_of_the_dense_layer():
    """Over two calls, as under gradient accumulation, and at some rows only."""
    torch.manual_seed(0)
    layer = SparseLinear.from_tensor(condensed(9, 8, 3, 0, ablated=2))
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SampledGrowth(model, optimizer, samples=1, alpha=1.0, delta_t=1, t_end=100)
    expected = np.zeros((9, 8))
    for _ in range(2):
        x = torch.randn(2, 5, 8)
        y = layer(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected += (dy.reshape(-1, 9).T @ x.reshape(-1, 8)).double().numpy()
    rows, columns = np.array([1, 4, 8]), np.array([[0, 3], [1, 7], [2, 4]])
    found = method.observed(layer).grad_at(rows, columns).numpy()
    np.testing.assert_allclose(found, expected[rows[:, None], columns], rtol=1e-5, atol=1e-5)


def test_it_grows_what_lowers_the_loss():
    """Every row of the teacher has two columns; four samples find more of them than chance does."""

    def found(samples: int) -> float:
        torch.manual_seed(0)
        teacher = torch.zeros(200, 64)
        where = torch.rand(200, 64).topk(2, 1).indices
        teacher.scatter_(1, where, 1.0)
        layer = SparseLinear(64, 200, bias=False, format="condensed", fan_in=6)
        model = nn.Sequential(layer)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        method = SampledGrowth(model, optimizer, samples=samples, delta_t=10, t_end=300, alpha=0.7)
        for _ in range(300):
            x = torch.randn(64, 64)
            optimizer.zero_grad()
            (model(x) - x @ teacher.T).square().mean().backward()
            optimizer.step()
            method.step()
        mask = torch.from_numpy(layer.tensor().mask())
        return float(mask.gather(1, where).float().mean())

    random, sampled = found(0), found(4)
    assert random > 0.25  # six of 64 at the start are 0.09
    assert sampled > random + 0.2


def test_resumes_bit_for_bit():
    def make(seed: int):
        torch.manual_seed(seed)
        model = nn.Sequential(SparseLinear(32, 48, format="condensed", fan_in=8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, SampledGrowth(model, optimizer, samples=2, delta_t=3, t_end=100)

    assert_resumes(make, lambda generator: torch.randn(16, 32, generator=generator), (7, 9))


def test_what_it_cannot_train():
    def refused(layer: nn.Module, **options: Any) -> str:
        model = nn.Sequential(layer)
        with pytest.raises(FormatError) as error:
            SampledGrowth(model, torch.optim.SGD(model.parameters(), 0.1), t_end=900, **options)
        return str(error.value)

    assert "'condensed'" in refused(SparseLinear(8, 8, format="csr", density=0.5))
    assert "a linear layer" in refused(SparseConv2d(8, 8, 3, format="condensed", density=0.5))
    fits = SparseLinear(8, 8, format="condensed", density=0.5)
    assert "samples" in refused(fits, samples=-1)
    assert "samples" in refused(fits, samples=0.5)


def test_full_and_empty_layers_stay():
    for fan_in in (8, 0):
        tensor = condensed(4, 8, fan_in, 0)
        case = Single(SampledGrowth, tensor, 0.5)
        assert not stepped(case.method)


def test_a_layer_is_drawn_without_a_dense_weight_as_one_that_is_not():
    """One column in two, and each of them equally often."""
    layer = SparseLinear(64, 1000, format="condensed", fan_in=32)
    counts = layer.tensor().mask().sum(0)
    assert counts.sum() == 32_000
    assert 400 < counts.min() < counts.max() < 600


# --------------------------------------------------------------------------------------- memory

_PEAK = """
import resource, torch
from spfmt.torch import SparseLinear
from spfmt.train import SampledGrowth

def train(inputs, outputs):
    layer = SparseLinear(inputs, outputs, format="condensed", fan_in=32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    model = torch.nn.Sequential(layer)
    method = SampledGrowth(model, optimizer, delta_t=2, t_end=100)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, inputs)).square().mean().backward()
        optimizer.step()
        method.step()
    assert method.updates == 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = train(64, 100)
print(train(INPUTS, 200_000) - before)
"""


def peak(inputs: int) -> int:
    """Bytes that training a layer of 200 000 rows and fan-in 32 adds to a process, at its peak."""
    done = run_python(_PEAK.replace("INPUTS", str(inputs)))
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kB on Linux")
def test_memory_is_that_of_the_weights():
    """Of 256 and of 1024 columns: equally many weights, dense matrices of 205 and 819 MB."""
    nnz = 200_000 * 32
    narrow, wide = peak(256), peak(1024)
    assert narrow < 4 * nnz * 28  # values, gradient, momentum, words, layouts; int64 while it moves
    masks = 4 * 200_000 * (1024 - 256) // 8  # of a bit per position
    assert wide < narrow + masks + (32 << 20)


# ------------------------------------------------------------------------------------ real labels


def data(name: str) -> dict[str, np.ndarray]:
    folder = os.environ.get("SPFMT_DATA")
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f"needs {name} in the directory that SPFMT_DATA names")
    with np.load(Path(folder) / name, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def fit(model, method, optimizer, batches, loss) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        method.step()
    assert method.updates > 1


def test_tags_of_delicious_are_learned():
    """983 tags of 16 105 pages: the first guess is right twice as often as the commonest tag."""
    arrays = data("delicious_multilabel.npz")

    def dense(which: str, columns: int) -> torch.Tensor:
        indptr, indices = arrays[f"{which}_indptr"], arrays[f"{which}_indices"]
        found = torch.zeros(len(indptr) - 1, columns)
        found[torch.repeat_interleave(torch.from_numpy(np.diff(indptr))), indices.tolist()] = 1
        return found

    x, y = dense("x", 500), dense("y", 983)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    train, test = order[:-2000], order[-2000:]
    head = SparseLinear(256, 983, format="condensed", fan_in=32)
    model = nn.Sequential(nn.Linear(500, 256), nn.ReLU(), head)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    method = SampledGrowth(model, optimizer, samples=4, delta_t=100, total_steps=880)
    batches = [(x[part], y[part]) for _ in range(8) for part in train.split(128)]
    fit(model, method, optimizer, batches, nn.functional.binary_cross_entropy_with_logits)
    common = y[train].sum(0).argmax()
    right = float(y[test].gather(1, model(x[test]).argmax(1, keepdim=True)).mean())
    assert right > 0.55
    assert right > 1.3 * float(y[test, common].mean())


def test_entities_of_fb15k_237_are_learned():
    """(head, relation) to one of 14 541 tails: among the first ten, from 200 steps."""
    arrays = data("fb15k_237.npz")
    train = torch.from_numpy(arrays["train"]).long()
    valid = torch.from_numpy(arrays["valid"]).long()[:5000]
    torch.manual_seed(0)

    class Tails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.Embedding(14_541, 256)
            self.relations = nn.Embedding(237, 256)
            self.tails = SparseLinear(256, 14_541, format="condensed", fan_in=32)

        def forward(self, pairs: torch.Tensor) -> torch.Tensor:
            return self.tails(torch.relu(self.heads(pairs[:, 0]) + self.relations(pairs[:, 1])))

    model = Tails()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    method = SampledGrowth(model, optimizer, samples=2, delta_t=40, total_steps=200)
    parts = train[torch.randperm(len(train))].split(256)[:200]
    batches = [(part[:, :2], part[:, 2]) for part in parts]
    fit(model, method, optimizer, batches, nn.functional.cross_entropy)
    best = model(valid[:, :2]).topk(10).indices
    hits = float((best == valid[:, 2:]).any(1).float().mean())
    common = train[:, 2].bincount(minlength=14_541).topk(10).indices
    assert hits > 1.5 * float(torch.isin(valid[:, 2], common).float().mean())
