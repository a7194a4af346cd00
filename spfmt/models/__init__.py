"""The papers' networks at CIFAR size, in plain torch.

Every name is a function that returns a network with new weights: ``resnet20(num_classes=100)``.
Options are keywords; all take `num_classes` and `in_channels`. Images are (N, in_channels, H, W) of
32 x 32 pixels or larger; parameters and multiply-adds (of convolutions and matrix products) are for
one image of 32 x 32 pixels and 10 classes.

================= ========== ============= ========== ==========================================
network           parameters multiply-adds trained by paper
================= ========== ============= ========== ==========================================
`resnet18`           11.17 M       555.4 M DSB, SRigL He et al. 2016, table 1; 3x3 stem, no pool
`resnet20`            0.27 M        40.6 M            He et al. 2016, section 4.2
`resnet32`            0.46 M        68.9 M HRBP       He et al. 2016, section 4.2; HRBP: width=2
`wide_resnet22_2`     1.08 M       157.7 M DSB, SRigL Zagoruyko, Komodakis 2016, table 1
`vgg16`              14.73 M       313.2 M DSB        Simonyan, Zisserman 2015, table 1, D
`vgg19`              20.04 M       398.1 M HRBP       Simonyan, Zisserman 2015, table 1, E
`mobilenet_v2`        2.30 M        91.2 M HRBP       Sandler et al. 2018, table 2
`vit_tiny`            5.36 M       359.2 M            Dosovitskiy et al. 2021; Touvron et al. 2021
================= ========== ============= ========== ==========================================
"""

from __future__ import annotations

from spfmt.errors import MissingDependency

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingDependency(
        "spfmt.models needs torch, which is not installed; fix: pip install 'spfmt[torch]' (or pip "
        "install torch)"
    ) from error

from spfmt.models.mobilenet import mobilenet_v2
from spfmt.models.resnet import resnet18, resnet20, resnet32
from spfmt.models.vgg import vgg16, vgg19
from spfmt.models.vit import vit_tiny
from spfmt.models.wide_resnet import wide_resnet22_2

__all__ = [
    "mobilenet_v2",
    "resnet18",
    "resnet20",
    "resnet32",
    "vgg16",
    "vgg19",
    "vit_tiny",
    "wide_resnet22_2",
]
