"""Kronecker structures whose row factor is diagonal: the rows of a table are apart."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import Label, eigh
from fisherlab.operators.base import Damping, Factored, Provenance, inner_product, shifted
from fisherlab.operators.eigenform import Eigenform, InBasis, RowwiseEigen, quadratic_forms
from fisherlab.operators.factored import FactoredFisher


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerDiagonal(InBasis):
    """diag(d) ⊗ A in d_out + d_in² numbers: KFAC of an embedding.

    Parameters
    ----------
    row_diagonal
        d, shape (d_out,).
    column_factor
        A, shape (d_in, d_in).

    Examples
    --------
    >>> op = KroneckerDiagonal(torch.ones(1000), 2 * torch.eye(3))
    >>> op.trace(), op.stored_numbers
    (6000.0, 1006)
    """

    row_diagonal: Float[Tensor, " o"]
    column_factor: Float[Tensor, "i i"]
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.row_diagonal), len(self.column_factor)

    @property
    def stored_numbers(self) -> int:
        """d_out + d_in(d_in + 1)/2."""
        o, i = self.weight_shape
        return o + i * (i + 1) // 2

    @property
    def product_flops(self) -> int:
        """d_out·d_in²."""
        o, i = self.weight_shape
        return o * i * i

    @property
    def terms(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """The pair (G, A) with G formed, d_out² numbers."""
        return ((torch.diag(self.row_diagonal), self.column_factor),)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        return self.row_diagonal[:, None] * (w @ self.column_factor.T)

    def _dense(self) -> Float[Tensor, "p p"]:
        return torch.block_diag(*(one * self.column_factor for one in self.row_diagonal))

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return d diag(A)ᵀ."""
        return torch.outer(self.row_diagonal, self.column_factor.diagonal())

    def trace(self) -> float:
        """Return Σd · tr A."""
        return float(self.row_diagonal.sum()) * float(self.column_factor.trace())

    def frobenius_norm(self) -> float:
        """Return ‖d‖ ‖A‖."""
        sides = self.row_diagonal, self.column_factor
        rows, cols = (torch.linalg.vector_norm(s, dtype=torch.float64) for s in sides)
        return float(rows * cols)

    @cached_property
    def formed(self) -> Eigenform:
        """The matrix in the eigenbasis of A."""
        values, basis = eigh(self.column_factor, Label("the column factor of {}", self))
        entries = torch.outer(self.row_diagonal, values)
        return RowwiseEigen(basis, entries, self.provenance).formed

    def inverse(self, damping: Damping) -> Eigenform:
        """Return (M + damping)⁻¹ in the eigenbasis of A.

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        made = self.provenance.inverted
        if isinstance(damping, Factored) and damping.value:  # positive as it is made
            eigen = self.damped(damping).formed
            (values,) = eigen.tables
            return replace(eigen, tables=(values.reciprocal(),), provenance=made)
        shift = 0.0 if isinstance(damping, Factored) else damping
        return replace(self.formed.inverse(shift), provenance=made)

    def damped(self, damping: Factored) -> "KroneckerDiagonal":
        """Return diag(d + √λ/π) ⊗ (A + π√λ I), π as for any two factors."""
        ratio = damping.ratio_of(self.row_diagonal, self.column_factor.diagonal())
        root = damping.value**0.5
        return replace(
            self,
            row_diagonal=self.row_diagonal + root / ratio,
            column_factor=shifted(self.column_factor, root * ratio),
        )


@inner_product(KroneckerDiagonal, KroneckerDiagonal)
def _diagonal_diagonal(a: KroneckerDiagonal, b: KroneckerDiagonal) -> float:
    rows = float((a.row_diagonal * b.row_diagonal).sum(dtype=torch.float64))
    return rows * float((a.column_factor * b.column_factor).sum(dtype=torch.float64))


@inner_product(KroneckerDiagonal, Eigenform)
def _diagonal_eigenform(a: KroneckerDiagonal, b: Eigenform) -> float:
    if b.basis.pair is None:
        return b.inner(a.formed)
    rows, cols = b.basis.pair
    left = a.row_diagonal if rows is None else a.row_diagonal @ rows.square()
    right = quadratic_forms(a.column_factor, cols)
    inside = b._inside.view(len(left), len(right)) * torch.outer(left, right)
    outside = b.rest * a.trace() if b.rest else 0.0
    return outside + float(inside.sum(dtype=torch.float64))


@inner_product(FactoredFisher, KroneckerDiagonal)
def _factored_diagonal(a: FactoredFisher, b: KroneckerDiagonal) -> float:
    return a.samples.diagonal_inner(b.row_diagonal, b.column_factor) / a.count
