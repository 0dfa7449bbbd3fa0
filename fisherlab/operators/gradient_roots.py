"""What optimisers divide by: matrices of a state that grows from mean gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from math import prod
from typing import Any, ClassVar, Literal, TypeVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import eigh, factorised
from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.eigenform import KroneckerEigen, TensorEigen, TensorPiece

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
        left = factorised("qr", rows @ self.row_basis, repr(self)).Q
        right = factorised("qr", cols @ self.column_basis, repr(self)).Q
        fresh = (left.T @ new.gradient @ right).square()
        squares = torch.lerp(fresh, self.squares, weight)
        return RotatedAdam(new.gradient, rows, cols, left, right, squares, new.provenance)

    @cached_property
    def formed(self) -> KroneckerEigen:
        """The matrix in its basis."""
        bases = self.row_basis, self.column_basis
        return KroneckerEigen(*bases, self.squares.sqrt(), self.provenance)


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
