"""A matrix known by the square roots of its inverse's Kronecker factors."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import factorised
from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.dampings import Damping, tikhonov
from fisherlab.operators.kronecker import KroneckerSum


@final
@dataclass(frozen=True, eq=False, repr=False)
class InverseFactors(Operator):
    """The matrix whose inverse is C Cᵀ ⊗ K Kᵀ, with the state of the iteration.

    Solves with damping 0 are four products. Every other question inverts the factors
    once.

    Parameters
    ----------
    row_root, column_root
        C (d_out, d_out) and K (d_in, d_in).
    row_momentum, column_momentum
        What the next update adds to.

    Examples
    --------
    >>> import torch
    >>> eye, zero = torch.eye(2), torch.zeros(2, 2)
    >>> op = InverseFactors(2 * eye, eye, zero, zero)
    >>> op.solve(torch.ones(2, 2), damping=0.0)[0, 0].item(), op.trace()
    (4.0, 1.0)
    """

    row_root: Float[Tensor, "o o"]
    column_root: Float[Tensor, "i i"]
    row_momentum: Float[Tensor, "o o"]
    column_momentum: Float[Tensor, "i i"]
    provenance: Provenance = Provenance()

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """C, K and their momenta."""
        return self.row_root, self.column_root, self.row_momentum, self.column_momentum

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.row_root), len(self.column_root)

    @cached_property
    def solver(self) -> KroneckerSum:
        """The inverse, C Cᵀ ⊗ K Kᵀ."""
        rows, cols = self.row_root, self.column_root
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        return KroneckerSum(((rows @ rows.T, cols @ cols.T),), self.weight_shape, made)

    @cached_property
    def formed(self) -> KroneckerSum:
        """The matrix itself, (C Cᵀ)⁻¹ ⊗ (K Kᵀ)⁻¹."""
        roots = self.row_root, self.column_root
        rows, cols = (factorised("inv", root, self) for root in roots)
        terms = ((rows.T @ rows, cols.T @ cols),)
        return KroneckerSum(terms, self.weight_shape, self.provenance)

    def inverse(self, damping: Damping) -> Operator:
        """Return (M + damping·I)⁻¹.

        Raises
        ------
        ValueError
            For a factored damping: the factors are damped already.
        """
        shift = tikhonov(damping, self)
        return self.formed.inverse(shift) if shift else self.solver
