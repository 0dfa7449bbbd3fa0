"""Orthonormal vectors in the shape of a weight: products over modes, parts, functions."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from math import prod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.devices import Held
from fisherlab.numerics.linalg import kron
from fisherlab.samples import Samples

Rotation = Callable[[Tensor], Tensor]


class Basis(Held):
    """Orthonormal vectors u_j, each in the shape of a weight."""

    @abstractmethod
    def rotate(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k r"]:
        """Return the coefficients ⟨u_j, w⟩."""

    @abstractmethod
    def combine(self, c: Float[Tensor, "k r"]) -> Float[Tensor, "k o i"]:
        """Return Σ_j c_j u_j."""

    def diagonal(self, values: Float[Tensor, " r"]) -> Float[Tensor, "o i"]:
        """Return Σ_j v_j u_j∘u_j."""
        return torch.einsum("r,roi->oi", values, self.combine(_eye(values)).square())

    def dense(self, values: Float[Tensor, " r"]) -> Float[Tensor, "p p"]:
        """Return Σ_j v_j vec(u_j) vec(u_j)ᵀ."""
        vectors = self.combine(_eye(values)).flatten(1)
        return (vectors.T * values) @ vectors

    def energies(self, samples: Samples) -> Float[Tensor, " r"]:
        """Return Σ_vn ⟨u_j, D_vn⟩² of per-example gradients."""
        return samples.summed(lambda d: self.rotate(d).square().sum(0))

    @property
    def flops(self) -> int:
        """Multiply-adds of one rotation."""
        return 0

    @property
    def pair(self) -> tuple[Tensor | None, Tensor | None] | None:
        """U and V of a basis U ⊗ V, None in place of an identity; None for another."""
        return None

    @property
    def is_identity(self) -> bool:
        """Whether the basis is the weight's own."""
        return False

    def overlap(self, other: "Basis", values: Tensor) -> Tensor | None:
        """Return Σ_k ⟨u_j, v_k⟩² f_k for another basis, None if it has no closed form."""
        return None


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


@final
@dataclass(frozen=True, eq=False)
class Modes(Basis):
    """⊗_j U_j over the modes of a weight that is read as a tensor; None is the identity.

    Parameters
    ----------
    bases
        A matrix with orthonormal columns a mode, or None.
    shape
        The tensor's.
    weight_shape
        (d_out, d_in).
    """

    bases: tuple[Tensor | None, ...]
    shape: tuple[int, ...]
    weight_shape: tuple[int, int]

    @property
    def flops(self) -> int:
        """Those of all modes, one after the other."""
        total, size = 0, prod(self.shape)
        for length, basis in zip(self.shape, self.bases, strict=True):
            if basis is not None:
                total += size * basis.shape[1]
                size = size // length * basis.shape[1]
        return total

    @cached_property
    def inside(self) -> tuple[int, ...]:
        """The shape of the coefficients."""
        pairs = zip(self.shape, self.bases, strict=True)
        return tuple(n if basis is None else basis.shape[1] for n, basis in pairs)

    @property
    def pair(self) -> tuple[Tensor | None, Tensor | None] | None:
        """U and V where the tensor is the weight as it is."""
        if len(self.bases) != 2 or self.shape != self.weight_shape:
            return None
        return self.bases[0], self.bases[1]

    @property
    def is_identity(self) -> bool:
        """Whether the basis is the weight's own."""
        return all(basis is None for basis in self.bases)

    def rotate(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k r"]:
        """Return (⊗ U_jᵀ) w."""
        return _turned(w.reshape(len(w), *self.shape), self.bases).flatten(1)

    def combine(self, c: Float[Tensor, "k r"]) -> Float[Tensor, "k o i"]:
        """Return (⊗ U_j) c."""
        back = [None if basis is None else basis.T for basis in self.bases]
        return _turned(c.view(len(c), *self.inside), back).reshape(
            len(c), *self.weight_shape
        )

    def diagonal(self, values: Float[Tensor, " r"]) -> Float[Tensor, "o i"]:
        """Return (⊗ U_j∘²) v."""
        squares = tuple(None if basis is None else basis.square() for basis in self.bases)
        return replace(self, bases=squares).combine(values[None])[0]

    def dense(self, values: Float[Tensor, " r"]) -> Float[Tensor, "p p"]:
        """Return (⊗ U_j) diag(v) (⊗ U_j)ᵀ, block by block of what is the identity."""
        if self.is_identity:
            return torch.diag(values)
        first, *rest = self.bases
        if first is None:
            inner = replace(self, bases=tuple(rest), shape=self.shape[1:])
            return torch.block_diag(*map(inner.dense, values.view(self.shape[0], -1)))
        pairs = zip(self.shape, self.bases, strict=True)
        bases = (_eye(values[:1].expand(n)) if b is None else b for n, b in pairs)
        whole = reduce(kron, bases)
        return (whole * values) @ whole.T

    def energies(self, samples: Samples) -> Float[Tensor, " r"]:
        """Return the diagonal of Σ vec(D) vec(D)ᵀ in the basis."""
        if self.is_identity:
            return samples.squares().flatten()
        if len(self.bases) == 1:  # a few vectors
            assert self.bases[0] is not None
            vectors = self.bases[0].T.reshape(-1, *self.weight_shape)
            return samples.project(vectors).square().sum((1, 2))
        rows, cols = self.pair or (None, None)
        if cols is None:
            return super().energies(samples)
        if rows is None:
            return samples.column_squares(cols).flatten()
        return samples.rotated_squares(rows, cols).flatten()

    def overlap(self, other: Basis, values: Tensor) -> Tensor | None:
        """Return (⊗ (U_jᵀV_j)∘²) f where both read the weight as one tensor."""
        if not isinstance(other, Modes) or other.shape != self.shape:
            return None
        pairs = list(zip(self.bases, other.bases, strict=True))
        turns = [a if b is None else b.T if a is None else b.T @ a for a, b in pairs]
        squares = [None if turn is None else turn.square() for turn in turns]
        return _turned(values.view(1, *other.inside), squares).flatten()


def _turned(x: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """Multiply every mode of tensors (n, …) with its basis, from the right."""
    for mode, basis in enumerate(bases):
        left = len(bases) - mode
        if basis is None:
            continue
        if left == 1:
            x = x @ basis
        elif left == 2:
            x = basis.T @ x
        else:
            x = (x.movedim(mode + 1, -1) @ basis).movedim(-1, mode + 1)
    return x


@final
@dataclass(frozen=True, eq=False)
class Beside(Basis):
    """Bases of the parts of a weight, cut along its rows (axis 0) or columns (axis 1)."""

    parts: tuple[Basis, ...]
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    axis: int

    @property
    def flops(self) -> int:
        """Those of the parts."""
        return sum(part.flops for part in self.parts)

    def rotate(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k r"]:
        """Return the coefficients of every part."""
        cut = zip(self.parts, w.split(self.lengths, self.axis + 1), strict=True)
        return torch.cat([part.rotate(piece) for part, piece in cut], 1)

    def combine(self, c: Float[Tensor, "k r"]) -> Float[Tensor, "k o i"]:
        """Return the parts, put together."""
        cut = zip(self.parts, c.split(self.counts, 1), strict=True)
        return torch.cat([part.combine(own) for part, own in cut], self.axis + 1)

    def diagonal(self, values: Float[Tensor, " r"]) -> Float[Tensor, "o i"]:
        """Return the diagonals of the parts, put together."""
        cut = zip(self.parts, values.split(self.counts), strict=True)
        return torch.cat([part.diagonal(own) for part, own in cut], self.axis)

    def overlap(self, other: Basis, values: Tensor) -> Tensor | None:
        """Return the overlaps of the parts where both are cut alike."""
        if not isinstance(other, Beside) or self.axis != other.axis:
            return None
        if self.lengths != other.lengths:
            return None
        cut = zip(self.parts, other.parts, values.split(other.counts), strict=True)
        found = [part.overlap(its, own) for part, its, own in cut]
        known = [one for one in found if one is not None]
        return torch.cat(known) if len(known) == len(found) else None


@final
@dataclass(frozen=True, eq=False)
class Turned(Basis):
    """A basis through two functions: samples, blocks, or eigenvectors that are held."""

    into: Rotation
    back: Rotation

    def rotate(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k r"]:
        """Return the coefficients."""
        return self.into(w)

    def combine(self, c: Float[Tensor, "k r"]) -> Float[Tensor, "k o i"]:
        """Return the weights."""
        return self.back(c)
