"""Blocks on the diagonal: the rows of a weight, groups of entries, or single entries."""

from collections.abc import Callable
from math import prod
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from fisherlab import operators
from fisherlab.approximators import register
from fisherlab.approximators.base import (
    Cost,
    OfSamples,
    OfSums,
    Returned,
    Sums,
    add,
    entry_count,
)
from fisherlab.approximators.mean_gradients import mean_of
from fisherlab.layers import Block
from fisherlab.operators import FactoredMiniBlocks, MiniBlocks, Operator, Partition
from fisherlab.samples import MatrixSamples, OuterSamples, Samples
from fisherlab.settings import setting
from fisherlab.statistics import LayerStatistics, MeanGradient

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


@final
@setting
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


@final
@setting
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


@final
@setting
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
            raise ValueError(f"{self!r}: positive sizes are expected.")

    def __call__(self, block: Block) -> Partition:
        """Return the tiles."""
        o, i = block.weight_shape
        across = -(-i // self.columns)
        labels = (torch.arange(o) // self.rows)[:, None] * across
        return Partition.by_label((o, i), labels + torch.arange(i) // self.columns)


Statistic = Literal["per_example", "mean_gradient", "scaled_mean_gradient"]
STATISTICS = ("per_example", "mean_gradient", "scaled_mean_gradient")


@final
@setting
class MiniBlock(OfSamples[FactoredMiniBlocks | MiniBlocks]):
    r"""The mini-blocks of a Fisher block.

    .. math:: F_b = \frac1N \sum_{vn} D_b D_b^T \qquad\text{or}\qquad
              \hat G_b = \bar D_b \bar D_b^T, \quad \bar D = \frac1N \sum_n D_n

    Fully connected layers: a block per output neuron, all its inputs and its bias.
    Convolutions: a block per (output, input) kernel, scalar blocks for the biases. Norm
    layers: scalar blocks.

    Parameters
    ----------
    statistic
        "per_example", the blocks F_b of the exact block (Algorithm 1).
        "mean_gradient", the outer product of the mini-batch mean gradient, which the
        paper's optimiser averages over batches (Algorithm 2); with labels drawn from the
        model, ``fl.mean_gradient(..., fisher=MonteCarlo(1))``, MBF-True (Algorithm 4).
        "scaled_mean_gradient", N times that.
    spatial_average
        Whether all rows, all kernels or all biases share one block, the mean of theirs.
    partition
        Another partition of the weight, for layers of its shape, or a rule that gives
        one for every block (`ByOutput`, `ByInput`, `ByTile`).

    Raises
    ------
    ValueError
        For an unknown statistic.

    Notes
    -----
    The scales differ: :math:`E[\bar D_b \bar D_b^T] = F_b / N` for labels drawn from the
    model, so the same damping means N times more for "mean_gradient";
    "scaled_mean_gradient" has the expectation F_b. Per-example blocks are formed on
    demand; norms go through N × N Gram matrices. ``‖F − M‖² = ‖F‖² − Σ_b‖M_b‖²`` for F_b
    and for their shared mean, so the error of F_b lies between 0 and the diagonal's.
    Exact when different mini-blocks are uncorrelated. Statistics of a layer are
    understood by all three: of `Empirical` and `MonteCarlo` the mean gradient is taken.
    Ĝ costs Σk² multiply-adds, a shared block of rows half of d_out·d_in². The paper gives
    norm layers Adam's direction, `AdamPreconditioner`.

    References
    ----------
    Bahamou, Goldfarb & Ren 2022, arXiv 2202.04124, Algorithms 1, 2 and 4.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.MiniBlock()(stats["weight"]).formed.blocks[0].shape
    torch.Size([2, 4, 4])
    >>> fl.MiniBlock(spatial_average=True)(stats["weight"]).blocks[0].shape
    torch.Size([1, 4, 4])
    """

    result: ClassVar[Returned] = "blocks"

    statistic: Statistic = "per_example"
    spatial_average: bool = False
    partition: Partition | Rule | None = None

    def __post_init__(self) -> None:
        """Check the statistic."""
        if self.statistic not in STATISTICS:
            raise ValueError(
                f"MiniBlock(statistic={self.statistic!r}): one of "
                f"{', '.join(map(repr, STATISTICS))} is expected."
            )

    @property
    def takes(self) -> Literal["per_example", "mean_gradient"]:
        """Which statistics an optimiser gives it."""
        return "per_example" if self.statistic == "per_example" else "mean_gradient"

    def __call__(
        self,
        statistics: LayerStatistics | MeanGradient,
        previous: Operator | None = None,
    ) -> FactoredMiniBlocks | MiniBlocks:
        """Return the mini-blocks of one block; formed, where they share one.

        Raises
        ------
        ValueError
            If the partition given is of another shape, or the statistics are not of the
            kind that the method takes.
        """
        samples, count = self._samples(statistics)
        chosen = self._chosen(statistics.block)
        made = statistics.provenance.by(self._name)
        blocks = FactoredMiniBlocks(chosen, samples, count, made)
        return blocks.shared() if self.spatial_average else blocks

    @property
    def _name(self) -> str:
        return "mini-block" if self == MiniBlock(partition=self.partition) else repr(self)

    def _samples(self, statistics: LayerStatistics | MeanGradient) -> tuple[Samples, int]:
        """Return samples and what their sum is divided by."""
        if self.statistic == "per_example":
            if isinstance(statistics, MeanGradient):
                raise ValueError(
                    f"{self!r} takes LayerStatistics, but {statistics!r} was given. Use "
                    "MiniBlock(statistic='mean_gradient')."
                )
            return statistics.samples, statistics.count
        mean = mean_of(statistics, repr(self))
        gradient = mean.gradient
        if self.statistic == "scaled_mean_gradient":
            gradient = gradient * mean.count**0.5
        return MatrixSamples(gradient[None, None]), 1

    def _chosen(self, block: Block) -> Partition:
        given = self.partition
        if given is None:
            return partition(block)
        chosen = given if isinstance(given, Partition) else given(block)
        if chosen.weight_shape != block.weight_shape:
            raise ValueError(
                f"MiniBlock: the partition is of shape {chosen.weight_shape}, but the "
                f"weight of {block.name!r} has shape {block.weight_shape}."
            )
        return chosen

    def cost(self, samples: Samples) -> Cost | None:
        """Count nothing: formed on demand; the size of shared ones is the partition's."""
        return None if self.spatial_average else Cost(0, 0)


register.add(
    {
        "mini-block": MiniBlock(),
        "mini-block-shared": MiniBlock(spatial_average=True),
        "unit-wise": MiniBlock(partition=ByOutput()),
    }
)
register.add(
    {
        "mini-block-mean": MiniBlock("mean_gradient"),
        "mini-block-mean-shared": MiniBlock("mean_gradient", spatial_average=True),
    },
    estimates=False,
)


@final
@setting
class Diagonal(OfSums[Sums, operators.Diagonal]):
    r"""The exact diagonal (1/N) Σ D∘D.

    Notes
    -----
    Holds p numbers; costs one product of the squared factors. Exact when the entries
    of the gradient are uncorrelated. ``‖F − diag F‖² = ‖F‖² − ‖diag F‖²``.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.Diagonal()(stats["weight"]).entries.shape
    torch.Size([2, 4])
    """

    entrywise: ClassVar[bool] = True
    result: ClassVar[Returned] = "entries"

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the squares of a chunk."""
        return add(state, Sums.of(statistics, statistics.samples.squares()))

    def finish(self, state: Sums) -> operators.Diagonal:
        """Divide by the examples."""
        made = state.provenance.by("diagonal")
        return operators.Diagonal(state.tensors[0] / state.count, made)

    def cost(self, samples: Samples) -> Cost:
        """Count the squares."""
        return Cost(samples.square_flops(), entry_count(samples))


@final
@setting
class QuasiDiagonal(OfSums[Sums, operators.QuasiDiagonal]):
    r"""The diagonal and the terms between every weight and the bias of its output.

    For one output, with 0 its bias,

    .. math:: M_{ii} = F_{ii}, \quad M_{0i} = F_{0i}, \quad
              M_{ij} = F_{0i} F_{0j} / F_{00}

    Notes
    -----
    Of all matrices M whose inverse has no entries between different weights of an output
    it has the smallest divergence KL(N(0, F) ‖ N(0, M)) on that output's block. Affine
    changes of an input (from 0/1 to ±1) leave the undamped step as it is, which a
    diagonal does not. Holds 2p numbers; solves cost O(p) where λ > 0. Equal to the diagonal
    for a weight without bias, to the unit-wise blocks for a norm layer. Exact on the
    rows for one example.

    References
    ----------
    Ollivier 2015, "Riemannian metrics for neural networks I: feedforward networks",
    section 2.3.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.QuasiDiagonal()(stats["weight"]).to_dense()[0].tolist()
    [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """

    result: ClassVar[Returned] = "entries"

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the squares and the products with the bias of a chunk."""
        squares = statistics.samples.squares()
        return add(state, Sums.of(statistics, squares, _with_bias(statistics)))

    def finish(self, state: Sums) -> operators.QuasiDiagonal:
        """Divide by the examples."""
        squares, with_bias = (total / state.count for total in state.tensors)
        made = state.provenance.by("quasi-diagonal")
        return operators.QuasiDiagonal(squares, with_bias, made)

    def cost(self, samples: Samples) -> Cost:
        """Count the squares and the products with the bias."""
        return Cost(2 * samples.square_flops(), 2 * entry_count(samples))


def _with_bias(statistics: LayerStatistics) -> Tensor:
    """Return Σ D_oi D_o0, 0 the bias; zero without one."""
    samples = statistics.samples
    if statistics.block.bias is None:
        return torch.zeros(samples.weight_shape, dtype=samples.dtype, device=samples.device)
    if isinstance(samples, OuterSamples):
        inputs = samples.inputs
        return samples.output_energy.T @ (inputs * inputs[:, -1:])
    return samples.summed(lambda d: (d * d[..., -1:]).sum(0))


register.add({"quasi-diagonal": QuasiDiagonal(), "diagonal": Diagonal()})
