"""Matrices over several weights with nothing between blocks, or between groups of them."""

from collections.abc import Mapping, Sequence
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
    WholeNetwork,
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
    >>> from fisherlab.operators.eigenform import Diagonal
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
        made = self.provenance.inverted
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
    >>> from fisherlab.operators.eigenform import Diagonal
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
        made = self.provenance.inverted
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
