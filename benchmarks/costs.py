"""What a call costs besides its kernel: ``python -m benchmarks.costs``, in µs at batch 1.

Every way does one product (or one forward and backward pass) with one thread, on memory that exists
already. Ways take turns in one process; the table shows medians, nn.Linear beside SparseLinear.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np

import spfmt
from spfmt.bench import BATCH_FIRST, Case, Session, parse_spec, random_weight
from spfmt.bench.baselines import available
from spfmt.bench.contenders import Contender, Setting
from spfmt.bench.timing import interleave
from spfmt.formats import FORMATS, SparseTensor, new_version

Call = Callable[[], object]
TINY = (16, 16)
SHAPE = (3072, 768)
SHAPES = ((128, 128), (256, 128), SHAPE)  # (R, C)


def costs(session: Session) -> None:
    """One 16 x 16 block, whose kernel takes nanoseconds; new values."""
    block = session.weight(parse_spec("shuffled_block"), TINY, 1.0)
    session.measure(
        Case(TINY, 1.0, 1), weights=[block], suite="costs", dense=False, extra=_through_torch(block)
    )
    for name in FORMATS:
        a = session.weight(parse_spec(name), SHAPE, 0.1)
        for batch in (1, 64) if a.layout().name == "lists" else ():  # groups are read in place
            session.measure(
                Case(SHAPE, 0.1, batch),
                weights=[a],
                suite="costs",
                layouts=(BATCH_FIRST,),
                dense=False,
                extra=lambda setting, a=a: [_new_values(setting, a)],
            )


def _through_torch(a: SparseTensor):
    """Make `SparseLinear`'s call without gradients, where torch is installed."""
    if not available("torch"):
        return None

    def make(setting: Setting) -> Sequence[Contender]:
        import torch

        from spfmt.torch import SparseLinear

        layer = SparseLinear.from_tensor(a, bias=None)
        x = torch.from_numpy(setting.x)
        for p in layer.parameters():
            p.requires_grad_(False)
        return [setting.contender("SparseLinear, no gradient", "sparse", a, lambda: layer(x))]

    return make


def _new_values(setting: Setting, a: SparseTensor) -> Contender:
    """A product whose values are new to the kernels at every call, as after a training step."""

    def call() -> np.ndarray:
        return a.plan.spmm(a.values, setting.x, batch_first=True, constant=new_version())

    return setting.contender(f"{a.format}, new values", "sparse", a, call)


# ------------------------------------------------------------------------------- the table


def ways(a: SparseTensor, *, compiled: bool) -> dict[str, Call]:
    """Return what is timed for one weight, by name; each has run once."""
    import torch

    from spfmt.torch import SparseLinear

    rows, cols = a.matrix_shape
    x = np.random.default_rng(0).random((1, cols), dtype=np.float32)
    out = np.empty((1, rows), np.float32)
    found: dict[str, Call] = {
        "numpy": lambda: spfmt.spmm(a, x, batch_first=True),
        "numpy out=": lambda: spfmt.spmm(a, x, batch_first=True, out=out),
    }
    tensor = torch.from_numpy(x)
    dense = torch.nn.Linear(cols, rows)
    layers = {"torch": SparseLinear.from_tensor(a, bias=dense.bias), "dense": dense}
    for name, layer in layers.items():
        found[name] = _without_grad(layer, tensor)
        found[f"{name} grad"] = lambda layer=layer: layer(tensor)
        found[f"{name} f+b"] = _both_passes(layer, tensor)
    if compiled:
        torch.compiler.reset()  # of the graphs before, which would be looked through at every call
        for name, layer in layers.items():
            found[f"{name} comp."] = _without_grad(torch.compile(layer, fullgraph=True), tensor)
    for run in found.values():
        run()
    return found


def _without_grad(layer, x) -> Call:
    import torch

    def call() -> object:
        with torch.no_grad():
            return layer(x)

    return call


def _both_passes(layer, x) -> Call:
    import torch

    x = x.clone().requires_grad_()
    wanted = [x, *layer.parameters()]
    gradient = torch.ones_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), wanted, gradient)


def main() -> None:
    """Print the table."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__)
    parser.add_argument("--compiled", action="store_true", help="torch.compile too (slow to start)")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row (default: 1)")
    args = parser.parse_args()
    spfmt.dispatch.timed_isa()  # refuses where times would mean nothing
    torch.set_num_threads(1)
    spfmt.set_num_threads(1)
    heading = ""
    for shape in SHAPES:
        for name in FORMATS:
            a = random_weight(parse_spec(name), shape, 0.1)
            found = ways(a, compiled=args.compiled)
            if not heading:
                heading = f"{'µs per call':34}" + "".join(f"{key:>12}" for key in found)
                print(heading)
            times = [t.median for t in interleave(list(found.values()), args.seconds)]
            size = "{}x{}".format(*shape)
            print(f"{a.label():22}{size:12}" + "".join(f"{t:12.2f}" for t in times), flush=True)


if __name__ == "__main__":
    main()
