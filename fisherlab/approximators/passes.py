"""Kronecker terms from a stream that is read several times and never held."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators.solvers import Pair, Pairs, Rearranged
from fisherlab.approximators.sums import Sums, add
from fisherlab.numerics.krylov import (
    Space,
    Triplets,
    block_krylov,
    orthonormal,
    rayleigh_ritz,
)
from fisherlab.statistics import LayerStatistics


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
    """

    space: Space
    block: Float[Tensor, "ii b"]
    image: Float[Tensor, "oo b"] | None = None
    sums: Sums | None = None
    used: int = 0

    def seeing(self, statistics: LayerStatistics) -> "Pass":
        """Add a chunk's part of the images."""
        samples = statistics.samples
        o, i = samples.weight_shape
        if self.image is None:
            images = [samples.row_side(v.view(i, i)) for v in self.block.T]
        else:
            images = [samples.column_side(u.view(o, o)) for u in self.image.T]
        more = Sums.of(statistics, torch.stack(images))
        return replace(self, sums=add(self.sums, more))

    def __add__(self, other: "Pass") -> "Pass":
        """Add up two parts of the data within the same pass."""
        if self.sums is None or other.sums is None:
            return other if self.sums is None else self
        return replace(self, sums=self.sums + other.sums)

    def means(self) -> Tensor:
        """Return the images as columns, divided by the examples."""
        assert self.sums is not None
        stacked = self.sums.tensors[0].flatten(1).T
        return stacked / self.sums.count

    def completed(self) -> Space:
        """Return the space with the block whose images both passes have found."""
        assert self.image is not None
        return self.space.extended(self.block, self.image, self.means())


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
            start = first.start(rank + self.oversample)
            state = Pass(Space(), orthonormal(start, None, []))
        return state.seeing(statistics)

    def next_pass(self, state: Pass, rank: int) -> Pass | None:
        """Return what the next pass multiplies, or None if the pairs have converged."""
        if state.image is None:
            return replace(state, image=state.means(), sums=None)
        space, used = state.completed(), state.used + 1
        triplets, restart = self._triplets(space, rank)
        if triplets.residual <= self._limit(state) or used >= self.max_iterations:
            return None
        if space.depth < self.depth:
            block = space.following(None)
        else:
            space, block = Space(), orthonormal(restart, None, [])
        return Pass(space, block, used=used) if block.shape[1] else None

    def finish(self, state: Pass, rank: int) -> Pairs:
        """Return the pairs of the last pass."""
        assert state.sums is not None
        triplets, _ = self._triplets(state.completed(), rank)
        done = triplets.residual <= self._limit(state)
        triplets = triplets._replace(converged=done, iterations=state.used + 1)
        return as_pairs(triplets, state.sums.weight_shape)

    def _triplets(self, space: Space, rank: int) -> tuple[Triplets, Tensor]:
        return rayleigh_ritz(space, rank, rank + self.oversample)

    def _limit(self, state: Pass) -> float:
        return self.tolerance or (1e-10 if state.block.dtype == torch.float64 else 2e-6)


def as_pairs(triplets: Triplets, weight_shape: tuple[int, int]) -> Pairs:
    """Fold columns into pairs of matrices."""
    o, i = weight_shape
    lefts = [u.reshape(o, o).clone() for u in triplets.left.T]
    rights = [v.reshape(i, i).clone() for v in triplets.right.T]
    return Pairs(tuple(zip(lefts, rights, strict=True)), triplets.values, *triplets[3:])


def nearest_positive(factor: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return the positive semidefinite part of ± a factor, the sign that of its trace."""
    sign = 1.0 if float(factor.trace()) >= 0 else -1.0
    values, vectors = torch.linalg.eigh(sign * (factor + factor.T) / 2)
    return (vectors * values.clamp_min(0)) @ vectors.T
