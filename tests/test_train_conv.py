"""Training methods on convolutions: SET on every format, followers, resuming, observations."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402
from train_cases import stepped  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.torch import SparseConv1d, SparseConv2d, sparsify  # noqa: E402
from spfmt.train import SET  # noqa: E402

FORMATS = {
    "condensed": {},
    "nm": {"m": 8},
    "shuffled_block": {"block_shape": (4, 4)},
    "hrbp": {},
    "csr": {},
}


def network(format: str = "condensed", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 8, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    sparsify(model, format, density=0.25, scores="random", reset=True,
             generator=torch.Generator().manual_seed(seed), **FORMATS[format])  # fmt: skip
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, method: SET, steps: int) -> list:
    changed = []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(method.steps)
        x = torch.randn(6, 3, 7, 7, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, 0, 0].abs().argmax(1)).backward()
        optimizer.step()
        changed.append(method.step())
    return changed


def sparse(model: nn.Module) -> dict[str, SparseConv2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseConv2d)}


@pytest.mark.parametrize("format", FORMATS)
def test_set_moves_weights_and_what_belongs_to_them(format: str) -> None:
    model = network(format)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = SET(model, optimizer, delta_t=3, t_end=100)
    assert set(sparse(model)) == {"2", "5"}
    train(model, optimizer, method, 2)
    layer = model[2]
    before, old = layer.tensor(), layer.positions()
    state = {k: v.clone() for k, v in optimizer.state[layer.values].items() if v.dim()}
    with torch.no_grad():
        moved = layer.values.clone()
    assert method.update()
    after, new = layer.tensor(), layer.positions()
    assert after.shape == before.shape == (24, 16, 3, 3)
    assert after.nnz <= layer.capacity
    kept = after.mask() & before.mask()
    assert kept.any()
    assert not np.array_equal(after.mask(), before.mask())
    place = {int(p): i for i, p in enumerate(old)}
    for i, position in enumerate(new):
        source = place.get(int(position))
        for name, had in (*state.items(), ("values", moved)):
            now = layer.values if name == "values" else optimizer.state[layer.values][name]
            if source is None:
                assert now[i] == 0
            else:  # the same, or dropped and drawn again
                assert now[i] in (had[source], 0)
    assert method.summary().layers[0].shape == (24, 16, 3, 3)


@pytest.mark.parametrize("format", ["csr", "shuffled_block"])
def test_a_run_resumes_bit_for_bit(format: str) -> None:
    def make() -> tuple:
        model = network(format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, SET(model, optimizer, delta_t=2, t_end=100)

    whole = make()
    assert any(train(*whole, 4))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)
    train(*whole, 5)
    file.seek(0)
    resumed = make()
    train(*resumed, 1)  # somewhere else before it is loaded
    for part, state in zip(resumed, torch.load(file), strict=True):
        part.load_state_dict(state)
    train(*resumed, 5)
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[name]), name


def test_averages_and_copies_follow() -> None:
    model = network()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    best = copy.deepcopy(model)
    saved = best[2].tensor()
    average.update_parameters(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = SET(model, optimizer, delta_t=1, t_end=100)
    for _ in range(3):
        assert stepped(method)
        average.update_parameters(model)
    twin, layer = average.module[2], model[2]
    assert torch.equal(twin.structure, layer.structure)
    now = torch.from_numpy(layer.tensor().to_dense())
    kept = now != 0
    torch.testing.assert_close(torch.from_numpy(twin.tensor().to_dense())[kept], now[kept])
    assert best[2].tensor() == saved
    average(torch.randn(1, 3, 7, 7))


def test_compiled_and_channels_last_models_see_new_content_only() -> None:
    model = network("csr").to(memory_format=torch.channels_last)
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    torch.testing.assert_close(compiled(x), model(x))
    assert stepped(SET(model, torch.optim.SGD(model.parameters(), lr=0.0), delta_t=1, t_end=9))
    torch.testing.assert_close(compiled(x), model(x))


# ---------------------------------------------------------------------------------- observations


class RigL(SET):
    """Grows where the dense gradient is largest."""

    def observes(self, name, layer):
        return "batches"

    def grow_scores(self, layer, tensor):
        self.last = self.observed(layer).weight_grad()
        return (self.last.abs() / self.last.abs().max()).numpy().reshape(-1)


class Norms(SET):
    def observes(self, name, layer):
        return "norms"

    def grow_scores(self, layer, tensor):
        found = self.observed(layer)
        self.last = found.input_norms, found.output_grad_norms
        return super().grow_scores(layer, tensor)


CONVOLUTIONS = {
    "plain": (SparseConv2d, (8, 12, 3), {"padding": 1}),
    "strided": (SparseConv2d, (8, 12, (3, 2)), {"stride": (2, 1), "dilation": (1, 2)}),
    "same": (SparseConv2d, (8, 12, (3, 2)), {"padding": "same", "dilation": (2, 4)}),
    "circular": (SparseConv2d, (8, 12, 3), {"padding": (1, 2), "padding_mode": "circular"}),
    "groups": (SparseConv2d, (8, 12, 3), {"groups": 4}),
    "depthwise": (SparseConv2d, (8, 8, 3), {"groups": 8, "padding": 1}),
    "sequence": (SparseConv1d, (8, 12, 3), {"padding": 1, "stride": 2}),
    "reflected": (SparseConv1d, (8, 12, 3), {"padding": 1, "padding_mode": "reflect"}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_observations_are_those_of_the_dense_layer(name: str) -> None:
    cls, sizes, options = CONVOLUTIONS[name]
    torch.manual_seed(0)
    layer = cls(*sizes, **options, format="csr", density=0.3, dtype=torch.float64)
    dense = layer.to_dense()
    x = [torch.randn(n, 8, *(9, 10)[: len(dense.kernel_size)], dtype=torch.float64) for n in (1, 3)]
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms, rigl = (kind(model, optimizer, delta_t=1, t_end=100) for kind in (Norms, RigL))
    for part in (*x, x[0][0]):  # accumulated, the last without a batch
        for module in (layer, dense):
            module(part).sin().sum().backward()
    found = rigl.observed(layer)
    torch.testing.assert_close(found.weight_grad(), dense.weight.grad.reshape(sizes[1], -1))
    for kind in (found, norms.observed(layer)):
        torch.testing.assert_close(kind.input_norms, input_norms(dense, [*x, x[0][:1]]).float())
        assert kind.output_grad_norms.shape == (sizes[1],)
    if layer.groups == 1:
        torch.testing.assert_close(found.output_grads.T @ found.inputs, found.weight_grad())
        for norms, of in (
            (found.input_norms, found.inputs),
            (found.output_grad_norms, found.output_grads),
        ):
            torch.testing.assert_close(norms, of.norm(dim=0).float())
    else:
        with pytest.raises(FormatError, match="use power_sums or dense_gradient"):
            _ = found.inputs
    assert stepped(rigl)


def input_norms(dense: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    """Norms of everything that each cell of each input channel meets, by the layer itself."""
    cells = int(np.prod(dense.kernel_size))
    probe = copy.deepcopy(dense).double()
    probe.out_channels = probe.groups = probe.in_channels
    probe.bias = None
    total = []
    for channel_cell in range(cells):
        weight = torch.zeros(probe.in_channels, cells, dtype=torch.float64)
        weight[:, channel_cell] = 1
        probe.weight = nn.Parameter(weight.view(probe.in_channels, 1, *dense.kernel_size))
        met = [probe(x).square().transpose(0, 1).flatten(1).sum(1) for x in batches]
        total.append(torch.stack(met).sum(0).sqrt())
    return torch.stack(total, 1).flatten().detach()


def test_norms_take_the_memory_of_one_image() -> None:
    layer = SparseConv2d(4, 8, 3, format="csr", density=0.5)
    sizes = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out,) if isinstance(t, torch.Tensor))
            return out

    x = torch.randn(64, 4, 8, 8)
    with Spy():
        layer.power_sums(x, torch.zeros(64, 8, 6, 6))
    assert max(sizes) <= x.numel() * 2
