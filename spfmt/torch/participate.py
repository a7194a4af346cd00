"""`participate`: layers of a model train all weights and multiply with some of them, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from spfmt.errors import FormatError, format_error
from spfmt.formats import SparseTensor, get_format
from spfmt.torch.attention import set_fast_paths
from spfmt.torch.participating import Participating
from spfmt.torch.report import LayerReport, ModelReport
from spfmt.torch.sparsify import (
    Distribution,
    Targets,
    decide,
    leave_full,
    row_of,
)
from spfmt.torch.survey import Found, Selector, is_plain, selectors, survey, swap
from spfmt.torch.wrappers import unwrapped

__all__ = ["participate", "planned", "put_in", "why_dense"]


def participate(
    model: nn.Module,
    format: str | type[SparseTensor] = "csr",
    density: float | Mapping[str, float] | None = None,
    *,
    sparsity: float | None = None,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    distribution: Distribution = "uniform",
    gradient_scale: float = 1.0,
    **params: Any,
) -> ModelReport:
    """Replace linear layers and convolutions of a model by `Participating` ones, in place.

    Their weights and biases stay the same Parameters, so an optimizer may have been made before,
    and a model may be wrapped already. By default (appendix B of Advances in sparse training) these
    stay dense: convolutions whose input channels (per group) are not divisible by 16, depthwise
    ones among them, the model's first layer, embeddings, and its last layer if that is linear, a
    vocabulary or classification head. `include` or a mapping of densities takes them.

    Parameters
    ----------
    model : nn.Module
    format : str or type of SparseTensor
        ``"csr"`` (single weights), ``"nm"`` with n, m and transposable (2:4 1D and 2D of appendix
        E.2), ``"shuffled_block"`` with block_shape, which here means blocks of the grid
        (``aligned=True``) of largest ``max |w|`` (``norm=math.inf``, appendix E.1), or another.
    density, sparsity, include, exclude, distribution
        As for :func:`spfmt.torch.sparsify`.
    gradient_scale : float
        As for `Participating`.
    **params
        Parameters of the format.

    Returns
    -------
    ModelReport
        A row for every weight of the model, taken or left, with the reason.

    Raises
    ------
    FormatError
        As :func:`spfmt.torch.sparsify`. A layer that the format cannot hold is reported.
    """
    report, swaps = planned(
        model, format, density, sparsity=sparsity, include=include, exclude=exclude,
        distribution=distribution, gradient_scale=gradient_scale, **params,
    )  # fmt: skip
    put_in(model, swaps)
    return report


def put_in(model: nn.Module, swaps: Iterable[tuple[Found, nn.Module]]) -> None:
    """Replace layers of a model, whose transformers then call them."""
    for entry, layer in swaps:
        swap(entry, layer)
    set_fast_paths(model)


def planned(
    model: nn.Module,
    format: str | type[SparseTensor],
    density: float | Mapping[str, float] | None,
    *,
    sparsity: float | None,
    include: Selector | Iterable[Selector] | None,
    exclude: Selector | Iterable[Selector] | None,
    distribution: Distribution,
    gradient_scale: float,
    **params: Any,
) -> tuple[ModelReport, list[tuple[Found, Participating]]]:
    """Return what `participate` reports, and the layers that it puts in; nothing is changed."""
    targets = Targets.of(density, sparsity, distribution, params)
    if isinstance(density, str):
        raise format_error(f"density={density!r}", "a number or a mapping", "pass density=0.1")
    found = survey(unwrapped(model))
    decide(found, targets, selectors(include), selectors(exclude), why_dense)
    for entry in found:
        if not entry.reason and not is_plain(entry.module):
            entry.reason = f"{type(entry.module).__name__} keeps its weight transposed"
    shapes = {entry.name: entry.shape for entry in found if not entry.reason}
    densities = targets.spread(shapes)
    assert densities is not None
    leave_full(found, targets, densities)
    own = get_format(format).PARTICIPATING
    options = {"format": format, "gradient_scale": gradient_scale, **own, **params}
    made = [(entry, *_make(entry, densities, options)) for entry in found]
    swaps = [(entry, layer) for entry, _, layer in made if layer is not None]
    return ModelReport(tuple(row for _, row, _ in made)), swaps


def _make(
    entry: Found, densities: Mapping[str, float | None], options: dict[str, Any]
) -> tuple[LayerReport, Participating | None]:
    """Build the layer of an entry and its row; a FormatError becomes the row's reason."""
    layer, remark = None, entry.reason
    if not entry.reason:
        try:
            layer = Participating(entry.module, density=densities[entry.name], **options)
        except FormatError as error:
            remark = str(error)
    return row_of(entry, layer, remark), layer


def why_dense(entry: Found, found: Sequence[Found]) -> str:
    """Return why a layer stays dense unless it is named (appendix B); empty if it does not."""
    named = "stays dense unless `include` or `density` names it"
    if entry is found[0]:
        return f"the first layer {named}"
    if isinstance(entry.module, nn.Conv1d | nn.Conv2d):
        channels = entry.shape[1]
        return (
            ""
            if channels % 16 == 0
            else f"{channels} input channels, not a multiple of 16: {named}"
        )
    return f"the last layer, a head: {named}" if entry is found[-1] else ""
