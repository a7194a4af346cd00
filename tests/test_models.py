"""The papers' networks: published sizes, shapes, tracing, options, trained weights."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fresh_python import run_python

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from spfmt import models  # noqa: E402
from spfmt.errors import FormatError  # noqa: E402
from spfmt.models.resnet import PaddedIdentity, cifar_resnet  # noqa: E402
from spfmt.models.wide_resnet import wide_resnet  # noqa: E402

NAMES = models.__all__
TABLE = dict(
    (name, (float(size), float(work)))
    for name, size, work in re.findall(
        r"^`(\w+)` +([\d.]+) M +([\d.]+) M", models.__doc__ or "", re.M
    )
)


@pytest.fixture(params=NAMES)
def make(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    return getattr(models, request.param)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def settled(model: nn.Module) -> nn.Module:
    """Give batch norms the statistics of some images, so that outputs are far from 0 and inf."""
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 32, 32))
    return model.eval()


# ------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (models.resnet18, 11_173_962),
        (models.resnet20, 269_722),
        (models.resnet32, 464_154),
        (partial(models.resnet20, shortcut="B"), 272_474),
        (partial(cifar_resnet, 56), 853_018),
        (partial(cifar_resnet, 110), 1_727_962),
        (models.wide_resnet22_2, 1_079_642),
        (partial(wide_resnet, 28, 10), 36_479_194),
        (models.vgg16, 14_728_266),
        (models.vgg19, 20_040_522),
        (models.mobilenet_v2, 2_296_922),
        (partial(models.mobilenet_v2, variant="paper", num_classes=1000), 3_504_872),
        # DeiT-Tiny has 5 717 416; here no class token and no position of it.
        (
            partial(models.vit_tiny, image_size=224, patch_size=16, num_classes=1000),
            5_717_416 - 2 * 192,
        ),
    ],
)
def test_parameters_are_as_published(build: Callable[..., nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        assert size(build()) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_true(name: str) -> None:
    assert set(TABLE) == set(NAMES)
    counter = FlopCounterMode(display=False)
    # As matrix products, which the counter knows.
    with torch.device("meta"), counter, sdpa_kernel(SDPBackend.MATH):
        model = getattr(models, name)().eval()
        model(torch.zeros(1, 3, 32, 32))
    work = counter.get_total_flops() / 2
    assert TABLE[name] == (round(size(model) / 1e6, 2), round(work / 1e6, 1))


# ------------------------------------------------------------------------------------ forward


@pytest.mark.parametrize("pixels", [(32, 32), (64, 64), (64, 32)])
def test_shapes(make: Callable[..., nn.Module], pixels: tuple[int, int]) -> None:
    with torch.device("meta"):
        assert make()(torch.zeros(2, 3, *pixels)).shape == (2, 10)
        model = make(num_classes=7, in_channels=1)
        assert model(torch.zeros(2, 1, *pixels)).shape == (2, 7)


def test_outputs_and_gradients_are_finite(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 3, 32, 32)
    y = model(x)
    assert y.shape == (4, 10)
    nn.functional.cross_entropy(y, torch.arange(4)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        # Biases of keys, and those before a batch norm, change nothing.
        assert p.ndim == 1 or p.grad.any(), name


def test_modules_are_plain_and_not_in_place(make: Callable[..., nn.Module]) -> None:
    for module in make().modules():
        assert type(module).__module__.startswith(("torch.nn.", "spfmt.models."))
        assert not getattr(module, "inplace", False)


def test_images_stay_as_they_were(make: Callable[..., nn.Module]) -> None:
    x = torch.randn(2, 3, 32, 32)
    before = x.clone()
    make()(x)
    assert torch.equal(x, before)


def test_shortcut_without_weights_pads_on_both_sides() -> None:
    x = torch.arange(2 * 3 * 3.0).reshape(1, 2, 3, 3)
    y = PaddedIdentity(2, 5, 2)(x)
    assert y.shape == (1, 5, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3, 4]].any()


def test_attention_is_that_of_torch() -> None:
    ours = models.vit_tiny(depth=1, dim=24, heads=3).blocks[0].attention
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias.normal_() for p in projections]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x = torch.randn(2, 16, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_positions_of_other_sizes_are_interpolated() -> None:
    model = models.vit_tiny(depth=1, dim=24).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.positions.copy_(torch.randn(1, 24, 1, 1))  # the same everywhere
        larger = models.vit_tiny(depth=1, dim=24, image_size=64).eval()
        weights = model.state_dict()
        weights["positions"] = weights["positions"][:, :, :1, :1].expand(1, 24, 16, 16)
        larger.load_state_dict(weights)
        torch.testing.assert_close(model(x), larger(x))


def test_convolutions_start_scaled_by_fan_out() -> None:
    torch.manual_seed(0)
    for model in (models.resnet18(), models.mobilenet_v2()):
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
                weight = module.weight.detach()
                fan_out = weight[:, 0].numel() / module.groups
                expected = (2 / fan_out) ** 0.5
                # The standard error of a standard deviation; 5 of them are 1 in a million.
                error = expected / (2 * weight.numel()) ** 0.5
                assert abs(float(weight.std()) - expected) < 5 * error


# ------------------------------------------------------------------------------------ tracing


def test_export_with_any_batch(make: Callable[..., nn.Module]) -> None:
    model = settled(make())
    example, x = torch.randn(2, 3, 32, 32), torch.randn(5, 3, 32, 32)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def test_symbolic_trace(make: Callable[..., nn.Module]) -> None:
    model = settled(make())
    traced, x = torch.fx.symbolic_trace(model), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x))


def test_import_needs_torch_alone() -> None:
    code = (
        "import sys, spfmt.models\n"
        "bad = {'spfmt.torch', 'spfmt.train', 'spfmt.onnx', 'torchvision'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    assert run_python(code).stdout.strip() == "[]"
    missing = run_python("import sys; sys.modules['torch'] = None; import spfmt.models")
    assert "MissingDependency" in missing.stderr
    assert "pip install 'spfmt[torch]'" in missing.stderr


# ------------------------------------------------------------------------------------ options


def test_options_are_keywords(make: Callable[..., nn.Module]) -> None:
    for parameter in inspect.signature(make).parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty


@pytest.mark.parametrize(
    "name", [n for n in NAMES if "width" in inspect.signature(getattr(models, n)).parameters]
)
def test_width_scales_channels(name: str) -> None:
    make = getattr(models, name)
    with torch.device("meta"):
        narrow, usual, wide = (
            [m.out_channels for m in make(width=w).modules() if isinstance(m, nn.Conv2d)]
            for w in (0.5, 1, 2)
        )
        assert wide == [2 * c for c in usual]
        assert all(c % 8 == 0 and c >= n >= 0.45 * c for c, n in zip(usual, narrow, strict=True))
        assert make(width=0.01)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_dropout_of_wide_resnets() -> None:
    model = models.wide_resnet22_2(dropout=0.3)
    assert sum(isinstance(m, nn.Dropout) and m.p == 0.3 for m in model.modules()) == 9
    assert not any(isinstance(m, nn.Dropout) for m in models.wide_resnet22_2().modules())


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (models.resnet20, {"num_classes": 0}, "num_classes=0"),
        (models.resnet18, {"in_channels": 2.0}, r"in_channels=2\.0"),
        (models.resnet20, {"width": 0}, "width=0"),
        (models.vgg16, {"width": float("nan")}, "width=nan"),
        (models.vgg19, {"width": "2"}, "width='2'"),
        (models.resnet32, {"shortcut": "C"}, "shortcut='C'"),
        (cifar_resnet, {"depth": 22}, r"depth=22.*6 n \+ 2"),
        (wide_resnet, {"depth": 20, "width": 2}, r"depth=20.*6 n \+ 4"),
        (models.wide_resnet22_2, {"dropout": 1}, "dropout=1"),
        (models.mobilenet_v2, {"variant": "v3"}, "variant='v3'"),
        (models.vit_tiny, {"patch_size": 5}, "patch_size that divides image_size"),
        (models.vit_tiny, {"heads": 5}, "heads that divides dim"),
        (models.vit_tiny, {"depth": 0}, "depth=0"),
    ],
)
def test_wrong_options(build: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=rf"got .*{message}.*fix: "):
        build(**options)


def test_images_that_patches_do_not_fill() -> None:
    with pytest.raises(FormatError, match=r"32 x 30.*patch_size=4.*pad or crop"):
        models.vit_tiny(depth=1)(torch.zeros(1, 3, 32, 30))


# ------------------------------------------------------------------------------ trained weights


def data(name: str) -> dict[str, np.ndarray]:
    """Arrays of an .npz file of the data directory, or skip."""
    directory = os.environ.get("SPFMT_DATA", "")
    if not directory:
        pytest.skip("SPFMT_DATA names no directory with real data")
    path = Path(directory) / name
    if not path.exists():
        pytest.skip(f"SPFMT_DATA has no {name}")
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def test_trained_resnet20_is_as_good_as_documented() -> None:
    weights, test = data("cifar10_resnet20_weights.npz"), data("cifar10/test.npz")
    model = models.resnet20().to(memory_format=torch.channels_last).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    x = torch.from_numpy(test["images"]).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    with torch.no_grad():
        outputs = torch.cat([model((part - mean) / std) for part in x.split(50)])
    # Of no image do the best two classes lie within 0.002, so rounding changes no answer.
    assert int((outputs.argmax(1).numpy() == test["labels"]).sum()) == 9173
