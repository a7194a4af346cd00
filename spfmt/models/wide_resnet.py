"""Wide ResNets: pre-activation blocks, few of them and wide."""

from __future__ import annotations

from numbers import Real

from torch import Tensor, nn

from spfmt.errors import format_error
from spfmt.models._parts import check_sizes, conv, head, network
from spfmt.structure._checks import as_int

__all__ = ["PreActivationBlock", "wide_resnet", "wide_resnet22_2"]


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU before each of two 3x3 convolutions (Zagoruyko & Komodakis, figure 1).

    Parameters
    ----------
    in_channels, out_channels, stride : int
        Of the first convolution.
    dropout : float
        Probability, between the two convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = conv(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = conv(out_channels, out_channels, 3)
        self.shortcut: nn.Module | None = None
        if stride > 1 or in_channels != out_channels:
            self.shortcut = conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up."""
        y = self.relu1(self.bn1(x))
        if self.shortcut is not None:  # a projection sees the activated input, as in their code
            x = self.shortcut(y)
        y = self.relu2(self.bn2(self.conv1(y)))
        return x + self.conv2(self.dropout(y))  # type: ignore[no-any-return]


def wide_resnet(
    depth: int,
    width: int,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    dropout: float = 0.0,
) -> nn.Module:
    """WRN-`depth`-`width`: ``6 n + 4`` layers in three stages of 16, 32 and 64 times `width`.

    Parameters
    ----------
    depth : int
        Convolutions, those of shortcuts counted: 16, 22, 28, 40.
    width : int
        Factor for the channels of all layers but the stem.
    num_classes, in_channels : int
        Outputs, and channels of the images.
    dropout : float
        Probability, between the convolutions of a block.

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
    Zagoruyko, Komodakis, *Wide Residual Networks*, BMVC 2016, table 1.
    """
    check_sizes(width=width, num_classes=num_classes, in_channels=in_channels)
    if as_int("depth", depth, 10) % 6 != 4:
        raise format_error(f"depth={depth}", "6 n + 4 layers", "choose 16, 22, 28 or 40")
    if not isinstance(dropout, Real) or not 0.0 <= dropout < 1.0:
        raise format_error(f"dropout={dropout!r}", "a probability in [0, 1)", "the paper uses 0.3")
    stages = {}
    channels = 16
    for i, wider in enumerate((16 * width, 32 * width, 64 * width)):
        stage = nn.Sequential()
        for j in range(depth // 6):
            stage.append(PreActivationBlock(channels, wider, 2 if i and not j else 1, dropout))
            channels = wider
        stages[f"layer{i + 1}"] = stage
    return network(
        conv1=conv(in_channels, 16, 3),
        **stages,
        bn=nn.BatchNorm2d(channels),
        relu=nn.ReLU(),
        **head(channels, num_classes),
    )


def wide_resnet22_2(
    *, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0
) -> nn.Module:
    """WRN-22-2, the network of SRigL and DSB on CIFAR; options as in `wide_resnet`."""
    return wide_resnet(22, 2, num_classes=num_classes, in_channels=in_channels, dropout=dropout)
