"""One Kronecker product of second moments whose factors are never formed for a product."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import kron
from fisherlab.numerics.packed import second_moment
from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.kronecker import KroneckerSum


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerSamples(Operator):
    r"""(RᵀR) ⊗ (CᵀC) with the rows of R and C held instead of the factors.

    Products cost 2·(m_r + m_c)·d_out·d_in. Norms, spectra and inner products form the
    factors at the first question that needs them; products and solves never do.

    Parameters
    ----------
    row_samples
        R, shape (m_r, d_out).
    column_samples
        C, shape (m_c, d_in).

    Examples
    --------
    >>> op = KroneckerSamples(torch.ones(5, 2), torch.eye(3))
    >>> op.trace(), (op @ torch.ones(2, 3))[0, 0].item()
    (30.0, 10.0)
    """

    row_samples: Float[Tensor, "mr o"]
    column_samples: Float[Tensor, "mc i"]
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.row_samples.shape[1], self.column_samples.shape[1]

    @property
    def product_flops(self) -> int:
        """2·(m_r + m_c)·d_out·d_in."""
        o, i = self.weight_shape
        return 2 * (len(self.row_samples) + len(self.column_samples)) * o * i

    @cached_property
    def formed(self) -> KroneckerSum:
        """The product with its factors formed."""
        rows, cols = second_moment(self.row_samples), second_moment(self.column_samples)
        return KroneckerSum(((rows, cols),), self.weight_shape, self.provenance)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        rows, cols = self.row_samples, self.column_samples
        return (rows.T @ (rows @ w) @ cols.T) @ cols

    def _dense(self) -> Float[Tensor, "p p"]:
        rows = self.row_samples.T @ self.row_samples
        return kron(rows, self.column_samples.T @ self.column_samples)

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return diag(RᵀR) diag(CᵀC)ᵀ."""
        rows, cols = self.row_samples.square().sum(0), self.column_samples.square().sum(0)
        return torch.outer(rows, cols)

    def trace(self) -> float:
        """Return ‖R‖² ‖C‖²."""
        rows = self.row_samples.square().sum(dtype=torch.float64)
        return float(rows * self.column_samples.square().sum(dtype=torch.float64))
