"""Solvers of the rearranged block: on tables that hold it whole, or by products with it."""

from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.approximators.rearranged import (
    Pair,
    Pairs,
    Rearranged,
    Weights,
    as_pairs,
    chained,
    significant,
)
from fisherlab.numerics.gram_krylov import GramMap, Table, gram_krylov, gram_power
from fisherlab.numerics.krylov import Triplets, block_krylov
from fisherlab.numerics.linalg import factorised
from fisherlab.numerics.packed import pack, unpack
from fisherlab.samples import OuterSamples
from fisherlab.samples.outer import KEPT_EXAMPLES
from fisherlab.settings import setting

WHOLE_EXAMPLES = 4096  # N × N tables up to this size are held whole
OVERSAMPLE = 4  # columns of a block beyond the rank: the tables are read once for all
POWER_STEPS = 200  # before Krylov steps go on
SINGLE_STEPS = 50  # power steps in float32 before float64 goes on


@final
@setting
class DenseSVD:
    """The singular value decomposition of the whole rearrangement.

    In packed symmetric coordinates for layers used at one position, in full ones
    otherwise (skew ⊗ skew pairs exist under weight sharing). Holds p²/4 or p² numbers.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> fl.KPSVD(1, fl.DenseSVD())(stats["weight"]).converged
    True
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
        what = "the rearranged block"
        u, values, vt = factorised("svd", whole, what, full_matrices=False)
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
@setting
class SampleGram:
    """Iteration in the space of examples, through two N × N Gram tables.

    With U = Σ x_n G_n and V = Σ y_n a_n a_nᵀ, the map is y ↦ x = K_A y / N, its adjoint
    x ↦ y = K_G x / N, and the metrics are K_G = (⟨G_n, G_m⟩), K_A = ((a_n·a_m)²). Rank 1
    is power iteration from equal weights, which stay nonnegative, so that both factors
    are positive semidefinite; higher ranks, a second value next to the first, and what
    KFAC or earlier pairs leave over, are block Krylov iteration in float64. The tables
    cost N² (d_in + V² d_out) / 2 multiply-adds, a step 2 N²; above 4096 examples half of
    each is held, N² numbers for both. For layers used at one position. Where N exceeds the
    d (d + 1) / 2 entries of a factor, the tables are singular: the vectors of higher ranks
    may stay at 1e-6 of their length, and `converged` says so.

    Parameters
    ----------
    steps
        Blocks of one Krylov space before a restart, for ranks above 1.
    tolerance, max_iterations
        As in `Power`.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> fl.KPSVD(1, fl.SampleGram())(stats["weight"]).converged
    True
    """

    steps: int = 12
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
            For weight sharing, or where terms were subtracted that are not known as
            weighted sums over the examples.
        """
        samples = block.samples
        if not isinstance(samples, OuterSamples) or block.weights is None:
            raise ValueError(
                "SampleGram solves blocks of layers used at one position, less what it "
                "found itself or KFAC; use Lanczos() for shared weights and for other "
                "remainders."
            )
        tolerance = self.tolerance or block.tolerance
        if rank == 1 and not block.removed:
            triplets = self._leading(block, samples, tolerance)
            single = samples.dtype != torch.float64
            if single and not len(triplets.values):  # tables of small numbers underflow
                triplets = self._leading(block, samples.to(torch.float64), tolerance)
        else:
            start, most = self._start(samples, rank), self.max_iterations
            triplets = self._krylov(block, rank, start, tolerance, most)
        return _from_examples(samples, triplets, whole=not block.removed)

    def _leading(
        self, block: Rearranged, samples: OuterSamples, tolerance: float
    ) -> Triplets:
        """Iterate in the precision of the samples, in float64 where that falls short.

        Where the second value lies so near that many power steps are not enough, Krylov
        steps go on.
        """
        maps = GramMap(*_tables(samples), block.count)
        start = samples.inputs.new_ones(samples.examples)
        steps = min(POWER_STEPS, self.max_iterations)
        if maps.right.dtype != torch.float64:
            found = gram_power(maps, start, tolerance, min(SINGLE_STEPS, steps))
            if found.converged or not len(found.values):
                return found
            maps, start = maps.double(), found.right[:, 0].double()
        found, more = gram_power(maps, start, tolerance, steps), self.max_iterations - steps
        if found.converged or not len(found.values) or not more:
            return found
        near = self._start(samples, 1)
        near[:, 0] = found.right[:, 0]
        last = self._krylov(block, 1, near, tolerance, more)
        return last._replace(iterations=steps + last.iterations)

    def _krylov(
        self, block: Rearranged, rank: int, start: Tensor, tolerance: float, most: int
    ) -> Triplets:
        """Go on in float64: tables of squares lose half of the digits."""
        assert isinstance(block.samples, OuterSamples)
        assert block.weights is not None
        fine = block.samples.to(torch.float64)
        maps = GramMap(*_tables(fine), block.count, _stacked(block.weights))
        return gram_krylov(
            maps,
            rank,
            start,
            depth=self.steps,
            tolerance=tolerance,
            max_products=most,
        )

    def _start(self, samples: OuterSamples, rank: int) -> Float[Tensor, "n b"]:
        """Return unit weights first: half a step of TKFAC."""
        n = samples.examples
        generator = torch.Generator().manual_seed(0)
        width = min(n, rank + OVERSAMPLE)
        start = torch.randn(
            n, width, generator=generator, dtype=torch.float64, device="cpu"
        )
        start[:, 0] = 1.0
        return start.to(samples.device)


def _tables(samples: OuterSamples) -> tuple[Table, Table]:
    """Return the two tables, by halves where they are large."""
    if samples.examples <= KEPT_EXAMPLES:
        return samples.kept_grams
    return samples.grams() if samples.examples <= WHOLE_EXAMPLES else samples.half_grams()


def _stacked(weights: tuple[Weights, ...]) -> tuple[Tensor, Tensor] | None:
    """Return the weights of terms as columns."""
    if not weights:
        return None
    rows, cols = zip(*weights, strict=True)
    return torch.stack(rows, 1).double(), torch.stack(cols, 1).double()


def _from_examples(samples: OuterSamples, triplets: Triplets, *, whole: bool) -> Pairs:
    """Turn weights of examples into matrices; those leading the whole have one sign."""
    pairs, weights, positive = [], [], False
    for k in range(len(triplets.values)):
        left, right = triplets.left[:, k], triplets.right[:, k]
        if k == 0 and whole:
            # Nonnegative tables have nonnegative leading weights (Perron), but for ties.
            sign = 1.0 if float(left.sum()) >= 0 else -1.0
            left, right = _without_rounding(sign * left), _without_rounding(sign * right)
            positive = bool((left >= 0).all() and (right >= 0).all())
        rows = samples.weighted_outputs(left.to(samples.dtype))
        cols = samples.weighted_inputs(right.to(samples.dtype))
        lengths = rows.norm(), cols.norm()
        if not min(lengths) > 0:  # weights of a value that is rounding alone
            break
        pairs.append((rows / lengths[0], cols / lengths[1]))
        weights.append((left / lengths[0], right / lengths[1]))
    values = triplets.values[: len(pairs)].to(samples.dtype)
    return Pairs(tuple(pairs), values, *triplets[3:], positive, tuple(weights))


def _without_rounding(weights: Tensor) -> Tensor:
    """Return weights with negative ones of rounding size set to zero."""
    negligible = float(weights.min()) >= -1e-6 * float(weights.max())
    return weights.clamp_min(0) if negligible else weights


@final
@setting
class Power:
    """Power iteration, one pair after the other, each on what the others left.

    Parameters
    ----------
    tolerance
        Relative residual ‖Zᵀu − σv‖ / σ₁; 1e-10 in float64 and 2e-6 in float32 if None.
    max_iterations
        For each pair.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> fl.KPSVD(1, fl.Power())(stats["weight"]).converged
    True
    """

    tolerance: float | None = None
    max_iterations: int = 1000

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs."""
        found: list[Pairs] = []
        block = block.multiplied_often()
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
            one = as_pairs(triplets, block.samples.weight_shape)
            if not significant(one, found):
                break
            found.append(one)
            rows, cols = one.pairs[0]
            block = block.less(((one.values[0] * rows, cols),))
        return chained(found, block)


@final
@setting
class Subspace:
    r"""Subspace iteration: a block of pairs at once, with `oversample` more than wanted.

    .. math:: V \leftarrow \mathrm{orth}(Z^T \mathrm{orth}(Z V))

    Parameters
    ----------
    oversample
        Extra columns, which speed convergence up.
    tolerance, max_iterations
        As in `Power`.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> fl.KPSVD(1, fl.Subspace())(stats["weight"]).converged
    True
    """

    oversample: int = 2
    tolerance: float | None = None
    max_iterations: int = 1000

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs."""
        return _krylov(block, rank, warm, self.oversample, 1, self)


@final
@setting
class Lanczos:
    r"""Block Golub-Kahan-Lanczos with full reorthogonalisation and restarts.

    .. math:: Z V_k = U_k B_k, \qquad B_k \text{ block bidiagonal}

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

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> fl.KPSVD(1, fl.Lanczos())(stats["weight"]).converged
    True
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
        block.multiplied_often().linear(),
        rank,
        block.start(rank + extra, warm),
        depth=depth,
        tolerance=limits.tolerance or block.tolerance,
        max_products=limits.max_iterations,
        floor=block.floor,
    )
    return as_pairs(triplets, block.samples.weight_shape)


def _published_lanczos(block: Rearranged, rank: int, steps: int) -> Pairs:
    """Golub-Kahan bidiagonalisation as published: short recurrences, no restart."""
    linear, start = block.linear(), block.start(1)
    q = start / start.norm()
    p = linear.apply(q)
    alpha = [p.norm()]
    if not float(alpha[0]) > 0:  # a zero block
        return chained([], block)
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
    u, values, vt = factorised("svd", small, "the bidiagonal matrix of Lanczos")
    strong = values > 1e2 * torch.finfo(values.dtype).eps * values[0]
    keep = min(rank, int(strong.sum()))
    lefts = torch.cat(left, 1) @ u[:, :keep]
    rights = torch.cat(right, 1) @ vt.T[:, :keep]
    rest = linear.adjoint(lefts) - rights * values[:keep]
    worst = float(rest.norm(dim=0).max() / values[0].clamp_min(1e-300))
    done = worst <= block.tolerance
    return as_pairs(
        Triplets(lefts, values[:keep], rights, done, len(alpha), worst),
        block.samples.weight_shape,
    )
