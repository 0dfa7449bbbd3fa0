"""Sums over examples that grow chunk by chunk and add up over parts of the data."""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fisherlab.operators import Provenance
from fisherlab.statistics import LayerStatistics


@final
@dataclass(frozen=True, eq=False)
class Sums:
    """Tensors summed over examples and columns, with the examples they count.

    Parameters
    ----------
    tensors
        The sums, in the method's own order.
    count, positions
        Examples, and Σ_n T_n.
    weight_shape, provenance
        Of the block.
    looked_up
        Whether the rows of the weight belong to the inputs: an embedding.
    precision
        That of the statistics, where the sums are wider.
    """

    tensors: tuple[Tensor, ...]
    count: int
    positions: int
    weight_shape: tuple[int, int]
    provenance: Provenance
    looked_up: bool = False
    precision: torch.dtype | None = None

    @classmethod
    def of(cls, statistics: LayerStatistics, *tensors: Tensor) -> "Sums":
        """Begin with the sums of one chunk."""
        s = statistics
        return cls(
            tensors,
            s.count,
            s.positions,
            s.weight_shape,
            s.provenance,
            s.tokens is not None,
        )

    def counting(self, count: int, positions: int) -> "Sums":
        """Count further examples, whose numbers the tensors have taken up in place."""
        count += self.count
        return replace(
            self,
            count=count,
            positions=self.positions + positions,
            provenance=replace(self.provenance, examples=count),
        )

    def __add__(self, other: "Sums") -> "Sums":
        """Add up two parts of the data."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        added = replace(self, tensors=tuple(a + b for a, b in pairs))
        return added.counting(other.count, other.positions)


def add(state: Sums | None, more: Sums) -> Sums:
    """Add a chunk to a state that may not have begun."""
    return more if state is None else state + more
