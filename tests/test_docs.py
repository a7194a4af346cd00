"""README code runs, generated tables are current, links lead somewhere, names have docs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from fresh_python import run_python

import spfmt

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("cuda/*.md")])
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_readme_examples_run(code: str) -> None:
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_readme_tables_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    generate = importlib.import_module("generate")
    assert generate.readme() == generate.README.read_text(), "run: python docs/generate.py"
    assert generate.convolution() == generate.CONVOLUTION.read_text(), (
        "run: python docs/generate.py"
    )
    assert generate.training() == generate.TRAINING.read_text(), "run: python docs/generate.py"
    assert generate.benchmarks() == generate.PAGE.read_text(), "run: python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
    for path in re.findall(
        r"`((?:spfmt|cpp|bindings|tests|docs|benchmarks)/[\w./-]+)`", page.read_text()
    ):
        assert (ROOT / path).exists(), path


def modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(spfmt.__path__, "spfmt."):
        last = info.name.rpartition(".")[2]
        if not last.startswith(("_", "libspfmt")):
            yield importlib.import_module(info.name)


MODULES = [spfmt, *modules()]


def public(owner: object, module: str) -> Iterator[tuple[str, object]]:
    """Functions, classes and methods that a module defines under public names."""
    for name, value in vars(owner).items():
        value = getattr(value, "__func__", value)  # class methods
        value = value.fget if isinstance(value, property) else value
        if name.startswith("_") or getattr(value, "__module__", None) != module:
            continue
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            yield name, value
            yield from public(value, module)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_public_names_have_docstrings(module: ModuleType) -> None:
    assert module.__doc__
    for name, value in public(module, module.__name__):
        assert inspect.getdoc(value), f"{module.__name__}.{name}"


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_docstring_examples(module: ModuleType) -> None:
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
