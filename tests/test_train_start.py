"""Methods that make a dense model sparse themselves, and calls of them out of order."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from train_cases import FORMATS  # noqa: E402

from spfmt import train as methods  # noqa: E402
from spfmt.errors import FormatError  # noqa: E402
from spfmt.torch import SparseConv2d, SparseLinear, sparsify  # noqa: E402
from spfmt.train import (  # noqa: E402
    DNSB,
    DSB,
    HRBP,
    SET,
    SSB,
    GradualPruning,
    RigL,
    SampledGrowth,
    SRigL,
    Static,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(512, 10)
    )


RUN = {"total_steps": 1000}
WEIGHTS = 16 * 3 * 9 + 32 * 16 * 9 + 512 * 10


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def loss(model: nn.Module, seed: int = 0) -> torch.Tensor:
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(x), x[:, 0, :2, :5].flatten(1).argmax(1))


def trained(model, optimizer, method, steps: int) -> list[bool]:
    changed = []
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        changed.append(method.step())
    return changed


OWN = {
    Static: "csr",
    SET: "csr",
    RigL: "csr",
    SRigL: "condensed",
    DSB: "shuffled_block",
    DNSB: "shuffled_block",
    SSB: "shuffled_block",
    HRBP: "hrbp",
}


@pytest.mark.parametrize("method", OWN)
def test_a_dense_model_trains_in_the_format_of_the_paper(method):
    model = network()
    optimizer = momentum(model)
    groups = [group.copy() for group in optimizer.param_groups]
    blocks = {"block_shape": (4, 4)} if issubclass(method, DSB) else {}
    trainer = method(model, optimizer, density=0.2, delta_t=2, total_steps=20, **blocks)
    assert {layer.format for layer in trainer.layers.values()} == {OWN[method]}
    (group,) = optimizer.param_groups
    assert group is not groups[0]
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert group["weight_decay"] == 1e-4
    before = {name: layer.values.clone() for name, layer in trainer.layers.items()}
    changed = trained(model, optimizer, trainer, 6)
    assert any(changed) is (method not in (Static, SSB))
    for name, layer in trainer.layers.items():
        assert not torch.equal(layer.values, before[name])  # the optimizer reaches them
        assert optimizer.state[layer.values]["momentum_buffer"].shape == layer.values.shape
    assert str(trainer).splitlines()[0].startswith(f"{method.__name__}, CosineSchedule(")


@pytest.mark.parametrize("format", FORMATS)
def test_any_format_can_be_asked_for(format):
    model = network()
    trainer = SET(
        model, momentum(model), density=0.25, format=format, exclude="0", **FORMATS[format], **RUN
    )
    assert list(trainer.layers) == ["2", "4"]
    assert {layer.format for layer in trainer.layers.values()} == {format}
    assert "0 stays dense: excluded" in str(trainer)


def test_the_budget_is_spread_by_erk_and_holds_exactly():
    model = network()
    trainer = SET(model, momentum(model), density=0.9, **RUN)
    report = trainer.report
    assert report is not None
    total = sum(row.nnz for row in report)  # what ERK fills is dense, and counts
    assert total == round(0.9 * sum(row.size for row in report))
    assert "ERK" in report["0"].reason
    small = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    uniform = SET(small, momentum(small), sparsity=0.8, distribution="uniform", **RUN)
    assert [layer.nnz for layer in uniform.layers.values()] == [120, 60]


def test_ratios_stand_for_a_density():
    model = network()
    trainer = SET(model, momentum(model), format="nm", n=2, m=4, include="4", **RUN)
    assert isinstance(model[4], SparseLinear)
    assert trainer.layers["4"].nnz == 512 * 10 // 2
    assert isinstance(model[0], nn.Conv2d)


def test_values_are_drawn_anew_only_on_random_structures():
    model = network()
    weight = model[2].weight.detach().clone()
    SET(model, momentum(model), density=0.5, scores="magnitude", distribution="uniform", **RUN)
    assert isinstance(model[2], SparseConv2d)
    dense = model[2].to_dense().weight.detach()
    assert torch.equal(dense[dense != 0], weight[dense != 0])
    largest = weight.abs().flatten().topk(int((dense != 0).sum())).values.min()
    assert dense[dense != 0].abs().min() >= largest

    model = network()
    SET(model, momentum(model), density=0.5, distribution="uniform", **RUN)
    dense = model[2].to_dense().weight.detach()
    assert not torch.equal(dense[dense != 0], weight[dense != 0])


def test_one_seed_gives_one_start():
    first, again, other = network(), network(), network()
    for model, seed in ((first, 1), (again, 1), (other, 2)):
        SET(model, momentum(model), density=0.1, seed=seed, **RUN)
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[4].structure, other[4].structure)


def test_state_of_dense_weights_goes_only_where_values_are_new():
    model = network()
    optimizer = momentum(model)
    loss(model).backward()
    optimizer.step()
    with pytest.raises(FormatError, match="state of dense weights"):
        SET(model, optimizer, density=0.1, scores="magnitude", **RUN)
    dense = model[2].weight
    assert dense in optimizer.state
    SET(model, optimizer, density=0.1, **RUN)
    assert dense not in optimizer.state
    assert model[2].bias in optimizer.state


# ---------------------------------------------------------------------- gradual pruning starts full


def test_gradual_pruning_makes_full_layers_of_a_trained_model():
    model = network()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    optimizer = momentum(model)
    method = GradualPruning(
        model, optimizer, density=0.2, format="shuffled_block", block_shape=(4, 4), delta_t=2,
        t_end=4,
    )  # fmt: skip
    assert list(method.layers) == ["0", "2", "4"]  # the first convolution, too, as in all methods
    torch.testing.assert_close(model(x), before)
    assert trained(model, optimizer, method, 5) == [False, True, False, True, False]
    total = sum(layer.nnz for layer in method.layers.values())
    assert total == pytest.approx(0.2 * WEIGHTS, rel=0.02)


def test_gradual_pruning_spreads_by_erk_or_by_name():
    model = network()
    erk = GradualPruning(model, momentum(model), density=0.2, distribution="erk", t_end=100)
    assert sum(erk.last.values()) == round(0.2 * WEIGHTS)
    model = network()
    named = GradualPruning(model, momentum(model), density={"4": 0.5}, t_end=100)
    assert named.last == {"4": 2560}
    assert isinstance(model[2], nn.Conv2d)


# -------------------------------------------------------------------------------------- bad input


def untouched(method, optimizer=momentum, **options) -> FormatError:
    """Construct with what is wrong; model and optimizer must be as they were."""
    model = network()
    made = optimizer(model)
    modules, params = list(model.modules()), [list(g["params"]) for g in made.param_groups]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FormatError) as error:
        method(model, made, **{"t_end": 1000, **options})
    assert list(model.modules()) == modules
    assert [list(g["params"]) for g in made.param_groups] == params
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    return error.value


@pytest.mark.parametrize("method", [SET, SRigL, DSB, HRBP, Static, GradualPruning])
@pytest.mark.parametrize("density", [0.0, 1.0, 1.5, -0.1])
def test_densities_that_leave_nothing_to_choose(method, density):
    assert "density" in str(untouched(method, density=density))


def test_contradictions():
    assert "exactly one" in str(untouched(SET, density=0.1, sparsity=0.9))
    assert "no density" in str(untouched(SET, format="csr"))
    assert "no density" in str(untouched(SET))
    assert "a density of 0 for 4" in str(untouched(SET, density={"4": 0.0}))
    assert "names of layers" in str(untouched(SET, density={"fc": 0.5}))


def test_where_no_layer_is_left_each_says_why():
    error = str(untouched(SET, density=0.1, include="nothing"))
    assert error.count("not included") == 3
    assert "pass density" not in error
    error = str(untouched(DSB, density=0.1, block_shape=(10**6, 10**6)))
    assert error.count("the format keeps every weight of it: it stays dense") == 3
    tiny = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(FormatError, match="its share under ERK is every weight"):
        SET(tiny, momentum(tiny), density=0.9, **RUN)
    narrow = nn.Sequential(nn.Conv2d(3, 16, 3))
    with pytest.raises(FormatError, match="not included"):
        GradualPruning(narrow, momentum(narrow), density=0.3, include="fc", **RUN)


def test_layers_that_a_method_cannot_take_are_told_and_nothing_has_changed():
    assert "'condensed'" in str(untouched(SRigL, density=0.1, format="csr"))
    assert "N = " in str(untouched(SRigL, density={"4": 0.001}))
    assert "aligned=False" in str(untouched(DNSB, density=0.5, block_shape=(4, 4), aligned=False))


def test_an_optimizer_of_another_model():
    error = untouched(SET, lambda _: momentum(network()), density=0.1)
    assert "an optimizer without the weight of 0, 2, 4" in str(error)


def test_a_transformer_that_was_not_changed_goes_on_as_before():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=True
    )
    seen = []
    model.layers[0].linear1.register_load_state_dict_pre_hook(lambda m, *_: seen.append(m))
    with pytest.raises(FormatError, match="without the weight of"):
        SET(model, momentum(network()), density=0.2, **RUN)
    assert model.use_nested_tensor
    assert model.layers[0].activation_relu_or_gelu
    model.load_state_dict(model.state_dict())
    assert seen == [model.layers[0].linear1]


def test_an_optimizer_that_wraps_another():
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner
            super().__init__([p for g in inner.param_groups for p in g["params"]], {})

    error = untouched(SET, lambda model: Lookahead(momentum(model)), density=0.1)
    assert "a Lookahead, which wraps SGD" in str(error)


def test_a_misspelt_option():
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, "csr", density=0.5)
    with pytest.raises(TypeError, match="unexpected keyword arguments: delta_T"):
        SET(model, momentum(model), delta_T=3, **RUN)
    with pytest.raises(TypeError, match="delta_T"):
        SET(dense := nn.Sequential(nn.Linear(8, 8)), momentum(dense), density=0.5, delta_T=3, **RUN)
    assert isinstance(dense[0], nn.Linear)


# ----------------------------------------------------------------------------------- order of calls


def test_a_step_that_no_optimizer_made():
    model = network()
    optimizer = momentum(model)
    method = SET(model, optimizer, density=0.2, delta_t=2, total_steps=100)
    loss(model).backward()
    with pytest.raises(FormatError, match=r"without an optimizer\.step\(\)"):
        method.step()
    optimizer.step()
    method.step()
    with pytest.raises(FormatError, match=r"without an optimizer\.step\(\)"):
        method.step()
    optimizer.zero_grad()
    with pytest.raises(FormatError, match=r"without an optimizer\.step\(\)"):
        method.step()
    assert method.steps == 1  # errors count nothing


def test_a_step_that_a_gradient_scaler_skipped_counts():
    model = network()
    optimizer = momentum(model)
    method = SET(model, optimizer, density=0.2, delta_t=2, total_steps=100)
    (loss(model) * float("inf")).backward()
    assert not method.step()
    assert method.steps == 1


def test_a_scaler_skips_for_any_parameter_of_the_optimizer():
    model = nn.ModuleList([nn.Embedding(8, 16, sparse=True), nn.Linear(16, 16), nn.Linear(16, 4)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = SET(model, optimizer, density=0.2, exclude="2", total_steps=1000)
    model[2](model[1](model[0](torch.arange(4)))).sum().backward()
    with pytest.raises(FormatError, match=r"without an optimizer\.step\(\)"):
        method.step()
    model[2].bias.grad.fill_(float("inf"))  # where no sparse layer has such a gradient
    method.step()
    assert method.steps == 1


def test_written_weights_are_a_step_whoever_wrote_them():
    """As where an optimizer of another kind, or a compiled one, calls no hooks."""
    model = network()
    method = SET(model, momentum(model), density=0.2, delta_t=1, total_steps=100)
    with torch.no_grad():
        model[4].values.mul_(0.5)
    assert method.step()


def test_optimizers_of_another_make_are_believed():
    class ThroughData:
        def __init__(self, params) -> None:
            self.param_groups, self.state = [{"params": list(params)}], {}

        def step(self) -> None:
            for p in self.param_groups[0]["params"]:
                p.data.sub_(p.grad, alpha=0.1)

    model = network()
    optimizer = ThroughData(model.parameters())
    method = SET(model, optimizer, density=0.2, delta_t=1, total_steps=100)
    loss(model).backward()
    optimizer.step()
    assert method.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself
def test_compiled_optimizers_are_seen():
    model = nn.Sequential(nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    method = SET(model, optimizer, density=0.2, delta_t=1, total_steps=100)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().sum().backward()
        step()
        assert method.step()


def test_a_trainer_that_is_gone_leaves_its_optimizer_working():
    model = nn.Sequential(nn.Linear(16, 16))
    optimizer = momentum(model)
    SET(model, optimizer, density=0.2, **RUN)
    model(torch.randn(4, 16)).sum().backward()
    optimizer.step()


def test_every_method_is_named_in_the_table():
    """A new method must be tried here, too."""
    trainers = {
        value
        for value in vars(methods).values()
        if isinstance(value, type) and issubclass(value, methods.SparseTrainer)
    }
    assert trainers - {*OWN, GradualPruning, SampledGrowth} == {
        methods.SparseTrainer,
        methods.GradientTrainer,
    }
