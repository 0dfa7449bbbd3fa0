r"""Solvers of the best sum of Kronecker products, as values.

The rearranged block :math:`Z = \frac1N \sum_{vn} \mathrm{rearranged}(D_{vn})` maps a
d_in × d_in matrix V to :math:`\frac1N \sum D V D^T`. The best sum of k Kronecker products
is its truncated singular value decomposition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.krylov import LinearMap, Triplets, block_krylov
from fisherlab.numerics.packed import pack, pair_count, unpack
from fisherlab.samples import OuterSamples, Samples

Pair = tuple[Float[Tensor, "o o"], Float[Tensor, "i i"]]
DENSE_NUMBERS = 2**22  # rearrangements up to this size are decomposed whole
GRAM_EXAMPLES = 4096  # N × N tables up to this size are held


class Pairs(NamedTuple):
    """Unit singular pairs (U of d_out², V of d_in²), largest first."""

    pairs: tuple[Pair, ...]
    values: Float[Tensor, " k"]
    converged: bool
    iterations: int
    residual: float


@dataclass(frozen=True, eq=False)
class Rearranged:
    """The rearranged block of some samples, less terms that are taken off already.

    Parameters
    ----------
    samples, count
        The block is (1/count) Σ vec(D) vec(D)ᵀ.
    removed
        Terms (G, A) subtracted from the block.
    """

    samples: Samples
    count: int
    removed: tuple[Pair, ...] = ()

    def apply(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, "o o"]:
        """Return (1/N) Σ D V Dᵀ − Σ ⟨A, V⟩ G."""
        out = self.samples.row_side(middle) / self.count
        for rows, cols in self.removed:
            out -= (cols * middle).sum() * rows
        return out

    def adjoint(self, middle: Float[Tensor, "o o"]) -> Float[Tensor, "i i"]:
        """Return (1/N) Σ Dᵀ U D − Σ ⟨G, U⟩ A."""
        out = self.samples.column_side(middle) / self.count
        for rows, cols in self.removed:
            out -= (rows * middle).sum() * cols
        return out

    def less(self, terms: tuple[Pair, ...]) -> "Rearranged":
        """Return the block with more terms subtracted."""
        return Rearranged(self.samples, self.count, self.removed + terms)

    @property
    def floor(self) -> float:
        """Rounding errors of the terms taken off: no singular value below is one."""
        sizes = sum(float(rows.norm()) * float(cols.norm()) for rows, cols in self.removed)
        return 1e2 * torch.finfo(self.samples.dtype).eps * sizes

    @property
    def tolerance(self) -> float:
        """Relative residual asked for: 1e-10 in float64, 2e-6 in float32."""
        return 1e-10 if self.samples.dtype == torch.float64 else 2e-6

    def linear(self) -> LinearMap:
        """Return the map on columns of flattened matrices."""
        o, i = self.samples.weight_shape
        return LinearMap(_columnwise(self.apply, i, o), _columnwise(self.adjoint, o, i))

    def start(self, width: int, warm: tuple[Pair, ...] = ()) -> Float[Tensor, "c b"]:
        """Return generic right vectors: earlier ones, the identity, then fixed noise.

        Every remainder gets noise of its own: what one noise vector had of a space of
        tied values is gone with the pair that was found from it.
        """
        i = self.samples.weight_shape[1]
        generator = torch.Generator().manual_seed(len(self.removed))
        noise = torch.randn(i * i, width, generator=generator, dtype=torch.float64)
        start = noise.to(self.samples.dtype).to(self.samples.device) / i
        known = [cols.flatten() for _, cols in warm[:width]] or [
            torch.eye(i, dtype=start.dtype, device=start.device).flatten()
        ]
        for column, vector in enumerate(known):
            start[:, column] = vector
        return start


def _columnwise(
    action: Callable[[Tensor], Tensor], size: int, out: int
) -> Callable[[Tensor], Tensor]:
    def columns(stacked: Tensor) -> Tensor:
        images = [action(c.view(size, size)).flatten() for c in stacked.T]
        return torch.stack(images, 1) if images else stacked.new_zeros(out * out, 0)

    return columns


@runtime_checkable
class Solver(Protocol):
    """Find the leading pairs of a rearranged block."""

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return at most `rank` leading pairs; `warm` holds earlier ones."""


@final
@dataclass(frozen=True)
class Power:
    """Power iteration, one pair after the other, each on what the others left.

    Parameters
    ----------
    tolerance
        Relative residual ‖Zᵀu − σv‖ / σ₁; 1e-10 in float64 and 2e-6 in float32 if None.
    max_iterations
        For each pair.
    """

    tolerance: float | None = None
    max_iterations: int = 1000

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs."""
        found: list[Pairs] = []
        for k in range(rank):
            triplets = block_krylov(
                block.linear(),
                1,
                block.start(1, warm[k : k + 1])
                if k < len(warm) or not k
                else block.start(2)[:, 1:],
                depth=1,
                tolerance=self.tolerance or block.tolerance,
                max_products=self.max_iterations,
                floor=block.floor,
            )
            one = _pairs(triplets, block)
            if not _significant(one, found):
                break
            found.append(one)
            rows, cols = one.pairs[0]
            block = block.less(((one.values[0] * rows, cols),))
        return _chain(found, block)


@final
@dataclass(frozen=True)
class Subspace:
    """Subspace iteration: a block of pairs at once, with `oversample` more than wanted.

    Parameters
    ----------
    oversample
        Extra columns, which speed convergence up.
    tolerance, max_iterations
        As in `Power`.
    """

    oversample: int = 2
    tolerance: float | None = None
    max_iterations: int = 1000

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs."""
        return _krylov(block, rank, warm, self.oversample, 1, self)


@final
@dataclass(frozen=True)
class Lanczos:
    """Block Golub-Kahan-Lanczos with full reorthogonalisation and restarts.

    Parameters
    ----------
    steps
        Blocks of one Krylov space before a restart.
    reorthogonalise
        False is the published two-step recurrence: no reorthogonalisation, no restart,
        one vector; its second pair is far off, which is why it is not the default.
    tolerance, max_iterations
        As in `Power`.

    References
    ----------
    Koroko et al. 2022, arXiv 2201.10285, section 3 (the published recurrence).
    """

    steps: int = 8
    reorthogonalise: bool = True
    tolerance: float | None = None
    max_iterations: int = 1000

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs."""
        if not self.reorthogonalise:
            return _published_lanczos(block, rank, self.steps)
        return _krylov(block, rank, warm, 1, self.steps, self)


def _krylov(
    block: Rearranged,
    rank: int,
    warm: tuple[Pair, ...],
    extra: int,
    depth: int,
    limits: Subspace | Lanczos,
) -> Pairs:
    triplets = block_krylov(
        block.linear(),
        rank,
        block.start(rank + extra, warm),
        depth=depth,
        tolerance=limits.tolerance or block.tolerance,
        max_products=limits.max_iterations,
        floor=block.floor,
    )
    return _pairs(triplets, block)


def _published_lanczos(block: Rearranged, rank: int, steps: int) -> Pairs:
    """Golub-Kahan bidiagonalisation as published: short recurrences, no restart."""
    linear, start = block.linear(), block.start(1)
    q = start / start.norm()
    p = linear.apply(q)
    alpha = [p.norm()]
    if not float(alpha[0]) > 0:  # a zero block
        return _chain([], block)
    tiny = 1e2 * torch.finfo(p.dtype).eps * float(alpha[0])
    left, right, beta = [p / alpha[0]], [q], []
    for _ in range(1, steps):
        z = linear.adjoint(left[-1]) - alpha[-1] * right[-1]
        if float(z.norm()) <= tiny:
            break
        beta.append(z.norm())
        right.append(z / beta[-1])
        p = linear.apply(right[-1]) - beta[-1] * left[-1]
        alpha.append(p.norm() if float(p.norm()) > tiny else torch.zeros_like(p.norm()))
        left.append(p / alpha[-1].clamp_min(tiny))
    small = torch.diag(torch.stack(alpha))
    if beta:
        small += torch.diag(torch.stack(beta), 1)
    u, values, vt = torch.linalg.svd(small)
    strong = values > 1e2 * torch.finfo(values.dtype).eps * values[0]
    keep = min(rank, int(strong.sum()))
    lefts = torch.cat(left, 1) @ u[:, :keep]
    rights = torch.cat(right, 1) @ vt.T[:, :keep]
    rest = linear.adjoint(lefts) - rights * values[:keep]
    worst = float(rest.norm(dim=0).max() / values[0].clamp_min(1e-300))
    done = worst <= block.tolerance
    return _pairs(Triplets(lefts, values[:keep], rights, done, len(alpha), worst), block)


@final
@dataclass(frozen=True)
class DenseSVD:
    """The singular value decomposition of the whole rearrangement.

    In packed symmetric coordinates for layers used at one position, in full ones
    otherwise (skew ⊗ skew pairs exist under weight sharing). Holds p²/4 or p² numbers.
    """

    def __call__(
        self,
        block: Rearranged,
        rank: int,
        warm: tuple[Pair, ...] = (),
    ) -> Pairs:
        """Return the leading pairs."""
        o, i = block.samples.weight_shape
        if isinstance(block.samples, OuterSamples) and _symmetric(block.removed):
            whole = packed_block(block)
            fold: Callable[[Tensor, int], Tensor] = unpack
        else:
            whole, fold = full_block(block), _fold
        u, values, vt = torch.linalg.svd(whole, full_matrices=False)
        strong = values > 10 * torch.finfo(values.dtype).eps * values[:1]
        keep = min(rank, int(strong.sum()))
        pairs = [(fold(u[:, k], o), fold(vt[k], i)) for k in range(keep)]
        return Pairs(tuple(pairs), values[:keep], True, 1, 0.0)


def packed_block(block: Rearranged) -> Float[Tensor, "op ip"]:
    """Return the rearrangement in packed symmetric coordinates."""
    assert isinstance(block.samples, OuterSamples)
    whole = block.samples.packed / block.count
    for rows, cols in block.removed:
        whole = whole - torch.outer(pack(rows), pack(cols))
    return whole


def full_block(block: Rearranged) -> Float[Tensor, "oo ii"]:
    """Return the rearrangement Z, Z[(o, o'), (i, i')] = F[o i, o' i']."""
    o, i = block.samples.weight_shape
    p = o * i
    samples = block.samples
    dense = torch.empty(p, p, dtype=samples.dtype, device=samples.device)
    samples.add_dense_(dense)
    whole = dense.view(o, i, o, i).transpose(1, 2).reshape(o * o, i * i) / block.count
    for rows, cols in block.removed:
        whole -= torch.outer(rows.flatten(), cols.flatten())
    return whole


def _fold(flat: Tensor, size: int) -> Tensor:
    return flat.reshape(size, size)


def _symmetric(terms: tuple[Pair, ...]) -> bool:
    return all(torch.equal(m, m.T) for term in terms for m in term)


@final
@dataclass(frozen=True)
class SampleGram:
    """Block Krylov in the space of examples, through two N × N Gram tables.

    With U = Σ x_n G_n and V = Σ y_n a_n a_nᵀ, the map is y ↦ x = K_A y / N, its adjoint
    x ↦ y = K_G x / N, and the metrics are K_G = (⟨G_n, G_m⟩), K_A = ((a_n·a_m)²). The
    tables are squared and the problem solved in float64. For layers used at one position.

    Parameters
    ----------
    steps
        Blocks of one Krylov space before a restart.
    tolerance, max_iterations
        As in `Power`.
    """

    steps: int = 4
    tolerance: float | None = None
    max_iterations: int = 1000

    def __call__(
        self,
        block: Rearranged,
        rank: int,
        warm: tuple[Pair, ...] = (),
    ) -> Pairs:
        """Return the leading pairs.

        Raises
        ------
        ValueError
            For weight sharing, or where terms have been subtracted already.
        """
        samples = block.samples
        if not isinstance(samples, OuterSamples) or block.removed:
            msg = (
                "SampleGram solves the whole block of a layer used at one position; use "
                "Lanczos() for shared weights and for remainders."
            )
            raise ValueError(msg)
        inputs, outputs = (table.double() for table in samples.kept_grams)
        linear = LinearMap(
            lambda y: inputs @ y / block.count,
            lambda x: outputs @ x / block.count,
            lambda x: outputs @ x,
            lambda y: inputs @ y,
        )
        triplets = block_krylov(
            linear,
            rank,
            self._start(samples, rank),
            depth=self.steps if rank > 1 else 1,
            tolerance=self.tolerance or block.tolerance,
            max_products=self.max_iterations,
        )
        return _from_examples(samples, triplets)

    def _start(self, samples: OuterSamples, rank: int) -> Float[Tensor, "n b"]:
        """Return unit weights first: half a step of TKFAC."""
        n = samples.examples
        generator = torch.Generator().manual_seed(0)
        width = min(n, 1 if rank == 1 else rank + 2)
        start = torch.randn(n, width, generator=generator, dtype=torch.float64)
        start[:, 0] = 1.0
        return start.to(samples.device)


def _from_examples(samples: OuterSamples, triplets: Triplets) -> Pairs:
    """Turn weights of examples into matrices; the leading weights have one sign."""
    pairs = []
    for k in range(len(triplets.values)):
        left, right = triplets.left[:, k], triplets.right[:, k]
        if k == 0:  # nonnegative tables: nonnegative leading weights (Perron), but for ties
            sign = 1.0 if float(left.sum()) >= 0 else -1.0
            left, right = _without_rounding(sign * left), _without_rounding(sign * right)
        rows = samples.weighted_outputs(left.to(samples.dtype))
        cols = samples.weighted_inputs(right.to(samples.dtype))
        pairs.append((rows / rows.norm(), cols / cols.norm()))
    values = triplets.values.to(samples.dtype)
    return Pairs(tuple(pairs), values, *triplets[3:])


def _without_rounding(weights: Tensor) -> Tensor:
    """Return weights with negative ones of rounding size set to zero."""
    negligible = float(weights.min()) >= -1e-6 * float(weights.max())
    return weights.clamp_min(0) if negligible else weights


@final
@dataclass(frozen=True)
class Auto:
    """Choose the solver by counted flops and bytes."""

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs by the cheapest solver."""
        return choose(block, rank)(block, rank, warm)


def choose(block: Rearranged, rank: int) -> Solver:
    """Return the solver that counts the fewest multiply-adds within its memory.

    Examples
    --------
    >>> samples = OuterSamples(torch.ones(5, 3), torch.ones(1, 5, 2))
    >>> choose(Rearranged(samples, 5), 1)
    DenseSVD()
    """
    samples = block.samples
    o, i = samples.weight_shape
    outer = isinstance(samples, OuterSamples)
    rows, cols = (pair_count(o), pair_count(i)) if outer else (o * o, i * i)
    costs: dict[Solver, float] = {Lanczos(): _iteration(samples) * 8 * (rank + 1)}
    if rows * cols <= DENSE_NUMBERS:
        decompose = 12 * min(rows, cols) ** 2 * max(rows, cols)
        costs[DenseSVD()] = samples.dense_flops() + decompose
    n = samples.examples
    if outer and n <= GRAM_EXAMPLES and not block.removed:
        finish = rank * n * (samples.columns * o * o + i * i) / 2
        tables = n * n * (i + min(samples.columns**2 * o, pair_count(o)))
        costs[SampleGram()] = tables + 20 * (rank + 2) * n * n + finish
    return min(costs, key=lambda solver: costs[solver])


def _iteration(samples: Samples) -> float:
    """Count one product with the rearranged block and one with its adjoint."""
    o, i = samples.weight_shape
    if isinstance(samples, OuterSamples):
        return 1.5 * samples.examples * (i * i + samples.columns * o * o)
    return 2.0 * samples.columns * samples.examples * o * i * (o + i)


def _pairs(triplets: Triplets, block: Rearranged) -> Pairs:
    o, i = block.samples.weight_shape
    pairs = []
    for k in range(len(triplets.values)):
        left, right = triplets.left[:, k].view(o, o), triplets.right[:, k].view(i, i)
        pairs.append((left.clone(), right.clone()))
    return Pairs(tuple(pairs), triplets.values, *triplets[3:])


def _significant(one: Pairs, found: list[Pairs]) -> bool:
    if not len(one.values) or float(one.values[0]) <= 0:
        return False
    eps = torch.finfo(one.values.dtype).eps
    return not found or float(one.values[0]) > 1e2 * eps * float(found[0].values[0])


def _chain(found: list[Pairs], block: Rearranged) -> Pairs:
    if not found:
        empty = torch.zeros(0, dtype=block.samples.dtype, device=block.samples.device)
        return Pairs((), empty, True, 0, 0.0)
    first = float(found[0].values[0])
    residuals = [one.residual * float(one.values[0]) / first for one in found]
    return Pairs(
        tuple(pair for one in found for pair in one.pairs),
        torch.cat([one.values for one in found]),
        all(one.converged for one in found),
        sum(one.iterations for one in found),
        max(residuals),
    )
