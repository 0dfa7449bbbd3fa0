"""Kronecker terms from a stream that is read several times and never held."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators.kpsvd.rearranged import (
    Pair,
    Pairs,
    Rearranged,
    as_pairs,
    generic,
    rounding,
)
from fisherlab.approximators.states import Sums, add
from fisherlab.numerics.krylov import (
    Space,
    Triplets,
    block_krylov,
    orthonormal,
    rayleigh_ritz,
)
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics
from fisherlab.statistics.gathered import Chunks

HELD_BYTES = 2**28  # samples of a block that "auto" holds before it goes over to passes


@final
@dataclass(frozen=True, eq=False)
class Pass:
    """One pass through the data: the block multiplied and the sums of its images.

    Parameters
    ----------
    space
        The Krylov space that earlier passes built.
    block
        Orthonormal right vectors, (d_in², b).
    image
        Their images, (d_out², b), once a pass has found them; then Zᵀ is applied to them.
    sums
        Σ D V Dᵀ, or Σ Dᵀ U D, over what this pass has seen.
    used
        Blocks multiplied so far.
    removed
        Terms (G, A) subtracted from the block.
    """

    space: Space
    block: Float[Tensor, "ii b"]
    image: Float[Tensor, "oo b"] | None = None
    sums: Sums | None = None
    used: int = 0
    removed: tuple[Pair, ...] = ()

    def seeing(self, statistics: LayerStatistics) -> "Pass":
        """Add a chunk's part of the images."""
        samples = statistics.samples
        o, i = samples.weight_shape
        if self.image is None:
            images = [samples.row_side(v.view(i, i)) for v in self.block.T.contiguous()]
        else:
            rows = self.image.T.contiguous()
            images = [samples.column_side(u.view(o, o)) for u in rows]
        more = Sums.of(statistics, torch.stack(images))
        return self.summing(add(self.sums, more))

    def summing(self, sums: Sums | None) -> "Pass":
        """Return the same block with other images."""
        return replace(self, sums=sums)

    def __add__(self, other: "Pass") -> "Pass":
        """Add up two parts of the data within the same pass."""
        if self.sums is None or other.sums is None:
            return other if self.sums is None else self
        return self.summing(self.sums + other.sums)

    @property
    def seen(self) -> Sums:
        """The sums of a pass that has begun."""
        assert self.sums is not None
        return self.sums

    def means(self) -> Tensor:
        """Return the images as columns, over the examples, less the terms taken off."""
        images = self.seen.tensors[0].flatten(1).T / self.seen.count
        for rows, cols in self.removed:
            if self.image is None:
                images = images - torch.outer(rows.flatten(), cols.flatten() @ self.block)
            else:
                images = images - torch.outer(cols.flatten(), rows.flatten() @ self.image)
        return images

    @property
    def floor(self) -> float:
        """Rounding errors of the terms taken off: no singular value below is one."""
        return rounding(self.removed)

    def completed(self) -> Space:
        """Return the space with the block whose images both passes have found."""
        assert self.image is not None
        return self.space.extended(self.block, self.image, self.means())


@shown
@numeric
@final
@dataclass(frozen=True)
class Passes:
    """Block Krylov iteration by passes: in a stream, no sample is held.

    Each block costs two passes through the data, one for Z V and one for Zᵀ U, and the
    state holds 2·depth·(rank + oversample) pairs of matrices.

    Parameters
    ----------
    depth
        Blocks of one Krylov space before a restart.
    oversample
        Vectors of a block beyond the rank.
    tolerance
        As in `Power`.
    max_iterations
        Blocks at most, each worth two passes.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = [(torch.eye(3).double()[k : k + 1], None) for k in range(3)]
    >>> method = {"streamed": fl.KPSVD(solver=Passes())}
    >>> model = torch.nn.Linear(3, 2).double()
    >>> found = fl.approximate(model, data, fl.Categorical(), method)
    >>> found["streamed"]["weight"].converged
    True
    """

    depth: int = 8
    oversample: int = 1
    tolerance: float | None = None
    max_iterations: int = 100

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs of samples that are held after all."""
        triplets = block_krylov(
            block.linear(),
            rank,
            block.start(rank + self.oversample, warm),
            depth=self.depth,
            tolerance=self.tolerance or block.tolerance,
            max_products=self.max_iterations,
        )
        return as_pairs(triplets, block.samples.weight_shape)

    def accumulate(
        self, state: Pass | None, statistics: LayerStatistics, rank: int
    ) -> Pass:
        """Add a chunk; begin with the identity and fixed noise."""
        if state is None:
            first = Rearranged(statistics.samples, max(statistics.count, 1))
            state = self.begun(first, rank)
        return state.seeing(statistics)

    def begun(self, block: Rearranged, rank: int) -> Pass:
        """Return the first pass over a block, which may have terms taken off."""
        start = block.start(rank + self.oversample)
        return Pass(Space(), orthonormal(start), removed=block.removed)

    def over(self, held: Chunks, rank: int) -> Pass:
        """Return the first pass, over samples that were held until now."""
        first, *rest = held.pieces
        state = self.accumulate(None, first, rank)
        for piece in rest:
            state = state.seeing(piece)
        return state

    def again(self, state: Pass, rank: int, removed: tuple[Pair, ...]) -> Pass:
        """Return the first pass over the same block with other terms taken off."""
        size = state.block.shape[0]
        start = generic(round(size**0.5), rank + self.oversample, len(removed), state.block)
        return Pass(Space(), orthonormal(start), removed=removed)

    def next_pass(self, state: Pass, rank: int) -> Pass | None:
        """Return what the next pass multiplies, or None if the pairs have converged."""
        if state.image is None:
            return replace(state, image=state.means(), sums=None)
        space, used = state.completed(), state.used + 1
        triplets, restart = self._triplets(space, rank)
        if not len(triplets.values) or float(triplets.values[0]) <= state.floor:
            return None
        if triplets.within(self._limit(state)) or used >= self.max_iterations:
            return None
        if space.depth < self.depth:
            block = space.following()
        else:
            space, block = Space(), orthonormal(restart)
        if not block.shape[1]:
            return None
        return Pass(space, block, used=used, removed=state.removed)

    def finish(self, state: Pass, rank: int) -> Pairs:
        """Return the pairs of the last pass."""
        triplets, _ = self._triplets(state.completed(), rank)
        if not len(triplets.values) or float(triplets.values[0]) <= state.floor:
            nothing = triplets.values[:0]
            return Pairs((), nothing, True, state.used + 1, 0.0)
        done = triplets.within(self._limit(state))
        triplets = triplets._replace(converged=done, iterations=state.used + 1)
        return as_pairs(triplets, state.seen.weight_shape)

    def _triplets(self, space: Space, rank: int) -> tuple[Triplets, Tensor]:
        return rayleigh_ritz(space, rank, rank + self.oversample)

    def _limit(self, state: Pass) -> float:
        return self.tolerance or (1e-10 if state.block.dtype == torch.float64 else 2e-6)
