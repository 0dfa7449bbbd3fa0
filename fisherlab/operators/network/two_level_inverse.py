"""K⁻¹ corrected on a few directions per layer, and the coarse spaces of those."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import Label, eigh, factorised
from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.dampings import Damping, tikhonov
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.operators.network.base import NetworkOperator, Shapes, Weights
from fisherlab.operators.network.block_diagonal import BlockDiagonal
from fisherlab.operators.network.whole import WholeNetwork, tikhonov_inverse

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
        now = fine._apply_blocks(now)
        for name, w in now.items():
            found[name].append(w[0] / w.norm().clamp_min(torch.finfo(w.dtype).tiny))
    return {name: _orthonormal(torch.stack(ws)) for name, ws in found.items()}


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
            msg = (
                f"{call} of {self!r}: the multiplicative two-level inverse is not "
                "symmetric. Use combination='additive', or products."
            )
            raise ValueError(msg)

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
