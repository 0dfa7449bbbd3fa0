"""The best sums of Kronecker products of a block, and of what K-FAC leaves of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from fisherlab.approximators import register
from fisherlab.approximators.base import (
    Cost,
    Sums,
    alternation_flops,
    by_group,
    factor_flops,
    pair_numbers,
)
from fisherlab.approximators.kfac import KFAC, AnySums
from fisherlab.approximators.kpsvd_choice import (
    HeldOrPassed,
    Pass,
    SolverChoice,
    in_tables,
    passes_of,
    solver_of,
    warm_pairs,
)
from fisherlab.approximators.kpsvd_solvers import Lanczos
from fisherlab.approximators.ranges import in_range
from fisherlab.approximators.rearranged import (
    Pair,
    Pairs,
    Rows,
    Weights,
    at_rows,
    kronecker_sum,
    position_flops,
    rounding,
    terms_of,
    terms_of_passes,
    used_rows,
    weights_of,
)
from fisherlab.operators import KroneckerDiagonal, KroneckerSum, Operator
from fisherlab.samples import OuterSamples, Samples
from fisherlab.settings import setting
from fisherlab.statistics import LayerStatistics
from fisherlab.statistics.network import Chunks


@by_group
@final
@setting
class KPSVD(HeldOrPassed[Pass]):
    r"""The best sum of k Kronecker products in Frobenius norm.

    .. math:: \min_{G_j, A_j} \Big\| F - \sum_{j \le k} G_j \otimes A_j \Big\|_F

    the truncated singular value decomposition of Van Loan's rearrangement of F; the
    squared error is :math:`\sum_{j>k} σ_j^2`.

    Parameters
    ----------
    rank
        k, the number of products; a rank above the numerical rank stops at it.
    solver
        A solver value, or "auto" to choose by counted cost. In a stream "auto" holds the
        samples of a block up to 256 MiB, and above goes over to `Passes`, which reads the
        data again and holds none; `Passes()` does from the start, other solvers hold all.

    Notes
    -----
    Rank 1: both factors are positive semidefinite. Later pairs are symmetric but
    indefinite without weight sharing; with it skew ⊗ skew pairs exist and nothing is
    symmetrised. Never forms F. Exact when F has Kronecker rank k.

    References
    ----------
    Koroko, Anciaux-Sedrakian, Gharbia, Garès, Haddou & Tran 2022, arXiv 2201.10285,
    section 3.1; Van Loan & Pitsianis 1993.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> len(fl.KPSVD(rank=2)(stats["weight"]).terms)
    1
    """

    rank: int = 1
    solver: SolverChoice = "auto"

    @in_range
    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        """Return the best sum of products of one block."""
        block, rows = used_rows(statistics.samples, statistics.count)
        found = solver_of(self.solver)(block, self.rank, warm_pairs(previous))
        made, shape = statistics.provenance.by(repr(self)), statistics.weight_shape
        terms = at_rows(terms_of(found, block), rows, shape[0])
        return kronecker_sum(terms, found, shape, made)

    def passing(self, held: Chunks) -> Pass:
        """Return the first pass."""
        return passes_of(self.solver).over(held, self.rank)

    def following(self, state: Pass) -> Pass | None:
        """Return what the next pass multiplies."""
        return passes_of(self.solver).next_pass(state, self.rank)

    def found(self, state: Pass) -> Operator:
        """Return the sum of the pairs found."""
        pairs, sums = passes_of(self.solver).finish(state, self.rank), state.seen
        terms = terms_of_passes(pairs, whole=True)
        made = sums.provenance.by(repr(self))
        return kronecker_sum(terms, pairs, sums.weight_shape, made)

    def cost(self, samples: Samples) -> Cost:
        """Count the steps, in tables of positions where these are chosen, and products."""
        tables = self.solver == "auto" and in_tables(samples, self.rank)
        steps = position_flops(samples, self.rank) if tables else alternation_flops(samples)
        flops = int(steps) + self.rank * factor_flops(samples)
        return Cost(flops, self.rank * pair_numbers(samples))


register.add({"kpsvd": KPSVD()} | {f"kpsvd-{rank}": KPSVD(rank) for rank in (2, 3, 4)})
register.add(
    {
        "lanczos-2": KPSVD(rank=2, solver=Lanczos()),
        "lanczos-paper": KPSVD(rank=2, solver=Lanczos(steps=2, reorthogonalise=False)),
    }
)


@final
@dataclass(frozen=True, eq=False)
class Turns:
    """Pairs found one after the other in passes through a stream.

    Parameters
    ----------
    current
        The pass for the pair that is looked for.
    steps
        What was found before.
    """

    current: Pass
    steps: tuple[Pairs, ...] = ()

    def seeing(self, statistics: LayerStatistics) -> "Turns":
        """Add a chunk's part of the images."""
        return replace(self, current=self.current.seeing(statistics))

    @property
    def sums(self) -> Sums | None:
        """The images of the pair that is looked for."""
        return self.current.sums

    def summing(self, sums: Sums | None) -> "Turns":
        """Return the same with other images."""
        return replace(self, current=self.current.summing(sums))

    def __add__(self, other: "Turns") -> "Turns":
        """Add up two parts of the data within the same pass."""
        return replace(self, current=self.current + other.current)


@by_group
@final
@setting
class Deflation(HeldOrPassed[Turns]):
    r"""Rank-1 solves in turn, each on what the others left over.

    .. math:: (G_j, A_j) = \arg\min
        \Big\| F - \sum_{i < j} G_i \otimes A_i - G \otimes A \Big\|_F

    Equals `KPSVD` of the same rank up to the solver's tolerance.

    Parameters
    ----------
    rank
        Products.
    solver
        Solver of each rank-1 problem; "auto" as in `KPSVD`, in a stream too.

    References
    ----------
    Koroko et al. 2022, arXiv 2201.10285, section 3.2.

    Examples
    --------
    >>> Deflation(rank=2)
    Deflation(rank=2, solver='auto')
    """

    rank: int = 2
    solver: SolverChoice = "auto"

    @in_range
    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        """Return the sum of products found one by one."""
        block, rows = used_rows(statistics.samples, statistics.count)
        warm = warm_pairs(previous)
        terms: tuple[Pair, ...] = ()
        steps: tuple[Pairs, ...] = ()
        for k in range(self.rank):
            found = solver_of(self.solver)(block, 1, warm[k : k + 1])
            if not _worth(found, steps):
                break
            new = terms_of(found, block)
            steps = (*steps, found)
            terms, block = terms + new, block.less(new, weights_of(found, block))
        made, shape = statistics.provenance.by(repr(self)), statistics.weight_shape
        found = _together(steps, block.start(1))
        return kronecker_sum(at_rows(terms, rows, shape[0]), found, shape, made)

    def passing(self, held: Chunks) -> Turns:
        """Return the first pass for the first pair."""
        return Turns(passes_of(self.solver).over(held, 1))

    def following(self, state: Turns) -> Turns | None:
        """Return what the next pass multiplies, for this pair or for the next."""
        passes = passes_of(self.solver)
        following = passes.next_pass(state.current, 1)
        if following is not None:
            return replace(state, current=following)
        found = passes.finish(state.current, 1)
        if len(state.steps) + 1 == self.rank or not _worth(found, state.steps):
            return None
        removed = state.current.removed + terms_of_passes(found, whole=not state.steps)
        again = passes.again(state.current, 1, removed)
        return Turns(again, (*state.steps, found))

    def found(self, state: Turns) -> Operator:
        """Return the sum of the pairs found."""
        steps, terms = state.steps, state.current.removed
        found = passes_of(self.solver).finish(state.current, 1)
        if _worth(found, steps):
            terms += terms_of_passes(found, whole=not steps)
            steps = (*steps, found)
        sums = state.current.seen
        together = _together(steps, state.current.block)
        made = sums.provenance.by(repr(self))
        return kronecker_sum(terms, together, sums.weight_shape, made)

    def cost(self, samples: Samples) -> Cost:
        """Count the power steps of every product, and the products."""
        each = alternation_flops(samples) + factor_flops(samples)
        return Cost(self.rank * each, self.rank * pair_numbers(samples))


def _worth(found: Pairs, steps: tuple[Pairs, ...]) -> bool:
    if not len(found.values):
        return False
    eps = torch.finfo(found.values.dtype).eps
    return not steps or float(found.values[0]) > 1e2 * eps * float(steps[0].values[0])


def _together(steps: tuple[Pairs, ...], like: Tensor) -> Pairs:
    empty = like.new_zeros(0)
    values: Tensor = torch.cat([s.values for s in steps]) if steps else empty
    return Pairs(
        tuple(pair for step in steps for pair in step.pairs),
        values,
        all(step.converged for step in steps),
        sum(step.iterations for step in steps),
        max((step.residual for step in steps), default=0.0),
    )


register.add({"deflation": Deflation()})


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


@by_group
@final
@setting
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

    @in_range
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
        first = _terms(kfac, rows)
        block = whole.less(first, _weights(statistics))
        found = solver_of(self.solver)(block, self.rank, warm_pairs(previous, skip=1))
        found = _above_rounding(found, first)
        terms = first + terms_of(found, block)
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
        first, sums = tuple(_kfac(state.kfac).terms), state.current.seen
        found = passes_of(self.solver).finish(state.current, self.rank)
        found = _above_rounding(found, first)
        terms = first + terms_of_passes(found, whole=False)
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


def _above_rounding(found: Pairs, kfac: tuple[Pair, ...]) -> Pairs:
    """Return the pairs, or none where a remainder is KFAC's own rounding errors."""
    if len(found.values) and float(found.values[0]) > rounding(kfac):
        return found
    return found._replace(pairs=(), values=found.values[:0])


register.add({"kfac-corrected": KFACCorrected()})
