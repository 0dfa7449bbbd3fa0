"""What the approximations of a layer hold and cost to build, as formulas.

Multiply-adds of the leading terms. A method that is not listed is not counted.
"""

from collections.abc import Callable
from typing import Any

from fisherlab.approximators import (
    CGFAC,
    EKFAC,
    FOOF,
    KFAC,
    KPSVD,
    TEKFAC,
    TKFAC,
    Approximator,
    Deflation,
    Diagonal,
    KFACCorrected,
    LowRank,
    MiniBlock,
    QuasiDiagonal,
    Shampoo,
)
from fisherlab.numerics.packed import pair_count, symmetric_flops
from fisherlab.samples import (
    GroupedSamples,
    MatrixSamples,
    OuterSamples,
    Samples,
    SharedSamples,
    TokenSamples,
)

EIGEN = 9  # multiply-adds of a symmetric eigendecomposition over d³, about
STEPS = 5  # power steps until convergence, about


def _positions(s: Samples) -> int:
    return s.inputs.shape[1] if isinstance(s, SharedSamples) else 1


def _factors(s: Samples) -> int:
    """Count Σ g gᵀ and Σ a aᵀ, about half of each through symmetry."""
    o, i = s.weight_shape
    rows = s.examples * _positions(s)
    return symmetric_flops(o, s.columns * rows) + symmetric_flops(i, rows)


def _rotations(s: Samples) -> int:
    """Count gradients and inputs in another basis, and the squares there."""
    o, i = s.weight_shape
    rows = s.examples * _positions(s)
    return s.columns * rows * o * o + rows * i * i + _squares(s)


def _squares(s: Samples) -> int:
    """Count Σ D∘D."""
    o, i = s.weight_shape
    return s.examples * o * i if isinstance(s, OuterSamples) else _forming(s)


def _forming(s: Samples) -> int:
    """Count the matrices D themselves."""
    o, i = s.weight_shape
    return s.columns * s.examples * o * i * _positions(s)


def _partial_traces(s: Samples) -> int:
    """Count Σ D Dᵀ and Σ Dᵀ D."""
    o, i = s.weight_shape
    if isinstance(s, OuterSamples):
        return _factors(s) + s.examples * (s.columns * o * o + i * i)
    return 2 * _forming(s) + 2 * s.columns * s.examples * o * i * (o + i)


def _alternations(s: Samples) -> int:
    """Count the power steps of the leading product, by the cheaper space."""
    o, i = s.weight_shape
    if not isinstance(s, OuterSamples):
        return _forming(s) + STEPS * s.columns * s.examples * o * i * (o + i)
    packed = s.examples * pair_count(o) * pair_count(i) + STEPS * (o * i) ** 2 // 2
    outputs = min(pair_count(o), s.columns**2 * o)
    grams = s.examples**2 * (i + outputs) // 2 + STEPS * 2 * s.examples**2
    return min(packed, grams)


def _cubes(s: Samples) -> int:
    o, i = s.weight_shape
    return o**3 + i**3


def _kfac(method: KFAC, s: Samples) -> int:
    if method.sharing == "expand":
        return _factors(s)
    o, i = s.weight_shape
    return symmetric_flops(o, s.columns * s.examples) + symmetric_flops(i, s.examples)


def _entries(s: Samples) -> int:
    return s.weight_shape[0] * s.weight_shape[1]


def _bases(s: Samples) -> int:
    return s.weight_shape[0] ** 2 + s.weight_shape[1] ** 2


def _leading(s: Samples) -> int:
    """Count the eigenvalues of the block by its cheaper space."""
    p, m = s.weight_shape[0] * s.weight_shape[1], s.columns * s.examples
    if m <= p:
        return s.gram_flops() + EIGEN * m**3
    return s.dense_flops() + EIGEN * p**3


# How much each method multiplies and adds; iterative ones about so much.
FLOPS: dict[type, Callable[[Any, Samples], int]] = {
    KFAC: _kfac,
    FOOF: lambda method, s: symmetric_flops(s.weight_shape[1], s.examples * _positions(s)),
    EKFAC: lambda method, s: _factors(s) + EIGEN * _cubes(s) + _rotations(s),
    TKFAC: lambda method, s: _partial_traces(s),
    TEKFAC: lambda method, s: _partial_traces(s) + EIGEN * _cubes(s) + _rotations(s),
    Shampoo: lambda method, s: _partial_traces(s) + (EIGEN + 1) * _cubes(s),
    CGFAC: lambda method, s: 0,
    KPSVD: lambda method, s: _alternations(s) + method.rank * _factors(s),
    Deflation: lambda method, s: method.rank * (_alternations(s) + _factors(s)),
    KFACCorrected: lambda method, s: (
        _factors(s) + method.rank * (_alternations(s) + _factors(s))
    ),
    Diagonal: lambda method, s: _squares(s),
    MiniBlock: lambda method, s: 0,
    QuasiDiagonal: lambda method, s: 2 * _squares(s),
    LowRank: lambda method, s: _leading(s),
}
# Numbers held besides the samples, where these are no pairs of factors.
NUMBERS: dict[type, Callable[[Any, Samples], int]] = {
    CGFAC: lambda method, s: 0,
    MiniBlock: lambda method, s: 0,  # formed on demand from the samples
    Diagonal: lambda method, s: _entries(s),
    EKFAC: lambda method, s: _bases(s) + _entries(s),
    TEKFAC: lambda method, s: _bases(s) + _entries(s),
    QuasiDiagonal: lambda method, s: 2 * _entries(s),
    LowRank: lambda method, s: (
        min(method.rank, _entries(s), s.columns * s.examples) * (_entries(s) + 1)
    ),
}
NEEDS_INPUTS = (KFAC, FOOF, EKFAC, KFACCorrected, CGFAC)


def building_flops(method: Approximator, samples: Samples) -> int | None:
    """Return the multiply-adds that build an approximation, None if not counted.

    Examples
    --------
    >>> import torch
    >>> samples = OuterSamples(torch.ones(10, 4), torch.ones(2, 10, 3))
    >>> building_flops(KFAC(), samples)
    340
    """
    if not _applies(method, samples):
        return None
    if isinstance(samples, GroupedSamples):
        return _over_groups(building_flops, method, samples)
    return FLOPS[type(method)](method, samples)


def result_numbers(method: Approximator, samples: Samples) -> int | None:
    """Return the numbers an approximation holds besides the samples.

    Examples
    --------
    >>> import torch
    >>> samples = OuterSamples(torch.ones(10, 4), torch.ones(2, 10, 3))
    >>> result_numbers(KPSVD(rank=2), samples)
    50
    """
    if not _applies(method, samples):
        return None
    if isinstance(samples, GroupedSamples):
        return _over_groups(result_numbers, method, samples)
    if type(method) in NUMBERS:
        return NUMBERS[type(method)](method, samples)
    o, i = samples.weight_shape
    terms = getattr(method, "rank", 1) + isinstance(method, KFACCorrected)
    return int(terms) * (o * o + i * i)


def _over_groups(
    count: Callable[[Approximator, Samples], int | None],
    method: Approximator,
    samples: GroupedSamples,
) -> int:
    return sum(count(method, group) or 0 for group in samples.groups)


def _applies(method: Approximator, samples: Samples) -> bool:
    if isinstance(samples, TokenSamples):
        return isinstance(method, Diagonal)
    if isinstance(method, MiniBlock) and method.spatial_average:
        return False  # the shared block's size depends on the partition
    shared = not isinstance(samples, MatrixSamples)
    return type(method) in FLOPS and (shared or not isinstance(method, NEEDS_INPUTS))
