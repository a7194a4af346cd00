"""Random legal tensors of every format, and a slow oracle that reads them by their definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from spfmt import cost
from spfmt.formats import CSR, FORMATS, HRBP, NM, Condensed, ShuffledBlock, SparseTensor

Rng = np.random.Generator
Shape = tuple[int, ...]


def _cols(shape: Shape) -> int:
    return int(np.prod(shape[1:]))


def _cells(shape: Shape) -> int:
    return int(np.prod(shape[2:]))


def _choose(rng: Rng, size: int, count: int) -> NDArray[Any]:
    return np.sort(rng.permutation(size)[:count])


def make_csr(shape: Shape, rng: Rng) -> CSR:
    mask = rng.random((shape[0], _cols(shape))) < rng.random()
    indptr = np.append(0, np.cumsum(mask.sum(1)))
    return CSR(shape, indptr, np.nonzero(mask)[1], rng.standard_normal(mask.sum()))


def make_condensed(shape: Shape, rng: Rng) -> Condensed:
    active = _choose(rng, shape[0], rng.integers(0, shape[0] + 1))
    k = int(rng.integers(0, _cols(shape) + 1))
    cols = np.array([_choose(rng, _cols(shape), k) for _ in active], int).reshape(active.size, k)
    return Condensed(shape, active, cols, rng.standard_normal(cols.shape))


def make_nm(shape: Shape, rng: Rng) -> NM:
    channels, cells = shape[1], _cells(shape)
    m = int(rng.integers(1, channels + 3))
    n = int(rng.integers(0, m + 1))
    rows = []
    for _ in range(shape[0]):
        row: list[int] = []
        for first in range(0, channels, m):
            length = min(m, channels - first)
            for cell in range(cells):
                kept = _choose(rng, length, min(n, length)) + first
                row.extend(int(c) * cells + cell for c in kept)
        rows.append(sorted(row))
    width = sum(min(n, min(m, channels - first)) for first in range(0, channels, m)) * cells
    cols = np.array(rows, int).reshape(shape[0], width)
    return NM(shape, n, m, cols, rng.standard_normal(cols.shape))


def make_shuffled_block(shape: Shape, rng: Rng) -> ShuffledBlock:
    block = (int(rng.integers(1, 40)), int(rng.integers(1, 9)))
    groups = -(-shape[0] // block[0])
    lists = [
        rng.permutation(_cols(shape))[: rng.integers(0, _cols(shape) + 1)] for _ in range(groups)
    ]
    pointer = np.append(0, np.cumsum([len(x) for x in lists])).astype(int)
    heights = [min(block[0], shape[0] - g * block[0]) for g in range(groups)]
    nnz = sum(h * len(x) for h, x in zip(heights, lists, strict=True))
    cols = np.concatenate([*lists, np.zeros(0, int)]).astype(int)
    values = rng.standard_normal(nnz)
    return ShuffledBlock(shape, block, rng.permutation(shape[0]), pointer, cols, values)


def make_hrbp(shape: Shape, rng: Rng) -> HRBP:
    channels, cells = shape[1], _cells(shape)
    t = int(rng.integers(1, shape[0] + 1)) if shape[0] else 0
    sizes = np.full(t, shape[0] // max(t, 1))
    sizes[: shape[0] - sizes.sum()] += 1
    n_channels = int(rng.integers(0, channels + 1))
    n_cells = int(rng.integers(1, cells + 1)) if n_channels and cells else 0
    n_channels = n_channels if n_cells else 0
    chosen = np.array([_choose(rng, channels, n_channels) for _ in range(t)], int)
    pattern = np.array([_choose(rng, cells, n_cells) for _ in range(t)], int)
    return HRBP(
        shape,
        rng.permutation(shape[0]),
        np.append(0, np.cumsum(rng.permutation(sizes))).astype(int),
        chosen.reshape(t, n_channels),
        pattern.reshape(t, n_cells),
        rng.standard_normal(shape[0] * n_channels * n_cells),
    )


MAKERS: dict[str, Callable[[Shape, Rng], SparseTensor]] = {
    "condensed": make_condensed,
    "nm": make_nm,
    "shuffled_block": make_shuffled_block,
    "hrbp": make_hrbp,
    "csr": make_csr,
}

OPTIONS: dict[str, dict[str, Any]] = {
    "condensed": {},
    "nm": {"m": 4},
    "shuffled_block": {"block_shape": (4, 2)},
    "hrbp": {"groups": 2},
    "csr": {},
}
"""Options with which `from_scores` and layers divide a 12 x 16 weight."""

SHAPES = st.one_of(
    st.tuples(st.integers(0, 40), st.integers(0, 20)),
    st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 3), st.integers(0, 3)),
)


@st.composite
def tensors(draw: st.DrawFn, format: str | None = None) -> SparseTensor:
    """Tensors of a format, or of any."""
    name = format or draw(st.sampled_from(sorted(MAKERS)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(["float32", "float64", "float16"]))
    return MAKERS[name](draw(SHAPES), rng).astype(dtype)


def positions(tensor: SparseTensor) -> list[tuple[int, int]]:
    """Row and column of every value, read from the structure with loops."""
    a: Any = tensor
    cells = _cells(a.shape)
    if a.format == "csr":
        return [
            (r, int(c))
            for r in range(a.matrix_shape[0])
            for c in a.col_indices[a.indptr[r] : a.indptr[r + 1]]
        ]
    if a.format == "condensed":
        return [
            (int(r), int(c))
            for r, row in zip(a.row_indices, a.col_indices, strict=True)
            for c in row
        ]
    if a.format == "nm":
        return [(r, int(c)) for r, row in enumerate(a.col_indices) for c in row]
    if a.format == "shuffled_block":
        s1 = a.block_shape[0]
        rows = [a.row_perm[g * s1 : (g + 1) * s1] for g in range(a.group_ptr.size - 1)]
        cols = [a.col_indices[i:j] for i, j in zip(a.group_ptr, a.group_ptr[1:], strict=False)]
    else:
        rows = [a.row_perm[i:j] for i, j in zip(a.row_ptr, a.row_ptr[1:], strict=False)]
        cols = [
            [int(ch) * cells + int(p) for ch in channels for p in pattern]
            for channels, pattern in zip(a.channel_indices, a.pattern_indices, strict=True)
        ]
    return [
        (int(r), int(c))
        for group_rows, group_cols in zip(rows, cols, strict=True)
        for first in range(0, len(group_rows), 16)
        for c in group_cols
        for r in group_rows[first : first + 16]
    ]


def oracle_dense(tensor: SparseTensor) -> NDArray[Any]:
    """Dense array, value by value."""
    dense = np.zeros(tensor.matrix_shape, tensor.dtype)
    for (row, col), value in zip(positions(tensor), tensor.values.reshape(-1), strict=True):
        dense[row, col] = value
    return dense.reshape(tensor.shape)


LAYOUTS = {"lists": "csr", "groups": "shuffled_block"}
"""Of each layout that kernels see, the format whose random tensors are the least regular."""


def variants(layout: str, op: str, batch: int) -> list[str]:
    """All ways to compute one product: a machine's cost model may choose any of them."""
    return [name for name, ops, most in cost.VARIANTS[layout] if op in ops and batch <= most]


_OF_DENSE: dict[str, dict[str, Any]] = {
    "nm": {"m": 4},
    "shuffled_block": {"block_shape": (4, 2), "row_perm": np.arange(10)},
    "hrbp": {},
}
_RNG = np.random.default_rng(7)
W = np.where(_RNG.random((10, 12)) < 0.4, _RNG.standard_normal((10, 12)), 0).astype(np.float32)


def built(name: str, w: NDArray[Any] = W) -> SparseTensor:
    """Tensor of a format on the nonzeros of `w`."""
    options = dict(_OF_DENSE.get(name, {}))
    if "row_perm" in options:
        options["row_perm"] = np.arange(w.shape[0])
    return FORMATS[name].from_dense(w, **options)
