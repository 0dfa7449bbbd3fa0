r"""A block-diagonal solve corrected by a small solve that couples the layers.

With P = F + λI, the fine level K⁻¹ ≈ P⁻¹ and R the rows of a coarse space, a few
directions a layer,

.. math:: C = R^T (R P R^T)^+ R

additive: :math:`K^{-1} + C`; multiplicative: :math:`K^{-1} + C (I - P K^{-1})`, the coarse
correction of what the fine level leaves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, Never, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import Label, eigh, factorised
from fisherlab.operators.base import Damping, Factored, Operator, Provenance, tikhonov
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.operators.network.base import (
    BlockDiagonal,
    NetworkOperator,
    Shapes,
    Weights,
    WholeNetwork,
    tikhonov_inverse,
)

Coarse = Literal["nicolaides", "residual", "spectral", "krylov"]
FOLLOWING: Final = ("residual", "krylov")
ONE_VECTOR: Final = ("nicolaides", "residual")


def fixed_space(coarse: Coarse, local: BlockDiagonal, vectors: int) -> dict[str, Tensor]:
    """Return orthonormal directions (m, d_out, d_in) that depend on the matrix alone.

    "nicolaides": the constant; "spectral": the eigenvectors of the smallest eigenvalues
    of the layer's own block.
    """
    if coarse == "nicolaides":
        return {
            name: torch.full(
                (1, o, i), (o * i) ** -0.5, dtype=local.dtype, device=local.device
            )
            for name, (o, i) in local.weight_shapes.items()
        }
    return {name: _smallest(op, vectors) for name, op in local.blocks.items()}


def right_side_space(
    coarse: Coarse, fine: NetworkOperator, rest: Weights, vectors: int
) -> dict[str, Tensor]:
    """Return orthonormal directions that follow the residual r of the fine level.

    "residual": K⁻¹ r; "krylov": K⁻¹ r, K⁻² r, …, with K⁻¹ the fine level.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in rest}
    now = {name: w[None] for name, w in rest.items()}
    for _ in range(vectors if coarse == "krylov" else 1):
        now = {name: _unit(w) for name, w in fine._apply_blocks(now).items()}
        for name, w in now.items():
            found[name].append(w[0])
    return {name: _orthonormal(torch.stack(ws)) for name, ws in found.items()}


def _unit(w: Float[Tensor, "1 o i"]) -> Float[Tensor, "1 o i"]:
    """Return w / ‖w‖, whose squares float32 may not hold."""
    size = torch.linalg.vector_norm(w, dtype=torch.float64)
    return (w / size.clamp_min(torch.finfo(torch.float64).tiny)).to(w.dtype)


def _orthonormal(ws: Float[Tensor, "m o i"]) -> Float[Tensor, "k o i"]:
    """Return an orthonormal basis of the span; nothing for the zero vector."""
    flat, what = ws.flatten(1), "the residuals of a coarse space"
    _, values, right = factorised("svd", flat, what, full_matrices=False)
    kept = values > 1e-8 * values.max().clamp_min(torch.finfo(ws.dtype).tiny)
    kept &= values > 0
    basis: Tensor = right[kept].unflatten(1, ws.shape[1:])
    return basis


def _smallest(op: Operator, vectors: int) -> Float[Tensor, "m o i"]:
    o, i = op.weight_shape
    count = min(vectors, o * i)
    if not isinstance(op, KroneckerSum) or len(op.terms) != 1:
        _, basis = eigh(op.to_dense(), repr(op))
        return basis[:, :count].T.reshape(count, o, i)
    rows, cols = op.terms[0]
    row_values, row_basis = eigh(rows, Label("the row factor of {}", op))
    col_values, col_basis = eigh(cols, Label("the column factor of {}", op))
    at = torch.outer(row_values, col_values).flatten().argsort()[:count]
    left, right = row_basis[:, at // i], col_basis[:, at % i]
    return left.T[:, :, None] * right.T[:, None, :]


Combination = Literal["additive", "multiplicative"]


@final
@dataclass(frozen=True, eq=False, repr=False)
class TwoLevelInverse(NetworkOperator):
    """K⁻¹ + C (additive) or K⁻¹ + C (I − P K⁻¹) (multiplicative, not symmetric).

    Parameters
    ----------
    fine
        K⁻¹.
    exact, shift
        F and λ with P = F + λI.
    space
        Block name to its directions (m, d_out, d_in).
    combination
        "additive" or "multiplicative".

    Examples
    --------
    >>> from fisherlab.operators import BlockDiagonal, Diagonal
    >>> same = BlockDiagonal({n: Diagonal(torch.ones(1, 2)) for n in "ab"})
    >>> ones = {n: torch.ones(1, 1, 2) for n in "ab"}
    >>> op = TwoLevelInverse(same.inverse(1.0), same, 1.0, ones, "multiplicative")
    >>> (op @ {n: torch.ones(1, 2) for n in "ab"})["a"].tolist()
    [[0.5, 0.5]]
    """

    fine: NetworkOperator
    exact: NetworkOperator
    shift: float
    space: Mapping[str, Tensor]
    combination: Combination
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        return self.fine.weight_shapes

    @property
    def stored_numbers(self) -> int:
        """The fine level, the directions and the coarse matrix."""
        held = sum(ws.numel() for ws in self.space.values())
        coarse = sum(len(ws) for ws in self.space.values()) ** 2
        return self.fine.stored_numbers + held + coarse

    @property
    def product_flops(self) -> int:
        """The fine level, twice the directions, and a product with F if multiplicative."""
        held = 2 * sum(ws.numel() for ws in self.space.values())
        more = self.exact.product_flops if self.combination == "multiplicative" else 0
        return self.fine.product_flops + held + more

    @property
    def _rows(self) -> Float[Tensor, "m p"]:
        """R, the directions as rows of length p, each inside one block."""
        return torch.block_diag(*(ws.flatten(1) for ws in self.space.values()))

    @cached_property
    def coarse_inverse(self) -> Float[Tensor, "m m"]:
        """(R P Rᵀ)⁺ in float64; λ enters as λ R Rᵀ."""
        gram = torch.block_diag(*(_gram(vectors) for vectors in self.space.values()))
        matrix = self.exact.congruence(self.space).double() + self.shift * gram.double()
        values, vectors = eigh(
            (matrix + matrix.T) / 2, Label("the coarse matrix of {}", self)
        )
        floor = len(values) * 1e-15 * float(values.abs().max()) if len(values) else 0.0
        inverse = torch.where(values > floor, values.reciprocal(), torch.zeros_like(values))
        return (vectors * inverse) @ vectors.T

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        out = self.fine._apply_blocks(ws)
        left = dict(ws)
        if self.combination == "multiplicative":
            image = self.exact._apply_blocks(out)
            left = {
                name: w - image[name] - self.shift * out[name] for name, w in ws.items()
            }
        parts = [
            torch.einsum("moi,koi->km", vectors, left[name])
            for name, vectors in self.space.items()
        ]
        weights = torch.cat(parts, 1).double() @ self.coarse_inverse
        split = weights.to(self.dtype).split([len(v) for v in self.space.values()], 1)
        for (name, vectors), own in zip(self.space.items(), split, strict=True):
            out[name] = out[name] + torch.einsum("km,moi->koi", own, vectors)
        return out

    def _right(self) -> Float[Tensor, "m p"]:
        """Return H R, or H R (I − P K⁻¹): the matrix is K⁻¹ + Rᵀ times it."""
        rows = self._rows
        if self.combination == "multiplicative":
            images = self.exact._apply(rows[..., None]) + self.shift * rows[..., None]
            rows = rows - self.fine._apply(images).squeeze(-1)
        return self.coarse_inverse.to(self.dtype) @ rows

    def _dense(self) -> Float[Tensor, "p p"]:
        return self.fine._dense() + self._rows.T @ self._right()

    def diagonal(self) -> Float[Tensor, "p 1"]:
        """Return the diagonal; `split` cuts it into blocks."""
        return self.fine.diagonal() + (self._rows * self._right()).sum(0)[:, None]

    def trace(self) -> float:
        """Return the trace."""
        return self.fine.trace() + float((self._rows * self._right()).sum())

    def frobenius_norm(self) -> float:
        """Return √ΣM² of the fine level and a matrix of low rank."""
        left, right = self._rows, self._right()
        turned = self.fine._apply(left[..., None]).squeeze(-1)
        mixed = float((turned * right).sum(dtype=torch.float64))
        low = float(((left @ left.T) * (right @ right.T)).sum(dtype=torch.float64))
        return max(self.fine.frobenius_norm() ** 2 + 2 * mixed + low, 0.0) ** 0.5

    def _require_symmetric(self, call: str) -> None:
        if self.combination == "multiplicative":
            raise ValueError(
                f"{call} of {self!r}: the multiplicative two-level inverse is not "
                "symmetric. Use combination='additive', or products."
            )

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return all eigenvalues, descending.

        Raises
        ------
        ValueError
            If the matrix is not symmetric (multiplicative).
        """
        self._require_symmetric("eigenvalues")
        return super().eigenvalues()

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det(M + damping·I).

        Raises
        ------
        ValueError
            If the matrix is not symmetric (multiplicative).
        """
        self._require_symmetric("logdet")
        return super().logdet(damping)

    def inverse(self, damping: Damping) -> WholeNetwork:
        """Return (M + damping·I)⁻¹.

        Raises
        ------
        ValueError
            If the matrix is not symmetric (multiplicative).
        """
        self._require_symmetric("inverse")
        return tikhonov_inverse(self, tikhonov(damping, self), None)


def _gram(vectors: Float[Tensor, "m o i"]) -> Float[Tensor, "m m"]:
    flat = vectors.flatten(1)
    return flat @ flat.T


@final
@dataclass(frozen=True, eq=False, repr=False)
class AdaptiveTwoLevelInverse(NetworkOperator):
    """The map w ↦ two-level inverse with directions from what K⁻¹ leaves of w.

    It is not linear: it has products, and refuses every question about a matrix.

    Parameters
    ----------
    fine
        K⁻¹.
    exact, shift
        F and λ with P = F + λI.
    coarse
        "residual" or "krylov".
    combination
        "additive" or "multiplicative".
    vectors
        Directions a layer.

    Examples
    --------
    >>> from fisherlab.operators import BlockDiagonal, Diagonal
    >>> same = BlockDiagonal({n: Diagonal(torch.ones(1, 2)) for n in "ab"})
    >>> op = AdaptiveTwoLevelInverse(same.inverse(3.0), same, 1.0, "residual")
    >>> (op @ {n: torch.ones(1, 2) for n in "ab"})["a"].tolist()
    [[0.5, 0.5]]
    """

    fine: NetworkOperator
    exact: NetworkOperator
    shift: float
    coarse: Coarse
    combination: Combination = "multiplicative"
    vectors: int = 1
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        return self.fine.weight_shapes

    @property
    def product_flops(self) -> int:
        """Solves of the fine level, and two products with F."""
        return (1 + self.vectors) * self.fine.product_flops + 2 * self.exact.product_flops

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        done = self.fine._apply_blocks(ws)
        image = self.exact._apply_blocks(done)
        rest = {name: w - image[name] - self.shift * done[name] for name, w in ws.items()}
        found = []
        for k in range(len(next(iter(ws.values())))):
            own = {name: r[k] for name, r in rest.items()}
            space = right_side_space(self.coarse, self.fine, own, self.vectors)
            corrected = TwoLevelInverse(
                self.fine, self.exact, self.shift, space, self.combination
            )
            one = corrected._apply_blocks({name: w[k : k + 1] for name, w in ws.items()})
            found.append(one)
        return {name: torch.cat([one[name] for one in found]) for name in ws}

    @property
    def formed(self) -> Never:
        """Raise ValueError, as every question about a matrix does: there is none."""
        raise ValueError(
            f"{self!r}: the coarse space {self.coarse!r} follows the right-hand side, so "
            "this is no matrix. Take products, or another space."
        )

    def block(self, row: str, column: str) -> Tensor:
        """Raise ValueError: there is no matrix."""
        return self.formed

    def inverse(self, damping: Damping) -> NetworkOperator:
        """Raise ValueError: there is no matrix."""
        return self.formed


@final
@dataclass(frozen=True, eq=False, repr=False)
class TwoLevel(NetworkOperator):
    """A block diagonal whose damped solves are corrected on a coarse space.

    Products, norms, traces and the diagonal are those of the block diagonal; the coarse
    level enters `solve`, `inverse` and `logdet` with a damping.

    Parameters
    ----------
    local
        The block diagonal.
    exact
        F, of which products are taken.
    coarse
        "nicolaides" (the constant of every layer), "spectral" (smallest eigenvectors of
        every local block), "residual" (K⁻¹ r of every layer, r what the fine level
        leaves) or "krylov" (K⁻¹ r, K⁻² r, …). The last two follow the right-hand side, so
        that the solve is not linear and there is no inverse matrix.
    combination
        "additive" or "multiplicative".
    vectors
        Directions a layer.

    References
    ----------
    Tselepidis et al. 2020, arXiv 2011.00573; Koroko et al. 2023, arXiv 2303.18083.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.operators.eigenform import Diagonal
    >>> one, two = (
    ...     BlockDiagonal({n: Diagonal(torch.full((1, 2), x)) for n in "ab"})
    ...     for x in (1.0, 2.0)
    ... )
    >>> op = TwoLevel(local=one, exact=two)
    >>> ws = {n: torch.ones(1, 2) for n in "ab"}
    >>> op.local.solve(ws, 1.0)["a"][0, 0].item()
    0.5
    >>> round(op.solve(ws, 1.0)["a"][0, 0].item(), 6)
    0.333333
    """

    local: BlockDiagonal
    exact: NetworkOperator
    coarse: Coarse = "nicolaides"
    combination: Combination = "multiplicative"
    vectors: int = 1
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        return self.local.weight_shapes

    @cached_property
    def formed(self) -> BlockDiagonal:
        """The block diagonal."""
        return self.local

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        return self.local._apply_blocks(ws)

    def diagonal_block(self, name: str) -> Operator:
        """Return the operator of one weight."""
        return self.local.diagonal_block(name)

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return −log det of the two-level inverse.

        Raises
        ------
        ValueError
            For a coarse space that follows the right-hand side.
        """
        return -self.inverse(damping).logdet()

    def inverse(self, damping: Damping) -> "TwoLevelInverse | AdaptiveTwoLevelInverse":
        """Return the two-level approximation of (F + λI)⁻¹.

        With `Factored` the fine level damps its factors; λ of the coarse level is the
        same. A coarse space that follows the right-hand side gives an operator that has
        products and nothing else.

        Raises
        ------
        IndefiniteError
            If a damped local block is not positive definite.
        """
        own = damping.value if isinstance(damping, Factored) else damping
        shift = tikhonov(own, repr(self))
        fine = self.local.inverse(damping)
        made = self.provenance.inverted
        if self.coarse in FOLLOWING:
            return AdaptiveTwoLevelInverse(
                fine, self.exact, shift, self.coarse, self.combination, self.vectors, made
            )
        space = fixed_space(self.coarse, self.local, self.vectors)
        return TwoLevelInverse(fine, self.exact, shift, space, self.combination, made)
