"""Network operators over different blocks, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.operators.base import Operator, Provenance, column_inner, inner_product
from fisherlab.operators.dampings import Damping
from fisherlab.operators.network.base import (
    NetworkOperator,
    Shapes,
    Weights,
    same_blocks,
)
from fisherlab.operators.network.whole import WholeNetwork
from fisherlab.operators.stacked import Apart


@final
@dataclass(frozen=True, eq=False, repr=False)
class DirectSum(Apart, NetworkOperator):
    """Operators that share no block, zero between them, in any order of the blocks.

    Parameters
    ----------
    parts
        The operators.
    order
        All block names, in the order of the matrix.

    Examples
    --------
    >>> from fisherlab.operators.eigenforms import Diagonal
    >>> from fisherlab.operators.network.block_diagonal import BlockDiagonal
    >>> one, two = (BlockDiagonal({n: Diagonal(torch.ones(1, 2))}) for n in "ab")
    >>> DirectSum((one, two), ("b", "a")).trace()
    4.0
    """

    parts: Sequence[NetworkOperator]
    order: Sequence[str]
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        """Check that the order names every block once."""
        held = [name for part in self.parts for name in part.weight_shapes]
        if sorted(held) != sorted(self.order):
            msg = f"DirectSum: parts hold {held}, but the order names {list(self.order)}."
            raise ValueError(msg)

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        known = {n: shape for part in self.parts for n, shape in part.weight_shapes.items()}
        return {name: known[name] for name in self.order}

    def part_of(self, name: str) -> NetworkOperator:
        """Return the part that holds a block."""
        return next(part for part in self.parts if name in part.weight_shapes)

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for part in self.parts:
            out |= part._apply_blocks({name: ws[name] for name in part.weight_shapes})
        return out

    def diagonal_block(self, name: str) -> Operator:
        """Return the block of one weight."""
        return self.part_of(name).diagonal_block(name)

    def _dense(self) -> Float[Tensor, "p p"]:
        p, at = self.shape[0], self.offsets
        out = torch.zeros(p, p, dtype=self.dtype, device=self.device)
        for part in self.parts:
            own, dense = part.offsets, part.to_dense()
            for row in own:
                for column in own:
                    out[at[row], at[column]] = dense[own[row], own[column]]
        return out

    def diagonal(self) -> Float[Tensor, "p 1"]:
        """Return the diagonal; `split` cuts it into blocks."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found |= part.split(part.diagonal())
        return self.join(found)

    def inverse(self, damping: Damping) -> "DirectSum":
        """Return the damped inverse of every part.

        Raises
        ------
        NumericalError
            If a damped part is not positive definite.
        """
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        return DirectSum([part.inverse(damping) for part in self.parts], self.order, made)

    def _solve_blocks(self, ws: Weights, damping: Damping) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for part in self.parts:
            own = {name: ws[name] for name in part.weight_shapes}
            out |= part._solve_blocks(own, damping)
        return out

    def inner_with(self, other: NetworkOperator) -> float:
        """Return ⟨self, other⟩ for an operator over the same blocks in the same order."""
        total = 0.0
        if isinstance(other, DirectSum) and _same_parts(self, other):
            return sum(a.inner(b) for a, b in zip(self.parts, other.parts, strict=True))
        for part in self.parts:
            total += sum(
                float((part.block(row, column) * other.block(row, column)).sum())
                for row in part.weight_shapes
                for column in part.weight_shapes
            )
        return total


def _same_parts(a: DirectSum, b: DirectSum) -> bool:
    return len(a.parts) == len(b.parts) and all(
        same_blocks(left, right) for left, right in zip(a.parts, b.parts, strict=True)
    )


@inner_product(DirectSum, WholeNetwork)
def _direct_sum_whole(a: DirectSum, b: WholeNetwork) -> float:
    return b.whole.inner(a)


@inner_product(DirectSum, Operator)
def _direct_sum_any(a: DirectSum, b: Operator) -> float:
    if not isinstance(b, NetworkOperator) or not same_blocks(a, b):
        return column_inner(a, b)
    return a.inner_with(b)
