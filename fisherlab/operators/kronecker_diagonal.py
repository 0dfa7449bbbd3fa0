"""Kronecker structures whose row factor is diagonal: the rows of a table are apart."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import eigh
from fisherlab.operators.base import Operator, Provenance, inner_product
from fisherlab.operators.dampings import Damping, Factored, shifted, tikhonov
from fisherlab.operators.factored import FactoredFisher
from fisherlab.operators.kronecker_eigen import powers
from fisherlab.samples import TokenSamples


@final
@dataclass(frozen=True, eq=False, repr=False)
class RowwiseEigen(Operator):
    """(I ⊗ V) diag(s) (I ⊗ V)ᵀ: every row of the weight in one common basis.

    EKFAC of an embedding, and diag(d) ⊗ A after any function.

    Parameters
    ----------
    column_basis
        V, orthogonal, shape (d_in, d_in).
    entries
        s, the eigenvalues, shape (d_out, d_in).

    Examples
    --------
    >>> op = RowwiseEigen(torch.eye(3), torch.ones(1000, 3))
    >>> op.trace(), op.inverse(1.0).trace()
    (3000.0, 1500.0)
    """

    column_basis: Float[Tensor, "i i"]
    entries: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.entries.shape[0], self.entries.shape[1]

    @property
    def product_flops(self) -> int:
        """2 d_out·d_in²."""
        o, i = self.weight_shape
        return 2 * o * i * i

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        return ((w @ self.column_basis) * self.entries) @ self.column_basis.T

    def _dense(self) -> Float[Tensor, "p p"]:
        basis = self.column_basis
        return torch.block_diag(*((basis * one) @ basis.T for one in self.entries))

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return s V∘²ᵀ."""
        return self.entries @ self.column_basis.square().T

    def trace(self) -> float:
        """Return Σ s."""
        return float(self.entries.sum(dtype=torch.float64))

    def frobenius_norm(self) -> float:
        """Return ‖s‖."""
        return float(torch.linalg.vector_norm(self.entries, dtype=torch.float64))

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return s, descending."""
        return self.entries.flatten().sort(descending=True).values

    def _spectra(self) -> Iterator[Float[Tensor, "o i"]]:
        yield self.entries

    def inverse(self, damping: Damping) -> "RowwiseEigen":
        """Return the same basis with 1/(s + damping).

        Raises
        ------
        IndefiniteError
            If an eigenvalue plus the damping is not positive.
        ValueError
            For a factored damping: the eigenvalues are those of no two factors.
        """
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        shift = tikhonov(damping, self)
        return replace(self.power(-1.0, shift), provenance=made)

    def power(self, exponent: float, damping: Damping) -> "RowwiseEigen":
        """Return (M + damping·I)^exponent.

        Raises
        ------
        IndefiniteError
            If the power does not exist.
        """
        damping = tikhonov(damping, self)
        made = self.provenance.by(f"{self.provenance.method}^{exponent:g}")
        entries = powers(self.entries, exponent, damping, repr(self))
        return replace(self, entries=entries, provenance=made)


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerDiagonal(Operator):
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

    @property
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
        return float(self.row_diagonal.norm()) * float(self.column_factor.norm())

    @cached_property
    def _eigen(self) -> RowwiseEigen:
        values, basis = eigh(self.column_factor, f"the column factor of {self!r}")
        entries = torch.outer(self.row_diagonal, values)
        return RowwiseEigen(basis, entries, self.provenance)

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return the products of d with the eigenvalues of A, descending."""
        return self._eigen.eigenvalues()

    def _spectra(self) -> Iterator[Float[Tensor, "o i"]]:
        yield self._eigen.entries

    def inverse(self, damping: Damping) -> RowwiseEigen:
        """Return (M + damping)⁻¹ in the eigenbasis of A.

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        if isinstance(damping, Factored) and damping.value:  # positive as it is made
            eigen = self.damped(damping)._eigen
            return replace(eigen, entries=eigen.entries.reciprocal(), provenance=made)
        shift = 0.0 if isinstance(damping, Factored) else damping
        return replace(self._eigen.inverse(shift), provenance=made)

    def damped(self, damping: Factored) -> "KroneckerDiagonal":
        """Return diag(d + √λ/π) ⊗ (A + π√λ I), π as for any two factors."""
        ratio = damping.ratio_of(self.row_diagonal, self.column_factor.diagonal())
        root = damping.value**0.5
        return replace(
            self,
            row_diagonal=self.row_diagonal + root / ratio,
            column_factor=shifted(self.column_factor, root * ratio),
        )

    def sqrt(self, damping: Damping = 0.0) -> RowwiseEigen:
        """Return (M + damping·I)^½.

        Raises
        ------
        IndefiniteError
            If an eigenvalue plus the damping is negative.
        """
        return self._eigen.power(0.5, damping)

    def inverse_sqrt(self, damping: Damping) -> RowwiseEigen:
        """Return (M + damping·I)^-½.

        Raises
        ------
        IndefiniteError
            If an eigenvalue plus the damping is not positive.
        """
        return self._eigen.power(-0.5, damping)


@inner_product(KroneckerDiagonal, KroneckerDiagonal)
def _diagonal_diagonal(a: KroneckerDiagonal, b: KroneckerDiagonal) -> float:
    rows = float((a.row_diagonal * b.row_diagonal).sum(dtype=torch.float64))
    return rows * float((a.column_factor * b.column_factor).sum(dtype=torch.float64))


@inner_product(RowwiseEigen, RowwiseEigen)
def _rowwise_rowwise(a: RowwiseEigen, b: RowwiseEigen) -> float:
    turn = (a.column_basis.T @ b.column_basis).square()
    return float((a.entries * (b.entries @ turn.T)).sum(dtype=torch.float64))


@inner_product(KroneckerDiagonal, RowwiseEigen)
def _diagonal_rowwise(a: KroneckerDiagonal, b: RowwiseEigen) -> float:
    turned = ((a.column_factor @ b.column_basis) * b.column_basis).sum(0)
    return float((b.entries * torch.outer(a.row_diagonal, turned)).sum(dtype=torch.float64))


@inner_product(FactoredFisher, KroneckerDiagonal)
def _factored_diagonal(a: FactoredFisher, b: KroneckerDiagonal) -> float:
    if isinstance(a.samples, TokenSamples):
        total = a.samples.diagonal_inner(b.row_diagonal, b.column_factor)
    else:
        total = a.samples.kronecker_inner(*b.terms[0])
    return total / a.count


@inner_product(FactoredFisher, RowwiseEigen)
def _factored_rowwise(a: FactoredFisher, b: RowwiseEigen) -> float:
    if isinstance(a.samples, TokenSamples):
        squares = a.samples.column_squares(b.column_basis)
    else:
        eye = torch.eye(b.weight_shape[0], dtype=b.dtype, device=b.device)
        squares = a.samples.rotated_squares(eye, b.column_basis)
    return float((squares * b.entries).sum(dtype=torch.float64)) / a.count
