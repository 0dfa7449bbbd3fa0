"""Diagonals and one term more: between weights and bias, or the root of averages (Adam)."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.operators.base import Provenance
from fisherlab.operators.eigenforms import Diagonal
from fisherlab.operators.gradient_roots import FromState
from fisherlab.operators.row_rank_one import RowRankOne


@final
@dataclass(frozen=True, eq=False, repr=False)
class QuasiDiagonal(FromState):
    r"""The matrix with a given diagonal and bias column whose inverse is an arrow.

    For one output with bias entry 0,

    .. math:: M_{ii} = F_{ii}, \quad M_{0i} = F_{0i}, \quad
              M_{ij} = F_{0i} F_{0j} / F_{00}

    so that :math:`(M^{-1})_{ij} = 0` for different weights i and j. Different outputs
    are uncoupled; an output whose bias has no energy, but for rounding, is diagonal.

    Parameters
    ----------
    squares
        F_ii, shape (d_out, d_in).
    with_bias
        F_0i, shape (d_out, d_in), the last column F_00; zero for a weight without bias.

    Examples
    --------
    >>> op = QuasiDiagonal(torch.tensor([[2.0, 2.0, 1.0]]), torch.ones(1, 3))
    >>> op.to_dense().tolist()
    [[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 1.0]]
    >>> op.inverse(0.0).to_dense().round(decimals=4).add(0.0).tolist()
    [[1.0, 0.0, -1.0], [0.0, 1.0, -1.0], [-1.0, -1.0, 3.0]]
    """

    squares: Float[Tensor, "o i"]
    with_bias: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()
    averages: ClassVar[tuple[str, ...]] = ("squares", "with_bias")

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.squares.shape[0], self.squares.shape[1]

    @cached_property
    def formed(self) -> RowRankOne:
        """The matrix as a diagonal plus F_00 v vᵀ, v = F_0i / F_00."""
        energy = self.with_bias[:, -1]
        # A bias without effect (of attention's keys) has gradients of rounding size.
        eps = torch.finfo(energy.dtype).eps
        alive = energy > (1e2 * eps) ** 2 * self.squares.amax(1)
        ratio = self.with_bias / torch.where(alive, energy, 1.0)[:, None]
        directions = torch.where(alive[:, None], ratio, 0.0)
        # Not negative by Cauchy-Schwarz, but for rounding.
        left = (self.squares - energy[:, None] * directions.square()).clamp_min(0)
        return RowRankOne(left, directions, energy.clamp_min(0), self.provenance)


@final
@dataclass(frozen=True, eq=False, repr=False)
class RootDiagonal(FromState):
    """diag(√v) with v ≥ 0 averaged in place of the matrix.

    Parameters
    ----------
    squares
        v, shape (d_out, d_in).

    Examples
    --------
    >>> import torch
    >>> op = RootDiagonal(torch.full((1, 2), 9.0))
    >>> op.trace(), op.solve(torch.ones(1, 2), damping=1.0).tolist()
    (6.0, [[0.25, 0.25]])
    """

    squares: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()
    averages: ClassVar[tuple[str, ...]] = ("squares",)

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.squares.shape[0], self.squares.shape[1]

    @cached_property
    def formed(self) -> Diagonal:
        """The diagonal matrix."""
        return Diagonal(self.squares.sqrt(), self.provenance)
