"""Matrices that are diagonal in a Kronecker product of two orthogonal bases."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import IndefiniteError
from fisherlab.numerics.linalg import require_finite, require_positive
from fisherlab.operators.base import Operator, Provenance, inner_product
from fisherlab.operators.dampings import Damping, tikhonov
from fisherlab.operators.dense import Dense
from fisherlab.operators.factored import FactoredFisher


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerEigen(Operator):
    """(U ⊗ V) diag(s) (U ⊗ V)ᵀ: EKFAC, and one Kronecker product after any function.

    Parameters
    ----------
    row_basis
        U, orthogonal, shape (d_out, d_out).
    column_basis
        V, orthogonal, shape (d_in, d_in).
    entries
        s, the eigenvalues, shape (d_out, d_in).

    Examples
    --------
    >>> op = KroneckerEigen(torch.eye(2), torch.eye(3), torch.ones(2, 3))
    >>> op.inverse(damping=1.0).entries[0, 0].item()
    0.5
    """

    row_basis: Float[Tensor, "o o"]
    column_basis: Float[Tensor, "i i"]
    entries: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.entries.shape[0], self.entries.shape[1]

    @property
    def product_flops(self) -> int:
        """2 d_out·d_in·(d_out + d_in)."""
        o, i = self.weight_shape
        return 2 * o * i * (o + i)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        turned = self.row_basis.T @ w @ self.column_basis
        return self.row_basis @ (turned * self.entries) @ self.column_basis.T

    def _dense(self) -> Float[Tensor, "p p"]:
        basis = torch.kron(self.row_basis, self.column_basis)
        return (basis * self.entries.flatten()) @ basis.T

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return U∘² s V∘²ᵀ."""
        return self.row_basis.square() @ self.entries @ self.column_basis.square().T

    def trace(self) -> float:
        """Return Σ s."""
        return float(self.entries.sum(dtype=torch.float64))

    def frobenius_norm(self) -> float:
        """Return ‖s‖."""
        return float(torch.linalg.vector_norm(self.entries, dtype=torch.float64))

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return s, descending."""
        return self.entries.flatten().sort(descending=True).values

    def kronecker_diagonal(
        self, rows: Float[Tensor, "o o"], cols: Float[Tensor, "i i"]
    ) -> Float[Tensor, "o i"]:
        """Return the diagonal of (U ⊗ V)ᵀ (rows ⊗ cols) (U ⊗ V)."""
        left = ((rows @ self.row_basis) * self.row_basis).sum(0)
        right = ((cols @ self.column_basis) * self.column_basis).sum(0)
        return torch.outer(left, right)

    def inverse(self, damping: Damping) -> "KroneckerEigen":
        """Return the same bases with 1/(s + damping).

        Raises
        ------
        IndefiniteError
            If an eigenvalue plus the damping is not positive.
        ValueError
            For a factored damping.
        """
        shift = tikhonov(damping, self)
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        return replace(self.power(-1.0, shift), provenance=made)

    def sqrt(self, damping: Damping = 0.0) -> "KroneckerEigen":
        """Return (M + damping·I)^½.

        Raises
        ------
        IndefiniteError
            If an eigenvalue plus the damping is negative.
        """
        return self.power(0.5, damping)

    def inverse_sqrt(self, damping: Damping) -> "KroneckerEigen":
        """Return (M + damping·I)^-½.

        Raises
        ------
        IndefiniteError
            If an eigenvalue plus the damping is not positive.
        """
        return self.power(-0.5, damping)

    def power(self, exponent: float, damping: Damping) -> "KroneckerEigen":
        """Return (M + damping·I)^exponent.

        Raises
        ------
        IndefiniteError
            If the power does not exist.
        """
        damping = tikhonov(damping, self)
        made = self.provenance.by(f"{self.provenance.method}^{exponent:g}")
        entries = powers(self.entries.flatten(), exponent, damping, repr(self))
        entries = entries.view(self.entries.shape)
        return replace(self, entries=entries, provenance=made)


def powers(values: Tensor, exponent: float, damping: float, what: str) -> Tensor:
    """Return (values + damping)^exponent; rounding below zero counts as zero for roots.

    The last axis of the values belongs to one matrix.

    Raises
    ------
    IndefiniteError
        If a negative value is met, or under a negative exponent what may be zero.
    """
    shifted = values + damping
    if exponent < 0:
        require_positive(values, damping, what)
        return shifted.pow(exponent)
    rounding = 1e2 * torch.finfo(values.dtype).eps * float(values.abs().max())
    if not bool((shifted >= -rounding).all()):
        require_finite(shifted, f"{what} with damping {damping:g}")
        raise IndefiniteError(what, damping, float(values.min()))
    return shifted.clamp_min(0).pow(exponent)


@inner_product(KroneckerEigen, KroneckerEigen)
def _eigen_eigen(a: KroneckerEigen, b: KroneckerEigen) -> float:
    rows = (a.row_basis.T @ b.row_basis).square()
    cols = (a.column_basis.T @ b.column_basis).square()
    return float((a.entries * (rows @ b.entries @ cols.T)).sum(dtype=torch.float64))


@inner_product(FactoredFisher, KroneckerEigen)
def _factored_eigen(a: FactoredFisher, b: KroneckerEigen) -> float:
    energy = a.samples.rotated_squares(b.row_basis, b.column_basis)
    return float((energy * b.entries).sum(dtype=torch.float64)) / a.count


@inner_product(Dense, KroneckerEigen)
def _dense_eigen(a: Dense, b: KroneckerEigen) -> float:
    o, i = a.weight_shape
    basis = b.column_basis
    mixed = torch.stack(  # mixed[o, o', c] = Σ_ij V_ic M[o,i,o',j] V_jc
        [
            (panel.reshape(i * o, i) @ basis).view(i, o, i).mul_(basis[:, None, :]).sum(0)
            for panel in a.matrix.view(o, i, o * i)
        ]
    )
    turned = torch.einsum("ar,abc,br->rc", b.row_basis, mixed, b.row_basis)
    return float((turned * b.entries).sum(dtype=torch.float64))
