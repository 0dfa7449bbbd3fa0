"""Metrics of the matrices themselves: norms, inner products, traces and diagonals."""

import torch

from fisherlab.metrics.floors import rooted
from fisherlab.metrics.pairs import Pair
from fisherlab.metrics.register import of_matrices

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
