r"""What a difference of large numbers can tell, and what is returned below that.

A relative error is the root of ``‖F‖² − 2⟨F, F̂⟩ + ‖F̂‖²``, which in float64 means
nothing below about 1e-7 of ``‖F‖``. Below `FLOOR` the residual is summed column by column
where p is at most `RESIDUAL_ROWS`; above that a `BelowFloor` is returned.

The noise floor of every comparison is how far the exact block of N examples is from its
limit of infinitely many. Split the examples into halves A and B: as they are independent,
``E‖F_A − F_B‖² = 4 E‖F − F_∞‖²``, so half of the distance of the halves estimates it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Final, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.catalogue import FLOOR
from fisherlab.numerics.memory import parse_budget, require
from fisherlab.operators import FactoredFisher
from fisherlab.samples import OuterSamples, Samples

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


def noise_floors(exact: FactoredFisher, splits: int = 8, seed: int = 0) -> list[float]:
    r"""Return ½‖F_A − F_B‖ / ‖F‖ for random halves of the examples.

    .. math:: ½ ‖F_A - F_B‖ = \frac{1}{N} \Big(\sum_{nm} s_n s_m
              \sum_{vw} ⟨D_{vn}, D_{wm}⟩^2\Big)^{1/2}

    with s = 1 on A and −1 on B (weighted where N is odd).

    Parameters
    ----------
    exact
        The exact block as samples of independent examples.
    splits
        How many random splits.
    seed
        Of the splits.

    Returns
    -------
    list of float
        One number a split; NaN for fewer than two examples or a zero block.

    Raises
    ------
    ValueError
        If no split is asked for.
    BudgetError
        If the table of inner products exceeds the memory that is free.

    Notes
    -----
    One N × N table of squared inner products, whatever the number of splits.

    Examples
    --------
    >>> samples = OuterSamples(torch.ones(4, 1), torch.ones(1, 4, 1))
    >>> noise_floors(FactoredFisher(samples, 4), splits=2)
    [0.0, 0.0]
    """
    if splits < 1:
        raise ValueError(f"noise_floors: splits={splits}; at least one is expected.")
    n = exact.samples.examples
    if n < 2:
        return [float("nan")] * splits
    samples = exact.samples.to(torch.float64)
    signs = _signs(n, splits, seed).to(samples.device)
    every = torch.cat([signs, torch.ones_like(signs[:1])])
    total = torch.zeros(splits + 1, dtype=torch.float64, device=samples.device)
    for left, right, table in _example_squares(samples):
        weight = 1.0 if left == right else 2.0
        total += weight * ((every[:, left] @ table) * every[:, right]).sum(1)
    whole = float(total[-1])
    if not whole > 0:
        return [float("nan")] * splits
    return [max(float(one) / whole, 0.0) ** 0.5 for one in total[:-1]]


def _signs(n: int, splits: int, seed: int) -> Float[Tensor, "s n"]:
    """Return N/(2 n_A) on a random half A and −N/(2 n_B) on the rest."""
    generator = torch.Generator().manual_seed(seed)
    half = n // 2
    signs = torch.full(
        (splits, n), -n / (2 * (n - half)), dtype=torch.float64, device="cpu"
    )
    for row in signs:
        row[torch.randperm(n, generator=generator, device="cpu")[:half]] = n / (2 * half)
    return signs


def _example_squares(samples: Samples) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield blocks of Σ_vw ⟨D_vn, D_wm⟩² with rows ≤ columns."""
    if isinstance(samples, OuterSamples):
        for left, right, inputs, outputs in samples.squared_grams():
            yield left, right, inputs * outputs
        return
    v, n = samples.columns, samples.examples
    require(
        3 * 8 * (v * n) ** 2,
        parse_budget(None, samples.device),
        f"noise_floors of {v * n} samples",
        "Take fewer examples, or MonteCarlo instead of Exact.",
    )
    whole = slice(0, n)
    yield whole, whole, samples.gram().square_().view(v, n, v, n).sum((0, 2))
