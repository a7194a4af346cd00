"""Choice of kernels, threads, forks, and who may import whom."""

from __future__ import annotations

import ast
import logging
import multiprocessing
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fresh_python import run_python

import spfmt
from spfmt import dispatch
from spfmt.bench import machine

PACKAGE = Path(spfmt.__file__).parent


@pytest.mark.parametrize("isa", dispatch.LEVELS)
def test_environment_forces_a_level(isa: str) -> None:
    if isa not in dispatch._available_levels():
        pytest.skip(f"this CPU lacks {isa}")
    code = "import spfmt; print(spfmt.dispatch.select('spmm', 'lists', 'float32').isa)"
    assert run_python(code, SPFMT_ISA=isa).stdout.strip() == isa


def test_unknown_level_in_the_environment() -> None:
    result = run_python("import spfmt; spfmt.show_config()", SPFMT_ISA="sse9")
    assert "SPFMT_ISA=sse9 names no level; expected scalar, avx2 or avx512" in result.stderr


def test_level_may_change_while_the_process_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a = spfmt.CSR.from_dense(np.eye(3, dtype="float32"))
    for isa in dispatch._available_levels():
        monkeypatch.setenv("SPFMT_ISA", isa)
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="spfmt"):
            spfmt.spmm(a, np.ones((3, 2), "float32"))
        assert f"kernel {isa}," in caplog.text
        assert f"instruction set: {isa}" in spfmt.show_config()


def test_an_emulated_level_is_in_use_only_where_it_is_forced() -> None:
    if not dispatch.EMULATED:
        pytest.skip("this build emulates no level (SPFMT_EMULATE)")
    code = "import spfmt; print(spfmt.dispatch.active_isa())"
    assert run_python(code, SPFMT_ISA="").stdout.strip() not in dispatch.EMULATED
    for isa in dispatch.EMULATED:
        assert run_python(code, SPFMT_ISA=isa).stdout.strip() == isa


def test_nothing_measures_an_emulated_level(monkeypatch: pytest.MonkeyPatch) -> None:
    isa = dispatch.active_isa()
    monkeypatch.setattr(dispatch, "EMULATED", ())
    assert dispatch.timed_isa() == isa
    monkeypatch.setattr(dispatch, "EMULATED", (isa,))
    assert f"instruction set: {isa}[emulated]" in spfmt.show_config()
    for measure in (dispatch.timed_isa, machine.describe):
        with pytest.raises(spfmt.FormatError, match=f"level '{isa}', which this build emulates"):
            measure()


def test_threads_may_exceed_the_default_of_openmp() -> None:
    code = (
        "import spfmt; print(spfmt.get_num_threads()); spfmt.set_num_threads(3)\n"
        "print(spfmt.get_num_threads())"
    )
    assert run_python(code, OMP_NUM_THREADS="1").stdout.split() == ["1", "3"]


def test_memory_that_runs_out_inside_a_thread_is_an_error() -> None:
    """Panels of X are allocated by each thread: no exception may leave an OpenMP region."""
    code = """if True:
        import resource, numpy as np, spfmt
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
        cols, nnz = 2**31 - 1, 9000
        indices = np.arange(nnz, dtype="int32")
        a = spfmt.CSR((1, cols), np.array([0, nnz]), indices, np.ones(nnz, "float32"))
        x = np.broadcast_to(np.float32(1), (cols, 128))
        for threads in (1, 2):
            spfmt.set_num_threads(threads)
            try:
                spfmt.spmm(a, x)
            except MemoryError:
                print("MemoryError")
        """
    result = run_python(code)
    assert result.stdout.split() == ["MemoryError"] * 2, result.stderr


def test_bindings_refuse_arrays_of_other_kinds() -> None:
    """Nothing is converted on the way to a pointer."""
    kernels = dispatch._kernels
    pointers, columns = np.array([0, 1, 2]), np.array([0, 1], "int32")
    plan = kernels.lists_plan(2, 2, pointers, columns)
    bad_plans = [(pointers.astype("int32"), columns), (pointers, columns.astype("int64"))]
    for bad in bad_plans:
        with pytest.raises(TypeError):
            kernels.lists_plan(2, 2, *bad)
    for bad in [(pointers[:2], columns), (pointers, columns[:1]), (pointers[::-1], columns)]:
        with pytest.raises((ValueError, TypeError)):
            kernels.lists_plan(2, 2, *bad)
    with pytest.raises(ValueError, match="column index out of range"):
        kernels.lists_plan(2, 1, pointers, columns)
    calls = kernels.bind(plan)
    x, odd = np.ones((2, 3), "float32"), np.ones(25, "u1")[1:].view("float32").reshape(2, 3)
    for values, operand, out in [
        (np.ones(2), x, x.copy()),
        (x[0, :1], x, x.copy()),
        (x[0, :2], x.astype("float64"), x.copy()),
        (x[0, :2], x[:1], x.copy()),
        (x[0, :2], odd, x.copy()),
        (x[0, :2], x, x[:, :2].copy()),
    ]:
        for op in (0, 1):
            arguments = (op, values, None, operand, None, 0, False, out, 1, None)
            assert calls[0](*arguments) is None  # left to the long way, which explains


def test_bindings_check_groups() -> None:
    def plan(cols: int = 3, **changed: list[int]) -> object:
        kinds = {
            "row_perm": ("int32", [1, 0]), "row_ptr": ("int64", [0, 2]),
            "col_begin": ("int64", [0]), "col_end": ("int64", [2]),
            "col_indices": ("int32", [2, 0]), "value_ptr": ("int64", [0, 4]),
        }  # fmt: skip
        arrays = {k: np.array(changed.get(k, v), dtype) for k, (dtype, v) in kinds.items()}
        return dispatch._kernels.groups_plan(2, cols, **arrays)

    plan()
    for message, changed in {
        "not a permutation": {"row_perm": [1, 1]},
        "one entry per row": {"row_perm": [0]},
        "do not cover all rows": {"row_ptr": [0, 1]},
        "duplicate column": {"col_indices": [2, 2]},
        "column index out of range": {"col_indices": [3, 0]},
        "column range out of bounds": {"col_end": [3]},
        "column index out of range at 2": {"col_indices": [2, 0, -1]},  # no band names it
        "wrong number of values": {"value_ptr": [0, 5]},
        "does not start at 0": {"value_ptr": [1, 5]},
    }.items():
        with pytest.raises(ValueError, match=message):
            plan(**changed)


def test_import_needs_numpy_alone() -> None:
    code = (
        "import sys, spfmt\n"
        "bad = {'torch', 'scipy', 'sklearn', 'onnx', 'onnxruntime', 'safetensors', 'rich'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    assert run_python(code).stdout.strip() == "[]"


def test_the_table_of_cuda() -> None:
    found = spfmt.kernels(device="cuda")
    assert {(k.device, k.isa) for k in found} == {("cuda", "sm_80")}
    assert len(found) == 3 * (3 + 6)
    assert {k.layout for k in spfmt.kernels("conv2d", device="cuda")} == {"groups"}
    assert {bool(k.reason) for k in found} == {not k.available for k in found}
    assert {k.device for k in spfmt.kernels()} == {"cpu"}
    with pytest.raises(spfmt.FormatError, match="device='gpu'"):
        spfmt.kernels(device="gpu")


def test_show_config_lists_every_row() -> None:
    text = spfmt.show_config()
    rows = [line.split() for line in text.splitlines()]
    for kernel in spfmt.kernels():
        (levels,) = [r[3:] for r in rows if r[:3] == [kernel.layout, kernel.op, kernel.dtype]]
        assert any(kernel.isa in level for level in levels)
    assert f"threads: {spfmt.get_num_threads()}" in text
    assert sum(line.startswith("CUDA: ") for line in text.splitlines()) == 1


def test_debug_log_names_the_kernel(caplog: pytest.LogCaptureFixture) -> None:
    a = spfmt.CSR.from_dense(np.eye(3, dtype="float32"))
    with caplog.at_level(logging.DEBUG, logger="spfmt"):
        spfmt.spmm(a, np.ones((3, 2), "float32"), backend="scalar")
    assert "spmm lists float32: kernel scalar, 3 x 3, nnz 3, batch 2" in caplog.text


def _product(a: spfmt.CSR, x: np.ndarray) -> np.ndarray:
    spfmt.set_num_threads(2)
    return spfmt.spmm(a, x)


def _in_child(queue: multiprocessing.Queue, a: spfmt.CSR, x: np.ndarray) -> None:  # type: ignore[type-arg]
    queue.put(_product(a, x))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_computes_after_parallel_parent() -> None:
    rng = np.random.default_rng(0)
    a = spfmt.CSR.from_dense(rng.standard_normal((200, 200)).astype("float32"))
    x = rng.standard_normal((200, 256)).astype("float32")
    want = _product(a, x)  # starts the parent's threads, which the child does not inherit
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, a, x))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), want)
    child.join(60)
    spfmt.set_num_threads(None)
    assert child.exitcode == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_computes_while_the_parent_lowers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock of another tensor's first product is inherited locked."""
    lowering, done = threading.Event(), threading.Event()
    other = spfmt.NM.from_scores(np.ones((8, 8), "float32"), n=2, m=4)
    lower = spfmt.NM._lower

    def slow(structure: Any) -> Any:
        lowering.set()
        assert done.wait(60)
        return lower(structure)

    monkeypatch.setattr(spfmt.NM, "_lower", slow)
    thread = threading.Thread(target=lambda: other.plan)
    thread.start()
    assert lowering.wait(60)
    a, x = spfmt.CSR.from_dense(np.eye(5, dtype="float32")), np.ones((5, 1), "float32")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, a, x), daemon=True)
    child.start()
    try:
        np.testing.assert_array_equal(queue.get(timeout=60), x)
    finally:
        done.set()
        thread.join()
        child.kill()
        child.join()
        spfmt.set_num_threads(None)


def test_padding_of_plans() -> None:
    """What small batches multiply by zero: nothing in n:m, half as much again if random."""
    scores = np.random.default_rng(1).random((3072, 768))
    assert spfmt.NM.from_scores(scores, n=3, m=32).plan.padding == 1.0
    assert spfmt.NM.from_scores(scores, n=2, m=4).plan.padding == 1.0
    assert spfmt.ShuffledBlock.from_scores(scores, 0.1).plan.padding == 1.0
    assert 1.0 < spfmt.Condensed.from_scores(scores, 0.1).plan.padding < 1.51
    assert 1.0 < spfmt.CSR.from_scores(scores, 0.1).plan.padding < 1.53
    assert spfmt.CSR((5, 7), np.zeros(6, int), [], []).plan.padding == 1.0


def test_gil_is_released_inside_kernels() -> None:
    """A sleeping thread gets the interpreter although this one never gives it up by itself."""
    a = spfmt.CSR.from_dense(np.ones((600, 600), "float32"))
    x = np.ones((600, 64), "float32")
    spfmt.spmm(a, x)
    awake = []
    thread = threading.Thread(target=lambda: (time.sleep(0.02), awake.append(True)))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread.start()
        stop = time.perf_counter() + 20
        while not awake and time.perf_counter() < stop:
            spfmt.spmm(a, x)
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert time.perf_counter() < stop


def test_one_plan_from_many_threads() -> None:
    """Concurrent products with different values on one structure do not see each other's copies."""
    rng = np.random.default_rng(1)
    a = spfmt.Condensed.from_scores(rng.random((512, 512)).astype("float32"), 0.2)
    tensors = [a.with_values(np.full(a.values.shape, i, "float32")) for i in range(4)]
    x = rng.standard_normal((512, 15)).astype("float32")  # long enough to be overtaken
    want = [spfmt.spmm(t, x, backend="reference") for t in tensors]

    def work(i: int) -> float:
        return max(np.abs(spfmt.spmm(tensors[i], x) - want[i]).max() for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) < 1e-3


# errors <- structure <- formats <- convert <- dispatch <- ops <- torch <- train; onnx beside train;
# bench and recipes beside cli, above the others; models are plain torch
ORDER = {
    "errors": set(),
    "_files": set(),
    "_memory": set(),
    "threads": {"errors"},
    "structure": {"errors"},
    "formats": {"errors", "_files", "_memory", "structure"},
    "convert": {"errors", "formats"},
    "activations": {"errors"},
    "cost": {"errors", "threads"},
    "cuda": {"errors", "formats"},
    "dispatch": {"_memory", "activations", "cuda", "errors", "formats", "cost", "threads"},
    "advice": {"errors", "formats", "convert", "convolution", "cost", "dispatch"},
    "convolution": {"_memory", "activations", "cost", "dispatch", "errors", "formats", "threads"},
    "ops": {"errors", "formats", "dispatch"},
    "torch": {
        "_memory",
        "activations",
        "errors",
        "structure",
        "formats",
        "convert",
        "convolution",
        "cost",
        "cuda",
        "dispatch",
        "ops",
        "threads",
    },
    "models": {"errors", "structure"},
    "train": {"errors", "structure", "formats", "convert", "dispatch", "ops", "torch"},
    "onnx": {
        "activations",
        "errors",
        "_files",
        "structure",
        "formats",
        "convert",
        "convolution",
        "dispatch",
        "ops",
        "torch",
    },
    "recipes": {"errors", "_files", "formats", "torch", "models", "train", "onnx"},
    "ceilings": {"errors"},
    "bench": {
        "errors",
        "_files",
        "_memory",
        "ceilings",
        "threads",
        "formats",
        "convert",
        "convolution",
        "dispatch",
        "ops",
        "torch",
        "onnx",
    },
}
LAZY = {"formats": {"ops", "dispatch"}}  # operators and plans call up, from inside functions


def _module_imports(path: Path, top_level: bool) -> set[str]:
    """Rooms of spfmt that a file imports, at module level only or anywhere."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(n)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for n in ast.walk(branch)
    }
    nodes = [n for n in (tree.body if top_level else ast.walk(tree)) if id(n) not in guarded]
    package = ["spfmt", *path.relative_to(PACKAGE).parts[:-1]]
    rooms = set()
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("spfmt.")}
    return rooms & set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_imports_follow_the_design(room: str) -> None:
    root = PACKAGE / room
    files = sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]
    assert files
    for path in files:
        allowed = ORDER[room] | {room}
        assert _module_imports(path, top_level=True) <= allowed, path
        assert _module_imports(path, top_level=False) <= allowed | LAZY.get(room, set()), path


def test_every_module_has_its_place() -> None:
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name[0] != "."}
    rooms = {r for r in rooms if (PACKAGE / f"{r}.py").exists() or any((PACKAGE / r).glob("*.py"))}
    assert rooms - {"__init__", "cli"} == set(ORDER)


def test_only_rooms_of_training_and_export_import_torch() -> None:
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ("torch", "models", "train", "recipes", "onnx", "cli"):
            continue
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not any(n.split(".")[0] == "torch" for n in names), path
