"""What the approximations of a layer hold and cost to build, as formulas.

Multiply-adds of the leading terms. An approximator says its own by a method ``cost``, put
together from the counts of this file; one without it is not counted.
"""

from typing import Any, NamedTuple

from fisherlab.approximators.base import facts
from fisherlab.numerics.packed import pair_count, symmetric_flops
from fisherlab.samples import OuterSamples, Samples, TokenSamples

EIGEN = 9  # multiply-adds of a symmetric eigendecomposition over d³, about
STEPS = 5  # power steps until convergence, about


class Cost(NamedTuple):
    """Multiply-adds to build an approximation, and numbers it holds beside the samples.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.KFAC().cost(stats["weight"].samples).numbers
    20
    """

    flops: int
    numbers: int


def cost_of(method: Any, samples: Samples) -> Cost | None:
    """Return what an approximator says that it costs, None if it is not counted.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> samples = OuterSamples(torch.ones(10, 4), torch.ones(2, 10, 3))
    >>> cost_of(fl.KFAC(), samples)
    Cost(flops=340, numbers=25)
    """
    told = facts(method)
    if not hasattr(method, "cost"):
        return None
    parts = samples.counted_as.counted(
        needs_inputs=told.needs_inputs, entrywise=told.entrywise
    )
    known = [one for one in map(method.cost, parts) if one is not None]
    flops, numbers = (sum(one[k] for one in known) for k in range(2))
    return Cost(flops, numbers) if known else None


def building_flops(method: Any, samples: Samples) -> int | None:
    """Return the multiply-adds that build an approximation, None if not counted."""
    cost = cost_of(method, samples)
    return None if cost is None else cost.flops


def result_numbers(method: Any, samples: Samples) -> int | None:
    """Return the numbers an approximation holds besides the samples."""
    cost = cost_of(method, samples)
    return None if cost is None else cost.numbers


def held_numbers(method: Any, samples: Samples) -> int:
    """Return the numbers an approximation holds, the whole factors of a table included.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> net, words = torch.nn.Embedding(9, 2), torch.arange(5)
    >>> samples = fl.collect(net, (words, None), fl.Gaussian())["weight"].samples
    >>> [held_numbers(method, samples) for method in (fl.Diagonal(), fl.KPSVD())]
    [18, 85]
    """
    told = facts(method)
    formed = told.result == "terms" or not told.needs_inputs
    if isinstance(samples, TokenSamples) and formed and hasattr(method, "cost"):
        cost = method.cost(samples)  # flops of a table are others, the factors are not
        return cost.numbers if cost else 0
    return result_numbers(method, samples) or 0


def input_flops(s: Samples) -> int:
    """Count Σ a aᵀ, about half of it through symmetry."""
    return symmetric_flops(s.weight_shape[1], s.examples * s.positions)


def factor_flops(s: Samples) -> int:
    """Count Σ g gᵀ and Σ a aᵀ, about half of each through symmetry."""
    rows = s.total * s.positions
    return symmetric_flops(s.weight_shape[0], rows) + input_flops(s)


def rotation_flops(s: Samples) -> int:
    """Count gradients and inputs in another basis, and the squares there."""
    o, i = s.weight_shape
    rows = s.examples * s.positions
    return s.columns * rows * o * o + rows * i * i + s.square_flops()


def partial_trace_flops(s: Samples) -> int:
    """Count Σ D Dᵀ and Σ Dᵀ D."""
    return s.row_trace_flops() + s.column_trace_flops()


def alternation_flops(s: Samples) -> int:
    """Count the power steps of the leading product, by the cheaper space."""
    o, i = s.weight_shape
    if not isinstance(s, OuterSamples):
        return s.matrix_flops() + STEPS * s.total * o * i * (o + i)
    packed = s.examples * pair_count(o) * pair_count(i) + STEPS * (o * i) ** 2 // 2
    outputs = min(pair_count(o), s.columns**2 * o)
    grams = s.examples**2 * (i + outputs) // 2 + STEPS * 2 * s.examples**2
    return min(packed, grams)


def leading_flops(s: Samples) -> int:
    """Count the eigenvalues of the block by its cheaper space."""
    p, m = entry_count(s), s.total
    if m <= p:
        return s.gram_flops() + EIGEN * m**3
    return s.dense_flops() + EIGEN * p**3


def cubes(s: Samples) -> int:
    """Count d³ of both factors, in whose multiples they are factorised."""
    o, i = s.weight_shape
    return o**3 + i**3


def entry_count(s: Samples) -> int:
    """Count the entries of the weight."""
    return s.weight_shape[0] * s.weight_shape[1]


def pair_numbers(s: Samples) -> int:
    """Count the numbers of two factors, or of two bases."""
    return s.weight_shape[0] ** 2 + s.weight_shape[1] ** 2
