"""A small vision transformer whose projections are all linear layers."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn import functional as F

from spfmt.errors import format_error
from spfmt.models._parts import check_sizes

__all__ = ["Attention", "Block", "VisionTransformer", "vit_tiny"]


# Both look at sizes: torch.fx takes them for one call each.
fx.wrap("_whole")
fx.wrap("_placed")


def _whole(images: Tensor, patch_size: int) -> Tensor:
    """Return the images; raise FormatError unless patches fill them."""
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise format_error(
            f"images of {height} x {width}",
            f"multiples of patch_size={patch_size}",
            "pad or crop them",
        )
    return images


def _placed(patches: Tensor, positions: Tensor) -> Tensor:
    """Add positions (1, dim, h, w) to patches (N, dim, H, W); interpolate for another size."""
    if patches.shape[-2:] != positions.shape[-2:]:
        positions = F.interpolate(positions, patches.shape[-2:], mode="bicubic")
    return patches + positions


class Attention(nn.Module):
    """Multi-head self-attention.

    Parameters
    ----------
    dim, heads : int
        Size of a token, and into how many parts it is split.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(dim, dim) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, T, dim) to (N, T, dim)."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, T, dim / heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then two linear layers, each on normalised tokens and added to them (eq. 2, 3).

    Parameters
    ----------
    dim, heads : int
        Of the attention.
    mlp_dim : int
        Between the two linear layers.
    """

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, T, dim) to (N, T, dim)."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """Patches, learned positions, blocks, the average of all tokens, one linear layer.

    Parameters
    ----------
    num_classes, in_channels, image_size, patch_size, dim, depth, heads, mlp_dim : int
        See `vit_tiny`.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        side = image_size // patch_size
        self.patches = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.positions = nn.Parameter(self.patches.weight.new_empty(1, dim, side, side))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        """Draw as DeiT does; the convolution of the patches keeps torch's start."""
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to (N, num_classes).

        Images of another size than the network was made for get interpolated positions (section
        3.2).

        Raises
        ------
        FormatError
            For images that patches do not fill.
        """
        x = self.patches(_whole(x, self.patch_size))  # (N, dim, H / patch_size, W / patch_size)
        tokens = _placed(x, self.positions).flatten(2).transpose(1, 2)
        tokens = self.norm(self.blocks(tokens))
        return self.linear(tokens.mean(1))  # type: ignore[no-any-return]


def vit_tiny(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int = 32,
    patch_size: int = 4,
    dim: int = 192,
    depth: int = 12,
    heads: int = 3,
    mlp_ratio: int = 4,
) -> nn.Module:
    """ViT of DeiT-Tiny's size with patches of 4 x 4: an image of 32 x 32 is 64 tokens.

    The average of the tokens stands for the class token (ViT, appendix D.3), so their number is a
    multiple of 16 as kernels like it.

    Parameters
    ----------
    num_classes, in_channels : int
        Outputs, and channels of the images.
    image_size : int
        Height and width whose positions are learned; images of other sizes get interpolated ones.
    patch_size : int
        Height and width of a patch; divides those of the images.
    dim, depth, heads : int
        Size of a token, blocks, and heads of their attention, which divide `dim`.
    mlp_ratio : int
        Size between a block's two linear layers over `dim`.

    Returns
    -------
    nn.Module
        Maps images (N, in_channels, H, W) to (N, num_classes).

    Raises
    ------
    FormatError
        Where an option is out of its range or does not divide what it must.

    References
    ----------
    Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021, section 3.1. Touvron et al.,
    *Training data-efficient image transformers & distillation through attention*, ICML 2021,
    table 1 (the size).
    """
    check_sizes(num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    check_sizes(patch_size=patch_size, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
    for name, size, by, part in (
        ("image_size", image_size, "patch_size", patch_size),
        ("dim", dim, "heads", heads),
    ):
        if size % part:
            raise format_error(
                f"{name}={size}, {by}={part}", f"{by} that divides {name}", "change one of them"
            )
    return VisionTransformer(
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_dim=mlp_ratio * dim,
    )
