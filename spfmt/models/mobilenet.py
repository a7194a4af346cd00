"""MobileNetV2 for CIFAR: inverted residuals with depthwise convolutions."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from spfmt.models._parts import check_sizes, conv, head, network, scaled
from spfmt.structure._checks import as_choice

__all__ = ["InvertedResidual", "mobilenet_v2"]

Variant = Literal["cifar", "paper"]

# Expansion, channels, blocks, stride (table 2). The stem and the second row have stride 1 instead
# of 2: an image of 32 pixels ends with 4.
_ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _activation(variant: Variant) -> nn.Module:
    return nn.ReLU() if variant == "cifar" else nn.ReLU6()


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter each channel, and project without activation.

    Parameters
    ----------
    in_channels, out_channels : int
        Of the block.
    expansion : int
        Channels of the depthwise convolution over `in_channels`.
    stride : int
        Of the depthwise convolution; a block of stride 2 has no shortcut.
    variant : {"cifar", "paper"}
        See `mobilenet_v2`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, stride: int, variant: Variant
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = nn.Sequential()
        if expansion > 1 or variant == "cifar":
            self.expand.append(conv(in_channels, hidden, 1))
            self.expand.append(nn.BatchNorm2d(hidden))
            self.expand.append(_activation(variant))
        self.depthwise = nn.Sequential(
            conv(hidden, hidden, 3, stride, groups=hidden),
            nn.BatchNorm2d(hidden),
            _activation(variant),
        )
        self.project = nn.Sequential(conv(hidden, out_channels, 1), nn.BatchNorm2d(out_channels))
        self.shortcut: nn.Module | None = None
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif stride == 1 and variant == "cifar":
            projection = conv(in_channels, out_channels, 1)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return y if self.shortcut is None else y + self.shortcut(x)


def mobilenet_v2(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    variant: Variant = "cifar",
) -> nn.Module:
    """MobileNetV2 whose stem and second row of blocks keep the size of the image.

    Parameters
    ----------
    num_classes, in_channels : int
        Outputs, and channels of the images.
    width : float
        Factor for the channels of all layers, rounded to multiples of 8; the last convolution
        never has less than 1280 (section 6.1).
    variant : {"cifar", "paper"}
        Blocks as in the code that most work on CIFAR uses: ReLU, a 1x1 convolution in the shortcut
        where only the channels change, and an expansion by 1. Or as in the paper: ReLU6, a
        shortcut only where nothing changes, no expansion by 1.

    Returns
    -------
    nn.Module
        Maps images (N, in_channels, H, W) to (N, num_classes).

    Raises
    ------
    FormatError
        Where an option is out of its range.

    References
    ----------
    Sandler et al., *MobileNetV2: Inverted Residuals and Linear Bottlenecks*, CVPR 2018, table 2.
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels)
    as_choice(variant, "variant", ("cifar", "paper"))
    first = channels = scaled(32, width)
    blocks = nn.Sequential()
    for expansion, base, count, stride in _ROWS:
        for i in range(count):
            out_channels = scaled(base, width)
            step = 1 if i else stride
            blocks.append(InvertedResidual(channels, out_channels, expansion, step, variant))
            channels = out_channels
    last = scaled(1280, max(1.0, width))
    return network(
        conv1=conv(in_channels, first, 3),
        bn1=nn.BatchNorm2d(first),
        relu1=_activation(variant),
        blocks=blocks,
        conv2=conv(channels, last, 1),
        bn2=nn.BatchNorm2d(last),
        relu2=_activation(variant),
        **head(last, num_classes),
    )
