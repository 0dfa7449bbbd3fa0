"""Kronecker-factored curvature: one product of two second moments."""

from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from fisherlab.approximators.sums import Sums, add
from fisherlab.numerics.packed import second_moment
from fisherlab.operators import KroneckerSum, Operator
from fisherlab.statistics import LayerStatistics

Sharing = Literal["expand", "reduce"]


def factor_sums(
    statistics: LayerStatistics, sharing: Sharing, method: str
) -> tuple[Tensor, Tensor]:
    """Return Σ g gᵀ and Σ a aᵀ over a chunk; further columns add to the first only.

    Raises
    ------
    NeedsSharedForm
        If the block has no inputs and output gradients.
    """
    inputs, gradients = statistics.shared(method)
    if sharing == "reduce":
        inputs, gradients = inputs.sum(1, keepdim=True), gradients.sum(2, keepdim=True)
    rows = second_moment(gradients.flatten(0, 2))
    if not statistics.count:  # columns of examples whose inputs are counted already
        size = inputs.shape[2]
        return rows, inputs.new_zeros(size, size)
    return rows, second_moment(inputs.flatten(0, 1))


def factors(state: Sums, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """Turn the sums into the factors G and A of KFAC."""
    rows, cols = state.tensors
    split = max(state.positions, 1)
    if sharing == "reduce":  # G holds means over positions
        return rows * state.count / split**2, cols / state.count
    return rows / split, cols / state.count


@final
@dataclass(frozen=True)
class KFAC:
    r"""Kronecker-factored approximate curvature, F ≈ G ⊗ A.

    .. math:: A = \frac1N \sum_{nt} a_{nt} a_{nt}^T, \quad
              G = \frac{1}{NT} \sum_{vnt} g_{vnt} g_{vnt}^T

    Parameters
    ----------
    sharing
        How positions that share the weight are treated: "expand" as above (for
        convolutions this is KFC), "reduce" with a summed and g averaged over positions.

    Notes
    -----
    Costs V·N·T·d_out² + N·T·d_in² multiply-adds (half of it through symmetry), holds
    d_out² + d_in² numbers. Exact for one example at one position, and for deep linear
    networks with a Gaussian likelihood. With all columns (`Exact()`) this is also KFLR.

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671; Grosse & Martens 2016 (convolutions);
    Eschenhagen et al. 2023 (expand, reduce).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.KFAC()(stats["weight"]).trace()
    8.0
    """

    sharing: Sharing = "expand"

    def __post_init__(self) -> None:
        """Check the way of sharing."""
        if self.sharing not in ("expand", "reduce"):
            msg = f"KFAC(sharing={self.sharing!r}): 'expand' or 'reduce' is expected."
            raise ValueError(msg)

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> KroneckerSum:
        """Return G ⊗ A of one block.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        return self.finish(self.accumulate(None, statistics))

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the second moments of a chunk."""
        sums = factor_sums(statistics, self.sharing, "KFAC")
        return add(state, Sums.of(statistics, *sums))

    def merge(self, first: Sums, second: Sums) -> Sums:
        """Add up two parts."""
        return first + second

    def next_pass(self, state: Sums) -> None:
        """One pass is enough."""

    def finish(self, state: Sums) -> KroneckerSum:
        """Divide by examples and positions."""
        made = state.provenance.by(repr(self))
        return KroneckerSum((factors(state, self.sharing),), state.weight_shape, made)
