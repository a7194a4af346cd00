"""ONNX: one file, three runtimes, one answer; broken files are refused; exporting is tidy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fresh_python import run_python

import spfmt
from spfmt.errors import FormatError, MissingDependency, SpfmtError
from spfmt.formats import CSR, FORMATS, HRBP, NM, Condensed, ShuffledBlock, SparseTensor

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import spfmt.onnx as sonnx  # noqa: E402

Rng = np.random.Generator
Array = np.ndarray[Any, Any]

OP_TYPES = {name: operator.op_type for name, operator in sonnx.OPERATORS.items()}
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
    full = (rows, cols) != (6, 7)
    return MAKE[format](rows, cols, np.random.default_rng(seed), full).astype(dtype)


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
    inputs, attributes = {**lowered.inputs, "bias": bias}, dict(lowered.attributes)
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
    names = ["x", *lowered.inputs, "bias"]
    node = helper.make_node(
        lowered.op_type, names, ["y"], name="layer", domain=sonnx.DOMAIN, **attributes
    )
    graph = helper.make_graph(
        [node],
        "one_layer",
        graph_inputs,
        [info("y", dtype, [*dims, tensor.shape[0]] if rank_known else None)],
        [numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in inputs.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(sonnx.DOMAIN, sonnx.VERSION)]
    body = sonnx.function(tensor.format, opset)
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


def run_everywhere(model: Any, x: Array) -> dict[str, Array]:
    data = model.SerializeToString()
    return {
        "body": sonnx.session(data, library=False).run(None, {"x": x})[0],
        "reference": ReferenceEvaluator(model).run(None, {"x": x})[0],
        "library": sonnx.session(data).run(None, {"x": x})[0],
    }


# ------------------------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "cols"), SHAPES + EMPTY)
@pytest.mark.parametrize("format", FORMATS)
def test_the_same_file_gives_the_same_answer(format: str, rows: int, cols: int, dtype: Any) -> None:
    tensor = weight(format, rows, cols, dtype)
    bias = bias_of(tensor)
    model = one_layer(tensor, bias)
    onnx.checker.check_model(model, full_check=True)
    x = samples(tensor, 7)
    for got in run_everywhere(model, x).values():
        check(got, x, tensor, bias)


@pytest.mark.parametrize("lead", [(0,), (1,), (17,), (64,), (3, 5), (2, 1, 4), (2, 0), ()])
@pytest.mark.parametrize("format", FORMATS)
def test_any_leading_dimensions(format: str, lead: tuple[int, ...]) -> None:
    tensor = weight(format, 37, 19)
    bias = bias_of(tensor)
    x = samples(tensor, *lead)
    for got in run_everywhere(one_layer(tensor, bias, lead=len(lead)), x).values():
        check(got, x, tensor, bias)


@pytest.mark.parametrize("opset", [18, 20, 21, 23])
@pytest.mark.parametrize("format", FORMATS)
def test_bodies_hold_in_later_opsets(format: str, opset: int) -> None:
    tensor = weight(format, 13, 21)
    bias, x = bias_of(tensor), samples(tensor, 3)
    for got in run_everywhere(one_layer(tensor, bias, opset=opset), x).values():
        check(got, x, tensor, bias)


@pytest.mark.parametrize("block_rows", [1, 3, 16, 32, 100])
def test_block_heights(block_rows: int) -> None:
    rng = np.random.default_rng(0)
    tensor = make_shuffled_block(37, 19, rng, True, block_rows).astype(np.float32)
    bias, x = bias_of(tensor), samples(tensor, 5)
    for got in run_everywhere(one_layer(tensor, bias), x).values():
        check(got, x, tensor, bias)


@pytest.mark.parametrize("format", FORMATS)
def test_wide_layers_use_32_bit_indices(format: str) -> None:
    tensor = weight(format, 6, 70_000)
    lowered = sonnx.lower(tensor)
    wide = lowered.inputs["channel_indices" if format == "hrbp" else "col_indices"]
    assert wide.dtype == np.int32
    bias, x = bias_of(tensor), samples(tensor, 2)
    for library in (False, True):
        model = one_layer(tensor, bias).SerializeToString()
        check(sonnx.session(model, library=library).run(None, {"x": x})[0], x, tensor, bias)


@pytest.mark.parametrize("format", FORMATS)
def test_small_layers_use_16_bit_indices(format: str) -> None:
    inputs = sonnx.lower(weight(format, 37, 19)).inputs
    pointers = {"indptr", "group_ptr", "values"}
    assert {a.dtype.name for name, a in inputs.items() if name not in pointers} == {"uint16"}


@pytest.mark.parametrize("format", FORMATS)
def test_profile_shows_our_kernel(format: str) -> None:
    tensor = weight(format, 64, 48)
    model = one_layer(tensor, bias_of(tensor)).SerializeToString()
    feeds = {"x": samples(tensor, 4)}
    (run,) = sonnx.kernels_run(model, feeds)
    assert (run.op_type, run.node, run.provider) == (
        OP_TYPES[format],
        "layer",
        "CPUExecutionProvider",
    )
    assert run.microseconds >= 0
    # Without the library ONNX Runtime folds the body into one dense product.
    assert [run.op_type for run in sonnx.kernels_run(model, feeds, library=False)] == ["Gemm"]


@pytest.mark.parametrize("batch", [1, 64, 200])
@pytest.mark.parametrize("format", FORMATS)
def test_threads_do_not_change_a_bit(format: str, batch: int) -> None:
    tensor = weight(format, 512, 300)
    model = one_layer(tensor, bias_of(tensor)).SerializeToString()
    x = samples(tensor, batch)
    one, two = (sonnx.session(model, threads=n).run(None, {"x": x})[0] for n in (1, 2))
    assert np.array_equal(one, two)


def test_one_session_serves_many_threads() -> None:
    tensor = weight("condensed", 200, 300)
    session = sonnx.session(one_layer(tensor, bias_of(tensor)).SerializeToString())
    batches = [samples(tensor, 1 + i % 40, seed=i) for i in range(60)]
    alone = [session.run(None, {"x": x})[0] for x in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: session.run(None, {"x": x})[0], batches))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_symbolic_batch_survives() -> None:
    tensor = weight("nm", 64, 48)
    model = one_layer(tensor, bias_of(tensor), lead=2)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    output = sonnx.session(model.SerializeToString()).get_outputs()[0]
    assert (output.shape, output.type) == (["batch", "d1", 64], "tensor(float)")


def test_input_of_unknown_rank() -> None:
    tensor = weight("csr", 13, 21)
    bias = bias_of(tensor)
    session = sonnx.session(one_layer(tensor, bias, rank_known=False).SerializeToString())
    for lead in [(3,), (2, 4)]:
        x = samples(tensor, *lead)
        check(session.run(None, {"x": x})[0], x, tensor, bias)


def test_wrong_input_at_run_time() -> None:
    tensor = weight("csr", 13, 21)
    model = one_layer(tensor, bias_of(tensor), rank_known=False).SerializeToString()
    with pytest.raises(Exception, match="last dimension of 21"):
        sonnx.session(model).run(None, {"x": np.zeros((2, 20), np.float32)})


@pytest.mark.parametrize("isa", ["scalar", "nonsense"])
def test_isa_can_be_forced(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = weight("nm", 64, 48)
    bias, x = bias_of(tensor), samples(tensor, 5)
    model = one_layer(tensor, bias).SerializeToString()
    monkeypatch.setenv("SPFMT_ISA", isa)
    if isa == "scalar":
        check(sonnx.session(model).run(None, {"x": x})[0], x, tensor, bias)
    else:
        with pytest.raises(SpfmtError, match="names no level"):
            sonnx.session(model)


# ------------------------------------------------------------------------------- broken files


def put(name: str, place: Any, value: int) -> Callable[..., None]:
    def change(inputs: dict[str, Array], attributes: dict[str, int]) -> None:
        array = inputs[name].astype(np.int32 if value < 0 else inputs[name].dtype)
        array[place] = value
        inputs[name] = array

    return change


def copy(name: str, source: Any, target: Any) -> Callable[..., None]:
    def change(inputs: dict[str, Array], attributes: dict[str, int]) -> None:
        inputs[name] = inputs[name].copy()
        inputs[name][target] = inputs[name][source]

    return change


def cut(name: str) -> Callable[..., None]:
    def change(inputs: dict[str, Array], attributes: dict[str, int]) -> None:
        inputs[name] = inputs[name][:-1]

    return change


def attribute(name: str, value: int) -> Callable[..., None]:
    def change(inputs: dict[str, Array], attributes: dict[str, int]) -> None:
        attributes[name] = value

    return change


def retype(name: str, dtype: Any) -> Callable[..., None]:
    def change(inputs: dict[str, Array], attributes: dict[str, int]) -> None:
        inputs[name] = inputs[name].astype(dtype)

    return change


def drop(name: str) -> Callable[..., None]:
    def change(inputs: dict[str, Array], attributes: dict[str, int]) -> None:
        del attributes[name]

    return change


def any_format(change: Callable[..., None], message: str) -> list[tuple[str, Any, str]]:
    return [(format, change, message) for format in FORMATS]


BROKEN = [
    *any_format(cut("bias"), "bias: expected"),
    *any_format(cut("values"), "got shape"),
    *any_format(attribute("in_features", -1), "in_features: got -1"),
    *any_format(attribute("out_features", 2**40), "out_features: got"),
    *any_format(attribute("out_features", 38), "bias: expected"),
    *any_format(drop("in_features"), "no integer attribute in_features"),
    ("condensed", put("col_indices", (3, 1), 19), "outside .0, 19"),
    ("condensed", put("col_indices", (3, 1), 65535), "outside .0, 19"),
    ("condensed", put("col_indices", (3, 1), -1), "-1 at 16 is outside"),
    ("condensed", copy("col_indices", (3, 1), (3, 2)), "do not ascend"),
    ("condensed", put("row_indices", 4, 37), "outside .0, 37"),
    ("condensed", put("row_indices", 4, -5), "outside .0, 37"),
    ("condensed", copy("row_indices", 4, 5), "ascending rows without duplicates"),
    ("condensed", cut("row_indices"), "row_indices: got shape"),
    ("condensed", cut("col_indices"), "col_indices: got shape"),
    ("condensed", retype("col_indices", np.int64), "uint16 or int32"),
    ("condensed", attribute("in_features", 3), "outside .0, 3"),
    ("nm", put("col_indices", (3, 1), 19), "outside .0, 19"),
    ("nm", put("col_indices", (3, 1), -1), "outside .0, 19"),
    ("nm", put("col_indices", (3, 1), 7), "breaks 2:5"),
    ("nm", copy("col_indices", (3, 1), (3, 0)), "do not ascend"),
    ("nm", attribute("m", 0), "n, m: expected"),
    ("nm", attribute("n", 6), "n, m: expected"),
    ("nm", attribute("n", 1), "values: got shape"),
    ("nm", retype("col_indices", np.float32), "uint16 or int32"),
    ("csr", put("col_indices", 3, 19), "outside .0, 19"),
    ("csr", put("col_indices", 3, -1), "outside .0, 19"),
    ("csr", copy("col_indices", 0, 1), "do not ascend"),
    ("csr", put("indptr", 3, -1), "indptr: index -1"),
    ("csr", put("indptr", 3, 10**6), "indptr: index 1000000"),
    ("csr", put("indptr", 0, 1), "expected pointers from 0"),
    ("csr", put("indptr", 2, 0), "do not ascend|pointers fall"),
    ("csr", cut("indptr"), "indptr: got shape"),
    ("csr", cut("col_indices"), "col_indices: got shape"),
    ("shuffled_block", put("col_indices", 3, 19), "outside .0, 19"),
    ("shuffled_block", put("col_indices", 3, -1), "outside .0, 19"),
    ("shuffled_block", copy("col_indices", 0, 1), "duplicate column"),
    ("shuffled_block", put("group_ptr", 1, -1), "group_ptr: index -1"),
    ("shuffled_block", put("group_ptr", 1, 10**6), "group_ptr: index"),
    ("shuffled_block", cut("group_ptr"), "expected pointers from 0"),
    ("shuffled_block", put("row_positions", 2, 40), "row_positions: index 40"),
    ("shuffled_block", copy("row_positions", 2, 3), "rows 2 and 3 share one position"),
    ("shuffled_block", cut("row_positions"), "row_positions: got shape"),
    ("hrbp", put("channel_indices", (1, 2), 19), "outside .0, 19"),
    ("hrbp", put("channel_indices", (1, 2), -1), "outside .0, 19"),
    ("hrbp", copy("channel_indices", (1, 2), (1, 3)), "duplicate column"),
    ("hrbp", put("pattern_indices", (1, 0), 1), "outside .0, 1"),
    ("hrbp", cut("channel_indices"), "values: got shape"),
    ("hrbp", put("row_positions", 2, 39), "row_positions: index 39"),
    ("hrbp", copy("row_positions", 2, 3), "rows 2 and 3 share one position"),
    ("hrbp", attribute("cells", 0), "cells: expected"),
    ("hrbp", attribute("cells", 2), "cells: expected"),
]


@pytest.mark.parametrize(("format", "change", "message"), BROKEN)
def test_broken_structures_are_refused(
    format: str, change: Callable[..., None], message: str
) -> None:
    tensor = weight(format, 37, 19)
    model = one_layer(tensor, bias_of(tensor), change=change).SerializeToString()
    with pytest.raises(SpfmtError, match=message):
        sonnx.session(model)


def test_a_refusal_prints_nothing_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    tensor = weight("csr", 13, 21)
    with pytest.raises(SpfmtError):
        sonnx.session(one_layer(tensor, bias_of(tensor), change=cut("bias")).SerializeToString())
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("format", "name"),
    [(name, free) for name, op in sonnx.OPERATORS.items() for free in (*op.inputs, "bias")],
)
def test_inputs_must_be_constant(format: str, name: str) -> None:
    tensor = weight(format, 37, 19)
    model = one_layer(tensor, bias_of(tensor), free=name).SerializeToString()
    with pytest.raises(SpfmtError, match=f"{name}: expected a constant"):
        sonnx.session(model)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("format", FORMATS)
def test_damaged_numbers_are_refused_or_harmless(format: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensor = weight(format, 37, 19)

    def change(inputs: dict[str, Array], attributes: dict[str, int]) -> None:
        names = [n for n, a in inputs.items() if a.dtype.kind in "iu" and a.size]
        name = names[rng.integers(len(names))]
        array = inputs[name].copy()
        spots = rng.integers(array.size, size=rng.integers(1, 3))
        limits = np.iinfo(array.dtype)
        array.reshape(-1)[spots] = rng.choice([0, 1, 2, 18, 19, 36, limits.max, limits.min])
        inputs[name] = array

    bias, x = bias_of(tensor), samples(tensor, 3)
    model = one_layer(tensor, bias, change=change).SerializeToString()
    try:
        session = sonnx.session(model)
    except SpfmtError:
        return
    got = session.run(None, {"x": x})[0]  # still a sound structure, though another one
    body = sonnx.session(model, library=False).run(None, {"x": x})[0]
    assert np.allclose(got, body, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [0, 10, 300, -5])
def test_truncated_files_are_refused(keep: int, tmp_path: Path) -> None:
    tensor = weight("csr", 37, 19)
    path = tmp_path / "model.onnx"
    path.write_bytes(one_layer(tensor, bias_of(tensor)).SerializeToString()[:keep])
    with pytest.raises(SpfmtError, match="cannot open"):
        sonnx.session(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpfmtError, match=r"nowhere\.onnx"):
        sonnx.session(tmp_path / "nowhere.onnx")


def test_a_file_that_is_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text('{"not": "a profile"}')
    with pytest.raises(SpfmtError, match="no profile"):
        sonnx.read_profile(path)


# ------------------------------------------------------------------------------- registering


def test_register_is_idempotent() -> None:
    tensor = weight("nm", 13, 21)
    model = one_layer(tensor, bias_of(tensor)).SerializeToString()
    options = ort.SessionOptions()
    assert sonnx.register(options) is options
    assert sonnx.register(options) is options
    for _ in range(2):
        session = sonnx.session(model, session_options=options)
        assert session.run(None, {"x": samples(tensor, 2)})[0].shape == (2, 13)


def test_two_options_two_sessions() -> None:
    tensor = weight("hrbp", 13, 21)
    bias, x = bias_of(tensor), samples(tensor, 2)
    model = one_layer(tensor, bias).SerializeToString()
    sessions = [ort.InferenceSession(model, sonnx.register(ort.SessionOptions())) for _ in range(2)]
    for session in sessions:
        check(session.run(None, {"x": x})[0], x, tensor, bias)


def test_library_exports_one_symbol_of_ours() -> None:
    try:
        listing = subprocess.run(
            ["nm", "-D", "--defined-only", sonnx.library_path()],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except FileNotFoundError:
        pytest.skip("nm (binutils) is not installed")
    names = [line.split()[-1] for line in listing.splitlines()]
    assert "RegisterCustomOps" in names
    assert not [name for name in names if name.startswith(("_ZN5spfmt", "_ZNK5spfmt"))]


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("onnxruntime", lambda: sonnx.register(object())),  # type: ignore[arg-type]
        ("onnxruntime", lambda: sonnx.session("model.onnx")),
        ("onnx", lambda: sonnx.function("nm")),
        ("onnx", lambda: sonnx.export(None, (), "model.onnx")),  # type: ignore[arg-type]
        ("onnxscript", lambda: sonnx.export(None, (), "model.onnx")),  # type: ignore[arg-type]
        ("torch", lambda: sonnx.export(None, (), "model.onnx")),  # type: ignore[arg-type]
    ],
)
def test_missing_packages(
    module: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependency, match=rf"{module}.*pip install"):
        call()


def test_importing_needs_numpy_only() -> None:
    code = (
        "import sys; blocked = ('torch', 'onnx', 'onnxruntime', 'onnxscript')\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"
        "import spfmt.onnx; print(spfmt.onnx.DOMAIN)"
    )
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("spfmt\n", "")


# ------------------------------------------------------------------------------- lowering


def test_convolutions_have_no_operator() -> None:
    tensor = CSR.from_dense(np.ones((2, 3, 3, 3), np.float32))
    with pytest.raises(FormatError, match="two dimensions"):
        sonnx.lower(tensor)


def test_half_precision_has_no_operator() -> None:
    with pytest.raises(FormatError, match="float32 or float64"):
        sonnx.lower(weight("csr", 3, 4, np.float16))


def test_unknown_formats_have_no_operator() -> None:
    with pytest.raises(FormatError, match="csr"):
        sonnx.function("coo")


# ------------------------------------------------------------------------------- export

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from torch import nn  # noqa: E402

from spfmt.torch import SparseLinear  # noqa: E402


def layer(format: str, rows: int, cols: int, *, bias: bool = True, spare: int = 0) -> Any:
    tensor = weight(format, rows, cols)
    offset = torch.from_numpy(bias_of(tensor)) if bias else None
    return SparseLinear.from_tensor(tensor, offset, capacity=tensor.nnz + spare)


def network() -> Any:
    shared = layer("csr", 19, 19, bias=False)
    return nn.Sequential(
        layer("condensed", 19, 21),
        nn.ReLU(),
        shared,
        nn.LayerNorm(19),
        nn.Dropout(),
        shared,
        layer("nm", 24, 19, bias=False),
        nn.GELU(),
        layer("shuffled_block", 33, 24),
        nn.Linear(33, 19),
        layer("hrbp", 10, 19),
    )


def only_input(path: Path) -> str:
    return str(onnx.load(path).graph.input[0].name)


@pytest.mark.parametrize("example", [(1, 21), (4, 21), (3, 5, 21)])
def test_export_of_a_whole_network(example: tuple[int, ...], tmp_path: Path) -> None:
    model = network()
    path = sonnx.export(model, torch.zeros(example), tmp_path / "net.onnx")
    assert path == tmp_path / "net.onnx"
    assert model.training
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert {f.name for f in proto.functions} == set(OP_TYPES.values())
    model.eval()
    for batch in (0, 1, 17):
        x = torch.randn(batch, *example[1:])
        feeds = {only_input(path): x.numpy()}
        expected = model(x).detach().numpy()
        runs = [
            sonnx.session(path).run(None, feeds)[0],
            sonnx.session(path, library=False).run(None, feeds)[0],
            ReferenceEvaluator(proto).run(None, feeds)[0] if batch else expected,
        ]
        for got in runs:
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    ran = {run.op_type for run in sonnx.kernels_run(path, feeds)}
    assert ran >= set(OP_TYPES.values())


def test_export_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sonnx.export(network(), torch.zeros(2, 21), tmp_path / "net.onnx")
    assert capfd.readouterr() == ("", "")


def test_training_data_stays_out_of_the_file(tmp_path: Path) -> None:
    model = layer("condensed", 37, 19, spare=10_000)
    with torch.no_grad():
        model.values[-10_000:] = 7.0  # whatever a tail holds, it is not part of the weight
    proto = onnx.load(sonnx.export(model, torch.zeros(2, 19), tmp_path / "net.onnx"))
    sizes = {t.name: int(np.prod(t.dims)) for t in proto.graph.initializer}
    tensor = weight("condensed", 37, 19)
    assert sum(sizes.values()) == 2 * tensor.nnz + 35 + 37
    assert not proto.graph.metadata_props
    assert not any(node.metadata_props for node in proto.graph.node)


def test_layers_that_share_a_weight_share_it_in_the_file(tmp_path: Path) -> None:
    proto = onnx.load(sonnx.export(network(), torch.zeros(2, 21), tmp_path / "net.onnx"))
    used = [node.input[1:] for node in proto.graph.node if node.op_type == "CSRLinear"]
    assert len(used) == 2
    assert used[0] == used[1]


def test_export_of_float64(tmp_path: Path) -> None:
    model = nn.Sequential(layer("condensed", 19, 21), nn.ReLU(), layer("hrbp", 10, 19)).double()
    path = sonnx.export(model, torch.zeros(2, 21, dtype=torch.float64), tmp_path / "net.onnx")
    x = torch.randn(5, 21, dtype=torch.float64)
    got = sonnx.session(path).run(None, {only_input(path): x.numpy()})[0]
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-12, atol=1e-12)


def test_export_of_half_precision_is_refused(tmp_path: Path) -> None:
    model = layer("csr", 13, 21).half()
    with pytest.raises(SpfmtError):
        sonnx.export(model, torch.zeros(2, 21, dtype=torch.float16), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_inlined_files_are_plain(tmp_path: Path) -> None:
    model = network().eval()
    path = sonnx.export(model, torch.zeros(2, 21), tmp_path / "net.onnx", inline=True)
    proto = onnx.load(path)
    assert not proto.functions
    used = {name for node in proto.graph.node for name in node.input}
    assert all(used.intersection(n.output) for n in proto.graph.node if n.op_type == "Constant")
    assert {opset.domain for opset in proto.opset_import} == {""}
    x = torch.randn(5, 21)
    got = sonnx.session(path, library=False).run(None, {only_input(path): x.numpy()})[0]
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_fixed_batch_and_names(tmp_path: Path) -> None:
    path = sonnx.export(
        layer("nm", 13, 21),
        torch.zeros(3, 21),
        tmp_path / "net.onnx",
        dynamic_batch=False,
        input_names=["pixels"],
        output_names=["logits"],
        opset=20,
    )
    session = sonnx.session(path)
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("pixels", [3, 21])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", [3, 13])]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = layer("nm", 13, 21), layer("csr", 13, 19)

    def forward(self, left: Any, *, right: Any) -> Any:
        return self.one(left) + self.two(right)


def test_keyword_inputs(tmp_path: Path) -> None:
    model = TwoInputs()
    path = sonnx.export(
        model, torch.zeros(1, 21), tmp_path / "net.onnx", kwargs={"right": torch.zeros(1, 19)}
    )
    left, right = torch.randn(6, 21), torch.randn(6, 19)
    feeds = {"left": left.numpy(), "right": right.numpy()}
    got = sonnx.session(path).run(None, feeds)[0]
    expected = model(left, right=right).detach().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = layer("nm", 13, 21), layer("csr", 13, 21)

    def forward(self, x: Any) -> Any:
        return torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.two(x), (x,))


def test_layers_inside_branches(tmp_path: Path) -> None:
    path = sonnx.export(Branches(), torch.randn(2, 21), tmp_path / "net.onnx")
    for sign, op_type in [(1, "NMLinear"), (-1, "CSRLinear")]:
        feeds = {only_input(path): np.full((3, 21), sign, np.float32)}
        assert op_type in {run.op_type for run in sonnx.kernels_run(path, feeds)}
        fast, body = (sonnx.session(path, library=lib).run(None, feeds)[0] for lib in (True, False))
        np.testing.assert_allclose(fast, body, rtol=1e-5, atol=1e-5)


class Untranslatable(nn.Module):
    def forward(self, x: Any) -> Any:
        return x if x.sum() > 0 else -x  # a branch that only running the model tells


def test_a_module_that_cannot_be_exported(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"what was there")
    model = nn.Sequential(layer("nm", 13, 21), Untranslatable())
    with pytest.raises(sonnx.ExportError, match="cannot translate") as caught:
        sonnx.export(model, torch.zeros(2, 21), path)
    assert "\x1b" not in str(caught.value)
    assert "GuardOnDataDependentSymNode" in str(caught.value)[:150]  # the cause comes first
    assert path.read_bytes() == b"what was there"
    assert model.training


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = layer("nm", 13, 21)

    def forward(self, x: Any) -> Any:
        values = self.inner.values * x.sum()
        return torch.ops.spfmt.spmm(values, self.inner.structure, x, None, [13, 21], "nm")


def test_computed_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(sonnx.ExportError, match="whose weight the graph computes"):
        sonnx.export(Computed(), torch.zeros(2, 21), tmp_path / "net.onnx")


def test_an_opset_that_is_too_old_or_too_new(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="opset=17"):
        sonnx.export(network(), torch.zeros(2, 21), tmp_path / "net.onnx", opset=17)
    with pytest.raises(FormatError, match="opset=99"):
        sonnx.export(network(), torch.zeros(2, 21), tmp_path / "net.onnx", opset=99)


def test_a_path_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["spfmt.onnx.export"], "_translate", None)  # is not reached
    with pytest.raises(FileNotFoundError, match=r"make '.*missing' first"):
        sonnx.export(network(), torch.zeros(2, 21), tmp_path / "missing" / "net.onnx")
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(IsADirectoryError, match=r"net\.onnx', a folder"):
        sonnx.export(network(), torch.zeros(2, 21), tmp_path / "net.onnx")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="writable"):
        sonnx.export(network(), torch.zeros(2, 21), tmp_path / "other.onnx")


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        sonnx.export(layer("nm", 13, 21), torch.zeros(2, 21), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_names_that_do_not_fit(tmp_path: Path) -> None:
    model, x, path = layer("nm", 13, 21), torch.zeros(2, 21), tmp_path / "net.onnx"
    with pytest.raises(FormatError, match="input_names='x'"):
        sonnx.export(model, x, path, input_names="x")
    with pytest.raises(FormatError, match="output_names"):
        sonnx.export(model, x, path, output_names=["y", "z"])


def test_a_compiled_model(tmp_path: Path) -> None:
    model = layer("nm", 13, 21)
    path = sonnx.export(
        torch.compile(model, backend="eager"), torch.zeros(1, 21), tmp_path / "net.onnx"
    )
    assert sonnx.session(path).get_inputs()[0].shape == ["batch", 21]


class FromDictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = layer("nm", 13, 21)

    def forward(self, inputs: Any) -> Any:
        return self.inner(inputs["left"]) - self.inner(inputs["right"])


def test_a_dictionary_of_inputs(tmp_path: Path) -> None:
    example = {"left": torch.zeros(1, 21), "right": torch.zeros(1, 21)}
    path = sonnx.export(FromDictionary(), (example,), tmp_path / "net.onnx")
    assert [i.shape for i in sonnx.session(path).get_inputs()] == [["batch", 21]] * 2


def test_public_names() -> None:
    assert spfmt.onnx is sonnx
    for name in sonnx.__all__:
        assert hasattr(sonnx, name)
