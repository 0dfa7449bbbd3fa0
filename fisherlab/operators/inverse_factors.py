"""A matrix known by the square roots of its inverse's Kronecker factors."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import factorised
from fisherlab.operators.base import Operator, Provenance, inner_product
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

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.row_root.dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.row_root.device

    @property
    def stored_numbers(self) -> int:
        """2 (d_out² + d_in²): roots and momenta."""
        return sum(tensor.numel() for tensor in self.state)

    @property
    def product_flops(self) -> int:
        """d_out·d_in·(d_out + d_in), with formed factors."""
        return self.formed.product_flops

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

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        return self.formed._apply(w)

    def _dense(self) -> Float[Tensor, "p p"]:
        return self.formed._dense()

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonal."""
        return self.formed.diagonal()

    def trace(self) -> float:
        """Return the trace."""
        return self.formed.trace()

    def frobenius_norm(self) -> float:
        """Return √ΣM²."""
        return self.formed.frobenius_norm()

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return all eigenvalues, descending."""
        return self.formed.eigenvalues()

    def solve(
        self, w: Float[Tensor, "*k o i"], damping: Damping
    ) -> Float[Tensor, "*k o i"]:
        """Return (M + damping·I)⁻¹ w; with damping 0, C Cᵀ w K Kᵀ.

        Raises
        ------
        ValueError
            For a factored damping: the factors are damped already.
        """
        self._check(w, "solve")
        return self.inverse(damping) @ w

    def inverse(self, damping: Damping) -> Operator:
        """Return (M + damping·I)⁻¹.

        Raises
        ------
        ValueError
            For a factored damping: the factors are damped already.
        """
        shift = tikhonov(damping, self)
        return self.formed.inverse(shift) if shift else self.solver

    def to(self, dtype: torch.dtype) -> "InverseFactors":
        """Return the matrix in another precision."""
        return replace(
            self,
            row_root=self.row_root.to(dtype),
            column_root=self.column_root.to(dtype),
            row_momentum=self.row_momentum.to(dtype),
            column_momentum=self.column_momentum.to(dtype),
        )


@inner_product(InverseFactors, Operator)
def _inverse_factors_any(a: InverseFactors, b: Operator) -> float:
    return a.formed.inner(b)
