"""What our kernels are compared with: dense layers, other libraries' sparse products, peers.

Every package here is optional. One that is missing or does not load is never left out in silence:
`absent` says why, and every report prints it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from spfmt.bench.contenders import FEATURES_FIRST, LAYER, Contender, Setting
from spfmt.bench.machine import available_memory
from spfmt.formats import CSR, SparseTensor

__all__ = [
    "BASELINES",
    "DENSE",
    "NotMeasured",
    "absent",
    "available",
    "dense",
    "loaded",
    "quiet_options",
    "require",
]

Array = npt.NDArray[Any]
_PACKAGES = {
    "torch": "torch",
    "onnxruntime": "onnxruntime",
    "onnx": "onnx",
    "scipy": "scipy.sparse",
    "sparse_dot_mkl": "sparse_dot_mkl",
    "sparseprop": "sparseprop.modules",
}
_MOST_MEMORY = 1 << 28  # bytes of intermediate results
_SPIN_DURATION_SINCE = (1, 31)  # the release that was checked; the option may be older
_MOST_PROTOBUF = (1 << 31) - (1 << 20)


class NotMeasured(Exception):
    """Why a baseline does not take part in a case."""


@functools.cache
def _load(package: str) -> tuple[Any, str]:
    """Import a package; return it and "", or None and why it is missing."""
    if package == "sparseprop":
        _load("torch")  # its extension needs torch's libraries
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(_PACKAGES[package]), ""
    except (ImportError, OSError, RuntimeError) as error:
        return None, " ".join(str(error).split())


def available(package: str) -> bool:
    """Tell whether an optional package can be imported."""
    return _load(package)[0] is not None


def loaded(package: str) -> Any:
    """Return an optional package, or None."""
    return _load(package)[0]


def absent() -> dict[str, str]:
    """Return the packages that cannot be compared with, and why."""
    return {package: _load(package)[1] for package in _PACKAGES if not available(package)}


def require(package: str) -> Any:
    """Return an optional package; raise `NotMeasured` where there is none."""
    module, reason = _load(package)
    if module is None:
        raise NotMeasured(f"no {package}: {reason}")
    return module


def _only(setting: Setting, *ops: str) -> None:
    if setting.case.op not in ops:
        raise NotMeasured(f"has no {setting.case.op}")


def _fits(setting: Setting, copies: int) -> None:
    """Refuse a dense layer that would need more than half of the memory."""
    rows, cols = setting.case.shape
    needed = 4 * copies * rows * cols
    if needed > available_memory() // 2:
        raise NotMeasured(f"its {copies} copies of the weight would take {needed / 1e9:.1f} GB")


def _one_thread(setting: Setting) -> None:
    """Refuse threads to a package whose own pool spins on while others are timed."""
    if setting.case.threads > 1:
        raise NotMeasured("brings a thread pool that would disturb the others")


# ------------------------------------------------------------------------------------- dense


def torch_dense(setting: Setting) -> Contender:
    """Dense product in torch: ``F.linear`` and the two products of its backward pass."""
    torch = require("torch")
    _only(setting, "spmm", "spmm_t", "sddmm")
    _fits(setting, 1)
    w, x, dy = (torch.from_numpy(a) for a in (setting.dense, setting.x, setting.dy))
    linear = torch.nn.functional.linear
    calls: dict[str, Callable[[], Any]] = {
        "spmm": lambda: linear(x, w),
        "spmm_t": lambda: dy @ w,
        "sddmm": lambda: dy.T @ x,
    }
    return setting.contender("torch dense", "dense", setting.dense, calls[setting.case.op])


def onnx_dense(setting: Setting) -> Contender:
    """Dense product in ONNX Runtime: one Gemm."""
    require("onnxruntime")
    require("onnx")
    _only(setting, "spmm", "spmm_t")
    _fits(setting, 4)  # ours, the file's, the session's, and one packed for Gemm
    if setting.dense.nbytes > _MOST_PROTOBUF:
        raise NotMeasured("the weight does not fit an ONNX file of 2 GB")
    run = onnx_dense_session(setting.dense, setting.case.op, setting.case.threads).run
    feed = {"x": setting.x if setting.case.op == "spmm" else setting.dy}
    return setting.contender(
        "onnxruntime dense",
        "dense",
        setting.dense,
        lambda: run(None, feed),
        results=lambda outputs: outputs,
    )


def numpy_dense(setting: Setting) -> Contender:
    """Dense product in numpy, with the BLAS that numpy was built with."""
    _only(setting, "spmm", "spmm_t", "sddmm")
    _fits(setting, 1)
    w, x, dy = setting.dense, setting.x, setting.dy
    calls: dict[str, Callable[[], Any]] = {
        "spmm": lambda: x @ w.T,
        "spmm_t": lambda: dy @ w,
        "sddmm": lambda: dy.T @ x,
    }
    return setting.contender("numpy dense", "dense", setting.dense, calls[setting.case.op])


_sessions: dict[tuple[int, str, int], tuple[Any, Any]] = {}


def onnx_dense_session(weight: Array, op: str, threads: int) -> Any:
    """Return a session that computes Y = X Wᵀ (spmm) or dX = dY W (spmm_t) from input ``x``.

    See `quiet_options` for what its threads do between calls.
    """
    key = id(weight), op, threads
    if key not in _sessions:
        for other in [k for k in _sessions if k[0] != key[0]]:
            del _sessions[other]  # one weight at a time: each session holds a packed copy
        _sessions[key] = weight, _make_session(weight, op, threads)
    return _sessions[key][1]


def _make_session(weight: Array, op: str, threads: int) -> Any:
    ort = require("onnxruntime")
    model = dense_gemm(weight, transposed=op != "spmm")
    return ort.InferenceSession(model, quiet_options(threads))


def quiet_options(threads: int) -> Any:
    """Return session options under which idle threads soon stop spinning.

    By default they spin for tens of milliseconds and hold the cores while the next contender is
    timed. Two milliseconds still find them awake from the untimed call to the timed one, as in a
    loop of the same call: ONNX Runtime's best time. Releases that lack the option stop at once.
    """
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) >= _SPIN_DURATION_SINCE:
        options.add_session_config_entry("session.intra_op.spin_duration_us", "2000")
    else:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


# ----------------------------------------------------------------- other sparse libraries


def torch_csr(setting: Setting, a: SparseTensor) -> Contender:
    """Product of torch's own CSR tensor, in the layout that it likes best."""
    torch = require("torch")
    _only(setting, "spmm")
    csr = _as_csr(a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "CSR support is in beta state"
        w = torch.sparse_csr_tensor(
            torch.from_numpy(csr.indptr.copy()),
            torch.from_numpy(csr.col_indices.astype(np.int64)),
            torch.from_numpy(csr.values.copy()),
            csr.matrix_shape,
        )
    x = torch.from_numpy(setting.x_features)
    return setting.contender("torch CSR", "baseline", a, lambda: w @ x, layout=FEATURES_FIRST)


def scipy_csr(setting: Setting, a: SparseTensor) -> Contender:
    """Product of scipy's CSR array."""
    w = _scipy_csr(a)
    _only(setting, "spmm")
    _one_thread(setting)
    x = setting.x_features
    return setting.contender("scipy CSR", "baseline", a, lambda: w @ x, layout=FEATURES_FIRST)


def scipy_bsr(setting: Setting, a: SparseTensor) -> Contender:
    """Product of scipy's BSR array of 16 x 16 blocks at random places, as dense as `a`."""
    sparse = require("scipy")
    _only(setting, "spmm")
    _one_thread(setting)
    side = 16
    rows, cols = setting.case.shape
    if rows % side or cols % side:
        raise NotMeasured(f"{rows} x {cols} is not made of {side} x {side} blocks")
    rng = np.random.default_rng(4)
    cells = rows * cols // side**2
    kept = np.zeros(cells, bool)
    kept[rng.permutation(cells)[: max(1, round(a.density * cells))]] = True
    mask = np.kron(kept.reshape(rows // side, -1), np.ones((side, side), bool))
    b = CSR.from_dense(rng.standard_normal(setting.case.shape, dtype=np.float32), mask)
    w = sparse.bsr_array(_scipy_csr(b), blocksize=(side, side))
    x = setting.x_features
    name = f"scipy BSR {side}x{side}"
    return setting.contender(name, "baseline", b, lambda: w @ x, layout=FEATURES_FIRST)


def structured(setting: Setting, a: SparseTensor) -> Contender:
    """Dense layer with as many weights as `a`: all other rows are ablated, and removed."""
    torch = require("torch")
    _only(setting, "spmm")
    kept = np.ascontiguousarray(setting.dense[: max(1, round(a.density * setting.case.shape[0]))])
    w, x = torch.from_numpy(kept), torch.from_numpy(setting.x)
    linear = torch.nn.functional.linear
    return setting.contender("structured (dense rows)", "baseline", kept, lambda: linear(x, w))


def torch_gather(setting: Setting, a: SparseTensor) -> Contender:
    """Condensed product the straightforward way: gather, multiply, sum, in torch."""
    torch = require("torch")
    _only(setting, "spmm")
    csr = _as_csr(a)
    counts = np.diff(csr.indptr)
    if not counts.size or counts.min() != counts.max():
        raise NotMeasured("is for constant fan-in in every row")
    nbytes = 4 * a.nnz * setting.case.batch
    if nbytes > _MOST_MEMORY:
        raise NotMeasured(f"would gather {nbytes / 1e9:.1f} GB")
    index = torch.from_numpy(csr.col_indices.astype(np.int64).reshape(counts.size, -1))
    w, x = torch.from_numpy(csr.values.reshape(counts.size, -1).copy()), torch.from_numpy(setting.x)
    return setting.contender("torch gather", "baseline", a, lambda: (x[:, index] * w).sum(-1))


def mkl_csr(setting: Setting, a: SparseTensor) -> Contender:
    """Product of MKL's sparse BLAS through sparse_dot_mkl."""
    mkl = require("sparse_dot_mkl")
    _only(setting, "spmm")
    _one_thread(setting)
    w, x = _scipy_csr(a), setting.x_features
    mkl.mkl_set_num_threads(1)
    multiply = mkl.dot_product_mkl
    return setting.contender(
        "sparse_dot_mkl CSR", "baseline", a, lambda: multiply(w, x), layout=FEATURES_FIRST
    )


def sparseprop(setting: Setting, a: SparseTensor) -> Contender:
    """SparseProp's linear layer (Nikdan et al. 2023), forward or forward and backward."""
    modules, torch = require("sparseprop"), require("torch")
    _only(setting, "spmm", "conv2d", LAYER)
    _one_thread(setting)
    csr = _as_csr(a)
    if setting.case.geometry is not None:
        from spfmt.bench import conv

        return conv.sparseprop(setting, csr)
    bias = torch.nn.Parameter(torch.zeros(setting.case.shape[0]))
    layer = modules.SparseLinear(torch.from_numpy(csr.to_dense()), bias)
    if setting.case.op == LAYER:
        from spfmt.bench.layer import layer_contender

        return layer_contender(setting, "SparseProp", "baseline", csr, layer, layer.W_val)
    x = torch.from_numpy(setting.x)

    def forward() -> Any:
        with torch.no_grad():
            return layer(x)

    return setting.contender("SparseProp", "baseline", a, forward)


def _as_csr(a: SparseTensor) -> CSR:
    from spfmt.convert import convert

    csr: CSR = convert(a, CSR)
    return csr


def _scipy_csr(a: SparseTensor) -> Any:
    csr = _as_csr(a)
    parts = csr.values.copy(), csr.col_indices.copy(), csr.indptr.copy()
    return require("scipy").csr_array(parts, shape=csr.matrix_shape)


# ------------------------------------------------------------------------------------- tables

Dense = Callable[[Setting], Contender]
Baseline = Callable[[Setting, SparseTensor], Contender]

DENSE: Mapping[str, Dense] = {
    "torch": torch_dense,
    "onnxruntime": onnx_dense,
    "numpy": numpy_dense,
}
# By the format whose random weight they take.
BASELINES: Mapping[str, tuple[str, Baseline]] = {
    "structured": ("condensed", structured),
    "torch gather": ("condensed", torch_gather),
    "torch CSR": ("csr", torch_csr),
    "scipy CSR": ("csr", scipy_csr),
    "scipy BSR": ("csr", scipy_bsr),
    "sparse_dot_mkl": ("csr", mkl_csr),
    "SparseProp": ("csr", sparseprop),
}


def dense(setting: Setting) -> tuple[list[Contender], dict[str, str]]:
    """Return the dense layers that speed-ups refer to, and those that are missing with reasons.

    numpy takes part only where neither torch nor ONNX Runtime does: its BLAS is the slowest.
    """
    table = DENSE
    if setting.case.geometry is not None:
        from spfmt.bench import conv

        table = conv.dense(setting.case)
    elif setting.case.op == LAYER:
        from spfmt.bench.layer import dense_layer

        return [dense_layer(setting)], {}
    found: list[Contender] = []
    missing: dict[str, str] = {}
    for name, make in table.items():
        if name == "numpy" and found:
            break
        try:
            found.append(make(setting))
        except NotMeasured as reason:
            missing[f"{name} dense"] = str(reason)
    if found and found[0].name == "numpy dense" and not _limit_blas(setting.case.threads):
        missing["limit of numpy's threads"] = "no threadpoolctl: it takes as many as it likes"
    return found, missing


def _limit_blas(threads: int) -> bool:
    """Give numpy's BLAS a number of threads, if threadpoolctl is there to do it."""
    try:
        limits = importlib.import_module("threadpoolctl").threadpool_limits
    except ImportError:
        return False
    limits(threads, user_api="blas")
    return True


def dense_gemm(weight: Array, *, transposed: bool = False) -> bytes:
    """Return an ONNX model of one dense layer, Y = X Wᵀ, or Y = X W where `transposed`.

    Parameters
    ----------
    weight : ndarray of float32, shape (R, C)
    transposed : bool
        Whether X is (batch, R) and Y (batch, C) instead of the other way round.
    """
    from onnx import TensorProto, helper, numpy_helper

    n_out, n_in = weight.shape[::-1] if transposed else weight.shape
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=int(not transposed))],
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, n_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, n_out])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return model
