"""Eigenforms whose bases are products over the modes of a tensor."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.held import Held
from fisherlab.numerics.linalg import require_positive
from fisherlab.operators.base import Operator, Provenance, inner_product
from fisherlab.operators.dampings import Damping, tikhonov
from fisherlab.operators.partition import positions


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

    def turned(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Return tensors (n, *shape) in the eigenbasis, or back from it."""
        for mode, basis in enumerate(self.bases):
            x = x.movedim(mode + 1, -1) @ (basis.T if transposed else basis)
            x = x.movedim(-1, mode + 1)
        return x

    def product(self, columns: Tensor) -> Tensor:
        """Return the products with columns (n, d_out, stop − start)."""
        x = columns.reshape(len(columns), *self.values.shape)
        return self.turned(self.turned(x) * self.values, True).reshape(columns.shape)


@final
@dataclass(frozen=True, eq=False, repr=False)
class TensorEigen(Operator):
    r"""Block-diagonal over pieces of a weight, each :math:`(⊗_j U_j) diag(e) (⊗_j U_j)^T`.

    A piece is a run of columns read as a tensor: a fully connected weight has two modes,
    a convolution three (output, input, kernel), a vector one.

    Parameters
    ----------
    block_shape
        (d_out, d_in).
    pieces
        They cover every column once.

    Examples
    --------
    >>> piece = TensorPiece(0, 3, (torch.eye(2), torch.eye(3)), torch.ones(2, 3))
    >>> TensorEigen((2, 3), (piece,)).trace()
    6.0
    """

    block_shape: tuple[int, int]
    pieces: Sequence[TensorPiece]
    provenance: Provenance = Provenance()

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.block_shape

    @property
    def product_flops(self) -> int:
        """Σ over pieces of 2·p·Σ_j d_j."""
        return sum(
            2 * piece.values.numel() * sum(len(basis) for basis in piece.bases)
            for piece in self.pieces
        )

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        parts = [piece.product(w[:, :, piece.start : piece.stop]) for piece in self.pieces]
        return torch.cat(parts, -1)

    def _dense(self) -> Float[Tensor, "p p"]:
        p = self.shape[0]
        out = torch.zeros(p, p, dtype=self.dtype, device=self.device)
        for piece in self.pieces:
            at = positions(self.block_shape)[:, piece.start : piece.stop].flatten()
            basis = reduce(torch.kron, piece.bases)
            block = (basis * piece.values.flatten()) @ basis.T
            out[at[:, None].to(out.device), at.to(out.device)] = block
        return out

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonal."""
        parts = []
        for piece in self.pieces:
            squared = replace(piece, bases=[basis.square() for basis in piece.bases])
            entries = squared.turned(piece.values[None], True)
            parts.append(entries.reshape(self.block_shape[0], piece.stop - piece.start))
        return torch.cat(parts, -1)

    def trace(self) -> float:
        """Return Σ e."""
        return sum(float(p.values.sum(dtype=torch.float64)) for p in self.pieces)

    def frobenius_norm(self) -> float:
        """Return √Σ e²."""
        norms = [float(p.values.double().square().sum()) for p in self.pieces]
        return sum(norms) ** 0.5

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return e, descending."""
        values = torch.cat([piece.values.flatten() for piece in self.pieces])
        return values.sort(descending=True).values

    def inverse(self, damping: Damping) -> "TensorEigen":
        """Return (M + damping·I)⁻¹, in the same bases.

        Raises
        ------
        IndefiniteError
            If an eigenvalue plus the damping is not positive.
        """
        damping = tikhonov(damping, self)
        pieces = []
        for piece in self.pieces:
            damped = piece.values + damping
            # Products of damped modes: rounding is that of the longest mode.
            values, size = piece.values.flatten(), max(piece.values.shape)
            require_positive(values, damping, repr(self), size)
            pieces.append(replace(piece, values=damped.reciprocal()))
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        return replace(self, pieces=tuple(pieces), provenance=made)


@inner_product(TensorEigen, TensorEigen)
def _eigen_eigen(a: TensorEigen, b: TensorEigen) -> float:
    """Return ⟨a, b⟩ = Σ e_a f_b (⊗ (U_aᵀU_b)∘²) where the tensors are the same."""
    layout = [(p.start, p.stop, p.values.shape) for p in a.pieces]
    if layout != [(p.start, p.stop, p.values.shape) for p in b.pieces]:
        return float((a.to_dense() * b.to_dense()).sum(dtype=torch.float64))
    total = 0.0
    for left, right in zip(a.pieces, b.pieces, strict=True):
        pairs = zip(left.bases, right.bases, strict=True)
        overlap = [(u.T @ v).square() for u, v in pairs]
        moved = replace(left, bases=overlap).turned(left.values[None])[0]
        total += float((moved * right.values).sum(dtype=torch.float64))
    return total
