"""A multiple of the identity plus a low-rank Kronecker eigenform."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import require_positive
from fisherlab.operators.base import Operator, Provenance, inner_product
from fisherlab.operators.dampings import Damping, tikhonov
from fisherlab.operators.kronecker import KroneckerSum


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerLowRank(Operator):
    """shift·I + (U ⊗ V) diag(e) (U ⊗ V)ᵀ with thin orthonormal U and V.

    Parameters
    ----------
    row_basis, column_basis
        U (d_out, r) and V (d_in, c) with orthonormal columns.
    entries
        e, shape (r, c).
    shift
        The eigenvalue outside the span.
    row_values
        The eigenvalues of the row factor alone, where e is a product of two factors'.
    moments
        The factors that were cut to U and V, where they are kept for a refresh.
    steps
        Updates that led here.

    Examples
    --------
    >>> op = KroneckerLowRank(torch.eye(3)[:, :1], torch.eye(4)[:, :2], torch.ones(1, 2))
    >>> op.trace(), op.inverse(1.0).trace()
    (2.0, 11.0)
    """

    row_basis: Float[Tensor, "o r"]
    column_basis: Float[Tensor, "i c"]
    entries: Float[Tensor, "r c"]
    shift: float = 0.0
    row_values: Float[Tensor, " r"] | None = None
    provenance: Provenance = Provenance()
    moments: tuple[Float[Tensor, "o o"], Float[Tensor, "i i"]] | None = None
    steps: int = 0

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.row_basis.shape[0], self.column_basis.shape[0]

    @property
    def stored_numbers(self) -> int:
        """d_out·r + d_in·c + r·c, and the moments where they are kept."""
        held = (self.row_basis, self.column_basis, self.entries, *(self.moments or ()))
        return sum(tensor.numel() for tensor in held)

    @property
    def product_flops(self) -> int:
        """2·(r·d_out·d_in + r·c·d_in)."""
        (o, i), (r, c) = self.weight_shape, self.entries.shape
        return 2 * (r * o * i + r * c * i)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        turned = self.row_basis.T @ w @ self.column_basis
        back = self.row_basis @ ((turned * self.entries) @ self.column_basis.T)
        return back + self.shift * w

    def _dense(self) -> Float[Tensor, "p p"]:
        basis = torch.kron(self.row_basis, self.column_basis)
        eye = torch.eye(len(basis), dtype=self.dtype, device=self.device)
        return (basis * self.entries.flatten()) @ basis.T + self.shift * eye

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return shift + U∘² e V∘²ᵀ."""
        rows, cols = self.row_basis.square(), self.column_basis.square()
        return self.shift + rows @ self.entries @ cols.T

    def trace(self) -> float:
        """Return p·shift + Σ e."""
        return self.shape[0] * self.shift + float(self.entries.sum(dtype=torch.float64))

    def frobenius_norm(self) -> float:
        """Return (Σ (e + shift)² + (p − r·c) shift²)^½."""
        inside = (self.entries.double() + self.shift).square().sum()
        rest = self.shape[0] - self.entries.numel()
        return float((inside + rest * self.shift**2).sqrt())

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return e + shift, and shift for the rest, descending."""
        missing = self.shape[0] - self.entries.numel()
        rest = self.entries.new_zeros(missing)
        every = torch.cat([self.entries.flatten(), rest]) + self.shift
        return every.sort(descending=True).values

    def inverse(self, damping: Damping) -> "KroneckerLowRank":
        """Return (M + damping·I)⁻¹, of the same form.

        Raises
        ------
        IndefiniteError
            If an eigenvalue plus the damping is not positive.
        ValueError
            For a factored damping.
        """
        damping = tikhonov(damping, self)
        require_positive(self.eigenvalues(), damping, repr(self))
        shift = self.shift + damping
        damped = self.entries + shift
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        return replace(
            self,
            entries=damped.reciprocal() - 1 / shift,
            shift=1 / shift,
            row_values=None,
            provenance=made,
            moments=None,
        )


@inner_product(KroneckerLowRank, KroneckerSum)
def _low_rank_sum(a: KroneckerLowRank, b: KroneckerSum) -> float:
    total = a.shift * b.trace()
    for rows, cols in b.terms:
        left = ((rows @ a.row_basis) * a.row_basis).sum(0)
        right = ((cols @ a.column_basis) * a.column_basis).sum(0)
        total += float((a.entries * torch.outer(left, right)).sum(dtype=torch.float64))
    return total
