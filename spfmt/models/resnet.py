"""ResNets for CIFAR: the narrow ones of the paper, and ResNet-18 with a stem for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from spfmt.errors import format_error
from spfmt.models._parts import check_sizes, conv, head, network, scaled
from spfmt.structure._checks import as_choice, as_int

__all__ = ["BasicBlock", "PaddedIdentity", "cifar_resnet", "resnet18", "resnet20", "resnet32"]

Shortcut = Literal["A", "B"]


class PaddedIdentity(nn.Module):
    """Shortcut without weights: every `stride`-th pixel, and zeros for the channels that are new.

    He et al. do not say where the zeros are; half of them come first, as the weights were trained.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        new = out_channels - in_channels
        self.stride = stride
        self.before, self.after = new // 2, new - new // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"stride={self.stride}, zeros={self.before} + {self.after}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., figure 2).

    Parameters
    ----------
    in_channels, out_channels, stride : int
        Of the first convolution.
    shortcut : {"A", "B"}
        Where the shape changes: identity padded with zeros, or a 1x1 convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if shortcut == "B" and (stride > 1 or in_channels != out_channels):
            projection = conv(in_channels, out_channels, 1, stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))
        elif stride > 1 or in_channels != out_channels:
            self.shortcut = PaddedIdentity(in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = y + self.shortcut(x)
        return self.relu2(y)  # type: ignore[no-any-return]


def _resnet(
    blocks: int,
    widths: Sequence[int],
    *,
    num_classes: int,
    in_channels: int,
    shortcut: Shortcut,
) -> nn.Sequential:
    """Stages of `blocks` blocks each; all but the first halve the image."""
    check_sizes(num_classes=num_classes, in_channels=in_channels)
    as_choice(shortcut, "shortcut", ("A", "B"))
    stages = {}
    channels = widths[0]
    for i, width in enumerate(widths):
        stage = nn.Sequential()
        for j in range(blocks):
            stage.append(BasicBlock(channels, width, 2 if i and not j else 1, shortcut))
            channels = width
        stages[f"layer{i + 1}"] = stage
    return network(
        conv1=conv(in_channels, widths[0], 3),
        bn1=nn.BatchNorm2d(widths[0]),
        relu=nn.ReLU(),
        **stages,
        **head(channels, num_classes),
    )


def resnet18(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """ResNet-18 with a 3x3 stem of stride 1 and no max pool, as it is trained on CIFAR.

    Parameters
    ----------
    num_classes, in_channels : int
        Outputs, and channels of the images.
    width : float
        Factor for the channels of all layers, rounded to multiples of 8.

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
    He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, table 1.
    """
    widths = [scaled(channels, width) for channels in (64, 128, 256, 512)]
    return _resnet(2, widths, num_classes=num_classes, in_channels=in_channels, shortcut="B")


def cifar_resnet(
    depth: int,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    shortcut: Shortcut = "A",
) -> nn.Module:
    """ResNet of ``6 n + 2`` layers in three stages of 16, 32 and 64 channels.

    Parameters
    ----------
    depth : int
        Convolutions on the way, and the linear layer: 20, 32, 44, 56, 110.
    num_classes, in_channels : int
        Outputs, and channels of the images.
    width : float
        Factor for the channels of all layers, rounded to multiples of 8. HRBP trains depths 32 and
        56 at width 2 ("WideResNet-32-2"; a wide ResNet proper has 6 n + 4 layers).
    shortcut : {"A", "B"}
        Where the shape changes: identity padded with zeros, as the paper does on CIFAR, or a 1x1
        convolution with batch norm.

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
    He et al., *Deep Residual Learning for Image Recognition*, CVPR 2016, section 4.2.
    """
    if as_int("depth", depth, 8) % 6 != 2:
        raise format_error(f"depth={depth}", "6 n + 2 layers", "choose 20, 32, 44, 56 or 110")
    widths = [scaled(channels, width) for channels in (16, 32, 64)]
    return _resnet(
        depth // 6, widths, num_classes=num_classes, in_channels=in_channels, shortcut=shortcut
    )


def resnet20(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    shortcut: Shortcut = "A",
) -> nn.Module:
    """ResNet-20 for CIFAR; options as in `cifar_resnet`.

    Its parameters have the names of akamaster/pytorch_resnet_cifar10, whose trained weights
    (option A) load as they are.
    """
    return cifar_resnet(
        20, num_classes=num_classes, in_channels=in_channels, width=width, shortcut=shortcut
    )


def resnet32(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    shortcut: Shortcut = "A",
) -> nn.Module:
    """ResNet-32 for CIFAR; options as in `cifar_resnet`."""
    return cifar_resnet(
        32, num_classes=num_classes, in_channels=in_channels, width=width, shortcut=shortcut
    )
