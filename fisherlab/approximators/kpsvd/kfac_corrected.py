"""KFAC with a correction: the best sum of Kronecker products of what it leaves."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch

from fisherlab.approximators import register
from fisherlab.approximators.costs import (
    Cost,
    alternation_flops,
    factor_flops,
    pair_numbers,
)
from fisherlab.approximators.kpsvd.choice import (
    HeldOrPassed,
    SolverChoice,
    passes_of,
    solver_of,
    warm_pairs,
)
from fisherlab.approximators.kpsvd.rearranged import (
    Pair,
    Pairs,
    Rows,
    Weights,
    at_rows,
    kronecker_sum,
    terms_of,
    terms_of_passes,
    used_rows,
)
from fisherlab.approximators.kronecker.kfac import KFAC, AnySums
from fisherlab.approximators.states import by_group
from fisherlab.operators import KroneckerDiagonal, KroneckerSum, Operator
from fisherlab.samples import OuterSamples, Samples
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics
from fisherlab.statistics.gathered import Chunks


@final
@dataclass(frozen=True, eq=False)
class CorrectedPass:
    """KFAC's sums, and passes through a stream for what KFAC leaves.

    The first pass multiplies the whole block and sums for KFAC; what KFAC has of the
    products is subtracted once both are known.
    """

    kfac: AnySums
    current: Any  # a `Pass`

    def seeing(self, statistics: LayerStatistics) -> "CorrectedPass":
        """Add a chunk's part of the images, and to KFAC's sums in the first pass."""
        current = self.current.seeing(statistics)
        if self.current.removed:
            return replace(self, current=current)
        return CorrectedPass(KFAC().accumulate(self.kfac, statistics), current)

    @property
    def open(self) -> Mapping[int, Any]:
        """The images, and KFAC's sums in the first pass."""
        further = self.current is not None and self.current.removed
        return {1: self.current} if further else {0: self.kfac, 1: self.current}

    def put(self, states: Mapping[int, Any]) -> "CorrectedPass":
        """Return others in their places."""
        return CorrectedPass(states.get(0, self.kfac), states[1])

    def __add__(self, other: "CorrectedPass") -> "CorrectedPass":
        """Add up two parts of the data within the same pass."""
        beside = other.open
        return self.put({k: state + beside[k] for k, state in self.open.items()})


@shown
@by_group
@numeric
@final
@dataclass(frozen=True)
class KFACCorrected(HeldOrPassed[CorrectedPass]):
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

    needs_inputs: ClassVar[bool] = True

    rank: int = 1
    solver: SolverChoice = "auto"

    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        """Return KFAC and its correction.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        kfac = _kfac(KFAC().through(None, statistics))
        whole, rows = used_rows(statistics.samples, statistics.count)
        block = whole.less(_terms(kfac, rows), _weights(statistics))
        found = solver_of(self.solver)(block, self.rank, warm_pairs(previous, skip=1))
        if not _above_rounding(found, kfac):
            found = found._replace(pairs=(), values=found.values[:0])
        terms = _terms(kfac, rows) + terms_of(found, block)
        made, shape = statistics.provenance.by(repr(self)), statistics.weight_shape
        return kronecker_sum(at_rows(terms, rows, shape[0]), found, shape, made)

    def passing(self, held: Chunks) -> CorrectedPass:
        """Return the first pass, and KFAC's sums."""
        kfac: AnySums | None = None
        for piece in held.pieces:
            kfac = KFAC().accumulate(kfac, piece)
        assert kfac is not None
        return CorrectedPass(kfac, passes_of(self.solver).over(held, self.rank))

    def following(self, state: CorrectedPass) -> CorrectedPass | None:
        """Return what the next pass multiplies, less what KFAC has."""
        removed = tuple(_kfac(state.kfac).terms)
        current = replace(state.current, removed=removed)
        following = passes_of(self.solver).next_pass(current, self.rank)
        return None if following is None else replace(state, current=following)

    def found(self, state: CorrectedPass) -> Operator:
        """Return KFAC and the pairs found."""
        kfac, sums = _kfac(state.kfac), state.current.seen
        found = passes_of(self.solver).finish(state.current, self.rank)
        if not _above_rounding(found, kfac):
            found = found._replace(pairs=(), values=found.values[:0])
        terms = tuple(kfac.terms) + terms_of_passes(found, whole=False)
        made = sums.provenance.by(repr(self))
        return kronecker_sum(terms, found, sums.weight_shape, made)

    @property
    def terms(self) -> int:
        """How many products are added up: KFAC's and those of the correction."""
        return self.rank + 1

    def cost(self, samples: Samples) -> Cost:
        """Count KFAC, and the power steps of every further product."""
        kfac = factor_flops(samples)
        flops = kfac + self.rank * (alternation_flops(samples) + kfac)
        return Cost(flops, (self.rank + 1) * pair_numbers(samples))


def _kfac(sums: AnySums) -> KroneckerSum | KroneckerDiagonal:
    return KFAC().finish(sums)


def _terms(kfac: KroneckerSum | KroneckerDiagonal, rows: Rows) -> tuple[Pair, ...]:
    """Return KFAC's terms, in some rows of a table if given: it counts no others."""
    if isinstance(kfac, KroneckerDiagonal) and rows is not None:
        kfac = replace(kfac, row_diagonal=kfac.row_diagonal[rows])
    return tuple(kfac.terms)


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


register.add({"kfac-corrected": KFACCorrected()})
