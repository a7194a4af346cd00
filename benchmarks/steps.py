"""Whole networks: a step of training, where its time goes, and inference in ONNX Runtime."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spfmt.bench.baselines import quiet_options
from spfmt.bench.exact import WrongResult
from spfmt.bench.rows import rounded
from spfmt.bench.timing import Timing
from spfmt.torch import SparseModule, densify

__all__ = ["PARTS", "ModelRow", "Step", "breakdown", "check_model", "in_onnxruntime", "model_rows"]

# Where the time of a step goes, and torch's operators that belong there.
_OPERATORS: Mapping[str, Sequence[str]] = {
    "convolution forward": ("aten::convolution", "spfmt::conv2d"),
    "convolution dX": ("spfmt::conv2d_input",),
    "convolution dW": ("spfmt::conv2d_weight",),
    "batch norm": (
        "aten::native_batch_norm", "aten::native_batch_norm_backward",
        "aten::_native_batch_norm_legit",
    ),
    "activations": ("aten::relu", "aten::relu_", "aten::threshold_backward"),
}  # fmt: skip
_PART = {name: part for part, names in _OPERATORS.items() for name in names}
_BACKWARD = "aten::convolution_backward"  # is asked for dX and dW one by one
PARTS = (*_OPERATORS, "optimizer", "other")
_WORSE = 8  # times as far from float64 as torch's dense network with the same weights


class Step:
    """One step of training: forward, backward, SGD with momentum.

    Parameters
    ----------
    model : nn.Module
    x : Tensor, shape (N, C, H, W)
    y : Tensor of int64, shape (N,)
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4
        )

    def gradients(self) -> Tensor:
        """Run both passes and return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return loss

    def __call__(self) -> None:
        """Run the step."""
        self.gradients()
        self.optimizer.step()


# -------------------------------------------------------------------------------------- check


def check_model(name: str, model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Compare logits and gradients with those of the dense network of the same weights in float64.

    Sums of many layers have no useful bound, so torch's own float32 network is the measure. Kinks
    are smoothed in all three: a rounding that turns the sign of one ReLU changes gradients by more.

    Returns
    -------
    float
        The largest difference over that of torch's network, of float32's rounding at least.

    Raises
    ------
    WrongResult
        Where it is more than eight times as far away.
    """
    own_model, dense = _smooth(copy.deepcopy(model)), _smooth(copy.deepcopy(model))
    densify(dense)
    want = _results(copy.deepcopy(dense).double(), model, x.double(), y)
    own, torchs = (_results(m, model, x, y) for m in (own_model, dense))
    worst = 0.0
    for what, exact in want.items():
        scale = float(exact.abs().max()) or 1.0
        far, near = (float((r[what] - exact).abs().max()) / scale for r in (own, torchs))
        ratio = far / max(near, 8 * float(np.finfo(np.float32).eps))
        if not ratio <= _WORSE:
            raise WrongResult(
                f"{name}: got {what} {far:.1e} away from float64; torch's dense network is "
                f"{near:.1e} away; no time is reported for it"
            )
        worst = max(worst, ratio)
    return worst


def _smooth(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU | nn.ReLU6):
                setattr(module, name, nn.SiLU())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    return model


def _results(model: nn.Module, like: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Logits, and gradients of all weights; of dense ones where `like` is sparse, its values'."""
    model.train()
    logits = model(x)
    nn.functional.cross_entropy(logits, y).backward()
    found = {"logits": logits.detach().double()}
    modules: dict[str, Any] = dict(model.named_modules())
    for name, layer in like.named_modules():
        if isinstance(layer, SparseModule):
            own = modules[name]
            if isinstance(own, SparseModule):
                gradient: Any = own.values.grad
            else:
                places = torch.from_numpy(layer.tensor().flat_indices())
                gradient = own.weight.grad.reshape(-1)[places]
            found[f"the gradient of {name}"] = gradient.double()
    first: Any = next(model.parameters())
    found["the gradient of the first layer"] = first.grad.double()
    return found


# --------------------------------------------------------------------------- where time goes


class _Clock(TorchDispatchMode):
    """Adds up the time of every operator; CPU time, so that other programs do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name != _BACKWARD:
            return self._timed(_PART.get(name, "other"), func, args, kwargs or {})
        *rest, (needs_x, needs_w, needs_bias) = args
        dx = dw = db = None
        if needs_x:
            mask = (True, False, False)
            dx = self._timed("convolution dX", func, (*rest, mask), {})[0]
        if needs_w or needs_bias:
            mask = (False, needs_w, needs_bias)
            _, dw, db = self._timed("convolution dW", func, (*rest, mask), {})
        return dx, dw, db

    def _timed(self, part: str, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        start = time.process_time()
        result = func(*args, **kwargs)
        self.seconds[part] += time.process_time() - start
        return result


def breakdown(step: Step) -> dict[str, float]:
    """Return milliseconds of CPU time of one step by `PARTS`; run the step before."""
    clock = _Clock()
    start = time.process_time()
    with clock:
        step.gradients()
    both = time.process_time() - start
    start = time.process_time()
    step.optimizer.step()
    clock.seconds["optimizer"] = time.process_time() - start
    clock.seconds["other"] += both - sum(clock.seconds[p] for p in PARTS if p != "optimizer")
    return {part: 1e3 * clock.seconds[part] for part in PARTS}


# --------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class ModelRow:
    """One measured network.

    Attributes
    ----------
    suite : {"step", "inference"}
    network, name, layout : str
    density : float
        Of all weights of layers that are sparse, or would be.
    batch, threads : int
    us, low, high, samples, shared, left_out, waited
        As `Timing` has them.
    speedup : float or None
        The fastest dense network's median over this one.
    parts : dict of str to float or None
        Milliseconds by `PARTS`.
    """

    suite: str
    network: str
    name: str
    kind: str
    layout: str
    density: float
    batch: int
    threads: int
    us: float
    low: float
    high: float
    samples: int
    shared: float
    left_out: bool
    waited: float
    speedup: float | None
    parts: dict[str, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the fields, rounded to what a timing can mean."""
        fields = {k: rounded(v) for k, v in asdict(self).items()}
        if self.parts is not None:
            fields["parts"] = {k: rounded(v) for k, v in self.parts.items()}
        return fields


def model_rows(
    suite: str,
    network: str,
    batch: int,
    found: Sequence[Mapping[str, Any]],
    times: Sequence[Timing],
) -> list[ModelRow]:
    """Turn timings of some ways to run a network into rows.

    Parameters
    ----------
    suite, network : str
    batch : int
    found : sequence of mapping
        ``name``, ``kind``, ``layout``, ``density`` and, if known, ``parts`` of each.
    times : sequence of Timing
    """
    dense = [t.median for f, t in zip(found, times, strict=True) if f["kind"] == "dense"]
    best = min(dense, default=None)
    return [
        ModelRow(
            suite=suite,
            network=network,
            batch=batch,
            threads=1,
            us=t.median,
            speedup=None if best is None else best / t.median,
            **{
                k: getattr(t, k) for k in ("low", "high", "samples", "shared", "left_out", "waited")
            },
            **f,
        )
        for f, t in zip(found, times, strict=True)
    ]


# ----------------------------------------------------------------------------- ONNX Runtime


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def in_onnxruntime(model: nn.Module, x: Tensor, folder: Path) -> Any:
    """Export a network and open it in ONNX Runtime with our kernels; check its logits.

    Returns
    -------
    callable
        Takes images as an array and returns logits.

    Raises
    ------
    SpfmtError
        Where the export does not know a layer.
    WrongResult
    """
    import spfmt.onnx

    with _evaluating(model):
        path = spfmt.onnx.export(model, (x,), folder / "model.onnx")
        exact = copy.deepcopy(model)
        densify(exact)
        with torch.no_grad():
            want, near = exact.double()(x.double()), model(x).double()
    session = spfmt.onnx.session(path, session_options=quiet_options(1))
    name = session.get_inputs()[0].name

    def run(images: Any) -> Any:
        return session.run(None, {name: images})[0]

    far = np.abs(run(x.numpy()) - want.numpy()).max()
    least = 64 * float(np.finfo(np.float32).eps) * float(want.abs().max())
    if not far <= _WORSE * max(float((near - want).abs().max()), least):
        raise WrongResult(f"logits in ONNX Runtime are {far:.1e} away from float64")
    return run
