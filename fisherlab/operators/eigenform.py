r"""Matrices that are diagonal in an orthonormal basis, whatever the basis is made of.

.. math:: M = r I + \sum_j (v_j - r)\, u_j u_j^T

with orthonormal u_j and r the eigenvalue outside of their span. A basis is never formed as
a p × p matrix: it turns weights into coefficients and back.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import IndefiniteError
from fisherlab.numerics.devices import Held
from fisherlab.numerics.linalg import eigh, factorised, require_finite, require_positive
from fisherlab.operators.base import (
    PANEL_BYTES,
    Damping,
    Operator,
    Provenance,
    inner_product,
    tikhonov,
)
from fisherlab.operators.bases import (  # noqa: F401 - older checkpoints name them here
    Basis,
    Beside,
    Modes,
    Turned,
)

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
        first, *rest = (table.flatten() for table in self.tables)
        return torch.cat([first, *rest]) if rest else first  # no copy of one

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
        made = self.provenance.inverted
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
    if exponent < 0:
        require_positive(values, damping, what, size)
        shifted = values + damping
        return shifted.reciprocal_() if exponent == -1 else shifted.pow_(exponent)
    shifted = values + damping
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


class InBasis(Operator):
    """A matrix that is held as the parts of an eigenform, which answers for it."""

    @property
    @abstractmethod
    def formed(self) -> Eigenform:
        """The eigenform."""

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.formed.block_shape

    def power(self, exponent: float, damping: Damping) -> Eigenform:
        """Return (M + damping·I)^exponent.

        Raises
        ------
        IndefiniteError
            If the power does not exist.
        """
        return self.formed.power(exponent, damping)

    def sqrt(self, damping: Damping = 0.0) -> Eigenform:
        """Return (M + damping·I)^½; errors are those of `power`."""
        return self.formed.power(0.5, damping)

    def inverse_sqrt(self, damping: Damping) -> Eigenform:
        """Return (M + damping·I)^-½; errors are those of `power`."""
        return self.formed.power(-0.5, damping)


def _pair(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], shape[1]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(InBasis):
    """A diagonal matrix over a weight, stored in the weight's shape.

    Examples
    --------
    >>> op = Diagonal(torch.ones(2, 3))
    >>> op.solve(torch.ones(2, 3), damping=1.0)[0, 0].item()
    0.5
    """

    entries: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()

    @cached_property
    def formed(self) -> Eigenform:
        """The entries are the eigenvalues, each alone."""
        shape = _pair(self.entries.shape)
        values = self.entries.reshape(-1, 1)
        return Eigenform(
            Modes((None, None), shape, shape), (values,), shape, 0.0, self.provenance
        )


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerEigen(InBasis):
    """(U ⊗ V) diag(s) (U ⊗ V)ᵀ: EKFAC, and one Kronecker product after any function.

    Parameters
    ----------
    row_basis
        U, orthonormal columns, shape (d_out, r), r = d_out unless s is zero outside.
    column_basis
        V, orthonormal columns, shape (d_in, c).
    entries
        s, the eigenvalues, shape (r, c).

    Examples
    --------
    >>> op = KroneckerEigen(torch.eye(2), torch.eye(3), torch.ones(2, 3))
    >>> op.inverse(damping=1.0).trace()
    3.0
    """

    row_basis: Float[Tensor, "o r"]
    column_basis: Float[Tensor, "i c"]
    entries: Float[Tensor, "r c"]
    provenance: Provenance = Provenance()

    @property
    def stored_numbers(self) -> int:
        """d_out² + d_in² + d_out·d_in, whatever the rank of the samples."""
        o, i = self.weight_shape
        return o * o + i * i + o * i

    @cached_property
    def formed(self) -> Eigenform:
        """The eigenform."""
        bases = self.row_basis, self.column_basis
        shape = len(self.row_basis), len(self.column_basis)
        values, size = self.entries.reshape(1, -1), sum(shape)  # two factors are rounded
        basis = Modes(bases, shape, shape)
        return Eigenform(basis, (values,), shape, 0.0, self.provenance, size)


@final
@dataclass(frozen=True, eq=False, repr=False)
class RowwiseEigen(InBasis):
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

    @cached_property
    def formed(self) -> Eigenform:
        """The eigenform, a matrix a row."""
        shape = _pair(self.entries.shape)
        basis = Modes((None, self.column_basis), shape, shape)
        return Eigenform(basis, (self.entries,), shape, 0.0, self.provenance)


@final
@dataclass(frozen=True, eq=False)
class TensorPiece(Held):
    """Columns start:stop of a weight, read as a tensor, with an eigenform over its modes.

    Parameters
    ----------
    start, stop
        The columns.
    bases
        One orthogonal matrix U_j a mode.
    values
        The eigenvalues, in the shape of the tensor.
    """

    start: int
    stop: int
    bases: Sequence[Tensor]
    values: Tensor


@final
@dataclass(frozen=True, eq=False, repr=False)
class TensorEigen(InBasis):
    r"""Block-diagonal over pieces of a weight, each :math:`(⊗_j U_j) diag(e) (⊗_j U_j)^T`.

    A piece is a run of columns read as a tensor: a fully connected weight has two modes,
    a convolution three (output, input, kernel), a vector one.

    Parameters
    ----------
    block_shape
        (d_out, d_in).
    pieces
        They cover every column once.
    floored
        Whether a positive number was added in every mode. Then no eigenvalue is zero, and
        only the rounding of products is left, which grows as the root of their length.

    Examples
    --------
    >>> piece = TensorPiece(0, 3, (torch.eye(2), torch.eye(3)), torch.ones(2, 3))
    >>> TensorEigen((2, 3), (piece,)).trace()
    6.0
    """

    block_shape: tuple[int, int]
    pieces: Sequence[TensorPiece]
    provenance: Provenance = Provenance()
    floored: bool = False

    @cached_property
    def formed(self) -> Eigenform:
        """The eigenform; rounding of products of modes is that of the longest mode."""
        widths = tuple(piece.stop - piece.start for piece in self.pieces)
        modes = tuple(
            Modes(
                tuple(piece.bases), tuple(piece.values.shape), (self.block_shape[0], width)
            )
            for piece, width in zip(self.pieces, widths, strict=True)
        )
        counts = tuple(piece.values.numel() for piece in self.pieces)
        basis = modes[0] if len(modes) == 1 else Beside(modes, widths, counts, 1)
        tables = tuple(piece.values.reshape(1, -1) for piece in self.pieces)
        longest = max(max(piece.values.shape) for piece in self.pieces)
        size = math.isqrt(longest) if self.floored else longest
        return Eigenform(basis, tables, self.block_shape, 0.0, self.provenance, size)


@final
@dataclass(frozen=True, eq=False, repr=False)
class LowRank(InBasis):
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

    @cached_property
    def formed(self) -> Eigenform:
        """The eigenform: one mode, all of the weight."""
        shape = _pair(self.vectors.shape[1:])
        basis = Modes((self.vectors.flatten(1).T,), (shape[0] * shape[1],), shape)
        values = self.values[None] + self.shift
        return Eigenform(basis, (values,), shape, self.shift, self.provenance)

    def rows(self) -> Float[Tensor, "r o i"]:
        """Return √e_k U_k, whose outer products add up to the matrix without its shift."""
        return self.values.clamp_min(0).sqrt()[:, None, None] * self.vectors


@final
@dataclass(frozen=True, eq=False, repr=False)
class KroneckerLowRank(InBasis):
    """shift·I + (U ⊗ V) diag(e) (U ⊗ V)ᵀ with thin orthonormal U and V.

    Parameters
    ----------
    row_basis, column_basis
        U (d_out, r) and V (d_in, c) with orthonormal columns.
    entries
        e, shape (r, c).
    shift
        The eigenvalue outside the span.
    row_values
        The eigenvalues of the row factor alone, where e is a product of two factors'.
    moments
        The factors that were cut to U and V, where they are kept for a refresh.
    steps
        Updates that led here.

    Examples
    --------
    >>> op = KroneckerLowRank(torch.eye(3)[:, :1], torch.eye(4)[:, :2], torch.ones(1, 2))
    >>> op.trace(), op.inverse(1.0).trace()
    (2.0, 11.0)
    """

    row_basis: Float[Tensor, "o r"]
    column_basis: Float[Tensor, "i c"]
    entries: Float[Tensor, "r c"]
    shift: float = 0.0
    row_values: Float[Tensor, " r"] | None = None
    provenance: Provenance = Provenance()
    moments: tuple[Float[Tensor, "o o"], Float[Tensor, "i i"]] | None = None
    steps: int = 0

    @property
    def stored_numbers(self) -> int:
        """d_out·r + d_in·c + r·c, and the moments where they are kept."""
        held = (self.row_basis, self.column_basis, self.entries, *(self.moments or ()))
        return sum(tensor.numel() for tensor in held)

    @cached_property
    def formed(self) -> Eigenform:
        """The eigenform."""
        shape, bases = (
            (len(self.row_basis), len(self.column_basis)),
            (self.row_basis, self.column_basis),
        )
        values = self.entries.reshape(1, -1) + self.shift
        return Eigenform(
            Modes(bases, shape, shape), (values,), shape, self.shift, self.provenance
        )
