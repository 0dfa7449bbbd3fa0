"""Input-factor-only curvature: the identity on the outputs."""

from dataclasses import dataclass
from typing import final

import torch

from fisherlab.approximators.kfac import factor_sums
from fisherlab.approximators.sums import Sums, add
from fisherlab.operators import KroneckerSum, Operator
from fisherlab.statistics import LayerStatistics


@final
@dataclass(frozen=True)
class FOOF:
    r"""Gradient descent on neurons, :math:`F \approx I \otimes A`.

    .. math:: A = \frac1N \sum_{nt} a_{nt} a_{nt}^T

    Notes
    -----
    The scale of the output gradients is left out, as published: read its matrix cosine
    and its direction, not its Frobenius error. The same for every kind of Fisher; holds
    d_in² numbers. Exact where the output gradients are white and independent of the
    inputs, e.g. the last layer under a unit Gaussian likelihood.

    References
    ----------
    Benzing 2022, arXiv 2201.12250.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.FOOF()(stats["weight"]).trace()
    8.0
    """

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> KroneckerSum:
        """Return I ⊗ A of one block.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        return self.finish(self.accumulate(None, statistics))

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the second moment of a chunk's inputs."""
        _, cols = factor_sums(statistics, "expand", "FOOF")
        return add(state, Sums.of(statistics, cols))

    def merge(self, first: Sums, second: Sums) -> Sums:
        """Add up two parts."""
        return first + second

    def next_pass(self, state: Sums) -> None:
        """One pass is enough."""

    def finish(self, state: Sums) -> KroneckerSum:
        """Divide by the examples."""
        cols = state.tensors[0] / state.count
        rows = torch.eye(state.weight_shape[0], dtype=cols.dtype, device=cols.device)
        made = state.provenance.by(repr(self))
        return KroneckerSum(((rows, cols),), state.weight_shape, made)
