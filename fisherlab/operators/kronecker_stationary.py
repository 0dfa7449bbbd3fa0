"""The inverse of a stationary chain in time, in closed form."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import IndefiniteError
from fisherlab.numerics.linalg import factorised
from fisherlab.operators.base import Operator, Provenance

Transition = tuple[Tensor, Tensor]  # X₀^½ and Ψ̂, square and of one size


@final
@dataclass(frozen=True, eq=False, repr=False)
class StationaryInverse(Operator):
    r"""The inverse of T Σ_d V_d over all lags d, the limit of long sequences.

    .. math:: \tfrac1T X^{-1/2} (I - P^T)(I - P P^T)^{-1}(I - P) X^{-1/2}, \quad
              P = \hatΨ_G \otimes \hatΨ_A, \; X = G_0 \otimes A_0

    Parameters
    ----------
    row_root, column_root
        G₀^-½ and A₀^-½.
    row_step, column_step
        Ψ̂_G and Ψ̂_A.
    length
        T.

    References
    ----------
    Martens, Ba & Johnson 2018, "Kronecker-factored curvature approximations for
    recurrent neural networks", option 2.
    """

    row_root: Float[Tensor, "o o"]
    column_root: Float[Tensor, "i i"]
    row_step: Float[Tensor, "o o"]
    column_step: Float[Tensor, "i i"]
    length: int
    provenance: Provenance = Provenance()

    @classmethod
    def of(
        cls, rows: Transition, cols: Transition, length: int, made: Provenance
    ) -> "StationaryInverse":
        """Invert a chain given the roots of its moments and its transitions.

        Raises
        ------
        IndefiniteError
            If a moment is singular, or neighbours are fully correlated in both factors.
        """
        what = f"the chain {made}"
        sizes = [float(factorised("svdvals", step, what)[0]) for _, step in (rows, cols)]
        smallest = min(float(factorised("eigvalsh", r, what)[0]) for r, _ in (rows, cols))
        if smallest <= 0 or sizes[0] * sizes[1] >= 1:
            raise IndefiniteError(what, 0.0, min(smallest, 0.0))
        inverses = [factorised("inv", root, what) for root, _ in (rows, cols)]
        return cls(inverses[0], inverses[1], rows[1], cols[1], length, made)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.row_root), len(self.column_root)

    @property
    def stored_numbers(self) -> int:
        """3/2 (d_out² + d_in²)."""
        return sum(n * (n + 1) // 2 + n * n for n in self.weight_shape)

    @property
    def product_flops(self) -> int:
        """Six Kronecker products."""
        o, i = self.weight_shape
        return 6 * o * i * (o + i)

    @cached_property
    def _correlations(self) -> tuple[Tensor, Tensor, Tensor]:
        """The eigenvectors of Ψ̂Ψ̂ᵀ on both sides and 1/(1 − μ_G μ_Aᵀ)."""
        (row_values, row_basis), (col_values, col_basis) = (
            factorised("eigh", step @ step.T, self)
            for step in (self.row_step, self.column_step)
        )
        return row_basis, col_basis, 1 / (1 - torch.outer(row_values, col_values))

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        row_basis, col_basis, scale = self._correlations
        z = self.row_root @ w @ self.column_root
        z = z - self.row_step @ z @ self.column_step.T
        z = row_basis @ ((row_basis.T @ z @ col_basis) * scale) @ col_basis.T
        z = z - self.row_step.T @ z @ self.column_step
        return self.row_root @ z @ self.column_root / self.length

    def _dense(self) -> Float[Tensor, "p p"]:
        step = torch.kron(self.row_step, self.column_step)
        root = torch.kron(self.row_root, self.column_root)
        eye = torch.eye(len(step), dtype=self.dtype, device=self.device)
        middle: Tensor = factorised("solve", eye - step @ step.T, self, eye - step)
        return root @ (eye - step.T) @ middle @ root / self.length
