"""Two Kronecker products diagonal at once: a Kronecker product of two general bases."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from fisherlab.errors import IndefiniteError, NumericalError
from fisherlab.numerics.devices import STAYS
from fisherlab.numerics.linalg import (
    damped_cholesky,
    damped_inverse,
    damped_triangle,
    factorised,
    kron,
    narrowed,
    require_positive,
)
from fisherlab.numerics.packed import pair_count
from fisherlab.operators.base import Damping, Factored, Operator, Provenance, tikhonov

Term = tuple[Float[Tensor, "o o"], Float[Tensor, "i i"]]
SYMMETRY = 1e-5  # relative size of the wrong part below which a factor is (skew-)symmetric


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerCongruence(Operator):
    r"""(R ⊗ C) diag(e) (R ⊗ C)ᴴ with invertible R and C, real as a whole.

    The sum of two Kronecker products in the bases that diagonalise both pairs of factors
    at once; its inverse has the same form. Complex bases belong to skew ⊗ skew pairs.

    Parameters
    ----------
    row_basis
        R, shape (d_out, d_out).
    column_basis
        C, shape (d_in, d_in).
    entries
        e, shape (d_out, d_in).

    Examples
    --------
    >>> op = KroneckerCongruence(2 * torch.eye(2), torch.eye(3), torch.ones(2, 3))
    >>> op.trace(), op.inverse(0.0).trace()
    (24.0, 1.5)
    """

    row_basis: Inexact[Tensor, "o o"]
    column_basis: Inexact[Tensor, "i i"]
    entries: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.entries.shape[0], self.entries.shape[1]

    @property
    def product_flops(self) -> int:
        """2 d_out·d_in·(d_out + d_in)."""
        o, i = self.weight_shape
        return 2 * o * i * (o + i)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        rows, cols = self.row_basis, self.column_basis
        turned = rows.mH @ w.to(rows.dtype) @ cols.conj()
        return (rows @ (turned * self.entries) @ cols.mT).real

    def _dense(self) -> Float[Tensor, "p p"]:
        basis = kron(self.row_basis, self.column_basis)
        return ((basis * self.entries.flatten()) @ basis.mH).real

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return |R|∘² e |C|∘²ᵀ."""
        return _squares(self.row_basis) @ self.entries @ _squares(self.column_basis).mT

    def trace(self) -> float:
        """Return Σ e_rc ‖R_r‖² ‖C_c‖²."""
        rows, cols = _squares(self.row_basis).sum(0), _squares(self.column_basis).sum(0)
        return float((rows @ self.entries @ cols).double())

    def frobenius_norm(self) -> float:
        """Return (eᵀ (|RᴴR|∘² ⊗ |CᴴC|∘²) e)^½."""
        rows = _squares(self.row_basis.mH @ self.row_basis)
        cols = _squares(self.column_basis.mH @ self.column_basis)
        square = (self.entries * (rows @ self.entries @ cols.mT)).sum(dtype=torch.float64)
        return float(square.clamp_min(0).sqrt())

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det(M + damping·I), from the bases where damping is 0.

        Raises
        ------
        NumericalError
            If the matrix is not positive definite.
        """
        damping = tikhonov(damping, self)
        if damping or not bool((self.entries > 0).all()):
            return super().logdet(damping)
        self._require_definite()
        return self._log_volume()

    def _log_volume(self) -> float:
        o, i = self.weight_shape
        rows, cols = (
            float(factorised("slogdet", basis, self).logabsdet)
            for basis in (self.row_basis, self.column_basis)
        )
        return float(self.entries.double().log().sum()) + 2 * (i * rows + o * cols)

    def inverse(self, damping: Damping) -> Operator:
        """Return (M + damping·I)⁻¹: the same form if damping is 0, else dense.

        Raises
        ------
        IndefiniteError
            If the damped matrix is not positive definite.
        """
        damping = tikhonov(damping, self)
        if damping:
            return self.formed.inverse(damping)
        self._require_definite()
        return self.inverted()

    def _require_definite(self) -> None:
        """Raise unless the matrix is positive definite, by bounds of its eigenvalues."""
        ends = self.entries.flatten().aminmax()
        values = torch.stack([ends.min, ends.max]).double()
        for basis in (self.row_basis, self.column_basis):
            sizes = factorised("svdvals", basis, self).double().square()
            values = values * torch.stack([sizes[-1], sizes[0]])
        require_positive(values.to(self.dtype), 0.0, self, sum(self.weight_shape))

    def inverted(self) -> "KroneckerCongruence":
        """Return M⁻¹ of what is positive definite as it was made.

        Raises
        ------
        IndefiniteError
            If an entry of the diagonal is not positive.
        """
        if not bool((self.entries > 0).all()):
            raise IndefiniteError(repr(self), 0.0, float(self.entries.min()))
        return replace(
            self,
            row_basis=_inverted(self.row_basis, self),
            column_basis=_inverted(self.column_basis, self),
            entries=self.entries.reciprocal(),
            provenance=self.provenance.inverted,
        )


def _inverted(basis: Tensor, what: object) -> Tensor:
    """Return R⁻ᴴ, computed in double precision."""
    double = torch.complex128 if basis.is_complex() else torch.float64
    inverse = factorised("inv", basis.to(double), what)
    return narrowed(inverse.mH.contiguous(), basis.dtype)


def _squares(basis: Tensor) -> Tensor:
    return basis.abs().square()


def factored_pair(
    terms: Sequence[Term], damping: Factored, what: str, made: Provenance
) -> KroneckerCongruence:
    """Diagonalise (G + …)⊗(A + …) + P⊗Q and treat 1 + s as the mode of damping says.

    With L Lᵀ the damped G and s, E the eigenvalues and vectors of L⁻¹ P L⁻ᵀ (and alike
    for A and Q), the sum is (R ⊗ C) diag(1 + s_P s_Qᵀ) (R ⊗ C)ᵀ, R = L E.

    Raises
    ------
    IndefiniteError
        If the damped leading factors are not positive definite.
    NumericalError
        If mode "raw" meets an indefinite sum, or P ⊗ Q is not symmetric.
    """
    (rows, cols), (more_rows, more_cols) = terms
    skew = _parity(more_rows, what)
    if skew != _parity(more_cols, what):
        raise NumericalError(_unsymmetric(what))
    damped_rows, damped_cols = damping.damped(rows, cols)
    row_values, row_basis = simultaneous(damped_rows, more_rows, skew, what)
    col_values, col_basis = simultaneous(damped_cols, more_cols, skew, what)
    second = torch.outer(row_values, col_values) * (-1 if skew else 1)
    entries = _positive(second, damping, what).to(rows.dtype)
    kind = rows.dtype.to_complex() if skew else rows.dtype
    row_basis, col_basis = narrowed(row_basis, kind), narrowed(col_basis, kind)
    return KroneckerCongruence(row_basis, col_basis, entries, made)


def simultaneous(
    first: Float[Tensor, "n n"], second: Float[Tensor, "n n"], skew: bool, what: str
) -> tuple[Float[Tensor, " n"], Inexact[Tensor, "n n"]]:
    """Return s and R with first = R Rᴴ and second = R diag(s) Rᴴ (i·second if skew)."""
    factor = damped_cholesky(first, 0.0, what)
    middle = torch.linalg.solve_triangular(factor, second.double(), upper=False)
    middle = torch.linalg.solve_triangular(factor, middle.mT, upper=False).mT
    hermitian = 1j * middle if skew else middle
    values, vectors = factorised("eigh", (hermitian + hermitian.mH) / 2, what)
    return values, factor.to(vectors.dtype) @ vectors


def inverse_pair(terms: Sequence[Term], damping: Factored) -> Term | None:
    """Return both inverses of one damped positive pair, or None for anything else."""
    return _made_of_pair(damped_inverse, terms, damping)


def triangle_pair(terms: Sequence[Term], damping: Factored) -> Term | None:
    """Return the Cholesky factors of one damped positive pair, or None as above."""
    return _made_of_pair(damped_triangle, terms, damping)


def _made_of_pair(
    make: Callable[[Tensor, float], Tensor], terms: Sequence[Term], damping: Factored
) -> Term | None:
    if len(terms) != 1:
        return None
    try:
        rows, cols = map(make, terms[0], damping.shifts(*terms[0]))
    except NumericalError:
        return None
    return rows, cols


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerCholesky(Operator):
    """(G ⊗ A)⁻¹ held as Cholesky factors: half as dear to make as the inverse itself.

    Parameters
    ----------
    triangles
        Lower L with L Lᵀ = G, (d_out, d_out), and with L Lᵀ = A, (d_in, d_in), each in
        the precision it needs.
    precision
        That of the products.

    Examples
    --------
    >>> triangles = 2 * torch.eye(2), torch.eye(3)
    >>> op = KroneckerCholesky(triangles, torch.float32)
    >>> op @ torch.ones(2, 3), op.trace()
    (tensor([[0.2500, 0.2500, 0.2500],
            [0.2500, 0.2500, 0.2500]]), 1.5)
    """

    triangles: Term = field(metadata=STAYS)
    precision: torch.dtype
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        rows, cols = self.triangles
        return len(rows), len(cols)

    @property
    def stored_numbers(self) -> int:
        """d_out(d_out+1)/2 + d_in(d_in+1)/2."""
        return sum(map(pair_count, self.weight_shape))

    @property
    def product_flops(self) -> int:
        """d_out·d_in·(d_out + d_in)."""
        o, i = self.weight_shape
        return o * i * (o + i)

    @cached_property
    def formed(self) -> Operator:
        """The product of the inverse factors, made at the first question that needs it."""
        from fisherlab.operators.kronecker import KroneckerSum

        rows, cols = (
            torch.cholesky_inverse(one).to(self.precision) for one in self.triangles
        )
        return KroneckerSum(((rows, cols),), self.weight_shape, self.provenance)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        rows, cols = self.triangles
        return solved(cols, solved(rows, w).mT).mT


def solved(triangle: Float[Tensor, "n n"], w: Float[Tensor, "*k n m"]) -> Tensor:
    """Return (L Lᵀ)⁻¹ w, in the precision of w."""
    return torch.cholesky_solve(w.to(triangle.dtype), triangle).to(w.dtype)


def _parity(factor: Tensor, what: str) -> bool:
    """Return whether a factor is skew; raise if it is neither skew nor symmetric."""
    size = SYMMETRY * float(factor.norm())
    if float((factor - factor.mT).norm()) <= size:
        return False
    if float((factor + factor.mT).norm()) <= size:
        return True
    raise NumericalError(_unsymmetric(what))


def _unsymmetric(what: str) -> str:
    return (
        f"{what} with a factored damping: its second pair of factors is neither symmetric "
        "nor skew (singular values tie), so no basis diagonalises the sum. Use "
        "Tikhonov(λ)."
    )


def _positive(second: Tensor, damping: Factored, what: str) -> Tensor:
    if damping.mode == "abs":
        return 1 + second.abs()
    entries = 1 + second
    if damping.mode == "clip":
        return entries.clamp_min(damping.floor)
    if not bool((entries > 0).all()):
        raise NumericalError(
            f"{what} with {damping!r} is not positive definite: relative to the leading "
            f"term its smallest eigenvalue is {float(entries.min()):.3g}. Increase λ, or "
            "use mode='clip' or Tikhonov(λ)."
        )
    return entries
