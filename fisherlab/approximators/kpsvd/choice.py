"""The choice of a solver, by counted cost, and of how a stream is treated."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import (
    Any,
    ClassVar,
    Generic,
    Literal,
    Protocol,
    TypeVar,
    final,
    runtime_checkable,
)

import torch

from fisherlab.approximators.base import Returned
from fisherlab.approximators.kpsvd.passes import HELD_BYTES, Passes
from fisherlab.approximators.kpsvd.position_gram import PositionGram, position_flops
from fisherlab.approximators.kpsvd.rearranged import Pair, Pairs, Rearranged, Solver
from fisherlab.approximators.kpsvd.solvers import DenseSVD, Lanczos, SampleGram
from fisherlab.numerics.packed import pair_count
from fisherlab.operators import KroneckerSum, Operator
from fisherlab.samples import OuterSamples
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics
from fisherlab.statistics.gathered import Chunks

SolverChoice = Solver | Literal["auto"]
DENSE_NUMBERS = 2**22  # rearrangements up to this size are decomposed whole
GRAM_EXAMPLES = 11_000  # halves of two N × N tables up to this size are held: 1 GB


@shown
@numeric
@final
@dataclass(frozen=True)
class Auto:
    """Choose the solver by counted flops and bytes.

    Parameters
    ----------
    tolerance
        Relative residual asked of iterative solvers; as in `Power` if None.

    Examples
    --------
    >>> import fisherlab as fl
    >>> fl.KPSVD(solver=Auto(tolerance=1e-6))
    KPSVD(rank=1, solver=Auto(tolerance=1e-06))
    """

    tolerance: float | None = None

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs by the cheapest solver."""
        solver = choose(block, rank)
        if self.tolerance is not None and isinstance(
            solver, (Lanczos, PositionGram, SampleGram)
        ):
            solver = replace(solver, tolerance=self.tolerance)
        found = solver(block, rank, warm)
        if isinstance(
            solver, (PositionGram, SampleGram)
        ):  # tables of squares resolve half of the digits
            fine = block.samples.dtype == torch.float64
            lost = bool(block.removed) and fine and not found.pairs
            if lost or not found.converged:
                return Lanczos(tolerance=self.tolerance)(block, rank, warm)
        return found


def choose(block: Rearranged, rank: int) -> Solver:
    """Return the solver that counts the fewest multiply-adds within its memory.

    Examples
    --------
    >>> import torch
    >>> samples = OuterSamples(torch.ones(5, 3), torch.ones(1, 5, 2))
    >>> choose(Rearranged(samples, 5), 1)
    DenseSVD()
    """
    samples = block.samples
    o, i = samples.weight_shape
    outer = isinstance(samples, OuterSamples)
    rows, cols = (pair_count(o), pair_count(i)) if outer else (o * o, i * i)
    costs: dict[Solver, float] = {Lanczos(): samples.alternating_flops() * 8 * (rank + 1)}
    if rows * cols <= DENSE_NUMBERS:
        decompose = 12 * min(rows, cols) ** 2 * max(rows, cols)
        costs[DenseSVD()] = samples.dense_flops() + decompose
    n = samples.examples
    if not block.removed:
        costs[PositionGram()] = position_flops(samples, rank)
    if outer and n <= GRAM_EXAMPLES and block.weights is not None:
        finish = rank * n * (samples.columns * o * o + i * i) / 2
        tables = n * n * (i + min(samples.columns**2 * o, pair_count(o)))
        costs[SampleGram()] = tables + 20 * (rank + 2) * n * n + finish
    return min(costs, key=lambda solver: costs[solver])


def solver_of(choice: SolverChoice) -> Solver:
    """Return the solver that a choice stands for."""
    return Auto() if choice == "auto" else choice


_LIMITS = ("tolerance", "max_iterations", "steps", "depth")


def check(name: str, rank: int, solver: SolverChoice) -> None:
    """Check a rank and a choice of solver.

    Raises
    ------
    ValueError
        Naming what is expected.
    """
    if rank < 1:
        msg = f"{name}(rank={rank}): a rank of at least 1 is expected."
        raise ValueError(msg)
    if solver != "auto" and not isinstance(solver, Solver):
        msg = (
            f"{name}(solver={solver!r}): 'auto' or a solver value such as Lanczos() or "
            "SampleGram() is expected."
        )
        raise ValueError(msg)
    limits = {limit: getattr(solver, limit, None) for limit in _LIMITS}
    if any(given is not None and given <= 0 for given in limits.values()):
        raise ValueError(f"{solver!r}: {', '.join(_LIMITS)} must be positive.")


def warm_pairs(previous: Operator | None, skip: int = 0) -> tuple[Pair, ...]:
    """Return the pairs of an earlier result."""
    return tuple(previous.terms)[skip:] if isinstance(previous, KroneckerSum) else ()


def passes_of(choice: SolverChoice) -> Passes:
    """Return how a stream is gone through, where its samples are not held."""
    if isinstance(choice, Passes):
        return choice
    return Passes(tolerance=choice.tolerance if isinstance(choice, Auto) else None)


def is_held(choice: SolverChoice, nbytes: int) -> bool:
    """Tell whether a stream is held: never for `Passes`, while it is small for "auto"."""
    if isinstance(choice, Passes):
        return False
    if choice != "auto" and not isinstance(choice, Auto):
        return True
    return nbytes <= HELD_BYTES


@runtime_checkable
class Passing(Protocol):
    """What goes through a stream in passes: it sees chunks, and parts add up."""

    def seeing(self, statistics: LayerStatistics) -> Any:
        """Add a chunk."""

    def __add__(self, other: Any) -> Any:
        """Add up two parts of the data within the same pass."""


Going = TypeVar("Going", bound=Passing)


class HeldOrPassed(ABC, Generic[Going]):
    """The default of the sums of products: samples are held, or gone through in passes.

    Their own are the call, which solves for held samples, and what passes begin with
    (`passing`), go on with (`following`) and end in (`found`).
    """

    holds_samples: ClassVar[bool] = True
    result: ClassVar[Returned] = "terms"

    rank: int
    solver: SolverChoice

    @property
    def terms(self) -> int:
        """How many products are added up."""
        return self.rank

    def __post_init__(self) -> None:
        """Check the rank and the solver."""
        check(type(self).__name__, self.rank, self.solver)

    @abstractmethod
    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        """Return the sum of products of one block."""

    @abstractmethod
    def passing(self, held: Chunks) -> Going:
        """Return the first pass, over samples that were held until now."""

    @abstractmethod
    def following(self, state: Going) -> Going | None:
        """Return what the next pass multiplies, or None."""

    @abstractmethod
    def found(self, state: Going) -> Operator:
        """Return what the passes have found."""

    def accumulate(self, state: Chunks | Going | None, statistics: LayerStatistics) -> Any:
        """Keep the chunk, or add its products where samples are not held."""
        if state is not None and not isinstance(state, Chunks):
            return state.seeing(statistics)
        held = (state or Chunks()).add(statistics)
        return held if self.holds(held.nbytes) else self.passing(held)

    def holds(self, nbytes: int) -> bool:
        """Tell whether samples of so many bytes are held."""
        return is_held(self.solver, nbytes)

    def merge(self, first: Chunks | Going, second: Chunks | Going) -> Any:
        """Keep both parts, or add up their products."""
        if isinstance(first, Chunks) and isinstance(second, Chunks):
            both = first + second
            return both if self.holds(both.nbytes) else self.passing(both)
        one, other = (
            self.passing(part) if isinstance(part, Chunks) else part
            for part in (first, second)
        )
        return one + other

    def next_pass(self, state: Chunks | Going) -> Going | None:
        """Return what the next pass multiplies; one pass is enough for held samples."""
        return None if isinstance(state, Chunks) else self.following(state)

    def finish(self, state: Chunks | Going) -> Operator:
        """Solve for all that was kept, or return what the passes have found."""
        if isinstance(state, Chunks):
            return self(state.joined())
        return self.found(state)
