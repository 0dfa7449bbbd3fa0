"""The matrix itself: its entries, and how sharp the loss is in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch

from fisherlab.metrics.pairs import Pair
from fisherlab.metrics.spectra import spectrum_error
from fisherlab.purposes.base import Answers, Demand, Measure, numbers, summed
from fisherlab.settings import setting
from fisherlab.statistics import LayerStatistics

ERROR = Measure(
    "frobenius_error",
    "relative Frobenius error",
    0.0,
    assured="KPSVD of rank k is the closest of all sums of k Kronecker products",
    settles=("KPSVD(",),
    meaning="‖F − F̂‖ / ‖F‖ in the Frobenius norm.",
)


@final
@setting
class Matrix:
    """The matrix: errors of its entries and of its eigenvalues, and its cosine.

    Pooled over blocks by squares: √(Σ‖F − F̂‖² / Σ‖F‖²).

    References
    ----------
    Koroko et al. 2022, arXiv 2201.10285, errors 1 and 2 of section 4.

    Examples
    --------
    >>> Matrix().measures[0].name
    'frobenius_error'
    """

    name: ClassVar[str] = "matrix"
    measures: ClassVar[tuple[Measure, ...]] = (
        ERROR,
        Measure("cosine_similarity", "matrix cosine", 1.0, meaning="⟨F, F̂⟩ / (‖F‖ ‖F̂‖)."),
        Measure(
            "spectrum_error",
            "relative error of the singular values",
            0.0,
            meaning="‖σ(F) − σ(F̂)‖ / ‖σ(F)‖, both in descending order.",
        ),
    )

    def answers(self, layer: LayerStatistics, pair: Pair) -> Answers:
        """Return squares of sizes and errors, and the inner product."""
        size = pair.exact_norm**2
        return numbers(
            size=lambda: size,
            own=lambda: pair.approx_norm**2,
            inner=lambda: pair.inner,
            rest=lambda: pair.distance() ** 2 * size,
            spectrum=lambda: spectrum_error.of(pair) ** 2 * size,
        )

    def demand(self, layer: LayerStatistics) -> Demand:
        """Count products with the exact block; eigenvalues refuse what is too large."""
        return Demand(dampings=0)

    def joined(self, blocks: Sequence[Answers]) -> Answers:
        """Add everything."""
        return summed(blocks)

    def measure(self, exact: Answers, approx: Answers) -> dict[str, float]:
        """Return errors relative to ‖F‖, and the cosine."""
        size = float(exact["size"])
        if size == 0:
            return {one.name: float("nan") for one in self.measures}
        norms = size**0.5 * float(approx["own"]) ** 0.5
        return {
            "frobenius_error": (float(approx["rest"]) / size) ** 0.5,
            "cosine_similarity": float(approx["inner"]) / norms if norms else float("nan"),
            "spectrum_error": (float(approx["spectrum"]) / size) ** 0.5,
        }


@final
@setting
class Sharpness:
    """Sharpness: the largest eigenvalue, the trace and the effective rank tr²/‖·‖².

    Examples
    --------
    >>> [one.name for one in Sharpness().measures]
    ['top_ratio', 'trace_ratio', 'rank_ratio']
    """

    name: ClassVar[str] = "sharpness"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure(
            "top_ratio",
            "largest eigenvalue over the exact one",
            1.0,
            meaning="The sharpness that the method reports.",
        ),
        Measure(
            "trace_ratio",
            "trace over the exact one",
            1.0,
            meaning="The total curvature that it reports.",
        ),
        Measure(
            "rank_ratio",
            "effective rank over the exact one",
            1.0,
            meaning="Of (tr F̂)² / ‖F̂‖²: how many directions share the curvature.",
        ),
    )

    def answers(self, layer: LayerStatistics, pair: Pair) -> Answers:
        """Return the largest eigenvalue, the trace and the squared norm."""
        top = pair.approx.top_eigenvalues(1)[:1].to(torch.float64)
        rest = numbers(trace=pair.approx.trace, size=lambda: pair.approx_norm**2)
        return {"top": top, **rest}

    def demand(self, layer: LayerStatistics) -> Demand:
        """Count the products of a Krylov space."""
        return Demand(dampings=0, products=40)

    def joined(self, blocks: Sequence[Answers]) -> Answers:
        """Take the largest of the eigenvalues and add the rest."""
        added = summed(blocks, "top")
        return {**added, "top": added["top"].max()[None]}

    def measure(self, exact: Answers, approx: Answers) -> dict[str, float]:
        """Return the three ratios; NaN where the exact block is zero."""
        mine, own = (
            {**a, "rank": a["trace"].square() / a["size"]} for a in (exact, approx)
        )
        ratios = {name: float(own[name] / mine[name]) for name in ("top", "trace", "rank")}
        return {
            f"{name}_ratio": ratio if float(mine["trace"]) else float("nan")
            for name, ratio in ratios.items()
        }
