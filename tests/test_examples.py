"""Every example runs from start to end, and says what it set out to say."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh_python import run_python

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NEEDS = {
    "convert_formats": ("scipy", "sklearn", "torch"),
    "train_set": ("torch", "sklearn"),
    "deploy_onnx": ("torch", "onnx", "onnxscript", "onnxruntime"),
    "keep_pretrained": ("torch",),
}
SAYS = {
    "convert_formats": "to csr: exact",
    "train_set": "13 updates",
    "deploy_onnx": "with our library: ['ListsLinearGelu', 'ListsLinear']",
    "keep_pretrained": "same outputs",
}


def test_every_example_is_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS) == set(SAYS)


@pytest.mark.parametrize("name", NEEDS)
def test_example_runs(name: str) -> None:
    for module in NEEDS[name]:
        pytest.importorskip(module)
    done = run_python((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
