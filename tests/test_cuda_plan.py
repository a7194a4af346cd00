"""What the CUDA kernels are given, read by the rules of cuda/api.h alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from format_cases import MAKERS

from spfmt import HRBP, KernelNotFound, ShuffledBlock, SparseTensor
from spfmt.cuda.plan import TILE, DeviceTiles, device_lists, device_tiles, transposed_lists
from spfmt.formats._layout import Groups, Lists, lower_groups

HEIGHTS = [5, 16, 24, 64, 100]
MOST_ROWS = [16, 64, 128]


def shuffled_block(height: int, rng: np.random.Generator) -> ShuffledBlock:
    heights = [height, height, height, 3]  # the last group has fewer rows
    counts, cols = [9, 0, 41, 5], 41
    chosen = [rng.permutation(cols)[:k] for k in counts]
    return ShuffledBlock(
        (sum(heights), cols), (height, 4), rng.permutation(sum(heights)),
        np.append(0, np.cumsum(counts)), np.concatenate(chosen),
        rng.standard_normal(np.dot(heights, counts)),
    )  # fmt: skip


def hrbp(height: int, rng: np.random.Generator) -> HRBP:
    channels = 13
    heights = [height, height + 1, height]
    rows = sum(heights)
    chosen = np.array([np.sort(rng.permutation(channels)[:6]) for _ in heights])
    pattern = np.array([np.sort(rng.permutation(4)[:3]) for _ in heights])
    return HRBP(
        (rows, channels, 2, 2), rng.permutation(rows), np.append(0, np.cumsum(heights)), chosen,
        pattern, rng.standard_normal(rows * 18),
    )  # fmt: skip


def decoded(tiles: DeviceTiles, values: Any) -> Any:
    """Return the matrix of some tiles, value after value."""
    dense = np.zeros((tiles.rows, tiles.cols))
    seen = np.zeros(values.size, int)
    for tile in tiles.tile:
        value, row, rows, col, cols = (int(tile[name]) for name in TILE.names or ())
        assert 0 < rows <= tiles.most_rows
        bands, short = divmod(rows, 16)
        for i in range(rows):
            n = 16 if i // 16 < bands else short
            for j in range(cols):
                at = value + 16 * cols * (i // 16) + j * n + i % 16
                dense[tiles.row_perm[row + i], tiles.col_indices[col + j]] = values[at]
                seen[at] += 1
    assert (seen == 1).all()
    return dense


def check_tiles(groups: Groups, most_rows: int) -> DeviceTiles:
    tiles = device_tiles(groups, most_rows)
    assert tiles.tile.dtype == TILE
    assert TILE.itemsize == 24, "the struct of api.h has no padding"
    for array in (tiles.row_perm, tiles.col_indices, tiles.ascending):
        assert array.dtype == np.int32
    # Tiles are rows one after the other, each once.
    ends = tiles.tile["row"] + tiles.tile["rows"]
    assert np.array_equal(np.append(0, ends)[:-1], tiles.tile["row"])
    assert (ends[-1] if ends.size else 0) == groups.rows
    # The lists that tiles have, one after the other.
    start = 0
    for col, cols in sorted({(int(tile["col"]), int(tile["cols"])) for tile in tiles.tile}):
        columns, span = tiles.col_indices[col : col + cols], slice(start, start + cols)
        assert np.array_equal(tiles.ascending[span], np.argsort(columns))
        assert np.array_equal(tiles.sorted_cols[span], np.sort(columns))
        start += cols
    assert tiles.ascending.size == tiles.sorted_cols.size == start
    return tiles


@pytest.mark.parametrize("most_rows", MOST_ROWS)
@pytest.mark.parametrize("height", HEIGHTS)
@pytest.mark.parametrize("make", [shuffled_block, hrbp])
def test_tiles_are_the_matrix(make: Any, height: int, most_rows: int) -> None:
    a: SparseTensor = make(height, np.random.default_rng(height))
    groups = a.layout()
    assert isinstance(groups, Groups)
    tiles = check_tiles(groups, most_rows)
    dense = a.to_dense().reshape(groups.rows, groups.cols)
    np.testing.assert_array_equal(decoded(tiles, a.values.reshape(-1)), dense)


@pytest.mark.parametrize("most_rows", MOST_ROWS)
@pytest.mark.parametrize("height", HEIGHTS)
def test_tiles_are_as_high_as_they_may(height: int, most_rows: int) -> None:
    groups = shuffled_block(height, np.random.default_rng(0)).layout()
    assert isinstance(groups, Groups)
    want = []
    for rows in [height, height, height, 3]:
        want += [most_rows] * (rows // most_rows) + [rows % most_rows] * (rows % most_rows > 0)
    assert device_tiles(groups, most_rows).tile["rows"].tolist() == want


@pytest.mark.parametrize("name", ["shuffled_block", "hrbp"])
def test_tiles_of_random_structures(name: str) -> None:
    for seed in range(20):
        for shape in ((0, 5), (7, 0), (90, 31)):
            a = MAKERS[name](shape, np.random.default_rng(seed))
            groups = a.layout()
            assert isinstance(groups, Groups)
            dense = a.to_dense().reshape(groups.rows, groups.cols)
            tiles = check_tiles(groups, 64)
            np.testing.assert_array_equal(decoded(tiles, a.values.reshape(-1)), dense)


@pytest.mark.parametrize("heights", [[20, 0, 20], [0, 16, 24], [33, 7, 0], [0, 0, 40]])
def test_groups_without_rows_leave_others_alone(heights: list[int]) -> None:
    groups = lower_groups(
        (40, 7),
        np.arange(40, dtype=np.int32),
        np.append(0, np.cumsum(heights)),
        np.array([0, 3, 6, 9]),
        np.array([5, 1, 3, 0, 4, 2, 6, 2, 4], np.int32),
    )
    check_tiles(groups, 64)


def test_lists_are_narrow() -> None:
    a = MAKERS["csr"]((19, 23), np.random.default_rng(1)).layout()
    assert isinstance(a, Lists)
    got = device_lists(a)
    assert (got.rows, got.cols, got.source) == (19, 23, None)
    assert got.indptr.dtype == got.col_indices.dtype == np.int32
    np.testing.assert_array_equal(got.indptr, a.indptr)
    np.testing.assert_array_equal(got.col_indices, a.col_indices)


@pytest.mark.parametrize("name", ["csr", "nm", "condensed"])
def test_transposed_lists_are_the_transposed_matrix(name: str) -> None:
    for seed in range(10):
        for shape in ((0, 5), (5, 0), (1, 1), (19, 23)):
            a = MAKERS[name](shape, np.random.default_rng(seed))
            layout, values = a.layout(), a.values.reshape(-1)
            assert isinstance(layout, Lists)
            got = transposed_lists(layout)
            assert (got.rows, got.cols) == shape[::-1]
            assert got.source is not None
            for array in (got.indptr, got.col_indices, got.source):
                assert array.dtype == np.int32
            dense = np.zeros(shape[::-1])
            for r in range(got.rows):
                span = slice(got.indptr[r], got.indptr[r + 1])
                assert (np.diff(got.col_indices[span]) > 0).all()
                dense[r, got.col_indices[span]] = values[got.source[span]]
            np.testing.assert_array_equal(dense, a.to_dense().T)


def test_more_than_32_bits_count() -> None:
    many = np.broadcast_to(np.int32(0), 2**31)  # one number in memory
    lists = Lists(1, 1, np.array([0, 2**31]), many)
    for make in (device_lists, transposed_lists):
        with pytest.raises(KernelNotFound, match=r"2147483648.*32 bits.*fix"):
            make(lists)
    groups = shuffled_block(16, np.random.default_rng(0)).layout()
    assert isinstance(groups, Groups)
    with pytest.raises(KernelNotFound, match=r"2147483648.*32 bits.*fix"):
        device_tiles(replace(groups, col_indices=many), 16)
