"""KFAC with a correction: the best sum of Kronecker products of what it leaves."""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from fisherlab.approximators.kpsvd.leading_pairs import (
    kronecker_sum,
    terms_of,
    terms_of_passes,
)
from fisherlab.approximators.kpsvd.passes import Pass
from fisherlab.approximators.kpsvd.rearranged import Pairs, Rearranged, Weights
from fisherlab.approximators.kpsvd.solvers import (
    SolverChoice,
    check,
    is_held,
    passes_of,
    solver_of,
    warm_pairs,
)
from fisherlab.approximators.kronecker.kfac import KFAC
from fisherlab.approximators.states import Held, Sums, by_group
from fisherlab.operators import KroneckerDiagonal, KroneckerSum, Operator
from fisherlab.samples import OuterSamples
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics


@final
@dataclass(frozen=True, eq=False)
class CorrectedPass:
    """KFAC's sums, and passes through a stream for what KFAC leaves.

    The first pass multiplies the whole block and sums for KFAC; what KFAC has of the
    products is subtracted once both are known.
    """

    kfac: Sums
    current: Pass


@shown
@by_group
@final
@dataclass(frozen=True)
class KFACCorrected:
    r"""KFAC plus the best sum of k products of what it leaves.

    .. math:: F \approx G \otimes A + \sum_{j \le k} P_j \otimes Q_j, \quad
              (P, Q) = \mathrm{KPSVD}_k(F - G \otimes A)

    Never worse than KFAC in Frobenius norm; may be indefinite.

    Parameters
    ----------
    rank
        Products added to KFAC's.
    solver
        As in `KPSVD`.

    References
    ----------
    Koroko et al. 2022, arXiv 2201.10285, section 3.4.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model, x = torch.nn.Linear(3, 2).double(), torch.eye(3).double()
    >>> stats = fl.collect(model, (x, None), fl.Categorical())["weight"]
    >>> len(fl.KFACCorrected()(stats).terms)
    2
    """

    holds_samples: ClassVar[bool] = True

    rank: int = 1
    solver: SolverChoice = "auto"

    def __post_init__(self) -> None:
        """Check the rank and the solver."""
        check("KFACCorrected", self.rank, self.solver)

    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        """Return KFAC and its correction.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        kfac = _kfac(KFAC().accumulate(None, statistics))
        whole = Rearranged(statistics.samples, statistics.count)
        block = whole.less(tuple(kfac.terms), _weights(statistics))
        found = solver_of(self.solver)(block, self.rank, warm_pairs(previous, skip=1))
        if not _above_rounding(found, kfac):
            found = found._replace(pairs=(), values=found.values[:0])
        terms = tuple(kfac.terms) + terms_of(found, block)
        made = statistics.provenance.by(repr(self))
        return kronecker_sum(terms, found, statistics.weight_shape, made)

    def accumulate(
        self, state: Held | CorrectedPass | None, statistics: LayerStatistics
    ) -> Held | CorrectedPass:
        """Keep the chunk, or add its products where samples are not held."""
        if isinstance(state, CorrectedPass):
            current = state.current.seeing(statistics)
            if state.current.removed:
                return replace(state, current=current)
            return CorrectedPass(KFAC().accumulate(state.kfac, statistics), current)
        held = (state or Held()).add(statistics)
        return held if is_held(self.solver, held) else self._passing(held)

    def merge(
        self, first: Held | CorrectedPass, second: Held | CorrectedPass
    ) -> Held | CorrectedPass:
        """Keep both parts, or add up their products."""
        if isinstance(first, Held) and isinstance(second, Held):
            return first + second
        one, other = (
            self._passing(s) if isinstance(s, Held) else s for s in (first, second)
        )
        kfac = one.kfac if one.current.removed else one.kfac + other.kfac
        return CorrectedPass(kfac, one.current + other.current)

    def next_pass(self, state: Held | CorrectedPass) -> CorrectedPass | None:
        """Return what the next pass multiplies; one pass is enough for held samples."""
        if isinstance(state, Held):
            return None
        removed = tuple(_kfac(state.kfac).terms)
        current = replace(state.current, removed=removed)
        following = passes_of(self.solver).next_pass(current, self.rank)
        return None if following is None else replace(state, current=following)

    def finish(self, state: Held | CorrectedPass) -> Operator:
        """Solve for all that was kept, or return what the passes have found."""
        if isinstance(state, Held):
            return self(state.joined())
        kfac, sums = _kfac(state.kfac), state.current.seen
        found = passes_of(self.solver).finish(state.current, self.rank)
        if not _above_rounding(found, kfac):
            found = found._replace(pairs=(), values=found.values[:0])
        terms = tuple(kfac.terms) + terms_of_passes(found, whole=False)
        made = sums.provenance.by(repr(self))
        return kronecker_sum(terms, found, sums.weight_shape, made)

    def _passing(self, held: Held) -> CorrectedPass:
        kfac: Sums | None = None
        for piece in held.pieces:
            kfac = KFAC().accumulate(kfac, piece)
        assert kfac is not None
        return CorrectedPass(kfac, passes_of(self.solver).over(held, self.rank))


def _kfac(sums: Sums) -> KroneckerSum | KroneckerDiagonal:
    return KFAC().finish(sums)


def _weights(statistics: LayerStatistics) -> tuple[Weights, ...] | None:
    """Return the equal weights of all examples in KFAC's factors, at one position."""
    samples = statistics.samples
    if not isinstance(samples, OuterSamples):
        return None
    share = 1 / statistics.count
    equal = torch.full(
        (samples.examples,), share, dtype=torch.float64, device=samples.device
    )
    return ((equal, equal),)


def _above_rounding(found: Pairs, kfac: KroneckerSum | KroneckerDiagonal) -> bool:
    """Whether a remainder is more than KFAC's own rounding errors."""
    if not len(found.values):
        return False
    eps = torch.finfo(found.values.dtype).eps
    return float(found.values[0]) > 1e2 * eps * kfac.frobenius_norm()
