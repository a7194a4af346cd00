"""SNIP and GraSP by hand, and against whole Hessians; budgets of all weights together."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from test_followers import in_two_processes  # noqa: E402
from torch import nn  # noqa: E402
from torch.autograd.functional import hessian, jacobian  # noqa: E402
from torch.func import functional_call  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.torch import sparsify, unpack_attention  # noqa: E402
from spfmt.train import (  # noqa: E402
    HRBP,
    RigL,
    Saliency,
    SRigL,
    Static,
    grasp,
    random_saliency,
    snip,
)

METHODS = {"snip": snip, "grasp": grasp}


def loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False))


def batches(count: int = 1, size=(5,)):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, *size, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(count)
    ]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 4),
    )


# ------------------------------------------------------------------------------------- by hand


def test_snip_by_hand():
    """Let y = 2·3·x with L = y: ∂L/∂w1 = 3x and ∂L/∂w2 = 2x, so both weights score |6x|."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(-2)
        model[1].weight.fill_(3)
    scores = snip(model, lambda model, x: model(x).sum(), [torch.tensor([[5.0]])])
    assert {name: score.item() for name, score in scores.items()} == {"0": 30.0, "1": 30.0}


def test_grasp_by_hand():
    """L = (w x)²/2: g = w x², H = x², S = -w·Hg = -w² x⁴; the paper removes the largest S."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[3.0, -1.0]])
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # two samples that see one weight each
    scores = grasp(model, lambda model, x: (model(x) ** 2).sum() / 2, [x])
    assert scores["0"].tolist() == [[9 * 16.0, 1.0]]


def test_snip_is_the_gradient_times_the_weight():
    model = network()
    given = batches(2, (3, 8, 8))
    twin = copy.deepcopy(model)
    for batch in given:
        loss(twin, batch).backward()
    scores = snip(model, loss, given)
    assert list(scores) == ["0", "3", "7"]
    for name, score in scores.items():
        weight = twin.get_submodule(name).weight
        torch.testing.assert_close(score, (weight * weight.grad).abs().detach())


def flat_loss(model, given, names):
    shapes = [model.get_parameter(name).shape for name in names]

    def f(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        params = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return sum(loss(lambda x: functional_call(model, params, (x,)), batch) for batch in given)

    return f, torch.cat([model.get_parameter(name).detach().reshape(-1) for name in names])


@pytest.mark.parametrize("count", [1, 3])
def test_grasp_is_that_of_the_whole_hessian(count):
    model, given = mlp().double(), [(x.double(), y) for x, y in batches(count)]
    f, theta = flat_loss(model, given, ["0.weight", "2.weight"])
    g, h = jacobian(f, theta), hessian(f, theta)
    scores = grasp(model, loss, given)
    found = torch.cat([score.reshape(-1) for score in scores.values()]).double()
    torch.testing.assert_close(found, theta * (h @ g), rtol=1e-4, atol=1e-6)


def test_what_grasp_keeps_carries_the_gradient():
    """Shrinking a weight by a share ε changes ‖g‖² by 2ε·S, of the sign that the paper gives S."""
    model, given = mlp().double(), [(x.double(), y) for x, y in batches()]
    f, theta = flat_loss(model, given, ["0.weight", "2.weight"])
    scores = torch.cat([score.reshape(-1) for score in grasp(model, loss, given).values()])
    before, epsilon = jacobian(f, theta).square().sum(), 1e-5
    for i in range(0, theta.numel(), 7):
        shrunk = theta.clone()
        shrunk[i] *= 1 - epsilon
        change = (jacobian(f, shrunk).square().sum() - before) / (2 * epsilon)
        assert change.item() == pytest.approx(-scores[i].item(), rel=1e-2, abs=1e-6)


# ------------------------------------------------------------------------------- what they touch


@pytest.mark.parametrize("method", METHODS)
def test_the_model_stays_as_it_was(method):
    model = network()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = copy.deepcopy(model.state_dict())
    METHODS[method](model, loss, batches(1, (3, 8, 8)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (model[0].weight.grad == 1).all()
    assert model[7].weight.grad is None
    assert model.training


@pytest.mark.parametrize("method", METHODS)
def test_attention_has_scores(method):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 4))
    unpack_attention(model)
    scores = METHODS[method](model, loss, batches(1, (3, 8)))
    assert {"0.linear1", "0.linear2", "2"} < set(scores)
    assert sum("self_attn" in name for name in scores) >= 2
    assert all(score.abs().sum() > 0 for score in scores.values())


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_chosen_and_wrappers_seen_through(method):
    model = nn.DataParallel(network())
    given = batches(1, (3, 8, 8))
    scores = METHODS[method](model, loss, given, exclude="0")
    assert list(scores) == ["3", "7"]
    assert list(METHODS[method](model, loss, given, include=nn.Linear)) == ["7"]
    model.module[3].weight.requires_grad_(False)
    assert list(METHODS[method](model, loss, given)) == ["0", "7"]
    report = sparsify(copy.deepcopy(model.module), "csr", 0.5, scores=scores, include=["0", "7"])
    assert "no scores of 0" in report["0"].reason
    assert [row.name for row in report.taken] == ["7"]
    with pytest.raises(FormatError, match="without a layer"):
        METHODS[method](model, loss, given, include="nothing")
    with pytest.raises(FormatError, match="no batches"):
        METHODS[method](model, loss, [])
    with pytest.raises(FormatError, match="scores of 0, 7 that are not finite"):
        METHODS[method](model, lambda m, b: loss(m, b) * float("nan"), given)


class Conv1D(nn.Module):
    """GPT-2's linear layer: y = x W + b."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = 4
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_turned_weights_are_those_of_the_linear_layer(method):
    turned, linear = nn.Sequential(Conv1D()), nn.Sequential(nn.Linear(5, 4))
    with torch.no_grad():
        linear[0].weight.copy_(turned[0].weight.t())
        linear[0].bias.zero_()
    scores, same = (METHODS[method](model, loss, batches()) for model in (turned, linear))
    torch.testing.assert_close(scores["0"], same["0"])
    sparsify(turned, "csr", scores.densities(0.3), scores=scores)
    sparsify(linear, "csr", same.densities(0.3), scores=same)
    np.testing.assert_array_equal(turned[0].tensor().mask(), linear[0].tensor().mask())


def _scores_of_two_ranks(rank: int) -> None:
    model, given = mlp(), batches(2)
    alone = [dist.new_group([r]) for r in (0, 1)][rank]
    for method in METHODS.values():
        found = method(model, loss, given[rank : rank + 1])
        whole = method(
            model, lambda m, both: sum(loss(m, b) for b in both) / 2, [given], process_group=alone
        )
        for name, score in found.items():
            torch.testing.assert_close(score, whole[name], rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ranks_rank_by_their_mean_gradient():
    in_two_processes(_scores_of_two_ranks)


# -------------------------------------------------------------------------------------- budgets


def test_densities_are_those_of_the_ranking_of_all():
    scores = Saliency({"a": torch.tensor([[5.0, 1], [1, 1]]), "b": torch.tensor([[4.0, 3, 1]])})
    assert scores.densities(3 / 7) == {"a": 1 / 4, "b": 2 / 3}
    assert scores.densities(4 / 7) == {"a": 2 / 4, "b": 2 / 3}  # of four ones the first
    assert scores.densities(6 / 7) == {"b": 2 / 3}  # a keeps all, and stays dense
    with pytest.raises(FormatError, match="no weight in b"):
        scores.densities(1 / 7)
    with pytest.raises(FormatError, match="density"):
        scores.densities(1.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [0.5, 0.2])
def test_the_model_keeps_the_best_of_all_weights(method, density):
    model = network()
    scores = METHODS[method](model, loss, batches(2, (3, 8, 8)))
    every = torch.cat([score.reshape(-1) for score in scores.values()])
    count = round(density * every.numel())
    limit = every.sort(descending=True).values[count - 1].item()
    report = sparsify(model, "csr", scores.densities(density), scores=scores)
    kept = [row.nnz for row in report if row.name in scores]
    assert sum(kept) == count
    for name, score in scores.items():
        layer = model.get_submodule(name)
        if hasattr(layer, "tensor"):
            expected = (score >= limit).reshape(score.shape[0], -1).numpy()
            np.testing.assert_array_equal(layer.tensor().mask().reshape(expected.shape), expected)


def test_methods_start_from_scores():
    given = batches(1, (3, 8, 8))
    for kind, options in ((HRBP, {}), (RigL, {}), (SRigL, {}), (Static, {"format": "hrbp"})):
        model = network()
        scores = snip(model, loss, given)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = kind(
            model, optimizer, density=scores.densities(0.3), scores=scores, total_steps=1000,
            **options,
        )  # fmt: skip
        assert set(method.layers) == set(scores.densities(0.3))
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {**options, "distribution": "uniform"}
        method = kind(model, optimizer, density=0.3, scores=scores, total_steps=1000, **options)
        assert list(method.layers) == ["0", "3", "7"]


# ------------------------------------------------------------------- masks that HRBP begins with


def test_hrbp_counts_the_weights_of_the_mask_that_is_given():
    """A score that stands out pulls its kernel in; of a mask it is one weight like the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    score = torch.zeros(8, 4, 3, 3)
    score[:, 1, :2, :2] = 1  # four weights of every kernel
    score[0, 3, 0, 0] = 99
    scores, density = Saliency({"0": score}), 33 / 288
    masks = scores.masks({"0": density})
    assert masks["0"].sum() == 33
    sparsify(model, "hrbp", {"0": density}, scores=masks, groups=1)
    tensor = model[0].tensor()
    assert tensor.channel_indices.tolist() == [[1]]
    assert tensor.pattern_indices.tolist() == [[0, 1, 3, 4]]


def test_from_a_random_mask_all_channels_are_kept_alike():
    """Section 4.2: HRBP of a random mask is a random partition, and random channels."""
    layer = nn.Sequential(nn.Conv2d(16, 16, 3))
    kept, together = np.zeros(16), np.zeros((16, 16))
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        model = copy.deepcopy(layer)
        densities = {"0": 0.1}
        masks = random_saliency(model, generator).masks(densities)
        sparsify(model, "hrbp", densities, scores=masks)
        tensor = model[0].tensor()
        kept += np.bincount(tensor.channel_indices.reshape(-1), minlength=16)
        group = tensor.unit_of_rows()[1]
        together += group[:, None] == group
    share = kept / kept.sum()
    assert abs(share - 1 / 16).max() < 0.025
    pairs = together[np.triu_indices(16, 1)] / 150
    assert abs(pairs - 7 / 15).max() < 0.2


@pytest.mark.parametrize("cells", range(1, 10))
def test_block_densities_can_be_swept_over_a_whole_model(cells):
    """Figure 8: layers of one cell take 1 whatever is asked of the kernels of 3 x 3."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(16, 8))
    report = sparsify(
        model, "hrbp", 0.1, scores="random", block_density=cells / 9, include="*",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert len(report.taken) == 3
    wanted = 1 if 0.1 / (cells / 9) * 8 < 1 else cells
    assert model[0].tensor().pattern_indices.shape[1] == wanted
