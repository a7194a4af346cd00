"""Recipes: a training run as a file of TOML, which ``spfmt train`` runs and resumes bit for bit."""

from __future__ import annotations

import spfmt.torch as _torch  # noqa: F401 first: says what to install where torch is missing
from spfmt.recipes.data import DATA_SETS, Images, load_images
from spfmt.recipes.methods import METHODS
from spfmt.recipes.networks import NETWORKS
from spfmt.recipes.outputs import load_model
from spfmt.recipes.recipe import Recipe, load_recipe, read_recipe
from spfmt.recipes.run import Diverged, Progress
from spfmt.recipes.runner import SeedResult, Summary, Watcher, run_recipe

__all__ = [
    "DATA_SETS",
    "METHODS",
    "NETWORKS",
    "Diverged",
    "Images",
    "Progress",
    "Recipe",
    "SeedResult",
    "Summary",
    "Watcher",
    "load_images",
    "load_model",
    "load_recipe",
    "read_recipe",
    "run_recipe",
]
