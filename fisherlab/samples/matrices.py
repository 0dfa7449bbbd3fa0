"""Per-example gradient matrices, held as they are or by groups of rows."""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.packed import symmetric_flops
from fisherlab.samples.base import WHOLE, Samples, counted_together, kept_once


@final
@dataclass(frozen=True, eq=False)
class MatrixSamples(Samples):
    """Hold D_vn explicitly: norm layers, bare parameters, recurrent or tied weights."""

    stored: Float[Tensor, "v n o i"]

    @cached_property
    def columns(self) -> int:
        """V."""
        return self.stored.shape[0]

    @cached_property
    def examples(self) -> int:
        """N."""
        return self.stored.shape[1]

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(o, i)."""
        return self.stored.shape[2], self.stored.shape[3]

    def some_columns(self, columns: slice) -> "MatrixSamples":
        """Return the samples of some columns."""
        return MatrixSamples(self.stored[columns])

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n o i"]:
        """Return the matrices of some examples."""
        return self.stored[:, part]

    def project(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k v n"]:
        """Return ⟨D_vn, w⟩."""
        flat = w.flatten(1) @ self.stored.flatten(0, 1).flatten(1).T
        return flat.unflatten(1, self.stored.shape[:2])

    def combine(self, c: Float[Tensor, "k v n"]) -> Float[Tensor, "k o i"]:
        """Return Σ c_vn D_vn."""
        flat = c.flatten(1) @ self.stored.flatten(0, 1).flatten(1)
        return flat.unflatten(1, self.weight_shape)

    @kept_once
    def squared_norms(self) -> Float[Tensor, "v n"]:
        """Return ‖D_vn‖²."""
        return self.stored.square().sum((2, 3))

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum (about half a product)."""
        size = self.weight_shape[0] * self.weight_shape[1]
        return symmetric_flops(size, self.total)

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix (half a product)."""
        return self.stored.numel() * self.total // 2

    def counted(self, *, needs_inputs: bool, entrywise: bool) -> tuple[Samples, ...]:
        """Return nothing where inputs are needed: they are not known here."""
        return () if needs_inputs else (self,)


@final
@dataclass(frozen=True, eq=False)
class GroupedSamples(Samples):
    """Hold D_vn = [D¹_vn; D²_vn; …]: grouped convolutions, projections in one weight.

    Parameters
    ----------
    groups
        The samples of each group, of equal d_in.
    """

    groups: tuple[Samples, ...]

    @cached_property
    def columns(self) -> int:
        """V."""
        return self.groups[0].columns

    @cached_property
    def examples(self) -> int:
        """N."""
        return self.groups[0].examples

    @cached_property
    def weight_shape(self) -> tuple[int, int]:
        """(o, i), o over all groups."""
        rows = sum(group.weight_shape[0] for group in self.groups)
        return rows, self.groups[0].weight_shape[1]

    def _split(self, w: Tensor) -> tuple[Tensor, ...]:
        """Cut the rows of weights (..., o, i) into groups."""
        return w.split([group.weight_shape[0] for group in self.groups], -2)

    def some_columns(self, columns: slice) -> "GroupedSamples":
        """Return the samples of some columns."""
        return GroupedSamples(tuple(g.some_columns(columns) for g in self.groups))

    def matrices(self, part: slice = WHOLE) -> Float[Tensor, "v n o i"]:
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

    def gram(self) -> Float[Tensor, "m m"]:
        """Return all inner products, added up over the groups."""
        total = self.groups[0].gram()
        for group in self.groups[1:]:
            total += group.gram()
        return total

    def dense_flops(self) -> int:
        """Count the multiply-adds of the dense sum: forming D, then half a product."""
        formed = sum(g.positions * g.weight_shape[0] for g in self.groups)
        forming = self.total * formed * self.weight_shape[1]
        return forming + super().dense_flops()

    def gram_flops(self) -> int:
        """Count the multiply-adds of the Gram matrix."""
        return sum(group.gram_flops() for group in self.groups)

    def counted(self, *, needs_inputs: bool, entrywise: bool) -> tuple[Samples, ...]:
        """Return those of all groups."""
        return counted_together(self.groups, needs_inputs, entrywise)
