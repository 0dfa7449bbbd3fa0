"""Input-factor-only curvature: the identity on the outputs."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from fisherlab.approximators.groups import by_group
from fisherlab.approximators.kfac import input_sums, product
from fisherlab.approximators.sums import Sums
from fisherlab.operators import KroneckerDiagonal, KroneckerSum, Operator
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics


@shown
@by_group
@final
@dataclass(frozen=True)
class FOOF:
    r"""Gradient descent on neurons, :math:`F \approx I \otimes A`.

    .. math:: A = \frac1N \sum_{nt} a_{nt} a_{nt}^T

    Notes
    -----
    The scale of the output gradients is left out, as published: read its matrix cosine
    and its direction, not its Frobenius error. The same for every kind of Fisher; holds
    d_in² numbers. Of an embedding, whose weight is stored the other way round, A ⊗ I
    with the diagonal A of how often each row was looked up. Exact where the output
    gradients are white and independent of the inputs, e.g. the last layer under a unit
    Gaussian likelihood.

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

    by_column: ClassVar[bool] = True

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> Operator:
        """Return I ⊗ A of one block.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        return self.finish(self.accumulate(None, statistics))

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the second moment of a chunk's inputs."""
        return input_sums(state, statistics, "FOOF")

    def merge(self, first: Sums, second: Sums) -> Sums:
        """Add up two parts."""
        return first + second

    def next_pass(self, state: Sums) -> None:
        """One pass is enough."""

    def finish(self, state: Sums) -> KroneckerSum | KroneckerDiagonal:
        """Divide by the examples."""
        inputs = state.tensors[0] / state.count
        outputs = state.weight_shape[1 if state.looked_up else 0]
        eye = torch.eye(outputs, dtype=inputs.dtype, device=inputs.device)
        pair = (inputs, eye) if state.looked_up else (eye, inputs)
        return product(pair, state, state.provenance.by(repr(self)))
