"""The trained model as files, and reading it again."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from spfmt._files import replace_file
from spfmt.errors import MissingDependency, format_error
from spfmt.recipes.networks import build_network
from spfmt.recipes.recipe import Recipe
from spfmt.recipes.results import write_text
from spfmt.recipes.run import SeedRun
from spfmt.recipes.tables import Model
from spfmt.torch import sparsify_like

__all__ = ["check_installed", "dense_layers", "load_model", "write_outputs"]

MODEL, ONNX, LAYERS = "model.safetensors", "model.onnx", "layers.txt"

_ABOUT = "spfmt_recipe"  # the entry of the file's metadata
_NEEDS = {"onnx": ("onnx", "onnxscript"), "curves": ("matplotlib",)}


def check_installed(recipe: Recipe) -> None:
    """Say before the training, by a MissingDependency, what would be missing after it."""
    for key, modules in _NEEDS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing and getattr(recipe.output, key):
            raise MissingDependency(
                f"got output.{key} = true without {', '.join(missing)}; expected it installed; "
                f"fix: pip install 'spfmt[demo]', or --set output.{key}=false"
            )


def dense_layers(run: SeedRun) -> dict[str, str]:
    """Return the layers that run dense, and why."""
    report = None if run.method is None else run.method.report
    return {} if report is None else {row.name: row.reason for row in report.left}


def write_outputs(run: SeedRun, folder: Path) -> list[str]:
    """Write the layers, the model as safetensors and, where the recipe wants it, as ONNX.

    Returns
    -------
    list of str
        The names of the files.
    """
    write_text(folder / LAYERS, _layers(run))
    finish = getattr(run.method, "finish", None)
    if finish is not None:
        finish()
    _save(run, folder / MODEL)
    if not run.recipe.output.onnx:
        return [LAYERS, MODEL]
    from spfmt.onnx import export

    example = torch.zeros(2, *run.images.shape)
    target = folder / ONNX
    export(run.model, (example,), target, input_names=["images"], output_names=["logits"])
    return [LAYERS, MODEL, ONNX]


def _layers(run: SeedRun) -> str:
    if run.method is None:
        return "Every layer is dense: the recipe trains without a method.\n"
    return f"{run.method.report}\n\n{run.method.summary()}\n"


def _save(run: SeedRun, path: Path) -> None:
    from safetensors.torch import save

    state = {name: tensor.contiguous() for name, tensor in run.model.state_dict().items()}
    model, images = run.recipe.model, run.images
    about = {
        "network": {"name": model.name, "options": dict(model.options)},
        "shape": images.shape,
        "classes": images.classes,
        # A pixel p of channel c enters the network as (p / top - mean[c]) / std[c].
        "pixels": {"top": images.top, "mean": images.mean.tolist(), "std": images.std.tolist()},
        "recipe": run.recipe.to_toml(),
        "seed": run.seed,
    }
    # One entry: safetensors writes several in no certain order, and equal runs give equal files.
    replace_file(os.path.realpath(path), save(state, metadata={_ABOUT: json.dumps(about)}))


def load_model(path: str | os.PathLike[str]) -> nn.Module:
    """Read a model that a recipe trained, with its sparse layers.

    Parameters
    ----------
    path : path
        ``model.safetensors`` of a results directory.

    Returns
    -------
    nn.Module
        In evaluation mode.

    Raises
    ------
    FormatError
        For a file that is damaged or that no recipe wrote.
    OSError
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        raise FileNotFoundError(f"got no file {os.fspath(path)!r}; expected {MODEL} of a recipe")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        network = Model(about["network"]["name"], options=about["network"]["options"])
        model = build_network(network, tuple(about["shape"]), about["classes"])
        sparsify_like(model, state)
        model.load_state_dict(state)
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError,
            RuntimeError) as error:  # fmt: skip
        raise format_error(
            f"{os.fspath(path)!r}, which cannot be read ({error})",
            f"the {MODEL} of a recipe",
            "train again, or load it with safetensors and sparsify_like",
        ) from None
    return model.eval()
