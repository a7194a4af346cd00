"""`SparseLinear`: shapes, construction, moving structures, state_dict, copies, processes."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle

import numpy as np
import pytest
from format_cases import OPTIONS

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch._dynamo.testing import CompileCounter  # noqa: E402

from spfmt.errors import FormatError, KernelNotFound  # noqa: E402
from spfmt.formats import CSR, ShuffledBlock, get_format  # noqa: E402
from spfmt.torch import SparseLinear, follow  # noqa: E402


def make(format: str = "condensed", seed: int = 0, **kwargs) -> SparseLinear:
    generator = torch.Generator().manual_seed(seed)
    params = OPTIONS[format] | {"density": 0.25, "generator": generator} | kwargs
    return SparseLinear(16, 12, format=format, **params)


def dense(layer: SparseLinear) -> torch.Tensor:
    return torch.from_numpy(layer.tensor().to_dense())


@pytest.fixture(params=OPTIONS)
def format(request) -> str:
    return request.param


# ------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (0, 4), (4, 0, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_leading_dimensions(format, lead, bias):
    layer = make(format, bias=bias)
    x = torch.randn(*lead, 16, requires_grad=True)
    y = layer(x)
    expected = nn.functional.linear(x, dense(layer), layer.bias)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.values.grad.shape == layer.values.shape


def test_non_contiguous_inputs():
    layer = make()
    x = torch.randn(3, 16, 5).transpose(1, 2)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense(layer), layer.bias))
    x = torch.randn(4, 7, 32)[..., ::2]
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense(layer), layer.bias))


@pytest.mark.parametrize(("rows", "cols"), [(0, 4), (4, 0), (0, 0), (1, 1)])
def test_empty_and_tiny_layers(rows, cols):
    tensor = CSR.from_dense(np.ones((rows, cols), np.float32))
    layer = SparseLinear.from_tensor(tensor, torch.zeros(rows))
    assert layer(torch.ones(2, 3, cols)).shape == (2, 3, rows)
    assert torch.equal(layer(torch.ones(2, cols)), torch.full((2, rows), float(cols)))


def test_wrong_inputs():
    layer = make()
    with pytest.raises(FormatError, match=r"\(2, 15\).*\(\.\.\., 16\)"):
        layer(torch.zeros(2, 15))
    with pytest.raises(FormatError, match="float64"):
        layer(torch.zeros(2, 16, dtype=torch.float64))
    with pytest.raises(FormatError, match="one device"):
        layer(torch.zeros(2, 16, device="meta"))
    with pytest.raises(AttributeError, match="missing"):
        _ = layer.missing


def test_linear_gradients_match_dense(format):
    layer, x = make(format).double(), torch.randn(6, 16, dtype=torch.float64)
    reference = layer.to_linear()
    layer(x).square().sum().backward()
    gradient = layer.values.grad.clone()
    layer.bias.grad = None
    reference(x).square().sum().backward()
    tensor = layer.tensor()
    expected = tensor.dense_gather(reference.weight.grad.numpy()).reshape(-1)
    torch.testing.assert_close(gradient[: tensor.nnz], torch.from_numpy(expected))


# ------------------------------------------------------------------------------ construction


def test_density_or_sparsity_never_both():
    assert make(density=None, sparsity=0.75).density == make().density == 0.25
    for wrong in ({"sparsity": 0.5}, {"density": None}):
        with pytest.raises(FormatError, match="exactly one"):
            make(**wrong)
    with pytest.raises(FormatError, match="share in"):
        make(density=1.5)


def test_initial_values_are_scaled_by_each_rows_fan_in():
    mask = np.zeros((3, 100), bool)
    mask[0, :4], mask[1, :100] = True, True
    layer = SparseLinear.from_tensor(
        CSR.from_dense(mask.astype(np.float32)), torch.zeros(3), capacity=120
    )
    layer.reset_parameters(torch.Generator().manual_seed(0))
    values, bias = layer.values.detach(), layer.bias.detach()
    assert 0.1 < values[:4].abs().max() <= 0.5
    assert 0.05 < values[4:104].abs().max() <= 0.1
    assert torch.count_nonzero(values[104:]) == 0
    assert bias.abs().max() <= 0.5
    assert bias.abs()[2] <= 0.1


def test_same_generator_same_layer(format):
    a, b, c = make(format, 1), make(format, 1), make(format, 2)
    assert a.tensor() == b.tensor()
    assert torch.equal(a.bias, b.bias)
    assert a.tensor() != c.tensor()


def test_from_tensor_and_back(format):
    tensor = make(format).tensor()
    bias = nn.Parameter(torch.ones(12))
    layer = SparseLinear.from_tensor(tensor, bias, capacity=tensor.nnz + 7)
    assert layer.tensor() == tensor
    assert layer.bias is bias
    assert layer.capacity == tensor.nnz + 7
    assert layer.nnz == tensor.nnz
    assert layer.structure.dtype == torch.int32
    with pytest.raises(FormatError, match="capacity"):
        SparseLinear.from_tensor(tensor, capacity=1)
    with pytest.raises(FormatError, match="bias"):
        SparseLinear.from_tensor(tensor, torch.ones(3))


def test_from_linear_keeps_the_largest(format):
    linear = nn.Linear(16, 12)
    linear.weight.requires_grad_(False)
    layer = SparseLinear.from_linear(linear.eval(), format=format, density=0.25, **OPTIONS[format])
    weight = linear.weight.detach()
    mask = torch.from_numpy(layer.tensor().mask())
    assert torch.equal(dense(layer), weight * mask)
    assert layer.bias is linear.bias
    assert not layer.values.requires_grad
    assert not layer.training
    expected = get_format(format).project(weight.abs().numpy(), 0.25, **OPTIONS[format])
    assert torch.equal(mask, torch.from_numpy(expected))


class Scaled(nn.Linear):
    """Multiplies with another weight than the one it holds."""


def test_layers_that_compute_something_else_are_refused():
    for other in (Scaled(8, 8), nn.Embedding(8, 8), nn.Conv1d(8, 8, 1)):
        with pytest.raises(FormatError, match="Linear itself"):
            SparseLinear.from_linear(other, density=0.5)


def test_scores_of_another_shape_are_refused():
    with pytest.raises(FormatError, match=r"scores of shape \(4, 4\)"):
        SparseLinear.from_linear(nn.Linear(16, 12), density=0.5, scores=torch.rand(4, 4))


def test_repr_names_what_matters():
    text = repr(make("shuffled_block", capacity=60))
    for part in ("in_features=16", "format=shuffled_block", "block_shape=(4, 2)", "capacity=60",
                 "density=0.25"):  # fmt: skip
        assert part in text
    assert "structure not loaded" in repr(make().to("meta"))
    assert "structure not loaded" in repr(make().to("meta").to_empty(device="cpu"))


# ---------------------------------------------------------------------------- set_structure


def test_set_structure_moves_values_and_keeps_objects(format):
    layer = make(format, capacity=64)
    new = make(format, 5).tensor()
    before = dense(layer)
    held = (layer.values, layer.structure, layer.values.data_ptr(), layer.structure.data_ptr())
    old_values = layer.values.detach().clone()
    source = layer.set_structure(new)
    assert layer.values is held[0]
    assert layer.structure is held[1]
    assert (layer.values.data_ptr(), layer.structure.data_ptr()) == held[2:]
    torch.testing.assert_close(dense(layer), before * torch.from_numpy(new.mask()))
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense(layer), layer.bias))
    assert source.shape == layer.values.shape
    assert (source[new.nnz :] == -1).all()
    assert torch.equal(follow(old_values, source), layer.values)


def test_set_structure_can_forget_and_take_values():
    layer = make("csr")
    forgotten = np.array([0, 5])
    source = layer.set_structure(layer.tensor(), forget=forgotten)
    assert source[[0, 5]].tolist() == [-1, -1]
    assert layer.values[[0, 5]].tolist() == [0.0, 0.0]
    new = make("csr", 3).tensor()
    layer.set_structure(new, take_values=True)
    assert layer.tensor() == new


def test_set_structure_refuses_what_does_not_fit():
    layer = make("csr")
    before = copy.deepcopy(layer.state_dict())
    for wrong, message in [
        (make("nm").tensor(), "format nm"),
        (make("csr", density=0.5).tensor(), "at most the capacity"),
        (CSR.from_dense(np.eye(3, dtype=np.float32)), r"shape \(3, 3\)"),
    ]:
        with pytest.raises(FormatError, match=message):
            layer.set_structure(wrong)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True)
    )


def test_compiled_module_survives_a_new_structure():
    layer = make("condensed")
    graphs = CompileCounter()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    x = torch.randn(4, 16)
    for seed in range(3):
        layer.set_structure(make("condensed", seed).tensor(), take_values=True)
        torch.testing.assert_close(compiled(x), nn.functional.linear(x, dense(layer), layer.bias))
    assert graphs.frame_count == 1


# -------------------------------------------------------------------------------- state_dict


def test_state_dict_round_trip_into_another_structure(format):
    source, target = make(format, 1), make(format, 2)
    x = torch.randn(3, 16)
    target(x)  # compiles the structure that is about to go
    held = target.values, target.structure
    target.load_state_dict(source.state_dict())
    assert target.values is held[0]
    assert target.structure is held[1]
    assert target.tensor() == source.tensor()
    assert torch.equal(target(x), source(x))


def test_load_with_assign_and_from_meta():
    source = make("nm", 1)
    with torch.device("meta"):
        inside = make("nm", 3)
    for target in (make("nm", 2).to("meta"), make("nm", 2, device="meta"), inside):
        assert target.values.is_meta
        assert target.structure.is_meta
        assert target(torch.zeros(3, 16, device="meta")).shape == (3, 12)
        target.load_state_dict(source.state_dict(), assign=True)
        assert target.tensor() == source.tensor()


def test_save_and_load_through_a_file(format):
    source, buffer = make(format, 1), io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target = make(format, 2)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert target.tensor() == source.tensor()


def test_wrong_checkpoints_change_nothing():
    target = make("csr", 2)
    before = target.tensor()
    states = {
        "capacity": make("csr", density=0.5).state_dict(),
        "format": make("nm", 1).state_dict(),
        "structure": make("csr", 1).state_dict(),
        "without a structure": make("csr", 1).state_dict(),
    }
    states["structure"]["structure"] = states["structure"]["structure"].clone().fill_(3)
    del states["without a structure"]["structure"]
    for message, state in states.items():
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict(state, strict=False)
        assert target.tensor() == before
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({})
    target.load_state_dict({}, strict=False)


def test_a_checkpoint_of_another_format_is_named_before_its_sizes():
    other = make("nm", density=0.5).state_dict()
    with pytest.raises(RuntimeError, match="got a nm structure of shape"):
        make("csr").load_state_dict(other)


def test_a_structure_without_values_is_refused_unless_it_is_the_present_one():
    target = make("csr", 2)
    before = target.tensor()
    state = make("csr", 1).state_dict()
    del state["values"]
    with pytest.raises(RuntimeError, match="structure without values"):
        target.load_state_dict(state, strict=False)
    assert target.tensor() == before
    own = target.state_dict()
    del own["values"]
    assert target.load_state_dict(own, strict=False).missing_keys == ["values"]


# ----------------------------------------------------------------------- copies and conversion


def test_copies_are_independent():
    layer, x = make(), torch.randn(2, 16)
    layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.tensor() == layer.tensor()
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            twin.values.zero_()
        assert not torch.equal(twin(x), layer(x))


def test_module_conversions_leave_the_structure_alone():
    layer, x = make(), torch.randn(2, 16)
    before = layer.structure.clone()
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(layer).to(dtype)
        assert half.values.dtype == dtype
        assert half.structure.dtype == torch.int32
        assert torch.equal(half.structure, before)
        with pytest.raises(KernelNotFound, match="autocast"):
            half(x.to(dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert half(x.to(dtype)).dtype == torch.bfloat16
        torch.testing.assert_close(half.float()(x), layer(x), rtol=0.02, atol=0.02)
    double = copy.deepcopy(layer).double()
    torch.testing.assert_close(double(x.double()).float(), layer(x))


def test_to_linear_and_back():
    layer, x = make(), torch.randn(2, 16)
    linear = layer.to_linear()
    torch.testing.assert_close(linear(x), layer(x))
    assert linear.bias is layer.bias


def test_functional_call_with_other_values():
    layer, x = make(bias=False), torch.randn(2, 16)
    doubled = {"values": layer.values.detach() * 2}
    for _ in range(2):
        torch.testing.assert_close(torch.func.functional_call(layer, doubled, (x,)), 2 * layer(x))


# --------------------------------------------------------------------------------- processes


def _child(layer, x, results):
    torch.set_num_threads(1)
    loss = layer(x).square().sum()
    loss.backward()
    results.put((loss.item(), layer.values.grad.sum().item()))


def test_forked_child_computes():
    layer, x = make(), torch.randn(64, 16)
    loss = layer(x).square().sum()  # the parent has used its threads and its caches
    loss.backward()
    expected = loss.item(), layer.values.grad.sum().item()
    layer.values.grad = None
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_child, args=(layer, x, results), daemon=True)
    child.start()
    got = results.get(timeout=30)
    child.join(timeout=30)
    assert child.exitcode == 0
    assert got == pytest.approx(expected, rel=1e-5)


class _Featurised(torch.utils.data.Dataset):
    """A dataset whose items pass through a sparse layer inside the worker."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 6

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(torch.full((16,), float(index)))


def test_dataloader_workers():
    data = _Featurised(make())
    expected = torch.stack([data[i] for i in range(6)])
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=1)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def test_a_layer_of_a_tensor_has_no_room_for_more_unless_a_density_is_asked_for():
    scores = np.random.default_rng(0).random((10, 14), np.float32)
    tensor = ShuffledBlock.from_scores(scores, 0.3, block_shape=(4, 4))
    assert SparseLinear.from_tensor(tensor).capacity == tensor.nnz
    assert SparseLinear.from_tensor(tensor, target_density=0.3).capacity == 42 + 15
