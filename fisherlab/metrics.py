r"""How far an approximation is from the exact block: pure functions of two operators.

All work in float64, form no dense block, and return Python floats. F is the exact block,
F̂ the approximation, P = F + λI and Q = F̂ + λI their damped forms.

Errors are roots of differences of large numbers, ``‖F‖² − 2⟨F, F̂⟩ + ‖F̂‖²``, which in
float64 mean nothing below about 1e-7 of ``‖F‖``. Below `FLOOR` the residual is summed
column by column where p is at most `RESIDUAL_ROWS`; above that a `BelowFloor` is returned.
"""

from typing import final

import torch
from torch import Tensor

from fisherlab.operators import Operator
from fisherlab.operators.base import unit_weights

FLOOR = 1e-6  # relative error below which the difference of squares means nothing
RESIDUAL_ROWS = 4000  # blocks whose residual is summed column by column below the floor


@final
class BelowFloor(float):
    """A bound instead of a measured value: the error is below this number.

    Examples
    --------
    >>> BelowFloor(1e-6)
    BelowFloor(1e-06)
    """

    def __repr__(self) -> str:
        """Show that the number is a bound."""
        return f"BelowFloor({float(self)!r})"


def frobenius_error(exact: Operator, approx: Operator, *, mixed: bool = False) -> float:
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
    exact, approx = _ready("frobenius_error", exact, approx, mixed)
    return _relative_distance(exact, approx)


def cosine_similarity(exact: Operator, approx: Operator, *, mixed: bool = False) -> float:
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
    exact, approx = _ready("cosine_similarity", exact, approx, mixed)
    norms = exact.frobenius_norm() * approx.frobenius_norm()
    return exact.inner(approx) / norms if norms > 0 else float("nan")


def trace_ratio(exact: Operator, approx: Operator, *, mixed: bool = False) -> float:
    """Return tr F̂ / tr F; 1 for every method that keeps the trace.

    Parameters and errors are those of `frobenius_error`; NaN if tr F is zero.

    Examples
    --------
    >>> from fisherlab.operators import Diagonal
    >>> trace_ratio(Diagonal(torch.ones(2, 2)), Diagonal(3 * torch.ones(2, 2)))
    3.0
    """
    exact, approx = _ready("trace_ratio", exact, approx, mixed)
    trace = exact.trace()
    return approx.trace() / trace if trace else float("nan")


def direction_cosine(
    exact: Operator,
    approx: Operator,
    gradient: Tensor,
    damping: float,
    *,
    best: Tensor | None = None,
    mixed: bool = False,
) -> float:
    """Return the cosine of the update directions P⁻¹v and Q⁻¹v.

    Parameters
    ----------
    exact, approx
        Operators over the same weight.
    gradient
        v, shape (d_out, d_in), e.g. the mean gradient.
    damping
        λ of both (Tikhonov).
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
    exact, approx = _ready("direction_cosine", exact, approx, mixed)
    v = gradient.double()
    if best is None:
        best = exact.solve(v, damping)
    taken = best if approx is exact else approx.solve(v, damping)
    norms = float(best.norm()) * float(taken.norm())
    return float((best * taken).sum()) / norms if norms > 0 else float("nan")


def inverse_error(
    exact: Operator, approx: Operator, damping: float, *, mixed: bool = False
) -> float:
    """Return the relative error of the damped inverse, ‖P⁻¹ − Q⁻¹‖ / ‖P⁻¹‖.

    Where F is rank-deficient, λ dominates both inverses: state it with the number.

    Parameters
    ----------
    exact, approx
        Operators over the same weight.
    damping
        λ of both (Tikhonov).
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
    exact, approx = _ready("inverse_error", exact, approx, mixed)
    return _relative_distance(exact.inverse(damping), approx.inverse(damping))


def _relative_distance(a: Operator, b: Operator) -> float:
    """Return ‖A − B‖ / ‖A‖, by squares or, below the floor, by the residual."""
    if a is b:
        return 0.0
    size = a.frobenius_norm()
    if size == 0:
        return 0.0 if b.frobenius_norm() == 0 else float("inf")
    other = b.frobenius_norm()
    squared = 1 - 2 * a.inner(b) / size**2 + (other / size) ** 2
    if squared > FLOOR**2:
        return float(squared**0.5)
    if a.shape[0] > RESIDUAL_ROWS:
        return BelowFloor(FLOOR)
    residual = sum(float(((a @ u) - (b @ u)).square().sum()) for u in unit_weights(a))
    return float(residual**0.5 / size)


def _ready(
    metric: str, exact: Operator, approx: Operator, mixed: bool
) -> tuple[Operator, Operator]:
    """Check that two operators may be compared and return them in float64."""
    if exact.weight_shape != approx.weight_shape:
        msg = (
            f"{metric}: {exact!r} acts on weights of shape {exact.weight_shape}, "
            f"{approx!r} on {approx.weight_shape}."
        )
        raise ValueError(msg)
    kinds = exact.provenance.fisher, approx.provenance.fisher
    if not mixed and all(kinds) and kinds[0] != kinds[1]:
        msg = (
            f"{metric}: one operator comes from the Fisher {kinds[0]}, the other from "
            f"{kinds[1]}. Pass mixed=True if that is meant."
        )
        raise ValueError(msg)
    return exact.to(torch.float64), approx.to(torch.float64)
