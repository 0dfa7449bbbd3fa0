"""One Kronecker product for every pair of layers, not only for each layer."""

from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import final

import torch
from torch import Tensor

from fisherlab.approximators.network.base import NetworkStatistics
from fisherlab.approximators.network.moments import Moments, moments
from fisherlab.operators.network import KroneckerBlocks
from fisherlab.showing import shown


@shown
@final
@dataclass(frozen=True)
class KhatriRao:
    r"""The Kronecker approximation of all pairs of layers, which KFAC takes blocks of.

    .. math:: \tilde F_{ij} = G_{ij} \otimes A_{ij}, \quad
              G_{ij} = E[g_i g_j^T], \; A_{ij} = E[a_i a_j^T]

    Notes
    -----
    Costs N·(Σ d_in)² + V·N·(Σ d_out)² multiply-adds, holds (Σ d_in)² + (Σ d_out)²
    numbers. Positive semi-definite: a principal submatrix of G ⊗ A over all layers. Exact
    for one example, and for deep linear networks with a Gaussian likelihood. Layers must
    be used at one position and have matching columns (``collect(compress=False)``).

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671, section 3.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    >>> stats = fl.collect(
    ...     model, (torch.ones(5, 3), None), fl.Gaussian(), compress=False
    ... )
    >>> KhatriRao()(stats).stored_numbers
    49
    """

    takes = "network"

    def __call__(self, statistics: NetworkStatistics) -> KroneckerBlocks:
        """Return the Kronecker approximation of all pairs.

        Raises
        ------
        NeedsSharedForm
            If a layer has no inputs and output gradients.
        ValueError
            If a layer is used at several positions, or columns do not match.
        """
        return self.finish(self.accumulate(None, statistics))

    def accumulate(self, state: Moments | None, statistics: NetworkStatistics) -> Moments:
        """Add the moments of a chunk."""
        pairs = list(combinations_with_replacement(statistics, 2))
        found = moments(statistics, pairs, "KhatriRao")
        return found if state is None else state + found

    def merge(self, first: Moments, second: Moments) -> Moments:
        """Add up two parts."""
        return first + second

    def finish(self, state: Moments) -> KroneckerBlocks:
        """Divide by the examples and put the moments together."""
        names = list(dict.fromkeys(row for row, _ in state.rows))
        own = [state.factors(name, name) for name in names]
        shapes = {n: (len(g), len(a)) for n, (g, a) in zip(names, own, strict=True)}
        split = max(state.count, 1)
        rows, columns = (
            _table(names, sums) / split for sums in (state.rows, state.columns)
        )
        return KroneckerBlocks(rows, columns, shapes, state.provenance)


def _table(names: list[str], sums: dict[tuple[str, str], Tensor]) -> Tensor:
    """Put the blocks of the upper triangle, and their mirror images, together."""
    rows = [
        torch.cat([sums[i, j] if (i, j) in sums else sums[j, i].T for j in names], 1)
        for i in names
    ]
    return torch.cat(rows)
