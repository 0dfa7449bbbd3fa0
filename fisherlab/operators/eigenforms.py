"""The eigenforms that methods make: what each holds, and the basis it means."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.held import Held
from fisherlab.numerics.linalg import eigh, factorised, require_finite
from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.bases import Beside, Modes
from fisherlab.operators.dampings import Damping
from fisherlab.operators.eigenform import Eigenform


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
