"""What the approximations of a layer hold and cost to build, as formulas.

Multiply-adds of the leading terms. A method that is not listed is not counted.
"""

from collections.abc import Callable

from fisherlab.approximators import (
    EKFAC,
    KFAC,
    KPSVD,
    TKFAC,
    Approximator,
    Deflation,
    Diagonal,
    KFACCorrected,
    MiniBlock,
)
from fisherlab.numerics.packed import pair_count
from fisherlab.samples import MatrixSamples, OuterSamples, Samples, SharedSamples

EIGEN = 9  # multiply-adds of a symmetric eigendecomposition over d³, about
STEPS = 5  # power steps until convergence, about


def _positions(s: Samples) -> int:
    return s.inputs.shape[1] if isinstance(s, SharedSamples) else 1


def _factors(s: Samples) -> int:
    """Count Σ g gᵀ and Σ a aᵀ, half of each through symmetry."""
    o, i = s.weight_shape
    rows = s.examples * _positions(s)
    return (s.columns * rows * o * o + rows * i * i) // 2


def _rotations(s: Samples) -> int:
    """Count gradients and inputs in another basis, and the squares there."""
    o, i = s.weight_shape
    rows = s.examples * _positions(s)
    return s.columns * rows * o * o + rows * i * i + _squares(s)


def _squares(s: Samples) -> int:
    """Count Σ D∘D."""
    o, i = s.weight_shape
    if isinstance(s, OuterSamples):
        return s.examples * (o * i + s.columns * o)
    return s.columns * s.examples * o * i * _positions(s)


def _alternations(s: Samples) -> int:
    """Count the power steps of the leading product, by the cheaper space."""
    o, i = s.weight_shape
    if not isinstance(s, OuterSamples):
        forming = s.columns * s.examples * o * i * _positions(s)
        return forming + STEPS * s.columns * s.examples * o * i * (o + i)
    packed = s.examples * pair_count(o) * pair_count(i) + STEPS * (o * i) ** 2 // 2
    outputs = min(pair_count(o), s.columns**2 * o)
    grams = s.examples**2 * (i + outputs) // 2 + STEPS * 2 * s.examples**2
    return min(packed, grams)


def _eigen(s: Samples) -> int:
    o, i = s.weight_shape
    return EIGEN * (o**3 + i**3)


Formula = Callable[[Samples], int]
FLOPS: dict[type, Formula] = {
    KFAC: _factors,
    TKFAC: lambda s: 2 * _factors(s),
    EKFAC: lambda s: _factors(s) + _eigen(s) + _rotations(s),
    KPSVD: lambda s: _alternations(s) + _factors(s),
    Deflation: lambda s: _alternations(s) + _factors(s),
    KFACCorrected: lambda s: _alternations(s) + 2 * _factors(s),
    Diagonal: _squares,
    MiniBlock: lambda s: 0,
}
NEEDS_INPUTS = (KFAC, EKFAC, KFACCorrected)


def building_flops(method: Approximator, samples: Samples) -> int | None:
    """Return the multiply-adds that build an approximation, None if not counted.

    Examples
    --------
    >>> import torch
    >>> samples = OuterSamples(torch.ones(10, 4), torch.ones(2, 10, 3))
    >>> building_flops(KFAC(), samples)
    170
    """
    if not _applies(method, samples):
        return None
    terms = getattr(method, "rank", 1)
    return FLOPS[type(method)](samples) * (terms if isinstance(terms, int) else 1)


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
    o, i = samples.weight_shape
    if isinstance(method, MiniBlock):
        return 0  # formed on demand from the samples
    if isinstance(method, Diagonal):
        return o * i
    if isinstance(method, EKFAC):
        return o * o + i * i + o * i
    terms = getattr(method, "rank", 1) + isinstance(method, KFACCorrected)
    return int(terms) * (o * o + i * i)


def _applies(method: Approximator, samples: Samples) -> bool:
    shared = not isinstance(samples, MatrixSamples)
    return type(method) in FLOPS and (shared or not isinstance(method, NEEDS_INPUTS))
