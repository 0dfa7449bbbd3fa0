r"""Matrices that are diagonal in an orthonormal basis, whatever the basis is made of.

.. math:: M = r I + \sum_j (v_j - r)\, u_j u_j^T

with orthonormal u_j and r the eigenvalue outside of their span. A basis is never formed as
a p × p matrix: it turns weights into coefficients and back.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import IndefiniteError
from fisherlab.numerics.linalg import eigh, require_finite, require_positive
from fisherlab.operators.base import PANEL_BYTES, Operator, Provenance, inner_product
from fisherlab.operators.bases import (  # noqa: F401 - older checkpoints name them here
    Basis,
    Beside,
    Modes,
    Turned,
)
from fisherlab.operators.dampings import Damping, tikhonov

LOST = 1e-3  # relative rounding of an inverse above which it is not known


@final
@dataclass(frozen=True, eq=False, repr=False)
class Eigenform(Operator):
    """rest·I + Σ_j (v_j − rest) u_j u_jᵀ: eigenvalues in an orthonormal basis.

    Every function of the matrix is the function of its eigenvalues, in the same basis.

    Parameters
    ----------
    basis
        The u_j.
    tables
        Their eigenvalues v_j, in order; a row of a table belongs to one matrix that stands
        alone.
    block_shape
        (d_out, d_in).
    rest
        The eigenvalue outside of the span.
    size
        How many rows a table's rounding is that of, where it is not its length, as for
        `require_positive`.

    Examples
    --------
    >>> basis = Modes((None, torch.eye(3)), (2, 3), (2, 3))
    >>> op = Eigenform(basis, (torch.ones(2, 3),), (2, 3))
    >>> op.trace(), op.inverse(1.0).trace()
    (6.0, 3.0)
    """

    basis: Basis
    tables: tuple[Float[Tensor, "_ _"], ...]
    block_shape: tuple[int, int]
    rest: float = 0.0
    provenance: Provenance = Provenance()
    size: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.tables[0].dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.tables[0].device

    @cached_property
    def values(self) -> Float[Tensor, " r"]:
        """The v_j in the order of the vectors."""
        return torch.cat([table.flatten() for table in self.tables])

    @cached_property
    def rows(self) -> int:
        """P."""
        return self.shape[0]

    @cached_property
    def free(self) -> int:
        """How many eigenvalues equal `rest`: p − r."""
        return self.rows - len(self.values)

    @property
    def _rounded_rows(self) -> int | None:
        return self.size

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue."""
        known = [float(self.values.min())] if len(self.values) else []
        return min([*known, self.rest] if self.free else known)

    @property
    def largest(self) -> float:
        """The largest eigenvalue, or 0."""
        known = [float(self.values.max())] if len(self.values) else []
        return max(0.0, self.rest, *known)

    def resolves(self, damping: float) -> bool:
        """Whether M + λI is positive, and float64 leaves its inverse three digits."""
        eps, low = torch.finfo(torch.float64).eps, self.smallest + damping
        return low > 0 and eps * (self.largest + damping) <= LOST * low

    @property
    def product_flops(self) -> int:
        """Those of two rotations, or p."""
        return 2 * self.basis.flops or len(self.values)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        found = self.basis.combine(self.basis.rotate(w) * self._inside)
        return found + self.rest * w if self.rest else found

    @cached_property
    def _inside(self) -> Float[Tensor, " r"]:
        """What the vectors add to the rest, v_j − rest."""
        return self.values - self.rest if self.rest else self.values

    def _dense(self) -> Float[Tensor, "p p"]:
        out = self.basis.dense(self._inside)
        return (
            out + self.rest * torch.eye(len(out), dtype=out.dtype, device=out.device)
            if self.rest
            else out
        )

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return rest + Σ (v_j − rest) u_j∘u_j."""
        return self.basis.diagonal(self._inside) + self.rest

    def trace(self) -> float:
        """Return Σ v."""
        return float(self.values.sum(dtype=torch.float64)) + self.free * self.rest

    def frobenius_norm(self) -> float:
        """Return ‖v‖."""
        inside = float(torch.linalg.vector_norm(self.values, dtype=torch.float64))
        return (inside**2 + self.free * self.rest**2) ** 0.5 if self.rest else inside

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return v, and the rest, descending."""
        rest = self.values.new_full((self.free,), self.rest)
        return torch.cat([self.values, rest]).sort(descending=True).values

    def _spectra(self) -> Iterator[Float[Tensor, "_ _"]]:
        rest = self.values.new_full((1, self.free), self.rest)
        yield from (torch.cat([t, rest], 1) if self.free else t for t in self.tables)

    def inverse(self, damping: Damping) -> "Eigenform":
        """Return (M + damping·I)⁻¹, in the same basis.

        Raises
        ------
        IndefiniteError
            If an eigenvalue plus the damping is not positive.
        ValueError
            For a factored damping.
        """
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        return replace(self.power(-1.0, damping), provenance=made)

    def power(self, exponent: float, damping: Damping) -> "Eigenform":
        """Return (M + damping·I)^exponent.

        Raises
        ------
        IndefiniteError
            If the power does not exist.
        """
        shift = tikhonov(damping, self)
        tables = []
        for table, known in zip(self.tables, self._spectra(), strict=True):
            whole = powers(known, exponent, shift, self, self.size)
            tables.append(whole[:, : table.shape[1]])
        rest = max(self.rest + shift, 0.0) ** exponent if self.free else 0.0
        made = self.provenance.by(f"{self.provenance.method}^{exponent:g}")
        return replace(self, tables=tuple(tables), rest=rest, provenance=made)

    def sqrt(self, damping: Damping = 0.0) -> "Eigenform":
        """Return (M + damping·I)^½; errors are those of `power`."""
        return self.power(0.5, damping)

    def inverse_sqrt(self, damping: Damping) -> "Eigenform":
        """Return (M + damping·I)^-½; errors are those of `power`."""
        return self.power(-0.5, damping)

    def rotate(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k r"]:
        """Return the coefficients ⟨u_j, w⟩."""
        return self.basis.rotate(w)

    def combine(self, c: Float[Tensor, "k r"]) -> Float[Tensor, "k o i"]:
        """Return Σ_j c_j u_j."""
        return self.basis.combine(c)

    def vectors(self, index: Tensor) -> Float[Tensor, "k o i"]:
        """Return some eigenvectors, each in the shape of the weight."""
        picks = self.values.new_zeros(len(index), len(self.values))
        picks[torch.arange(len(index), device=index.device), index] = 1.0
        return self.combine(picks)

    def panels(self) -> list[Tensor]:
        """Cut the eigenvectors into runs whose vectors fit the workspace."""
        size = max(1, PANEL_BYTES // (8 * max(self.rows, len(self.values), 1)))
        return list(torch.arange(len(self.values), device=self.device).split(size))

    def inner_by_vectors(self, other: Operator) -> float:
        """Return ⟨self, other⟩ from products of the other with the eigenvectors."""
        total = self.rest * other.trace() if self.rest else 0.0
        if self.basis.is_identity:
            diagonal = other.diagonal().flatten().double()
            return total + float(self._inside.flatten().double() @ diagonal)
        for panel in self.panels():
            forms = other.quadratic_form(self.vectors(panel)).double()
            total += float(forms @ self._inside[panel].double())
        return total

    def eigenform(self) -> "Eigenform":
        """Return the matrix itself."""
        return self


def powers(
    values: Tensor, exponent: float, damping: float, what: object, size: int | None = None
) -> Tensor:
    """Return (values + damping)^exponent; rounding below zero counts as zero for roots.

    The last axis of the values belongs to one matrix, whose rounding is that of `size`
    rows.

    Raises
    ------
    IndefiniteError
        If a negative value is met, or under a negative exponent what may be zero.
    """
    shifted = values + damping
    if exponent < 0:
        require_positive(values, damping, what, size)
        return shifted.reciprocal() if exponent == -1 else shifted.pow(exponent)
    rounding = 1e2 * torch.finfo(values.dtype).eps * float(values.abs().max())
    if not bool((shifted >= -rounding).all()):
        require_finite(shifted, f"{what} with damping {damping:g}")
        raise IndefiniteError(what, damping, float(values.min()))
    return shifted.clamp_min(0).pow(exponent)


def quadratic_forms(
    matrix: Float[Tensor, "n n"], basis: Float[Tensor, "n r"] | None
) -> Float[Tensor, " r"]:
    """Return uᵀ M u for every column of a basis, the identity if None."""
    return matrix.diagonal() if basis is None else ((matrix @ basis) * basis).sum(0)


def of_matrix(matrix: Float[Tensor, "p p"], shape: tuple[int, int], what: str) -> Eigenform:
    """Return the eigenform of a dense matrix, p³ flops.

    Raises
    ------
    NumericalError
        If it holds NaN or infinity.
    """
    values, vectors = eigh(matrix, what)
    return Eigenform(Modes((vectors,), (len(vectors),), shape), (values[None],), shape)


@inner_product(Eigenform, Operator)
def _eigenform_any(a: Eigenform, b: Operator) -> float:
    """Return ⟨a, b⟩ in the basis of a, by closed forms where both bases are known."""
    if b._stands:
        return a.inner(b.formed)
    if a.basis.is_identity:
        forms = b.diagonal().flatten()
        return float((a.values * forms).sum(dtype=torch.float64))
    outside = a.rest * b.trace() if a.rest else 0.0
    if isinstance(b, Eigenform):
        if b.basis.is_identity or len(b.values) < len(a.values):
            return _eigenform_any(b, a)
        shared = a.basis.overlap(b.basis, b._inside)
        if shared is not None:
            forms = shared + b.rest
            return outside + float((a._inside * forms).sum(dtype=torch.float64))
    return a.inner_by_vectors(b)
