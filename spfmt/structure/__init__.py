"""Structure search: which weights a format keeps, as algorithms on plain numpy arrays.

Nothing here knows a format, a module or a framework. Scores are "larger is better" and free of NaN;
structure arrays are int32, pointers int64, and equal inputs give equal results.
"""

from __future__ import annotations

from .blocks import select_blocks
from .distribution import erk_densities, uniform_densities
from .fan_in import constant_fan_in
from .hrbp import hrbp_block_density, hrbp_blocks, hrbp_structure
from .nm import nm_columns, transposable_nm_columns, transposable_nm_mask, transposable_patterns
from .rows import order_rows, order_rows_fast
from .unstructured import per_row_topk, topk_columns, topk_mask

__all__ = [
    "constant_fan_in",
    "erk_densities",
    "hrbp_block_density",
    "hrbp_blocks",
    "hrbp_structure",
    "nm_columns",
    "order_rows",
    "order_rows_fast",
    "per_row_topk",
    "select_blocks",
    "topk_columns",
    "topk_mask",
    "transposable_nm_columns",
    "transposable_nm_mask",
    "transposable_patterns",
    "uniform_densities",
]
