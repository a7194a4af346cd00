"""Convolutions of whole models: what `sparsify` takes, what it leaves and why, training, models."""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from test_models import data  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

from spfmt import models  # noqa: E402
from spfmt.errors import FormatError  # noqa: E402
from spfmt.torch import (  # noqa: E402
    FrozenLinear,
    SparseConv1d,
    SparseConv2d,
    SparseModule,
    decay_groups,
    densify,
    freeze,
    sparsify,
    sparsify_like,
)
from spfmt.train import SET  # noqa: E402

FORMATS: dict[str, dict[str, Any]] = {
    "condensed": {},
    "nm": {"m": 8},
    "shuffled_block": {"block_shape": (4, 4)},
    "hrbp": {"groups": 2},
    "csr": {},
}

FIRST = "the first convolution stays dense unless `include` or `density` names it"
DEPTHWISE = "depthwise: stays dense unless `include` or `density` names it"


class Residual(nn.Module):
    """A block as in ResNet, with a projection for its shortcut."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Conv2d(channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def network(channels: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 8, 3, padding=1),
            block=Residual(8, channels, 2),
            depthwise=nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            grouped=nn.Conv2d(channels, 2 * channels, 3, groups=2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(2 * channels, 10),
        )
    )


TAKEN = ["block.conv1", "block.conv2", "block.shortcut", "grouped", "head"]


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def images(batch: int = 2, size: int = 9) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


# ------------------------------------------------------------------------- what is taken, and left


def test_sparsify_then_densify(format: str) -> None:
    model, x = network(), images()
    dense = copy.deepcopy(model)
    bias = model.block.shortcut.bias
    report = sparsify(model, format, density=0.25, **FORMATS[format])
    assert [row.name for row in report.taken] == TAKEN
    assert (report["stem"].reason, report["depthwise"].reason) == (FIRST, DEPTHWISE)
    assert report.density == pytest.approx(0.25, abs=0.05)
    assert report["block.conv1"].shape == (16, 8, 3, 3)
    assert "16x8x3x3" in str(report)
    assert model.block.shortcut.bias is bias
    y = model(x)
    back = densify(model)
    assert [row.name for row in back.taken] == TAKEN
    torch.testing.assert_close(model(x), y)
    for name in TAKEN:
        layer, before = model.get_submodule(name), dense.get_submodule(name)
        assert repr(layer) == repr(before)
        assert int(layer.weight.count_nonzero()) == report[name].nnz
        assert torch.equal(layer.weight, before.weight * (layer.weight != 0))


def test_what_is_named_is_taken() -> None:
    for arguments in (
        {"density": 0.5, "include": ["stem", "depthwise"]},
        {"density": 0.5, "include": lambda name, module: name in ("stem", "depthwise")},
        {"density": {"stem": 0.5, "depthwise": 0.5}},
    ):
        report = sparsify(network(), "csr", **arguments)
        assert [row.name for row in report.taken] == ["stem", "depthwise"]
    report = sparsify(network(), "csr", density=0.5, include=nn.Conv2d, exclude="depthwise")
    assert [row.name for row in report.taken] == ["stem", *TAKEN[:-1]]
    assert report["depthwise"].reason == "excluded"
    assert report["head"].reason == "not included"
    report = sparsify(network(), "csr", density=0.5, exclude="block.*")
    assert report["stem"].reason == FIRST
    assert [row.name for row in report.taken] == ["grouped", "head"]


def test_the_first_convolution_is_the_first_of_the_model() -> None:
    model = network()
    sparsify(model, "csr", density=0.5, include="stem")
    report = sparsify(model, "csr", density=0.5)
    assert report["stem"].reason == "already sparse (csr)"
    assert [row.name for row in report.taken] == TAKEN


class Subclass(nn.Conv2d):
    pass


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_convolutions_of_other_kinds_are_reported() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), Subclass(4, 4, 1), nn.ConvTranspose2d(4, 4, 1),
        nn.ConvTranspose1d(4, 4, 1), nn.Conv3d(4, 4, 1), nn.LazyConv2d(4, 1),
    )  # fmt: skip
    report = sparsify(model, "csr", density=0.5, include="*", exclude="0")
    assert not report.taken
    reasons = {row.kind: row.reason for row in report}
    assert "subclass of nn.Conv2d" in reasons["Subclass"]
    for kind in ("ConvTranspose2d", "ConvTranspose1d", "Conv3d"):
        assert reasons[kind] == f"{kind} has no sparse layer"
    assert "call the model once" in reasons["LazyConv2d"]
    model[0]._conv_forward = model[1]._conv_forward
    assert "_conv_forward" in sparsify(model, "csr", density=0.5, include="0")["0"].reason
    bare = sparsify(nn.Conv2d(4, 4, 1), "csr", density=0.5, include="*")
    assert "the model itself: use from_dense" in bare.left[0].reason


def test_computed_weights_are_reported() -> None:
    model = network()
    prune.l1_unstructured(model.block.conv1, "weight", 0.5)
    parametrizations.weight_norm(model.block.conv2)
    torch.nn.utils.spectral_norm(model.grouped)
    report = sparsify(model, "csr", density=0.5)
    assert "prune.remove" in report["block.conv1"].reason
    assert all("computed" in report[name].reason for name in ("block.conv2", "grouped"))
    assert [row.name for row in report.taken] == ["block.shortcut", "head"]
    prune.remove(model.block.conv1, "weight")
    again = sparsify(model, "csr", "keep", include="block.conv1")
    assert again["block.conv1"].density == 0.5


def test_tied_and_meta_weights_are_left() -> None:
    model = network()
    model.block.conv2.weight = model.depthwise.weight
    report = sparsify(model, "csr", density=0.5)
    assert report["block.conv2"].reason == "its weight is tied to depthwise.weight"
    with torch.device("meta"):
        report = sparsify(network(), "csr", density=0.5)
    assert report["grouped"].reason == "its weight is on meta: load it first"


def test_shared_convolutions_stay_shared() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    model.append(model[1])
    report = sparsify(model, "csr", density=0.5)
    assert [row.name for row in report.taken] == ["1"]
    assert report["3"] is report["1"]
    assert model[3] is model[1]
    y = model(images())
    densify(model)
    assert model[3] is model[1]
    assert type(model[1]) is nn.Conv2d
    torch.testing.assert_close(model(images()), y)


def test_hooks_mode_dtype_and_requires_grad_come_along() -> None:
    model, calls = network().eval(), []
    conv = model.block.conv2
    handles = [
        conv.register_forward_hook(lambda *_: calls.append("forward")),
        conv.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    conv.weight.requires_grad_(False)
    model.double()
    sparsify(model, "csr", density=0.5)
    assert model.block.conv2.values.dtype == torch.float64
    assert not model.block.conv2.values.requires_grad
    assert not model.block.conv2.training
    for change in (lambda model: None, densify):
        change(model)
        calls.clear()
        model(images().double()).sum().backward()
        assert calls == ["forward", "backward"]
    assert not model.block.conv2.weight.requires_grad
    for handle in handles:
        handle.remove()
    model(images().double())
    assert calls == ["forward", "backward"]


def test_channels_last_models() -> None:
    model = network().to(memory_format=torch.channels_last).eval()
    x = images().contiguous(memory_format=torch.channels_last)
    other = copy.deepcopy(network()).eval()
    for net in (model, other):
        sparsify(net, "shuffled_block", density=0.25, **FORMATS["shuffled_block"])
    for name in TAKEN:
        assert model.get_submodule(name).tensor() == other.get_submodule(name).tensor()
    torch.testing.assert_close(model(x), other(images()))


def test_sequences() -> None:
    model = nn.Sequential(
        nn.Conv1d(4, 16, 5, padding="same"), nn.ReLU(), nn.Conv1d(16, 16, 3, stride=2),
        nn.Conv1d(16, 16, 3, groups=16),
    )  # fmt: skip
    report = sparsify(model, "condensed", density=0.25)
    assert [row.name for row in report.taken] == ["2"]
    assert (report["0"].reason, report["3"].reason) == (FIRST, DEPTHWISE)
    assert report["2"].shape == (16, 16, 3)
    assert type(model[2]) is SparseConv1d
    x = torch.randn(2, 4, 30)
    y = model(x)
    densify(model)
    assert type(model[2]) is nn.Conv1d
    torch.testing.assert_close(model(x), y)


# ----------------------------------------------------------------------------- densities, scores


@pytest.mark.parametrize("format", ["csr", "condensed", "nm"])
def test_keep_keeps_exactly_the_zeros_that_are_there(format: str) -> None:
    model, x = network().eval(), images()
    first = sparsify(model, format, density=0.25, exclude="head", **FORMATS[format])
    densify(model)
    expected = model(x)
    report = sparsify(model, format, "keep", **FORMATS[format])
    assert [(r.name, r.nnz) for r in report.taken] == [(r.name, r.nnz) for r in first.taken]
    assert "no zeros" in report["head"].reason
    assert report["stem"].reason == FIRST
    torch.testing.assert_close(model(x), expected)


def test_a_pruned_model_is_kept_as_it_is() -> None:
    model, x = network().eval(), images()
    for name in ("block.conv1", "grouped"):
        prune.l1_unstructured(model.get_submodule(name), "weight", 0.8)
        prune.remove(model.get_submodule(name), "weight")
    expected = model(x)
    report = sparsify(model, "csr", "keep")
    assert [row.name for row in report.taken] == ["block.conv1", "grouped"]
    assert report["grouped"].density == pytest.approx(0.2, abs=0.01)
    torch.testing.assert_close(model(x), expected)


def test_densities_by_name() -> None:
    report = sparsify(network(), "csr", {"block.conv1": 0.5, "head": 0.25})
    assert [(r.name, r.density) for r in report.taken] == [("block.conv1", 0.5), ("head", 0.25)]
    assert report["stem"].reason == report["grouped"].reason == "not named in density"
    with pytest.raises(FormatError, match="nowhere"):
        sparsify(network(), "csr", {"nowhere": 0.5})


def test_erk_spreads_over_kernels() -> None:
    report = sparsify(network(32), "csr", density=0.2, distribution="erk")
    stored = sum(row.nnz if row.taken else row.size for row in report if row.name in TAKEN)
    assert stored / sum(report[name].size for name in TAKEN) == pytest.approx(0.2, abs=0.002)

    def share(rows: int, cols: int, *kernel: int) -> float:  # RigL, section 3: up to a factor
        return (rows + cols + sum(kernel)) / (rows * cols * math.prod(kernel))

    full = [row for row in report if row.name in TAKEN and not row.taken]
    assert all("stays dense" in row.reason for row in full)
    factors = [row.density / share(*row.shape) for row in report.taken]
    assert max(factors) == pytest.approx(min(factors), rel=0.02)


def test_a_ratio_says_the_density() -> None:
    report = sparsify(network(), "nm", n=1, m=4)
    assert {row.density for row in report.taken} == {0.25}
    report = sparsify(network(), "condensed", fan_in=5)
    assert all(row.nnz == 5 * row.shape[0] for row in report.taken)


def test_scores_of_convolutions() -> None:
    shapes = {}

    def scores(name: str, layer: Any) -> Tensor:
        shapes[name] = layer.weight.shape
        return -layer.weight.abs()

    model, dense = network(), network()
    sparsify(model, "csr", density=0.5, scores=scores)
    assert shapes["grouped"] == (32, 8, 3, 3)
    kept = model.grouped.tensor().values
    assert abs(kept).max() <= dense.grouped.weight.abs().median()
    tensors = []
    for _ in range(2):
        model = network()
        sparsify(model, "csr", density=0.1, scores="random", reset=True,
                 generator=torch.Generator().manual_seed(3))  # fmt: skip
        tensors.append(model.grouped.tensor())
    assert tensors[0] == tensors[1]


# ------------------------------------------------------------- checkpoints, optimizers, freezing


@pytest.mark.parametrize("meta", [False, True])
def test_a_checkpoint_loads_into_a_fresh_model(format: str, meta: bool) -> None:
    model = network().eval()
    model.append(nn.Unflatten(1, (1, 10))).append(nn.Conv1d(1, 4, 3, padding=1))
    sparsify(model, format, density=0.25, **FORMATS[format])
    sparsify(model, "csr", density=0.5, include=nn.Conv1d)
    with torch.device("meta" if meta else "cpu"):
        fresh = network().eval()
        fresh.append(nn.Unflatten(1, (1, 10))).append(nn.Conv1d(1, 4, 3, padding=1))
    state = model.state_dict()
    report = sparsify_like(fresh, state)
    assert [row.name for row in report.taken] == [*TAKEN, "8"]
    assert report["stem"].reason == "not sparse in the state"
    fresh.load_state_dict(state, assign=meta)
    assert torch.equal(fresh(images()), model(images()))
    assert fresh.grouped.stride == model.grouped.stride
    again = sparsify_like(fresh, state)  # over layers that are sparse already
    assert [row.name for row in again.taken] == [*TAKEN, "8"]
    fresh.load_state_dict(state)
    assert torch.equal(fresh(images()), model(images()))


def test_a_checkpoint_of_other_kernels_is_refused() -> None:
    model = network()
    sparsify(model, "csr", density=0.5)
    other = network()
    other.grouped = nn.Conv2d(16, 32, 1, groups=2)
    with pytest.raises(FormatError, match=r"\(32, 8, 3, 3\) for grouped.*\(32, 8, 1, 1\)"):
        sparsify_like(other, model.state_dict())
    assert not any(isinstance(module, SparseModule) for module in other.modules())


def test_decay_groups_know_the_values_of_convolutions() -> None:
    model = network()
    before = decay_groups(model, 0.1)
    sparsify(model, density=0.25)
    after = decay_groups(model, 0.1)
    assert [len(g["params"]) for g in before] == [len(g["params"]) for g in after]
    decayed = set(map(id, after[0]["params"]))
    assert all(id(m.values) in decayed for m in model.modules() if isinstance(m, SparseModule))


def test_freeze_leaves_convolutions() -> None:
    model, x = network().eval(), images()
    sparsify(model, density=0.25)
    convolutions = [m for m in model.modules() if isinstance(m, SparseConv2d)]
    expected = model(x)
    freeze(model)
    assert isinstance(model.head, FrozenLinear)
    assert [m for m in model.modules() if isinstance(m, SparseConv2d)] == convolutions
    torch.testing.assert_close(model(x), expected)
    densify(model)
    assert not any(isinstance(m, SparseModule | FrozenLinear) for m in model.modules())
    torch.testing.assert_close(model(x), expected)


# -------------------------------------------------------------------------------------- training


def follow(dense: nn.Module, sparse: nn.Module, momenta: dict[str, Tensor]) -> None:
    """Zero in a dense model, and in its momenta, what is zero in the sparse one."""
    with torch.no_grad():
        for name, layer in sparse.named_modules():
            if isinstance(layer, SparseModule):
                zero = layer.to_dense().weight == 0
                dense.get_submodule(name).weight[zero] = 0
                momenta[name][zero] = 0


def masked_step(dense: nn.Module, sparse: nn.Module, momenta: dict[str, Tensor]) -> None:
    """SGD with momentum of the dense model, whose gradients are masked."""
    with torch.no_grad():
        for name, p in dense.named_parameters():
            layer, gradient = name.rpartition(".")[0], p.grad
            module = sparse.get_submodule(layer)
            if isinstance(module, SparseModule) and name.endswith("weight"):
                mask = torch.from_numpy(module.tensor().mask()).view(module.dense_shape)
                gradient, name = gradient * mask, layer
            momentum = momenta.setdefault(name, torch.zeros_like(p)).mul_(0.9).add_(gradient)
            p -= 0.05 * momentum


def test_many_steps_with_a_moving_topology_equal_masked_dense_ones(format: str) -> None:
    sparse = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    ).double()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    sparsify(sparse, format, density=0.25, scores="random", reset=True, generator=generator,
             **FORMATS[format])  # fmt: skip
    dense = copy.deepcopy(sparse)
    densify(dense)
    masks = [m.tensor().mask() for m in sparse.modules() if isinstance(m, SparseConv2d)]
    budget = [mask.sum() for mask in masks]
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.05, momentum=0.9)
    method = SET(sparse, optimizer, alpha=0.3, delta_t=3, t_end=10**6)
    momenta: dict[str, Tensor] = {}
    for step in range(30):
        x = images(8, 7).double() + step
        for model in (sparse, dense):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), torch.arange(8) % 4).backward()
        optimizer.step()
        masked_step(dense, sparse, momenta)
        if method.step():
            follow(dense, sparse, momenta)
    assert method.updates == 10
    torch.testing.assert_close(sparse(x), dense(x))
    layers = [m for m in sparse.modules() if isinstance(m, SparseConv2d)]
    assert [m.nnz for m in layers] == budget
    assert all((m.tensor().mask() != mask).any() for m, mask in zip(layers, masks, strict=True))
    densify(sparse)
    for a, b in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------- models


def in_float64(model: nn.Module) -> nn.Module:
    """The same map in float64, dense."""
    twin = copy.deepcopy(model)
    densify(twin)
    return twin.double()


def first_order_bound(exact: nn.Module, x: Tensor) -> Tensor:
    """How many eps rounding can move the outputs (N = 1) of a model of convolutions.

    A sum of n products is off by less than (n + 2) eps times the sum of their sizes, whatever its
    order; the derivative of an output by that sum says how far it takes the output along. Twice of
    it has room for the few roundings between products, and for the second order.
    """
    sums: list[Tensor] = []
    errors: list[Tensor] = []

    def record(size: Any, inputs: tuple[Tensor], y: Tensor) -> None:
        terms = math.prod(size.weight.shape[1:]) + 2
        errors.append(terms * size(inputs[0].detach().abs()))
        sums.append(y)

    hooks = []
    for layer in [m for m in exact.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        size = copy.deepcopy(layer).requires_grad_(False)
        for parameter in size.parameters():
            parameter.abs_()
        hooks.append(layer.register_forward_hook(lambda _, *call, size=size: record(size, *call)))
    outputs = exact(x)[0]
    for hook in hooks:
        hook.remove()
    bounds = []
    for output in outputs:
        slopes = torch.autograd.grad(output, sums, retain_graph=True)
        moved = [(g.abs() * e).sum() for g, e in zip(slopes, errors, strict=True)]
        bounds.append(2 * torch.stack(moved).sum())
    return torch.stack(bounds)


def agrees(model: nn.Module, x: Tensor) -> None:
    """A model of sparse layers is its masked dense self; in float64 nothing wrong is so small."""
    exact = in_float64(model)
    bound = first_order_bound(exact, x.double())
    for dtype, sides in ((torch.float32, 1), (torch.float64, 2)):
        with torch.no_grad():
            y = copy.deepcopy(model).to(dtype)(x.to(dtype))
            error = (y.double() - exact(x.double()))[0].abs()
        assert (error <= sides * torch.finfo(dtype).eps * bound).all()


def settled(model: nn.Module, *images: Tensor) -> nn.Module:
    """Let batch norms see images, as after training."""
    for x in images:
        model(x)
    return model.eval()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_resnet_equals_its_masked_dense_self(format: str, order: torch.memory_format) -> None:
    torch.manual_seed(0)
    model = settled(models.resnet20(), images(8, 32)).to(memory_format=order)
    report = sparsify(model, format, density=0.2, **FORMATS[format])
    assert len(report.taken) == 19
    assert [row.name for row in report.left] == ["conv1"]
    settled(model.train(), images(8, 32))
    agrees(model, images(1, 32).contiguous(memory_format=order))


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(models.mobilenet_v2, width=0.25),
        functools.partial(models.resnet18, width=0.25),
        models.wide_resnet22_2,
    ],
    ids=["mobilenet_v2", "resnet18", "wide_resnet22_2"],
)
def test_other_networks(build: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    report = sparsify(model, "shuffled_block", density=0.25, block_shape=(8, 4))
    kept = {row.reason for row in report.left}
    depthwise = any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules())
    assert kept == ({FIRST, DEPTHWISE} if depthwise else {FIRST})
    twin = in_float64(model)
    x = images(2, 32)
    model.double()
    torch.testing.assert_close(model(x.double()), twin(x.double()))


def test_a_trained_resnet_answers_as_its_masked_dense_self() -> None:
    weights, test = data("cifar10_resnet20_weights.npz"), data("cifar10/test.npz")
    x = torch.from_numpy(test["images"][:16]).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    x = (x - mean) / std
    for format, options in FORMATS.items():
        model = models.resnet20().to(memory_format=torch.channels_last).eval()
        model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        sparsify(model, format, density=0.75, **options)
        agrees(model, x[:1])
        with torch.no_grad():
            answers, exact = model(x), in_float64(model)(x.double())
        best = exact.sort(1).values
        sure = best[:, -1] - best[:, -2] > 1e-3
        assert torch.equal(answers.argmax(1)[sure], exact.argmax(1)[sure])
