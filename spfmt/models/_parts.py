"""What the networks share: checks of options, widths, convolutions, the head, initial weights."""

from __future__ import annotations

import math
from collections import OrderedDict
from numbers import Real

from torch import nn

from spfmt.errors import format_error
from spfmt.structure._checks import as_int

__all__ = ["check_sizes", "conv", "head", "network", "scaled"]


def check_sizes(**sizes: int) -> None:
    """Raise FormatError unless every option is a positive integer."""
    for name, size in sizes.items():
        as_int(name, size, 1)


def scaled(channels: int, width: float) -> int:
    """Channels of a layer in a network that is `width` times as wide.

    The nearest multiple of 8 that loses at most a tenth, as in the code of MobileNetV2; a width of
    1 changes nothing.
    """
    if not isinstance(width, Real) or not 0 < width <= 64:
        raise format_error(
            f"width={width!r}",
            "a factor in (0, 64] for the numbers of channels",
            "1 is the published network, 0.5 has half of its channels",
        )
    exact = float(channels * width)
    near = max(8, int(exact + 4) // 8 * 8)
    return near if near >= 0.9 * exact else near + 8


def conv(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Convolution without bias, for a batch norm follows; stride 1 keeps the size of the image."""
    return nn.Conv2d(
        in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
    )


def head(channels: int, num_classes: int) -> dict[str, nn.Module]:
    """Global average, so that images may have any size, and one linear layer."""
    return {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "linear": nn.Linear(channels, num_classes),
    }


def network(**children: nn.Module) -> nn.Sequential:
    """Chain named modules; convolutions start normal, scaled by fan-out (He et al. 2015)."""
    model = nn.Sequential(OrderedDict(children))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # Not nn.init.kaiming_normal_: it takes all channels for the fan-out of a depthwise
            # kernel, which feeds only its own.
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
