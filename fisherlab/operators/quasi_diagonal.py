"""Diagonals and one term more: an outer product a row, or the root of averages (Adam)."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.operators.base import Operator, Provenance, inner_product
from fisherlab.operators.dampings import Damping, tikhonov
from fisherlab.operators.eigenform import Diagonal
from fisherlab.operators.factored import FactoredFisher
from fisherlab.operators.gradient_roots import FromState
from fisherlab.operators.mini_blocks import MiniBlocks, Partition
from fisherlab.samples import OuterSamples


@final
@dataclass(frozen=True, eq=False, repr=False)
class RowRankOne(Operator):
    r"""Block-diagonal by output, each block :math:`\mathrm{diag}(d_r) + s_r u_r u_r^T`.

    Closed under damped inversion (Sherman-Morrison), with O(p) numbers and flops. Where
    λ = 0, or d_r + λ has an entry that is not positive, the blocks are formed and
    factorised instead.

    Parameters
    ----------
    entries
        d, shape (d_out, d_in).
    directions
        u, shape (d_out, d_in).
    scales
        s, shape (d_out,), of any sign.

    Examples
    --------
    >>> op = RowRankOne(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1))
    >>> op.to_dense().tolist(), round(op.inverse(0.0).trace(), 4)
    ([[2.0, 1.0], [1.0, 2.0]], 1.3333)
    """

    entries: Float[Tensor, "o i"]
    directions: Float[Tensor, "o i"]
    scales: Float[Tensor, " o"]
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.entries.shape[0], self.entries.shape[1]

    @property
    def product_flops(self) -> int:
        """3·d_out·d_in."""
        return 3 * self.entries.numel()

    @cached_property
    def formed(self) -> MiniBlocks:
        """The blocks, formed: for spectra, and for solves that need a factorisation."""
        u = self.directions
        outer = self.scales[:, None, None] * u[:, :, None] * u[:, None, :]
        blocks = outer + torch.diag_embed(self.entries)
        return MiniBlocks(Partition.by_row(self.weight_shape), (blocks,), self.provenance)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        inside = (self.directions * w).sum(-1) * self.scales
        return self.entries * w + inside[..., None] * self.directions

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return d + s u∘u."""
        return self.entries + self.scales[:, None] * self.directions.square()

    def trace(self) -> float:
        """Return the trace."""
        return float(self.diagonal().sum(dtype=torch.float64))

    def frobenius_norm(self) -> float:
        """Return (Σ d² + Σ 2 s d·u² + Σ s²‖u‖⁴)^½."""
        d, u, s = self.entries.double(), self.directions.double(), self.scales.double()
        squares = u.square()
        mixed = 2 * s * (d * squares).sum(1) + (s * squares.sum(1)).square()
        return float((d.square().sum() + mixed.sum()).clamp_min(0).sqrt())

    def inverse(self, damping: Damping) -> "RowRankOne | MiniBlocks":
        """Return (M + damping·I)⁻¹, of the same form where d + damping is positive.

        Raises
        ------
        IndefiniteError
            If a damped block is not positive definite.
        """
        damping = tikhonov(damping, self)
        shifted = self.entries + damping
        if not damping or not bool((shifted > 0).all()):
            return self.formed.inverse(damping)
        turned = self.directions / shifted
        pivots = 1 + self.scales * (self.directions * turned).sum(1)
        if not bool((pivots > 0).all()):
            return self.formed.inverse(damping)
        made = self.provenance.inverted
        return RowRankOne(shifted.reciprocal(), turned, -self.scales / pivots, made)


@inner_product(RowRankOne, FactoredFisher)
def _row_rank_one_factored(a: RowRankOne, b: FactoredFisher) -> float:
    """Return Σ d∘diag(F) + Σ_r s_r u_rᵀ F_rr u_r, no block formed."""
    samples, u = b.samples, a.directions
    if isinstance(samples, OuterSamples):
        forms = (samples.output_energy * (samples.inputs @ u.T).square()).sum(0)
    else:
        forms = samples.summed(lambda d: (d * u).sum(-1).square().sum(0))
    diagonal = (a.entries * samples.squares()).sum(dtype=torch.float64)
    return float(diagonal + (a.scales * forms).sum(dtype=torch.float64)) / b.count


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
