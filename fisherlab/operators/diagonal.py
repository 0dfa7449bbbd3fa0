"""A diagonal matrix."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.linalg import require_positive
from fisherlab.operators.base import Operator, Provenance, inner_product
from fisherlab.operators.dampings import Damping, tikhonov


@final
@dataclass(frozen=True, eq=False, repr=False)
class Diagonal(Operator):
    """A diagonal matrix over a weight, stored in the weight's shape.

    Examples
    --------
    >>> op = Diagonal(torch.ones(2, 3))
    >>> op.solve(torch.ones(2, 3), damping=1.0)[0, 0].item()
    0.5
    """

    entries: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.entries.shape[0], self.entries.shape[1]

    def _apply(self, w: Float[Tensor, "k o i"]) -> Float[Tensor, "k o i"]:
        return self.entries * w

    def _dense(self) -> Float[Tensor, "p p"]:
        return torch.diag(self.entries.flatten())

    def diagonal(self) -> Float[Tensor, "o i"]:
        """Return the diagonal."""
        return self.entries

    def trace(self) -> float:
        """Return the trace."""
        return float(self.entries.sum(dtype=torch.float64))

    def frobenius_norm(self) -> float:
        """Return √ΣM²."""
        return float(torch.linalg.vector_norm(self.entries, dtype=torch.float64))

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return the entries, descending."""
        return self.entries.flatten().sort(descending=True).values

    def _spectra(self) -> Iterator[Float[Tensor, "p 1"]]:
        yield self.entries.flatten()[:, None]

    def inverse(self, damping: Damping) -> "Diagonal":
        """Return the reciprocal of entries + damping.

        Raises
        ------
        IndefiniteError
            If an entry plus the damping is not positive.
        """
        damping = tikhonov(damping, self)
        shifted = self.entries + damping
        require_positive(self.entries.flatten()[:, None], damping, repr(self))
        made = self.provenance.by(f"inverse of {self.provenance.method or 'Diagonal'}")
        return Diagonal(shifted.reciprocal(), made)


@inner_product(Diagonal, Operator)
def _diagonal_any(a: Diagonal, b: Operator) -> float:
    return float((a.entries * b.diagonal()).sum(dtype=torch.float64))
