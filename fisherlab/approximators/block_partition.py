"""Rules that cut the weight of any layer into blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import final

import torch

from fisherlab.layers import Block
from fisherlab.operators import Partition
from fisherlab.showing import shown

Rule = Callable[[Block], Partition]


def partition(block: Block) -> Partition:
    """Return the mini-blocks of the paper.

    Convolutions: one block per (output, input) kernel, biases alone. Everything else
    with columns: one block per output with all its inputs and its bias, which are the
    columns of a weight stored (in, out) (an embedding: one per row of the table). Norm
    layers and bare vectors: every entry alone.

    Examples
    --------
    >>> partition(Block("0", "0.weight", "0.bias", (4, 3, 2, 2), 4)).sizes
    ((12, 4), (4, 1))
    """
    shape, rows, bias = block.weight_shape, block.rows, block.bias is not None
    if len(block.shape) >= 3:
        return Partition.by_kernel(shape, prod(block.shape[2:]), bias)
    if len(block.shape) <= 1 or rows != block.shape[0]:
        return Partition.by_kernel(shape, 1, bias)
    return ByOutput()(block)


@shown
@final
@dataclass(frozen=True)
class ByOutput:
    """One block per output: all its inputs, kernels and its bias.

    For a norm layer 2 × 2 blocks of weight and bias ("unit-wise"); for a convolution, also
    a transposed one, one block per output channel.

    Examples
    --------
    >>> ByOutput()(Block("0", "0.weight", "0.bias", (4, 3, 2, 2), 4)).sizes
    ((4, 13),)
    """

    def __call__(self, block: Block) -> Partition:
        """Return the rows; what the outputs are where they run along the other axis."""
        if block.output_axis == 0:
            return Partition.by_row(block.weight_shape)
        return Partition.by_label(block.weight_shape, block.outputs)


@shown
@final
@dataclass(frozen=True)
class ByInput:
    """One block per column: what one input, or the bias, sends to all outputs.

    Examples
    --------
    >>> ByInput()(Block("0", "0.weight", "0.bias", (4, 3), 4)).sizes
    ((4, 4),)
    """

    def __call__(self, block: Block) -> Partition:
        """Return the columns; the rows of a weight stored (in, out)."""
        along = Partition.by_row if block.output_axis else Partition.by_column
        return along(block.weight_shape)


@shown
@final
@dataclass(frozen=True)
class ByTile:
    """One block per tile of neighbouring rows and columns.

    Parameters
    ----------
    rows, columns
        Size of a tile; those at the edge are smaller.

    Raises
    ------
    ValueError
        If a size is not positive.

    Examples
    --------
    >>> ByTile(2, 2)(Block("0", "0.weight", "0.bias", (4, 3), 4)).sizes
    ((4, 4),)
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        if self.rows < 1 or self.columns < 1:
            msg = f"{self!r}: positive sizes are expected."
            raise ValueError(msg)

    def __call__(self, block: Block) -> Partition:
        """Return the tiles."""
        o, i = block.weight_shape
        across = -(-i // self.columns)
        labels = (torch.arange(o) // self.rows)[:, None] * across
        return Partition.by_label((o, i), labels + torch.arange(i) // self.columns)
