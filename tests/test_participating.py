"""`Participating` layers against dense layers with a mask, and what others do to their weights."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from spfmt.errors import FormatError, KernelNotFound  # noqa: E402
from spfmt.formats import CSR, NM, ShuffledBlock, encode  # noqa: E402
from spfmt.torch import Participating, SparseConv2d, SparseLinear, densify  # noqa: E402
from spfmt.torch.gather import gathered, scattered, write_at  # noqa: E402

LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), (3, 5, 24)),
    "without a bias": (lambda: nn.Linear(24, 16, bias=False), (24,)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1, stride=2), (2, 8, 7, 6)),
    "groups": (lambda: nn.Conv2d(8, 12, (3, 1), dilation=2, groups=2), (2, 8, 7, 6)),
    "reflected": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "one image": (lambda: nn.Conv2d(4, 8, 3, padding="same", bias=False), (4, 5, 5)),
    "sequence": (lambda: nn.Conv1d(8, 4, 3, padding=1, groups=2), (2, 8, 9)),
}
FORMATS = {
    "csr": {"density": 0.3},
    "nm": {"n": 2, "m": 4},
    "condensed": {"density": 0.3},
    "shuffled_block": {"density": 0.4, "block_shape": (4, 2), "aligned": True},
}


@pytest.fixture(params=FORMATS)
def format(request) -> str:
    return request.param


def mask_of(layer: Participating) -> torch.Tensor:
    mask = torch.zeros(layer.weight.numel(), dtype=torch.bool)
    mask[torch.from_numpy(layer.positions())] = True
    return mask.reshape(layer.weight.shape)


def small_layer(**options) -> Participating:
    torch.manual_seed(0)
    return Participating(nn.Linear(24, 16), **{"density": 0.3, **options})


# ------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("scale", "activation"), [(1.0, None), (0.25, "relu"), (0.0, "gelu")])
def test_results_and_gradients_are_those_of_the_masked_dense_layer(kind, format, scale, activation):
    torch.manual_seed(1)
    make, shape = LAYERS[kind]
    dense = make().double()
    reference = copy.deepcopy(dense)
    layer = Participating(dense, format=format, gradient_scale=scale, **FORMATS[format])
    mask = mask_of(layer)
    assert 0 < mask.sum() == layer.nnz < mask.numel()
    with torch.no_grad():
        reference.weight.mul_(mask)
    x = torch.randn(shape, dtype=torch.float64)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(mine, activation=activation)
    expected = reference(its)
    expected = expected if activation is None else getattr(functional, activation)(expected)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    torch.testing.assert_close(mine.grad, its.grad)
    torch.testing.assert_close(
        layer.weight.grad, torch.where(mask, reference.weight.grad, scale * reference.weight.grad)
    )
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, reference.bias.grad)


def test_gradients_add_up_over_calls_and_flow_past_a_frozen_weight():
    layer, x = small_layer(), torch.randn(4, 24, requires_grad=True)
    layer(x).sum().backward()
    once, dx = layer.weight.grad.clone(), x.grad.clone()
    (layer(x).sum() + layer(x).sum()).backward()
    torch.testing.assert_close(layer.weight.grad, 3 * once)
    layer.weight.grad = x.grad = None
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, dx)


@pytest.mark.parametrize(("features", "batch"), [((0, 8), 3), ((8, 0), 3), ((8, 4), 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_what_is_empty_trains(features, batch):
    layer = Participating(nn.Linear(*features), density=0.5, gradient_scale=0.5)
    y = layer(torch.randn(batch, features[0]))
    y.sum().backward()
    assert y.shape == (batch, features[1])
    assert torch.equal(layer.weight.grad, torch.zeros(features[::-1]))
    assert not layer.choose()


def test_what_follows_may_write_in_place():
    layer, x = small_layer(), torch.randn(2, 3, 24)
    layer(x).relu().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    nn.ReLU(inplace=True)(layer(x)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


def test_an_input_that_was_overwritten_is_noticed():
    layer, x = small_layer(), torch.randn(4, 24)
    y = layer(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivatives_are_refused():
    layer, x = small_layer(), torch.randn(4, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_autocast_keeps_the_weight_and_its_gradient_in_float32():
    layer, x = small_layer(), torch.randn(4, 24)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, atol=0.02, rtol=0.02)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_bfloat16_is_chosen_and_moved_and_has_no_kernel():
    layer = Participating(nn.Linear(24, 16).bfloat16(), density=0.3)
    assert layer.values().dtype == torch.bfloat16
    assert torch.equal(layer.values(), layer.weight.flatten()[torch.from_numpy(layer.positions())])
    with pytest.raises(KernelNotFound):
        layer(torch.zeros(1, 24, dtype=torch.bfloat16))


# --------------------------------------------------------------------------------- never stale


def overwritten_by_data(layer: Participating, new: torch.Tensor) -> None:
    layer.weight.data.copy_(new)


def overwritten_by_numpy(layer: Participating, new: torch.Tensor) -> None:
    layer.weight.detach().numpy()[...] = new.numpy()


def overwritten_by_an_optimizer(layer: Participating, new: torch.Tensor) -> None:
    layer.weight.grad = layer.weight.detach() - new
    torch.optim.SGD([layer.weight], lr=1.0, fused=True).step()


def overwritten_by_a_state(layer: Participating, new: torch.Tensor) -> None:
    layer.load_state_dict({**layer.state_dict(), "weight": new})


def overwritten_by_another_parameter(layer: Participating, new: torch.Tensor) -> None:
    layer.weight = nn.Parameter(new.clone())


@pytest.mark.parametrize("write", [value for name, value in sorted(globals().items())
                                   if name.startswith("overwritten_by_")])  # fmt: skip
@pytest.mark.parametrize("recorded", [False, True])
def test_products_see_weights_that_somebody_wrote(write, recorded):
    layer, x = small_layer(), torch.randn(1, 24)
    with torch.set_grad_enabled(recorded):
        layer(x)
        mask, new = mask_of(layer), torch.randn(16, 24)
        write(layer, new)
        expected = functional.linear(x, new * mask, layer.bias)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_an_average_by_hand_of_all_entries_of_the_state_is_right():
    """Structure words are copied into the average's buffer behind the layer's back."""
    layer, x = small_layer(), torch.randn(3, 24)
    average = copy.deepcopy(layer)
    average(x)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, 24))
    assert layer.choose()
    for name, held in average.state_dict().items():
        new = layer.state_dict()[name]
        held.copy_(0.5 * held + 0.5 * new if held.is_floating_point() else new)
    np.testing.assert_array_equal(average.positions(), layer.positions())
    expected = functional.linear(x, average.weight * mask_of(average), average.bias)
    torch.testing.assert_close(average(x), expected, atol=1e-5, rtol=1e-5)


def test_torch_s_own_average_follows():
    model = nn.Sequential(small_layer())
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(16, 24))
        model[0].choose()
        average.update_parameters(model)
    np.testing.assert_array_equal(average.module[0].positions(), model[0].positions())
    x = torch.randn(3, 24)
    mine = average.module[0]
    expected = functional.linear(x, mine.weight * mask_of(mine), mine.bias)
    torch.testing.assert_close(average(x), expected, atol=1e-5, rtol=1e-5)


def test_an_average_of_buffers_chooses_again():
    model, x = nn.Sequential(small_layer()), torch.randn(3, 24)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=True)
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(16, 24))
        model[0].choose()
        average.update_parameters(model)
    mine = average.module[0]
    with pytest.raises(FormatError, match="structure words"):
        average(x)
    assert mine.choose()
    expected = functional.linear(x, mine.weight * mask_of(mine), mine.bias)
    torch.testing.assert_close(average(x), expected, atol=1e-5, rtol=1e-5)


def test_a_structure_that_changes_between_the_passes_is_noticed():
    layer = small_layer(gradient_scale=0.5)
    y = layer(torch.randn(4, 24))
    with torch.no_grad():
        layer.weight.data.copy_(torch.randn(16, 24))
    assert layer.choose()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ------------------------------------------------------------------------------ state and copies


def test_the_parameters_are_those_of_the_dense_layer():
    dense = nn.Linear(24, 16)
    layer = Participating(dense, density=0.3)
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert list(layer.state_dict()) == ["weight", "bias", "structure"]
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert list(layer.modules()) == [layer]
    assert layer.dense().weight is dense.weight
    torch.testing.assert_close(layer.dense()(torch.ones(24)), dense(torch.ones(24)))


@pytest.mark.parametrize("how", ["copied", "pickled", "loaded"])
def test_copies_are_equal_and_stand_alone(how, format):
    layer = Participating(nn.Linear(24, 16), format=format, **FORMATS[format])
    other = Participating(nn.Linear(24, 16), format=format, **FORMATS[format])
    if how == "copied":
        other = copy.deepcopy(layer)
    elif how == "pickled":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 24)
    expected = layer(x)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        other.weight.copy_(torch.randn(16, 24))
    other.choose()
    assert torch.equal(layer(x), expected)
    assert not torch.equal(other(x), expected)


def test_dense_weights_alone_choose_where_that_is_allowed():
    layer, dense = small_layer(), nn.Linear(24, 16)
    with pytest.raises(RuntimeError, match="structure"):
        layer.load_state_dict(dense.state_dict())
    layer.load_state_dict(dense.state_dict(), strict=False)
    expected = CSR.from_scores(dense.weight.detach().abs().numpy(), 0.3)
    np.testing.assert_array_equal(layer.positions(), expected.flat_indices())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"density": 0.5}, "structure words"),
        ({"format": "nm", "n": 1, "m": 2, "density": None}, "structure words"),
    ],
)
def test_a_state_of_another_structure_is_refused_whole(other, message):
    layer = small_layer()
    state, before = small_layer(**other).state_dict(), layer.weight.detach().clone()
    state["weight"] += 1
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight, before)


def test_a_structure_of_few_words_and_too_many_positions_is_refused_whole():
    blocks = {"format": "shuffled_block", "block_shape": (8, 8), "aligned": True}
    layer = Participating(nn.Linear(20, 20), density=0.3, **blocks)
    scores = np.random.default_rng(0).random((20, 20))
    larger = ShuffledBlock.from_scores(scores, 0.6, block_shape=(8, 8), aligned=True)
    state, before = layer.state_dict(), layer.positions()
    state["structure"] = torch.from_numpy(encode(larger, layer.structure.numel()))
    expected = f"{larger.nnz} positions; expected at most the capacity of {layer.capacity}"
    with pytest.raises(FormatError, match=expected):
        layer.set_structure(larger)
    with pytest.raises(RuntimeError, match=expected):
        layer.load_state_dict(state)
    np.testing.assert_array_equal(layer.positions(), before)


def test_a_state_with_corrupt_words_is_refused():
    layer = small_layer()
    state = layer.state_dict()
    state["structure"] = state["structure"].clone()
    state["structure"][8] += 1
    with pytest.raises(RuntimeError, match="checksum"):
        layer.load_state_dict(state)


@pytest.mark.parametrize(("kind", "cls"), [("linear", SparseLinear), ("conv", SparseConv2d)])
def test_the_sparse_layer_has_the_same_map(kind, cls):
    make, shape = LAYERS[kind]
    layer = Participating(make(), format="nm", n=2, m=4).eval()
    sparse, x = layer.to_sparse(), torch.randn(shape)
    assert type(sparse) is cls
    assert not sparse.training
    assert sparse.bias is layer.bias
    assert sparse.format_params["m"] == 4
    torch.testing.assert_close(sparse(x), layer(x))
    assert sparse.tensor() == layer.tensor()


def test_densify_leaves_it_and_says_why():
    model = nn.Sequential(small_layer(), nn.ReLU())
    (row,) = densify(model).layers
    assert not row.taken
    assert "dense()" in row.reason
    assert type(model[0]) is Participating


def test_printed():
    text = str(small_layer(format="nm", n=2, m=4, density=None))
    assert text == (
        "Participating(in_features=24, out_features=16, bias=True, format=nm, n=2, m=4, "
        "participating=0.5)"
    )


def test_traced_as_one_node():
    graph = torch.fx.symbolic_trace(nn.Sequential(small_layer(), nn.ReLU()))
    assert [node.op for node in graph.graph.nodes].count("call_module") == 2


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Participating(nn.LSTM(4, 4), density=0.1), "got a LSTM"),
        (lambda: Participating(type("Mine", (nn.Linear,), {})(4, 4), density=0.1), "got a Mine"),
        (lambda: Participating(nn.Linear(4, 4)), "exactly one of them"),
        (lambda: Participating(nn.Linear(4, 4), density=2.0), "density of 2.0"),
        (lambda: Participating(nn.Linear(4, 4), density=0.5, gradient_scale=-1), "gradient_scale"),
        (lambda: Participating(nn.Linear(4, 4), density=0.5, format="none"), "none"),
        (lambda: small_layer().set_structure(NM.from_scores(np.ones((16, 24)), n=1, m=4)),
         "format nm"),
        (lambda: small_layer().set_structure(CSR.from_scores(np.ones((16, 24)), 0.9)),
         "positions"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(FormatError, match=message):
        make()


def test_weights_that_are_nan_cannot_be_ranked():
    layer = small_layer()
    with torch.no_grad():
        layer.weight[2, 3] = float("nan")
    with pytest.raises(FormatError, match=r"NaN in scores at \(2, 3\)"):
        layer.choose()


# ----------------------------------------------------------------------------- gather and scatter


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "strided",
    [lambda: torch.randn(24, 16).t(), lambda: torch.randn(16, 48)[:, ::2]],
    ids=["transposed", "in steps"],
)
def test_gather_and_scatter(format, dtype, strided):
    layer = Participating(nn.Linear(24, 16), format=format, **FORMATS[format])
    places = torch.from_numpy(layer.positions())
    weight = strided().to(dtype)  # of strides that are not row-major
    values = gathered(weight, layer.structure, layer.capacity)
    assert torch.equal(values[: layer.nnz], weight.reshape(-1)[places])
    assert not values[layer.nnz :].any()
    dense = torch.zeros(24 * 16, dtype=dtype)
    dense[places] = values[: layer.nnz]
    assert torch.equal(scattered(values, layer.structure, 24 * 16), dense)
    version = weight._version
    write_at(weight, layer.structure, -values)
    assert torch.equal(weight.reshape(-1)[places], -values[: layer.nnz])
    assert weight._version > version


def test_gather_and_scatter_are_each_other_s_gradient():
    layer = small_layer()
    layer.structure.requires_grad_(False)
    weight = torch.randn(16, 24, dtype=torch.float64, requires_grad=True)
    values = torch.randn(layer.capacity, dtype=torch.float64, requires_grad=True)
    capacity, words = layer.capacity, layer.structure
    assert torch.autograd.gradcheck(lambda w: gathered(w, words, capacity), weight)
    assert torch.autograd.gradcheck(lambda v: scattered(v, words, 16 * 24), values)
    for op, operands in (
        (torch.ops.spfmt.gather.default, (weight, words, capacity)),
        (torch.ops.spfmt.scatter.default, (values, words, 16 * 24)),
    ):
        torch.library.opcheck(op, operands)


@pytest.mark.parametrize("size", [(16, 25), (8, 24)])
def test_a_structure_of_another_weight_is_refused(size):
    layer = small_layer()
    with pytest.raises(FormatError, match="positions in 16 x 24"):
        gathered(torch.zeros(size), layer.structure, layer.capacity)
    with pytest.raises(FormatError, match="positions in 16 x 24"):
        gathered(torch.zeros(16, 24), layer.structure, layer.nnz - 1)


def test_export_asks_for_sparse_layers(tmp_path):
    onnx = pytest.importorskip("spfmt.onnx")
    pytest.importorskip("onnxscript")
    model = nn.Sequential(Participating(nn.Linear(16, 8), density=0.25))
    with pytest.raises(FormatError, match=r"0; expected sparse layers; fix: call finish\(\)"):
        onnx.export(model, (torch.zeros(2, 16),), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
