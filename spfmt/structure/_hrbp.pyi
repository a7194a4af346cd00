import numpy as np
import numpy.typing as npt

_Float = npt.NDArray[np.float32] | npt.NDArray[np.float64]
_Double = npt.NDArray[np.float64]
_Int32 = npt.NDArray[np.int32]
_Int64 = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]

def kernel_counts(mask: _Bytes, cells: int, out: _Int32) -> None: ...
def kernel_sums(scores: _Float, cells: int, kernels: _Int64, out: _Double) -> None: ...
def channel_totals(
    kernel_mask: _Bytes, mask: _Bytes, scores: _Float, rows: _Int32, cells: int,
    counts: _Int64, sums: _Double,
) -> None: ...  # fmt: skip
def cell_counts(
    mask: _Bytes, scores: _Float, rows: _Int32, channels: _Int32, counts: _Int64, sums: _Double
) -> None: ...
