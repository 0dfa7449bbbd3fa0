"""The best sum of Kronecker products in Frobenius norm."""

from dataclasses import dataclass
from typing import final

from fisherlab.approximators import register
from fisherlab.approximators.costs import (
    Cost,
    alternation_flops,
    factor_flops,
    pair_numbers,
)
from fisherlab.approximators.kpsvd.iterative_solvers import Lanczos
from fisherlab.approximators.kpsvd.leading_pairs import (
    kronecker_sum,
    terms_of,
    terms_of_passes,
)
from fisherlab.approximators.kpsvd.passes import Pass
from fisherlab.approximators.kpsvd.rearranged import Rearranged
from fisherlab.approximators.kpsvd.solvers import (
    HeldOrPassed,
    SolverChoice,
    passes_of,
    solver_of,
    warm_pairs,
)
from fisherlab.approximators.states import Held, by_group
from fisherlab.operators import Operator
from fisherlab.samples import Samples
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics


@shown
@by_group
@final
@dataclass(frozen=True)
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

    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        """Return the best sum of products of one block."""
        block = Rearranged(statistics.samples, statistics.count)
        found = solver_of(self.solver)(block, self.rank, warm_pairs(previous))
        made = statistics.provenance.by(repr(self))
        return kronecker_sum(terms_of(found, block), found, statistics.weight_shape, made)

    def passing(self, held: Held) -> Pass:
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
        """Count the power steps and the products."""
        flops = alternation_flops(samples) + self.rank * factor_flops(samples)
        return Cost(flops, self.rank * pair_numbers(samples))


register.add({"kpsvd": KPSVD()} | {f"kpsvd-{rank}": KPSVD(rank) for rank in (2, 3, 4)})
register.add(
    {
        "lanczos-2": KPSVD(rank=2, solver=Lanczos()),
        "lanczos-paper": KPSVD(rank=2, solver=Lanczos(steps=2, reorthogonalise=False)),
    }
)
