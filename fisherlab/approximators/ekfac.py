"""Eigenvalue-corrected KFAC: the best eigenvalues for KFAC's eigenvectors."""

from dataclasses import dataclass
from typing import final

from fisherlab.approximators.groups import by_group
from fisherlab.approximators.kfac import factors, kfac_sums
from fisherlab.approximators.projection import Projection
from fisherlab.approximators.sums import Sums
from fisherlab.operators import KroneckerEigen, Operator, RowwiseEigen
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics


@shown
@by_group
@final
@dataclass(frozen=True)
class EKFAC:
    r"""KFAC's eigenbasis with the exact second moments of the gradient in it.

    .. math:: F \approx (U_G \otimes U_A)\,\mathrm{diag}(s)\,(U_G \otimes U_A)^T, \quad
              s = \frac1N \sum (U_G^T D U_A)^{\circ 2}

    Parameters
    ----------
    keep_basis
        Take the eigenvectors of `previous` where it is given, so that a refresh costs no
        eigendecomposition; leave `previous` out to refresh them too.

    Notes
    -----
    s is the Frobenius-optimal diagonal for that basis, so
    ``‖F − F_EK‖² = ‖F‖² − ‖s‖²`` and the error is never above KFAC's; the trace is
    exact. Costs KFAC, two eigendecompositions and one more pass. Exact where KFAC is.
    Of an embedding the rows stay as they are and the columns are rotated: one
    eigendecomposition, d_in² + p numbers. s is not a product of two factors'
    eigenvalues, so that a factored damping means nothing here and is refused: Tikhonov.

    References
    ----------
    George et al. 2018, arXiv 1806.03884 (section 4.2: amortised eigendecompositions).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> round(fl.EKFAC()(stats["weight"]).trace(), 5)
    8.0
    """

    keep_basis: bool = False

    def __call__(
        self,
        statistics: LayerStatistics,
        previous: Operator | None = None,
    ) -> Operator:
        """Return the eigenvalue-corrected block.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        made = statistics.provenance.by(repr(self))
        kept = Projection.kept(previous, made) if self.keep_basis else None
        if kept is not None:
            return kept.seeing(statistics).finished()
        second = self.next_pass(self.accumulate(None, statistics))
        return self.finish(self.accumulate(second, statistics))

    def accumulate(
        self, state: Sums | Projection | None, statistics: LayerStatistics
    ) -> Sums | Projection:
        """Add KFAC's sums in the first pass, squared projections in the second."""
        if isinstance(state, Projection):
            return state.seeing(statistics)
        return kfac_sums(state, statistics, "expand", "EKFAC")

    def merge(
        self, first: Sums | Projection, second: Sums | Projection
    ) -> Sums | Projection:
        """Add up two parts of the same pass."""
        if isinstance(first, Sums) and isinstance(second, Sums):
            return first + second
        assert isinstance(first, Projection)
        assert isinstance(second, Projection)
        return first + second

    def next_pass(self, state: Sums | Projection) -> Projection | None:
        """Diagonalise the factors after the first pass."""
        if isinstance(state, Projection):
            return None
        return Projection.onto(*factors(state, "expand"), state.provenance.by(repr(self)))

    def finish(self, state: Sums | Projection) -> KroneckerEigen | RowwiseEigen:
        """Divide the squared projections by the examples."""
        assert isinstance(state, Projection)
        return state.finished()
