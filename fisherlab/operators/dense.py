"""A matrix that is held whole, and its inverse through Cholesky."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import NumericalError
from fisherlab.numerics.devices import STAYS
from fisherlab.numerics.linalg import (
    damped_cholesky,
    factorised,
    require_finite,
    require_positive,
)
from fisherlab.numerics.packed import pair_count
from fisherlab.operators.base import Damping, Operator, Provenance, inner_product, tikhonov
from fisherlab.operators.eigenform import Eigenform

RESIDUAL = 1e-6  # relative residual above which a solve is reported as failed


@final
@dataclass(frozen=True, eq=False, repr=False)
class Dense(Operator):
    """A symmetric block with all its p² numbers.

    Parameters
    ----------
    matrix
        Shape (p, p), symmetric, rows in the order of ``vec(w)`` by rows.
    block_shape
        (d_out, d_in) with d_out·d_in = p.

    Examples
    --------
    >>> op = Dense(2 * torch.eye(6), (2, 3))
    >>> op.trace(), (op @ torch.ones(2, 3)).shape
    (12.0, torch.Size([2, 3]))
    """

    matrix: Float[Tensor, "p p"]
    block_shape: tuple[int, int]
    provenance: Provenance = Provenance()

    @property
    def stored_numbers(self) -> int:
        """p(p+1)/2, the free numbers of a symmetric block."""
        return pair_count(self.shape[0])

    @property
    def product_flops(self) -> int:
        """p²."""
        return self.shape[0] ** 2

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        return (w.flatten(1) @ self.matrix).view(w.shape)

    def _dense(self) -> Float[Tensor, "p p"]:
        return self.matrix

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonal."""
        return self.matrix.diagonal().reshape(self.block_shape)

    def trace(self) -> float:
        """Return the trace."""
        return float(self.matrix.diagonal().sum(dtype=torch.float64))

    def frobenius_norm(self) -> float:
        """Return √ΣM²."""
        return float(torch.linalg.vector_norm(self.matrix, dtype=torch.float64))

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return all eigenvalues, descending."""
        require_finite(self.matrix, self)
        values = factorised("eigvalsh", self.matrix.double(), self).flip(0)
        return values.to(self.dtype)

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det(M + damping·I) by Cholesky in float64.

        Raises
        ------
        IndefiniteError
            If M + damping·I is not positive definite.
        """
        return -self.inverse(damping)._log_volume()

    def _solve(self, w: Float[Tensor, "k o i"], damping: Damping) -> Float[Tensor, "k o i"]:
        """Solve by Cholesky in float64, refine once and check the residual."""
        damping = tikhonov(damping, self)
        return refined_solve(self, self.inverse(damping), w, damping)

    def inverse(self, damping: Damping) -> "CholeskyInverse":
        """Return (M + damping·I)⁻¹, held as a Cholesky factor."""
        damping = tikhonov(damping, self)
        if not damping:
            require_positive(self.eigenvalues(), damping, self)
        factor = damped_cholesky(self.matrix, damping, self)
        made = self.provenance.by(f"inverse of {self.provenance.method or 'Dense'}")
        return CholeskyInverse(factor, self.block_shape, self.dtype, made)


@final
@dataclass(frozen=True, eq=False, repr=False)
class CholeskyInverse(Operator):
    """The inverse of a positive definite block, held as its float64 Cholesky factor."""

    factor: Float[Tensor, "p p"] = field(metadata=STAYS)
    block_shape: tuple[int, int]
    precision: torch.dtype
    provenance: Provenance = Provenance()

    @property
    def stored_numbers(self) -> int:
        """p(p+1)/2."""
        return pair_count(self.shape[0])

    @property
    def product_flops(self) -> int:
        """p²: two triangular solves."""
        return self.shape[0] ** 2

    @cached_property
    def formed(self) -> Dense:
        """The inverse as a dense block, formed at the first question that needs it."""
        matrix = torch.cholesky_inverse(self.factor).to(self.precision)
        return Dense(matrix, self.block_shape, self.provenance)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        solved = torch.cholesky_solve(w.flatten(1).T.double(), self.factor)
        return solved.T.to(w.dtype).reshape(w.shape)

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det(M + damping·I), from the factor where damping is 0."""
        damping = tikhonov(damping, self)
        if damping:
            return self.formed.logdet(damping)
        return self._log_volume()

    def _log_volume(self) -> float:
        return -2 * float(self.factor.diagonal().log().sum())


def refined_solve(
    operator: Operator, inverse: Operator, w: Tensor, damping: float
) -> Tensor:
    """Return inverse @ w after one step of iterative refinement, residual checked.

    Raises
    ------
    NumericalError
        If ‖(M + damping·I) x − w‖ > 1e-6 ‖w‖ (1e-3 in float32) for one of the weights.
    """
    x = inverse @ w
    rest = w - (operator @ x) - damping * x
    x = x + inverse @ rest
    rest = w - (operator @ x) - damping * x
    size = torch.linalg.vector_norm(w, dim=(-2, -1))
    residual = torch.linalg.vector_norm(rest, dim=(-2, -1))
    limit = RESIDUAL if w.dtype == torch.float64 else 1e3 * RESIDUAL
    if not bool((residual <= limit * size).all()):
        worst = float((residual / size.clamp_min(1e-300)).max())
        raise NumericalError(
            f"solve with {operator!r}: damping {damping:g} leaves a relative residual "
            f"of {worst:.2g}; the matrix is numerically singular. Increase the damping."
        )
    return x


@inner_product(Dense, Dense)
def _dense_dense(a: Dense, b: Dense) -> float:
    return float((a.matrix * b.matrix).sum(dtype=torch.float64))


@inner_product(Dense, Eigenform)
def _dense_eigenform(a: Dense, b: Eigenform) -> float:
    """Turn the columns row by row, then the rows: 2·p²·(d_out + d_in) flops."""
    rows, cols = b.basis.pair or (None, None)
    if rows is None or cols is None:
        return b.inner_by_vectors(a)
    o, i = a.weight_shape
    mixed = torch.stack(  # mixed[o, o', c] = Σ_ij V_ic M[o,i,o',j] V_jc
        [
            (panel.reshape(i * o, i) @ cols).view(i, o, -1).mul_(cols[:, None, :]).sum(0)
            for panel in a.matrix.view(o, i, o * i)
        ]
    )
    turned = torch.einsum("ar,abc,br->rc", rows, mixed, rows).flatten()
    outside = b.rest * a.trace() if b.rest else 0.0
    return outside + float((turned * b._inside).sum(dtype=torch.float64))
