"""Products of the partial traces of a block: TKFAC, and the roots of Shampoo and Muon."""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fisherlab.approximators import register
from fisherlab.approximators.base import OfSums
from fisherlab.approximators.costs import (
    EIGEN,
    Cost,
    cubes,
    pair_numbers,
    partial_trace_flops,
)
from fisherlab.approximators.states import Sums, add, by_group
from fisherlab.numerics.linalg import spectrum
from fisherlab.operators import KroneckerSum, Operator
from fisherlab.samples import Samples
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics


def partial_traces(statistics: LayerStatistics) -> Sums:
    """Return Σ D Dᵀ and Σ Dᵀ D over a chunk."""
    samples = statistics.samples
    o = samples.weight_shape[0]
    cols = samples.column_side(torch.eye(o, dtype=samples.dtype, device=samples.device))
    return Sums.of(statistics, _rows(samples), cols)


def _rows(samples: Samples) -> Tensor:
    """Return Σ D Dᵀ."""
    i = samples.weight_shape[1]
    return samples.row_side(torch.eye(i, dtype=samples.dtype, device=samples.device))


def traced(state: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Return Ψ/√t and Φ/√t of t = tr F, and t; as they are where it is 0.

    Of one scale for every method, so that they are decomposed once.
    """
    rows, cols = (sums / state.count for sums in state.tensors)
    trace = rows.trace()
    root = torch.where(trace > 0, trace, 1.0).sqrt()
    return rows / root, cols / root, trace


@shown
@by_group
@final
@dataclass(frozen=True)
class TKFAC(OfSums[Sums, Operator]):
    r"""Trace-restricted KFAC, F ≈ Ψ ⊗ Φ / tr F.

    .. math:: Ψ = \frac1N \sum D D^T, \quad Φ = \frac1N \sum D^T D

    Notes
    -----
    Ψ and Φ are the partial traces of F, so its trace and both partial traces are exact.
    One half-step pair of KPSVD's power iteration from the identity; with per-example D
    also the Fisher estimate of TNT (Ren & Goldfarb 2021, arXiv 2106.02925) and of squared
    Shampoo, so "tnt" is another name for it. For one position
    ``Φ = E[‖g‖² a aᵀ]``, ``Ψ = E[‖a‖² g gᵀ]``. Exact where F is one Kronecker product.

    References
    ----------
    Gao et al. 2020, arXiv 2011.10741.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> round(fl.TKFAC()(stats["weight"]).trace(), 5)
    8.0
    """

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the partial traces of a chunk."""
        return add(state, partial_traces(statistics))

    def finish(self, state: Sums) -> KroneckerSum:
        """Divide by the examples and the trace."""
        rows, cols, trace = traced(state)
        made = state.provenance.by("TKFAC()")
        terms = ((rows, cols),) if trace > 0 else ()
        return KroneckerSum(
            terms,
            state.weight_shape,
            made,
            precision=rows.dtype,
            place=rows.device,
        )

    def cost(self, samples: Samples) -> Cost:
        """Count both partial traces."""
        return Cost(partial_trace_flops(samples), pair_numbers(samples))


@shown
@by_group
@final
@dataclass(frozen=True)
class Shampoo(OfSums[Sums, Operator]):
    r"""Square roots of the partial traces, F ≈ L^½ ⊗ R^½.

    .. math:: L = \frac1N \sum D D^T, \quad R = \frac1N \sum D^T D

    Notes
    -----
    Shampoo multiplies the gradient by :math:`(L \otimes R)^{-1/4}`, the inverse square
    root of this matrix. D is per example here, an estimate of F; the optimiser puts the
    mean gradient of a batch in its place. It bounds F from above:
    :math:`F \preceq \sqrt{r}\, L^{1/2} \otimes R^{1/2}` for D of rank r. For the product
    with the right trace, :math:`L \otimes R / \mathrm{tr} F`, see `TKFAC`.

    References
    ----------
    Gupta, Koren & Singer 2018, arXiv 1802.09568, Lemma 8.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> round(fl.Shampoo()(stats["weight"]).trace(), 4)
    11.3137
    """

    decomposes: ClassVar[bool] = True

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add the partial traces of a chunk."""
        return add(state, partial_traces(statistics))

    def finish(self, state: Sums) -> KroneckerSum:
        """Divide by the examples and take the roots."""
        made = state.provenance.by(repr(self))
        *pair, trace = traced(state)
        root = max(float(trace), 0.0) ** 0.25
        rows, cols = (root * _root(factor, f"a factor of {made}") for factor in pair)
        return KroneckerSum(((rows, cols),), state.weight_shape, made)

    def cost(self, samples: Samples) -> Cost:
        """Count both partial traces and their roots."""
        roots = (EIGEN + 1) * cubes(samples)
        return Cost(partial_trace_flops(samples) + roots, pair_numbers(samples))


@shown
@by_group
@final
@dataclass(frozen=True)
class Muon(OfSums[Sums, Operator]):
    r"""One-sided Shampoo, F ≈ L^½ ⊗ I with L = (1/N) Σ D Dᵀ.

    Notes
    -----
    Muon replaces a gradient matrix :math:`G = U Σ V^T` by its nearest semi-orthogonal
    one, :math:`U V^T = (G G^T)^{-1/2} G`: it divides by this matrix for D = G. D is per
    example here; for the optimiser's, of the mean gradient, see `MuonPreconditioner`. It
    scales as a gradient, not as its square: read its cosine and direction, not its
    Frobenius error.

    References
    ----------
    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; as
    one-sided Shampoo: Bernstein & Newhouse 2024, arXiv 2409.20325.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> round(fl.Muon()(stats["weight"]).trace(), 4)
    16.0
    """

    decomposes: ClassVar[bool] = True

    def accumulate(self, state: Sums | None, statistics: LayerStatistics) -> Sums:
        """Add Σ D Dᵀ of a chunk."""
        return add(state, Sums.of(statistics, _rows(statistics.samples)))

    def finish(self, state: Sums) -> KroneckerSum:
        """Divide by the examples and take the root."""
        made = state.provenance.by(repr(self))
        rows = _root(state.tensors[0] / state.count, f"the factor of {made}")
        eye = torch.eye(state.weight_shape[1], dtype=rows.dtype, device=rows.device)
        return KroneckerSum(((rows, eye),), state.weight_shape, made)

    def cost(self, samples: Samples) -> Cost:
        """Count one partial trace and its root."""
        root = (EIGEN + 1) * samples.weight_shape[0] ** 3
        return Cost(samples.row_trace_flops() + root, pair_numbers(samples))


def _root(factor: Tensor, what: str) -> Tensor:
    """Return the root of a factor, of rounding 0: its root would pass for a number."""
    values, vectors = spectrum(factor, what)
    rounding = len(factor) * torch.finfo(values.dtype).eps * values[-1]
    values = torch.where(values > rounding, values, 0.0)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


register.add({"tkfac": TKFAC()}, aliases={"tnt": "tkfac"})  # TNT's per-example form
register.add({"shampoo": Shampoo(), "muon": Muon()})
