import numpy as np
import numpy.typing as npt

_Float = npt.NDArray[np.float32] | npt.NDArray[np.float64]
_Double = npt.NDArray[np.float64]
_Int32 = npt.NDArray[np.int32]
_Int64 = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]

def top_columns(scores: _Float, k: int, row_ptr: _Int64, columns: _Int32, keep: _Bytes) -> None: ...
def nm_columns(scores: _Float, n: int, m: int, cells: int, out: _Int32) -> None: ...
def transposable_2_4(scores: _Float, cells: int, patterns: _Int32, out: _Bytes) -> None: ...
def transposable_tiles(scores: _Float, n: int, m: int, cells: int, out: _Bytes) -> None: ...
def block_norms(
    scores: _Float,
    row_perm: _Int32,
    block_rows: int,
    block_cols: int,
    order: _Int32,
    norms: _Double,
) -> None: ...
