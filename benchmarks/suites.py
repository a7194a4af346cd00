"""The suites of ``python -m benchmarks.linear``: what is measured, at which sizes.

Every suite is one function; it takes a `spfmt.bench.Session` and measures cases. Weights are random
unless a suite says otherwise, and sparse contenders are called with both layouts of X.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

import spfmt
from benchmarks.costs import costs
from benchmarks.runtime import in_onnxruntime
from spfmt.bench import BATCH_FIRST, LAYER, Case, Session, parse_spec
from spfmt.bench.baselines import BASELINES, available
from spfmt.bench.machine import available_cpus
from spfmt.bench.weights import Spec
from spfmt.formats import FORMATS

Shape = tuple[int, int]

WIDE: Shape = (3072, 768)
NARROW: Shape = (768, 3072)
LARGE: Shape = (4096, 11008)
CLASSES: Shape = (1_000_000, 512)
FAN_IN_32 = 32 / 512


def specs(*texts: str) -> tuple[Spec, ...]:
    """Formats as on the command line."""
    return tuple(parse_spec(text) for text in texts)


ALL_FORMATS = specs(*FORMATS)
BLOCKS = specs("shuffled_block", "hrbp")
LISTS = specs("nm", "condensed", "csr")


def layers(session: Session) -> None:
    """The two weights of a transformer's feed-forward layer at 90 %, 50 % and 99 %."""
    for shape in (WIDE, NARROW):
        for batch in (1, 8, 64, 256):
            session.measure(Case(shape, 0.1, batch), ALL_FORMATS, suite="layers")
        for batch in (1, 256):
            half = specs("shuffled_block", "nm:2:4", "nm:16:32", "condensed", "csr")
            session.measure(Case(shape, 0.5, batch), half, suite="layers")
            session.measure(
                Case(shape, 0.1, batch),
                BLOCKS,
                suite="levels",
                backends=("auto", "avx2"),
                layouts=(BATCH_FIRST,),
                dense=False,
            )
        few = specs("shuffled_block", "hrbp", "nm:1:100", "condensed", "csr")
        session.measure(Case(shape, 0.01, 256), few, suite="layers")


def backward(session: Session) -> None:
    """The gradients' products, and a layer's forward and backward pass through autograd."""
    for shape in (WIDE, NARROW):
        products = [Case(shape, 0.1, 256, op=op) for op in ("spmm", "spmm_t", "sddmm")]
        session.measure(products, ALL_FORMATS, suite="backward")
        if available("torch"):
            case = Case(shape, 0.1, 256, op=LAYER)
            session.measure(case, ALL_FORMATS, suite="backward", compare=["SparseProp"])


def thread_counts() -> list[int]:
    """1, 2, 4, ... up to the CPUs that this process may use."""
    counts = [1 << k for k in range(10) if 1 << k < available_cpus()]
    return [*counts, available_cpus()]


def threads(session: Session) -> None:
    """One thread against more, in turns: small and large batches, and a large layer."""
    cases = [(WIDE, batch) for batch in (1, 64, 256, 1024)] + [(LARGE, 1), (LARGE, 64)]
    for shape, batch in cases:
        kinds = ALL_FORMATS if shape == WIDE else specs("shuffled_block", "nm", "condensed")
        together = [Case(shape, 0.1, batch, n) for n in thread_counts()]
        session.measure(together, kinds, suite="threads", layouts=(BATCH_FIRST,))


def shapes(session: Session) -> None:
    """Small, odd and large layers, and a million classes of 32 inputs each."""
    for shape in ((256, 128), (128, 256)):
        session.measure(
            Case(shape, 0.1, 1),
            ALL_FORMATS,
            suite="shapes",
            extra=_in_onnxruntime(session, shape),
        )
        session.measure(Case(shape, 0.1, 256), ALL_FORMATS, suite="shapes")
    for shape in ((257, 513), (1000, 1000), LARGE):
        for batch in (1, 256):
            session.measure(Case(shape, 0.1, batch), ALL_FORMATS, suite="shapes")
    for batch in (1, 32):
        case = Case(CLASSES, FAN_IN_32, batch)
        session.measure(case, specs("condensed"), suite="shapes", layouts=(BATCH_FIRST,))


def _in_onnxruntime(session: Session, shape: Shape) -> Callable[..., list[object]] | None:
    if not (available("onnx") and available("onnxruntime")):
        return None  # the report says that they are absent
    weights = [session.weight(spec, shape, 0.1) for spec in ALL_FORMATS]
    return lambda setting: [in_onnxruntime(setting, a) for a in weights]


def sparsity(session: Session) -> None:
    """From half to one in a hundred weights."""
    for density in (0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02, 0.01):
        kinds = specs("shuffled_block", "hrbp", "nm:100", "condensed", "csr")
        for batch in (1, 8, 64, 256):
            session.measure(
                Case(WIDE, density, batch), kinds, suite="sparsity", layouts=(BATCH_FIRST,)
            )


def batch(session: Session) -> None:
    """From one sample to 1024."""
    for size in (1 << k for k in range(11)):
        session.measure(Case(WIDE, 0.1, size), ALL_FORMATS, suite="batch", layouts=(BATCH_FIRST,))


def blocks(session: Session) -> None:
    """Block shapes at 90 %, and ratios N:M at the densities that they stand for."""
    sizes = [f"shuffled_block:{size}" for size in ("4x4", "8x8", "16x16", "32x32", "8x32")]
    ratios = [f"nm:{r}" for r in ("1:4", "2:4", "2:8", "4:8", "1:16", "3:32", "8:64", "16:32")]
    for size in (1, 64, 256):
        session.measure(Case(WIDE, 0.1, size), specs(*sizes), suite="blocks")
        session.measure(Case(WIDE, 0.1, size), specs(*ratios), suite="blocks")


def baselines(session: Session) -> None:
    """Every other way that is installed, at 90 %."""
    for size in (1, 64, 256):
        session.measure(
            Case(WIDE, 0.1, size), ALL_FORMATS, suite="baselines", compare=list(BASELINES)
        )


# Of the Deep Learning Matrix Collection: large layers of a ResNet-50 and of a transformer.
REAL = {
    "dlmc_rn50_magnitude_0.90": (
        "bottleneck_1_block_group4_1_1",
        "bottleneck_2_block_group4_1_1",
        "bottleneck_3_block_group4_1_1",
        "final_dense",
    ),
    "dlmc_transformer_magnitude_0.95": (
        "body_decoder_layer_0_encdec_attention_multihead_attention_k_fully_connected",
        "body_decoder_layer_0_ffn_conv1_fully_connected",
        "body_decoder_layer_0_ffn_conv2_fully_connected",
    ),
}


def real(session: Session, data: Path) -> None:
    """Pruned networks' own patterns as CSR, and projected to every format at equal density."""
    for archive, names in REAL.items():
        path = data / f"{archive}.npz"
        if not path.exists():
            session.skip(path.name, f"not in {data}")
            continue
        with np.load(path, allow_pickle=False) as file:
            for name in names:
                _real_layer(session, _pattern(file, name), f"{archive.split('_')[1]}/{name}")


def _pattern(file: Mapping[str, np.ndarray], name: str) -> spfmt.CSR:
    """A pattern of the archive, with normal values."""
    indices = file[f"{name}/indices"]
    values = np.random.default_rng(0).standard_normal(indices.size, dtype=np.float32)
    return spfmt.CSR(file[f"{name}/shape"], file[f"{name}/indptr"], indices, values)


def _real_layer(session: Session, a: spfmt.CSR, source: str) -> None:
    dense = a.to_dense()
    weights = [a, *_projected(dense, a.density)]
    for size in (1, 256):
        case = Case(a.matrix_shape, a.density, size, source=source)
        session.measure(case, weights=weights, suite="real", layouts=(BATCH_FIRST,))


def _projected(dense: np.ndarray, density: float) -> Sequence[spfmt.SparseTensor]:
    """The formats' best masks for a pruned weight; zeros fill what they need beside it."""
    scores, options = np.abs(dense), {"values": dense}
    n = max(1, round(32 * density))
    return (
        spfmt.ShuffledBlock.from_scores(scores, density, method="fast", **options),
        spfmt.HRBP.from_scores(scores, density, method="fast", **options),
        spfmt.NM.from_scores(scores, n=n, m=32, **options),
        spfmt.Condensed.from_scores(scores, density, **options),
    )


Suite = Callable[[Session], None]

SUITES: Mapping[str, Suite] = {
    "layers": layers,
    "backward": backward,
    "costs": costs,
    "threads": threads,
    "shapes": shapes,
    "sparsity": sparsity,
    "batch": batch,
    "blocks": blocks,
    "baselines": baselines,
}
