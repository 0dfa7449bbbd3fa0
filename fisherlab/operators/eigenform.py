r"""Matrices that are diagonal in an orthonormal basis, whatever the basis is made of.

.. math:: M = r I + \sum_j (v_j - r)\, u_j u_j^T

with orthonormal u_j and r the eigenvalue outside of their span. A basis is never formed as
a p × p matrix: it turns weights into coefficients and back.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from math import prod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import IndefiniteError
from fisherlab.numerics.held import Held
from fisherlab.numerics.linalg import eigh, kron, require_finite, require_positive
from fisherlab.operators.base import PANEL_BYTES, Operator, Provenance, inner_product
from fisherlab.operators.dampings import Damping, tikhonov
from fisherlab.samples import Samples

LOST = 1e-3  # relative rounding of an inverse above which it is not known
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
        How many rows a table's rounding is that of, where it is not its length.

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
        return out + self.rest * _eye(out) if self.rest else out

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
