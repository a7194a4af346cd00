"""2:4 layers as torch's semi-structured ones: which are taken, and what the others say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from spfmt.formats import CSR  # noqa: E402
from spfmt.torch import SparseLinear, semi_structured, to_semi_structured  # noqa: E402


def model(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    options = {"format": "nm", "n": 2, "m": 4, **options}
    return nn.Sequential(SparseLinear(64, 32, **options), nn.ReLU(), nn.Linear(32, 32))


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Pretend that layers are on a device; what torch is given is kept, and stays dense."""
    given: list[Any] = []

    def kept(weight: Any) -> Any:
        if weight.shape[0] % 32:
            raise RuntimeError("Error original_tensor.shape is not supported!\\nmore")
        given.append(weight)
        return weight

    monkeypatch.setattr(semi_structured, "_is_on_device", lambda layer: True)
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", kept)
    return given


def test_two_of_four_are_taken(there: list[Any]) -> None:
    network = model().bfloat16()
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    dense = network[0].to_dense().weight
    report = to_semi_structured(network)
    assert [layer.name for layer in report.taken] == ["0"]
    assert report["0"].format == "nm"
    assert report["2"].reason == "no SparseLinear"
    assert torch.equal(there[0], dense)
    assert type(network[0]) is nn.Linear
    assert not network[0].weight.requires_grad
    assert network(x).shape == (8, 32)


def test_any_format_that_keeps_two_of_four(there: list[Any]) -> None:
    pattern = np.tile([1.0, 0.0, 0.0, 2.0], (32, 16)).astype(np.float32)
    layer = SparseLinear.from_tensor(CSR.from_dense(pattern)).bfloat16()
    assert to_semi_structured(nn.Sequential(layer)).taken
    pattern[5, 4:7] = 1
    layer = SparseLinear.from_tensor(CSR.from_dense(pattern)).bfloat16()
    (row,) = to_semi_structured(nn.Sequential(layer)).left
    assert "more than two of four" in row.reason


def test_the_others_say_why(there: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cast the model" in to_semi_structured(model())["0"].reason
    assert "nn.Sequential" in to_semi_structured(model()[0].bfloat16()).left[0].reason
    odd = nn.Sequential(SparseLinear(64, 33, format="nm", n=2, m=4)).bfloat16()
    assert to_semi_structured(odd).left[0].reason.startswith("Error original_tensor.shape")
    assert isinstance(odd[0], SparseLinear)
    narrow = nn.Sequential(SparseLinear(6, 32, format="csr", density=0.2)).bfloat16()
    assert "6 columns are no multiple" in to_semi_structured(narrow).left[0].reason
    monkeypatch.undo()
    assert "on cpu" in to_semi_structured(model().bfloat16())["0"].reason


@pytest.mark.cuda
@pytest.mark.usefixtures("device")
def test_products_on_a_device() -> None:
    network = model().cuda().bfloat16()
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        want = network(x)
        assert to_semi_structured(network).taken
        torch.testing.assert_close(network(x), want, rtol=2e-2, atol=2e-2)
