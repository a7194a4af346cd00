"""The row of the lottery ticket in the table of methods, which no recipe says by itself."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
if sys.version_info < (3, 11):
    pytest.skip("recipes need tomllib, which Python 3.11 brought", allow_module_level=True)

from spfmt.errors import FormatError
from spfmt.recipes import load_images, load_recipe
from spfmt.recipes.run import SeedRun, forget_peak, peak_memory
from spfmt.train import Lottery

ROOT = Path(__file__).resolve().parent.parent
STATIC = ("method.name=static",)
SHORT = ("method.gamma_sal=", "train.epochs=", "train.steps=12", "rate.warmup=1", "seeds=[1]",
         "model.hidden=[96,32]")  # fmt: skip


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark with a short recipe of digits."""
    monkeypatch.syspath_prepend(str(ROOT))
    found = importlib.import_module("benchmarks.methods")
    monkeypatch.setitem(found.SUITES, "digits", ("digits-srigl", SHORT))
    return found


def written(methods: Any, out: Path) -> dict[str, Any]:
    methods._lottery("digits", STATIC, None, out)
    (seed,) = json.loads((out / "summary.json").read_text())["seeds"]
    return seed


def test_a_ticket_is_a_run_of_the_sparse_recipe(
    methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, Any]] = []  # at the first step of each of both trainings

    class Watched(SeedRun):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.stepped = False

        def step(self) -> None:
            if not self.stepped:
                states.append({n: t.clone() for n, t in self.model.state_dict().items()})
            self.stepped = True
            super().step()

    monkeypatch.setattr("spfmt.recipes.run.SeedRun", Watched)
    seed = written(methods, tmp_path / "out")
    dense, ticket = states
    recipe = load_recipe(*methods._recipe("digits", STATIC))
    static = SeedRun(recipe, load_images(recipe.data), 1)
    assert seed["density"] == static.density
    assert seed["dense_layers"] == {"output": "excluded"}
    assert seed["steps"] == 12
    assert static.method is not None
    layers = static.method.layers
    nnz = {name: layer.nnz for name, layer in layers.items()}
    assert nnz["hidden1"] / (64 * 96) < 0.8 * nnz["hidden2"] / (96 * 32)  # ERK, as in other rows
    masks = {name: layer.tensor().mask() for name, layer in layers.items()}
    static.model.load_state_dict(ticket)
    for name, layer in layers.items():
        mask = layer.tensor().mask()
        assert layer.nnz == mask.sum() == nnz[name]
        assert (mask != masks[name]).any()
        early = dense[f"{name}.weight"].numpy()  # of step 0: a hundredth of 12
        np.testing.assert_array_equal(layer.tensor().to_dense(), early * mask)


def test_the_memory_of_the_dense_training_is_not_the_tickets(
    methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not let a process forget its peak")
    step = Lottery.step

    def wasteful(ticket: Lottery) -> bool:
        if ticket.steps == 5:
            np.ones(2**25)  # 256 MiB
        return step(ticket)

    monkeypatch.setattr(Lottery, "step", wasteful)
    forget_peak()
    before = peak_memory()
    assert written(methods, tmp_path / "out")["peak_memory"] < before + 2**27


def test_a_ticket_is_trained_once_and_never_that_of_another_recipe(
    methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = written(methods, tmp_path / "out")
    monkeypatch.setattr(Lottery, "step", None)
    assert written(methods, tmp_path / "out") == seed
    name, common = methods.SUITES["digits"]
    monkeypatch.setitem(methods.SUITES, "digits", (name, (*common, "method.density=0.2")))
    with pytest.raises(FormatError, match=r"method.density \(0.2, there 0.1\)"):
        written(methods, tmp_path / "out")


def test_the_page_says_how_the_row_is_repeated(
    methods: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    seed = {"density": 0.1, "seconds_per_step": 0.001, "peak_memory": 2**28}
    found = {"test_accuracy": 0.9, "test_accuracy_spread": 0.0, "seeds": [seed], "changes": STATIC}
    record = {"machine": {"cpu": "a CPU"}, "digits": {methods.LOTTERY: found}}
    page = importlib.import_module("trainings")._methods(record, "digits")
    assert "python -m benchmarks.methods --only Lottery" in page
    assert "method.name=static" not in page
