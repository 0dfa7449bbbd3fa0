"""Metrics of the matrices themselves and of their damped inverses, by Frobenius norms."""

import torch

from fisherlab.metrics.floors import rooted
from fisherlab.metrics.pairs import Damped, Pair
from fisherlab.metrics.register import of_inverses, of_matrices
from fisherlab.numerics.linalg import damped_cholesky
from fisherlab.operators import FactoredFisher

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
