"""The second pass of eigenvalue-corrected methods: second moments in a fixed basis."""

from dataclasses import dataclass, replace
from typing import final

from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators.sums import Sums, add
from fisherlab.numerics.linalg import eigh
from fisherlab.operators import KroneckerEigen, Provenance
from fisherlab.statistics import LayerStatistics


@final
@dataclass(frozen=True, eq=False)
class Projection:
    """Bases that stand, and the squares of rotated gradients that are still summed."""

    row_basis: Float[Tensor, "o o"]
    column_basis: Float[Tensor, "i i"]
    provenance: Provenance
    squares: Sums | None = None

    @classmethod
    def onto(
        cls,
        rows: Float[Tensor, "o o"],
        cols: Float[Tensor, "i i"],
        provenance: Provenance,
    ) -> "Projection":
        """Begin with the eigenvectors of two factors."""
        _, row_basis = eigh(rows, f"the row factor of {provenance}")
        _, column_basis = eigh(cols, f"the column factor of {provenance}")
        return cls(row_basis, column_basis, provenance)

    def seeing(self, statistics: LayerStatistics) -> "Projection":
        """Add Σ (Uᵀ D V)∘² of a chunk."""
        more = statistics.samples.rotated_squares(self.row_basis, self.column_basis)
        return replace(self, squares=add(self.squares, Sums.of(statistics, more)))

    def __add__(self, other: "Projection") -> "Projection":
        """Add up two parts of the data in the same basis."""
        if self.squares is None or other.squares is None:
            return other if self.squares is None else self
        return replace(self, squares=self.squares + other.squares)

    def finished(self) -> KroneckerEigen:
        """Divide by the examples."""
        assert self.squares is not None
        entries = self.squares.tensors[0] / self.squares.count
        return KroneckerEigen(self.row_basis, self.column_basis, entries, self.provenance)
