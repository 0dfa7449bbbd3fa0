"""A matrix over several weights that has nothing between them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.operators.base import Operator, Provenance, inner_product
from fisherlab.operators.dampings import Damping, Factored, tikhonov
from fisherlab.operators.network.base import (
    NetworkOperator,
    Shapes,
    Weights,
    column_inner,
    same_blocks,
)
from fisherlab.operators.network.whole import WholeNetwork
from fisherlab.operators.stacked import Stacked


@final
@dataclass(frozen=True, eq=False, repr=False)
class BlockDiagonal(NetworkOperator):
    """One operator a weight, zero between weights.

    A `Factored` damping shifts the factors of blocks with Kronecker terms and adds λI to
    the other blocks.

    Parameters
    ----------
    blocks
        Block name to its operator, in the order of the matrix; at least one.

    Examples
    --------
    >>> from fisherlab.operators.diagonal import Diagonal
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
    def weight_shapes(self) -> Shapes:
        """Block name to (d_out, d_in)."""
        return {name: op.weight_shape for name, op in self.blocks.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The precision."""
        return next(iter(self.blocks.values())).dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        return next(iter(self.blocks.values())).device

    @property
    def stored_numbers(self) -> int:
        """Those of the blocks."""
        return sum(op.stored_numbers for op in self.blocks.values())

    @property
    def product_flops(self) -> int:
        """Those of the blocks."""
        return sum(op.product_flops for op in self.blocks.values())

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

    def trace(self) -> float:
        """Return the sum of the blocks' traces."""
        return sum(op.trace() for op in self.blocks.values())

    def frobenius_norm(self) -> float:
        """Return (Σ_b ‖M_b‖²)^½."""
        return math.hypot(*(op.frobenius_norm() for op in self.blocks.values()))

    def eigenvalues(self) -> Float[Tensor, " p"]:
        """Return the eigenvalues of all blocks, descending."""
        values = torch.cat([op.eigenvalues() for op in self.blocks.values()])
        return values.sort(descending=True).values

    def logdet(self, damping: Damping = 0.0) -> float:
        """Return the sum of the blocks' log determinants.

        Raises
        ------
        NumericalError
            If a damped block is not positive definite.
        """
        if isinstance(damping, Factored):
            made = self.inverse(damping).blocks.values()
            return -sum(op._log_volume() for op in made)
        shift = tikhonov(damping, self)
        return sum(op.logdet(shift) for op in self.blocks.values())

    def inverse(self, damping: Damping) -> "BlockDiagonal":
        """Return the damped inverse of every block.

        Raises
        ------
        IndefiniteError
            If a damped block is not positive definite; the block is named.
        """
        made = self.provenance.by(f"inverse of {self.provenance.method}")
        inverses = {
            name: op.inverse(_own_damping(op, damping)) for name, op in self.blocks.items()
        }
        return BlockDiagonal(inverses, made)

    def _solve_blocks(self, ws: Weights, damping: Damping) -> dict[str, Tensor]:
        return {
            name: op.solve(ws[name], _own_damping(op, damping))
            for name, op in self.blocks.items()
        }

    def to(self, dtype: torch.dtype) -> "BlockDiagonal":
        """Return the blocks in another precision."""
        return replace(
            self, blocks={name: op.to(dtype) for name, op in self.blocks.items()}
        )


def _own_damping(op: Operator, damping: Damping) -> Any:
    """Return the damping for one block: λ where it has no factors to shift."""
    if not isinstance(damping, Factored):
        return tikhonov(damping, op)
    return damping if _has_factors(op) else damping.value


def _has_factors(op: Operator) -> bool:
    if isinstance(op, Stacked):
        return all(_has_factors(part) for part in op.parts)
    return hasattr(op, "damped")


@inner_product(BlockDiagonal, WholeNetwork)
@inner_product(BlockDiagonal, Operator)
def _block_diagonal_any(a: BlockDiagonal, b: Operator) -> float:
    if not isinstance(b, NetworkOperator) or not same_blocks(a, b):
        return column_inner(a, b)
    return sum(op.inner(b.diagonal_block(name)) for name, op in a.blocks.items())
