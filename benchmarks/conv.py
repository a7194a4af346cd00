"""Sparse against dense convolutions: ``python -m benchmarks.conv``.

Every result is compared with float64 before it is timed. Contenders then take turns in one process;
the tables show medians, the first and ninth decile, the ratio to the *fastest* dense convolution
(torch with channels first and with channels last, ONNX Runtime where it is a forward pass), GFLOP/s
of the work that is needed (2 nnz N Ho Wo, 2 for each weight and pixel of dense ones), and the share
of the roof.

``--suite all --seconds 1 --json FILE`` takes about ten minutes; ``python docs/generate.py`` makes
docs/convolution.md and its figures of that file. ``--only 'batch 1,'`` or ``--only 512`` measures
the cases whose heading has this text. For layers of your own there is ``spfmt bench --conv``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from benchmarks import command
from benchmarks.suites import specs, thread_counts
from spfmt.bench import CHANNELS_FIRST, CHANNELS_LAST, LAYER, Case, ImageGeometry, Session
from spfmt.bench.baselines import available
from spfmt.dispatch import active_isa

# (C_out, C_in, maps, kernel, stride)
Layer = tuple[int, int, int, int, int]

SQUARE: tuple[Layer, ...] = tuple(
    (c, c, size, 3, 1) for c, size in ((64, 32), (128, 16), (256, 8), (512, 4))
)
STRIDED: tuple[Layer, ...] = ((128, 64, 32, 3, 2), (256, 128, 16, 3, 2), (512, 256, 8, 3, 2))
POINTWISE: tuple[Layer, ...] = tuple((c, c, size, 1, 1) for c, _, size, _, _ in SQUARE)
IMAGENET: tuple[Layer, ...] = tuple(
    (c, c, size, 3, 1) for c, size in ((64, 56), (128, 28), (256, 14), (512, 7))
)
# The first one, of three channels, stays dense in a sparse network.
VGG19: tuple[Layer, ...] = tuple(
    (rows, cols, size, 3, 1)
    for rows, cols, size in (
        (64, 64, 32), (128, 64, 16), (128, 128, 16), (256, 128, 8), (256, 256, 8), (512, 256, 4),
        (512, 512, 4), (512, 512, 2),
    )
)  # fmt: skip
ONE: Layer = SQUARE[1]

ALL_FORMATS = specs("shuffled_block", "hrbp", "nm", "condensed", "csr")
FEW_FORMATS = specs("shuffled_block", "hrbp", "nm", "csr")
BLOCKS = specs(*(f"shuffled_block:{size}x{size}" for size in (4, 8, 16, 32)))


def case(
    layer: Layer,
    batch: int,
    op: str = "conv2d",
    *,
    density: float = 0.1,
    threads: int = 1,
    source: str = "",
) -> Case:
    """Return the case of a layer whose maps keep their size, but for the stride."""
    rows, cols, size, kernel, stride = layer
    geometry = ImageGeometry((size, size), stride, kernel // 2)
    return Case((rows, cols, kernel, kernel), density, batch, threads, op, source, geometry)


def forward(session: Session) -> None:
    """ResNet's layers at CIFAR size, at 90 %: one image and 64."""
    for layer in (*SQUARE, *STRIDED, *POINTWISE):
        for batch in (1, 64):
            session.measure(case(layer, batch), ALL_FORMATS, suite="forward")


def imagenet(session: Session) -> None:
    """ResNet's layers at ImageNet size, one image."""
    for layer in IMAGENET:
        session.measure(case(layer, 1), ALL_FORMATS, suite="imagenet")


def gradients(session: Session) -> None:
    """The gradients' products at batch 64."""
    for layer in (*SQUARE, *STRIDED, *POINTWISE):
        for op in ("conv2d_input", "conv2d_weight"):
            session.measure(case(layer, 64, op), FEW_FORMATS, suite="gradients")


def training(session: Session) -> None:
    """A layer's forward and backward pass through autograd at batch 128: VGG-19's, and others."""
    layers = [(layer, "VGG-19") for layer in VGG19]
    layers += [(layer, "") for layer in (*STRIDED, *POINTWISE)]
    for layer, source in layers:
        session.measure(
            case(layer, 128, LAYER, source=source),
            ALL_FORMATS,
            suite="training",
            compare=["SparseProp"] if available("sparseprop") else (),
        )


def sparsity(session: Session) -> None:
    """From half to a twentieth of the weights."""
    for density in (0.5, 0.3, 0.1, 0.05):
        for batch in (1, 64):
            one = case(ONE, batch, density=density)
            session.measure(one, ALL_FORMATS, suite="sparsity")


def blocks(session: Session) -> None:
    """Sides of blocks against sparsity, forward and in training."""
    for density in (0.5, 0.4, 0.3, 0.2, 0.1, 0.05):
        for batch, op in ((64, "conv2d"), (128, LAYER)):
            session.measure(case(ONE, batch, op, density=density), BLOCKS, suite="blocks")


def levels(session: Session) -> None:
    """AVX-512 against AVX2, where the machine has both."""
    if active_isa() == "avx2":
        session.skip("suite levels", "the level in use is avx2 already")
        return
    for layer in SQUARE:
        for op in ("conv2d", "conv2d_input", "conv2d_weight"):
            session.measure(
                case(layer, 64, op),
                specs("shuffled_block", "csr"),
                suite="levels",
                backends=("auto", "avx2"),
                dense=False,
            )


def threads(session: Session) -> None:
    """One thread against more, in turns."""
    for layer in (ONE, SQUARE[3]):
        for batch, op in ((1, "conv2d"), (64, "conv2d"), (128, LAYER)):
            together = [case(layer, batch, op, threads=n) for n in thread_counts()]
            session.measure(together, specs("shuffled_block", "csr"), suite="threads")


def layouts(session: Session) -> None:
    """Channels last against channels first."""
    for layer in (ONE, POINTWISE[1]):
        for batch in (1, 64):
            session.measure(
                case(layer, batch),
                FEW_FORMATS,
                suite="layouts",
                layouts=(CHANNELS_FIRST, CHANNELS_LAST),
            )


SUITES: Mapping[str, command.Suite] = {
    suite.__name__: suite
    for suite in (
        forward, imagenet, gradients, training, sparsity, blocks, levels, threads, layouts,
    )
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run suites; return 0, or 1 where a result was wrong."""
    parser = command.make_parser("conv", __doc__, list(SUITES), "forward", seconds=1.0)
    return command.run(parser, parser.parse_args(argv), SUITES)


if __name__ == "__main__":
    sys.exit(main())
