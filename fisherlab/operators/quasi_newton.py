"""Matrices known by the factors of their inverse, which updates of online methods move."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.devices import Held
from fisherlab.numerics.linalg import factorised
from fisherlab.operators.base import Damping, Operator, Provenance, tikhonov
from fisherlab.operators.kronecker import KroneckerSum

Pair = tuple[Tensor, Tensor]


def bfgs(inverse: Float[Tensor, "n n"], s: Tensor, y: Tensor) -> Float[Tensor, "n n"]:
    r"""Return the BFGS update of an inverse, :math:`(I-ρsy^T) H (I-ρys^T) + ρss^T`.

    ρ = 1 / sᵀy. The update satisfies H y = s and is symmetric; H is returned as it is
    where sᵀy is not positive. 3·n² multiply-adds.

    Examples
    --------
    >>> s, y = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0])
    >>> bfgs(torch.eye(2), s, y).tolist()
    [[0.5, 0.0], [0.0, 1.0]]
    """
    curvature = s @ y
    if not bool(curvature > 0):
        return inverse
    turned = inverse @ y
    scale = (1 + (y @ turned) / curvature) / curvature
    cross = torch.outer(s, turned) / curvature
    return inverse + scale * torch.outer(s, s) - cross - cross.T


@final
@dataclass(frozen=True, eq=False)
class HeldInverse(Held):
    """An inverse held whole."""

    matrix: Float[Tensor, "n n"]

    def updated(self, s: Tensor, y: Tensor) -> "HeldInverse":
        """Return the BFGS update."""
        return HeldInverse(bfgs(self.matrix, s, y))

    def apply(self, w: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return H w."""
        return self.matrix @ w

    def dense(self) -> Float[Tensor, "n n"]:
        """Return H."""
        return self.matrix


@final
@dataclass(frozen=True, eq=False)
class PairsInverse(Held):
    """An inverse known by the last pairs (s, y), oldest first, from the identity (L-BFGS).

    Parameters
    ----------
    like
        A vector of the right size, precision and device.
    memory
        How many pairs are kept.
    """

    like: Float[Tensor, " n"]
    memory: int
    pairs: Sequence[Pair] = ()

    @property
    def stored_numbers(self) -> int:
        """2·n for each pair."""
        return 2 * len(self.like) * len(self.pairs)

    def updated(self, s: Tensor, y: Tensor) -> "PairsInverse":
        """Return the inverse with one more pair; those of no curvature are left out."""
        if not bool(s @ y > 0):
            return self
        return replace(self, pairs=(*self.pairs, (s, y))[-self.memory :])

    def apply(self, w: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return H w by the two loops over the pairs: 4·n·k multiply-adds a pair."""
        kept = []
        for s, y in reversed(self.pairs):
            share = (s @ w) / (s @ y)
            w = w - torch.outer(y, share)
            kept.append(share)
        for (s, y), share in zip(self.pairs, reversed(kept), strict=True):
            w = w + torch.outer(s, share - (y @ w) / (s @ y))
        return w

    def dense(self) -> Float[Tensor, "n n"]:
        """Return H."""
        like = self.like
        return self.apply(torch.eye(len(like), dtype=like.dtype, device=like.device))


class KnownInverse(Operator):
    """A Kronecker product whose inverse is held; with damping 0 nothing is inverted."""

    @property
    @abstractmethod
    def solver(self) -> KroneckerSum:
        """The inverse."""

    @property
    def product_flops(self) -> int:
        """Those of two factors."""
        return self.shape[0] * sum(self.weight_shape)

    def inverse(self, damping: Damping) -> Operator:
        """Return (M + damping·I)⁻¹.

        Raises
        ------
        ValueError
            For a factored damping: the factors are damped already.
        """
        shift = tikhonov(damping, self)
        return self.formed.inverse(shift) if shift else self.solver


@final
@dataclass(frozen=True, eq=False, repr=False)
class QuasiNewtonFactors(KnownInverse):
    """The matrix whose inverse is H_g ⊗ H_a, with what the next update needs.

    Solves with damping 0 are two products. Every other question inverts the factors
    once.

    Parameters
    ----------
    rows
        H_g, held whole or as pairs.
    columns
        H_a, shape (d_in, d_in).
    moment
        The averaged second moment of the inputs.
    change
        The averaged (s, y) of the outputs and their gradients; None before the first.

    Examples
    --------
    >>> eye = torch.eye(2)
    >>> op = QuasiNewtonFactors(HeldInverse(2 * eye), eye, eye)
    >>> op.solve(torch.ones(2, 2), damping=0.0)[0, 0].item(), op.trace()
    (2.0, 2.0)
    """

    rows: HeldInverse | PairsInverse
    columns: Float[Tensor, "i i"]
    moment: Float[Tensor, "i i"]
    change: Pair | None = None
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        held = self.rows
        size = held.matrix if isinstance(held, HeldInverse) else held.like
        return len(size), len(self.columns)

    @property
    def stored_numbers(self) -> int:
        """Those of H_g, H_a and the moment."""
        return self.rows.stored_numbers + self.columns.numel() + self.moment.numel()

    @cached_property
    def solver(self) -> KroneckerSum:
        """The inverse, H_g ⊗ H_a."""
        made = self.provenance.inverted
        return KroneckerSum(((self.rows.dense(), self.columns),), self.weight_shape, made)

    @cached_property
    def formed(self) -> KroneckerSum:
        """The matrix itself, H_g⁻¹ ⊗ H_a⁻¹."""
        factors = (self.rows.dense(), self.columns)
        rows, cols = (factorised("inv", f.double(), self).to(self.dtype) for f in factors)
        terms = (((rows + rows.T) / 2, (cols + cols.T) / 2),)
        return KroneckerSum(terms, self.weight_shape, self.provenance)

    def _solve(self, w: Float[Tensor, "k o i"], damping: Damping) -> Float[Tensor, "k o i"]:
        """Return (M + damping·I)⁻¹ w; with damping 0, H_g w H_a."""
        shift = tikhonov(damping, self)
        if shift:
            return self.formed._solve(w, shift)
        flat = (w @ self.columns).movedim(-2, 0)
        turned = self.rows.apply(flat.flatten(1)).view(flat.shape)
        return turned.movedim(0, -2)


@final
@dataclass(frozen=True, eq=False, repr=False)
class InverseFactors(KnownInverse):
    """The matrix whose inverse is C Cᵀ ⊗ K Kᵀ, with the state of the iteration.

    Solves with damping 0 are four products. Every other question inverts the factors
    once.

    Parameters
    ----------
    row_root, column_root
        C (d_out, d_out) and K (d_in, d_in).
    row_momentum, column_momentum
        What the next update adds to.

    Examples
    --------
    >>> import torch
    >>> eye, zero = torch.eye(2), torch.zeros(2, 2)
    >>> op = InverseFactors(2 * eye, eye, zero, zero)
    >>> op.solve(torch.ones(2, 2), damping=0.0)[0, 0].item(), op.trace()
    (4.0, 1.0)
    """

    row_root: Float[Tensor, "o o"]
    column_root: Float[Tensor, "i i"]
    row_momentum: Float[Tensor, "o o"]
    column_momentum: Float[Tensor, "i i"]
    provenance: Provenance = Provenance()

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """C, K and their momenta."""
        return self.row_root, self.column_root, self.row_momentum, self.column_momentum

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return len(self.row_root), len(self.column_root)

    @cached_property
    def solver(self) -> KroneckerSum:
        """The inverse, C Cᵀ ⊗ K Kᵀ."""
        rows, cols = self.row_root, self.column_root
        made = self.provenance.inverted
        return KroneckerSum(((rows @ rows.T, cols @ cols.T),), self.weight_shape, made)

    @cached_property
    def formed(self) -> KroneckerSum:
        """The matrix itself, (C Cᵀ)⁻¹ ⊗ (K Kᵀ)⁻¹."""
        roots = self.row_root, self.column_root
        rows, cols = (factorised("inv", root, self) for root in roots)
        terms = ((rows.T @ rows, cols.T @ cols),)
        return KroneckerSum(terms, self.weight_shape, self.provenance)
