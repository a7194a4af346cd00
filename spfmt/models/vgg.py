"""VGG for CIFAR: batch norm, and one linear layer in place of three."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from spfmt.models._parts import check_sizes, head, network, scaled

__all__ = ["vgg16", "vgg19"]


def _vgg(depths: Sequence[int], num_classes: int, in_channels: int, width: float) -> nn.Module:
    """Stages of 3x3 convolutions; a max pool halves the image after each."""
    check_sizes(num_classes=num_classes, in_channels=in_channels)
    features = nn.Sequential()
    channels = in_channels
    for depth, base in zip(depths, (64, 128, 256, 512, 512), strict=True):
        for _ in range(depth):
            out_channels = scaled(base, width)
            # The bias is idle before a batch norm; published numbers of parameters count it.
            features.append(nn.Conv2d(channels, out_channels, 3, padding=1))
            features.append(nn.BatchNorm2d(out_channels))
            features.append(nn.ReLU())
            channels = out_channels
        features.append(nn.MaxPool2d(2))
    return network(features=features, **head(channels, num_classes))


def vgg16(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """VGG-16: 13 convolutions with batch norm and one linear layer.

    Parameters
    ----------
    num_classes, in_channels : int
        Outputs, and channels of the images.
    width : float
        Factor for the channels of all layers, rounded to multiples of 8.

    Returns
    -------
    nn.Module
        Maps images (N, in_channels, H, W) of at least 32 x 32 pixels to (N, num_classes).

    Raises
    ------
    FormatError
        Where an option is out of its range.

    References
    ----------
    Simonyan, Zisserman, *Very Deep Convolutional Networks for Large-Scale Image Recognition*, ICLR
    2015, table 1, D.
    """
    return _vgg((2, 2, 3, 3, 3), num_classes, in_channels, width)


def vgg19(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """VGG-19: 16 convolutions with batch norm and one linear layer; options as in `vgg16`."""
    return _vgg((2, 2, 4, 4, 4), num_classes, in_channels, width)
