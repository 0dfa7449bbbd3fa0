r"""Metrics of the update: the direction taken, and what the quadratic model makes of it.

With v the gradient, p* = P⁻¹v the exact and p_Q = Q⁻¹v the approximate direction, the
quadratic model of the loss along a step −Δ is :math:`M(Δ) = ½ Δ^T P Δ - v^T Δ`.
"""

from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.metrics.pairs import Pair, Step, paired
from fisherlab.metrics.register import named, of_steps
from fisherlab.operators import Operator
from fisherlab.operators.dampings import Damping


@runtime_checkable
class Directions(Protocol):
    """A gradient v, the directions p* and p_Q, and the curvature of P along two of them."""

    @property
    def gradient(self) -> Tensor:
        """The gradient v."""

    @property
    def best(self) -> Tensor:
        """P⁻¹v."""

    @property
    def taken(self) -> Tensor:
        """Q⁻¹v."""

    @property
    def curvature(self) -> float:
        """⟨p_Q, P p_Q⟩."""

    @property
    def plain_curvature(self) -> float:
        """⟨v, P v⟩."""


@final
@dataclass(frozen=True, eq=False)
class Measured:
    """Directions whose curvatures are known already."""

    gradient: Float[Tensor, "o i"]
    best: Float[Tensor, "o i"]
    taken: Float[Tensor, "o i"]
    curvature: float
    plain_curvature: float


@of_steps
def direction_cosine(step: Directions) -> float:
    """Return the cosine of the update directions P⁻¹v and Q⁻¹v.

    Parameters
    ----------
    exact, approx
        Operators over the same weight.
    gradient
        v, shape (d_out, d_in), e.g. the mean gradient.
    damping
        Of both; a factored one is that of F̂, with Tikhonov's of the same λ for F.
    best
        P⁻¹v where it is known already, to be shared by many approximations.
    mixed
        Allow operators made from different kinds of Fisher.

    Raises
    ------
    IndefiniteError
        If F̂ + λI is not positive definite.
    ValueError
        If shapes differ, or Fisher types differ without `mixed`.

    Notes
    -----
    One damped solve with each.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(2, 2))
    >>> round(direction_cosine(one, one, torch.ones(2, 2), 0.1), 12)
    1.0
    """
    norms = float(step.best.norm()) * float(step.taken.norm())
    return _dot(step.best, step.taken) / norms if norms > 0 else float("nan")


@of_steps
def f_cosine_squared(step: Directions) -> float:
    r"""Return the squared cosine of the two directions in the metric of P.

    .. math:: \frac{(p_Q^T P p^*)^2}{(p_Q^T P p_Q)(p^{*T} P p^*)}
              = \frac{(v^T p_Q)^2}{(p_Q^T P p_Q)(v^T p^*)}

    The share of the best possible decrease of the quadratic model that p_Q reaches with
    the best step length along it: 1 is the exact direction, blind to scale. Parameters
    and errors are those of `direction_cosine`; NaN for a zero gradient.

    Notes
    -----
    One damped solve with each, one product with F.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> exact = Diagonal(torch.tensor([[1.0, 3.0]]).double())
    >>> v = torch.ones(1, 2)
    >>> round(f_cosine_squared(exact, Diagonal(torch.ones(1, 2).double()), v, 1.0), 9)
    0.888888889
    """
    sizes = step.curvature * _dot(step.gradient, step.best)
    slope = _dot(step.gradient, step.taken)
    return slope**2 / sizes if sizes > 0 else float("nan")


def gamma(
    exact: Operator,
    direction: Float[Tensor, "o i"],
    gradient: Float[Tensor, "o i"],
    damping: Damping,
) -> float:
    r"""Return γ(Δ) = √(Δᵀ P Δ) / |Δᵀ v|, small for a good direction, blind to its length.

    Its smallest value is :math:`1/\sqrt{v^T P^{-1} v}`, reached by P⁻¹v. Infinity for a
    direction orthogonal to the gradient.

    Parameters
    ----------
    exact
        The exact block F.
    direction
        Δ, shape (d_out, d_in).
    gradient
        v, shape (d_out, d_in).
    damping
        λ.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    References
    ----------
    Wu et al. 2024, arXiv 2406.06420, the quality indicator γ.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(1, 4).double())
    >>> gamma(one, torch.ones(1, 4).double(), torch.ones(1, 4).double(), damping=3.0)
    1.0
    """
    double = exact.to(torch.float64)
    delta = direction.double()
    curvature = Pair(double, double).damped(damping).form(delta)
    return _gamma(curvature, _dot(delta, gradient.double()))


def gamma_ratio(
    exact: Operator,
    approx: Operator,
    gradient: Float[Tensor, "o i"],
    damping: Damping,
    *,
    mixed: bool = False,
) -> float:
    """Return γ(Q⁻¹v) / γ(v): below 1 the approximation improves on the plain gradient.

    Needs no solve with the exact block: one with F̂ and two products with F. Parameters and
    errors are those of `direction_cosine`; NaN for a zero gradient.

    References
    ----------
    Wu et al. 2024, arXiv 2406.06420, the ratio of γ to that of SGD.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> exact = Diagonal(torch.tensor([[1.0, 3.0]]).double())
    >>> round(gamma_ratio(exact, exact, torch.ones(1, 2), 1.0) ** 2, 9)
    0.888888889
    """
    pair = paired("gamma_ratio", exact, approx, mixed)
    v = gradient.double()
    damped = pair.damped(damping)
    taken = damped.pair.approx.solve(v, damped.damping)
    return gammas(Step(damped, v, taken, taken))


@of_steps
def model_decrease_ratio(step: Directions) -> float:
    r"""Return M(p_Q) / M(p*): the decrease of the quadratic model without rescaling.

    .. math:: \frac{v^T p_Q - ½ p_Q^T P p_Q}{½ v^T p^*} \le 1

    Negative where the step is so long that the model rises. Read it beside
    `f_cosine_squared`, which forgives the length. Parameters and errors are those of
    `direction_cosine`; NaN for a zero gradient.

    Notes
    -----
    One damped solve with each, one product with F.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(1, 2).double())
    >>> half = Diagonal(torch.zeros(1, 2).double())  # steps twice as long
    >>> model_decrease_ratio(one, half, torch.ones(1, 2), damping=1.0)
    0.0
    """
    best = _dot(step.gradient, step.best) / 2
    reached = _dot(step.gradient, step.taken) - step.curvature / 2
    return reached / best if best > 0 else float("nan")


@named("gamma_ratio")
def gammas(step: Directions) -> float:
    """Return γ(p_Q) / γ(v)."""
    v = step.gradient
    plain = _gamma(step.plain_curvature, _dot(v, v))
    taken = _gamma(step.curvature, _dot(v, step.taken))
    return taken / plain if plain > 0 else float("nan")


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum())


def _gamma(curvature: float, slope: float) -> float:
    if slope == 0:
        return float("inf") if curvature > 0 else float("nan")
    return max(curvature, 0.0) ** 0.5 / abs(slope)
