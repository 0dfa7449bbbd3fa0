r"""What a difference of large numbers can tell, and what is returned below that.

A relative error is the root of ``‖F‖² − 2⟨F, F̂⟩ + ‖F̂‖²``, which in float64 means
nothing below about 1e-7 of ``‖F‖``. Below `FLOOR` the residual is summed column by column
where p is at most `RESIDUAL_ROWS`; above that a `BelowFloor` is returned.
"""

import math
from collections.abc import Callable
from typing import Final, final

import numpy as np

from fisherlab.catalogue import FLOOR

RESIDUAL_ROWS = 4000  # blocks whose residual is formed column by column below the floor
SINGLE_FLOOR: Final = 1e-3  # the same where an orthonormal basis is known to float32 only
EPS: Final = float(np.finfo(np.float64).eps)
LOST: Final = 1e-3  # relative rounding of an inverse above which no number is given
ROUNDING: Final = 1e-12  # share of its terms below which a difference is not measured


@final
class BelowFloor(float):
    """A bound instead of a measured value: what was asked for is below this number.

    Examples
    --------
    >>> BelowFloor(1e-6)
    BelowFloor(1e-06)
    """

    def __repr__(self) -> str:
        """Show that the number is a bound."""
        return f"BelowFloor({float(self)!r})"


def rooted(
    squared: float, rows: int, residual: Callable[[], float], floor: float = FLOOR
) -> float:
    """Return the root of a relative difference of squares, or what is known below it.

    Parameters
    ----------
    squared
        The difference of squares, relative to a size of one.
    rows
        p, which decides whether the residual may be formed.
    residual
        Computes the same number without cancellation.
    floor
        The root below which the difference means nothing.

    Examples
    --------
    >>> rooted(0.25, 10, lambda: 0.0), rooted(1e-17, 10, lambda: 3e-9)
    (0.5, 3e-09)
    >>> rooted(1e-17, 10**6, lambda: 3e-9)
    BelowFloor(1e-06)
    """
    if squared > floor**2 or math.isnan(squared):
        return float(squared**0.5)
    return residual() if rows <= RESIDUAL_ROWS else BelowFloor(floor)


def measured(difference: float, *terms: float, rounding: float = ROUNDING) -> float:
    """Return a difference, or a bound where it drowns in the rounding of its terms.

    Examples
    --------
    >>> measured(0.5, 1.0, -0.5), measured(1e-17, 1.0, -1.0)
    (0.5, BelowFloor(2e-12))
    """
    bound = rounding * sum(abs(term) for term in terms)
    return difference if abs(difference) > bound else BelowFloor(bound)
