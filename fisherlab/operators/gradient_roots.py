"""What SOAP, KL-Shampoo and Muon divide by: matrices that grow from mean gradients."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import eigh, factorised
from fisherlab.operators.base import Provenance
from fisherlab.operators.derived import FromState
from fisherlab.operators.eigenforms import KroneckerEigen


class _OfGradient(FromState):
    """A matrix whose state takes up one mean gradient after the other."""

    gradient: Tensor

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.gradient.shape[0], self.gradient.shape[1]


@final
@dataclass(frozen=True, eq=False, repr=False)
class RotatedAdam(_OfGradient):
    r"""(Q_L ⊗ Q_R) diag(√v) (Q_L ⊗ Q_R)ᵀ: Adam in the eigenbasis of L and R.

    Parameters
    ----------
    gradient
        The newest mean gradient Ḡ.
    rows, cols
        Averages L of Ḡ Ḡᵀ and R of Ḡᵀ Ḡ.
    row_basis, column_basis
        Q_L and Q_R.
    squares
        v, the average of (Q_Lᵀ Ḡ Q_R)∘², each in the basis of its time.

    Examples
    --------
    >>> op = RotatedAdam.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> round(op.trace(), 4)
    7.0
    """

    gradient: Float[Tensor, "o i"]
    rows: Float[Tensor, "o o"]
    cols: Float[Tensor, "i i"]
    row_basis: Float[Tensor, "o o"]
    column_basis: Float[Tensor, "i i"]
    squares: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()

    @classmethod
    def of(cls, gradient: Tensor, made: Provenance = Provenance()) -> "RotatedAdam":
        """Return the matrix of one gradient."""
        rows, cols = gradient @ gradient.T, gradient.T @ gradient
        (_, left), (_, right) = (eigh(h, f"a factor of {made}") for h in (rows, cols))
        squares = (left.T @ gradient @ right).square()
        return cls(gradient, rows, cols, left, right, squares, made)

    @property
    def state(self) -> Sequence[Tensor]:
        """Both factors and the squares."""
        return self.rows, self.cols, self.squares

    def with_state(self, state: Sequence[Tensor]) -> "RotatedAdam":
        """Return the matrix of another state in the same basis."""
        rows, cols, squares = state
        return replace(self, rows=rows, cols=cols, squares=squares)

    def averaged(self, new: FromState, weight: float) -> "RotatedAdam":
        """Average the factors, turn the basis by a step of QR iteration, add the square."""
        assert isinstance(new, RotatedAdam)
        rows, cols = torch.lerp(new.rows, self.rows, weight), new.cols
        cols = torch.lerp(cols, self.cols, weight)
        left = factorised("qr", rows @ self.row_basis, repr(self)).Q
        right = factorised("qr", cols @ self.column_basis, repr(self)).Q
        fresh = (left.T @ new.gradient @ right).square()
        squares = torch.lerp(fresh, self.squares, weight)
        return RotatedAdam(new.gradient, rows, cols, left, right, squares, new.provenance)

    @cached_property
    def formed(self) -> KroneckerEigen:
        """The matrix in its basis."""
        bases = self.row_basis, self.column_basis
        return KroneckerEigen(*bases, self.squares.sqrt(), self.provenance)


@final
@dataclass(frozen=True, eq=False, repr=False)
class WhitenedRoot(_OfGradient):
    r"""(G ⊗ A)^½ for factors that average gradients whitened by each other: KL-Shampoo.

    .. math:: G \leftarrow ρ G + \frac{1 - ρ}{d_{in}} \big(\bar D A^{-1} \bar D^T +
              κ \,\mathrm{tr}(A^{-1}) I\big), \quad \text{A alike}

    Parameters
    ----------
    gradient
        The newest mean gradient.
    rows, cols
        G and A.
    ridge
        κ, absolute.

    Examples
    --------
    >>> eye = torch.eye(2)
    >>> WhitenedRoot(eye, 4 * eye, eye, 0.0).trace()
    8.0
    """

    gradient: Float[Tensor, "o i"]
    rows: Float[Tensor, "o o"]
    cols: Float[Tensor, "i i"]
    ridge: float
    provenance: Provenance = Provenance()

    @property
    def state(self) -> Sequence[Tensor]:
        """Both factors."""
        return self.rows, self.cols

    def with_state(self, state: Sequence[Tensor]) -> "WhitenedRoot":
        """Return the matrix of other factors."""
        return replace(self, rows=state[0], cols=state[1])

    def averaged(self, new: FromState, weight: float) -> "WhitenedRoot":
        """Average each factor with the new gradient whitened by the other, old one."""
        assert isinstance(new, WhitenedRoot)
        if not self.rows.any():  # no gradient yet
            return new
        fresh = (
            whitened(new.gradient, self.cols, new.ridge),
            whitened(new.gradient.T, self.rows, new.ridge),
        )
        pairs = zip(fresh, self.state, strict=True)
        return new.with_state([torch.lerp(b, a, weight) for b, a in pairs])

    @cached_property
    def formed(self) -> KroneckerEigen:
        """The root in the eigenbases of the factors."""
        g, left = eigh(self.rows, f"the row factor of {self!r}")
        a, right = eigh(self.cols, f"the column factor of {self!r}")
        entries = torch.outer(g.clamp_min(0).sqrt(), a.clamp_min(0).sqrt())
        return KroneckerEigen(left, right, entries, self.provenance)


def whitened(gradient: Tensor, other: Tensor, ridge: float) -> Tensor:
    """Return (D M⁻¹ Dᵀ + κ tr(M⁻¹) I) / d for D of d columns: KL-Shampoo's half-step."""
    inverse = factorised("inv", other.double(), "a factor of KL-Shampoo")
    wide = gradient.double()
    found = wide @ inverse @ wide.T
    found.diagonal().add_(ridge * float(inverse.trace()))
    return (found / len(other)).to(gradient.dtype)


@final
@dataclass(frozen=True, eq=False, repr=False)
class OneSidedRoot(_OfGradient):
    r"""(B Bᵀ)^½ ⊗ I, on the shorter side of B: what Muon divides by.

    For B = UΣVᵀ with more rows than columns I ⊗ (BᵀB)^½, which turns B into UVᵀ as well.

    Parameters
    ----------
    gradient
        B, an average of mean gradients, or their sum with momentum.

    Examples
    --------
    >>> B = torch.tensor([[0.0, 3.0, 0.0], [4.0, 0.0, 0.0]])
    >>> OneSidedRoot(B).solve(B, damping=0.0).round(decimals=4).tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """

    gradient: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()

    @property
    def state(self) -> Sequence[Tensor]:
        """B."""
        return (self.gradient,)

    def with_state(self, state: Sequence[Tensor]) -> "OneSidedRoot":
        """Return the root of another B."""
        return replace(self, gradient=state[0])

    @cached_property
    def formed(self) -> KroneckerEigen:
        """The root in the singular vectors of B, so that no small value is squared."""
        o, i = self.weight_shape
        tall = o > i
        wide = (self.gradient.T if tall else self.gradient).double()
        u, values, _ = factorised("svd", wide, repr(self), full_matrices=False)
        u = u.contiguous().to(self.gradient.dtype)  # LAPACK returns columns
        values = values.to(self.gradient.dtype)
        eye = torch.eye(max(o, i), dtype=u.dtype, device=u.device)
        ones = torch.ones_like(eye[0])
        if tall:
            return KroneckerEigen(eye, u, torch.outer(ones, values), self.provenance)
        return KroneckerEigen(u, eye, torch.outer(values, ones), self.provenance)
