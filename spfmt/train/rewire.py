"""Rewire: all weights are trained, the largest participate (Advances in sparse training).

The sections, figures and algorithm 1 named here are the paper's.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from spfmt.errors import format_error
from spfmt.formats import SparseTensor
from spfmt.structure._checks import as_int
from spfmt.torch.gather import gathered, write_at
from spfmt.torch.layer import implied_density
from spfmt.torch.participate import planned, put_in
from spfmt.torch.participating import Participating
from spfmt.torch.report import ModelReport
from spfmt.torch.sparsify import Distribution, row_of
from spfmt.torch.survey import Found, Selector, places
from spfmt.torch.wrappers import changeable, unwrapped
from spfmt.train.followers import OptimizerState
from spfmt.train.order import StepOrder
from spfmt.train.progress import Progress
from spfmt.train.ranks import check_ranks
from spfmt.train.schedule import IntervalSchedule

__all__ = ["Rewire"]

Mode = Literal["fix", "reset", "regularize", "sr_ste", "no_exploit", "no_explore"]
MODES = ("fix", "reset", "regularize", "sr_ste", "no_exploit", "no_explore")


class Rewire(Progress):
    """Train all weights, multiply with the largest, and choose them again all the time.

    Layers become :class:`spfmt.torch.Participating`: the share `density` of their weights that is
    largest by magnitude participates, that is, it alone gives outputs and the gradients of inputs;
    the optimizer updates all weights by the dense gradient. Call :meth:`step` once after every
    ``optimizer.step()``. Step t, counted from 1, is algorithm 1's:

    1. the optimizer's step,
    2. exploitation, on the weights n that did *not* participate in it,
    3. the choice of those that participate next, every `interval` steps.

    Exploitation (section 3.3) is one `mode`:

    - ``"fix"``: from step v·T on, nothing is rewired and n is zero. Its gradient then serves
      nothing, so that from there on sparse kernels compute the gradients of the others alone.
    - ``"reset"``: every z steps n is set to zero. Optimizer state is left alone.
    - ``"regularize"``: after every step ``n := n - β·n``, whatever the learning rate is.
    - ``"sr_ste"``: ``λ·n`` is added to the gradient of n before the optimizer's step, so that the
      learning rate scales it (Zhou et al., Learning N:M Fine-grained Structured Sparse Neural
      Networks From Scratch, ICLR 2021). Norms that are clipped before do not contain it.
    - ``"no_exploit"`` (a baseline): rewires to the end, and never touches n.
    - ``"no_explore"`` (a baseline): ``"fix"`` from the start: what participates is chosen once.
      (The paper's own baseline of this name is a narrower model, :func:`spfmt.train.small`.)

    Parameters
    ----------
    model : nn.Module
        Its layers are replaced in place where a density is given (see
        :func:`spfmt.torch.participate` for which); else it holds `Participating` layers. May be
        wrapped or compiled.
    optimizer : torch.optim.Optimizer
        Holds the weights; made before or after, as they stay the same Parameters. Its state belongs
        to weights that are always there, so nothing has to move (L-BFGS is refused).
    density, sparsity : float or mapping, optional
        Share of the weights that participates, or that does not.
    format : str or type of SparseTensor, optional
        ``"csr"`` (the default), ``"nm"`` with n, m and transposable, ``"shuffled_block"``, that is
        blocks of the grid, or another.
    mode : str
        See above.
    v : float or int
        Where "fix" begins: a fraction of `total_steps` (0.5 is best in most of the paper's runs),
        or a step.
    z : int
        Steps between two resets.
    beta : float
        Decay of "regularize", in [0, 1].
    lambda_w : float
        λ of "sr_ste", not negative.
    gradient_scale : float
        Factor s of the gradients of weights that do not participate (figure 2), in [0, 1]. It
        replaces what layers have that are there already.
    interval : int
        Steps r between two choices (figure 2).
    total_steps : int, optional
        Steps T of the whole run, needed where `v` is a fraction.
    include, exclude, distribution, **format_params
        As for :func:`spfmt.torch.participate`.
    process_group : ProcessGroup, optional
        The ranks that hold this same model; that of a DDP model, and else all ranks.

    Attributes
    ----------
    layers : dict of str to Participating
    report : ModelReport or None
        What was replaced, and why the other layers were not.
    steps, updates : int
        Steps so far, and how many of them changed what participates.

    Raises
    ------
    FormatError
        Where a number is out of its range, no layer is left to train like this, the optimizer lacks
        a weight, weights are sharded, or ranks differ.

    Notes
    -----
    **Memory** is that of dense training, as the paper says (section 4): all weights, gradients and
    optimizer state, and the structure on top. What is saved is time, in the forward pass and in the
    gradients of inputs. **DDP** works as it is: weights are ordinary Parameters, equal on all ranks
    after a step, and what participates follows from them and from positions alone. FSDP2 is
    refused: its ranks have no whole weights.
    A frozen layer (``weight.requires_grad`` is False) stays as it is.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(64, 128), torch.nn.Linear(128, 128), torch.nn.Linear(128, 10)
    ... )
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> method = Rewire(model, optimizer, density=0.1, total_steps=8)
    >>> changed = []
    >>> for step in range(8):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(16, 64)).square().mean().backward()
    ...     optimizer.step()
    ...     changed.append(method.step())
    >>> changed[3:], [layer.name for layer in method.finish().taken]
    ([False, False, False, False, False], ['1'])
    """

    FORMAT: ClassVar[str] = "csr"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        density: float | Mapping[str, float] | None = None,
        sparsity: float | None = None,
        format: str | type[SparseTensor] | None = None,
        mode: Mode = "fix",
        v: float | int = 0.5,
        z: int = 1000,
        beta: float = 2e-4,
        lambda_w: float = 2e-4,
        gradient_scale: float = 1.0,
        interval: int = 1,
        total_steps: int | None = None,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        distribution: Distribution = "uniform",
        process_group: Any = None,
        **format_params: Any,
    ) -> None:
        _check(mode, z, beta, lambda_w, gradient_scale)
        self.mode, self.z, self.beta, self.lambda_w = mode, z, beta, lambda_w
        self.gradient_scale = gradient_scale
        self.schedule = _schedule(mode, interval, v, total_steps)
        self.model, self.optimizer = model, optimizer
        self.report: ModelReport | None = None
        swaps: list[tuple[Found, Participating]] = []
        chosen = {"include": include, "exclude": exclude}
        if _says_how_many(density, sparsity, format_params):
            self.report, swaps = planned(
                model, format or self.FORMAT, density, sparsity=sparsity, distribution=distribution,
                gradient_scale=gradient_scale, **chosen, **format_params,
            )  # fmt: skip
        else:
            _check_nothing_asked(format=format, **chosen, **format_params)
        self._take(model, swaps)
        group = getattr(model, "process_group", None) if process_group is None else process_group
        check_ranks(self.layers, vars(self), group)
        self._hook = self._hooked() if mode == "sr_ste" else None
        self._order = StepOrder(OptimizerState(optimizer).all(), self._weights)
        put_in(model, swaps)  # nothing fails from here on
        self._scale_gradients()

    def _take(self, model: nn.Module, swaps: list[tuple[Found, Participating]]) -> None:
        """Find the layers that there are, and will be, and begin with them."""
        new = {id(entry.module): layer for entry, layer in swaps}
        named = {n: new.get(id(m), m) for n, m in unwrapped(model).named_modules()}
        self.layers = {n: m for n, m in named.items() if isinstance(m, Participating)}
        self._finished = False
        self._check_layers()
        self._begin()

    def _weights(self) -> list[nn.Parameter]:
        return [layer.weight for layer in self.layers.values()]

    def _hooked(self) -> Any:
        register = getattr(self.optimizer, "register_step_pre_hook", None)
        if register is None:
            raise format_error(
                f"a {type(self.optimizer).__name__}, which has no register_step_pre_hook",
                "one that lets a gradient be changed before its step",
                "use an optimizer of torch.optim, or mode='regularize'",
            )
        alone = weakref.WeakMethod(self._before_step)  # a method that is gone decays nothing

        def before(*call: Any) -> Any:
            return None if (method := alone()) is None else method(*call)

        return register(before)

    def _check_layers(self) -> None:
        self._check_any_layer()
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, layer in self._trained().items():
            layer.check_whole()
            if id(layer.weight) not in held:
                raise format_error(
                    f"an optimizer without {name}.weight",
                    "one that holds the weights of all layers",
                    "make it with model.parameters(), or freeze the layer",
                )

    # --------------------------------------------------------------------------------- stepping

    @torch.no_grad()
    def step(self) -> bool:
        """Count one optimizer step: exploit, then choose again if it is time.

        Returns
        -------
        bool
            Whether other weights participate now.

        Raises
        ------
        FormatError
            Where no ``optimizer.step()`` came before it, or a weight is NaN: nothing could be
            ranked.
        """
        if self._finished:
            raise format_error("a step of a finished method", "none", "make another method")
        self._order.check()
        self.steps += 1
        layers = self._trained()
        for layer in layers.values():
            self._exploit(layer)
        changed = self.schedule.is_update(self.steps) and self.update()
        self._scale_gradients()
        self._order.look()
        return changed

    @torch.no_grad()
    def update(self) -> bool:
        """Choose again in every layer that is not frozen, whatever the schedule says."""
        changed = [name for name, layer in self._trained().items() if layer.choose()]
        for name in changed:
            self._explored[name] |= self.layers[name].packed_mask()
        self.updates += bool(changed)
        return bool(changed)

    def _exploit(self, layer: Participating) -> None:
        """Change the weights that did not participate in the step."""
        if self.mode == "regularize":
            _keep_participating(layer, lambda w: w.add_(w, alpha=-self.beta))
        elif self.schedule.ended(self.steps) or self._resets():
            _keep_participating(layer, Tensor.zero_)

    def _resets(self) -> bool:
        return self.mode == "reset" and self.steps % self.z == 0

    def _before_step(
        self, _: Any, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Decay just before the optimizer uses gradients; a closure computes them later."""
        closure = options.get("closure", args[1] if len(args) > 1 else None)  # args: itself first
        if closure is None:
            self._decay()
            return None

        def decayed() -> Any:
            loss = closure()
            self._decay()
            return loss

        return args[:1], {**options, "closure": decayed}

    @torch.no_grad()
    def _decay(self) -> None:
        """Add λ·n to the gradients (SR-STE), in the sign and the scale that they have."""
        groups = [group for group in self.optimizer.param_groups if group.get("maximize")]
        rising = {id(p) for group in groups for p in group["params"]}
        scale = getattr(self.optimizer, "grad_scale", None)  # of a GradScaler, for fused optimizers
        factor = self.lambda_w * (1.0 if scale is None else float(scale))
        for layer in self._trained().values():
            gradient, weight = layer.weight.grad, layer.weight
            if gradient is not None:
                kept = gathered(gradient, layer.structure, layer.capacity)
                gradient.add_(weight, alpha=-factor if id(weight) in rising else factor)
                write_at(gradient, layer.structure, kept)

    def _scale_gradients(self) -> None:
        """Tell the layers what their gradients are: of "fix", participating ones in the end."""
        alone = self.schedule.ended(self.steps + 1)
        for layer in self.layers.values():
            layer.gradient_scale = 0.0 if alone else self.gradient_scale

    def _trained(self) -> dict[str, Participating]:
        return {name: layer for name, layer in self.layers.items() if layer.weight.requires_grad}

    # ------------------------------------------------------------------------------------ the end

    def finish(self) -> ModelReport:
        """Replace the layers by ordinary sparse ones with the weights that participate, in place.

        The model then holds `SparseLinear`, `SparseConv2d` and `SparseConv1d`, to be evaluated,
        exported or trained on by other methods with a new optimizer: the weights are new
        Parameters. The method has ended.

        Returns
        -------
        ModelReport
            A row for every weight of the model; those of this method are taken.

        Raises
        ------
        FormatError
            For a model inside DDP: its parameters change; and for one that is itself such a layer.
        """
        model = changeable(self.model)
        if isinstance(model, Participating):
            raise format_error(
                "a layer that is the model itself",
                "a model that holds it, to put another one in its place",
                "use the layer's to_sparse()",
            )
        found = [(entry, entry.module) for entry in places(model)]
        swaps = [(e, layer.to_sparse()) for e, layer in found if isinstance(layer, Participating)]
        rows = [row_of(entry, layer, "") for entry, layer in swaps]
        put_in(model, swaps)
        if self._hook is not None:
            self._hook.remove()
        self._finished, self.layers = True, {}
        return ModelReport(tuple(rows))

    # ----------------------------------------------------------------------- reporting, resuming

    def _settings(self) -> str:
        return f"{self.mode}, {self.schedule}"

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`; see :meth:`Progress.load_state_dict`."""
        super().load_state_dict(state)
        self._scale_gradients()


def _check(mode: str, z: int, beta: float, lambda_w: float, gradient_scale: float) -> None:
    if mode not in MODES:
        choices = ", ".join(map(repr, MODES))
        raise format_error(f"mode={mode!r}", f"one of {choices}", "the paper mostly uses 'reset'")
    as_int("z", z, 1)
    ranges = {
        "beta": (beta, 0.0 <= beta <= 1.0, "a share in [0, 1]"),
        "lambda_w": (lambda_w, lambda_w >= 0.0, "at least 0"),
        "gradient_scale": (gradient_scale, 0.0 <= gradient_scale <= 1.0, "a factor in [0, 1]"),
    }
    for name, (value, fits, expected) in ranges.items():
        if not fits:
            raise format_error(f"{name}={value}", expected, "see the paper's values in the docs")


def _says_how_many(density: Any, sparsity: Any, format_params: Mapping[str, Any]) -> bool:
    given = density is not None or sparsity is not None
    return given or implied_density(format_params, (1, 1)) is not None


def _check_nothing_asked(**options: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise format_error(
            f"{', '.join(given)} without a density",
            "density or sparsity, or what stands for one: n and m, or fan_in",
            "pass density=0.1, or check the names",
        )


def _schedule(
    mode: str, interval: int, v: float | int, total_steps: int | None
) -> IntervalSchedule:
    if mode == "fix":
        return IntervalSchedule.until(v, total_steps, interval=interval, name="v")
    return IntervalSchedule(interval, 0 if mode == "no_explore" else None)


def _keep_participating(layer: Participating, change: Any) -> None:
    """Change all weights in place, but for those that participate."""
    kept = layer.values()
    change(layer.weight)
    write_at(layer.weight, layer.structure, kept)
