"""Weights, one-layer models and runtimes for the ONNX tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from format_cases import LAYOUTS

from spfmt.formats import CSR, HRBP, NM, Condensed, ShuffledBlock, SparseTensor

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import spfmt.onnx as sonnx  # noqa: E402

Rng = np.random.Generator
Array = np.ndarray[Any, Any]

SHAPES = [(1, 1), (13, 21), (37, 19), (64, 48), (16, 130)]
EMPTY = [(0, 5), (5, 0), (0, 0), (6, 7)]  # the last one without nonzeros


# ------------------------------------------------------------------------------- weights


def ragged(rng: Rng, limit: int, n: int) -> Array:
    return np.sort(rng.permutation(limit)[:n])


def make_condensed(rows: int, cols: int, rng: Rng, full: bool) -> SparseTensor:
    active = ragged(rng, rows, max(0, rows - 2) if full else 0)
    k = min(cols, 5) if full else 0
    columns = np.array([ragged(rng, cols, k) for _ in active], int).reshape(len(active), k)
    return Condensed((rows, cols), active, columns, rng.standard_normal(columns.shape))


def make_nm(rows: int, cols: int, rng: Rng, full: bool) -> SparseTensor:
    n, m = (2, 5) if full else (0, 5)
    starts = range(0, cols, m)
    lengths = [min(m, cols - start) for start in starts]
    columns = [
        np.concatenate(
            [s + ragged(rng, length, n) for s, length in zip(starts, lengths, strict=True)]
        )
        for _ in range(rows)
        if cols
    ]
    kept = sum(min(n, length) for length in lengths)
    table = np.array(columns).reshape(rows, kept).astype(np.int32)
    return NM((rows, cols), n, m, table, rng.standard_normal(table.shape))


def make_csr(rows: int, cols: int, rng: Rng, full: bool) -> SparseTensor:
    mask = rng.random((rows, cols)) < (0.3 if full else 0)
    return CSR.from_dense(rng.standard_normal((rows, cols)), mask)


def make_shuffled_block(
    rows: int, cols: int, rng: Rng, full: bool, block_rows: int = 20
) -> SparseTensor:
    groups = -(-rows // block_rows)
    columns = [
        rng.permutation(cols)[: rng.integers(0, cols + 1) if full else 0] for _ in range(groups)
    ]
    heights = [min(block_rows, rows - g * block_rows) for g in range(groups)]
    nnz = sum(h * len(c) for h, c in zip(heights, columns, strict=True))
    arrays = {
        "row_perm": rng.permutation(rows),
        "group_ptr": np.cumsum([0, *map(len, columns)]),
        "col_indices": np.concatenate([np.zeros(0, int), *columns]),
    }
    params = {"block_rows": block_rows, "block_cols": 2}
    return ShuffledBlock._from_parts((rows, cols), arrays, params, rng.standard_normal(nnz))


def make_hrbp(rows: int, cols: int, rng: Rng, full: bool) -> SparseTensor:
    groups = min(3, rows)
    kept = max(1, cols // 3) if full and cols else 0
    sizes = [len(part) for part in np.array_split(np.arange(rows), groups)] if groups else []
    arrays = {
        "row_perm": rng.permutation(rows),
        "row_ptr": np.cumsum([0, *sizes]),
        "channel_indices": np.array([ragged(rng, cols, kept) for _ in sizes], int).reshape(
            groups, kept
        ),
        "pattern_indices": np.zeros((groups, 1 if kept else 0), int),
    }
    params = {"groups": groups}
    return HRBP._from_parts((rows, cols), arrays, params, rng.standard_normal(rows * kept))


MAKE: dict[str, Callable[..., SparseTensor]] = {
    "condensed": make_condensed,
    "nm": make_nm,
    "shuffled_block": make_shuffled_block,
    "hrbp": make_hrbp,
    "csr": make_csr,
}


def weight(
    format: str, rows: int, cols: int, dtype: Any = np.float32, seed: int = 0
) -> SparseTensor:
    """A weight of a format, or of the least regular one of a layout."""
    full = (rows, cols) != (6, 7)
    return MAKE[LAYOUTS.get(format, format)](rows, cols, np.random.default_rng(seed), full).astype(
        dtype
    )


def one_layer(
    tensor: SparseTensor,
    bias: Array,
    *,
    lead: int = 1,
    opset: int = sonnx.MIN_OPSET,
    rank_known: bool = True,
    change: Callable[[dict[str, Array], dict[str, int]], None] | None = None,
    free: str | None = None,
) -> Any:
    """A model of one layer; `change` damages it, `free` names an input to make non-constant."""
    lowered = sonnx.lower(tensor)
    inputs = {**lowered, "bias": bias}
    attributes = {"in_features": tensor.shape[1], "out_features": tensor.shape[0]}
    if change is not None:
        change(inputs, attributes)
    dtype = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    dims = ["batch", *(f"d{i}" for i in range(1, lead))][:lead]
    info = helper.make_tensor_value_info
    graph_inputs = [info("x", dtype, [*dims, tensor.shape[1]] if rank_known else None)]
    if free:
        array = inputs.pop(free)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        graph_inputs.append(info(free, kind, array.shape))
    names = ["x", *lowered, "bias"]
    node = helper.make_node(
        sonnx.OPERATORS[tensor.layout().name].op_type,
        names,
        ["y"],
        name="layer",
        domain=sonnx.DOMAIN,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "one_layer",
        graph_inputs,
        [info("y", dtype, [*dims, tensor.shape[0]] if rank_known else None)],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in inputs.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(sonnx.DOMAIN, sonnx.VERSION)]
    body = sonnx.function(tensor.layout().name, opset)
    return helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=8)


def bias_of(tensor: SparseTensor, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(tensor.shape[0]).astype(tensor.dtype)


def samples(tensor: SparseTensor, *lead: int, seed: int = 2) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*lead, tensor.shape[1])).astype(tensor.dtype)


def check(got: Array, x: Array, tensor: SparseTensor, bias: Array) -> None:
    """Compare with float64; the bound is that of a sum of C + 1 products in any order."""
    dense = tensor.to_dense().astype(np.float64)
    wide = x.astype(np.float64)
    expected = wide @ dense.T + bias
    terms = tensor.shape[1] + 2
    bound = terms * np.finfo(tensor.dtype).eps * (np.abs(wide) @ np.abs(dense).T + np.abs(bias))
    assert got.dtype == tensor.dtype
    assert got.shape == expected.shape
    assert (np.abs(got - expected) <= bound).all()


def run_everywhere(model: Any, x: Array, **others: Array) -> dict[str, Array]:
    data, inputs = model.SerializeToString(), {"x": x, **others}
    return {
        "body": sonnx.session(data, library=False).run(None, inputs)[0],
        "reference": ReferenceEvaluator(model).run(None, inputs)[0],
        "library": sonnx.session(data).run(None, inputs)[0],
    }
