"""The best sums of Kronecker products: KPSVD, deflation, and corrections of KFAC."""

from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from fisherlab.approximators.held import Held
from fisherlab.approximators.kfac import KFAC
from fisherlab.approximators.passes import Pass, Passes, nearest_positive
from fisherlab.approximators.solvers import Auto, Pair, Pairs, Rearranged, Solver
from fisherlab.operators import KroneckerSum, Operator
from fisherlab.statistics import LayerStatistics

SolverChoice = Solver | Literal["auto"]
NEAR = 1e-4  # relative distance below which a factor or a singular value is another


def _solver(choice: SolverChoice) -> Solver:
    return Auto() if choice == "auto" else choice


def _check(name: str, rank: int, solver: SolverChoice) -> None:
    if rank < 1:
        msg = f"{name}(rank={rank}): a rank of at least 1 is expected."
        raise ValueError(msg)
    if solver != "auto" and not isinstance(solver, Solver):
        msg = (
            f"{name}(solver={solver!r}): 'auto' or a solver value such as Lanczos() or "
            "SampleGram() is expected."
        )
        raise ValueError(msg)


def _warm(previous: Operator | None, skip: int = 0) -> tuple[Pair, ...]:
    return tuple(previous.terms)[skip:] if isinstance(previous, KroneckerSum) else ()


def positive(pair: Pair, block: Rearranged) -> Pair:
    """Make the leading pair positive semidefinite: clamp V, then half a power step each.

    Z maps positive semidefinite matrices to such, so the leading pair can be chosen so;
    an iterate is so only up to its residual.
    """
    rows, cols = pair
    cols = nearest_positive(cols if float(rows.trace()) >= 0 else -cols)
    rows = block.apply(cols)
    rows = (rows + rows.T) / (2 * rows.norm())
    return rows, cols / cols.norm()


def leading_positive(found: Pairs, block: Rearranged) -> list[Pair]:
    """Return the pairs, the leading one positive semidefinite.

    Where values tie with the leading one, any mixture of their pairs is as good; the
    limit of the power iteration from the identity is the positive one.
    """
    pairs = _turned(found)
    near = positive(pairs[0], block)
    if not found.converged or float((near[1] - pairs[0][1]).norm()) <= NEAR:
        return [near, *pairs[1:]]
    if len(pairs) > 1:  # a tie that goes beyond the rank: no mixture found is positive
        return pairs
    return [_powered(near, block)]


def _turned(found: Pairs) -> list[Pair]:
    """Turn tied leading pairs so that the first holds all the trace of their V."""
    tied = int((found.values >= (1 - NEAR) * found.values[0]).sum())
    pairs = [_signed(pair) for pair in found.pairs]
    traces = torch.stack([cols.trace() for _, cols in pairs[:tied]])
    if tied == 1 or not float(traces.norm()) > NEAR:
        return pairs
    eye = torch.eye(tied, dtype=traces.dtype, device=traces.device)
    turn, _ = torch.linalg.qr(torch.cat([traces[:, None], eye], 1))
    turn[:, 0] *= torch.sign(turn[:, 0] @ traces)
    rows = torch.einsum("kab,kl->lab", torch.stack([r for r, _ in pairs[:tied]]), turn)
    cols = torch.einsum("kab,kl->lab", torch.stack([c for _, c in pairs[:tied]]), turn)
    return [*zip(rows, cols, strict=True), *pairs[tied:]]


def _powered(pair: Pair, block: Rearranged) -> Pair:
    """Iterate from a positive pair, which stays positive, until it stands."""
    rows, cols = pair
    for _ in range(1000):
        image = block.adjoint(rows)
        step = float((image / image.norm() - cols).norm())
        cols = (image + image.T) / (2 * image.norm())
        rows = block.apply(cols)
        rows = (rows + rows.T) / (2 * rows.norm())
        if step <= block.tolerance:
            break
    return rows, cols


def _signed(pair: Pair) -> Pair:
    """Fix the common sign of a pair by its largest entry."""
    rows, cols = pair
    flat = cols.flatten()
    sign = 1.0 if float(flat[flat.abs().argmax()]) >= 0 else -1.0
    return sign * rows, sign * cols


def _terms(found: Pairs, block: Rearranged) -> tuple[Pair, ...]:
    """Return √σ U, √σ V, the leading pair positive where nothing was subtracted."""
    if found.pairs and not block.removed:
        return _scaled(leading_positive(found, block), found)
    return _scaled([_signed(pair) for pair in found.pairs], found)


def _scaled(pairs: list[Pair], found: Pairs) -> tuple[Pair, ...]:
    roots = found.values.clamp_min(0).sqrt()
    return tuple((r * rows, r * cols) for r, (rows, cols) in zip(roots, pairs, strict=True))


def _sum(
    statistics: LayerStatistics, terms: tuple[Pair, ...], found: Pairs, method: str
) -> KroneckerSum:
    samples = statistics.samples
    return KroneckerSum(
        terms,
        statistics.weight_shape,
        statistics.provenance.by(method),
        found.values,
        found.converged,
        found.iterations,
        found.residual,
        samples.dtype,
        samples.device,
    )


@final
@dataclass(frozen=True)
class KPSVD:
    r"""The best sum of k Kronecker products in Frobenius norm.

    .. math:: \min_{G_j, A_j} \Big\| F - \sum_{j \le k} G_j \otimes A_j \Big\|_F

    the truncated singular value decomposition of Van Loan's rearrangement of F; the
    squared error is :math:`\sum_{j>k} σ_j^2`.

    Parameters
    ----------
    rank
        k, the number of products; a rank above the numerical rank stops at it.
    solver
        A solver value, or "auto" to choose by counted cost.

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

    def __post_init__(self) -> None:
        """Check the rank and the solver."""
        _check("KPSVD", self.rank, self.solver)

    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> KroneckerSum:
        """Return the best sum of products of one block."""
        block = Rearranged(statistics.samples, statistics.count)
        found = _solver(self.solver)(block, self.rank, _warm(previous))
        return _sum(statistics, _terms(found, block), found, repr(self))

    def accumulate(
        self, state: Held | Pass | None, statistics: LayerStatistics
    ) -> Held | Pass:
        """Keep the chunk, or add its products where the solver is `Passes`."""
        if isinstance(self.solver, Passes):
            assert not isinstance(state, Held)
            return self.solver.accumulate(state, statistics, self.rank)
        assert not isinstance(state, Pass)
        return (state or Held()).add(statistics)

    def merge(self, first: Held | Pass, second: Held | Pass) -> Held | Pass:
        """Keep both parts, or add up their products."""
        if isinstance(first, Pass) and isinstance(second, Pass):
            return first + second
        assert isinstance(first, Held)
        assert isinstance(second, Held)
        return first + second

    def next_pass(self, state: Held | Pass) -> Pass | None:
        """Return what the next pass multiplies; one pass is enough for held samples."""
        if isinstance(self.solver, Passes) and isinstance(state, Pass):
            return self.solver.next_pass(state, self.rank)
        return None

    def finish(self, state: Held | Pass) -> KroneckerSum:
        """Solve for all that was kept, or return what the passes have found."""
        if isinstance(state, Held):
            return self(state.joined())
        assert isinstance(self.solver, Passes)
        assert state.sums is not None
        found = self.solver.finish(state, self.rank)
        pairs = _turned(found) if found.pairs else []
        if pairs:  # positive up to the residual, so that clamping changes no more
            near = nearest_positive(pairs[0][0]), nearest_positive(pairs[0][1])
            if float((near[1] - pairs[0][1]).norm()) <= NEAR:
                pairs[0] = near
        sums = state.sums
        return KroneckerSum(
            _scaled(pairs, found),
            sums.weight_shape,
            sums.provenance.by(repr(self)),
            *found[1:],
            state.block.dtype,
            state.block.device,
        )


@final
@dataclass(frozen=True)
class Deflation:
    """Rank-1 solves in turn, each on what the others left over.

    Equals `KPSVD` of the same rank up to the solver's tolerance.

    Parameters
    ----------
    rank
        Products.
    solver
        Solver of each rank-1 problem.

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

    def __post_init__(self) -> None:
        """Check the rank and the solver."""
        _check("Deflation", self.rank, self.solver)

    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> KroneckerSum:
        """Return the sum of products found one by one."""
        block = Rearranged(statistics.samples, statistics.count)
        warm = _warm(previous)
        terms: tuple[Pair, ...] = ()
        steps: list[Pairs] = []
        for k in range(self.rank):
            found = _solver(self.solver)(block, 1, warm[k : k + 1])
            if not _worth(found, steps):
                break
            new = _terms(found, block)
            steps.append(found)
            terms, block = terms + new, block.less(new)
        return _sum(statistics, terms, _together(steps, statistics), repr(self))

    def accumulate(self, state: Held | None, statistics: LayerStatistics) -> Held:
        """Keep the chunk."""
        return (state or Held()).add(statistics)

    def merge(self, first: Held, second: Held) -> Held:
        """Keep both parts."""
        return first + second

    def next_pass(self, state: Held) -> None:
        """One pass is enough."""

    def finish(self, state: Held) -> KroneckerSum:
        """Solve for all that was kept."""
        return self(state.joined())


def _worth(found: Pairs, steps: list[Pairs]) -> bool:
    if not len(found.values):
        return False
    eps = torch.finfo(found.values.dtype).eps
    return not steps or float(found.values[0]) > 1e2 * eps * float(steps[0].values[0])


def _together(steps: list[Pairs], statistics: LayerStatistics) -> Pairs:
    samples = statistics.samples
    empty = torch.zeros(0, dtype=samples.dtype, device=samples.device)
    values: Tensor = torch.cat([s.values for s in steps]) if steps else empty
    return Pairs(
        tuple(pair for step in steps for pair in step.pairs),
        values,
        all(step.converged for step in steps),
        sum(step.iterations for step in steps),
        max((step.residual for step in steps), default=0.0),
    )


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

    rank: int = 1
    solver: SolverChoice = "auto"

    def __post_init__(self) -> None:
        """Check the rank and the solver."""
        _check("KFACCorrected", self.rank, self.solver)

    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> KroneckerSum:
        """Return KFAC and its correction.

        Raises
        ------
        NeedsSharedForm
            If the block has no inputs and output gradients.
        """
        kfac = KFAC()(statistics)
        block = Rearranged(statistics.samples, statistics.count).less(tuple(kfac.terms))
        found = _solver(self.solver)(block, self.rank, _warm(previous, skip=1))
        if not _above_rounding(found, kfac):
            found = found._replace(pairs=(), values=found.values[:0])
        terms = tuple(kfac.terms) + _terms(found, block)
        return replace(
            _sum(statistics, terms, found, repr(self)), singular_values=found.values
        )

    def accumulate(self, state: Held | None, statistics: LayerStatistics) -> Held:
        """Keep the chunk."""
        return (state or Held()).add(statistics)

    def merge(self, first: Held, second: Held) -> Held:
        """Keep both parts."""
        return first + second

    def next_pass(self, state: Held) -> None:
        """One pass is enough."""

    def finish(self, state: Held) -> KroneckerSum:
        """Solve for all that was kept."""
        return self(state.joined())


def _above_rounding(found: Pairs, kfac: KroneckerSum) -> bool:
    """Whether a remainder is more than KFAC's own rounding errors."""
    if not len(found.values):
        return False
    eps = torch.finfo(found.values.dtype).eps
    return float(found.values[0]) > 1e2 * eps * kfac.frobenius_norm()
