"""What models see of a sparse layer's weight, and layers in traced graphs and freed memory."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref

import pytest

torch = pytest.importorskip("torch")

from torch import fx, nn  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.torch import SparseLinear, sparsify, spmm  # noqa: E402
from spfmt.torch.values import compiled_structure  # noqa: E402


def make(**options) -> SparseLinear:
    return SparseLinear(16, 12, density=0.25, **options)


def test_what_can_be_read():
    layer = make(dtype=torch.float64)
    layer.values.requires_grad_(False)
    weight = layer.weight
    assert (weight.dtype, weight.device, weight.shape) == (
        torch.float64, torch.device("cpu"), torch.Size([12, 16]),
    )  # fmt: skip
    assert (weight.ndim, weight.dim(), weight.size(), weight.size(-1)) == (2, 2, (12, 16), 16)
    assert weight.numel() == 192
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert not weight.is_meta
    assert make(device="meta").weight.is_meta
    assert "shape=(12, 16)" in repr(weight)


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.data,
        lambda w: w.grad,
        lambda w: w.detach(),
        lambda w: w[0],
        lambda w: w + 1,
        lambda w: 2 * w,
        lambda w: torch.ones(2, 16) @ w,
        lambda w: torch.ones(12, 16) - w,
        lambda w: list(w),
        lambda w: bool(w),
        lambda w: torch.abs(w),
        lambda w: nn.functional.linear(torch.zeros(1, 16), w),
        lambda w: nn.init.xavier_uniform_(w),
        lambda w: nn.init.zeros_(w),
        lambda w: setattr(w, "data", torch.zeros(12, 16)),
        lambda w: setattr(w, "requires_grad", False),
        lambda w: w.__setitem__(0, 1.0),
    ],
)
def test_content_raises_and_says_what_to_use(read):
    with pytest.raises((AttributeError, TypeError), match=r"no dense `weight`.*to_dense"):
        read(make().weight)


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(12, 16)), torch.zeros(2), None])
def test_assigning_a_weight_raises(value):
    layer = make()
    with pytest.raises(AttributeError, match="no dense `weight`"):
        layer.weight = value
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    with pytest.raises(KeyError, match="already exists"):
        layer.register_parameter("weight", nn.Parameter(torch.zeros(1)))


class Casting(nn.Module):
    """The shape of a T5 feed-forward block."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, h):
        h = torch.relu(self.wi(h))
        if h.dtype != self.wo.weight.dtype and self.wo.weight.shape[0] == 16:
            h = h.to(self.wo.weight.dtype)
        return self.wo(h)


def test_a_model_that_casts_to_its_weights_dtype():
    model, x = nn.Sequential(Casting()), torch.randn(2, 16)
    sparsify(model, density=0.25)
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


# ------------------------------------------------------------------------------------- torch.fx


class Activated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = make()

    def forward(self, x):
        return self.layer(x, activation="relu").sum(-1)


def test_fx_sees_one_node_per_layer():
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(2, 3, 16)
    nodes = len(fx.symbolic_trace(model).graph.nodes)
    sparsify(model, density=0.25)
    traced = fx.symbolic_trace(model)
    assert len(traced.graph.nodes) == nodes
    assert torch.equal(traced(x), model(x))
    traced = fx.symbolic_trace(Activated())
    call = next(node for node in traced.graph.nodes if node.op == "call_module")
    assert (call.target, call.kwargs) == ("layer", {"activation": "relu"})
    assert (traced.layer(x, activation="relu") >= 0).all()
    torch.testing.assert_close(traced(x), traced.layer(x).relu().sum(-1))


def test_fx_of_a_bare_layer_is_refused():
    with pytest.raises(FormatError, match=r"nn\.Sequential\(layer\)"):
        fx.symbolic_trace(make())


# --------------------------------------------------------------------------------------- memory


def test_memory_of_a_deleted_layer_is_released():
    layer, x = make(), torch.randn(4, 16)
    layer(x).sum().backward()
    twin = copy.deepcopy(layer)
    twin(x)
    dead = [weakref.ref(layer), weakref.ref(layer.values), weakref.ref(layer.structure)]
    structure = weakref.ref(layer._decoded())
    del layer
    gc.collect()
    assert [ref() for ref in dead] == [None] * 3
    assert structure() is twin._decoded()  # which copies share
    del twin
    gc.collect()
    assert structure() is None


def test_words_that_outlive_their_layer_are_still_multiplied_with():
    layer, x = make(), torch.randn(4, 16)
    y, bias = layer(x), layer.bias
    words, values, compiled = layer.structure, layer.values, compiled_structure(layer.structure)
    del layer
    gc.collect()
    assert torch.equal(spmm(values, words, x, bias=bias, shape=(12, 16)), y)
    assert compiled_structure(words) is compiled


def test_layers_come_and_go_in_several_threads():
    def work() -> None:
        try:
            for _ in range(300):
                make()(x)
        except Exception as error:
            errors.append(error)

    x, errors = torch.randn(2, 16), []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_a_model_that_a_finalizer_saves_is_whole():
    class Trainer:
        def __init__(self) -> None:
            self.model, self.me = make(), self

        def __del__(self) -> None:
            saved.update(self.model.state_dict())

    saved: dict = {}
    Trainer()
    gc.collect()
    assert set(saved) == {"values", "structure", "bias"}
