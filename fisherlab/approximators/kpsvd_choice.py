"""The choice of a solver by counted cost, and of how a stream is read: kept or passed."""

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
from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators.base import Returned, Sums, add
from fisherlab.approximators.kpsvd_solvers import DenseSVD, Lanczos, SampleGram
from fisherlab.approximators.ranges import passed
from fisherlab.approximators.rearranged import (
    Pair,
    Pairs,
    PositionGram,
    Rearranged,
    Solver,
    as_pairs,
    generic,
    position_flops,
    rounding,
)
from fisherlab.numerics.krylov import (
    Space,
    Triplets,
    block_krylov,
    orthonormal,
    rayleigh_ritz,
)
from fisherlab.numerics.packed import pair_count
from fisherlab.operators import KroneckerSum, Operator
from fisherlab.samples import OuterSamples, Samples
from fisherlab.settings import setting
from fisherlab.statistics import LayerStatistics
from fisherlab.statistics.network import Chunks

HELD_BYTES = 2**28  # samples of a block that "auto" holds before it goes over to passes


@final
@dataclass(frozen=True, eq=False)
class Pass:
    """One pass through the data: the block multiplied and the sums of its images.

    Parameters
    ----------
    space
        The Krylov space that earlier passes built.
    block
        Orthonormal right vectors, (d_in², b).
    image
        Their images, (d_out², b), once a pass has found them; then Zᵀ is applied to them.
    sums
        Σ D V Dᵀ, or Σ Dᵀ U D, over what this pass has seen.
    used
        Blocks multiplied so far.
    removed
        Terms (G, A) subtracted from the block.
    """

    space: Space
    block: Float[Tensor, "ii b"]
    image: Float[Tensor, "oo b"] | None = None
    sums: Sums | None = None
    used: int = 0
    removed: tuple[Pair, ...] = ()

    def seeing(self, statistics: LayerStatistics) -> "Pass":
        """Add a chunk's part of the images."""
        samples = statistics.samples
        o, i = samples.weight_shape
        if self.image is None:
            images = [samples.row_side(v.view(i, i)) for v in self.block.T.contiguous()]
        else:
            rows = self.image.T.contiguous()
            images = [samples.column_side(u.view(o, o)) for u in rows]
        more = Sums.of(statistics, torch.stack(images))
        return self.summing(add(self.sums, more))

    def summing(self, sums: Sums | None) -> "Pass":
        """Return the same block with other images."""
        return replace(self, sums=sums)

    def __add__(self, other: "Pass") -> "Pass":
        """Add up two parts of the data within the same pass."""
        if self.sums is None or other.sums is None:
            return other if self.sums is None else self
        return self.summing(self.sums + other.sums)

    @property
    def seen(self) -> Sums:
        """The sums of a pass that has begun."""
        assert self.sums is not None
        return self.sums

    def means(self) -> Tensor:
        """Return the images as columns, over the examples, less the terms taken off."""
        images = self.seen.tensors[0].flatten(1).T / self.seen.count
        for rows, cols in self.removed:
            if self.image is None:
                images = images - torch.outer(rows.flatten(), cols.flatten() @ self.block)
            else:
                images = images - torch.outer(cols.flatten(), rows.flatten() @ self.image)
        return images

    @property
    def floor(self) -> float:
        """Rounding errors of the terms taken off: no singular value below is one."""
        return rounding(self.removed)

    def completed(self) -> Space:
        """Return the space with the block whose images both passes have found."""
        assert self.image is not None
        return self.space.extended(self.block, self.image, self.means())


@final
@setting
class Passes:
    """Block Krylov iteration by passes: in a stream, no sample is held.

    Each block costs two passes through the data, one for Z V and one for Zᵀ U, and the
    state holds 2·depth·(rank + oversample) pairs of matrices.

    Parameters
    ----------
    depth
        Blocks of one Krylov space before a restart.
    oversample
        Vectors of a block beyond the rank.
    tolerance
        As in `Power`.
    max_iterations
        Blocks at most, each worth two passes.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = [(torch.eye(3).double()[k : k + 1], None) for k in range(3)]
    >>> method = {"streamed": fl.KPSVD(solver=Passes())}
    >>> model = torch.nn.Linear(3, 2).double()
    >>> found = fl.approximate(model, data, fl.Categorical(), method)
    >>> found["streamed"]["weight"].converged
    True
    """

    depth: int = 8
    oversample: int = 1
    tolerance: float | None = None
    max_iterations: int = 100

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs of samples that are held after all."""
        triplets = block_krylov(
            block.linear(),
            rank,
            block.start(rank + self.oversample, warm),
            depth=self.depth,
            tolerance=self.tolerance or block.tolerance,
            max_products=self.max_iterations,
        )
        return as_pairs(triplets, block.samples.weight_shape)

    def accumulate(
        self, state: Pass | None, statistics: LayerStatistics, rank: int
    ) -> Pass:
        """Add a chunk; begin with the identity and fixed noise."""
        if state is None:
            first = Rearranged(statistics.samples, max(statistics.count, 1))
            state = self.begun(first, rank)
        return state.seeing(statistics)

    def begun(self, block: Rearranged, rank: int) -> Pass:
        """Return the first pass over a block, which may have terms taken off."""
        start = block.start(rank + self.oversample)
        return Pass(Space(), orthonormal(start), removed=block.removed)

    def over(self, held: Chunks, rank: int) -> Pass:
        """Return the first pass, over samples that were held until now."""
        first, *rest = held.pieces
        state = self.accumulate(None, first, rank)
        for piece in rest:
            state = state.seeing(piece)
        return state

    def again(self, state: Pass, rank: int, removed: tuple[Pair, ...]) -> Pass:
        """Return the first pass over the same block with other terms taken off."""
        size = state.block.shape[0]
        start = generic(round(size**0.5), rank + self.oversample, len(removed), state.block)
        return Pass(Space(), orthonormal(start), removed=removed)

    def next_pass(self, state: Pass, rank: int) -> Pass | None:
        """Return what the next pass multiplies, or None if the pairs have converged."""
        if state.image is None:
            return replace(state, image=state.means(), sums=None)
        space, used = state.completed(), state.used + 1
        triplets, restart = self._triplets(space, rank)
        if not len(triplets.values) or float(triplets.values[0]) <= state.floor:
            return None
        if triplets.within(self._limit(state)) or used >= self.max_iterations:
            return None
        if space.depth < self.depth:
            block = space.following()
        else:
            space, block = Space(), orthonormal(restart)
        if not block.shape[1]:
            return None
        return Pass(space, block, used=used, removed=state.removed)

    def finish(self, state: Pass, rank: int) -> Pairs:
        """Return the pairs of the last pass."""
        triplets, _ = self._triplets(state.completed(), rank)
        if not len(triplets.values) or float(triplets.values[0]) <= state.floor:
            nothing = triplets.values[:0]
            return Pairs((), nothing, True, state.used + 1, 0.0)
        done = triplets.within(self._limit(state))
        triplets = triplets._replace(converged=done, iterations=state.used + 1)
        return as_pairs(triplets, state.seen.weight_shape)

    def _triplets(self, space: Space, rank: int) -> tuple[Triplets, Tensor]:
        return rayleigh_ritz(space, rank, rank + self.oversample)

    def _limit(self, state: Pass) -> float:
        return self.tolerance or (1e-10 if state.block.dtype == torch.float64 else 2e-6)


SolverChoice = Solver | Literal["auto"]
DENSE_NUMBERS = 2**22  # rearrangements up to this size are decomposed whole
GRAM_EXAMPLES = 11_000  # halves of two N × N tables up to this size are held: 1 GB


@final
@setting
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


def in_tables(samples: Samples, rank: int) -> bool:
    """Tell whether pairs of a whole block are found in tables of pairs of positions.

    Examples
    --------
    >>> in_tables(OuterSamples(torch.ones(5, 3), torch.ones(1, 5, 2)), 1)
    False
    """
    return isinstance(choose(Rearranged(samples, samples.examples), rank), PositionGram)


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
        raise ValueError(f"{name}(rank={rank}): a rank of at least 1 is expected.")
    if solver != "auto" and not isinstance(solver, Solver):
        raise ValueError(
            f"{name}(solver={solver!r}): 'auto' or a solver value such as Lanczos() or "
            "SampleGram() is expected."
        )
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
        return passed(self.found(state), self)
