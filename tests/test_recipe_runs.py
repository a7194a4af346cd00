"""Runs of recipes: results, resuming to the same bits, refusing what would spoil results."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")
if sys.version_info < (3, 11):
    pytest.skip("recipes need tomllib, which Python 3.11 brought", allow_module_level=True)

import torch
from fresh_python import run_python
from recipe_cases import TINY, metrics, recipe

import spfmt
from spfmt.cli import main
from spfmt.errors import FormatError, MissingDependency
from spfmt.recipes import (
    METHODS,
    Diverged,
    Progress,
    Recipe,
    Summary,
    Watcher,
    load_images,
    load_model,
    load_recipe,
    run_recipe,
)
from spfmt.recipes.batches import held_back
from spfmt.recipes.checkpoint import load_checkpoint, random_state, save_checkpoint
from spfmt.recipes.run import SeedRun, evaluate
from spfmt.torch import SparseModule

EXAMPLES = Path(__file__).resolve().parent.parent / "examples/recipes"


class Stopped(Exception):
    """What a watcher raises to end a run in its middle."""


class StopAfter(Watcher):
    """Ends a run after a step of a seed; everything before it has happened."""

    def __init__(self, step: int, seed: int = 0) -> None:
        self.at = (seed, step)

    def step(self, progress: Progress) -> None:
        if (progress.seed, progress.step) == self.at:
            raise Stopped


def run_stopped(found: Recipe, out: Path, *stops: int) -> Summary:
    """Stop a run after some steps, then let it end."""
    for stop in stops:
        with pytest.raises(Stopped):
            run_recipe(found, out, resume=True, watcher=StopAfter(stop))
    return run_recipe(found, out, resume=True)


def assert_same(one: Path, other: Path) -> None:
    """Two results directories hold the same weights and the same metrics, bit for bit."""
    for folder in sorted(p.name for p in one.glob("seed-*")):
        name = f"{folder}/model.safetensors"
        assert (one / name).read_bytes() == (other / name).read_bytes()
        assert metrics(one / folder) == metrics(other / folder)


def assert_gapless(lines: list[dict[str, Any]], steps: int, every: int) -> None:
    """Every step belongs to one line: none is missing and none is there twice."""
    found = [line["step"] for line in lines]
    assert found == sorted(set(found))
    assert set(found) >= {*range(every, steps + 1, every), steps}


# -------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Summary, Path]:
    """Two seeds of the tiny recipe with every output."""
    for module in ("onnx", "onnxscript", "matplotlib"):
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("runs") / "tiny"
    found = recipe("seeds=[3, 4]", "output.onnx=true", "output.curves=true", "train.steps=64")
    return run_recipe(found, out), out


def test_results_are_complete(done: tuple[Summary, Path]) -> None:
    _, out = done
    names = {"recipe.toml", "summary.json", "summary.txt", "curves.png", "seed-3", "seed-4"}
    assert {p.name for p in out.iterdir() if p.name[0] != "."} == names
    files = {"checkpoint.pt", "metrics.jsonl", "layers.txt", "model.safetensors", "model.onnx",
             "result.json"}  # fmt: skip
    assert {p.name for p in (out / "seed-3").iterdir()} == files
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_metrics_tell_every_step(done: tuple[Summary, Path]) -> None:
    summary, out = done
    lines = [json.loads(line) for line in (out / "seed-3/metrics.jsonl").read_text().splitlines()]
    assert_gapless(lines, 64, 4)
    per_epoch = -(-1437 // 48)
    assert [m["step"] for m in lines if m["test_accuracy"] is not None] == [30, 60, 64]
    for line in lines:
        assert line["epoch"] == round(line["step"] / per_epoch, 4)
        assert line["rate"] == 0.1
        assert 0 < line["seconds_per_step"] < 10
        assert 2**24 < line["peak_memory"] < 2**36
        assert abs(line["density"] - 0.25) < 0.02
    result = summary.seeds[0]
    assert result.updates == sum(line["updates"] for line in lines)
    assert 12 <= result.updates <= 15  # every 3 of 48 steps; the last drop too little to move any
    assert result.test_accuracy == lines[-1]["test_accuracy"] > 0.5
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_layers_that_run_dense_are_named(done: tuple[Summary, Path]) -> None:
    summary, out = done
    assert summary.seeds[0].dense_layers == {"output": "excluded"}
    assert "output ran dense: excluded" in (out / "summary.txt").read_text()
    layers = (out / "seed-3/layers.txt").read_text()
    assert "excluded" in layers
    assert "condensed" in layers
    assert f"64 steps, {summary.seeds[0].updates} updates" in layers


def test_summary_has_mean_and_spread(done: tuple[Summary, Path]) -> None:
    summary, out = done
    found = [seed.test_accuracy for seed in summary.seeds]
    assert summary.accuracy == (pytest.approx(np.mean(found)), pytest.approx(np.std(found, ddof=1)))
    mean, spread = summary.accuracy
    assert f"mean  {100 * mean:.2f} ± {100 * spread:.2f} %" in str(summary)
    kept = json.loads((out / "summary.json").read_text())
    assert (kept["test_accuracy"], kept["test_accuracy_spread"]) == (mean, spread)
    assert [seed["seed"] for seed in kept["seeds"]] == [3, 4]
    assert metrics(out / "seed-3") != metrics(out / "seed-4")


def test_saved_model_is_the_trained_one(done: tuple[Summary, Path]) -> None:
    summary, out = done
    model = load_model(out / "seed-4/model.safetensors")
    assert [type(m).__name__ for m in model.modules() if isinstance(m, SparseModule)] == [
        "SparseLinear", "SparseLinear",
    ]  # fmt: skip
    images = load_images(recipe().data)
    assert evaluate(model, held_back(images, 500))[1] == summary.seeds[1].test_accuracy


def test_onnx_gives_the_same_answers(done: tuple[Summary, Path]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    out = done[1] / "seed-4"
    x, _ = next(held_back(load_images(recipe().data), 50))
    session = runtime.InferenceSession(str(out / "model.onnx"))
    (logits,) = session.run(["logits"], {"images": x.numpy()})
    with torch.no_grad():
        want = load_model(out / "model.safetensors")(x).numpy()
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)


def test_recipe_in_the_results_repeats_them(done: tuple[Summary, Path], tmp_path: Path) -> None:
    changes = ["--set", "output.onnx=false", "--set", "output.curves=false"]
    args = ["train", str(done[1] / "recipe.toml"), "--out", str(tmp_path / "again"), "--quiet"]
    assert main([*args, *changes]) == 0
    for seed in (3, 4):
        assert metrics(done[1] / f"seed-{seed}") == metrics(tmp_path / f"again/seed-{seed}")


def test_density_has_a_curve_where_it_changes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from spfmt.recipes.curves import draw_curves

    line = {"epoch": 1.0, "loss": 1.0, "accuracy": 0.5, "test_loss": None, "density": 0.1}
    widths = []
    for density in (0.1, 0.2):
        draw_curves({0: [line, {**line, "epoch": 2.0, "density": density}]}, tmp_path / "c.png")
        widths.append(int.from_bytes((tmp_path / "c.png").read_bytes()[16:20], "big"))
    assert 2 * widths[1] == 3 * widths[0]


def test_damaged_models_are_refused(done: tuple[Summary, Path], tmp_path: Path) -> None:
    whole = (done[1] / "seed-3/model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors"):
        load_model(path)
    path.write_bytes(whole[:-7])
    with pytest.raises(FormatError, match="which cannot be read"):
        load_model(path)
    from safetensors.torch import save

    path.write_bytes(save({"a": torch.zeros(3)}))
    with pytest.raises(FormatError, match=r"expected the model.safetensors of a recipe"):
        load_model(path)
    about = {"network": {"name": "mlp", "options": {}}, "shape": [1, 8, 8], "classes": 10}
    for change in ({"network": {"name": "mlp", "options": 3}}, {"classes": -1}, {"shape": [1]}):
        metadata = {"spfmt_recipe": json.dumps({**about, **change})}
        path.write_bytes(save({"a": torch.zeros(3)}, metadata=metadata))
        with pytest.raises(FormatError, match=r"expected the model.safetensors of a recipe"):
            load_model(path)


# ------------------------------------------------------------------------------------- methods

OPTIONS: dict[str, tuple[str, ...]] = {
    "dsb": ("format.block_shape=[4, 4]",),
    "dnsb": ("format.block_shape=[4, 4]",),
    "ssb": ("format.block_shape=[4, 4]",),
    "rigl": ("format.name=nm", "format.m=8"),
    "set": ("format.name=hrbp", "format.groups=2"),
    "rewire": ('method.include=["*"]',),
}
"""What some methods get besides; others take their defaults."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_resumes(name: str, tmp_path: Path) -> None:
    without = ["method.delta_t"] if name == "rewire" else []  # it has another schedule
    found = recipe(f"method.name={name}", *OPTIONS.get(name, ()), without=without)
    whole = run_recipe(found, tmp_path / "whole")
    assert abs(whole.seeds[0].density - 0.25) < 0.05
    if name != "hrbp":  # whose blocks move where rows agree, which those of tiny layers seldom do
        assert (whole.seeds[0].updates > 1) == (name not in ("static", "ssb"))
    run_stopped(found, tmp_path / "stopped", 4, 8, 13, 20)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("scores", ["snip", "grasp"])
def test_runs_begin_where_saliency_says(scores: str, tmp_path: Path) -> None:
    found = recipe("method.name=static", f"method.scores={scores}", without=["method.delta_t"])
    whole = run_recipe(found, tmp_path / "whole")
    assert abs(whole.seeds[0].density - 0.25) < 0.01
    run_stopped(found, tmp_path / "stopped", 7)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    # Its own densities differ from those that ERK gives the same scores.
    spread = recipe("method.name=static", f"method.scores={scores}", "method.distribution=erk",
                    without=["method.delta_t"])  # fmt: skip
    run_recipe(spread, tmp_path / "erk")
    layers = [(tmp_path / name / "seed-0/layers.txt").read_text() for name in ("whole", "erk")]
    assert layers[0] != layers[1]


def test_dense_training_runs_and_resumes(tmp_path: Path) -> None:
    found = recipe("method.name=dense", "optimizer.name=adamw", "rate.name=cosine",
                   without=["method.density", "method.exclude", "method.delta_t"])  # fmt: skip
    whole = run_recipe(found, tmp_path / "whole")
    assert (whole.seeds[0].density, whole.seeds[0].updates) == (1.0, 0)
    run_stopped(found, tmp_path / "stopped", 11)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    assert "Every layer is dense" in (tmp_path / "whole/seed-0/layers.txt").read_text()


@pytest.fixture
def cifar(tmp_path: Path) -> str:
    """A directory with a few images in the files of CIFAR-10."""
    rng, folder = np.random.default_rng(0), tmp_path / "data/cifar10"
    folder.mkdir(parents=True)
    for name, n in (("train_0", 40), ("test", 10)):
        images = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(n) % 10)
    return str(tmp_path / "data")


def test_convolutions_with_augmentation_resume(cifar: str, tmp_path: Path) -> None:
    changes = ["data.name=cifar10", f"data.dir={cifar}", "data.augment=true", "model.name=resnet20",
               "model.width=0.5", "method.name=hrbp", "method.exclude=linear", "train.steps=8",
               "train.batch_size=16", "train.checkpoint_every=3"]  # fmt: skip
    found = recipe(*changes, without=["model.hidden"])
    run_recipe(found, tmp_path / "whole")
    run_stopped(found, tmp_path / "stopped", 2, 5, 7)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    random_crops = metrics(tmp_path / "whole/seed-0")
    plain = recipe(*changes, "data.augment=false", without=["model.hidden"])
    run_recipe(plain, tmp_path / "plain")
    assert metrics(tmp_path / "plain/seed-0") != random_crops


def test_gradients_are_clipped_and_labels_smoothed(tmp_path: Path) -> None:
    smooth = recipe(
        "train.label_smoothing=0.3", "train.steps=1", "method.t_end=5", "train.log_every=1"
    )
    run = SeedRun(smooth, load_images(smooth.data), 0)
    x, y = run.batches.take()
    want = torch.nn.CrossEntropyLoss(label_smoothing=0.3)(run.model(x), y).item()
    run_recipe(smooth, tmp_path / "smooth")
    assert metrics(tmp_path / "smooth/seed-0")[0]["loss"] == want
    clipped = recipe("train.clip_norm=1e-3", "optimizer.momentum=0.0")
    run = SeedRun(clipped, load_images(clipped.data), 0)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.step()
    moved = [(p - q).norm() for p, q in zip(run.model.parameters(), before, strict=True)]
    assert torch.stack(moved).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_a_run_ends_where_its_loss_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"loss of nan in step \d+ of seed 0; .*lower optimizer.lr"):
        run_recipe(recipe("optimizer.lr=1e30"), tmp_path / "out")
    with pytest.raises(Diverged, match="a test loss of nan in step 1"):  # after the last step
        run_recipe(recipe("optimizer.lr=1e30", "train.steps=1", "method.t_end=5"), tmp_path / "one")


def test_globals_are_left_as_they_were(tmp_path: Path) -> None:
    before, threads = random_state(), torch.get_num_threads()
    run_recipe(recipe("train.steps=2", "method.t_end=5"), tmp_path / "out")
    after = random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert torch.get_num_threads() == threads


# ------------------------------------------------------------------------------------- resuming


def test_finished_seeds_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = recipe("seeds=[0, 1]", "train.steps=6")
    with pytest.raises(Stopped):  # in the second seed's step 7, which never comes
        run_recipe(found, out, watcher=StopAfter(4, seed=1))
    first = (out / "seed-0/metrics.jsonl").stat().st_mtime_ns
    summary = run_recipe(found, out, resume=True)
    assert (out / "seed-0/metrics.jsonl").stat().st_mtime_ns == first
    assert [seed.steps for seed in summary.seeds] == [6, 6]
    assert str(run_recipe(found, out, resume=True)) == str(summary)  # nothing is left to do


def test_outputs_are_written_again(tmp_path: Path) -> None:
    class StopWriting(Watcher):
        def writing(self, progress: Progress) -> None:
            raise Stopped

    found = recipe("train.steps=10")
    with pytest.raises(Stopped):
        run_recipe(found, tmp_path / "out", watcher=StopWriting())
    assert not (tmp_path / "out/seed-0/result.json").exists()
    run_recipe(found, tmp_path / "out", resume=True)
    run_recipe(found, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "damaged"),
    [("model.safetensors", None), ("model.safetensors", b"nothing"), ("model.onnx", None),
     ("layers.txt", b"")],
)  # fmt: skip
def test_outputs_that_were_damaged_are_written_again(
    done: tuple[Summary, Path], tmp_path: Path, name: str, damaged: bytes | None
) -> None:
    summary, whole = done
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    found, path = load_recipe(out / "recipe.toml", ["output.curves=true"]), out / "seed-3" / name
    path.unlink() if damaged is None else path.write_bytes(damaged)
    stays = (out / "seed-4" / name).stat().st_mtime_ns
    assert str(run_recipe(found, out, resume=True)) == str(summary)
    assert (out / "seed-4" / name).stat().st_mtime_ns == stays
    assert_same(whole, out)
    if name == "model.onnx":
        pytest.importorskip("onnx").checker.check_model(str(path))
    else:
        assert path.read_bytes() == (whole / "seed-3" / name).read_bytes()
    path.unlink()
    (out / "seed-3/checkpoint.pt").unlink()  # the seed is not trained again unasked
    with pytest.raises(FormatError, match=rf"seed-3/{name}, which is missing or .*remove .*seed-3"):
        run_recipe(found, out, resume=True)
    assert not path.exists()


@pytest.mark.parametrize("damage", ["cut", "removed", "one letter", "more"])
def test_damaged_metrics_of_a_finished_seed_are_named(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "tiny.toml").write_text(TINY)
    args = ["train", str(tmp_path / "tiny.toml"), "--out", str(out), "--quiet"]
    assert main(args) == 0
    capsys.readouterr()
    path = out / "seed-0/metrics.jsonl"
    whole = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        damages = {"cut": whole[:-9], "one letter": b"[" + whole[1:], "more": whole + b"{"}
        path.write_bytes(damages[damage])
    assert main([*args, "--resume"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "seed-0/metrics.jsonl, which is missing or not what the run wrote" in printed.err
    assert path.exists() == (damage != "removed")
    shutil.rmtree(out / "seed-0")  # as it says
    assert main([*args, "--resume"]) == 0
    assert [line.keys() for line in metrics(out / "seed-0")]


def test_a_damaged_line_of_metrics_is_named(stopped: Path) -> None:
    path = stopped / "seed-0/metrics.jsonl"
    path.write_bytes(b"[" + path.read_bytes()[1:])
    with pytest.raises(
        FormatError, match=r"a damaged line 1 of .*metrics.jsonl \(.*restore it, or"
    ):
        run_recipe(recipe(), stopped, resume=True)


def test_results_of_another_recipe_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_recipe(recipe(), out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for resume in (False, True):
        with pytest.raises(FormatError, match=r"method.density \(0.5, there 0.25\), optimizer.lr"):
            run_recipe(recipe("method.density=0.5", "optimizer.lr=0.2"), out, resume=resume)
    with pytest.raises(FormatError, match=r"results of this recipe; .*add --resume"):
        run_recipe(recipe(), out)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_recipe_that_cannot_run_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FormatError, match="names no layer"):
        run_recipe(recipe("method.exclude=nothing"), out)
    run_recipe(recipe("train.steps=2", "method.t_end=5"), out)  # the directory is still free


def test_foreign_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FormatError, match=r"which holds thesis.tex and no recipe.toml"):
        run_recipe(recipe(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(FormatError, match="which is a file; expected a folder"):
        run_recipe(recipe(), tmp_path / "thesis.tex")
    other = tmp_path / "other"
    other.mkdir()
    (other / "recipe.toml").write_text("seeds = ")
    with pytest.raises(FormatError, match=r"a damaged .*recipe.toml"):
        run_recipe(recipe(), other)


def test_one_process_trains_in_a_directory(tmp_path: Path) -> None:
    class Second(Watcher):
        def step(self, progress: Progress) -> None:
            run_recipe(recipe(), tmp_path / "out", resume=True)

    with pytest.raises(FormatError, match="in which another process trains"):
        run_recipe(recipe(), tmp_path / "out", watcher=Second())


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A results directory of a run that was stopped after its first checkpoint."""
    with pytest.raises(Stopped):
        run_recipe(recipe(), tmp_path / "out", watcher=StopAfter(9))
    return tmp_path / "out"


def test_a_damaged_checkpoint_is_named(stopped: Path) -> None:
    path = stopped / "seed-0/checkpoint.pt"
    whole = path.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    for damaged in (b"", b"nothing", whole[:half], whole[:-30], flipped):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"checkpoint.pt, which cannot be read"):
            run_recipe(recipe(), stopped, resume=True)
    path.write_bytes(whole)
    save_checkpoint(path, load_checkpoint(path))
    state = load_checkpoint(path)
    torch.save({**state, "version": 99}, path)
    with pytest.raises(FormatError, match=r"of version 99; expected version 1; fix: upgrade"):
        run_recipe(recipe(), stopped, resume=True)


def test_checkpoints_cannot_run_code(stopped: Path) -> None:
    path = stopped / "seed-0/checkpoint.pt"
    torch.save({"version": 1, "run": Stopped()}, path)
    with pytest.raises(FormatError, match=r"checkpoint.pt, which cannot be read"):
        run_recipe(recipe(), stopped, resume=True)


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    found, out = recipe("train.steps=2", "method.t_end=5"), tmp_path / "out"
    summary = run_recipe(found, out)
    for damaged in ("{", "{}", "[]"):
        (out / "seed-0/result.json").write_text(damaged)
        with pytest.raises(FormatError, match=r"a damaged .*result.json"):
            run_recipe(found, out, resume=True)
    (out / "seed-0/result.json").unlink()
    assert run_recipe(found, out, resume=True).accuracy == summary.accuracy


def test_missing_metrics_are_noticed(stopped: Path) -> None:
    (stopped / "seed-0/metrics.jsonl").write_bytes(b"")
    with pytest.raises(FormatError, match=r"metrics.jsonl of 0 bytes; expected the \d+ that"):
        run_recipe(recipe(), stopped, resume=True)


def test_other_data_is_noticed(cifar: str, tmp_path: Path) -> None:
    changes = ["data.name=cifar10", f"data.dir={cifar}", "train.steps=4", "method.delta_t=1",
               "train.checkpoint_every=1"]  # fmt: skip
    with pytest.raises(Stopped):
        run_recipe(recipe(*changes), tmp_path / "out", watcher=StopAfter(3))
    seeds = recipe(*changes, "seeds=[0, 1]")
    with pytest.raises(Stopped):
        run_recipe(seeds, tmp_path / "seeds", watcher=StopAfter(1, seed=1))
    path = Path(cifar) / "cifar10/test.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["labels"] = (arrays["labels"] + 1) % 10
    np.savez(path, **arrays)
    for found, out in ((recipe(*changes), "out"), (seeds, "seeds")):
        with pytest.raises(FormatError, match="other images than those"):
            run_recipe(found, tmp_path / out, resume=True)


def test_threads_of_the_run_are_kept(tmp_path: Path) -> None:
    found = recipe(without=["train.threads"])
    seen = []

    class Looks(StopAfter):
        def step(self, progress: Progress) -> None:
            seen.append(torch.get_num_threads())
            super().step(progress)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(Stopped):
            run_recipe(found, tmp_path / "out", watcher=Looks(7))
        torch.set_num_threads(1)
        run_recipe(found, tmp_path / "out", resume=True, watcher=Looks(-1))
    finally:
        torch.set_num_threads(threads)
    assert set(seen) == {2}


def test_missing_packages_are_named_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for key, package in (("onnx", "onnx, onnxscript"), ("curves", "matplotlib")):
        said = f"output.{key} = true without {package}.*--set output.{key}=false"
        with pytest.raises(MissingDependency, match=said):
            run_recipe(recipe(f"output.{key}=true"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- kill -9

# Imports once, then forks a process for every line of arguments: ten starts of torch would take
# longer than all they do. The forked ones are processes like any other, and are killed like them.
SPAWNER = """
import os, sys
from spfmt.cli import main
from spfmt.recipes import load_images, load_recipe
from spfmt.recipes.run import SeedRun
recipe = load_recipe(sys.argv[1])
SeedRun(recipe, load_images(recipe.data), 0)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        os._exit(main(line.split()))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Spawner:
    """Starts runs in processes of their own."""

    def __init__(self, recipe: Path, errors: Path) -> None:
        place = os.pathsep.join([str(Path(spfmt.__file__).parent.parent), *sys.path])
        env = {**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"}
        with errors.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", SPAWNER, str(recipe)], env=env, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, cwd=recipe.parent,
            )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, *args: str) -> int:
        """Start a run and return the number of its process."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(args) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """Return the exit code of the run, below zero for the signal that ended it."""
        return int(self._line())

    def close(self) -> None:
        """End the process that starts others; they have ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture
def spawner(tmp_path: Path) -> Iterator[Spawner]:
    (tmp_path / "recipe.toml").write_text(TINY)
    found = Spawner(tmp_path / "recipe.toml", tmp_path / "errors")
    yield found
    found.close()


def test_kill_9_at_any_moment_changes_nothing(spawner: Spawner, tmp_path: Path) -> None:
    changes = ["seeds=[0,1]", "model.hidden=[128,128]", "train.steps=300", "method.delta_t=7",
               "optimizer.name=adamw", "optimizer.lr=0.002", "rate.name=cosine"]  # fmt: skip
    train = ["train", str(tmp_path / "recipe.toml"), "--quiet", "--resume"]
    train += [part for change in changes for part in ("--set", change)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    spawner.start(*train, "--out", str(whole))
    assert spawner.wait() == 0, (tmp_path / "errors").read_text()
    seconds = time.monotonic() - started

    moments = random.Random(9)
    for _ in range(10):
        child = spawner.start(*train, "--out", str(killed))
        time.sleep(moments.uniform(0, 0.17 * seconds))
        os.kill(child, signal.SIGKILL)
        assert spawner.wait() == -signal.SIGKILL
    assert (killed / "seed-0/checkpoint.pt").exists()  # some were killed in their midst,
    assert not (killed / "seed-1/result.json").exists()  # and work was left
    spawner.start(*train, "--out", str(killed))
    assert spawner.wait() == 0, (tmp_path / "errors").read_text()
    assert_same(whole, killed)
    for seed in (0, 1):
        assert_gapless(metrics(killed / f"seed-{seed}"), 300, 4)
    assert not list(killed.rglob("*.tmp"))


# ------------------------------------------------------------------------------ the command line


def test_command_line_shows_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    args = ["train", str(path), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "s.json")]
    assert main([*args, "--set", "train.steps=30"]) == 0
    printed = capsys.readouterr()
    assert "seed 0 begins: 30 steps, density 0.2" in printed.err
    assert "output runs dense: excluded" in printed.err
    assert "seed 0, epoch 1/1, 0:00 left: loss " in printed.err
    assert " steps/s" in printed.err
    assert printed.out.startswith("seed  test accuracy")
    assert f"Results are in {tmp_path / 'out'}." in printed.out
    kept = json.loads((tmp_path / "s.json").read_text())
    assert kept == json.loads((tmp_path / "out/summary.json").read_text())
    assert main([*args, "--set", "train.steps=30", "--resume", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import spfmt.recipes

    class Interrupts(Watcher):
        def step(self, progress: Progress) -> None:
            raise KeyboardInterrupt

    def interrupted(found: Recipe, out: Path, **options: Any) -> Summary:
        return run_recipe(found, out, watcher=Interrupts())

    (tmp_path / "tiny.toml").write_text(TINY)
    args = ["train", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out"), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(spfmt.recipes, "run_recipe", interrupted)
        assert main(args) == 130
    assert capsys.readouterr().err == f"spfmt: stopped; --resume --out {tmp_path}/out goes on\n"
    assert main([*args, "--resume"]) == 0


def test_command_line_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    for args, code, said in (
        (["none.toml"], 2, "none.toml"),
        (["tiny.toml", "--set", "data.name=mnst"], 2, "did you mean 'mnist'"),
        (["tiny.toml", "--set", "data.name=mnist", "--data", "nowhere"], 2, "directory nowhere"),
        (["tiny.toml", "--json", "nowhere/s.json"], 2, "existing directory"),
        (["tiny.toml", "--set", "optimizer.lr=1e30", "--quiet"], 1, "expected a number"),
    ):
        assert main(["train", *args]) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert said in printed.err
        assert printed.err.count("\n") == 1
    assert (tmp_path / "runs/tiny/recipe.toml").exists()  # where results are by default


def test_command_line_says_that_torch_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    code = f"""
import sys
sys.modules["torch"] = None
from spfmt.cli import main
sys.exit(main(["train", {str(tmp_path / "tiny.toml")!r}]))
"""
    found = run_python(code)
    assert found.returncode == 2
    assert found.stderr.startswith("spfmt: error: spfmt.torch needs torch, which is not installed")
    assert found.stderr.count("\n") == 1


def test_lines_stand_in_for_a_bar_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from spfmt.cli import _train_progress as progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with progress.watcher(recipe()) as found:
        assert type(found) is progress._Lines
    with progress.watcher(recipe(), quiet=True) as found:
        assert type(found) is Watcher


def test_bar_shows_every_number(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("rich")
    from spfmt.cli._train_progress import _Bar

    class Reporter:
        def __init__(self) -> None:
            self.said: list[str] = []
            self.amount = 0.0

        def doing(self, text: str) -> None:
            self.said.append(text)

        def done(self, text: str) -> None:
            self.said.append(text)

        def step(self, amount: float = 1.0) -> None:
            self.amount += amount

    reporter = Reporter()
    found = recipe("seeds=[0, 1]", "train.steps=30")
    run_recipe(found, tmp_path / "out", watcher=_Bar(reporter))  # type: ignore[arg-type]
    assert reporter.amount == pytest.approx(2)
    last = [text for text in reporter.said if "accuracy" in text and "left" in text][-1]
    for part in ("seed 1, epoch 1/1", "loss ", "accuracy ", "density 0.2", "steps/s", "left"):
        assert part in last


def test_digits_example_learns(tmp_path: Path) -> None:
    for module in ("onnx", "onnxscript", "matplotlib"):
        pytest.importorskip(module)
    out, recipe = tmp_path / "digits", str(EXAMPLES / "digits-srigl.toml")
    assert main(["train", recipe, "--out", str(out), "--quiet", "--set", "seeds=0"]) == 0
    kept = json.loads((out / "summary.json").read_text())
    assert kept["test_accuracy"] > 0.95
    assert all(abs(seed["density"] - 0.1) < 0.01 for seed in kept["seeds"])
