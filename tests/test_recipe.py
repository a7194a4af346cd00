"""Recipes as files: keys, values, contradictions; what is made of them."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
if sys.version_info < (3, 11):
    pytest.skip("recipes need tomllib, which Python 3.11 brought", allow_module_level=True)

import tomllib
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_cases import TINY, recipe, tables
from torch import nn

from spfmt.errors import FormatError
from spfmt.recipes import METHODS, NETWORKS, load_recipe, read_recipe
from spfmt.recipes.methods import build_method, method_options
from spfmt.recipes.networks import build_network, network_options
from spfmt.recipes.recipe import differences
from spfmt.recipes.run import build_optimizer, rate_at
from spfmt.recipes.tables import Model, Optimizer
from spfmt.train import PRESETS

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples/recipes").glob("*.toml"))


_BATCH = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)


def check(*changes: str, without: tuple[str, ...] = ()) -> None:
    """Check all of a recipe that can be checked without its data."""
    found = recipe(*changes, without=without)
    network_options(found.model)
    method_options(found)


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("datta.name=1", "the unknown key datta; .*did you mean 'data'"),
        ("data.nmae=1", "the unknown key data.nmae; expected one of .*did you mean 'name'"),
        ("data.name=mnits", 'data.name = "mnits"; expected one of .*did you mean .mnist'),
        ("data.name=3", "data.name = 3; expected one of digits, mnist"),
        ("data=3", r"data = 3; expected a table; fix: write \[data\]"),
        ("data.augment=1", "data.augment = 1; expected true or false"),
        ("data.augment=true", "augment = true for digits; expected it with .*cifar10"),
        ("data.dir=/x", "data.dir for digits; expected it with others"),
        ("data.size=3", "data.size for digits"),
        ("data.mean=[0.5]", "one of data.mean and data.std"),
        ("model.name=resnet200", 'model.name = "resnet200"; .*did you mean .resnet20'),
        ("model.hiden=[3]", "unknown key model.hiden; expected one of hidden, .*mean 'hidden'"),
        ("model.hidden=3", r"model.hidden = 3; expected a list, each a whole number"),
        ("model.hidden=[3, 0.5]", r"model.hidden = \[3, 0.5\]; expected a list"),
        ("method.name=sgirl", "expected one of static, .*, dense; fix: did you mean 'srigl'"),
        ("method.densty=0.1", "unknown key method.densty; expected one of .*mean 'density'"),
        ("method.density=1", "method.density = 1; expected a number between 0 and 1"),
        ("method.density=0.0", "method.density = 0.0; expected a number between 0 and 1"),
        ("method.density=nan", "method.density = nan; expected a number"),
        ("method.density=high", 'method.density = "high"; expected a number between'),
        ("method.sparsity=0.9", "method.density and method.sparsity; expected exactly one"),
        ("method.distribution=erg", 'distribution = "erg"; expected one of uniform, erk; .*erk'),
        ("method.gama_sal=0.3", "unknown key method.gama_sal; .*did you mean 'gamma_sal'"),
        ("method.gamma_sal=true", "method.gamma_sal = true; expected a number"),
        ("method.delta_t=2.5", "method.delta_t = 2.5; expected a whole number"),
        ("method.seed=3", "unknown key method.seed"),
        ("method.scores=snap", "method.scores = .snap.; expected one of random, .*'snip'"),
        ("method.exclude=[]", r"method.exclude = \[\]; expected a list, each a text"),
        ("method.name=dense", 'method.density with method.name = "dense".*leave out'),
        ("format.name=cs", "format.name = .cs.; expected one of .*did you mean 'csr'"),
        ("format.block_shape=[4,4]", "unknown key format.block_shape"),
        ("train.epochs=3", "train.epochs and train.steps; expected exactly one"),
        ("train.steps=0", "train.steps = 0; expected a whole number from 1"),
        ("train.batch_size=true", "train.batch_size = true; expected a whole number"),
        ("train.batch_size=1e2", "train.batch_size = 100.0; expected a whole number"),
        ("optimizer.name=SGD", "did you mean|change optimizer.name"),
        ("optimizer.lr=-1", "optimizer.lr = -1; expected a number above 0"),
        ("optimizer.lr=inf", "optimizer.lr = inf; expected a number above 0"),
        ("optimizer.lr=1" + "0" * 400, "expected a number above 0"),
        ("optimizer.weight_decay=1e308", "expected a number from 0 on"),
        ("model.weights=\udcff", "expected a text"),
        ('model.weights="a\\u0000"', "expected a text"),
        ("seeds=0x" + "f" * 6000, "expected a list, each a whole number"),
        ("seeds=" + "[" * 5000 + "]" * 5000, "expected a list, each a whole number"),
        ("format.values=[1]", "unknown key format.values"),
        ("optimizer.betas=[0.9, 0.99]", 'optimizer.betas with optimizer.name = "sgd"'),
        ("optimizer.momentum=1.0", r"momentum = 1.0; expected a number in \[0, 1\)"),
        ("rate.name=cosin", "did you mean 'cosine'"),
        ("rate.at=[3]", 'rate.at with rate.name = "constant"; expected it with "drops"'),
        ("rate.factor=0.5", 'rate.factor with rate.name = "constant"'),
        ("rate.name=drops", 'rate.name = "drops" without rate.at'),
        ("rate.warmup=20", "rate.warmup = 20; expected less than all 20 steps"),
        ("seeds=[1, 1]", r"seeds = \[1, 1\]; expected each seed once"),
        ("seeds=-1", "seeds = -1; expected a list, each a whole number from 0"),
        ("seeds=[]", r"seeds = \[\]; expected a list"),
        ("seeds", "--set seeds; expected table.key=value"),
        ("seeds.first=1", "expected seeds to be a table"),
        (".=1", "--set .=1; expected table.key=value"),
    ],
)  # fmt: skip
def test_a_bad_key_has_one_clear_line(change: str, said: str) -> None:
    with pytest.raises(FormatError, match=said) as error:
        check(change)
    assert "\n" not in str(error.value)
    assert "expected" in str(error.value)
    assert "fix: " in str(error.value)


@pytest.mark.parametrize(
    ("changes", "without", "said"),
    [
        ([], ["data.name"], r"without data.name; expected it below \[data\]; fix: write name = …"),
        ([], ["optimizer.lr"], "without optimizer.lr"),
        ([], ["train.steps"], "neither train.epochs nor train.steps; expected exactly one"),
        ([], ["method.density"], "neither method.density nor method.sparsity"),
        (["format.name=nm", "format.n=2"], [], "method.density and format.n; expected one of them"),
        (["rate.name=drops", "rate.at=[9, 5]"], [], "expected ascending times before the end"),
        (["rate.name=drops", "rate.at=[20]"], [], "before the end after 20 steps"),
        (["optimizer.nesterov=true", "optimizer.momentum=0.0"], [], "expected a momentum"),
        (["optimizer.name=adam", "optimizer.nesterov=true"], [], "expected it with sgd"),
    ],
)
def test_keys_that_contradict_each_other(changes: list[str], without: list[str], said: str) -> None:
    with pytest.raises(FormatError, match=said):
        recipe(*changes, without=without)


def test_pruning_needs_to_know_where_it_ends() -> None:
    sparsity = recipe("method.name=gradual", "method.sparsity=0.75", without=["method.density"])
    options = method_options(sparsity)
    assert options["density"] == 0.25
    assert "sparsity" not in options
    implied = ["method.name=gradual", "format.name=nm", "format.n=2"]
    with pytest.raises(FormatError, match=r"'gradual' without method.density"):
        method_options(recipe(*implied, without=["method.density"]))


def test_density_can_be_implied_by_the_format() -> None:
    method = {"name": "static"}
    changed = tables("method.name=static", "format.name=nm", "format.n=1", "format.m=4",
                     without=["method.density", "method.delta_t"])  # fmt: skip
    assert changed["method"]["name"] == method["name"]
    options = method_options(read_recipe(changed))
    assert (options["n"], options["m"]) == (1, 4)
    assert "density" not in options


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("seeds = [1,")
    with pytest.raises(FormatError, match=r"r.toml, which is no TOML: Invalid value"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match=r"r.toml, which is no TOML"):
        load_recipe(path)
    with pytest.raises(FileNotFoundError):
        load_recipe(tmp_path / "none.toml")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
_KEYS = [
    "seeds",
    *(f"{t}.{k}" for t, keys in tomllib.loads(TINY).items() if t != "seeds" for k in keys),
]
_MORE = ["data.mean", "format.name", "format.m", "rate.at", "rate.name", "method.alpha", "output"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*_KEYS, *_MORE]), _VALUES)
def test_any_value_is_read_or_refused(name: str, value: Any) -> None:
    changed = tables()
    table, _, key = name.rpartition(".")
    (changed.setdefault(table, {}) if table else changed)[key] = value
    try:
        found = read_recipe(changed)
        network_options(found.model)
        method_options(found)
    except FormatError:
        return
    assert differences(read_recipe(tomllib.loads(found.to_toml())), found) == []


# ------------------------------------------------------------------------------------- reading


def test_changes_are_toml_or_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(TINY)
    changes = ["seeds=[4, 5]", "model.hidden=[8]", "method.name=rigl", "method.exclude=out*",
               'format.name = "csr"', "optimizer.weight_decay=1e-4"]  # fmt: skip
    found = load_recipe(path, changes)
    assert found.seeds == (4, 5)
    assert found.model.options == {"hidden": [8]}
    assert (found.method.name, found.method.exclude) == ("rigl", ("out*",))
    assert found.optimizer.weight_decay == 1e-4
    names = ("density", "exclude", "delta_t")
    dense = load_recipe(path, ["method.name=dense", *(f"method.{name}=" for name in names)])
    assert dict(dense.entries())["method.name"] == "dense"
    path.write_text(TINY.replace("digits", "mnist"))
    assert load_recipe(path, ["data.dir=/a"], data_dir="/b").data.dir == "/b"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_legal_and_come_back_from_their_copies(path: Path) -> None:
    found = load_recipe(path)
    network_options(found.model)
    method_options(found)
    again = read_recipe(tomllib.loads(found.to_toml()))
    assert differences(found, again) == []
    assert again.to_toml() == found.to_toml()


def test_differences_name_keys() -> None:
    one = recipe()
    assert differences(one, one) == []
    other = recipe(
        "method.delta_t=4", "rate.name=cosine", "seeds=[1, 2]", without=["method.exclude"]
    )
    assert differences(one, other) == [
        "seeds ([0], there [1, 2])",
        'method.exclude (["output"], there not given)',
        "method.delta_t (3, there 4)",
        'rate.name ("constant", there "cosine")',
    ]
    one, other = (recipe("data.name=mnist", f"data.dir={d}") for d in ("/a", "/b"))
    assert differences(one, other) == []


# -------------------------------------------------------------------------------------- making


def torch_rates(make: Any, count: int, every: int) -> list[float]:
    """Rates of one of torch's schedulers, which steps every so many steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, rates = make(optimizer), []
    for step in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return rates


def test_rates_are_those_of_torch() -> None:
    by_steps = recipe("rate.name=cosine")
    cosine = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20), 20, 1)
    np.testing.assert_allclose([rate_at(by_steps, t, 20, 7) for t in range(20)], cosine, rtol=1e-9)
    changes = ["train.epochs=10", "rate.name=drops", "rate.at=[3, 6]", "rate.factor=0.2"]
    by_epochs = recipe(*changes, without=["train.steps"])
    drops = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 6], 0.2), 70, 7)
    np.testing.assert_allclose([rate_at(by_epochs, t, 70, 7) for t in range(70)], drops, rtol=1e-9)
    assert {rate_at(recipe(), t, 20, 7) for t in range(20)} == {0.1}


def test_warmup_rises_to_the_rate() -> None:
    found = recipe("train.epochs=10", "rate.name=cosine", "rate.warmup=2", without=["train.steps"])
    rates = [rate_at(found, t, 70, 7) for t in range(70)]
    np.testing.assert_allclose(rates[:14], 0.1 * np.arange(1, 15) / 14)
    half = 0.1 * (1 + math.cos(math.pi * 28 / 56)) / 2
    np.testing.assert_allclose(rates[42], half)
    assert rates == sorted(rates[:14]) + sorted(rates[14:], reverse=True)


def test_optimizers_get_their_options() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    sgd = build_optimizer(Optimizer("sgd", 0.1, weight_decay=0.01, nesterov=True), model)
    assert isinstance(sgd, torch.optim.SGD)
    assert [g["weight_decay"] for g in sgd.param_groups] == [0.01, 0.0]
    assert [len(g["params"]) for g in sgd.param_groups] == [1, 3]  # biases and norms do not decay
    assert {(g["lr"], g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {(0.1, 0.9, True)}
    adam = build_optimizer(Optimizer("adamw", 0.1, betas=(0.5, 0.9), eps=1e-6), model)
    assert isinstance(adam, torch.optim.AdamW)
    assert (adam.defaults["betas"], adam.defaults["eps"]) == ((0.5, 0.9), 1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_images(name: str) -> None:
    options = {"depth": 1, "dim": 24} if name == "vit_tiny" else {}
    if name not in ("mlp", "vit_tiny", "wide_resnet22_2"):
        options = {"width": 0.125}
    network = build_network(Model(name, options=options), (3, 32, 32), 7).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_images_that_a_network_cannot_take() -> None:
    with pytest.raises(FormatError, match=r"images of 1 x 8 x 8 for model.name = 'vgg16'.*use mlp"):
        build_network(Model("vgg16", options={"width": 0.125}), (1, 8, 8), 10)
    with pytest.raises(FormatError, match="images of 8 x 6 pixels; expected square ones"):
        build_network(Model("mlp"), (1, 8, 6), 10)
    with pytest.raises(FormatError, match="at least one neuron"):
        build_network(Model("mlp", options={"hidden": [0]}), (1, 8, 8), 10)
    for hidden in ([10**15], [10**25]):
        with pytest.raises(FormatError, match=r"'mlp' with .*; fix: make it smaller"):
            build_network(Model("mlp", options={"hidden": hidden}), (1, 8, 8), 10)


def test_a_batch_of_one_image_has_no_variance() -> None:
    model = Model("resnet18", options={"width": 0.125})
    with pytest.raises(FormatError, match=r"Expected more than 1 value.*train.batch_size"):
        build_network(model, (3, 8, 8), 10, batch=1)
    norms = build_network(model, (3, 8, 8), 10).modules()
    assert {int(m.num_batches_tracked) for m in norms if isinstance(m, nn.BatchNorm2d)} == {0}


def test_networks_begin_with_trained_weights(tmp_path: Path) -> None:
    model = Model("mlp", options={"hidden": [5]})
    trained = build_network(model, (1, 4, 4), 3)
    state = trained.state_dict()
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in state.items()})
    from safetensors.torch import save_file

    save_file(state, tmp_path / "w.safetensors")
    for end in ("npz", "safetensors"):
        path = str(tmp_path / f"w.{end}")
        again = build_network(Model("mlp", path, {"hidden": [5]}), (1, 4, 4), 3)
        assert all(torch.equal(a, b) for a, b in zip(state.values(), again.state_dict().values(),
                                                      strict=True))  # fmt: skip
        with pytest.raises(FormatError, match="size mismatch"):
            build_network(Model("mlp", path, {"hidden": [6]}), (1, 4, 4), 3)
        with pytest.raises(FormatError, match=r"Missing key.*hidden2.weight"):
            build_network(Model("mlp", path, {"hidden": [5, 5]}), (1, 4, 4), 3)
        Path(path).write_bytes(b"nothing")
        with pytest.raises(FormatError, match="cannot be read"):
            build_network(Model("mlp", path, {"hidden": [5]}), (1, 4, 4), 3)


@pytest.mark.parametrize("dtype", ["U1", "complex64"])
def test_weights_are_numbers(dtype: str, tmp_path: Path) -> None:
    state = build_network(Model("mlp"), (1, 8, 8), 10).state_dict()
    arrays = {name: value.numpy() for name, value in state.items()}
    np.savez(tmp_path / "w.npz", **{**arrays, "output.bias": np.zeros(10, dtype)})
    with pytest.raises(FormatError, match=r"with output.bias of .*; expected numbers"):
        build_network(Model("mlp", str(tmp_path / "w.npz")), (1, 8, 8), 10)


@pytest.mark.parametrize("name", ["static", "srigl", "gradual"])
def test_trained_weights_are_kept(name: str, tmp_path: Path) -> None:
    trained = build_network(recipe().model, (1, 8, 8), 10)
    arrays = {name: value.numpy() + 1 for name, value in trained.state_dict().items()}
    np.savez(tmp_path / "w.npz", **arrays)
    found = recipe(f"method.name={name}", f"model.weights={tmp_path / 'w.npz'}")
    model = build_network(found.model, (1, 8, 8), 10)
    build_method(found, model, build_optimizer(found.optimizer, model), 20, 0, _BATCH)
    for layer in ("hidden1", "hidden2"):
        weights = model.get_submodule(layer).to_dense().weight.detach().numpy()  # type: ignore[operator]
        np.testing.assert_array_equal(
            weights[weights != 0], arrays[f"{layer}.weight"][weights != 0]
        )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_defaults_of_method_and_format(name: str) -> None:
    changes = [f"method.preset={name}", "method.exclude=conv1", "model.name=resnet20"]
    gone = ["method.name", "method.delta_t", "model.hidden"]
    found, paper = recipe(*changes, without=gone), PRESETS[name]
    assert METHODS[found.method.name] is paper.method
    options = method_options(found)
    assert options["distribution"] == paper.distribution
    assert {k: options[k] for k in (*paper.options, *paper.params)} == {
        **paper.options, **paper.params
    }  # fmt: skip
    model = build_network(found.model, (3, 32, 32), 10)
    optimizer = build_optimizer(found.optimizer, model)
    method = build_method(found, model, optimizer, 10_000, 0, _BATCH)
    schedule = getattr(method, "schedule", None)
    if paper.t_end is not None:
        assert schedule.t_end == pytest.approx(10_000 * paper.end, abs=1)
    again = read_recipe(tomllib.loads(found.to_toml()))
    assert differences(found, again) == []


def test_keys_come_before_those_of_a_preset() -> None:
    own = ["method.preset=dsb-cifar", "method.delta_t=7", "format.block_shape=[8,8]"]
    found = recipe(*own, without=["method.name"])
    assert found.method.options == {"alpha": 0.3, "delta_t": 7, "t_end": 75_000 / 97_656}
    assert found.format.options == {"block_shape": [8, 8]}
    other = recipe(*own[:2], "method.name=set", "format.name=csr")
    assert (other.method.name, other.format.options) == ("set", {})
    with pytest.raises(FormatError, match=r'preset = "dsb"; expected one of .*dsb-cifar'):
        recipe("method.preset=dsb")


def test_patterns_name_layers() -> None:
    found = recipe("method.exclude=ouput")
    model = build_network(found.model, (1, 8, 8), 10)
    with pytest.raises(FormatError, match=r"'ouput' in method.exclude.*did you mean 'output'"):
        build_method(found, model, build_optimizer(found.optimizer, model), 20, 0, _BATCH)
    found = recipe("method.include=hiden*")
    with pytest.raises(FormatError, match=r"'hiden\*' in method.include, which names no layer"):
        build_method(found, model, build_optimizer(found.optimizer, model), 20, 0, _BATCH)


def test_a_method_says_which_format_it_needs() -> None:
    found = recipe("format.name=csr")
    model = build_network(found.model, (1, 8, 8), 10)
    with pytest.raises(FormatError, match="condensed"):
        build_method(found, model, build_optimizer(found.optimizer, model), 20, 0, _BATCH)


def test_a_method_need_not_take_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def __init__(
            self,
            model: Any,
            optimizer: Any,
            *,
            density: float = 0.5,
            exclude: str = "",
            rest: int = 1,
        ) -> None: ...

    monkeypatch.setitem(METHODS, "other", Other)
    own = ["method.name=other", "method.rest=3"]
    options = method_options(recipe(*own, without=["method.delta_t"]))
    assert options == {"density": 0.25, "exclude": ("output",), "rest": 3}
    said = "unknown key method.scores; expected one of density, exclude, name, rest"
    with pytest.raises(FormatError, match=said):
        method_options(recipe(*own, "method.scores=snip", without=["method.delta_t"]))


def test_every_method_of_the_library_has_a_name() -> None:
    import spfmt.train as train

    known = [getattr(train, name) for name in train.__all__]
    methods = {c for c in known if hasattr(c, "step") and hasattr(c, "summary")}
    abstract = {c for c in methods if getattr(c, "__abstractmethods__", None)}
    assert set(METHODS.values()) == methods - abstract
