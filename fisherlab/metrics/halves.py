r"""How far the exact block of N examples is from its limit of infinitely many.

Split the examples into halves A and B. With independent examples
``E‖F_A − F_B‖² = 4 E‖F − F_∞‖²``, so half of the distance of the halves estimates the
distance of the whole from its limit: the noise floor of every comparison with F.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.numerics.memory import parse_budget, require
from fisherlab.operators import FactoredFisher
from fisherlab.samples import OuterSamples, Samples


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
