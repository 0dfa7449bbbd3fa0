"""The inverse of a chain of layers: block tridiagonal, applied in matrix form."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import kron
from fisherlab.operators.base import Provenance
from fisherlab.operators.dampings import Damping, tikhonov
from fisherlab.operators.dense import Dense
from fisherlab.operators.kronecker_congruence import KroneckerCongruence
from fisherlab.operators.network.base import NetworkOperator, Shapes, Weights
from fisherlab.operators.network.whole import WholeNetwork, tikhonov_inverse

Link = tuple[Float[Tensor, "_ _"], Float[Tensor, "_ _"]]  # row part, column part
Part = tuple[Tensor, Tensor, Tensor]  # bases R, C and entries e of (R ⊗ C) diag(e) (R ⊗ C)ᵀ


@final
@dataclass(frozen=True, eq=False, repr=False)
class BlockTridiagonalInverse(NetworkOperator):
    """ΞᵀΛΞ with Ξ = I − Ψ on the super-diagonal and Λ = diag(Σ_1⁻¹, …, Σ_ℓ⁻¹).

    Parameters
    ----------
    middles
        Layer name to Σ_i⁻¹, in forward order.
    regressions
        (Ψ^G_i, Ψ^A_i) of every pair of neighbours.

    Examples
    --------
    >>> from fisherlab.operators.kronecker_congruence import KroneckerCongruence
    >>> one = torch.ones(1, 1)
    >>> middles = {n: KroneckerCongruence(one, one, one) for n in "ab"}
    >>> BlockTridiagonalInverse(middles, [(one, 0.5 * one)]).to_dense().tolist()
    [[1.0, -0.5], [-0.5, 1.25]]
    """

    middles: Mapping[str, KroneckerCongruence]
    regressions: Sequence[Link]
    provenance: Provenance = Provenance()

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Layer name to (d_out, d_in)."""
        return {name: op.weight_shape for name, op in self.middles.items()}

    @property
    def product_flops(self) -> int:
        """Four products a layer and one each way along every link."""
        shapes = list(self.weight_shapes.values())
        own = sum(op.product_flops for op in self.middles.values())
        links = sum(o * p * j + o * i * j for (o, i), (p, j) in pairwise(shapes))
        return own + 2 * links

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        """Return Ξᵀ Λ Ξ w."""
        names, middle = list(self.middles), {}
        for number, name in enumerate(names):
            w = ws[name]
            if number < len(self.regressions):
                psi, phi = self.regressions[number]
                w = w - psi @ ws[names[number + 1]] @ phi.T
            middle[name] = self.middles[name]._apply(w)
        out = dict(middle)
        for number, (psi, phi) in enumerate(self.regressions):
            later = names[number + 1]
            out[later] = out[later] - psi.T @ middle[names[number]] @ phi
        return out

    def _parts(self, name: str) -> list[Part]:
        """Return the terms of one diagonal block: Λ_i and Ψᵀ_{i-1} Λ_{i-1} Ψ_{i-1}."""
        names = list(self.middles)
        number, own = names.index(name), self.middles[name]
        parts = [(own.row_basis, own.column_basis, own.entries)]
        if number:
            psi, phi = self.regressions[number - 1]
            before = self.middles[names[number - 1]]
            parts.append(
                (psi.T @ before.row_basis, phi.T @ before.column_basis, before.entries)
            )
        return parts

    def diagonal_block(self, name: str) -> Dense:
        """Return one diagonal block, dense."""
        matrix = sum((_formed(part) for part in self._parts(name)), torch.zeros(()))
        matrix = matrix.to(dtype=self.dtype, device=self.device)
        return Dense(matrix, self.weight_shapes[name], self.provenance)

    def _beside(self, number: int) -> Float[Tensor, "p q"]:
        """Return the dense block −Λ_i Ψ_i right of the diagonal."""
        psi, phi = self.regressions[number]
        own = list(self.middles.values())[number]
        left = kron(own.row_basis, own.column_basis) * own.entries.flatten()
        right = kron(own.row_basis.T @ psi, own.column_basis.T @ phi)
        return -(left @ right)

    def _dense(self) -> Float[Tensor, "p p"]:
        p = self.shape[0]
        out = torch.zeros(p, p, dtype=self.dtype, device=self.device)
        names, at = list(self.middles), self.offsets
        for name in names:
            out[at[name], at[name]] = self.diagonal_block(name).matrix
        for number in range(len(self.regressions)):
            above, below = at[names[number]], at[names[number + 1]]
            block = self._beside(number)
            out[above, below], out[below, above] = block, block.T
        return out

    def diagonal(self) -> Float[Tensor, "p 1"]:
        """Return the diagonal; `split` cuts it into blocks."""
        found = {}
        for name in self.middles:
            parts = (r.square() @ e @ c.square().T for r, c, e in self._parts(name))
            found[name] = torch.stack(list(parts)).sum(0)
        return self.join(found)

    def trace(self) -> float:
        """Return the trace."""
        return float(self.diagonal().sum(dtype=torch.float64))

    def frobenius_norm(self) -> float:
        """Return √ΣM² from the bases, block by block of the tridiagonal."""
        total = sum(
            _overlap(left, right)
            for name in self.middles
            for left in self._parts(name)
            for right in self._parts(name)
        )
        return max(total + 2 * sum(self._squares_beside()), 0.0) ** 0.5

    def _squares_beside(self) -> Iterator[float]:
        """Yield ‖Λ_i Ψ_i‖² = tr(Λ_i Ψ_i Ψ_iᵀ Λ_i)."""
        for own, (psi, phi) in zip(self.middles.values(), self.regressions, strict=False):
            r, c, e = own.row_basis, own.column_basis, own.entries
            rows = (r.T @ r) * (r.T @ psi @ psi.T @ r)
            cols = (c.T @ c) * (c.T @ phi @ phi.T @ c)
            yield float((e * (rows @ e @ cols)).sum(dtype=torch.float64))

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return log det; Σ_i log det Σ_i⁻¹ if the damping is 0.

        Raises
        ------
        NumericalError
            If the damped matrix is not positive definite.
        """
        shift = tikhonov(damping, self)
        if shift:
            return super().logdet(shift)
        return sum(op._log_volume() for op in self.middles.values())

    def inverse(self, damping: Damping) -> WholeNetwork:
        """Return (M + damping·I)⁻¹: dense up to 2000 rows, else iterative."""
        return tikhonov_inverse(self, tikhonov(damping, self), None)


def _formed(part: Part) -> Tensor:
    rows, cols, entries = part
    basis = kron(rows, cols)
    return (basis * entries.flatten()) @ basis.T


def _overlap(left: Part, right: Part) -> float:
    """Return ⟨X, Y⟩ of two terms from the products of their bases."""
    rows, cols = left[0].T @ right[0], left[1].T @ right[1]
    return float(
        (left[2] * (rows.square() @ right[2] @ cols.square().T)).sum(dtype=torch.float64)
    )
