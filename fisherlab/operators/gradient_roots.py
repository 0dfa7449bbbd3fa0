"""What optimisers divide by: states that grow from mean gradients, and quasi-diagonals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from math import prod
from typing import Any, ClassVar, Literal, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import eigh, factorised
from fisherlab.operators.base import Damping, Operator, Provenance, inner_product, tikhonov
from fisherlab.operators.eigenform import Diagonal, KroneckerEigen, TensorEigen, TensorPiece
from fisherlab.operators.factored import FactoredFisher
from fisherlab.operators.mini_blocks import MiniBlocks, Partition
from fisherlab.samples import OuterSamples

S = TypeVar("S", bound="FromState")


class FromState(Operator):
    """A matrix that is no linear function of what moving averages average, its state."""

    averages: ClassVar[tuple[str, ...]] = ()  # the fields of the state

    @property
    def state(self) -> Sequence[Tensor]:
        """The tensors that are averaged, all of one precision."""
        return tuple(getattr(self, name) for name in self.averages)

    def with_state(self: S, state: Sequence[Tensor]) -> S:
        """Return the same kind of matrix for another state."""
        named = dict(zip(self.averages, state, strict=True))
        found: Any = replace(self, **named)  # type: ignore[type-var]
        return found

    def averaged(self, new: "FromState", weight: float) -> "FromState":
        """Return the matrix of the state weight·self + (1 − weight)·new."""
        pairs = zip(self.state, new.state, strict=True)
        return new.with_state([torch.lerp(b, a, weight) for a, b in pairs])


Rule = Literal["shampoo", "tnt"]


@final
@dataclass(frozen=True)
class Modes:
    """Columns start:stop of a weight, read as a tensor of a shape."""

    start: int
    stop: int
    shape: tuple[int, ...]

    def moments(self, w: Tensor) -> list[Tensor]:
        """Return the mode contractions H_j = X_(j) X_(j)ᵀ of one weight (d_out, d_in)."""
        x = w[:, self.start : self.stop].reshape(self.shape)
        sizes = enumerate(self.shape)
        flat = [x.movedim(mode, 0).reshape(size, -1) for mode, size in sizes]
        return [rows @ rows.T for rows in flat]


def _shampoo(values: list[Tensor], epsilon: float) -> list[Tensor]:
    """(h + ε)^(1/(2k)) in each of k modes."""
    return [(h + epsilon) ** (0.5 / len(values)) for h in values]


def _tnt(values: list[Tensor], epsilon: float) -> list[Tensor]:
    """H scaled to an average of c in every mode, plus ε; cᵏ is the mean square."""
    k, size = len(values), prod(len(h) for h in values)
    mean = (values[0].sum() / size) ** (1 / k)
    scales = [mean ** (k - 1) * size / len(h) for h in values]
    alive = bool(mean > 0)
    return [
        (h / s if alive else 0 * h) + epsilon for h, s in zip(values, scales, strict=True)
    ]


_RULES: dict[Rule, Callable[[list[Tensor], float], list[Tensor]]] = {
    "shampoo": _shampoo,
    "tnt": _tnt,
}


@final
@dataclass(frozen=True, eq=False, repr=False)
class ModeProducts(FromState):
    r"""⊗_j f(H_j) over the modes of each tensor of a weight; the H_j are averaged.

    Parameters
    ----------
    block_shape
        (d_out, d_in).
    layout
        The tensors that the columns of the weight form.
    moments
        H_j of every mode of every tensor, one after the other.
    rule
        "shampoo": (H_j + εI)^(1/(2k)) for a tensor with k modes. "tnt": H_j scaled to
        the same average eigenvalue in every mode, + εI.
    epsilon
        ε, absolute.

    Examples
    --------
    >>> import torch
    >>> eye, layout = torch.eye(2), (Modes(0, 2, (2, 2)),)
    >>> op = ModeProducts((2, 2), layout, (16 * eye, eye), "shampoo")
    >>> round(op.trace(), 4)
    8.0
    """

    block_shape: tuple[int, int]
    layout: tuple[Modes, ...]
    moments: Sequence[Tensor]
    rule: Rule
    epsilon: float = 0.0
    provenance: Provenance = Provenance()

    @property
    def state(self) -> Sequence[Tensor]:
        """The mode moments."""
        return self.moments

    @property
    def product_flops(self) -> int:
        """Two rotations of every mode."""
        return sum(2 * prod(modes.shape) * sum(modes.shape) for modes in self.layout)

    def with_state(self, state: Sequence[Tensor]) -> "ModeProducts":
        """Return the product for other moments."""
        return replace(self, moments=tuple(state))

    @cached_property
    def formed(self) -> TensorEigen:
        """The matrix in the eigenbases of its modes."""
        pieces, left = [], list(self.moments)
        for modes in self.layout:
            here, left = left[: len(modes.shape)], left[len(modes.shape) :]
            pairs = [eigh(h, f"a mode of {self.provenance}") for h in here]
            roots = _RULES[self.rule]([v.clamp_min(0) for v, _ in pairs], self.epsilon)
            values = reduce(lambda a, b: a[..., None] * b, roots)
            bases = tuple(vectors for _, vectors in pairs)
            pieces.append(TensorPiece(modes.start, modes.stop, bases, values))
        floored = self.epsilon > 0
        return TensorEigen(self.block_shape, tuple(pieces), self.provenance, floored)


class _OfGradient(FromState):
    """A matrix whose state takes up one mean gradient after the other."""

    gradient: Tensor

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.gradient.shape[0], self.gradient.shape[1]

    @property
    def product_flops(self) -> int:
        """Two rotations of both sides."""
        return 2 * self.gradient.numel() * sum(self.weight_shape)


@final
@dataclass(frozen=True, eq=False, repr=False)
class RotatedAdam(_OfGradient):
    r"""(Q_L ⊗ Q_R) diag(√v) (Q_L ⊗ Q_R)ᵀ: Adam in the eigenbasis of L and R.

    Parameters
    ----------
    gradient
        The newest mean gradient Ḡ.
    rows, cols
        Averages L of Ḡ Ḡᵀ and R of Ḡᵀ Ḡ.
    row_basis, column_basis
        Q_L and Q_R.
    squares
        v, the average of (Q_Lᵀ Ḡ Q_R)∘², each in the basis of its time.

    Examples
    --------
    >>> op = RotatedAdam.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> round(op.trace(), 4)
    7.0
    """

    gradient: Float[Tensor, "o i"]
    rows: Float[Tensor, "o o"]
    cols: Float[Tensor, "i i"]
    row_basis: Float[Tensor, "o o"]
    column_basis: Float[Tensor, "i i"]
    squares: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()
    averages: ClassVar[tuple[str, ...]] = ("rows", "cols", "squares")

    @classmethod
    def of(cls, gradient: Tensor, made: Provenance = Provenance()) -> "RotatedAdam":
        """Return the matrix of one gradient."""
        rows, cols = gradient @ gradient.T, gradient.T @ gradient
        (_, left), (_, right) = (eigh(h, f"a factor of {made}") for h in (rows, cols))
        squares = (left.T @ gradient @ right).square()
        return cls(gradient, rows, cols, left, right, squares, made)

    def averaged(self, new: FromState, weight: float) -> "RotatedAdam":
        """Average the factors, turn the basis by a step of QR iteration, add the square."""
        assert isinstance(new, RotatedAdam)
        rows, cols = torch.lerp(new.rows, self.rows, weight), new.cols
        cols = torch.lerp(cols, self.cols, weight)
        left, down = _turned(rows, self.row_basis, repr(self))
        right, across = _turned(cols, self.column_basis, repr(self))
        fresh = (left.T @ new.gradient @ right).square()
        squares = torch.lerp(fresh, self.squares[down][:, across], weight)
        return RotatedAdam(new.gradient, rows, cols, left, right, squares, new.provenance)

    @cached_property
    def formed(self) -> KroneckerEigen:
        """The matrix in its basis."""
        bases = self.row_basis, self.column_basis
        return KroneckerEigen(*bases, self.squares.sqrt(), self.provenance)


def _turned(moment: Tensor, basis: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return a basis after a step of QR iteration, and the order that it took.

    The largest come first, so that rounding decides none but directions of a null space.
    """
    order = ((moment @ basis) * basis).sum(0).argsort(descending=True, stable=True)
    return factorised("qr", moment @ basis[:, order], what).Q, order


@final
@dataclass(frozen=True, eq=False, repr=False)
class WhitenedRoot(_OfGradient):
    r"""(G ⊗ A)^½ for factors that average gradients whitened by each other: KL-Shampoo.

    .. math:: G \leftarrow ρ G + \frac{1 - ρ}{d_{in}} \big(\bar D A^{-1} \bar D^T +
              κ \,\mathrm{tr}(A^{-1}) I\big), \quad \text{A alike}

    Parameters
    ----------
    gradient
        The newest mean gradient.
    rows, cols
        G and A.
    ridge
        κ, absolute.

    Examples
    --------
    >>> eye = torch.eye(2)
    >>> WhitenedRoot(eye, 4 * eye, eye, 0.0).trace()
    8.0
    """

    gradient: Float[Tensor, "o i"]
    rows: Float[Tensor, "o o"]
    cols: Float[Tensor, "i i"]
    ridge: float
    provenance: Provenance = Provenance()
    averages: ClassVar[tuple[str, ...]] = ("rows", "cols")

    def averaged(self, new: FromState, weight: float) -> "WhitenedRoot":
        """Average each factor with the new gradient whitened by the other, old one."""
        assert isinstance(new, WhitenedRoot)
        if not self.rows.any():  # no gradient yet
            return new
        fresh = (
            whitened(new.gradient, self.cols, new.ridge),
            whitened(new.gradient.T, self.rows, new.ridge),
        )
        pairs = zip(fresh, self.state, strict=True)
        return new.with_state([torch.lerp(b, a, weight) for b, a in pairs])

    @cached_property
    def formed(self) -> KroneckerEigen:
        """The root in the eigenbases of the factors."""
        g, left = eigh(self.rows, f"the row factor of {self!r}")
        a, right = eigh(self.cols, f"the column factor of {self!r}")
        entries = torch.outer(g.clamp_min(0).sqrt(), a.clamp_min(0).sqrt())
        return KroneckerEigen(left, right, entries, self.provenance)


def whitened(gradient: Tensor, other: Tensor, ridge: float) -> Tensor:
    """Return (D M⁻¹ Dᵀ + κ tr(M⁻¹) I) / d for D of d columns: KL-Shampoo's half-step."""
    inverse = factorised("inv", other.double(), "a factor of KL-Shampoo")
    wide = gradient.double()
    found = wide @ inverse @ wide.T
    found.diagonal().add_(ridge * inverse.trace())
    return (found / len(other)).to(gradient.dtype)


@final
@dataclass(frozen=True, eq=False, repr=False)
class OneSidedRoot(_OfGradient):
    r"""(B Bᵀ)^½ ⊗ I, on the shorter side of B: what Muon divides by.

    For B = UΣVᵀ with more rows than columns I ⊗ (BᵀB)^½, which turns B into UVᵀ as well.

    Parameters
    ----------
    gradient
        B, an average of mean gradients, or their sum with momentum.

    Examples
    --------
    >>> B = torch.tensor([[0.0, 3.0, 0.0], [4.0, 0.0, 0.0]])
    >>> OneSidedRoot(B).solve(B, damping=0.0).round(decimals=4).tolist()
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """

    gradient: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()
    averages: ClassVar[tuple[str, ...]] = ("gradient",)

    @cached_property
    def formed(self) -> KroneckerEigen:
        """The root in the singular vectors of B, so that no small value is squared."""
        o, i = self.weight_shape
        tall = o > i
        wide = (self.gradient.T if tall else self.gradient).double()
        u, values, _ = factorised("svd", wide, repr(self), full_matrices=False)
        u = u.contiguous().to(self.gradient.dtype)  # LAPACK returns columns
        values = values.to(self.gradient.dtype)
        eye = torch.eye(max(o, i), dtype=u.dtype, device=u.device)
        ones = torch.ones_like(eye[0])
        if tall:
            return KroneckerEigen(eye, u, torch.outer(ones, values), self.provenance)
        return KroneckerEigen(u, eye, torch.outer(values, ones), self.provenance)


@final
@dataclass(frozen=True, eq=False, repr=False)
class RowRankOne(Operator):
    r"""Block-diagonal by output, each block :math:`\mathrm{diag}(d_r) + s_r u_r u_r^T`.

    Closed under damped inversion (Sherman-Morrison), with O(p) numbers and flops. Where
    λ = 0, or d_r + λ has an entry that is not positive, the blocks are formed and
    factorised instead.

    Parameters
    ----------
    entries
        d, shape (d_out, d_in).
    directions
        u, shape (d_out, d_in).
    scales
        s, shape (d_out,), of any sign.

    Examples
    --------
    >>> op = RowRankOne(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1))
    >>> op.to_dense().tolist(), round(op.inverse(0.0).trace(), 4)
    ([[2.0, 1.0], [1.0, 2.0]], 1.3333)
    """

    entries: Float[Tensor, "o i"]
    directions: Float[Tensor, "o i"]
    scales: Float[Tensor, " o"]
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.entries.shape[0], self.entries.shape[1]

    @property
    def product_flops(self) -> int:
        """3·d_out·d_in."""
        return 3 * self.entries.numel()

    @cached_property
    def formed(self) -> MiniBlocks:
        """The blocks, formed: for spectra, and for solves that need a factorisation."""
        u = self.directions
        outer = self.scales[:, None, None] * u[:, :, None] * u[:, None, :]
        blocks = outer + torch.diag_embed(self.entries)
        return MiniBlocks(Partition.by_row(self.weight_shape), (blocks,), self.provenance)

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        inside = (self.directions * w).sum(-1) * self.scales
        return self.entries * w + inside[..., None] * self.directions

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return d + s u∘u."""
        return self.entries + self.scales[:, None] * self.directions.square()

    def trace(self) -> float:
        """Return the trace."""
        return float(self.diagonal().sum(dtype=torch.float64))

    def frobenius_norm(self) -> float:
        """Return (Σ d² + Σ 2 s d·u² + Σ s²‖u‖⁴)^½."""
        d, u, s = self.entries.double(), self.directions.double(), self.scales.double()
        squares = u.square()
        mixed = 2 * s * (d * squares).sum(1) + (s * squares.sum(1)).square()
        return float((d.square().sum() + mixed.sum()).clamp_min(0).sqrt())

    def inverse(self, damping: Damping) -> "RowRankOne | MiniBlocks":
        """Return (M + damping·I)⁻¹, of the same form where d + damping is positive.

        Raises
        ------
        IndefiniteError
            If a damped block is not positive definite.
        """
        damping = tikhonov(damping, self)
        shifted = self.entries + damping
        if not damping or not bool((shifted > 0).all()):
            return self.formed.inverse(damping)
        turned = self.directions / shifted
        pivots = 1 + self.scales * (self.directions * turned).sum(1)
        if not bool((pivots > 0).all()):
            return self.formed.inverse(damping)
        made = self.provenance.inverted
        return RowRankOne(shifted.reciprocal(), turned, -self.scales / pivots, made)


@inner_product(RowRankOne, FactoredFisher)
def _row_rank_one_factored(a: RowRankOne, b: FactoredFisher) -> float:
    """Return Σ d∘diag(F) + Σ_r s_r u_rᵀ F_rr u_r, no block formed."""
    samples, u = b.samples, a.directions
    if isinstance(samples, OuterSamples):
        forms = (samples.output_energy * (samples.inputs @ u.T).square()).sum(0)
    else:
        forms = samples.summed(lambda d: (d * u).sum(-1).square().sum(0))
    diagonal = (a.entries * samples.squares()).sum(dtype=torch.float64)
    return float(diagonal + (a.scales * forms).sum(dtype=torch.float64)) / b.count


@final
@dataclass(frozen=True, eq=False, repr=False)
class QuasiDiagonal(FromState):
    r"""The matrix with a given diagonal and bias column whose inverse is an arrow.

    For one output with bias entry 0,

    .. math:: M_{ii} = F_{ii}, \quad M_{0i} = F_{0i}, \quad
              M_{ij} = F_{0i} F_{0j} / F_{00}

    so that :math:`(M^{-1})_{ij} = 0` for different weights i and j. Different outputs
    are uncoupled; an output whose bias has no energy, but for rounding, is diagonal.

    Parameters
    ----------
    squares
        F_ii, shape (d_out, d_in).
    with_bias
        F_0i, shape (d_out, d_in), the last column F_00; zero for a weight without bias.

    Examples
    --------
    >>> op = QuasiDiagonal(torch.tensor([[2.0, 2.0, 1.0]]), torch.ones(1, 3))
    >>> op.to_dense().tolist()
    [[2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 1.0]]
    >>> op.inverse(0.0).to_dense().round(decimals=4).add(0.0).tolist()
    [[1.0, 0.0, -1.0], [0.0, 1.0, -1.0], [-1.0, -1.0, 3.0]]
    """

    squares: Float[Tensor, "o i"]
    with_bias: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()
    averages: ClassVar[tuple[str, ...]] = ("squares", "with_bias")

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.squares.shape[0], self.squares.shape[1]

    @cached_property
    def formed(self) -> RowRankOne:
        """The matrix as a diagonal plus F_00 v vᵀ, v = F_0i / F_00."""
        energy = self.with_bias[:, -1]
        # A bias without effect (of attention's keys) has gradients of rounding size.
        eps = torch.finfo(energy.dtype).eps
        alive = energy > (1e2 * eps) ** 2 * self.squares.amax(1)
        ratio = self.with_bias / torch.where(alive, energy, 1.0)[:, None]
        directions = torch.where(alive[:, None], ratio, 0.0)
        # Not negative by Cauchy-Schwarz, but for rounding.
        left = (self.squares - energy[:, None] * directions.square()).clamp_min(0)
        return RowRankOne(left, directions, energy.clamp_min(0), self.provenance)


@final
@dataclass(frozen=True, eq=False, repr=False)
class RootDiagonal(FromState):
    """diag(√v) with v ≥ 0 averaged in place of the matrix.

    Parameters
    ----------
    squares
        v, shape (d_out, d_in).

    Examples
    --------
    >>> import torch
    >>> op = RootDiagonal(torch.full((1, 2), 9.0))
    >>> op.trace(), op.solve(torch.ones(1, 2), damping=1.0).tolist()
    (6.0, [[0.25, 0.25]])
    """

    squares: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()
    averages: ClassVar[tuple[str, ...]] = ("squares",)

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.squares.shape[0], self.squares.shape[1]

    @cached_property
    def formed(self) -> Diagonal:
        """The diagonal matrix."""
        return Diagonal(self.squares.sqrt(), self.provenance)
