"""Samples of a weight whose rows fall into groups with inputs of their own."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.samples import rows
from fisherlab.samples.base import cast_once
from fisherlab.samples.matrices import column_product, row_product
from fisherlab.samples.outer import OuterSamples
from fisherlab.samples.shared import SharedSamples


@final
@dataclass(frozen=True, eq=False)
class GroupedSamples:
    """Hold D_vn = [D¹_vn; D²_vn; …]: grouped and depthwise convolutions.

    Parameters
    ----------
    groups
        The samples of each group, of equal shapes.
    """

    groups: tuple[OuterSamples | SharedSamples, ...]

    @property
    def columns(self) -> int:
        """V."""
        return self.groups[0].columns

    @property
    def examples(self) -> int:
        """N."""
        return self.groups[0].examples

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(o, i), o over all groups."""
        o, i = self.groups[0].weight_shape
        return len(self.groups) * o, i

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return self.groups[0].dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.groups[0].device

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(group.nbytes for group in self.groups)

    @cast_once
    def to(self, dtype: torch.dtype) -> "GroupedSamples":
        """Return the samples in another precision."""
        return GroupedSamples(tuple(group.to(dtype) for group in self.groups))

    def _split(self, w: Tensor) -> tuple[Tensor, ...]:
        """Cut the rows of weights (..., o, i) into groups."""
        return w.split(self.groups[0].weight_shape[0], -2)

    def some_columns(self, columns: slice) -> "GroupedSamples":
        """Return the samples of some columns."""
        return GroupedSamples(tuple(g.some_columns(columns) for g in self.groups))

    def matrices(self, part: slice = slice(None)) -> Float[Tensor, "v n o i"]:
        """Form the matrices of some examples."""
        return torch.cat([group.matrices(part) for group in self.groups], 2)

    def project(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩, added up over the groups."""
        pairs = zip(self.groups, self._split(w), strict=True)
        return torch.stack([group.project(rows_) for group, rows_ in pairs]).sum(0)

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k o i"]:
        """Return Σ c_vn D_vn."""
        return torch.cat([group.combine(c) for group in self.groups], 1)

    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖²."""
        return torch.stack([group.squared_norms() for group in self.groups]).sum(0)

    def squares(self) -> Float[Tensor, "o i"]:
        """Return Σ D∘D."""
        return torch.cat([group.squares() for group in self.groups])

    def rotated_squares(
        self, rows_basis: Float[Tensor, "o r"], cols_basis: Float[Tensor, "i c"]
    ) -> Float[Tensor, "r c"]:
        """Return Σ (rowsᵀ D cols)∘²."""
        return rows.summed(self, lambda d: (rows_basis.T @ d @ cols_basis).square().sum(0))

    def row_side(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, "o o"]:
        """Return Σ D M Dᵀ, between groups too."""
        return rows.summed(self, lambda d: row_product(d, middle))

    def column_side(self, middle: Float[Tensor, "o o"]) -> Float[Tensor, "i i"]:
        """Return Σ Dᵀ M D, between groups too."""
        return rows.summed(self, lambda d: column_product(d, middle))

    def kronecker_inner(
        self, rows_factor: Float[Tensor, "o o"], cols_factor: Float[Tensor, "i i"]
    ) -> float:
        """Return Σ ⟨D, rows D cols⟩."""
        return float((self.row_side(cols_factor) * rows_factor).sum())

    def add_dense_(
        self, out: Float[Tensor, "p p"], scale: float = 1.0
    ) -> Float[Tensor, "p p"]:
        """Write scale · Σ vec(D) vec(D)ᵀ into `out`."""
        return rows.add_dense_(self, out, scale)

    def gram(self) -> Float[Tensor, "m m"]:
        """Return all inner products, added up over the groups."""
        total = self.groups[0].gram()
        for group in self.groups[1:]:
            total += group.gram()
        return total

    def squared_norm(self) -> float:
        """Return Σ ⟨D_a, D_b⟩²."""
        return rows.squared_norm(self)

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum: forming D, then half a product."""
        return self._forming() + self.columns * self.examples * self._size**2 // 2

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix."""
        return sum(group.gram_flops() for group in self.groups)

    @property
    def _size(self) -> int:
        o, i = self.weight_shape
        return o * i

    def _forming(self) -> int:
        first = self.groups[0]
        positions = first.inputs.shape[1] if isinstance(first, SharedSamples) else 1
        return self.columns * self.examples * positions * self._size
