r"""A block-diagonal solve corrected by a small solve that couples the layers.

With P = F + λI, the fine level K⁻¹ ≈ P⁻¹ and R the rows of a coarse space, a few
directions a layer,

.. math:: C = R^T (R P R^T)^+ R

additive: :math:`K^{-1} + C`; multiplicative: :math:`K^{-1} + C (I - P K^{-1})`, the coarse
correction of what the fine level leaves.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import final

from torch import Tensor

from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.dampings import Damping, Factored, tikhonov
from fisherlab.operators.network.adaptive_two_level import AdaptiveTwoLevelInverse
from fisherlab.operators.network.base import NetworkOperator, Shapes, Weights
from fisherlab.operators.network.block_diagonal import BlockDiagonal
from fisherlab.operators.network.coarse_spaces import FOLLOWING, Coarse, fixed_space
from fisherlab.operators.network.two_level_inverse import Combination, TwoLevelInverse


@final
@dataclass(frozen=True, eq=False, repr=False)
class TwoLevel(NetworkOperator):
    """A block diagonal whose damped solves are corrected on a coarse space.

    Products, norms, traces and the diagonal are those of the block diagonal; the coarse
    level enters `solve`, `inverse` and `logdet` with a damping.

    Parameters
    ----------
    local
        The block diagonal.
    exact
        F, of which products are taken.
    coarse
        "nicolaides" (the constant of every layer), "spectral" (smallest eigenvectors of
        every local block), "residual" (K⁻¹ r of every layer, r what the fine level
        leaves) or "krylov" (K⁻¹ r, K⁻² r, …). The last two follow the right-hand side, so
        that the solve is not linear and there is no inverse matrix.
    combination
        "additive" or "multiplicative".
    vectors
        Directions a layer.

    References
    ----------
    Tselepidis et al. 2020, arXiv 2011.00573; Koroko et al. 2023, arXiv 2303.18083.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.operators.eigenforms import Diagonal
    >>> one, two = (
    ...     BlockDiagonal({n: Diagonal(torch.full((1, 2), x)) for n in "ab"})
    ...     for x in (1.0, 2.0)
    ... )
    >>> op = TwoLevel(local=one, exact=two)
    >>> ws = {n: torch.ones(1, 2) for n in "ab"}
    >>> op.local.solve(ws, 1.0)["a"][0, 0].item()
    0.5
    >>> round(op.solve(ws, 1.0)["a"][0, 0].item(), 6)
    0.333333
    """

    local: BlockDiagonal
    exact: NetworkOperator
    coarse: Coarse = "nicolaides"
    combination: Combination = "multiplicative"
    vectors: int = 1
    provenance: Provenance = Provenance()

    @property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        return self.local.weight_shapes

    @cached_property
    def formed(self) -> BlockDiagonal:
        """The block diagonal."""
        return self.local

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        return self.local._apply_blocks(ws)

    def diagonal_block(self, name: str) -> Operator:
        """Return the operator of one weight."""
        return self.local.diagonal_block(name)

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return −log det of the two-level inverse.

        Raises
        ------
        ValueError
            For a coarse space that follows the right-hand side.
        """
        return -self.inverse(damping).logdet()

    def inverse(self, damping: Damping) -> "TwoLevelInverse | AdaptiveTwoLevelInverse":
        """Return the two-level approximation of (F + λI)⁻¹.

        With `Factored` the fine level damps its factors; λ of the coarse level is the
        same. A coarse space that follows the right-hand side gives an operator that has
        products and nothing else.

        Raises
        ------
        IndefiniteError
            If a damped local block is not positive definite.
        """
        own = damping.value if isinstance(damping, Factored) else damping
        shift = tikhonov(own, repr(self))
        fine = self.local.inverse(damping)
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        if self.coarse in FOLLOWING:
            return AdaptiveTwoLevelInverse(
                fine, self.exact, shift, self.coarse, self.combination, self.vectors, made
            )
        space = fixed_space(self.coarse, self.local, self.vectors)
        return TwoLevelInverse(fine, self.exact, shift, space, self.combination, made)
