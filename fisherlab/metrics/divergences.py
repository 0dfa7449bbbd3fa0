r"""Divergences between zero-mean Gaussians with the damped blocks as covariances.

.. math:: KL(N(0, P) ‖ N(0, Q))
          = \tfrac12 \left(\mathrm{tr}\, Q^{-1}P - p + \log\det Q - \log\det P\right)

Where F is rank-deficient λ dominates: state it, and its ratio to the mean eigenvalue.
"""

from fisherlab.metrics import floors
from fisherlab.metrics.floors import ROUNDING, BelowFloor, measured
from fisherlab.metrics.frobenius import relative_difference
from fisherlab.metrics.pairs import Damped, Pair, paired
from fisherlab.metrics.register import named, of_inverses
from fisherlab.numerics.linalg import factorised
from fisherlab.operators import Operator
from fisherlab.operators.dampings import Damping


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
    if isinstance(found, BelowFloor) and pair.rows <= floors.RESIDUAL_ROWS:
        return _residual(damped, reverse)
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


def _residual(damped: Damped, reverse: bool) -> float:
    """Return ½ Σ (ν − log(1 + ν)) over the eigenvalues ν of Q^-½ (P − Q) Q^-½."""
    pair = damped.pair
    if reverse:
        damped = Pair(pair.approx, pair.exact).damped(damped.damping)
        pair = damped.pair
    f, g = pair.exact.to_dense(), pair.approx.to_dense()
    matrix = relative_difference(f, g, damped)
    values = factorised("eigvalsh", matrix, f"{pair.approx!r} relative to {pair.exact!r}")
    return 0.5 * float((values - values.log1p()).sum())
