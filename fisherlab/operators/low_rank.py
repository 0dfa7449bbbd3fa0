"""A multiple of the identity plus a matrix of low rank."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import eigh, factorised, require_finite, require_positive
from fisherlab.operators.base import Operator, Provenance, inner_product
from fisherlab.operators.dampings import Damping, tikhonov


@final
@dataclass(frozen=True, eq=False, repr=False)
class LowRank(Operator):
    r"""shift·I + :math:`\sum_k e_k\, vec(U_k) vec(U_k)^T` with orthonormal U_k.

    Parameters
    ----------
    vectors
        U, shape (r, d_out, d_in), orthonormal.
    values
        e, shape (r,).
    shift
        The eigenvalue outside the span.
    rank
        How many vectors a moving average may keep; r if None.

    Examples
    --------
    >>> op = LowRank.of_rows(2 * torch.eye(2)[None], rank=1)
    >>> round(op.trace(), 4), round(op.inverse(1.0).trace(), 4)
    (8.0, 3.1111)
    """

    vectors: Float[Tensor, "r o i"]
    values: Float[Tensor, " r"]
    shift: float = 0.0
    rank: int | None = None
    provenance: Provenance = Provenance()

    @classmethod
    def of_rows(
        cls,
        rows: Float[Tensor, "m o i"],
        rank: int | None = None,
        provenance: Provenance = Provenance(),
    ) -> "LowRank":
        """Return the best approximation of Σ vec(rows) vec(rows)ᵀ of at most a rank.

        Costs 2·p·m² multiply-adds: a thin QR and an eigenvalue problem of size m, in
        float64. Directions below the rounding of the largest are left out.
        """
        m, o, i = rows.shape
        flat = rows.double().flatten(1).T
        require_finite(flat, f"the rows of {provenance}")
        basis, mixing = factorised("qr", flat, provenance)
        values, turn = eigh(mixing @ mixing.T, f"the Gram matrix of {provenance}")
        size = len(values)
        kept = min(size, size if rank is None else rank)
        floor = size * torch.finfo(rows.dtype).eps * float(values.max()) if size else 0.0
        order = torch.arange(size - 1, size - 1 - kept, -1, device=rows.device)
        order = order[values[order] > floor]
        vectors = (basis @ turn[:, order]).T.reshape(len(order), o, i)
        return cls(
            vectors.to(rows.dtype),
            values[order].to(rows.dtype),
            rank=m if rank is None else rank,
            provenance=provenance,
        )

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.vectors.shape[1], self.vectors.shape[2]

    @property
    def product_flops(self) -> int:
        """2·r·p."""
        return 2 * self.vectors.numel()

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        basis = self.vectors.flatten(1)
        inside = (w.flatten(1) @ basis.T) * self.values
        return (inside @ basis).reshape(w.shape) + self.shift * w

    def _dense(self) -> Float[Tensor, "p p"]:
        basis = self.vectors.flatten(1)
        eye = torch.eye(basis.shape[1], dtype=self.dtype, device=self.device)
        return torch.einsum("kp,k,kq->pq", basis, self.values, basis) + self.shift * eye

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return shift + Σ e U∘U."""
        return torch.einsum("k,koi->oi", self.values, self.vectors.square()) + self.shift

    def trace(self) -> float:
        """Return p·shift + Σ e."""
        return self.shape[0] * self.shift + float(self.values.sum(dtype=torch.float64))

    def frobenius_norm(self) -> float:
        """Return (Σ (e + shift)² + (p − r) shift²)^½."""
        inside = float((self.values.double() + self.shift).square().sum())
        rest = self.shape[0] - len(self.values)
        return (inside + rest * self.shift**2) ** 0.5

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return e + shift, and shift for the rest, descending."""
        rest = self.values.new_zeros(self.shape[0] - len(self.values))
        return (torch.cat([self.values, rest]) + self.shift).sort(descending=True).values

    def inverse(self, damping: Damping) -> "LowRank":
        """Return (M + damping·I)⁻¹, of the same form.

        Raises
        ------
        IndefiniteError
            If an eigenvalue plus the damping is not positive.
        """
        damping = tikhonov(damping, self)
        shift, whole = self.shift + damping, len(self.values) == self.shape[0]
        damped = self.values + shift
        require_positive(self.eigenvalues(), damping, repr(self))
        outside = 0.0 if whole else 1 / shift
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        return LowRank(
            self.vectors, damped.reciprocal() - outside, outside, self.rank, made
        )

    def rows(self) -> Float[Tensor, "r o i"]:
        """Return √e_k U_k, whose outer products add up to the matrix without its shift."""
        return self.values.clamp_min(0).sqrt()[:, None, None] * self.vectors


@inner_product(LowRank, Operator)
def _low_rank_any(a: LowRank, b: Operator) -> float:
    forms = b.quadratic_form(a.vectors).double() * a.values.double()
    return a.shift * (b.trace() if a.shift else 0.0) + float(forms.sum())
