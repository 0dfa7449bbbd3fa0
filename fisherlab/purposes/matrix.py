"""The matrix itself: its entries, and how sharp the loss is in it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import BudgetError, NumericalError
from fisherlab.metrics.pairs import Pair
from fisherlab.metrics.spectra import spectrum_error
from fisherlab.numerics.krylov import extreme_eigenpairs
from fisherlab.numerics.linalg import Label, eigh
from fisherlab.operators import FactoredFisher, Operator
from fisherlab.purposes.base import EXAMPLES, Answers, Demand, Measure, numbers, summed
from fisherlab.settings import setting
from fisherlab.statistics import LayerStatistics

GROUPS = 32  # of examples, which are held against every matrix as one
TOLERANCE = 1e-4  # of that eigenvector where it is iterated
DENSE_ROWS = 512  # blocks up to this size are diagonalised for their first eigenvector
APART = 2  # standard errors within which the first two eigenvalues may change places
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
        found = numbers(
            size=lambda: size,
            own=lambda: pair.approx_norm**2,
            inner=lambda: pair.inner,
            rest=lambda: pair.distance() ** 2 * size,
            spectrum=lambda: spectrum_error.of(pair) ** 2 * size,
        )
        if not found["inner"].isnan():
            found[EXAMPLES] = inner_by_groups(pair.exact, pair.approx)
        return found

    def demand(self, layer: LayerStatistics) -> Demand:
        """Count products with the exact block; eigenvalues refuse what is too large."""
        return Demand(dampings=0, products=2, groups=True)

    def joined(self, blocks: Sequence[Answers]) -> Answers:
        """Add everything."""
        return summed(blocks)

    def influences(self, exact: Answers, approx: Answers) -> Float[Tensor, " g"]:
        r"""Return what groups of examples move the error e by.

        .. math:: \frac{⟨F_g, F - F̂⟩ - e^2 ⟨F_g, F⟩}{e \, ‖F‖^2}

        where a group adds F_g to F and F̂ is held as it is; 0 for F itself.
        """
        size, rest = exact["size"], approx["rest"]
        own = exact[EXAMPLES]
        moved = own - approx[EXAMPLES] - rest / size * own
        return Tensor(moved / (rest * size).sqrt() if rest > 0 else 0 * own)

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


def inner_by_groups(exact: Operator, other: Operator) -> Float[Tensor, " g"]:
    """Return what random groups of examples move ⟨F, M⟩ by, the same in every layer.

    Every example is in one of them, so that all groups take one inner product, and heavy
    tails of single examples are averaged. Nothing (0,) where the examples are not at hand:
    they are visited part by part, or the block is not made of them.

    References
    ----------
    Wolter 2007, Introduction to Variance Estimation, chapter 2 (random groups).

    Examples
    --------
    >>> from fisherlab.samples import OuterSamples
    >>> samples = OuterSamples(torch.tensor([[1.0], [0.0]]), torch.ones(1, 2, 1))
    >>> block = FactoredFisher(samples, 2)
    >>> inner_by_groups(block, block).abs()
    tensor([0.1250, 0.1250], dtype=torch.float64)
    """
    if not isinstance(exact, FactoredFisher) or len(exact.samples.cuts) > 1:
        return torch.empty(0, dtype=torch.float64)
    count = exact.samples.examples
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")
    groups = order.to(exact.device).tensor_split(min(GROUPS, count))
    added = [exact.some_examples(group).inner(other) for group in groups]
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    inner = torch.tensor(added, dtype=torch.float64)
    return inner - sizes / count * inner.sum()


@final
@setting
class Sharpness:
    """Sharpness: the largest eigenvalue, the trace and the effective rank tr²/‖·‖².

    Leads are held against noise where the first two eigenvalues of the exact block, or of
    all of them, are more than two standard errors apart: noise may exchange nearer ones.

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
            both_sides=True,
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
        found = {"top": top, **rest}
        if pair.same and isinstance(pair.exact, FactoredFisher):
            with suppress(NumericalError, BudgetError):
                first, second = _leading(pair.exact)
                added = pair.exact.forms_by_example(first)[0]
                found |= {EXAMPLES: added - added.mean(), "top": torch.cat([top, second])}
        return found

    def demand(self, layer: LayerStatistics) -> Demand:
        """Count the products of a Krylov space."""
        return Demand(dampings=0, products=40)

    def joined(self, blocks: Sequence[Answers]) -> Answers:
        """Take the largest of the eigenvalues, with its examples, and add the rest."""
        added = dict(summed(blocks, "top"))
        first = max(blocks, key=lambda block: float(block["top"][0]))
        added |= {EXAMPLES: first[EXAMPLES]} if EXAMPLES in first else {}
        return added | {"top": added["top"].sort(descending=True).values[:2]}

    def influences(self, exact: Answers, approx: Answers) -> Float[Tensor, " n"]:
        r"""Return what examples move the ratio of the largest eigenvalues by, −r vᵀF_nv/λ.

        v is the eigenvector of the exact λ; nothing (0,) where the second is so near that
        the first has no derivative worth the name.

        References
        ----------
        Magnus 1985, Econometric Theory 1, theorem 1 (derivatives of eigenvalues).
        """
        top, added = exact["top"], exact[EXAMPLES]
        if len(top) > 1 and top[0] - top[1] <= APART * added.norm():
            return torch.empty(0)
        return Tensor(-approx["top"][0] / top[0] ** 2 * added)

    def measure(self, exact: Answers, approx: Answers) -> dict[str, float]:
        """Return the three ratios; NaN where the exact block is zero."""
        mine, own = (
            {**a, "rank": a["trace"].square() / a["size"]} for a in (exact, approx)
        )
        mine["top"], own["top"] = mine["top"][0], own["top"][0]
        ratios = {name: float(own[name] / mine[name]) for name in ("top", "trace", "rank")}
        return {
            f"{name}_ratio": ratio if float(mine["trace"]) else float("nan")
            for name, ratio in ratios.items()
        }


def _leading(exact: FactoredFisher) -> tuple[Float[Tensor, "1 o i"], Float[Tensor, " _"]]:
    """Return the first eigenvector, and the second eigenvalue where there is one."""
    if exact.shape[0] <= DENSE_ROWS:
        found = eigh(exact.to_dense(), Label("sharpness of {}", exact))
    else:
        found = extreme_eigenpairs(exact.to_scipy(), 2, "LA", repr(exact), TOLERANCE)
    values, vectors = (part.to(exact.device) for part in found)
    return vectors[:, -1].reshape(1, *exact.weight_shape), values[-2:-1]
