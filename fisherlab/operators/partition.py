"""Partitions of the entries of one weight into blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Int
from torch import Tensor


@final
@dataclass(frozen=True, eq=False)
class Partition:
    """A partition of the entries of a weight into blocks, grouped by block size.

    Parameters
    ----------
    weight_shape
        (d_out, d_in).
    groups
        Index tables (B, k): row b lists the positions in ``vec(w)`` of block b.

    Examples
    --------
    >>> Partition.by_row((2, 3)).groups[0].tolist()
    [[0, 1, 2], [3, 4, 5]]
    """

    weight_shape: tuple[int, int]
    groups: Sequence[Int[Tensor, "_ _"]]

    def __post_init__(self) -> None:
        """Check that the groups name every entry once."""
        p = self.weight_shape[0] * self.weight_shape[1]
        named = torch.cat([group.flatten() for group in self.groups])
        if (
            len(named) != p
            or len(torch.unique(named)) != p
            or (p and int(named.max()) >= p)
        ):
            msg = (
                f"Partition of a weight of shape {self.weight_shape}: the groups name "
                f"{len(torch.unique(named))} of {p} entries, {len(named)} times in "
                "all. Every entry must be named once."
            )
            raise ValueError(msg)

    @classmethod
    def by_row(cls, weight_shape: tuple[int, int]) -> "Partition":
        """Make one block per output: all its inputs and its bias."""
        return cls(weight_shape, (_positions(weight_shape),))

    @classmethod
    def by_kernel(
        cls, weight_shape: tuple[int, int], kernel: int, bias: bool
    ) -> "Partition":
        """Make one block per (output, input) kernel; biases are blocks of size one."""
        table = _positions(weight_shape)
        weights = table[:, :-1] if bias else table
        groups = [weights.reshape(-1, kernel)]
        return cls(weight_shape, (*groups, table[:, -1:]) if bias else tuple(groups))

    @cached_property
    def is_by_row(self) -> bool:
        """Whether the blocks are the rows of the weight, in order."""
        return len(self.groups) == 1 and self.groups[0].shape == self.weight_shape

    @property
    def stored_numbers(self) -> int:
        """Free numbers of all symmetric blocks."""
        return sum(len(g) * g.shape[1] * (g.shape[1] + 1) // 2 for g in self.groups)


def _positions(weight_shape: tuple[int, int]) -> Int[Tensor, "o i"]:
    return torch.arange(weight_shape[0] * weight_shape[1]).view(weight_shape)


def same_partition(a: Partition, b: Partition) -> bool:
    """Tell whether two partitions list the same blocks in the same order."""
    return len(a.groups) == len(b.groups) and all(
        torch.equal(g, h) for g, h in zip(a.groups, b.groups, strict=True)
    )
