"""Mini-block Fisher: the exact block kept on many small diagonal blocks."""

from dataclasses import dataclass
from typing import final

from fisherlab.approximators.held import Held
from fisherlab.layers import Block
from fisherlab.operators import FactoredMiniBlocks, Operator, Partition
from fisherlab.statistics import LayerStatistics


def partition(block: Block) -> Partition:
    """Return the paper's partition of one block.

    Convolutions: one mini-block per (output, input) kernel, biases alone. Everything
    else with columns: one mini-block per output with all its inputs and its bias. Norm
    layers: every entry alone.

    Examples
    --------
    >>> partition(Block("0", "0.weight", "0.bias", (4, 3, 2, 2), 4)).groups[0].shape
    torch.Size([12, 4])
    """
    shape, rows, bias = block.weight_shape, block.rows, block.bias is not None
    if len(block.shape) >= 3:
        kernel = 1
        for size in block.shape[2:]:
            kernel *= size
        return Partition.by_kernel(shape, kernel, bias)
    if len(block.shape) <= 1 or rows != block.shape[0]:
        return Partition.by_kernel(shape, 1, bias)
    return Partition.by_row(shape)


@final
@dataclass(frozen=True)
class MiniBlock:
    r"""The mini-blocks of the exact block, from per-example gradients.

    .. math:: F_b = \frac1N \sum_{vn} D_b D_b^T

    Fully connected layers: a block per output neuron, all its inputs and its bias.
    Convolutions: a block per (output, input) kernel, scalar blocks for the biases.

    Parameters
    ----------
    partition
        Another partition of the weight, for layers of its shape.

    Notes
    -----
    The blocks are formed on demand; norms go through N × N Gram matrices.
    ``‖F − M‖² = ‖F‖² − Σ_b‖F_b‖²``, so the error lies between 0 and the diagonal's.
    Exact when different mini-blocks are uncorrelated.

    References
    ----------
    Bahamou, Goldfarb & Ren 2022, arXiv 2202.04124, Algorithm 1.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.MiniBlock()(stats["weight"]).formed.blocks[0].shape
    torch.Size([2, 4, 4])
    """

    partition: Partition | None = None

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> FactoredMiniBlocks:
        """Return the mini-blocks of one block.

        Raises
        ------
        ValueError
            If the partition given is of another shape.
        """
        s = statistics
        chosen = self.partition or partition(s.block)
        if chosen.weight_shape != s.weight_shape:
            msg = (
                f"MiniBlock: the partition is of shape {chosen.weight_shape}, but the "
                f"weight of {s.name!r} has shape {s.weight_shape}."
            )
            raise ValueError(msg)
        made = s.provenance.by("mini-block")
        return FactoredMiniBlocks(chosen, s.samples, s.count, made)

    def accumulate(self, state: Held | None, statistics: LayerStatistics) -> Held:
        """Keep the chunk."""
        return (state or Held()).add(statistics)

    def merge(self, first: Held, second: Held) -> Held:
        """Keep both parts."""
        return first + second

    def next_pass(self, state: Held) -> None:
        """One pass is enough."""

    def finish(self, state: Held) -> FactoredMiniBlocks:
        """Return the mini-blocks of all that was kept."""
        return self(state.joined())
