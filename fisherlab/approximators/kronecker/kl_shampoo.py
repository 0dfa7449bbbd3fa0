"""The Kronecker product nearest to a block in Kullback-Leibler divergence."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from fisherlab.approximators import register
from fisherlab.approximators.base import OfSamples
from fisherlab.approximators.costs import Cost, cubes, pair_numbers
from fisherlab.approximators.kpsvd.rearranged import Rearranged
from fisherlab.approximators.states import by_group
from fisherlab.numerics.linalg import damped_cholesky
from fisherlab.operators import KroneckerSum, Operator
from fisherlab.samples import Samples
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics

SWEEPS = 30  # pairs of half-steps until convergence, about


@final
@dataclass(frozen=True, eq=False)
class Alternation:
    r"""The two half-steps, each of which minimises over one factor in closed form.

    Parameters
    ----------
    block
        F as a map on matrices, M ↦ (1/N) Σ D M Dᵀ, in float64.
    ridge
        κ, absolute: what is fitted is F + κI.
    """

    block: Rearranged
    ridge: float

    def rows(self, cols: Tensor) -> Tensor:
        """Return the best G for an A: (Σ D A⁻¹ Dᵀ / N + κ tr(A⁻¹) I) / d_in."""
        inverse = _inverse(cols, "the column factor of KL-Shampoo")
        shift = self.ridge * inverse.trace()
        return _shifted(self.block.apply(inverse), shift) / len(cols)

    def cols(self, rows: Tensor) -> Tensor:
        """Return the best A for a G: (Σ Dᵀ G⁻¹ D / N + κ tr(G⁻¹) I) / d_out."""
        inverse = _inverse(rows, "the row factor of KL-Shampoo")
        shift = self.ridge * inverse.trace()
        return _shifted(self.block.adjoint(inverse), shift) / len(rows)


class Fitted(NamedTuple):
    """Both factors, of equal norm, and how they were found."""

    rows: Tensor
    cols: Tensor
    iterations: int
    residual: float


def fitted(
    steps: Alternation, start: Tensor, tolerance: float, max_iterations: int
) -> Fitted:
    """Alternate from a column factor until G stands still in its own metric.

    The residual is ‖G^-½ G₊ G^-½ − I‖ / √d_out, which no change of basis alters.
    """
    rows, cols, residual, sweep = steps.rows(start), start, float("inf"), 0
    while residual > tolerance and sweep < max_iterations:
        cols = steps.cols(rows)
        old, rows, sweep = rows, steps.rows(cols), sweep + 1
        residual = _moved(old, rows)
    scale = float(cols.norm() / rows.norm()) ** 0.5
    return Fitted(rows * scale, cols / scale, sweep, residual)


def _moved(old: Tensor, new: Tensor) -> float:
    half = damped_cholesky(old, 0.0, "the row factor of KL-Shampoo")
    left = torch.linalg.solve_triangular(half, new, upper=False)
    both = torch.linalg.solve_triangular(half, left.T, upper=False)
    both.diagonal().sub_(1)
    return float(both.norm()) / len(new) ** 0.5


def _inverse(matrix: Tensor, what: str) -> Tensor:
    return torch.cholesky_inverse(damped_cholesky(matrix, 0.0, what))


def _shifted(matrix: Tensor, shift: float | Tensor) -> Tensor:
    matrix.diagonal().add_(shift)
    return matrix


@shown
@by_group
@numeric
@final
@dataclass(frozen=True)
class KLShampoo(OfSamples[Operator]):
    r"""The Kronecker product nearest to F in Kullback-Leibler divergence.

    .. math:: \min_{G, A} \mathrm{KL}\big(N(0, F + κI) \,\|\, N(0, G \otimes A)\big)

    by two closed forms in turn, each the minimum over one factor:

    .. math:: G = \frac{1}{d_{in}} \Big(\frac1N \sum D A^{-1} D^T + κ \,\mathrm{tr}(A^{-1})
              I\Big), \quad A = \frac{1}{d_{out}} \Big(\frac1N \sum D^T G^{-1} D +
              κ \,\mathrm{tr}(G^{-1}) I\Big)

    Parameters
    ----------
    ridge
        κ as a share of the mean eigenvalue tr F / p. Few examples leave F singular, and
        without κ the divergence then falls without end; 0 is for blocks of full rank.
    tolerance
        On the change of G in its own metric: 1e-10 in float64, 2e-6 in float32 if None.
    max_iterations
        Pairs of half-steps; what has not converged by then says so.

    Raises
    ------
    ValueError
        For a negative ridge, or no iterations.

    Notes
    -----
    The divergence is geodesically convex in (G, A): its minimum is global, and unique up
    to the scale that the factors share. No half-step can raise it. What KPSVD is to the
    Frobenius error, this is to ``gaussian_kl``; TKFAC is where it starts. Exact, for κ = 0,
    where F is one Kronecker product of full rank. Keeps the samples of a stream; works in
    float64; an iteration costs two products with the rearranged block, as one of KPSVD,
    and two inverses. Holds d_out² + d_in² numbers.

    References
    ----------
    Lin, Lowe, Dangel, Eschenhagen, Xu & Grosse 2025, arXiv 2509.03378, section 3; the
    alternation for matrix normal distributions: Dutilleul 1999; its convexity: Wiesel 2012.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> x = torch.eye(3).double()
    >>> model = torch.nn.Linear(3, 2, bias=False).double()
    >>> stats = fl.collect(model, (x, None), fl.Gaussian())
    >>> round(fl.KLShampoo()(stats["weight"]).trace(), 4)
    2.0
    """

    decomposes: ClassVar[bool] = True
    inverts: ClassVar[bool] = True  # with a ridge

    ridge: float = 1e-6
    tolerance: float | None = None
    max_iterations: int = 500

    def __post_init__(self) -> None:
        """Check ridge and iterations."""
        if not 0 <= self.ridge < float("inf") or self.max_iterations < 1:
            msg = f"{self!r}: a finite ridge of at least 0 and an iteration are expected."
            raise ValueError(msg)

    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        """Return the product of one block, from the factors of `previous` if given.

        Raises
        ------
        NumericalError
            If a factor is singular, as it may be without a ridge.
        """
        samples, shape = statistics.samples, statistics.weight_shape
        made = statistics.provenance.by(repr(self))
        mean = float(samples.squared_norms().sum(dtype=torch.float64))
        mean /= statistics.count * shape[0] * shape[1]
        if mean == 0:
            place = samples.device
            return KroneckerSum((), shape, made, precision=samples.dtype, place=place)
        wide = Rearranged(samples.to(torch.float64), statistics.count).multiplied_often()
        steps = Alternation(wide, self.ridge * mean)
        limit = self.tolerance or (1e-10 if samples.dtype == torch.float64 else 2e-6)
        found = fitted(steps, _start(wide, mean, previous), limit, self.max_iterations)
        return KroneckerSum(
            ((found.rows.to(samples.dtype), found.cols.to(samples.dtype)),),
            shape,
            made,
            converged=found.residual <= limit,
            iterations=found.iterations,
            residual=found.residual,
        )

    def cost(self, samples: Samples) -> Cost:
        """Count the half-steps and the inverses between them."""
        flops = SWEEPS * (samples.alternating_flops() + cubes(samples))
        return Cost(flops, pair_numbers(samples))


def _start(block: Rearranged, mean: float, previous: Operator | None) -> Tensor:
    """Return a positive column factor: an earlier one, or TKFAC's."""
    if isinstance(previous, KroneckerSum) and len(previous.terms) == 1:
        cols, share = previous.terms[0][1].double(), 1e-6
        return _shifted(cols.clone(), share * float(cols.diagonal().mean()))
    o = block.samples.weight_shape[0]
    eye = torch.eye(o, dtype=torch.float64, device=block.samples.device)
    return _shifted(block.adjoint(eye) / o, 1e-2 * mean)


register.add({"kl-shampoo": KLShampoo()})
