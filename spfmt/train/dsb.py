"""DSB: dynamic shuffled blocks (Jiang, Hu and Song, NeurIPS 2022), and its baselines DNSB and SSB.

The sections, figures and equations named here are the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spfmt.errors import format_error
from spfmt.formats import Groups, ShuffledBlock, SparseTensor
from spfmt.structure import _growth
from spfmt.structure._checks import as_pair
from spfmt.torch.module import SparseModule
from spfmt.train.base import SparseTrainer
from spfmt.train.choice import Floats, magnitudes, magnitudes_of, smallest
from spfmt.train.observe import Observe

__all__ = ["DNSB", "DSB", "SSB", "block_aware", "grow_in_blocks", "sorted_groups"]

_Floats = NDArray[np.float64]
_Places = NDArray[np.int64]

# A weight of zero is a weight: it ranks below all others, yet above positions without one.
_LEAST = np.float32(1e-30)


class DSB(SparseTrainer):
    """Drop small weights that are together in blocks, grow blocks, and shuffle all into blocks.

    Every `delta_t` steps, per layer with N weights in blocks of S1 x S2 (section 4):

    1. **Drop**: candidates are the ``k = α·N/2·(1 + cos(t·π/T_end))`` smallest ``|w|`` (eq. 1). One
       goes only if candidates are at least half of its row or of its column in its block (Figure
       5): alone it would come back with the block.
    2. **Grow** as many, without a dense gradient. As ``|dW_ij| <= ‖dOut_i‖·‖In_j‖``, both sorted by
       their l1 norms over batch and space and cut into groups X of S_x outputs and Y of S_y inputs,
       blocks are taken in descending ``‖X‖·‖Y‖`` until they hold that many positions without a
       weight (Figure 6); of the last block the smallest products are left out.
    3. **Shuffle into blocks** again: similar rows are grouped, and the ceil(N / (S1·S2)) blocks of
       largest l1 norm stay, where new weights count as the largest ``|w|`` of the layer.

    New weights then are zero, and so is their optimizer state; so are positions that blocks bring
    in. Weights that blocks leave out are gone. Kept weights keep value and state.

    Parameters
    ----------
    model, optimizer
        As for :class:`SparseTrainer`. All sparse layers must be shuffled blocks.
    block_aware : bool
        False drops every candidate (appendix A.2).
    grow_shape : (int, int), optional
        (S_x, S_y); (S1, 1) by default.
    **options
        The other parameters of :class:`SparseTrainer`. The paper trains with alpha=0.3 and
        delta_t=100, t_end=75_000 on CIFAR (batch 128), delta_t=1600, t_end=400_000 on ImageNet
        (batch 256).

    Raises
    ------
    FormatError
        As :class:`SparseTrainer`, and where a layer is no shuffled block or is aligned (see
        :class:`DNSB`).

    Notes
    -----
    What the paper leaves open, and where this differs from it on purpose:

    - Half of a line is half of its own length: S2 elements in a row of a block and S1 in a column,
      where the paper prints S1/2 and S2/2. In a line of up to two elements every candidate is half:
      the rule is void for S1 <= 2 or S2 <= 2.
    - An update follows the optimizer's step; algorithm 1 updates instead of it.
    - N is the number of stored weights. Of equal magnitudes the first in `values` are candidates,
      of equal products the block with the larger ``‖X‖``.
    - A dropped weight may come back, with value zero.
    - Rows of different groups of a convolution see different inputs. There Y is cut by the norms'
      sums over the groups, and a block counts the sum of ``‖dOut_i‖·‖In_j‖`` over its positions,
      which is ``‖X‖·‖Y‖`` in one group.
    - Where no weight is dropped, a layer stays as it is.
    - Rows are ordered by ``order_rows(method="densest")``, many times faster than the paper's
      clustering, after which blocks hold at least as much l1 norm (method="fast" loses most of the
      new weights in blocks of 16 x 16). A layer made with a `method` keeps to it, and one made with
      a `row_perm` keeps its groups of rows.

    No dense weight, gradient or score exists at any time (table 3): an update takes a mask of R·C
    bytes, and sums of R·C/S1 numbers, for one layer at a time.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> method = DSB(model, optimizer, density=0.2, block_shape=(4, 4), delta_t=2, total_steps=8)
    >>> changed = []
    >>> for step in range(8):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(16, 64)).square().mean().backward()
    ...     optimizer.step()
    ...     changed.append(method.step())
    >>> changed
    [False, True, False, True, False, False, False, False]
    """

    FORMAT = "shuffled_block"

    @property
    def aligned(self) -> bool:
        """Whether blocks lie on a grid."""
        return bool(self.PARAMS.get("aligned"))

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        block_aware: bool = True,
        grow_shape: tuple[int, int] | None = None,
        **options: Any,
    ) -> None:
        self.block_aware = block_aware
        self.grow_shape = grow_shape and as_pair("grow_shape", grow_shape, ("S_x", "S_y"))
        super().__init__(model, optimizer, **options)

    def check_layer(self, name: str, layer: SparseModule) -> None:
        """Refuse what is not shuffled blocks of one matrix."""
        if layer.format != ShuffledBlock.format:
            raise format_error(
                f"{name} of format {layer.format!r}",
                f"format {ShuffledBlock.format!r} for {type(self).__name__}",
                'call sparsify(model, "shuffled_block", ...), or train with a method such as SET',
            )
        aligned = bool(layer.format_params.get("aligned"))
        if aligned is not self.aligned:
            raise format_error(
                f"{name} made with aligned={aligned}",
                f"aligned={self.aligned} for {type(self).__name__}",
                f"pass aligned={self.aligned} to sparsify, or train with "
                f"{'DNSB' if aligned else 'DSB'}",
            )

    def observes(self, name: str, layer: SparseModule) -> Observe | None:
        """Norms of inputs and output gradients, on the step of an update."""
        return "l1_norms"

    def rewire(self, layer: SparseModule, n_drop: int) -> tuple[SparseTensor, _Places]:
        """Choose the next structure of a layer; see :meth:`SparseTrainer.rewire`."""
        tensor = cast(ShuffledBlock, layer.tensor())
        weights = magnitudes(layer)
        dropped = smallest(weights, n_drop)
        if self.block_aware:
            dropped = block_aware(tensor, dropped)
        if not dropped.size:
            return tensor, dropped
        norms = self._norms(layer)
        positions = tensor.flat_indices()
        taken = np.zeros(tensor.matrix_shape, np.bool_)
        taken.reshape(-1)[positions] = True
        taken.reshape(-1)[positions[dropped]] = False
        # As many grow as are dropped: they take their places in both arrays.
        positions[dropped] = self._grow(tensor, norms, taken, dropped.size)
        weights[dropped] = weights.max()
        np.maximum(weights, _LEAST, out=weights)
        return self.shuffle(layer, positions, weights), dropped

    def shuffle(self, layer: SparseModule, positions: _Places, weights: Floats) -> SparseTensor:
        """Shuffle weights into blocks of largest l1 norm (section 4, "Shuffled blocking")."""
        how = {"method": "densest", **layer.format_params}

        def search(density: float) -> ShuffledBlock:
            found = ShuffledBlock.from_weights(layer.shape, positions, weights, density, **how)
            if not self.aligned:
                how["row_perm"] = found.row_perm  # searched once, whatever the density
            return found

        return self.within_capacity(layer, search)

    def _grow(
        self,
        tensor: ShuffledBlock,
        norms: tuple[_Floats, _Floats],
        taken: NDArray[np.bool_],
        count: int,
    ) -> _Places:
        s_x, s_y = self.grow_shape or self.usual_grow_shape(tensor)
        d_out, d_in = norms[0], norms[1].reshape(-1, taken.shape[1])  # (R,), (groups, C)
        x, y = self.groups(d_out, s_x), self.groups(d_in.sum(0), s_y)
        return grow_in_blocks(x, y, taken, count, d_in)

    def usual_grow_shape(self, tensor: ShuffledBlock) -> tuple[int, int]:
        """Return (S_x, S_y) where none was given."""
        return tensor.block_shape[0], 1

    def groups(self, norms: _Floats, size: int) -> RankedGroups:
        """Cut outputs or inputs into the groups X or Y."""
        return sorted_groups(norms, size)

    def _norms(self, layer: SparseModule) -> tuple[_Floats, _Floats]:
        """Return the norms of dOut (R,) and of In (C,)."""
        found = self.observed(layer)
        # Every rank asks for both, before one that is not finite ends the update.
        both = (found.output_grad_norms, found.input_norms)
        d_out, d_in = (magnitudes_of(norms).astype(np.float64) for norms in both)
        return d_out, d_in


class DNSB(DSB):
    """Dynamic non-shuffled blocks, the paper's baseline: DSB on the blocks of a fixed grid.

    Rows keep their order and blocks are aligned to the grid of S1 x S2. Drop is DSB's; grow takes
    whole blocks of the grid, so X and Y are S1 consecutive outputs and S2 consecutive inputs; then
    the blocks of the grid with the largest l1 norm stay. (The paper gives DNSB no algorithm.)

    Layers that are sparse already were made with ``aligned=True``. Parameters are those of
    :class:`DSB`; `grow_shape` is (S1, S2) by default.
    """

    PARAMS: ClassVar[Mapping[str, Any]] = {"aligned": True}

    def groups(self, norms: _Floats, size: int) -> RankedGroups:
        """Cut outputs or inputs into the groups X or Y, which are consecutive."""
        return aligned_groups(norms, size)

    def usual_grow_shape(self, tensor: ShuffledBlock) -> tuple[int, int]:
        """Return (S_x, S_y) where none was given: a block of the grid."""
        return tensor.block_shape


class SSB(DSB):
    """Static shuffled blocks, the paper's baseline: DSB that ends before its first update.

    Takes all parameters of :class:`DSB`, so that one word changes in a comparison; those of the
    schedule mean nothing here.
    """

    MOVES = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        super().__init__(model, optimizer, **{**options, "t_end": 0})


# ---------------------------------------------------------------------------------------- drop


def block_aware(tensor: ShuffledBlock, candidates: _Places) -> _Places:
    """Leave out candidates that are too few in their row and in their column of their block.

    Parameters
    ----------
    tensor : ShuffledBlock
    candidates : ndarray of int64, ascending
        Places in `tensor.values`.

    Returns
    -------
    ndarray of int64
        Those of which the row or the column in their block has candidates in at least half of its
        elements (section 4, Figure 5). Lines are as long as they are: in short groups and short
        blocks shorter than S2 and S1.
    """
    layout, (block_rows, block_cols) = tensor.layout(), tensor.block_shape
    assert isinstance(layout, Groups)
    rows = np.diff(layout.row_ptr)
    heights = np.minimum(block_rows, layout.rows - layout.row_ptr[:-1] // block_rows * block_rows)
    columns = layout.col_end - layout.col_begin
    lines = np.cumsum(rows * -(-columns // block_cols))  # rows of blocks, numbered through
    bands = np.stack([rows, columns, np.append(0, lines)[:-1], layout.col_begin, heights])
    in_row = np.zeros(lines.max(initial=0), np.int64)
    in_column = np.zeros(layout.col_end.max(initial=0), np.int64)
    enough = np.empty(candidates.size, np.bool_)
    _growth.lines_of(
        candidates, layout.value_ptr, bands, block_cols, in_row, in_column, enough.view(np.uint8)
    )
    return candidates[enough]


# ---------------------------------------------------------------------------------------- grow

# x and y are the paper's X and Y, groups of outputs and of inputs; d_out (R,) holds the norm of
# every output's gradient, d_in (groups, C) that of every input, as the rows of each group of a
# convolution see it: one row of C where there are no groups.


class RankedGroups(NamedTuple):
    """Groups of outputs or inputs in descending order of their norms.

    Attributes
    ----------
    members : ndarray of int64, shape (G, S)
        -1 where a group is short.
    totals : ndarray of float64, shape (G,)
        l1 norms of the groups: sums of those of their members.
    norms : ndarray of float64, shape (n,)
        Of every output or input.
    """

    members: _Places
    totals: _Floats
    norms: _Floats


def sorted_groups(norms: _Floats, size: int) -> RankedGroups:
    """Sort by norm, descending (of equal ones the first), and cut into groups (section 4).

    Parameters
    ----------
    norms : ndarray of float64, shape (n,)
    size : int
        S_x or S_y; the last group may be short.
    """
    return RankedGroups(*_cut(np.argsort(-norms, kind="stable"), norms, size), norms)


def aligned_groups(norms: _Floats, size: int) -> RankedGroups:
    """Cut into groups of consecutive ones, and sort those by their norms."""
    members, totals = _cut(np.arange(norms.size), norms, size)
    best = np.argsort(-totals, kind="stable")
    return RankedGroups(members[best], totals[best], norms)


def _cut(order: _Places, norms: _Floats, size: int) -> tuple[_Places, _Floats]:
    size = min(size, max(1, order.size))  # no group is longer than all there are
    missing = -order.size % size
    members = np.pad(order, (0, missing), constant_values=-1).reshape(-1, size)
    return members, np.pad(norms[order], (0, missing)).reshape(-1, size).sum(axis=1)


def grow_in_blocks(
    x: RankedGroups,
    y: RankedGroups,
    taken: NDArray[np.bool_],
    count: int,
    d_in: _Floats | None = None,
) -> _Places:
    """Choose positions in blocks of large ``‖X‖·‖Y‖`` (section 4, Figure 6).

    Parameters
    ----------
    x, y : RankedGroups
        The groups X of rows of dOut and Y of rows of In.
    taken : ndarray of bool, shape (R, C)
        Where a weight is; such positions do not count.
    count : int
        How many positions are wanted.
    d_in : ndarray of float64, shape (groups, C), optional
        Of a convolution in groups: norms of what the rows of each group see; `y` ranks their sums.

    Returns
    -------
    ndarray of int64, shape (count,)
        Flat positions, block after block, without those of smallest products that the last block
        has too many. Fewer where fewer are free.
    """
    d_in = y.norms[None] if d_in is None else d_in
    size = x.members.shape[1] * y.members.shape[1]  # of a block
    if len(d_in) == 1:
        pieces = best_first(x.totals, y.totals, 4 * -(-count // size))
    else:
        pieces = iter([_best_of_groups(x, y, d_in)])
    found, held, last = np.empty(count + size, np.int64), 0, 0
    for blocks in pieces:
        held, last = _growth.free_positions(
            blocks, x.members, y.members, taken.view(np.uint8), count, found, held
        )
        if held >= count:
            found[last:count] = _largest(x.norms, d_in, found[last:held], count - last)
            break
    return found[: min(held, count)]


def best_first(x: _Floats, y: _Floats, count: int) -> Iterator[_Places]:
    """Yield the cells of a grid in the order of a best-first search, in pieces.

    The search starts in the corner (0, 0) and goes on with the cell of largest ``x[i] * y[j]`` that
    is next to a visited one (Figure 6).

    Parameters
    ----------
    x, y : ndarray of float64
        Descending, not negative. Of equal products the smaller i, then j, comes first.
    count : int
        Cells of the first piece, at least 1; each piece doubles how many there are.

    Yields
    ------
    ndarray of int64, shape (n, 2)
    """
    done, count = 0, max(1, count)
    while done < x.size * y.size:
        cells = np.empty((min(count, x.size * y.size), 2), np.int64)
        _growth.best_first(x, y, cells)
        yield cells[done:]
        done, count = count, 2 * count


def _largest(d_out: _Floats, d_in: _Floats, positions: _Places, count: int) -> _Places:
    """Return the positions of largest products, of equal ones the first."""
    row, column = np.divmod(positions, d_in.shape[1])
    products = d_out[row] * d_in[row // (d_out.size // len(d_in)), column]
    chosen: _Places = positions[np.argsort(-products, kind="stable")[:count]]
    return chosen


def _best_of_groups(x: RankedGroups, y: RankedGroups, d_in: _Floats) -> _Places:
    """Return all blocks of X and Y from the largest sum of products down, of equal ones the first.

    The sum of ``‖dOut_i‖·‖In_j‖`` over a block is ``‖X‖·‖Y‖`` where all rows see the same inputs.
    """
    height = x.norms.size // len(d_in)  # rows of a group of the convolution
    of_columns = np.zeros((len(x.members), d_in.shape[1]))  # sums over the rows of each X
    for rows in x.members.T:
        d_out = np.where(rows >= 0, x.norms[rows], 0.0)
        of_columns += d_out[:, None] * d_in[rows // height]
    blocks = np.zeros((len(x.members), len(y.members)))
    for columns in y.members.T:
        blocks += np.where(columns >= 0, of_columns[:, columns], 0.0)
    order = np.argsort(-blocks, axis=None, kind="stable")
    return np.stack(np.divmod(order, blocks.shape[1]), axis=1)
