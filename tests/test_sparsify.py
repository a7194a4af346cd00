"""`sparsify` and `densify`: what is taken, what is left and why, and that results agree."""

from __future__ import annotations

import contextlib
import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import prune  # noqa: E402

from spfmt.errors import FormatError  # noqa: E402
from spfmt.torch import (  # noqa: E402
    SparseLinear,
    decay_groups,
    densify,
    layer_densities,
    sparsify,
    sparsify_like,
    unpack_attention,
)

FORMATS = {
    "condensed": {},
    "nm": {"m": 8},
    "shuffled_block": {"block_shape": (4, 4)},
    "hrbp": {"groups": 2},
    "csr": {},
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 8)
    )


class Tied(nn.Module):
    """An embedding whose weight is the head's, and a shared block."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.block = nn.Linear(16, 16)
        self.again = self.block
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.again(self.block(self.embed(tokens))))


@pytest.mark.parametrize("format", FORMATS)
def test_sparsify_then_densify(format):
    model, x = mlp(), torch.randn(5, 32)
    report = sparsify(model, format, density=0.25, **FORMATS[format])
    assert [r.name for r in report.taken] == ["0", "2.0", "3"]
    assert not report.left
    assert all(isinstance(model.get_submodule(r.name), SparseLinear) for r in report)
    assert report.density == pytest.approx(0.25, abs=0.02)
    y = model(x)
    back = densify(model)
    assert [r.name for r in back.taken] == ["0", "2.0", "3"]
    assert type(model[0]) is nn.Linear
    assert model[0].weight.count_nonzero() == report["0"].nnz
    torch.testing.assert_close(model(x), y)


def test_report_prints_every_weight():
    model = nn.Sequential(
        nn.Embedding(9, 32), nn.Linear(32, 64), nn.Conv1d(4, 4, 3), nn.Linear(64, 4)
    )
    report = sparsify(model, "csr", density=0.1, exclude="3")
    assert report["0"].reason == "Embedding has no sparse layer"
    assert "first convolution" in report["2"].reason
    assert report["3"].reason == "excluded"
    text = str(report)
    for part in ("0.1", "32", "64x32", "taken", "left", "excluded", "1 taken at density", "3 left"):
        assert part in text
    again = sparsify(model, "csr", density=0.1, include="1")
    assert again["1"].reason == "already sparse (csr)"
    assert again["3"].reason == "not included"


@pytest.mark.parametrize(
    ("include", "exclude", "taken"),
    [
        ("2.*", None, ["2.0"]),
        (None, ["0", "2.*"], ["3"]),
        (lambda name, module: module.out_features == 64, lambda name, module: name == "0", ["2.0"]),
        (nn.Linear, ["3"], ["0", "2.0"]),
    ],
)
def test_include_and_exclude(include, exclude, taken):
    report = sparsify(mlp(), "csr", density=0.1, include=include, exclude=exclude)
    assert [r.name for r in report.taken] == taken


def test_shared_modules_once_and_tied_weights_left():
    model = Tied()
    report = sparsify(model, "condensed", density=0.25)
    assert [r.name for r in report.taken] == ["block"]
    assert report["again"] is report["block"]
    assert model.block is model.again
    assert isinstance(model.block, SparseLinear)
    assert "tied to embed.weight" in report["head"].reason
    assert model.head.weight is model.embed.weight
    assert model(torch.arange(4)).shape == (4, 32)


def test_density_or_sparsity_never_both():
    assert sparsify(mlp(), "csr", sparsity=0.9).density == pytest.approx(0.1, abs=0.001)
    for wrong in ({}, {"density": 0.1, "sparsity": 0.9}, {"density": "keep", "sparsity": 0.1},
                  {"density": "most"}, {"density": 2.0}):  # fmt: skip
        with pytest.raises(FormatError):
            sparsify(mlp(), "csr", **wrong)


@pytest.mark.parametrize(
    ("format", "params", "nnz"),
    [("nm", {"n": 2, "m": 4}, [1024, 2048, 256]), ("condensed", {"fan_in": 3}, [192, 192, 24])],
)
def test_a_ratio_says_the_density(format, params, nnz):
    model = mlp()
    report = sparsify(model, format, **params)
    assert [layer.nnz for layer in report] == nnz
    again = SparseLinear(32, 64, format=format, **params)
    assert again.nnz == nnz[0]
    # A ratio that is not the nearest to the density is the one that later searches keep.
    assert model[0].target_density == model[0].density == again.density


def test_densities_by_name():
    model = mlp()
    report = sparsify(model, "csr", {"0": 0.5, "3": 0.25})
    assert [(r.name, r.density) for r in report.taken] == [("0", 0.5), ("3", 0.25)]
    assert report["2.0"].reason == "not named in density"
    with pytest.raises(FormatError, match="nowhere"):
        sparsify(mlp(), "csr", {"nowhere": 0.5})


def test_erk_spreads_the_same_budget():
    report = sparsify(mlp(), "csr", density=0.2, distribution="erk")
    assert report.density == pytest.approx(0.2, abs=0.002)
    assert report["3"].density > report["0"].density > report["2.0"].density
    shapes = {"a": (64, 64), "b": (64, 8)}
    assert layer_densities(shapes, 0.1) == pytest.approx({"a": 0.1, "b": 0.1}, abs=1 / 512)
    with pytest.raises(FormatError, match="distribution"):
        layer_densities(shapes, 0.1, "even")


def test_a_layer_that_erk_fills_stays_dense():
    model = mlp()
    report = sparsify(model, "csr", density=0.5, distribution="erk")
    assert "stays dense" in report["3"].reason
    assert type(model[3]) is nn.Linear
    stored = sum(row.nnz for row in report.taken) + 8 * 64
    assert stored == round(0.5 * (64 * 32 + 64 * 64 + 8 * 64))


@pytest.mark.parametrize("format", ["csr", "condensed", "nm"])
def test_keep_keeps_exactly_the_zeros_that_are_there(format):
    model, x = mlp(), torch.randn(3, 32)
    first = sparsify(model, format, density=0.25, include=["0", "2.0"], **FORMATS[format])
    densify(model)
    expected = model(x)
    report = sparsify(model, format, density="keep", **FORMATS[format])
    assert [(r.name, r.nnz) for r in report.taken] == [(r.name, r.nnz) for r in first.taken]
    assert "no zeros" in report["3"].reason
    torch.testing.assert_close(model(x), expected)


def test_keep_reports_padding_and_what_a_format_cannot_hold():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    with torch.no_grad():
        model[0].weight[0, :5] = 0
        model[1].weight[:, 0] = 0
    report = sparsify(model, "nm", density="keep", n=3, m=4)
    assert not report["0"].taken
    assert "n" in report["0"].reason
    assert report["1"].taken
    assert report["1"].nnz == 24
    model = nn.Sequential(nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[0, :5] = 0
    report = sparsify(model, "condensed", density="keep")
    assert report["0"].reason == "5 padding zeros"


def test_pruning_hooks_and_parametrizations_are_reported():
    model = mlp()
    prune.l1_unstructured(model[0], "weight", 0.5)
    torch.nn.utils.parametrizations.weight_norm(model[3])
    report = sparsify(model, "csr", density=0.5)
    assert "prune.remove" in report["0"].reason
    assert "computed" in report["3"].reason
    assert [r.name for r in report.taken] == ["2.0"]
    prune.remove(model[0], "weight")
    assert sparsify(model, "csr", density="keep", include="0")["0"].density == 0.5


def test_layers_with_more_than_a_weight_and_a_bias_are_reported():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    prune.l1_unstructured(model[0], "bias", 0.5)
    model[1].register_parameter("gain", nn.Parameter(torch.ones(8)))
    model[2].register_buffer("mask", torch.ones(8))
    model[3].adapter = nn.Linear(8, 8)
    model[4].forward = model[5].forward
    report = sparsify(model, "csr", density=0.5, include="[0-9]")
    assert "its bias is computed" in report["0"].reason
    for name, lost in ("1", "gain"), ("2", "mask"), ("3", "adapter"), ("4", "forward"):
        assert report[name].reason == f"it has {lost} of its own, which a sparse layer would lose"
    assert [row.name for row in report.taken] == ["5"]
    model(torch.zeros(1, 8))
    prune.remove(model[0], "bias")
    assert sparsify(model, "csr", density=0.5, include="0").taken


class Subclass(nn.Linear):
    pass


@pytest.mark.filterwarnings("ignore")  # of torch.ao, which is about to go
def test_linear_layers_of_other_kinds_are_reported():
    model = nn.Sequential(
        nn.LazyLinear(8),
        Subclass(8, 8),
        torch.ao.nn.quantized.dynamic.Linear(8, 4),
        nn.Bilinear(4, 4, 4),
    )
    reasons = {row.kind: row.reason for row in sparsify(model, density=0.5)}
    assert "call the model once" in reasons["LazyLinear"]
    assert "subclass" in reasons["Subclass"]
    assert "quantised" in reasons["Linear"]
    assert reasons["Bilinear"] == "Bilinear has no sparse layer"


def test_a_compiled_model_is_changed_inside():
    model = mlp()
    report = sparsify(torch.compile(model, backend="eager"), "csr", density=0.5, exclude="0")
    assert [r.name for r in report.taken] == ["2.0", "3"]
    assert isinstance(model[3], SparseLinear)


def test_a_model_in_ddp_is_refused():
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)  # needs no process group, which is not what is tested
    wrapped.module = mlp()
    for change in (lambda m: sparsify(m, "csr", density=0.5), densify, unpack_attention):
        with pytest.raises(FormatError, match="then wrap it"):
            change(wrapped)


@pytest.mark.parametrize("full", [True, False])
def test_hooks_keep_working_and_can_be_removed(full):
    model, calls, x = mlp(), [], torch.randn(2, 32, requires_grad=True)
    first = model[0]
    handles = [
        first.register_forward_hook(lambda *_: calls.append("forward")),
        first.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True),
    ]
    if full:
        handles.append(first.register_full_backward_hook(lambda *_: calls.append("backward")))
    sparsify(model, "csr", density=0.5)
    model(x).sum().backward()
    assert calls == ["pre", "forward"] + ["backward"] * full
    calls.clear()
    densify(model)
    model(x).sum().backward()
    assert calls == ["pre", "forward"] + ["backward"] * full
    for handle in handles:
        handle.remove()
    calls.clear()
    model(x).sum().backward()
    assert calls == []


def test_hooks_of_states_come_along():
    model, calls = nn.Sequential(nn.Linear(8, 8)), []
    first = model[0]
    first.register_state_dict_pre_hook(lambda *_: calls.append("before saving"))
    first.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    first.register_load_state_dict_pre_hook(lambda module, *_: calls.append(module))
    first.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    sparsify(model, "csr", density=0.5)
    del first
    model.load_state_dict(model.state_dict())
    assert calls == ["before saving", "saved", model[0], "loaded"]


def test_hooks_dtype_mode_and_bias_come_along():
    model = mlp().eval().bfloat16()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    bias = model[0].bias
    sparsify(model, "condensed", density=0.25)
    assert model[0].values.dtype == torch.bfloat16
    assert model[0].bias is bias
    assert not model[0].training
    model.float()(torch.zeros(1, 32))
    assert calls == [1]


def test_from_scratch_with_random_structure_and_new_values():
    runs = []
    for _ in range(2):
        model = mlp()
        sparsify(model, "condensed", density=0.125, scores="random", reset=True,
                 generator=torch.Generator().manual_seed(3))  # fmt: skip
        runs.append(model[0].tensor())
    assert runs[0] == runs[1]
    assert runs[0].values.max() > 0.45 * 0.5  # bound 1/sqrt(4), not 1/sqrt(32)


def test_callable_scores():
    model = mlp()
    sparsify(model, "csr", density=0.5, scores=lambda name, linear: -linear.weight.abs())
    assert model[0].tensor().values.__abs__().max() < mlp()[0].weight.abs().max()


def test_wrong_scores():
    with pytest.raises(FormatError, match="scores='magnitud'"):
        sparsify(mlp(), "csr", density=0.5, scores="magnitud")
    report = sparsify(mlp(), "csr", density=0.5, scores=lambda name, linear: torch.rand(4, 4))
    assert not report.taken
    assert all("scores of shape (4, 4)" in row.reason for row in report.left)


def test_a_fan_in_that_some_layers_cannot_have():
    report = sparsify(mlp(), "condensed", fan_in=40)
    assert [r.name for r in report.taken] == ["2.0", "3"]
    assert "fan_in=40" in report["0"].reason


def test_a_distribution_needs_one_density_for_all():
    given = [{"density": "keep"}, {"density": {"0": 0.5}}, {"format": "nm", "n": 2, "m": 4}]
    for arguments in given:
        with pytest.raises(FormatError, match="distribution='erk'"):
            sparsify(mlp(), distribution="erk", **arguments)


def test_an_error_leaves_the_model_as_it_was():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        sparsify(
            model, "csr", density=0.5, reset=True,
            scores=lambda name, _: 1 / 0 if name == "3" else _.weight,
        )  # fmt: skip
    assert all(not isinstance(m, SparseLinear) for m in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_bare_linear_is_reported():
    report = sparsify(nn.Linear(8, 8), "csr", density=0.5)
    assert not report.taken
    assert "from_dense" in report.left[0].reason


def test_what_a_format_holds_far_above_the_target_is_told():
    model = nn.Sequential(nn.Linear(64, 10), nn.Linear(10, 8), nn.Linear(8, 64))
    report = sparsify(model, "shuffled_block", density=0.1, block_shape=(16, 16))
    assert report["0"].reason == "the format holds no less than density 0.25 here"
    assert (
        report["1"].reason == "at density 0.1 the format keeps every weight of it: it stays dense"
    )
    assert type(model[1]) is nn.Linear
    assert report["2"].taken  # one block of 16 x 8, a quarter
    report = sparsify(nn.Sequential(nn.Linear(64, 64)), "shuffled_block", density=0.1)
    assert report["0"].reason == ""


def test_attention_is_reported():
    report = sparsify(nn.Sequential(nn.MultiheadAttention(16, 2)), "csr", density=0.5)
    assert not report.taken
    assert all("MultiheadAttention" in r.reason for r in report.left)
    assert [r.name for r in report.left] == ["0", "0.out_proj"]


def test_a_layer_narrower_than_m_takes_n_of_what_it_has():
    model = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 8))
    report = sparsify(model, "nm", n=3, m=32)
    assert [row.nnz for row in report.taken] == [3 * 64, 2 * 3 * 8]
    assert SparseLinear(13, 64, format="nm", n=3, m=32).nnz == 3 * 64
    assert SparseLinear(13, 64, format="nm", n=20, m=32).nnz == 13 * 64


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("density", [0.5, "keep"])
def test_a_torch_sparse_weight_is_reported(density):
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(model[0].weight.detach().relu().to_sparse_csr())
    model[1].weight = nn.Parameter(model[1].weight.detach().relu().to_sparse())
    report = sparsify(model, "csr", density, include=["0", "1"])
    assert "layout torch.sparse_csr" in report["0"].reason
    assert "layout torch.sparse_coo" in report["1"].reason
    assert not report.taken


def test_weights_that_share_memory_are_tied():
    model = mlp()
    flat = torch.randn(2 * 64 * 64)
    square = nn.Linear(64, 64)
    model.append(square)
    square.weight.data = flat[: 64 * 64].view(64, 64)
    model[2][0].weight.data = flat[64 * 64 :].view(64, 64)  # beside it, not over it
    assert len(sparsify(copy.deepcopy(model), "csr", density=0.5).taken) == 4
    model[2][0].weight.data = flat[64 : 64 + 64 * 64].view(64, 64)
    report = sparsify(model, "csr", density=0.5)
    assert report["4"].reason == "its weight is tied to 2.0.weight"
    assert report["2.0"].reason == "its weight is tied to 4.weight"
    assert [row.name for row in report.taken] == ["0", "3"]


class Conv1D(nn.Module):
    """GPT-2's linear layer: ``y = x W + b`` with W (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_conv1d_is_taken_through_its_transposed_weight():
    model = nn.Sequential(Conv1D(24, 8), nn.ReLU(), Conv1D(6, 24))
    original, bias = model[0].weight.detach().clone(), model[0].bias
    shapes = {}

    def scores(name, linear):
        shapes[name] = tuple(linear.weight.shape)
        return linear.weight.abs()

    report = sparsify(model, "csr", density=0.5, scores=scores, exclude="2")
    assert shapes == {"0": (24, 8)}
    assert report["0"].kind == "Conv1D"
    assert (report["0"].shape, report["2"].shape) == ((24, 8), (6, 24))
    assert report["2"].reason == "excluded"
    kept = torch.from_numpy(model[0].tensor().to_dense())
    assert torch.equal(kept, original.T * (kept != 0))
    assert model[0].bias is bias
    x = torch.randn(3, 8)
    torch.testing.assert_close(model[0](x), x @ kept.T + bias)
    taken = sparsify(nn.Sequential(nn.Conv1d(4, 4, 1)), density=0.5, include="0")
    assert taken["0"].shape == (4, 4, 1)  # of torch, which is a convolution


# ------------------------------------------------------------------------- models of a checkpoint


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("meta", [False, True])
def test_a_checkpoint_of_kept_zeros_loads_into_a_fresh_model(format, meta):
    pruned = mlp()
    if format in ("nm", "shuffled_block"):  # which cannot hold zeros anywhere
        sparsify(pruned, format, density=0.25, include="0", **FORMATS[format])
    else:  # padding makes a capacity that no density gives
        prune.l1_unstructured(pruned[0], "weight", 0.8)
        prune.remove(pruned[0], "weight")
        sparsify(pruned, format, "keep", include="0", max_padding=None)
        assert "max_padding" not in pruned[0].format_params  # which says how to search again
    sparsify(pruned, "csr", density=0.5, include="2.0")
    with torch.device("meta" if meta else "cpu"):
        fresh = mlp()
    state = pruned.state_dict()
    report = sparsify_like(fresh, state)
    assert [row.name for row in report.taken] == ["0", "2.0"]
    assert report["3"].reason == "not sparse in the state"
    fresh.load_state_dict(state, assign=meta)
    x = torch.randn(3, 32)
    assert torch.equal(fresh(x), pruned(x))
    assert fresh[0].tensor() == pruned[0].tensor()
    again = sparsify_like(fresh, state)  # over layers that are sparse already
    assert len(again.taken) == 2
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), pruned(x))


def test_a_shared_layer_and_spare_capacity_come_from_a_checkpoint():
    model = Tied()
    tensor = SparseLinear(16, 16, format="csr", density=0.25).tensor()
    model.block = model.again = SparseLinear.from_tensor(tensor, torch.ones(16), capacity=99)
    fresh = Tied()
    sparsify_like(fresh, model.state_dict())
    assert fresh.block is fresh.again
    fresh.load_state_dict(model.state_dict())
    assert fresh.block.capacity == 99
    assert torch.equal(fresh(torch.arange(4)), model(torch.arange(4)))


def test_a_checkpoint_that_does_not_fit_leaves_the_model():
    source = mlp()
    sparsify(source, "csr", density=0.5)
    state = source.state_dict()
    renamed = {f"net.{key}": value for key, value in state.items()}
    torn = {key: value for key, value in state.items() if key != "3.values"}
    corrupt = {**state, "3.structure": state["3.structure"] + 1}
    wide = nn.Sequential(*mlp()[:3], nn.Linear(64, 9))
    norm = nn.Sequential(*mlp()[:3], nn.LayerNorm(64))
    for model, wrong, message in [
        (mlp(), renamed, "rename its keys"),
        (mlp(), torn, "and its values"),
        (mlp(), corrupt, "structure words"),
        (wide, state, r"\(9, 64\)"),
        (norm, state, r"3\.structure"),
    ]:
        with pytest.raises(FormatError, match=message):
            sparsify_like(model, wrong)
        assert not any(isinstance(module, SparseLinear) for module in model.modules())
    with pytest.raises(FormatError, match="the model itself"):
        sparsify_like(nn.Linear(32, 64), source[0].state_dict())


def test_decay_groups_know_sparse_weights():
    model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    dense = decay_groups(model, 0.1)
    sparsify(model, density=0.25, include="0")
    groups = decay_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    for before, after in zip(dense, groups, strict=True):
        assert len(before["params"]) == len(after["params"])
    assert any(p is model[0].values for p in groups[0]["params"])
    torch.optim.AdamW(groups)
    model[2].weight.requires_grad_(False)
    assert len(decay_groups(model, 0.1)[0]["params"]) == 1
    with pytest.raises(FormatError, match="at least 0"):
        decay_groups(model, -1.0)


def encoder(**kwargs) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2).eval()


@contextlib.contextmanager
def slow_path():
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("exclude", [None, "layers.0.*"])
def test_transformer_encoder_fast_path(exclude):
    """The fast path would read `linear1.weight`; results must be those of the dense model."""
    model, x = encoder(), torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    sparsify(model, "condensed", density=0.25, exclude=exclude)
    with torch.no_grad():
        fast = model(x), model(x, src_key_padding_mask=padding)
        with slow_path():
            slow = model(x), model(x, src_key_padding_mask=padding)
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b)
        densify(model)
        torch.testing.assert_close(model(x), slow[0])
    assert model.use_nested_tensor
    assert model.layers[0].activation_relu_or_gelu == 1
    assert not hasattr(model.layers[1], "_dense_fast_path")


# --------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim", [None, 12])
@pytest.mark.parametrize("bias", [True, False])
def test_unpacked_attention_is_attention(batch_first, kdim, bias):
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first, kdim=kdim, vdim=kdim)
    model = nn.ModuleList([packed, packed]).eval()
    assert unpack_attention(model) == ("0",)
    assert model[0] is model[1]
    q, k = torch.randn(3, 5, 16), torch.randn(3, 7, kdim or 16)
    if not batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    causal = torch.ones(5, 7).triu(1).bool()
    per_head = torch.randn(12, 5, 7)
    for kwargs in (
        {},
        {"need_weights": False},
        {"key_padding_mask": padding, "need_weights": False},
        {"attn_mask": causal, "key_padding_mask": padding},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": per_head, "average_attn_weights": False},
    ):
        for a, b in zip(packed(q, k, k, **kwargs), model[0](q, k, k, **kwargs), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    q, k = torch.randn(5, 16), torch.randn(7, kdim or 16)
    for a, b in zip(packed(q, k, k), model[0](q, k, k), strict=True):
        torch.testing.assert_close(a, b)


def test_attention_that_cannot_be_unpacked_stays():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, add_zero_attn=True))
    assert unpack_attention(model) == ()
    assert type(model[0]) is nn.MultiheadAttention


def test_a_whole_encoder_becomes_sparse():
    model, x = encoder(), torch.randn(3, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    with torch.no_grad():
        with slow_path():
            expected = model(x), model(x, src_key_padding_mask=padding)
        unpack_attention(model)
        got = model(x), model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1][~padding], expected[1][~padding])
    report = sparsify(model, "condensed", density=0.25)
    assert len(report.taken) == 2 * 6
    assert not report.left
    sparse = model(x)
    densify(model)
    torch.testing.assert_close(model(x), sparse)
    model(x).sum().backward()
