r"""A block-diagonal solve corrected by a small solve that couples the layers.

With P = F + λI, the fine level K⁻¹ ≈ P⁻¹ and R the rows of a coarse space, a few
directions a layer,

.. math:: C = R^T (R P R^T)^+ R

additive: :math:`K^{-1} + C`; multiplicative: :math:`K^{-1} + C (I - P K^{-1})`, the coarse
correction of what the fine level leaves.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Never, final

import torch
from torch import Tensor

from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.dampings import Damping, Factored, tikhonov
from fisherlab.operators.network.base import NetworkOperator, Shapes, Weights
from fisherlab.operators.network.block_diagonal import BlockDiagonal
from fisherlab.operators.network.two_level_inverse import (
    FOLLOWING,
    Coarse,
    Combination,
    TwoLevelInverse,
    fixed_space,
    right_side_space,
)


@final
@dataclass(frozen=True, eq=False, repr=False)
class AdaptiveTwoLevelInverse(NetworkOperator):
    """The map w ↦ two-level inverse with directions from what K⁻¹ leaves of w.

    It is not linear: it has products, and refuses every question about a matrix.

    Parameters
    ----------
    fine
        K⁻¹.
    exact, shift
        F and λ with P = F + λI.
    coarse
        "residual" or "krylov".
    combination
        "additive" or "multiplicative".
    vectors
        Directions a layer.

    Examples
    --------
    >>> from fisherlab.operators import BlockDiagonal, Diagonal
    >>> same = BlockDiagonal({n: Diagonal(torch.ones(1, 2)) for n in "ab"})
    >>> op = AdaptiveTwoLevelInverse(same.inverse(3.0), same, 1.0, "residual")
    >>> (op @ {n: torch.ones(1, 2) for n in "ab"})["a"].tolist()
    [[0.5, 0.5]]
    """

    fine: NetworkOperator
    exact: NetworkOperator
    shift: float
    coarse: Coarse
    combination: Combination = "multiplicative"
    vectors: int = 1
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        return self.fine.weight_shapes

    @property
    def product_flops(self) -> int:
        """Solves of the fine level, and two products with F."""
        return (1 + self.vectors) * self.fine.product_flops + 2 * self.exact.product_flops

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        done = self.fine._apply_blocks(ws)
        image = self.exact._apply_blocks(done)
        rest = {name: w - image[name] - self.shift * done[name] for name, w in ws.items()}
        found = []
        for k in range(len(next(iter(ws.values())))):
            own = {name: r[k] for name, r in rest.items()}
            space = right_side_space(self.coarse, self.fine, own, self.vectors)
            corrected = TwoLevelInverse(
                self.fine, self.exact, self.shift, space, self.combination
            )
            one = corrected._apply_blocks({name: w[k : k + 1] for name, w in ws.items()})
            found.append(one)
        return {name: torch.cat([one[name] for one in found]) for name in ws}

    @property
    def formed(self) -> Never:
        """Raise ValueError, as every question about a matrix does: there is none."""
        msg = (
            f"{self!r}: the coarse space {self.coarse!r} follows the right-hand side, so "
            "this is no matrix. Take products, or another space."
        )
        raise ValueError(msg)

    def block(self, row: str, column: str) -> Tensor:
        """Raise ValueError: there is no matrix."""
        return self.formed

    def inverse(self, damping: Damping) -> NetworkOperator:
        """Raise ValueError: there is no matrix."""
        return self.formed


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

    @cached_property
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
