r"""The rearranged block, and what a solver of the best Kronecker sum is.

The rearranged block :math:`Z = \frac1N \sum_{vn} \mathrm{rearranged}(D_{vn})` maps a
d_in × d_in matrix V to :math:`\frac1N \sum D V D^T`. The best sum of k Kronecker products
is its truncated singular value decomposition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherlab.numerics.gram_krylov import GramMap, gram_krylov, gram_power
from fisherlab.numerics.krylov import LinearMap, Triplets
from fisherlab.numerics.linalg import factorised, spectrum
from fisherlab.numerics.packed import PositionTable
from fisherlab.operators import KroneckerSum, Provenance
from fisherlab.samples import Samples, SharedSamples, TokenSamples, TurnedSamples
from fisherlab.samples.shared import form_flops, table_matrix
from fisherlab.settings import setting

Pair = tuple[Float[Tensor, "o o"], Float[Tensor, "i i"]]
Weights = tuple[Float[Tensor, " n"], Float[Tensor, " n"]]
Rows = Int[Tensor, " r"] | None
FORMED_BYTES = 2**28  # matrices of samples that are held while a solver multiplies


class Pairs(NamedTuple):
    """Unit singular pairs (U of d_out², V of d_in²), largest first.

    `positive` says that the leading pair is positive semidefinite as it was made. Where
    pairs are sums U = Σ x_n G_n, V = Σ y_n a_n a_nᵀ over examples, `weights` holds (x, y).
    """

    pairs: tuple[Pair, ...]
    values: Float[Tensor, " k"]
    converged: bool
    iterations: int
    residual: float
    positive: bool = False
    weights: tuple[Weights, ...] | None = None


@dataclass(frozen=True, eq=False)
class Rearranged:
    """The rearranged block of some samples, less terms that are taken off already.

    Parameters
    ----------
    samples, count
        The block is (1/count) Σ vec(D) vec(D)ᵀ.
    removed
        Terms (G, A) subtracted from the block.
    weights
        Weights of these terms over the examples, G = Σ x_n G_n and A = Σ y_n a_n a_nᵀ;
        None where they are not known.
    """

    samples: Samples
    count: int
    removed: tuple[Pair, ...] = ()
    weights: tuple[Weights, ...] | None = ()

    def apply(self, middle: Float[Tensor, "i i"]) -> Float[Tensor, "o o"]:
        """Return (1/N) Σ D V Dᵀ − Σ ⟨A, V⟩ G."""
        out = self.samples.row_side(middle).div_(self.count)
        for rows, cols in self.removed:
            out -= (cols * middle).sum() * rows
        return out

    def adjoint(self, middle: Float[Tensor, "o o"]) -> Float[Tensor, "i i"]:
        """Return (1/N) Σ Dᵀ U D − Σ ⟨G, U⟩ A."""
        out = self.samples.column_side(middle).div_(self.count)
        for rows, cols in self.removed:
            out -= (rows * middle).sum() * cols
        return out

    def multiplied_often(self) -> "Rearranged":
        """Return the same block, in the form for tens of products."""
        samples = self.samples
        if isinstance(samples, (SharedSamples, TurnedSamples)):
            samples = samples.multiplied_often(FORMED_BYTES)
        return Rearranged(samples, self.count, self.removed, self.weights)

    def less(
        self, terms: tuple[Pair, ...], weights: tuple[Weights, ...] | None = None
    ) -> "Rearranged":
        """Return the block with more terms subtracted."""
        both = None
        if self.weights is not None and weights is not None:
            both = (*self.weights, *weights)
        return Rearranged(self.samples, self.count, self.removed + terms, both)

    @property
    def floor(self) -> float:
        """Rounding errors of the terms taken off: no singular value below is one."""
        return rounding(self.removed)

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
        start = generic(
            self.samples.weight_shape[1], width, len(self.removed), self.samples
        )
        for column, (_, cols) in enumerate(warm[:width]):
            start[:, column] = cols.flatten()
        return start


def used_rows(samples: Samples, count: int) -> tuple[Rearranged, Rows]:
    """Return the block of the rows of a table that were looked up, and these rows.

    Every other row of D is zero, and so is it in every U. Blocks that are no table's are
    returned whole, with None.
    """
    if not isinstance(samples, TokenSamples) or not 0 < len(samples.seen) < samples.size:
        return Rearranged(samples, count), None
    return Rearranged(samples.of_seen(), count), samples.seen


def at_rows(
    terms: tuple[Pair, ...], rows: Rows, size: int
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return terms of some rows of a table as those of all, zero elsewhere."""
    if rows is None:
        return terms
    places = rows[:, None], rows
    return tuple(
        (part.new_zeros(size, size).index_put_(places, part), cols) for part, cols in terms
    )


def generic(
    size: int, width: int, number: int, like: Samples | Tensor
) -> Float[Tensor, "c b"]:
    """Return right vectors to start with: the identity, then noise of the number given."""
    generator = torch.Generator().manual_seed(number)
    noise = torch.randn(
        size * size, width, generator=generator, dtype=torch.float64, device="cpu"
    )
    start = noise.to(dtype=like.dtype, device=like.device) / size
    start[:, 0] = torch.eye(size, dtype=like.dtype, device=like.device).flatten()
    return start


def rounding(terms: tuple[Pair, ...]) -> float:
    """Return the size of what subtracting terms leaves by rounding alone."""
    sizes = sum(_length(rows) * _length(cols) for rows, cols in terms)
    return 1e2 * torch.finfo(terms[0][0].dtype).eps * sizes if terms else 0.0


def _length(matrix: Tensor) -> float:
    """Return ‖M‖ from squares in float64, which those of float32 do not leave."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def _columnwise(
    action: Callable[[Tensor], Tensor], size: int, out: int
) -> Callable[[Tensor], Tensor]:
    def columns(stacked: Tensor) -> Tensor:
        rows = stacked.T.contiguous()  # a strided matrix makes batched products slow
        images = [action(c.view(size, size)).flatten() for c in rows]
        return torch.stack(images, 1) if images else stacked.new_zeros(out * out, 0)

    return columns


@runtime_checkable
class Solver(Protocol):
    """Find the leading pairs of a rearranged block."""

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return at most `rank` leading pairs; `warm` holds earlier ones."""


def as_pairs(triplets: Triplets, weight_shape: tuple[int, int]) -> Pairs:
    """Fold columns into pairs of matrices."""
    o, i = weight_shape
    lefts = [u.reshape(o, o).clone() for u in triplets.left.T]
    rights = [v.reshape(i, i).clone() for v in triplets.right.T]
    return Pairs(tuple(zip(lefts, rights, strict=True)), triplets.values, *triplets[3:])


def significant(one: Pairs, found: list[Pairs]) -> bool:
    """Tell whether a pair is more than rounding errors of the leading one."""
    if not len(one.values) or float(one.values[0]) <= 0:
        return False
    eps = torch.finfo(one.values.dtype).eps
    return not found or float(one.values[0]) > 1e2 * eps * float(found[0].values[0])


def chained(found: list[Pairs], block: Rearranged) -> Pairs:
    """Join pairs that were found one after the other."""
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


NEAR = 1e-4  # relative distance below which a factor or a singular value is another
MIXED = 1e-7  # skew part of a symmetric matrix, and the reverse, that is rounding


def positive(pair: Pair, block: Rearranged) -> Pair:
    """Make the leading pair positive semidefinite: clamp V, then half a power step each.

    Z maps positive semidefinite matrices to such, so the leading pair can be chosen so;
    an iterate is so only up to its residual.
    """
    rows, cols = pair
    cols = nearest_positive(cols if float(rows.trace()) >= 0 else -cols)
    rows = block.apply(cols)
    length = 2 * rows.norm()
    rows = (rows + rows.T).div_(length)
    return rows, cols / cols.norm()


def leading_positive(found: Pairs, block: Rearranged) -> list[Pair]:
    """Return the pairs, the leading one positive semidefinite.

    Where values tie with the leading one, any mixture of their pairs is as good; the
    limit of the power iteration from the identity is the positive one.
    """
    if found.positive:
        return list(found.pairs)
    pairs = turned(found)
    near = positive(pairs[0], block)
    if not found.converged or float((near[1] - pairs[0][1]).norm()) <= NEAR:
        return [near, *pairs[1:]]
    if len(pairs) > 1:  # a tie that goes beyond the rank: no mixture found is positive
        return pairs
    return [_powered(near, block)]


def turned(found: Pairs) -> list[Pair]:
    """Turn tied leading pairs so that the first holds all the trace of their V."""
    tied = int((found.values >= (1 - NEAR) * found.values[0]).sum())
    pairs = [signed(pair) for pair in found.pairs]
    traces = torch.stack([cols.trace() for _, cols in pairs[:tied]])
    if tied == 1 or not float(traces.norm()) > NEAR:
        return pairs
    eye = torch.eye(tied, dtype=traces.dtype, device=traces.device)
    turn, _ = factorised("qr", torch.cat([traces[:, None], eye], 1), "tied pairs")
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


def signed(pair: Pair) -> Pair:
    """Fix the common sign of a pair by its largest entry."""
    rows, cols = pair
    flat = cols.flatten()
    sign = 1.0 if float(flat[flat.abs().argmax()]) >= 0 else -1.0
    return sign * rows, sign * cols


def separated(found: Pairs) -> Pairs:
    """Return pairs that are symmetric or skew, so that their products are symmetric.

    Z commutes with transposition. Where a symmetric and a skew pair tie, any mixture is
    a pair as well; of a tie that the rank cuts, the parts that the mixtures hold most of
    are kept.
    """
    if found.weights is not None or not found.pairs:
        return found
    skew = [float((cols - cols.T).norm()) / 2 for _, cols in found.pairs]
    mixed = [k for k, part in enumerate(skew) if part > MIXED and part**2 < 1 - MIXED**2]
    pairs, values = list(found.pairs), found.values.tolist()
    while mixed:
        tied = [k for k in mixed if values[k] >= (1 - NEAR) * values[mixed[0]]]
        mixed = mixed[len(tied) :]
        for k, pair in zip(tied, _purest([pairs[k] for k in tied]), strict=False):
            pairs[k] = pair
    return found._replace(pairs=tuple(pairs))


def _purest(pairs: list[Pair]) -> list[Pair]:
    """Return as many symmetric or skew combinations, those of the largest part first."""
    rows, cols = (torch.stack(side) for side in zip(*pairs, strict=True))
    candidates: list[tuple[float, Pair]] = []
    for sign in (1, -1):
        parts = [(side + sign * side.mT) / 2 for side in (rows, cols)]
        flat = parts[1].flatten(1).T
        _, sizes, turn = factorised("svd", flat, "tied pairs", full_matrices=False)
        for size, weights in zip(sizes.tolist(), turn, strict=True):
            u, v = (torch.einsum("k,kab->ab", weights, part) for part in parts)
            lengths = u.norm(), v.norm()
            held = size * float(lengths[0])  # a pair not converged may have no such part
            if held > MIXED:
                candidates.append((held, (u / lengths[0], v / lengths[1])))
    candidates.sort(key=lambda one: -one[0])
    return [pair for _, pair in candidates[: len(pairs)]]


def terms_of(found: Pairs, block: Rearranged) -> tuple[Pair, ...]:
    """Return √σ U, √σ V, the leading pair positive where nothing was subtracted."""
    found = separated(found)
    if found.pairs and not block.removed:
        return scaled(leading_positive(found, block), found)
    return scaled([signed(pair) for pair in found.pairs], found)


def weights_of(found: Pairs, block: Rearranged) -> tuple[Weights, ...] | None:
    """Return the weights over the examples of `terms_of`, None where not known."""
    if found.weights is None or not (block.removed or found.positive):
        return None
    roots = found.values.clamp_min(0).sqrt()
    pairs = zip(roots, found.weights, strict=True)
    return tuple((r * rows, r * cols) for r, (rows, cols) in pairs)


def scaled(pairs: list[Pair], found: Pairs) -> tuple[Pair, ...]:
    """Return √σ U, √σ V, symmetric or skew to the last bit."""
    roots = found.values.clamp_min(0).sqrt()
    sides = [(_pure(rows), _pure(cols)) for rows, cols in pairs]
    return tuple((r * rows, r * cols) for r, (rows, cols) in zip(roots, sides, strict=True))


def _pure(factor: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Drop the rounding of a symmetric or skew factor: terms that cancel would show it."""
    allowed = max(MIXED, 1e2 * torch.finfo(factor.dtype).eps) * float(factor.norm())
    turned = factor.T.contiguous()  # large factors are read by rows three times faster
    skew = (factor - turned).div_(2)
    if float(skew.norm()) <= allowed:
        return turned.add_(factor).div_(2)
    return skew if float(turned.add_(factor).norm()) <= 2 * allowed else factor


def terms_of_passes(found: Pairs, whole: bool) -> tuple[Pair, ...]:
    """Return the terms where the samples are gone.

    Parameters
    ----------
    whole
        Whether nothing was subtracted; then the leading pair is positive up to the
        residual, so that clamping it changes no more.
    """
    found = separated(found)
    if not whole or not found.pairs:
        return scaled([signed(pair) for pair in found.pairs], found)
    pairs = turned(found)
    near = nearest_positive(pairs[0][0]), nearest_positive(pairs[0][1])
    if float((near[1] - pairs[0][1]).norm()) <= NEAR:
        pairs[0] = near
    return scaled(pairs, found)


def kronecker_sum(
    terms: tuple[Pair, ...], found: Pairs, shape: tuple[int, int], made: Provenance
) -> KroneckerSum:
    """Return the sum of terms with how they were found."""
    how = found.values, found.converged, found.iterations, found.residual
    return KroneckerSum(terms, shape, made, *how, found.values.dtype, found.values.device)


def nearest_positive(factor: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return the positive semidefinite part of ± a factor, the sign that of its trace."""
    sign = 1.0 if float(factor.trace()) >= 0 else -1.0
    half = sign * (factor + factor.T) / 2
    values, vectors = spectrum(half, "a factor of a leading pair")
    return (vectors * values.clamp_min(0)) @ vectors.T


HELD = 2**28  # bytes of tables and of a Krylov space
DEPTH = 12  # blocks of one Krylov space before a restart
OVERSAMPLE = 2
POWERS = 20  # steps of power iteration before a Krylov space is built


@final
@setting
class PositionGram:
    r"""Iteration on T × T tables of every example, through the Gram matrices of positions.

    With :math:`V = \sum_n A_n^T Y_n A_n` and :math:`U = \sum_{vn} G_{vn}^T X_n G_{vn}` the
    map is :math:`X_n = A_n V A_n^T / N`, its adjoint
    :math:`Y_n = \sum_v G_{vn} U G_{vn}^T / N`: what `SampleGram` is for one position. A
    step costs 2 N² T³ (1 + V²) multiply-adds, whatever the weight. Rank 1 begins with power
    iteration from the identity, whose tables stay positive semidefinite; what that leaves,
    and higher ranks, are block Krylov iteration. In float64.

    Parameters
    ----------
    tolerance, max_iterations
        As in `Power`.
    """

    tolerance: float | None = None
    max_iterations: int = 1000

    def __call__(self, block: Rearranged, rank: int, warm: tuple[Pair, ...] = ()) -> Pairs:
        """Return the leading pairs.

        Raises
        ------
        ValueError
            For layers used at one position, or where terms were subtracted.
        """
        samples = block.samples
        if isinstance(samples, TurnedSamples):
            found = self(Rearranged(samples.upright, block.count, block.removed), rank)
            return found._replace(pairs=tuple((cols, rows) for rows, cols in found.pairs))
        if not isinstance(samples, SharedSamples) or block.removed:
            msg = "PositionGram solves whole blocks of shared weights; use Lanczos()."
            raise ValueError(msg)
        tolerance, fine = self.tolerance or block.tolerance, samples.to(torch.float64)
        maps = GramMap(
            PositionTable.of(fine.inputs[None]),
            PositionTable.of(fine.gradients),
            block.count,
        )
        n, t, _ = samples.inputs.shape
        eye = torch.eye(t, dtype=torch.float64, device=samples.device)
        start = eye.repeat(n, 1, 1).flatten()
        positive = False
        if rank == 1:
            steps = min(POWERS, self.max_iterations)
            triplets = gram_power(maps, start, tolerance, steps)
            positive, start = triplets.converged, triplets.right[:, :1].sum(1)
        if not positive:
            triplets = gram_krylov(
                maps,
                rank,
                _with_noise(start, rank + OVERSAMPLE),
                depth=DEPTH,
                tolerance=tolerance,
                max_products=self.max_iterations,
            )
        pairs = tuple(
            (
                _unit(table_matrix(fine.gradients, left), samples),
                _unit(table_matrix(fine.inputs[None], right), samples),
            )
            for left, right in zip(triplets.left.T, triplets.right.T, strict=True)
        )
        values = triplets.values.to(samples.dtype)
        return Pairs(pairs, values, *triplets[3:], positive=positive)


def position_flops(samples: Samples, rank: int) -> float:
    """Count the multiply-adds of `PositionGram`; infinite where it does not apply."""
    if isinstance(samples, TurnedSamples):
        samples = samples.upright
    if not isinstance(samples, SharedSamples):
        return float("inf")
    if position_bytes(samples, rank) > HELD:
        return float("inf")
    v, n, t, o = samples.gradients.shape
    i, rows = samples.inputs.shape[2], n * t
    step, last = 2 * rows**2 * t * (1 + v * v), min(form_flops(n, v, t, o, i))
    return rows**2 * (i + v * v * o) + 20 * (rank + 2) * step + rank * last


def position_bytes(samples: Samples, rank: int) -> int:
    """Count the bytes of both tables and of the Krylov space."""
    rows, t = samples.examples * samples.positions, samples.positions
    tables = (1 + samples.columns**2) * rows**2
    return 8 * (tables + 4 * DEPTH * (rank + OVERSAMPLE) * rows * t)


def _with_noise(start: Tensor, width: int) -> Float[Tensor, "m b"]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(start), width, generator=generator, dtype=start.dtype)
    noise[:, 0] = start.cpu()
    return noise.to(start.device)


def _unit(matrix: Tensor, like: Samples) -> Tensor:
    return matrix.div_(matrix.norm()).to(like.dtype)
