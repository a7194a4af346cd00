"""What all methods share: when to update, moving weights with what belongs to them, resuming."""

from __future__ import annotations

import logging
import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spfmt.errors import FormatError, format_error
from spfmt.formats import SparseTensor, get_format
from spfmt.structure._checks import as_int
from spfmt.torch.convert import whole
from spfmt.torch.module import SparseModule
from spfmt.torch.report import ModelReport
from spfmt.torch.sparsify import Distribution, Scores
from spfmt.torch.survey import Selector
from spfmt.torch.wrappers import unwrapped
from spfmt.train.choice import NotFinite
from spfmt.train.followers import Averages, OptimizerState
from spfmt.train.memory import Memory, held
from spfmt.train.observe import Observation, Observe, Observer
from spfmt.train.order import StepOrder
from spfmt.train.progress import Progress
from spfmt.train.ranks import agreed, check_ranks
from spfmt.train.schedule import CosineSchedule, Schedule
from spfmt.train.start import Start, started

# A structure drawn with the caller's seed 0 and growth drawn with the trainer's seed 0 must not be
# the same random numbers: every dropped weight would be the first to grow again.
_SEED_OFFSET = 0x5EED_0000  # within the 32 bits that the generator looks at
_SEEDS = 2**63 - 1  # the largest seed; with the offset it is within torch's range

__all__ = ["SparseTrainer"]

_log = logging.getLogger("spfmt.train")

# Whose a layer is: of the method that was made last, until that is gone.
_trainers: WeakKeyDictionary[SparseModule, weakref.ref[SparseTrainer]] = WeakKeyDictionary()


class SparseTrainer(Progress, ABC):
    """Base of the training methods: calls `rewire` on schedule and moves what belongs to weights.

    Call :meth:`step` once after every ``optimizer.step()``. A method implements :meth:`rewire`.

    Parameters
    ----------
    model : nn.Module
        A dense model, with a density; or one that holds `SparseModule` layers (see
        :func:`spfmt.torch.sparsify`), which may be wrapped or compiled.
    optimizer : torch.optim.Optimizer
        Of the model's parameters. State tensors of a parameter's own shape (SGD momentum; Adam's
        and AdamW's moments) follow their weights, new weights start with zero state (the smallest
        step size of Rprop). State inside wrapped optimizers (ZeroRedundancyOptimizer, Lookahead and
        their like) is found and follows too.
    density, sparsity : float, or mapping of str to float, optional
        Share of the weights that stay, or that go, in (0, 1): makes the dense layers of the model
        sparse, in place, and puts their `values` where `optimizer` holds their weights. See
        :func:`spfmt.torch.sparsify` for mappings, `include` and `exclude`.
    format : str, optional
        Of the layers that are made: by default the one that the method's paper takes.
    include, exclude : str, type, callable, or several of them, optional
        Which layers are made sparse: all by default, the first convolution too.
    distribution : {"erk", "uniform"}, optional
        Of one density over the layers: "erk" by default.
    scores : {"random", "magnitude"} or callable
        Where the first weights are.
    reset : bool, optional
        Draw new values, scaled for the sparse fan-in. By default where `scores` are random: what a
        random structure leaves of a trained model is worth nothing.
    alpha : float
        Share of the weights that the first update drops.
    delta_t : int
        Steps between updates.
    t_end : int or float
        Where updates end: a step, or a fraction of `total_steps`; beyond `delta_t`.
    total_steps : int, optional
        Steps of the whole run, needed where `t_end` is a fraction.
    seed : int
        Of the trainer's own random generator. Under DDP all ranks need one seed; weights are equal
        on all ranks after a step, so the topologies are equal too.
    averages : nn.Module, mapping, or several of them, optional
        Averages of the model that shall follow its weights: models (an ``AveragedModel``, an EMA
        copy), or mappings from parameter names to tensors (an EMA over ``state_dict()`` or over
        ``named_parameters()``). An ``AveragedModel`` follows without being named once it has been
        updated since it was made or loaded. Name it in runs that resume, and name an average over
        parameters alone: where a copy may be one and may be none, an update is an error. For those
        that are made later there is :meth:`add_averages`.
    process_group : ProcessGroup, optional
        The ranks that hold this same model; that of a DDP model, and else all ranks.
    schedule : Schedule, optional
        Of a method that has another one than the cosine of `alpha`, `delta_t` and `t_end`; it
        overrides :meth:`n_drop`, too.
    **params
        Of the format, for instance ``block_shape=(16, 16)``; ``n`` and ``m``, or ``fan_in``, stand
        for a density.

    Attributes
    ----------
    report : ModelReport or None
        Which layers were made sparse, and why others were not; None without a density.
    layers : dict of str to SparseModule
        By qualified name.

    Raises
    ------
    FormatError
        Where the model has no sparse layer, the method cannot train one, its schedule has no
        update, the optimizer does not hold the values of one that is not frozen, an average does
        not fit, or ranks differ in seed, schedule or structures. Model and optimizer are as they
        were then.

    Notes
    -----
    An update holds one layer's scores (R·C float32) at a time; weights, gradients and optimizer
    state never grow. What a method observes (see :meth:`observes`) is recorded by hooks that exist
    only for the step before an update. Parameters, buffers and the optimizer's references stay the
    same objects, so compiled models, DDP, FSDP2 and ``state_dict`` see nothing but new content.
    """

    FORMAT: ClassVar[str] = "csr"
    PARAMS: ClassVar[Mapping[str, Any]] = {}
    MOVES: ClassVar[bool] = True  # False of baselines whose weights never move

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        density: float | Mapping[str, float] | None = None,
        sparsity: float | None = None,
        format: str | None = None,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        distribution: Distribution | None = None,
        scores: Scores = "random",
        reset: bool | None = None,
        alpha: float = 0.3,
        delta_t: int = 100,
        t_end: int | float = 0.75,
        total_steps: int | None = None,
        seed: int = 0,
        averages: Any = (),
        process_group: Any = None,
        schedule: Schedule | None = None,
        **params: Any,
    ) -> None:
        self.schedule = schedule or CosineSchedule.until(
            t_end, total_steps, alpha=alpha, delta_t=delta_t
        )
        self._check_schedule(total_steps)
        self.seed = as_int("seed", seed, 0, _SEEDS)
        self.optimizer = optimizer
        self._state = OptimizerState(optimizer)
        self.generator = torch.Generator().manual_seed(_SEED_OFFSET + seed)
        self._group = (
            getattr(model, "process_group", None) if process_group is None else process_group
        )
        start = Start(
            density, sparsity, format, include, exclude, distribution, scores, reset, params
        )
        with self._started(model, start, seed) as self.report:
            self.layers: dict[str, SparseModule] = {
                name: module
                for name, module in unwrapped(model).named_modules()
                if isinstance(module, SparseModule)
            }
            self._check_layers()
            check_ranks(self.layers, vars(self), self._group)
            self._averages = Averages(averages, self.layers)
        _trainers.update(dict.fromkeys(self.layers.values(), weakref.ref(self)))
        self._observer = Observer(self._group)
        self._order = StepOrder(self._state.all(), self._weights)
        self._begin()
        self._watch_next_step()

    def _check_schedule(self, total_steps: int | None) -> None:
        """Refuse a method that moves weights, and would never do so."""
        schedule = self.schedule
        if not self.MOVES or not isinstance(schedule, CosineSchedule) or schedule.updates:
            return
        raise format_error(
            f"delta_t={schedule.delta_t} and t_end={schedule.t_end} with "
            f"total_steps={total_steps}, where {type(self).__name__} would never update",
            "room for an update: delta_t < t_end",
            "lower delta_t, raise t_end or total_steps, or train with Static",
        )

    def _weights(self) -> list[nn.Parameter]:
        return [layer.values for layer in self.layers.values()]

    def _started(
        self, model: nn.Module, start: Start, seed: int
    ) -> AbstractContextManager[ModelReport | None]:
        """Make the model sparse where that is asked for, until what follows fails."""
        if not start.asked:
            return nullcontext()
        return started(model, self.optimizer, start.options(type(self), seed))

    def _check_layers(self) -> None:
        self._check_any_layer()
        for name, layer in self.layers.items():
            self._state.check_holds(name, layer)
            self.check_layer(name, layer)
            layer.stand_alone()

    def check_layer(self, name: str, layer: SparseModule) -> None:
        """Raise a FormatError where the method cannot train a layer's format or shape."""

    # --------------------------------------------------------------------------------- stepping

    def step(self) -> bool:
        """Count one optimizer step and update the topology if it is due.

        Returns
        -------
        bool
            Whether the topology changed.

        Raises
        ------
        FormatError
            Where no ``optimizer.step()`` came before it, a method that was made later trains one of
            the layers, or an update is not possible.
        """
        self._check_alone()
        self._order.check()
        self.steps += 1
        changed = self.schedule.is_update(self.steps) and self.update()
        self._watch_next_step()
        self._order.look()
        return changed

    def _check_alone(self) -> None:
        """Refuse to share layers: what one method moves, another would neither know nor follow."""
        for name, layer in self.layers.items():
            claim = _trainers.get(layer)
            owner = self if claim is None else claim() or self
            if owner is not self:
                raise format_error(
                    f"a step of {type(self).__name__}, after {type(owner).__name__} was made for "
                    f"its layer {name}",
                    "one method at a time for a layer",
                    "step the method that was made last, or drop it and make this one anew",
                )

    @torch.no_grad()
    def update(self) -> bool:
        """Update the topology of every layer now, whatever the schedule says about the time.

        A frozen layer (``values.requires_grad`` is False) stays as it is: weights that grew there
        would stay zero. So does, with a warning in the log, a layer of which what was observed is
        not finite: that is a step which a gradient scaler skips.

        Returns
        -------
        bool
            Whether any weight moved.

        Raises
        ------
        FormatError
            Where a weight is not finite, nothing was recorded of a layer that moves by what it
            sees, or something does not fit that follows the weights; no layer has moved then.
        """
        trained = self._trained()
        counts = {name: self.n_drop(layer, self.steps) for name, layer in trained.items()}
        moving = {name: n_drop for name, n_drop in counts.items() if n_drop}
        for name, layer in trained.items():
            self._check_update(name, layer, name in moving)
        moved = [self._update_layer(name, trained[name], n_drop) for name, n_drop in moving.items()]
        self.updates += any(moved)
        return any(moved)

    def _check_update(self, name: str, layer: SparseModule, moves: bool) -> None:
        """Refuse what would stop an update at this layer, when others had moved already."""
        self._state.check_holds(name, layer)
        self._state.check_follows(name, layer.values)
        self._averages.check(name, layer)
        if not moves:
            return
        if not torch.isfinite(whole(layer.values)[: layer.nnz]).all():
            raise format_error(
                f"weights of {name} that are NaN or infinite",
                "finite ones: others could not be ranked",
                "go back to an earlier state, and lower the learning rate or clip gradients",
            )
        if self.observes(name, layer) is not None:
            self.observed(layer)

    def _update_layer(self, name: str, layer: SparseModule, n_drop: int) -> bool:
        before = layer.packed_mask()
        try:
            chosen = self.rewire(layer, n_drop)
        except NotFinite as error:  # on every rank: what was observed is that of all of them
            _log.warning("%s stays as it is: %s", name, error)
            return False
        structure, forgotten = agreed(*chosen, self._group)
        source = layer.set_structure(structure, forget=forgotten)
        self._state.follow(layer.values, source)
        self._averages.follow(name, layer, source)
        after = layer.packed_mask()
        self._explored[name] |= after
        return not np.array_equal(before, after)

    def n_drop(self, layer: SparseModule, step: int) -> int:
        """Return how many weights of a layer the update after a step drops; 0 for no update."""
        # A full layer (erk gives small ones density 1) could only grow what it dropped, as zeros.
        full = layer.nnz == math.prod(layer.shape)
        return 0 if full else self._share(step, layer.nnz)

    def _share(self, step: int, n_weights: int) -> int:
        """Return how many of so many weights the cosine drops."""
        assert isinstance(self.schedule, CosineSchedule)
        return self.schedule.n_drop(step, n_weights)

    @abstractmethod
    def rewire(self, layer: SparseModule, n_drop: int) -> tuple[SparseTensor, NDArray[np.int64]]:
        """Choose the next structure of a layer.

        Parameters
        ----------
        layer : SparseModule
        n_drop : int
            How many weights the schedule drops, at least 1.

        Returns
        -------
        structure : SparseTensor
            Of the layer's format, with at most ``layer.capacity`` positions.
        forgotten : ndarray of int64
            Places in ``layer.values`` whose weights start from zero even where their positions are
            in `structure`.
        """

    def name_of(self, layer: SparseModule) -> str:
        """Return the name of a layer in `layers`."""
        return next(name for name, own in self.layers.items() if own is layer)

    def random_numbers(self) -> np.random.Generator:
        """Return numpy's generator, many times faster than torch's, seeded by the trainer's own."""
        seed = torch.randint(2**62, (), generator=self.generator, device="cpu").item()
        return np.random.Generator(np.random.SFC64(int(seed)))

    def fitting(
        self, layer: SparseModule, scores: NDArray[Any], density: float | None = None
    ) -> SparseTensor:
        """Return the structure that keeps the most of `scores` at a density, the layer's target."""
        search = get_format(layer.format).from_scores
        return self.within_capacity(
            layer, lambda density: search(scores, density, **layer.format_params), density
        )

    def within_capacity(
        self,
        layer: SparseModule,
        search: Callable[[float], SparseTensor],
        density: float | None = None,
    ) -> SparseTensor:
        """Return what is found at a density, the layer's target, or next below it.

        Where sizes are not multiples of a block, structures of one density differ in their number
        of weights. Layers have room for all of them, unless they were made with the capacity of
        one: what exceeds it is searched again at a density as much smaller as it takes.
        """
        size, step = math.prod(layer.shape), 0
        density = layer.target_density if density is None else density
        found = search(density)
        while found.nnz > layer.capacity:
            step = max(1, 2 * step, found.nnz - layer.capacity)
            density = max(0.0, density - step / size)
            found = search(density)
        return found

    # -------------------------------------------------------------------------------- observations

    def observes(self, name: str, layer: SparseModule) -> Observe | None:
        """Say what of a layer the method must see on the step of an update; nothing by default.

        Only layers are watched of which that update drops weights.

        Parameters
        ----------
        name : str
        layer : SparseModule

        Returns
        -------
        {"norms", "l1_norms", "batches"} or None
            "norms" records the Euclidean norm of every input and of every output's gradient, and
            "l1_norms" their l1 norm; "batches" records both whole, from which
            :meth:`Observation.weight_grad` computes a dense gradient.
        """
        return None

    def observed(self, layer: SparseModule) -> Observation:
        """Return what was recorded of a layer since the last optimizer step.

        Raises
        ------
        FormatError
            Where nothing was recorded.
        """
        try:
            return self._observer.of(layer)
        except FormatError as error:
            name = self.name_of(layer)
            raise format_error(
                f"no recorded call of {name} since the last step, and an update that needs one",
                "a forward and backward pass through it, by the model itself, outside torch.compile"
                ", on the step of every update",
                f"where trainer.observing is True, call the model that was compiled, not the "
                f"compiled one, and skip no layer; freeze {name} if it is not used, and unfreeze "
                "layers before the step() that precedes an update",
            ) from error

    @property
    def observing(self) -> bool:
        """Whether the coming step is recorded: call the model itself then, not a compiled one."""
        return self._observer.active

    def add_averages(self, averages: Any) -> None:
        """Let averages follow that were made after the trainer, as if it had been given them.

        Parameters
        ----------
        averages : nn.Module, mapping, or several of them
            See :class:`SparseTrainer`.

        Raises
        ------
        FormatError
            Where one does not fit; none is taken then.
        """
        self._averages.add(averages, self.layers)

    def _trained(self) -> dict[str, SparseModule]:
        return {n: layer for n, layer in self.layers.items() if layer.values.requires_grad}

    def _watch_next_step(self) -> None:
        self._observer.stop()
        if self.schedule.is_update(self.steps + 1):
            for name, layer in self._trained().items():
                kind = self.observes(name, layer)
                if kind is not None and self.n_drop(layer, self.steps + 1):
                    self._observer.watch(layer, kind)

    # ----------------------------------------------------------------------- reporting, resuming

    def memory(self) -> Memory:
        """Return the bytes that the sparse layers hold now, by kind; print it for a line."""
        return held(self.layers.values(), self._state.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on bit for bit, beside the model's and the optimizer's."""
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`; see :meth:`Progress.load_state_dict`."""
        super().load_state_dict(state)
        self.generator = _generator_of(state)
        self._watch_next_step()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        _generator_of(state)


def _generator_of(state: Mapping[str, Any]) -> torch.Generator:
    """Return the random generator of a `state_dict`; raise a FormatError where it is damaged."""
    generator = torch.Generator()
    try:
        generator.set_state(state["generator"].cpu())
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise format_error(
            f"a state whose generator is missing or damaged ({error})",
            "the state of a torch.Generator",
            "load the state that state_dict() returned",
        ) from None
    return generator
