import numpy as np
import numpy.typing as npt

_Places = npt.NDArray[np.int64]
_Double = npt.NDArray[np.float64]
_Bytes = npt.NDArray[np.uint8]

def lines_of(
    places: _Places,
    value_ptr: _Places,
    bands: _Places,
    block_cols: int,
    in_row: _Places,
    in_column: _Places,
    enough: _Bytes,
) -> None: ...
def best_first(x: _Double, y: _Double, out: _Places) -> None: ...
def free_positions(
    blocks: _Places,
    rows: _Places,
    columns: _Places,
    taken: _Bytes,
    count: int,
    found: _Places,
    held: int,
) -> tuple[int, int]: ...
