r"""How far two matrices are apart: their entries, inverses, Gaussians and update steps.

With v the gradient, p* = P⁻¹v the exact and p_Q = Q⁻¹v the approximate direction, the
quadratic model of the loss along a step −Δ is :math:`M(Δ) = ½ Δ^T P Δ - v^T Δ`. Of
zero-mean Gaussians with the damped blocks as covariances

.. math:: KL(N(0, P) ‖ N(0, Q))
          = \tfrac12 \left(\mathrm{tr}\, Q^{-1}P - p + \log\det Q - \log\det P\right)

Where F is rank-deficient λ dominates: state it, and its ratio to the mean eigenvalue.
"""

from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.metrics import pairs
from fisherlab.metrics.pairs import (
    ROUNDING,
    BelowFloor,
    Damped,
    Pair,
    Step,
    measured,
    paired,
    require_operator,
    rooted,
    weight,
)
from fisherlab.metrics.register import named, of_inverses, of_matrices, of_steps
from fisherlab.numerics.linalg import damped_cholesky
from fisherlab.operators import FactoredFisher, Operator
from fisherlab.operators.base import Damping

CONSTANT = 1e-13  # relative spread below which a diagonal is one number plus rounding


@of_matrices
def frobenius_error(pair: Pair) -> float:
    """Return the relative Frobenius error ‖F − F̂‖ / ‖F‖ ("Error 1" of Koroko et al.).

    Parameters
    ----------
    exact, approx
        Operators over the same weight.
    mixed
        Allow operators made from different kinds of Fisher.

    Returns
    -------
    float
        The error; 0 if both are zero, infinity if only F is; a `BelowFloor` where it
        cannot be told from rounding.

    Raises
    ------
    ValueError
        If shapes differ, or Fisher types differ without `mixed`.

    Notes
    -----
    One norm of each and one inner product: O(N²(d_in + d_out)) for the factored exact
    block, never p².

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> frobenius_error(Diagonal(torch.ones(2, 2)), Diagonal(torch.zeros(2, 2)))
    1.0
    """
    return pair.distance()


@of_matrices
def scale_optimal_error(pair: Pair) -> float:
    """Return the error after the best scaling, min_c ‖F − c F̂‖ / ‖F‖ = √(1 − cos²).

    What remains of `frobenius_error` once a wrong scale is forgiven:
    ``frobenius_error² = scale_optimal_error² + (c* − 1)² ‖F̂‖²/‖F‖²``. Parameters, errors,
    cost and floor are those of `frobenius_error`; 1 if F̂ is zero.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(2, 2))
    >>> scale_optimal_error(one, Diagonal(3 * one.entries)) < 1e-15
    True
    """
    if pair.same or pair.exact_norm == 0:
        return 0.0
    if pair.approx_norm == 0:
        return 1.0
    squared = 1 - pair.cosine**2
    return rooted(
        squared, pair.rows, lambda: pair.residual(optimal_scale.of(pair)), pair.floor
    )


@of_matrices
def optimal_scale(pair: Pair) -> float:
    """Return the best scale c* = ⟨F, F̂⟩ / ‖F̂‖², the minimiser of ‖F − c F̂‖.

    Parameters, errors and cost are those of `frobenius_error`; NaN if F̂ is zero.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> optimal_scale(Diagonal(torch.ones(2, 2)), Diagonal(4 * torch.ones(2, 2)))
    0.25
    """
    size = pair.approx_norm**2
    return pair.inner / size if size > 0 else float("nan")


@of_matrices
def cosine_similarity(pair: Pair) -> float:
    """Return the matrix cosine ⟨F, F̂⟩ / (‖F‖ ‖F̂‖).

    The error after the best scaling of F̂ is √(1 − cos²). Parameters and errors are
    those of `frobenius_error`; NaN if one of the two is zero.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(2, 2))
    >>> round(cosine_similarity(one, Diagonal(3 * one.entries)), 12)
    1.0
    """
    return pair.cosine


@of_matrices
def trace_ratio(pair: Pair) -> float:
    """Return tr F̂ / tr F; 1 for every method that keeps the trace.

    Parameters and errors are those of `frobenius_error`; NaN if tr F is zero.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> trace_ratio(Diagonal(torch.ones(2, 2)), Diagonal(3 * torch.ones(2, 2)))
    3.0
    """
    trace = pair.exact.trace()
    return pair.approx.trace() / trace if trace else float("nan")


@of_matrices
def diagonal_correlation(pair: Pair) -> float:
    """Return the Pearson correlation of the two diagonals over the p entries.

    Parameters and errors are those of `frobenius_error`; NaN if a diagonal is constant.
    Costs one diagonal of each: O(N·p) for the factored exact block.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> rising = Diagonal(torch.tensor([[1.0, 2.0, 3.0]]))
    >>> round(diagonal_correlation(rising, Diagonal(5 + 2 * rising.entries)), 12)
    1.0
    """
    centred = []
    for one in (pair.exact, pair.approx):
        diagonal = one.diagonal().flatten()
        moved = diagonal - diagonal.mean()
        if not float(moved.norm()) > CONSTANT * float(diagonal.norm()):
            return float("nan")
        centred.append(moved / moved.norm())
    return float(torch.dot(*centred))


@of_inverses
def inverse_error(damped: Damped) -> float:
    """Return the relative error of the damped inverse, ‖P⁻¹ − Q⁻¹‖ / ‖P⁻¹‖.

    Where F is rank-deficient, λ dominates both inverses: state it with the number.

    Parameters
    ----------
    exact, approx
        Operators over the same weight.
    damping
        Of both; a factored one is that of F̂, with Tikhonov's of the same λ for F.
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
    Norms and the inner product of the two inverses, through the smaller of parameter
    and sample space.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(2, 2).double())
    >>> inverse_error(one, Diagonal(3 * one.entries), damping=1.0)
    0.5
    """
    return 0.0 if damped.pair.same else damped.distance()


@of_inverses
def inverse_cosine(damped: Damped) -> float:
    """Return the matrix cosine of the damped inverses, ⟨P⁻¹, Q⁻¹⟩ / (‖P⁻¹‖ ‖Q⁻¹‖).

    Parameters, errors and cost are those of `inverse_error`.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(2, 2).double())
    >>> round(inverse_cosine(one, Diagonal(3 * one.entries), damping=1.0), 12)
    1.0
    """
    return damped.inverses.cosine


@of_inverses
def whitened_error(damped: Damped) -> float:
    r"""Return ‖P^½ Q⁻¹ P^½ − I‖ / √p: how far Q⁻¹ is from whitening P.

    .. math:: ‖P^{1/2} Q^{-1} P^{1/2} - I‖^2
              = \mathrm{tr}(Q^{-1}P)^2 - 2\,\mathrm{tr}\,Q^{-1}P + p

    with the square inside of the trace. The same for F and F̂ in any other coordinates of
    the weight, up to the damping. Parameters are those of `inverse_error`.

    Returns
    -------
    float
        The error; a `BelowFloor` where it cannot be told from rounding.

    Raises
    ------
    IndefiniteError
        If P or Q is not positive definite.

    Notes
    -----
    For a factored exact block M products with Q⁻¹ and M² projections on the samples,
    panel by panel; other exact blocks are formed.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(2, 2).double())
    >>> whitened_error(one, Diagonal(3 * one.entries), damping=1.0)
    0.5
    """
    pair = damped.pair
    if pair.same:
        return 0.0
    if not isinstance(pair.exact, FactoredFisher):
        return whitened_residual(damped)
    squared = whitened_square(damped) / pair.rows
    floor = max(pair.floor, damped.rounding**0.5)
    return rooted(squared, pair.rows, lambda: whitened_residual(damped), floor)


def whitened_square(damped: Damped) -> float:
    """Return tr(Q⁻¹PQ⁻¹P) − 2 tr Q⁻¹P + p through products of Q⁻¹ with the samples.

    With P = F + λI the first trace is
    ``Σ_ab ⟨D_a, Q⁻¹D_b⟩²/N² + 2λ Σ_a ‖Q⁻¹D_a‖²/N + λ² ‖Q⁻¹‖²``.
    """
    exact, inverse = damped.pair.exact, damped.inverses.approx
    assert isinstance(exact, FactoredFisher)
    squares = lengths = 0.0
    for part in exact.samples.parts():
        turned = inverse @ exact.samples.matrices(part).flatten(0, 1)
        squares += float(exact.samples.project(turned).square().sum())
        lengths += float(turned.square().sum())
    lam, n = damped.damping, exact.count
    size = inverse.frobenius_norm() ** 2
    first = squares / n**2 + 2 * lam * lengths / n + lam**2 * size
    return first - 2 * damped.trace + damped.pair.rows


def whitened_residual(damped: Damped) -> float:
    """Return ‖L⁻¹ (P − Q) L⁻ᵀ‖ / √p with Q = L Lᵀ, from dense blocks, no cancellation."""
    pair = damped.pair
    f, g = pair.exact.to_dense(), pair.approx.to_dense()
    damped_cholesky(f, damped.damping, repr(pair.exact))  # P must be positive definite
    return float(pairs.relative_difference(f, g, damped).norm()) / pair.rows**0.5


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
    return slope * slope / sizes if sizes > 0 else float("nan")  # ** may raise


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
    require_operator("gamma", exact)
    double = exact.to(torch.float64)
    delta, v = weight(direction, double), weight(gradient, double)
    curvature = Pair(double, double).damped(damping).form(delta)
    return _gamma(curvature, _dot(delta, v))


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
    v = weight(gradient, pair.exact)
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


def gaussian_kl(
    exact: Operator,
    approx: Operator,
    damping: Damping,
    *,
    reverse: bool = False,
    mixed: bool = False,
) -> float:
    r"""Return KL(N(0, P) ‖ N(0, Q)) in nats, or the other way round.

    .. math:: \tfrac12 (\mathrm{tr}\, Q^{-1}P - p + \log\det Q - \log\det P)

    Invariant under any change of coordinates of P and Q together.

    Parameters
    ----------
    exact, approx
        Operators over the same weight.
    damping
        Of both; a factored one is that of F̂, with Tikhonov's of the same λ for F.
    reverse
        Return KL(N(0, Q) ‖ N(0, P)) instead.
    mixed
        Allow operators made from different kinds of Fisher.

    Returns
    -------
    float
        At least 0; a `BelowFloor` where it cannot be told from the rounding of its terms.

    Raises
    ------
    IndefiniteError
        If P or Q is not positive definite.
    UnsupportedMetric
        If a determinant or an inverse is not to be had at this size.
    ValueError
        If shapes differ, or Fisher types differ without `mixed`.

    Notes
    -----
    A trace of Q⁻¹ against the samples and two determinants; log det P goes through the
    Gram matrix, ``p log λ + log det(I + K/λ)``.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(2, 1).double())
    >>> round(gaussian_kl(one, Diagonal(3 * one.entries), damping=1.0), 9)
    0.193147181
    """
    name = "reverse_gaussian_kl" if reverse else "gaussian_kl"
    damped = paired(name, exact, approx, mixed).damped(damping)
    return backward(damped) if reverse else forward(damped)


@of_inverses
def stein_divergence(damped: Damped) -> float:
    """Return the Stein (log-det) divergence tr PQ⁻¹ − log det PQ⁻¹ − p = 2 KL(P ‖ Q).

    Parameters, errors and cost are those of `gaussian_kl`.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(2, 1).double())
    >>> round(stein_divergence(one, Diagonal(3 * one.entries), damping=1.0), 9)
    0.386294361
    """
    half = forward(damped)
    return BelowFloor(2 * half) if isinstance(half, BelowFloor) else 2 * half


@named("gaussian_kl")
def forward(damped: Damped) -> float:
    """Return KL(N(0, P) ‖ N(0, Q))."""
    return _divergence(damped, reverse=False)


@named("reverse_gaussian_kl")
def backward(damped: Damped) -> float:
    """Return KL(N(0, Q) ‖ N(0, P))."""
    return _divergence(damped, reverse=True)


def _divergence(damped: Damped, reverse: bool) -> float:
    pair = damped.pair
    if pair.same:
        return 0.0
    mine, other = damped.logdets
    if reverse:
        mine, other = other, mine
    trace = damped.reverse_trace if reverse else damped.trace
    found = divergence(trace, pair.rows, other, mine, damped.rounding)
    if isinstance(found, BelowFloor) and pair.rows <= pairs.RESIDUAL_ROWS:
        return damped.residual_divergences[reverse]
    return found


def divergence(
    trace: float,
    p: int,
    logdet_second: float,
    logdet_first: float,
    rounding: float = ROUNDING,
) -> float:
    """Return ½ (trace − p + log det second − log det first), or its floor.

    Examples
    --------
    >>> divergence(2.0, 2, 0.0, 0.0)
    BelowFloor(2e-12)
    """
    doubled = trace - p + logdet_second - logdet_first
    terms = trace, float(p), logdet_second, logdet_first
    found = measured(doubled, *terms, rounding=rounding)
    if isinstance(found, BelowFloor):
        return BelowFloor(found / 2)
    return found / 2
