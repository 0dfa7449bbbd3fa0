"""Samples of several weights, seen as samples of one long vector."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.memory import chunks, spans
from fisherlab.samples.base import WHOLE, Samples
from fisherlab.samples.cross import cross_product, gram_block
from fisherlab.samples.outer import OuterSamples

GRAM_ROWS = 2048  # samples per side of a block of the Gram matrix
DENSE_ROWS = 4000  # sums up to this size may be formed to take their norm


@final
@dataclass(frozen=True, eq=False)
class StackedSamples(Samples):
    """Stack D_vn of several weights below each other: vectors (p, 1), p = Σ p_b.

    The columns and the examples of all weights must match. Products and inner products
    are sums over the weights; no vector of length p is held per sample.

    Examples
    --------
    >>> one = OuterSamples(torch.ones(4, 3), torch.ones(1, 4, 2))
    >>> StackedSamples((one, one)).weight_shape
    (12, 1)
    """

    pieces: tuple[Samples, ...]

    @cached_property
    def columns(self) -> int:
        """V."""
        return self.pieces[0].columns

    @cached_property
    def examples(self) -> int:
        """N."""
        return self.pieces[0].examples

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """p_b of every weight."""
        return tuple(s.weight_shape[0] * s.weight_shape[1] for s in self.pieces)

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(p, 1)."""
        return sum(self.sizes), 1

    def some_columns(self, columns: slice) -> "StackedSamples":
        """Return the samples of some columns."""
        return StackedSamples(tuple(s.some_columns(columns) for s in self.pieces))

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n p 1"]:
        """Form the long vectors of some examples."""
        return torch.cat([s.matrices(part).flatten(2) for s in self.pieces], 2)[..., None]

    def project(self, w: Float[Tensor, "k p 1"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩, a sum over the weights."""
        total: Tensor | None = None
        for piece, own in zip(self.pieces, w.split(self.sizes, 1), strict=True):
            value = piece.project(own.reshape(len(w), *piece.weight_shape))
            total = value if total is None else total + value
        assert total is not None
        return total

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k p 1"]:
        """Return Σ c_vn D_vn."""
        return torch.cat([s.combine(c).flatten(1) for s in self.pieces], 1)[..., None]

    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖²."""
        return torch.stack([piece.squared_norms() for piece in self.pieces]).sum(0)

    def squares(self) -> Float[Tensor, "p 1"]:
        """Return Σ D∘D."""
        return torch.cat([piece.squares().flatten() for piece in self.pieces])[:, None]

    def row_side(self, middle: Float[Tensor, "1 1"]) -> Float[Tensor, "p p"]:
        """Return Σ D M Dᵀ."""
        p = self.weight_shape[0]
        out = torch.empty(p, p, dtype=self.dtype, device=self.device)
        return self.add_dense_(out) * middle

    def column_side(self, middle: Float[Tensor, "p p"]) -> Float[Tensor, "1 1"]:
        """Return Σ Dᵀ M D."""
        return self.summed(lambda d: (d * (middle @ d)).sum(0)).sum(0, keepdim=True)

    def kronecker_inner(
        self, rows_factor: Float[Tensor, "p p"], cols_factor: Float[Tensor, "1 1"]
    ) -> float:
        """Return Σ ⟨D, rows D cols⟩."""
        return float(self.column_side(rows_factor) * cols_factor)

    def add_dense_(
        self, out: Float[Tensor, "p p"], scale: float = 1.0
    ) -> Float[Tensor, "p p"]:
        """Write scale · Σ vec(D) vec(D)ᵀ into `out`, block by block."""
        places = spans(self.sizes)
        for number, (piece, at) in enumerate(zip(self.pieces, places, strict=True)):
            own = torch.empty(2 * [at.stop - at.start], dtype=out.dtype, device=out.device)
            out[at, at] = piece.add_dense_(own, scale)
            for other, to in zip(self.pieces[:number], places, strict=False):
                block = cross_product(piece, other).mul_(scale)
                out[at, to], out[to, at] = block, block.T
        return out

    def gram(self) -> Float[Tensor, "m m"]:
        """Return all inner products, a sum over the weights, v-major."""
        total = self.pieces[0].gram()
        for piece in self.pieces[1:]:
            total += piece.gram()
        return total

    def squared_norm(self) -> float:
        """Return Σ ⟨D_a, D_b⟩², from the sum itself where that is small and cheaper."""
        p = self.weight_shape[0]
        if p <= DENSE_ROWS and self.dense_flops() < self.gram_flops():
            out = torch.empty(p, p, dtype=self.dtype, device=self.device)
            return float(self.add_dense_(out).square().sum(dtype=torch.float64))
        return sum(
            weight * float(block.square().sum(dtype=torch.float64))
            for weight, block in self._gram_blocks()
        )

    def _gram_blocks(self) -> Iterator[tuple[float, Tensor]]:
        pieces = list(chunks(self.examples, GRAM_ROWS // max(1, self.columns)))
        for at, left in enumerate(pieces):
            for right in pieces[at:]:
                block = gram_block(self.pieces[0], left, right)
                for piece in self.pieces[1:]:
                    block += gram_block(piece, left, right)
                yield 1.0 if left == right else 2.0, block

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum; outer products add columns first."""
        p = self.weight_shape[0]
        outer = all(isinstance(piece, OuterSamples) for piece in self.pieces)
        return self.examples * (1 if outer else self.columns) * p * p // 2

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix."""
        return sum(piece.gram_flops() for piece in self.pieces)
