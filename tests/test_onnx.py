"""ONNX: one file, three runtimes, one answer; broken files are refused."""

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
from format_cases import LAYOUTS
from fresh_python import run_python

from spfmt.activations import ACTIVATIONS, apply_activation
from spfmt.errors import FormatError, MissingDependency, SpfmtError
from spfmt.formats import FORMATS

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx_cases import (  # noqa: E402
    EMPTY,
    SHAPES,
    Array,
    bias_of,
    check,
    make_shuffled_block,
    one_layer,
    run_everywhere,
    samples,
    weight,
)

import spfmt.onnx as sonnx  # noqa: E402
from spfmt.onnx.session import _listening  # noqa: E402

# ------------------------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "cols"), SHAPES + EMPTY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_file_gives_the_same_answer(layout: str, rows: int, cols: int, dtype: Any) -> None:
    tensor = weight(layout, rows, cols, dtype)
    bias = bias_of(tensor)
    model = one_layer(tensor, bias)
    onnx.checker.check_model(model, full_check=True)
    x = samples(tensor, 7)
    for got in run_everywhere(model, x).values():
        check(got, x, tensor, bias)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_lowers_to_an_operator(format: str) -> None:
    tensor = weight(format, 37, 19)
    bias, x = bias_of(tensor), samples(tensor, 3)
    node, tensors = sonnx.make_node(tensor, "x", "bias", "y", name="layer")
    assert node.op_type == sonnx.OPERATORS[tensor.layout().name].op_type
    assert node.doc_string == repr(tensor)
    assert [t.name for t in tensors] == list(node.input[1:-1])
    for got in run_everywhere(one_layer(tensor, bias), x).values():
        check(got, x, tensor, bias)


@pytest.mark.parametrize("lead", [(0,), (1,), (17,), (64,), (3, 5), (2, 1, 4), (2, 0), ()])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_leading_dimensions(layout: str, lead: tuple[int, ...]) -> None:
    tensor = weight(layout, 37, 19)
    bias = bias_of(tensor)
    x = samples(tensor, *lead)
    for got in run_everywhere(one_layer(tensor, bias, lead=len(lead)), x).values():
        check(got, x, tensor, bias)


@pytest.mark.parametrize("opset", [18, 20, 21, 23])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bodies_hold_in_later_opsets(layout: str, opset: int) -> None:
    tensor = weight(layout, 13, 21)
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_layers_use_32_bit_indices(layout: str) -> None:
    tensor = weight(layout, 6, 70_000)
    assert sonnx.lower(tensor)["col_indices"].dtype == np.int32
    bias, x = bias_of(tensor), samples(tensor, 2)
    for library in (False, True):
        model = one_layer(tensor, bias).SerializeToString()
        check(sonnx.session(model, library=library).run(None, {"x": x})[0], x, tensor, bias)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_layers_use_16_bit_indices(layout: str) -> None:
    inputs = sonnx.lower(weight(layout, 37, 19))
    pointers = {"indptr", "row_ptr", "values"}
    assert {a.dtype.name for name, a in inputs.items() if name not in pointers} == {"uint16"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_profile_shows_our_kernel(layout: str) -> None:
    tensor = weight(layout, 64, 48)
    model = one_layer(tensor, bias_of(tensor)).SerializeToString()
    feeds = {"x": samples(tensor, 4)}
    (run,) = sonnx.kernels_run(model, feeds)
    assert (run.op_type, run.node, run.provider) == (
        sonnx.OPERATORS[layout].op_type,
        "layer",
        "CPUExecutionProvider",
    )
    assert run.microseconds >= 0
    threads = max(1, os.cpu_count() or 1)
    plan = tensor.plan.explain(4, threads)  # the same model: the cache directory is the tests'
    assert run.kernel
    assert all(word in plan for word in run.kernel.split(", ")[:2])
    # Without the library ONNX Runtime folds the body into one dense product.
    assert [run.op_type for run in sonnx.kernels_run(model, feeds, library=False)] == ["Gemm"]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plans_are_made_for_the_threads_of_the_session(layout: str) -> None:
    tensor = weight(layout, 512, 512)
    model = one_layer(tensor, bias_of(tensor)).SerializeToString()
    feeds = {"x": samples(tensor, 512)}

    def planned(threads: int) -> list[str]:
        session = sonnx.session(model, threads=threads)
        with _listening(True) as heard:
            for _ in range(4):
                session.run(None, feeds)
        return [kernel.split(", ")[2] for _, kernel in heard]

    assert planned(1) == ["1 threads"] * 4
    assert planned(2)[-1] == "2 threads"


@pytest.mark.parametrize("batch", [1, 64, 200])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_a_bit(layout: str, batch: int) -> None:
    tensor = weight(layout, 512, 300)
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nodes_and_functions_with_an_activation(activation: str) -> None:
    tensor = weight("nm", 37, 19)
    node, _ = sonnx.make_node(tensor, "x", "bias", "y", name="layer", activation=activation)
    body = sonnx.function("lists", activation=activation)
    assert node.op_type == body.name == "ListsLinear" + activation.title().replace("_", "")
    assert (body.node[0].domain, body.node[0].op_type) == (sonnx.DOMAIN, "ListsLinear")
    model = one_layer(tensor, bias_of(tensor))
    model.graph.node[0].op_type = node.op_type
    model.functions.append(body)
    onnx.checker.check_model(model, full_check=True)
    x = 4 * samples(tensor, 20)
    dense = tensor.to_dense().astype(float)
    want = apply_activation(activation, x @ dense.T + bias_of(tensor))
    for got in run_everywhere(model, x).values():
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(FormatError, match="activation='elu'"):
        sonnx.function("lists", activation="elu")
    tensor = weight("nm", 13, 21)
    with pytest.raises(FormatError, match="activation='elu'"):
        sonnx.make_node(tensor, "x", "bias", "y", name="layer", activation="elu")


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


def reshape(name: str, shape: tuple[int, ...]) -> Callable[..., None]:
    def change(inputs: dict[str, Array], attributes: dict[str, int]) -> None:
        inputs[name] = inputs[name].reshape(shape)

    return change


def drop(name: str) -> Callable[..., None]:
    def change(inputs: dict[str, Array], attributes: dict[str, int]) -> None:
        del attributes[name]

    return change


def both(change: Callable[..., None], message: str) -> list[tuple[str, Any, str]]:
    return [(layout, change, message) for layout in LAYOUTS]


BROKEN = [
    *both(cut("bias"), "bias: expected"),
    *both(cut("values"), "got shape"),
    *both(attribute("in_features", -1), "in_features: got -1"),
    *both(attribute("out_features", 2**40), "out_features: got"),
    *both(attribute("out_features", 38), "bias: expected"),
    *both(attribute("in_features", 3), "outside .0, 3"),
    *both(drop("in_features"), "no integer attribute in_features"),
    *both(put("col_indices", 3, 19), "outside .0, 19"),
    *both(put("col_indices", 3, 65535), "outside .0, 19"),
    *both(put("col_indices", 3, -1), "outside .0, 19"),
    *both(retype("col_indices", np.int64), "uint16 or int32"),
    *both(retype("col_indices", np.float32), "uint16 or int32"),
    *both(reshape("values", (1, -1)), "values: expected one dimension"),
    ("lists", copy("col_indices", 0, 1), "do not ascend"),
    ("lists", put("indptr", 3, -1), "indptr: index -1"),
    ("lists", put("indptr", 3, 10**6), "indptr: index 1000000"),
    ("lists", put("indptr", 0, 1), "expected pointers from 0"),
    ("lists", put("indptr", 2, 0), "do not ascend|pointers fall"),
    ("lists", cut("indptr"), "indptr: got shape"),
    ("lists", cut("col_indices"), "col_indices: got shape"),
    ("groups", copy("col_indices", 0, 1), "duplicate column"),
    ("groups", cut("col_indices"), "col_end: index"),
    ("groups", put("row_perm", 2, 40), "row_perm: index 40"),
    ("groups", copy("row_perm", 2, 3), "row_perm is not a permutation"),
    ("groups", cut("row_perm"), "row_perm: got shape"),
    ("groups", put("row_ptr", 1, -1), "row_ptr: index -1"),
    ("groups", put("row_ptr", 1, 0), "band without 1..16 rows"),
    ("groups", cut("row_ptr"), "col_begin: got shape|expected pointers from 0"),
    ("groups", put("col_begin", 1, 10**4), "col_begin: index"),
    ("groups", put("col_end", 1, 10**4), "col_end: index"),
    ("groups", put("col_end", 0, 0), "column range|got shape|values"),
    ("groups", cut("col_end"), "col_end: got shape"),
]


@pytest.mark.parametrize(("layout", "change", "message"), BROKEN)
def test_broken_structures_are_refused(
    layout: str, change: Callable[..., None], message: str
) -> None:
    tensor = weight(layout, 37, 19)
    model = one_layer(tensor, bias_of(tensor), change=change).SerializeToString()
    with pytest.raises(SpfmtError, match=message):
        sonnx.session(model)


def test_a_refusal_prints_nothing_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    tensor = weight("csr", 13, 21)
    with pytest.raises(SpfmtError):
        sonnx.session(one_layer(tensor, bias_of(tensor), change=cut("bias")).SerializeToString())
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("layout", "name"),
    [(name, free) for name, op in sonnx.OPERATORS.items() for free in (*op.inputs, "bias")],
)
def test_inputs_must_be_constant(layout: str, name: str) -> None:
    tensor = weight(layout, 37, 19)
    model = one_layer(tensor, bias_of(tensor), free=name).SerializeToString()
    with pytest.raises(SpfmtError, match=f"{name}: expected a constant"):
        sonnx.session(model)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_numbers_are_refused_or_harmless(layout: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensor = weight(layout, 37, 19)

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
        ("onnx", lambda: sonnx.function("lists")),
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


def test_half_precision_has_no_operator() -> None:
    with pytest.raises(FormatError, match="float32 or float64"):
        sonnx.lower(weight("csr", 3, 4, np.float16))


def test_unknown_layouts_have_no_operator() -> None:
    with pytest.raises(FormatError, match="lists, groups"):
        sonnx.function("coo")
