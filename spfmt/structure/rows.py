"""Order of rows so that similar rows are close together (DSB, NeurIPS 2022, section 4)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import _rows
from ._checks import Int32Array, as_choice, as_density, as_int, as_mask

__all__ = ["order_rows", "order_rows_fast"]

_METRICS = ("jaccard", "cosine")
_LINKAGES = ("average", "complete")
_METHODS = ("paper", "fast", "densest")
_SEEDS = ("similar", "densest")

# Above so many rows, rows are cut into chunks of similar ones first: clustering needs a matrix of
# all pairs (134 MB here), the fast route a scan of all rows per group.
CHUNK_ROWS = 4096
FAST_CHUNK_ROWS = 32768
# Likely neighbours are joined to components of at most so many rows, so that chunks can be filled.
COMPONENT_ROWS = 512
# More hashings find more neighbours: eight lose 1 % of the l1 mass of 50 000 rows, four 4 %.
_CHUNK_HASHINGS = 8

_Words = npt.NDArray[np.uint64]


def order_rows(
    mask: npt.ArrayLike,
    *,
    metric: str = "jaccard",
    linkage: str = "average",
    min_overlap: float = 0.2,
    method: str = "paper",
    group_size: int = 16,
) -> Int32Array:
    """Permutation of the rows that puts rows with common nonzero columns side by side.

    method="paper" is DSB's section 4: rows that share more than the fraction `min_overlap` (the
    paper's q) of their nonzero columns with some other row are clustered agglomeratively on
    1 - similarity and read off the dendrogram in leaf order; the other
    rows keep their order at the end. The paper uses the Jaccard similarity; the authors' own code
    uses cosine with complete linkage. Both are offered, the paper's words and average linkage are
    the default.

    Up to CHUNK_ROWS = 4096 nonempty rows that is done exactly. Above, where a matrix of all pairs
    would take gigabytes, rows are first cut into chunks of at most 4096 rows that are likely to be
    similar (neighbours in the order of one of 64 minhashes, joined from the most similar pair down
    to components of at most 512 rows), and each chunk is handled as above: the fraction q and the
    dendrogram then look inside the chunk.

    method="fast" and method="densest" call `order_rows_fast`, which needs no matrix of all pairs,
    with seeds="similar" and seeds="densest".

    Parameters
    ----------
    mask : array_like, shape (R, C)
        Nonzero where a weight is active.
    metric : {"jaccard", "cosine"}
        Similarity of two rows' column sets.
    linkage : {"average", "complete"}
        Linkage of the clustering; method="paper" only.
    min_overlap : float, default 0.2
        The paper's q, in [0, 1]; method="paper" only. It limits the cost of clustering.
    method : {"paper", "fast", "densest"}
        Which clusterer.
    group_size : int, default 16
        Rows per group that the caller will cut (S1); not used by method="paper".

    Returns
    -------
    ndarray of int32, shape (R,)
        The permutation; the same input always gives the same one.

    Raises
    ------
    FormatError
        mask not two-dimensional, or an unknown option.
    """
    as_choice(method, "method", _METHODS)
    if method != "paper":
        seeds = "densest" if method == "densest" else "similar"
        return order_rows_fast(mask, group_size=group_size, metric=metric, seeds=seeds)
    cosine = as_choice(metric, "metric", _METRICS) == "cosine"
    as_choice(linkage, "linkage", _LINKAGES)
    min_overlap = as_density(min_overlap, "min_overlap")
    bits = _pack(as_mask(mask))
    counts = _row_counts(bits)
    clustered: list[Int32Array] = []
    rest: list[Int32Array] = [np.flatnonzero(counts == 0).astype(np.int32)]
    for chunk in _chunks(bits, counts, CHUNK_ROWS, cosine):
        similar = np.empty(chunk.size, np.bool_)
        _rows.overlapping(bits[chunk], counts[chunk], min_overlap, similar.view(np.uint8))
        clustered.append(_leaf_order(bits, counts, chunk[similar], cosine, linkage))
        rest.append(chunk[~similar])
    return np.concatenate([*clustered, np.sort(np.concatenate(rest))]).astype(np.int32)


def order_rows_fast(
    mask: npt.ArrayLike,
    *,
    group_size: int = 16,
    metric: str = "jaccard",
    seeds: str = "similar",
) -> Int32Array:
    """Row order for use during training: groups are grown greedily, one scan per group.

    Rows are taken as seeds from the one with the most similar likely neighbour (rows that agree in
    a minhash) down. A seed asks for the `group_size` rows most similar to it; unless a clear gap
    sets those apart, the columns that most of them hold become the centre, and the rows most
    similar to the centre form the group. Rows without nonzeros come last. Each group costs one or
    two scans of the remaining rows' bit sets: R*R/group_size comparisons where clustering needs
    R*R/2 and a dendrogram. Above FAST_CHUNK_ROWS = 32768 rows, chunks as in `order_rows`.

    seeds="densest" takes seeds from the row with the most nonzeros down, and no centre. It is for
    groups of which some rows were just given new columns in common (DSB's growth): most of them are
    among the densest. Taken last, each would fill up the group that it was in, and its new columns
    would be lost.

    Parameters
    ----------
    mask : array_like, shape (R, C)
        Nonzero where a weight is active.
    group_size : int, default 16
        Rows per group that the caller will cut.
    metric : {"jaccard", "cosine"}
        Similarity of two column sets.
    seeds : {"similar", "densest"}
        Which rows found groups first.

    Returns
    -------
    ndarray of int32, shape (R,)
        The permutation; the same input always gives the same one.

    Raises
    ------
    FormatError
        mask not two-dimensional, or a bad option.
    """
    cosine = as_choice(metric, "metric", _METRICS) == "cosine"
    densest = as_choice(seeds, "seeds", _SEEDS) == "densest"
    group_size = as_int("group_size", group_size, 1)
    bits = _pack(as_mask(mask))
    counts = _row_counts(bits)
    whole, rest = [], []
    for chunk in _chunks(bits, counts, max(group_size, FAST_CHUNK_ROWS), cosine):
        order = _grow_groups(bits, counts, chunk, group_size, cosine, densest)
        cut = order.size // group_size * group_size
        whole.append(order[:cut])
        rest.append(order[cut:])
    if len(rest) > 1:  # the last groups of the chunks are short: group those rows among themselves
        rest = [_grow_groups(bits, counts, np.concatenate(rest), group_size, cosine, densest)]
    return np.concatenate([*whole, *rest, np.flatnonzero(counts == 0)]).astype(np.int32)


def _grow_groups(
    bits: _Words, counts: Int32Array, rows: Int32Array, group_size: int, cosine: bool, densest: bool
) -> Int32Array:
    order = np.empty(rows.size, np.int32)
    if densest:
        seeds, passes = rows[np.argsort(-counts[rows], kind="stable")], 0
    else:
        seeds = _seeds_first(bits, counts, rows, cosine)
        passes = int(group_size >= 8)  # a centre of fewer rows is hardly better than the seed
    _rows.greedy_groups(bits, counts, seeds, group_size, passes, cosine, order)
    return order


def _pack(mask: npt.NDArray[np.bool_]) -> _Words:
    """Rows as 64-bit words, least significant bit first; at least one word."""
    rows, cols = mask.shape
    n_bytes = max(1, -(-cols // 64)) * 8
    packed = np.zeros((rows, n_bytes), np.uint8)
    packed[:, : -(-cols // 8)] = np.packbits(mask, axis=1, bitorder="little")
    return packed.view(np.uint64)


def _row_counts(bits: _Words) -> Int32Array:
    counts = np.empty(len(bits), np.int32)
    _rows.row_counts(bits, counts)
    return counts


def _leaf_order(
    bits: _Words, counts: Int32Array, rows: Int32Array, cosine: bool, linkage: str
) -> Int32Array:
    """Leaves of the dendrogram over the given rows, from left to right."""
    if rows.size < 3:
        return rows
    # An odd number of cache lines a row: a power of two would put a column into one cache set.
    distance = np.empty((rows.size, (rows.size // 16 * 2 + 3) * 8), np.float64)
    _rows.row_distances(bits, counts, rows, cosine, distance)
    pairs = np.empty((rows.size - 1, 2), np.int32)
    heights = np.empty(rows.size - 1, np.float64)
    _rows.nearest_neighbour_chain(distance, linkage == "complete", pairs, heights)
    leaves = np.empty(rows.size, np.int32)
    _rows.leaf_order(pairs[np.argsort(heights, kind="stable")], leaves)
    ordered: Int32Array = rows[leaves]
    return ordered


def _chunks(bits: _Words, counts: Int32Array, limit: int, cosine: bool) -> list[Int32Array]:
    """Non-empty rows in pieces of at most `limit`, similar rows in one piece where possible."""
    rows = np.flatnonzero(counts).astype(np.int32)
    if rows.size <= limit:
        return [rows] if rows.size else []
    first, second, similarity = _likely_neighbours(bits, counts, rows, cosine, _CHUNK_HASHINGS)
    best = np.argsort(-similarity, kind="stable")
    label = np.empty(len(bits), np.int32)
    _rows.bounded_components(first[best], second[best], min(COMPONENT_ROWS, limit), label)
    ordered = rows[np.argsort(label[rows], kind="stable")]
    return np.split(ordered, _cuts(label[ordered], limit))


def _cuts(label: Int32Array, limit: int) -> list[int]:
    """Where to cut sorted labels into pieces of at most `limit` without cutting a component."""
    starts = np.flatnonzero(np.diff(label, prepend=-1))
    cuts, begin = [], 0
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), label.size], strict=True):
        if end - begin > limit:
            cuts.append(start)
            begin = start
    return cuts


def _seeds_first(bits: _Words, counts: Int32Array, rows: Int32Array, cosine: bool) -> Int32Array:
    """Rows by the similarity to their most similar likely neighbour, descending, ties in order."""
    first, second, similarity = _likely_neighbours(bits, counts, rows, cosine, 1)
    best = np.zeros(len(bits), np.float64)
    np.maximum.at(best, first, similarity)
    np.maximum.at(best, second, similarity)
    return rows[np.argsort(-best[rows], kind="stable")]


def _likely_neighbours(
    bits: _Words, counts: Int32Array, rows: Int32Array, cosine: bool, n_hashings: int
) -> tuple[Int32Array, Int32Array, npt.NDArray[np.float64]]:
    """Pairs of rows that are neighbours in some order of minhashes, and their similarity.

    Two rows agree in a minhash with about the probability of their Jaccard similarity (Broder
    1997). A hashing of the columns is dealt into eight bins and gives eight minhashes (Li, Owen
    and Zhang 2012), so each nonzero is looked at once. Order h of the eight compares four of them
    from the h-th on: neighbours share as long a run as any row has to offer.
    """
    random = np.random.default_rng(0)
    n_columns = bits.shape[1] * 64
    signature = np.empty((rows.size, 8), np.uint16)
    orders = []
    for _ in range(n_hashings):
        hashes = (random.permutation(n_columns) % 65536).astype(np.uint16)
        _rows.minhash(bits, hashes, rows, signature)
        runs = np.concatenate([signature, signature[:, :3]], axis=1).astype(np.uint64)
        for h in range(8):
            key = runs[:, h] << 48 | runs[:, h + 1] << 32 | runs[:, h + 2] << 16 | runs[:, h + 3]
            orders.append(rows[np.argsort(key, kind="stable")])
    first = np.concatenate([order[:-1] for order in orders])
    second = np.concatenate([order[1:] for order in orders])
    similarity = np.empty(first.size, np.float64)
    _rows.pair_similarities(bits, counts, first, second, cosine, similarity)
    return first, second, similarity
