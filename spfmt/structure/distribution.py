"""How a model's budget of weights is shared by its layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from ..errors import format_error
from ._checks import as_density, as_int

__all__ = ["erk_densities", "uniform_densities"]

_Shapes = Sequence[Sequence[int]]


def erk_densities(
    shapes: _Shapes,
    density: float,
    excluded: Collection[int] = (),
    *,
    count_excluded: bool = False,
) -> list[float]:
    """Erdős–Rényi-Kernel densities (Evci et al. 2020, RigL; used by DSB, HRBP and SRigL).

    The density of a layer is proportional to (C_in + C_out + Kh + Kw) / (C_in*C_out*Kh*Kw), for a
    matrix to (C_in + C_out) / (C_in*C_out). One factor for the model meets the budget; a layer
    that would exceed 1 becomes dense and the factor is solved again over the rest.

    Parameters
    ----------
    shapes : sequence of shapes
        One weight shape per layer, (C_out, C_in) or (C_out, C_in, Kh, Kw).
    density : float
        Active weights of the model / all weights of the model, in [0, 1].
    excluded : collection of int
        Indices of layers that stay dense.
    count_excluded : bool, default False
        Whether the excluded layers' weights count as part of the model. False: the density is that
        of the other layers. True: the others are thinned out further so that the whole model
        meets it.

    Returns
    -------
    list of float
        One density per layer. Each is a whole number of weights over the layer's size, and
        sum(round(density_i * size_i)) is exactly round(density * total). Excluded layers get 1.0,
        layers without weights 0.0.

    Raises
    ------
    FormatError
        A bad density, shape or index, or a budget that the excluded layers alone exceed.

    Examples
    --------
    >>> erk_densities([(4, 4), (8, 8)], 0.5)  # 40 of 80; 8 : 16 weights scaled by 5/3
    [0.8125, 0.421875]
    """
    sizes, sparse, budget = _budget(shapes, density, excluded, count_excluded)
    weights = [float(sum(shape)) for shape in shapes]  # size * raw ERK density
    return _densities(sizes, sparse, _shares(sizes, sparse, weights, budget), budget)


def uniform_densities(
    shapes: _Shapes,
    density: float,
    excluded: Collection[int] = (),
    *,
    count_excluded: bool = False,
) -> list[float]:
    """The same density for every layer, up to whole weights.

    Parameters
    ----------
    shapes, density, excluded, count_excluded
        As in `erk_densities`.

    Returns
    -------
    list of float
        As in `erk_densities`.

    Raises
    ------
    FormatError
        As in `erk_densities`.
    """
    sizes, sparse, budget = _budget(shapes, density, excluded, count_excluded)
    weights = [float(size) for size in sizes]
    return _densities(sizes, sparse, _shares(sizes, sparse, weights, budget), budget)


def _budget(
    shapes: _Shapes, density: float, excluded: Collection[int], count_excluded: bool
) -> tuple[list[int], list[int], int]:
    """Sizes of the layers, indices of the sparse ones, and their number of active weights."""
    sizes = [_size(shape) for shape in shapes]
    d = as_density(density)
    dense = {as_int("an excluded index", i, 0, len(sizes) - 1) for i in excluded}
    sparse = [i for i in range(len(sizes)) if i not in dense and sizes[i]]
    free = sum(sizes[i] for i in sparse)
    if not count_excluded:
        return sizes, sparse, round(d * free)
    fixed = sum(sizes[i] for i in dense)
    budget = round(d * (free + fixed)) - fixed
    if budget < 0:
        raise format_error(
            f"density = {density!r} with {fixed} weights in excluded (dense) layers",
            f"a budget of at least {fixed} of {free + fixed} weights",
            "raise the density, exclude fewer layers, or pass count_excluded=False",
        )
    return sizes, sparse, budget


def _shares(
    sizes: list[int], sparse: list[int], weights: list[float], budget: int
) -> dict[int, float]:
    """Real-valued shares proportional to the weights, none above its layer's size.

    Layers become dense from the largest weight/size down; each is tested against the factor that
    is left for it and those after it, which solves the capped problem exactly.
    """
    order = sorted(sparse, key=lambda i: weights[i] / sizes[i], reverse=True)
    left, mass = float(budget), math.fsum(weights[i] for i in order)
    shares = {}
    for i in order:
        share = left * weights[i] / mass if mass > 0.0 else 0.0
        if share < sizes[i]:
            break
        shares[i] = float(sizes[i])
        left -= sizes[i]
        mass -= weights[i]
    rest = [i for i in order if i not in shares]
    mass = math.fsum(weights[i] for i in rest)
    shares.update({i: max(0.0, left) * weights[i] / mass for i in rest})
    return shares


def _densities(
    sizes: list[int], sparse: list[int], shares: dict[int, float], budget: int
) -> list[float]:
    """Whole weights by largest remainders, ties to the first layer, as fractions of the size."""
    whole = {i: min(sizes[i], math.floor(shares[i])) for i in sparse}
    missing = budget - sum(whole.values())
    by_remainder = sorted(sparse, key=lambda i: (whole[i] - shares[i], i))
    while missing > 0:
        for i in by_remainder:
            if missing > 0 and whole[i] < sizes[i]:
                whole[i] += 1
                missing -= 1
    chosen = set(sparse)
    return [
        whole[i] / size if i in chosen else (1.0 if size else 0.0) for i, size in enumerate(sizes)
    ]


def _size(shape: Sequence[int]) -> int:
    sizes = [as_int("a size of a weight shape", size, 0) for size in shape]
    if len(sizes) < 2:
        raise format_error(
            f"a weight shape {tuple(sizes)}",
            "(C_out, C_in) or (C_out, C_in, Kh, Kw)",
            "leave biases and norms out of the list",
        )
    return math.prod(sizes)
