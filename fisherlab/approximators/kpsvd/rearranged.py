r"""The rearranged block, and what a solver of the best Kronecker sum is.

The rearranged block :math:`Z = \frac1N \sum_{vn} \mathrm{rearranged}(D_{vn})` maps a
d_in × d_in matrix V to :math:`\frac1N \sum D V D^T`. The best sum of k Kronecker products
is its truncated singular value decomposition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.krylov import LinearMap, Triplets
from fisherlab.samples import Samples, SharedSamples, TurnedSamples

Pair = tuple[Float[Tensor, "o o"], Float[Tensor, "i i"]]
Weights = tuple[Float[Tensor, " n"], Float[Tensor, " n"]]
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


def generic(
    size: int, width: int, number: int, like: Samples | Tensor
) -> Float[Tensor, "c b"]:
    """Return right vectors to start with: the identity, then noise of the number given."""
    generator = torch.Generator().manual_seed(number)
    noise = torch.randn(size * size, width, generator=generator, dtype=torch.float64)
    start = noise.to(dtype=like.dtype, device=like.device) / size
    start[:, 0] = torch.eye(size, dtype=like.dtype, device=like.device).flatten()
    return start


def rounding(terms: tuple[Pair, ...]) -> float:
    """Return the size of what subtracting terms leaves by rounding alone."""
    sizes = sum(float(rows.norm()) * float(cols.norm()) for rows, cols in terms)
    return 1e2 * torch.finfo(terms[0][0].dtype).eps * sizes if terms else 0.0


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
