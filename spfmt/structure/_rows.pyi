import numpy as np
import numpy.typing as npt

_Double = npt.NDArray[np.float64]
_Int32 = npt.NDArray[np.int32]
_Bytes = npt.NDArray[np.uint8]
_Words = npt.NDArray[np.uint64]

def overlapping(bits: _Words, counts: _Int32, fraction: float, out: _Bytes) -> None: ...
def row_distances(
    bits: _Words, counts: _Int32, chosen: _Int32, cosine: bool, out: _Double
) -> None: ...
def nearest_neighbour_chain(
    distance: _Double, complete: bool, pairs: _Int32, heights: _Double
) -> None: ...
def leaf_order(pairs: _Int32, leaves: _Int32) -> None: ...
def pair_similarities(
    bits: _Words, counts: _Int32, first: _Int32, second: _Int32, cosine: bool, out: _Double
) -> None: ...
def row_counts(bits: _Words, out: _Int32) -> None: ...
def minhash(
    bits: _Words, hashes: npt.NDArray[np.uint16], rows: _Int32, out: npt.NDArray[np.uint16]
) -> None: ...
def bounded_components(first: _Int32, second: _Int32, limit: int, label: _Int32) -> None: ...
def greedy_groups(
    bits: _Words,
    counts: _Int32,
    chosen: _Int32,
    group_size: int,
    passes: int,
    cosine: bool,
    out: _Int32,
) -> None: ...
