from typing import Any

import numpy as np
import numpy.typing as npt

_Int32 = npt.NDArray[np.int32]
_Int64 = npt.NDArray[np.int64]
_Elements = npt.NDArray[Any]

def content_hash(words: _Int32) -> int: ...
def flat_indices(rows: _Int32, runs: _Int64, columns: _Int32, n_cols: int, out: _Int64) -> None: ...
def mark(
    rows: _Int32, runs: _Int64, columns: _Int32, n_cols: int, bits: npt.NDArray[np.uint8]
) -> None: ...
def gather(
    rows: _Int32, runs: _Int64, columns: _Int32, n_cols: int, dense: _Elements, out: _Elements
) -> None: ...
def scatter(
    rows: _Int32, runs: _Int64, columns: _Int32, n_cols: int, values: _Elements, dense: _Elements
) -> None: ...
def sources(
    rows: _Int32, runs: _Int64, columns: _Int32, old_runs: _Int64, old_columns: _Int32,
    n_cols: int, out: _Int64,
) -> None: ...  # fmt: skip
