"""The diagonal whose entries are square roots of averaged squares: Adam's."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

from jaxtyping import Float
from torch import Tensor

from fisherlab.operators.base import Provenance
from fisherlab.operators.derived import FromState
from fisherlab.operators.eigenforms import Diagonal


@final
@dataclass(frozen=True, eq=False, repr=False)
class RootDiagonal(FromState):
    """diag(√v) with v ≥ 0 averaged in place of the matrix.

    Parameters
    ----------
    squares
        v, shape (d_out, d_in).

    Examples
    --------
    >>> import torch
    >>> op = RootDiagonal(torch.full((1, 2), 9.0))
    >>> op.trace(), op.solve(torch.ones(1, 2), damping=1.0).tolist()
    (6.0, [[0.25, 0.25]])
    """

    squares: Float[Tensor, "o i"]
    provenance: Provenance = Provenance()

    @property
    def weight_shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.squares.shape[0], self.squares.shape[1]

    @property
    def state(self) -> tuple[Tensor]:
        """The squares."""
        return (self.squares,)

    def with_state(self, state: Sequence[Tensor]) -> "RootDiagonal":
        """Return the root of other squares."""
        return replace(self, squares=state[0])

    @cached_property
    def formed(self) -> Diagonal:
        """The diagonal matrix."""
        return Diagonal(self.squares.sqrt(), self.provenance)
