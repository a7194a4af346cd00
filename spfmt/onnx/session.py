"""ONNX Runtime with the kernels of spfmt: find the library, register it, see what ran."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spfmt.errors import MissingDependency, SpfmtError
from spfmt.onnx._deps import require
from spfmt.onnx.functions import BASE_TYPES, SPARSE_NODES

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["KernelRun", "kernels_run", "library_path", "read_profile", "register", "session"]

_LIBRARY = "libspfmt_ort.so"
# ONNX Runtime refuses a library that was registered before on the same options.
_registered: weakref.WeakSet[Any] = weakref.WeakSet()


def library_path() -> str:
    """Path of the custom-op library, for any language that ONNX Runtime speaks.

    C, C++, C#, Java and Python register it with ``RegisterCustomOpsLibrary(path)``; ONNX Runtime
    1.17 or later is needed.

    Returns
    -------
    str

    Raises
    ------
    MissingDependency
        When spfmt was built without it.
    """
    path = Path(__file__).with_name(_LIBRARY)
    if not path.is_file():
        raise MissingDependency(
            f"got no file {path}; expected the library that the build of spfmt makes; run: "
            "pip install --force-reinstall spfmt, or in a checkout: python setup.py build_ext "
            "--inplace"
        )
    return str(path)


def register(session_options: onnxruntime.SessionOptions) -> onnxruntime.SessionOptions:
    """Make ONNX Runtime run our kernels in every session that is created with these options.

    Calling it again for the same options changes nothing.

    Parameters
    ----------
    session_options : onnxruntime.SessionOptions

    Returns
    -------
    onnxruntime.SessionOptions
        The same object.

    Raises
    ------
    MissingDependency
        When onnxruntime or the library is missing.
    SpfmtError
        When ONNX Runtime cannot load the library, as one older than 1.17.
    """
    require("onnxruntime")
    if session_options in _registered:
        return session_options
    try:
        session_options.register_custom_ops_library(library_path())
    except MissingDependency:
        raise
    except Exception as error:
        raise SpfmtError(
            f"got an error from ONNX Runtime while it loaded {_LIBRARY}: {error}; expected ONNX "
            "Runtime 1.17 or later; run: pip install --upgrade onnxruntime"
        ) from error
    _registered.add(session_options)
    return session_options


def session(
    model: str | os.PathLike[str] | bytes,
    *,
    threads: int | None = None,
    library: bool = True,
    session_options: onnxruntime.SessionOptions | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """Open a model in ONNX Runtime with our kernels.

    Parameters
    ----------
    model : path or bytes
        An ONNX file or its content.
    threads : int, optional
        Size of ONNX Runtime's pool (``intra_op_num_threads``); None leaves it as it is.
    library : bool
        False leaves our library out: the standard-operator bodies run.
    session_options : onnxruntime.SessionOptions, optional
        Options to use; they are changed by `threads` and by registering the library.
    providers : sequence of str
        Execution providers; our kernels belong to the CPU's.

    Returns
    -------
    onnxruntime.InferenceSession

    Raises
    ------
    MissingDependency
        When onnxruntime or the library is missing.
    SpfmtError
        When the model cannot be opened: no such file, truncated, or a structure that is broken.
    """
    ort = require("onnxruntime")
    options = ort.SessionOptions() if session_options is None else session_options
    if threads is not None:
        options.intra_op_num_threads = threads
    if library:
        register(options)
    source = model if isinstance(model, bytes) else os.fspath(model)
    name = f"{len(model)} bytes" if isinstance(model, bytes) else repr(source)
    try:
        # Without the fallback: it prints, and tries the same providers once more.
        opened = ort.InferenceSession(source, options, providers=list(providers), enable_fallback=0)
    except Exception as error:
        raise SpfmtError(
            f"got a model that ONNX Runtime cannot open ({name}): {error}; {_way_out(str(error))}"
        ) from error
    if library:
        _warn_if_dense(opened, source, name)
    return opened


def _way_out(error: str) -> str:
    """Return what was expected, and how to get there."""
    if "Domain already set" in error:
        return (
            "expected options on which the library is not registered; register it with "
            "spfmt.onnx.register(options), which remembers, or pass library=False"
        )
    if "tensor(float16)" in error or "tensor(bfloat16)" in error:
        return (
            "expected sparse layers in float32 or float64, for there are no narrower kernels; "
            "convert with op_block_list=[*spfmt.onnx.OP_TYPES], or pass library=False to run their "
            "standard operators"
        )
    return "expected a sound ONNX file; export it again with spfmt.onnx.export"


# A node's op_type in a serialized model: field 4, a length (any byte, a line feed too), our name.
_OURS = re.compile(rb"(?s:\x22.)(?:%s)" % "|".join(BASE_TYPES).encode())


def _warn_if_dense(opened: Any, source: str | bytes, name: str) -> None:
    """Warn of a file that was exported with sparse nodes and has lost them since."""
    count = opened.get_modelmeta().custom_metadata_map.get(SPARSE_NODES, "0")
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    inlined = any(f"_inlfunc_{name}".encode() in data for name in BASE_TYPES)
    if (count != "0" or inlined) and not _OURS.search(data):
        warnings.warn(
            f"{name} was exported with {count if count != '0' else 'some'} sparse layers and has "
            "none any more: a tool has replaced them by dense ones (docs/file-format.md says which "
            "do); run it on the dense parts, before the sparse layers are exported",
            stacklevel=3,
        )


@dataclass(frozen=True)
class KernelRun:
    """One line of a profile: a kernel that ran.

    Attributes
    ----------
    op_type : str
        Operator, such as ``"ListsLinear"`` for ours or ``"Gemm"`` for its standard body.
    node : str
        Name of the node.
    provider : str
        Execution provider.
    microseconds : float
        Wall time of this run.
    kernel : str
        For our operators in `kernels_run`, how the cost model chose to run it: instruction set,
        variant and threads, such as ``"avx512, lookup, 1 threads"``. Else empty.
    """

    op_type: str
    node: str
    provider: str
    microseconds: float
    kernel: str = ""


def read_profile(path: str | os.PathLike[str]) -> list[KernelRun]:
    """List the kernels in a profile that ONNX Runtime wrote.

    Parameters
    ----------
    path : path
        What ``InferenceSession.end_profiling()`` returned.

    Returns
    -------
    list of KernelRun
        In the order they ran.

    Raises
    ------
    SpfmtError
        When the file is no profile.
    """
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))
        return [
            KernelRun(
                event["args"]["op_name"],
                event["name"].removesuffix("_kernel_time"),
                event["args"].get("provider", ""),
                float(event["dur"]),
            )
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpfmtError(
            f"got {os.fspath(path)!r}, which is no profile of ONNX Runtime ({error}); expected the "
            "file that end_profiling() names"
        ) from error


def kernels_run(
    model: str | os.PathLike[str] | bytes,
    feeds: Mapping[str, Any],
    *,
    library: bool = True,
    threads: int | None = None,
) -> list[KernelRun]:
    """Run a model once under ONNX Runtime's profiler and list the kernels.

    Parameters
    ----------
    model : path or bytes
        An ONNX file or its content.
    feeds : mapping of str to ndarray
        The model's inputs.
    library, threads
        As in `session`.

    Returns
    -------
    list of KernelRun

    Raises
    ------
    MissingDependency, SpfmtError
        As in `session`.
    """
    ort = require("onnxruntime")
    with tempfile.TemporaryDirectory(prefix="spfmt-profile-") as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        opened = session(model, threads=threads, library=library, session_options=options)
        with _listening(library) as heard:
            opened.run(None, dict(feeds))
        return _with_kernels(read_profile(opened.end_profiling()), heard)


_listen_lock = threading.Lock()  # the library tells one listener
_listeners: list[Any] = []  # never freed: a run on another thread may be about to call one


@contextlib.contextmanager
def _listening(library: bool) -> Iterator[list[tuple[str, str]]]:
    """Collect (operator, how it runs) of every run of our operators in this process."""
    heard: list[tuple[str, str]] = []
    if not library:
        yield heard
        return

    def hear(op: bytes, isa: bytes, variant: bytes, threads: int) -> None:
        heard.append((op.decode(), f"{isa.decode()}, {variant.decode()}, {threads} threads"))

    text = ctypes.c_char_p
    callback = ctypes.CFUNCTYPE(None, text, text, text, ctypes.c_int)(hear)
    listen = ctypes.CDLL(library_path()).spfmt_ort_listen
    with _listen_lock:
        _listeners.append(callback)
        listen(callback)
        try:
            yield heard
        finally:
            listen(None)


def _with_kernels(runs: list[KernelRun], heard: list[tuple[str, str]]) -> list[KernelRun]:
    """Say of our runs how they ran, unless other sessions ran meanwhile and mixed the order."""
    ours = [i for i, run in enumerate(runs) if run.op_type in {op for op, _ in heard}]
    if [runs[i].op_type for i in ours] != [op for op, _ in heard]:
        return runs
    for i, (_, kernel) in zip(ours, heard, strict=True):
        runs[i] = dataclasses.replace(runs[i], kernel=kernel)
    return runs
