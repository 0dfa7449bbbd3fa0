"""Metrics of eigenvalues, largest singular values and leading subspaces."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.catalogue import FLOOR
from fisherlab.errors import IndefiniteError, UnsupportedMetric
from fisherlab.metrics.pairs import (
    BelowFloor,
    Damped,
    Pair,
    paired,
    require_operator,
    squarable,
)
from fisherlab.metrics.register import named, of_inverses, of_matrices
from fisherlab.numerics.krylov import extreme_eigenpairs, fixed_noise, leading_sizes
from fisherlab.numerics.linalg import factorised
from fisherlab.operators import Operator

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator
from fisherlab.operators import Eigenform
from fisherlab.operators.eigenform import of_matrix
from fisherlab.settings import numeric

DENSE_DIFFERENCE = 512  # differences up to this size are diagonalised as they are
NOISE = 1e-12  # a relative difference below this is rounding of the products
ZERO = 1e-13  # of the largest: an eigenvalue of F below this is rounding
LEADING = 0.25  # share of all eigenvalues that are computed one by one
SOLVED = 1e-8  # relative residual of the leading eigenvalues together
TIE = 1e-10  # relative gap below which two eigenvalues count as one


@of_matrices
def spectral_error(pair: Pair) -> float:
    """Return the relative spectral-norm error ‖F − F̂‖₂ / ‖F‖₂.

    Parameters and errors are those of `frobenius_error`.

    Returns
    -------
    float
        The error; 0 if both are zero, infinity if only F is; a `BelowFloor` where the
        products differ by rounding only.

    Raises
    ------
    NumericalError
        If the iteration does not converge.

    Notes
    -----
    Lanczos on products with the difference, so nothing cancels and no root is taken: some
    tens of products of each, plus as many of F for ‖F‖₂. Dense below p = 512.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.tensor([[1.0, 2.0]]))
    >>> spectral_error(one, Diagonal(torch.zeros(1, 2)))
    1.0
    """
    if pair.same:
        return 0.0
    if pair.exact_norm == 0:
        return 0.0 if pair.approx_norm == 0 else float("inf")
    if pair.rows <= DENSE_DIFFERENCE:
        f, g = pair.exact.to_dense(), pair.approx.to_dense()
        size = float(factorised("eigvalsh", f, pair.exact).abs().max())
        what = f"{pair.exact!r} − {pair.approx!r}"
        return float(factorised("eigvalsh", f - g, what).abs().max()) / size
    size = abs(_largest(pair.exact.to_scipy(), repr(pair.exact)))
    difference = pair.exact.to_scipy() - pair.approx.to_scipy()
    probe = fixed_noise(pair.rows).numpy()
    heard = float(np.linalg.norm(difference.matvec(probe)))
    if heard <= NOISE * size * np.linalg.norm(probe):
        return BelowFloor(NOISE * pair.rows**0.5)
    return abs(_largest(difference, f"{pair.exact!r} − {pair.approx!r}")) / size


@of_matrices
def spectrum_error(pair: Pair) -> float:
    r"""Return ‖σ(F) − σ(F̂)‖ / ‖σ(F)‖ with sorted singular values ("Error 2").

    Never above `frobenius_error`; 0 does not mean that the matrices agree. Parameters and
    errors are those of `frobenius_error`.

    Raises
    ------
    UnsupportedMetric
        If F̂ cannot give all of its eigenvalues (a sum of several Kronecker products above
        p = 4000) and F has a rank above p / 4.
    NumericalError
        If the iteration for the leading ones does not converge.

    Notes
    -----
    All eigenvalues of both: M³ for the factored exact block, d_out³ + d_in³ for one
    Kronecker product. Where only F gives all of its own, r of them not zero, the r
    largest |eigenvalues| of F̂ and its norm suffice,

    .. math:: \|σ - \hat σ\|^2 = \|F\|^2 + \|\hat F\|^2
              - 2 \sum_{i \le r} σ_i \hat σ_i,

    at some 2 r products of F̂, 32 p r² flops and 2 p r numbers of memory.

    References
    ----------
    Koroko et al. 2022, arXiv 2201.10285, the second error of the experiments.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.tensor([[1.0, 2.0]]))
    >>> spectrum_error(one, Diagonal(torch.tensor([[2.0, 1.0]])))
    0.0
    """
    if pair.same:
        return 0.0
    mine = eigenvalues("spectrum_error", pair.exact).abs().sort(descending=True).values
    size = float(mine.norm())
    if size == 0:
        return 0.0 if pair.approx_norm == 0 else float("inf")
    try:
        other = pair.approx.eigenvalues()
    except ValueError as error:
        return _by_leading(pair, mine, error)
    return float((mine - other.abs().sort(descending=True).values).norm()) / size


def _by_leading(pair: Pair, mine: Float[Tensor, " p"], error: ValueError) -> float:
    """Return the spectrum error of a low-rank F from as many eigenvalues of F̂."""
    rank = int((mine > ZERO * float(mine[0])).sum())
    if rank > pair.rows * LEADING:
        remedy = (
            f"F has rank {rank} of {pair.rows}, and at most {int(pair.rows * LEADING)} "
            "eigenvalues are computed one by one. Take fewer examples or labels."
        )
        raise UnsupportedMetric("spectrum_error", repr(pair.approx), remedy) from error
    products = pair.approx.to_scipy()
    other = leading_sizes(products, rank, repr(pair.approx), SOLVED).to(mine)
    rest = pair.approx_norm**2 - float(other.square().sum())
    squared = float((mine[:rank] - other).square().sum()) + max(rest, 0.0)
    found = squared**0.5 / float(mine.norm())
    return found if found > FLOOR else BelowFloor(FLOOR)


@of_inverses
def log_spectrum_distance(damped: Damped) -> float:
    """Return the root mean square of log((λ_i + λ) / (λ̂_i + λ)) over all p eigenvalues.

    With the sorted eigenvalues of both and the damping λ; in it a small eigenvalue counts
    as much as a large one. Parameters are those of `inverse_error`.

    Raises
    ------
    UnsupportedMetric
        If an operator cannot give all of its eigenvalues.
    IndefiniteError
        If a damped eigenvalue is not positive.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> one = Diagonal(torch.ones(1, 2).double())
    >>> round(log_spectrum_distance(one, Diagonal(3 * one.entries), damping=1.0), 12)
    0.69314718056
    """
    logs = []
    for one in (damped.pair.exact, damped.pair.approx):
        values = eigenvalues("log_spectrum_distance", one)
        if not float(values[-1]) + damped.damping > 0:
            raise IndefiniteError(repr(one), damped.damping, float(values[-1]))
        logs.append((values + damped.damping).log())
    return float((logs[0] - logs[1]).square().mean().sqrt())


def effective_rank(operator: Operator) -> float:
    """Return (tr M)² / ‖M‖², between 1 and p for a positive semi-definite matrix.

    NaN for the zero matrix; a NumericalError where the square of the norm is no number.
    Costs a trace and a norm.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> round(effective_rank(Diagonal(torch.ones(2, 3))), 9)
    6.0
    """
    require_operator("effective_rank", operator)
    double = operator.to(torch.float64)
    size = squarable(double.frobenius_norm(), double) ** 2
    return double.trace() ** 2 / size if size > 0 else float("nan")


@named("effective_rank")
def _of_approximation(pair: Pair) -> float:
    return effective_rank(pair.approx)


@numeric
def subspace_overlap(
    exact: Operator, approx: Operator, k: int = 10, *, mixed: bool = False
) -> float:
    """Return ‖UᵀÛ‖² / k of the k leading eigenvectors: 1 for the same subspace.

    Two random subspaces have about k/p.

    Parameters
    ----------
    exact, approx
        Operators over the same weight.
    k
        The dimension of both subspaces; cut to p.
    mixed
        Allow operators made from different kinds of Fisher.

    Raises
    ------
    UnsupportedMetric
        If the k-th eigenvalue of one is tied with the next, so that its leading subspace
        is not determined, or the operator has no eigenbasis at hand.
    ValueError
        If k is not positive.

    Notes
    -----
    One eigendecomposition of each in its own structure, then k products.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> falling = Diagonal(torch.tensor([[3.0, 2.0, 1.0]]))
    >>> subspace_overlap(falling, Diagonal(torch.tensor([[3.0, 1.0, 2.0]])), k=2)
    0.5
    """
    return overlap(paired("subspace_overlap", exact, approx, mixed), k)


def _largest(products: "LinearOperator", what: str) -> float:
    """Return the eigenvalue of largest magnitude."""
    return float(extreme_eigenpairs(products, 1, "LM", what)[0])


def eigenvalues(metric: str, operator: Operator) -> Float[Tensor, " p"]:
    """Return all eigenvalues, descending, or say by name that there are none.

    Raises
    ------
    UnsupportedMetric
        If the operator cannot give them.
    """
    try:
        return operator.eigenvalues()
    except ValueError as error:
        remedy = "Compare leading eigenvalues: operator.top_eigenvalues(k)."
        raise UnsupportedMetric(metric, repr(operator), remedy) from error


@named("subspace_overlap")
def overlap(pair: Pair, k: int) -> float:
    """Return ‖UᵀÛ‖² / k."""
    if k < 1:
        raise ValueError(f"subspace_overlap: k={k}; at least one direction is expected.")
    k = min(k, pair.rows)
    if k == pair.rows:
        return 1.0
    mine, other = (_leading(one, k) for one in (pair.exact, pair.approx))
    return float((mine.flatten(1) @ other.flatten(1).T).square().sum()) / k


def _leading(operator: Operator, k: int) -> Float[Tensor, "k o i"]:
    basis = decomposed(operator, "subspace_overlap")
    values, order = basis.values.sort(descending=True)
    every = basis.eigenvalues()
    gap = float(every[k - 1] - every[k])
    known = len(values) >= k and torch.equal(every[:k], values[:k])
    if gap <= TIE * float(every.abs().max()) or not known:
        raise UnsupportedMetric(
            "subspace_overlap",
            repr(operator),
            f"Its eigenvalues {k} and {k + 1} are tied ({float(every[k]):.3g}), so the "
            f"{k} leading directions are not determined. Choose another k.",
        )
    return basis.vectors(order[:k])


DENSE_ROWS = 4000  # blocks without a structured basis are diagonalised up to this size


def decomposed(operator: Operator, metric: str = "eigenvalues") -> Eigenform:
    """Return the eigendecomposition of an operator, in float64.

    Parameters
    ----------
    operator
        Samples, Kronecker products, eigenforms, mini-blocks and diagonals keep their
        structure; anything else is diagonalised densely up to p = 4000.
    metric
        Who asks, for the error.

    Raises
    ------
    UnsupportedMetric
        If the operator has no structured basis and p is above 4000.
    NumericalError
        If it holds NaN or infinity.

    Notes
    -----
    d_out³ + d_in³ for Kronecker forms, M³ for M samples, p³ for the rest.

    Examples
    --------
    >>> from fisherlab.operators import Dense
    >>> dense = Dense(torch.diag(torch.tensor([3.0, 1.0])), (1, 2))
    >>> decomposed(dense).eigenvalues().tolist()
    [3.0, 1.0]
    """
    double = operator.to(torch.float64)
    found = double.eigenform()
    if found is not None:
        return found
    if double.shape[0] > DENSE_ROWS:
        raise UnsupportedMetric(
            metric,
            repr(operator),
            f"It has no structured eigenbasis and p = {double.shape[0]} is above "
            f"{DENSE_ROWS}. Use metrics of products (frobenius_error, spectral_error, "
            "direction_cosine), or a smaller layer.",
        )
    return of_matrix(double.to_dense(), double.weight_shape, repr(operator))
