"""A matrix over several weights that has nothing between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.operators.base import Operator, Provenance, column_inner, inner_product
from fisherlab.operators.dampings import Damping, Factored, tikhonov
from fisherlab.operators.network.base import (
    NetworkOperator,
    Shapes,
    Weights,
    same_blocks,
)
from fisherlab.operators.stacked import Apart, has_factors


@final
@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(Apart, NetworkOperator):
    r"""One operator a weight, zero between weights.

    .. math:: F = \mathrm{diag}(F_1, \ldots, F_L)

    A `Factored` damping shifts the factors of blocks with Kronecker terms and adds λI to
    the other blocks.

    Parameters
    ----------
    blocks
        Block name to its operator, in the order of the matrix; at least one.

    Raises
    ------
    ValueError
        For no blocks.

    Examples
    --------
    >>> from fisherlab.operators.eigenforms import Diagonal
    >>> ones = Diagonal(torch.ones(2, 3)), Diagonal(torch.ones(1, 4))
    >>> op = BlockDiagonal({"a": ones[0], "b": ones[1]})
    >>> op.shape, op.trace()
    ((10, 10), 10.0)
    """

    blocks: Mapping[str, Operator]
    provenance: Provenance = Provenance()

    def __post_init__(self) -> None:
        """Check that there are blocks."""
        if not self.blocks:
            raise ValueError("BlockDiagonal: at least one block is expected, none given.")

    @property
    def parts(self) -> tuple[Operator, ...]:  # type: ignore[override]
        """The operators of the blocks."""
        return tuple(self.blocks.values())

    @cached_property
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        return {name: op.weight_shape for name, op in self.blocks.items()}

    def _apply_blocks(self, ws: Weights) -> dict[str, Tensor]:
        return {name: op._apply(ws[name]) for name, op in self.blocks.items()}

    def diagonal_block(self, name: str) -> Operator:
        """Return the operator of one weight."""
        return self.blocks[name]

    def _dense(self) -> Float[Tensor, "p p"]:
        return torch.block_diag(*(op.to_dense() for op in self.blocks.values()))

    def diagonal(self) -> Float[Tensor, "p 1"]:
        """Return the diagonal; `split` cuts it into blocks."""
        return self.join({name: op.diagonal() for name, op in self.blocks.items()})

    def inverse(self, damping: Damping) -> "BlockDiagonal":
        """Return the damped inverse of every block.

        Raises
        ------
        IndefiniteError
            If a damped block is not positive definite; the block is named.
        """
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        inverses = {
            name: op.inverse(self._own(op, damping)) for name, op in self.blocks.items()
        }
        return BlockDiagonal(inverses, made)

    def _own(self, part: Operator, damping: Damping) -> Damping:
        """Return the damping of one block: λ where it has no factors to shift."""
        if not isinstance(damping, Factored):
            return tikhonov(damping, part)
        return damping if has_factors(part) else damping.value

    def _solve_blocks(self, ws: Weights, damping: Damping) -> dict[str, Tensor]:
        return {
            name: op._solve(ws[name], self._own(op, damping))
            for name, op in self.blocks.items()
        }


@inner_product(BlockDiagonal, Operator)
def _block_diagonal_any(a: BlockDiagonal, b: Operator) -> float:
    if not isinstance(b, NetworkOperator) or not same_blocks(a, b):
        return column_inner(a, b)
    return sum(op.inner(b.diagonal_block(name)) for name, op in a.blocks.items())
