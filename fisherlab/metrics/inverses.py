"""Metrics of damped inverses."""

import torch

from fisherlab.metrics.floors import rooted
from fisherlab.metrics.pairs import Damped
from fisherlab.metrics.register import of_inverses
from fisherlab.numerics.linalg import damped_cholesky
from fisherlab.operators import FactoredFisher


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
    return float(relative_difference(f, g, damped).norm()) / pair.rows**0.5


def relative_difference(f: torch.Tensor, g: torch.Tensor, damped: Damped) -> torch.Tensor:
    """Return L⁻¹ (P − Q) L⁻ᵀ with Q = L Lᵀ.

    Raises
    ------
    IndefiniteError
        If Q is not positive definite.
    """
    factor = damped_cholesky(g, damped.damping, repr(damped.pair.approx))
    half = torch.linalg.solve_triangular(factor, f - g, upper=False)
    return torch.linalg.solve_triangular(factor, half.mT, upper=False)
