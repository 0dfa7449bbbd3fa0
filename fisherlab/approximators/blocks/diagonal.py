"""The diagonal of the exact block, alone and with the couplings of weights and bias."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fisherlab import operators
from fisherlab.approximators import register
from fisherlab.approximators.base import OfSums
from fisherlab.approximators.costs import Cost, entry_count, square_flops
from fisherlab.approximators.states import Sums, add
from fisherlab.samples import OuterSamples, Samples
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics


@shown
@final
@dataclass(frozen=True)
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

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the squares of a chunk."""
        return add(state, Sums.of(statistics, statistics.samples.squares()))

    def finish(self, state: Sums) -> operators.Diagonal:
        """Divide by the examples."""
        made = state.provenance.by("diagonal")
        return operators.Diagonal(state.tensors[0] / state.count, made)

    def cost(self, samples: Samples) -> Cost:
        """Count the squares."""
        return Cost(square_flops(samples), entry_count(samples))


@shown
@final
@dataclass(frozen=True)
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
        return Cost(2 * square_flops(samples), 2 * entry_count(samples))


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
