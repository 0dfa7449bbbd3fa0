"""Influence of training examples: which of them a prediction or a loss depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from fisherlab.errors import DataError
from fisherlab.metrics.pairs import Pair
from fisherlab.numerics.devices import chunks
from fisherlab.operators.base import tikhonov
from fisherlab.purposes.base import (
    Answers,
    Demand,
    Measure,
    of_block,
    overlap,
    solved_together,
    spearman,
    spearmans,
    summed,
)
from fisherlab.samples import Samples
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics, Statistics

DRAWS = 500  # of the bootstrap, whose standard errors are then known to 3 %
FEWEST = 6  # queries whose extremes hold their median with 95 %: 1 − 2⁻⁵


@shown
@numeric
@final
@dataclass(frozen=True, eq=False)
class Influence:
    r"""Influence of a training example n on a query q: g_qᵀ (F̂ + λI)⁻¹ g_n.

    What is used of it is the order: Spearman's correlation and the share of the k most
    influential examples in common with the exact block's, medians over the queries.

    Parameters
    ----------
    damping
        λ.
    queries, examples
        Gradients of the losses of queries and of training examples: statistics of
        `fl.Empirical()`, one column each.
    top
        k of the overlap.

    Raises
    ------
    ValueError
        For a damping or a `top` that is not positive.
    DataError
        For statistics of several columns an example.

    References
    ----------
    Koh and Liang 2017, arXiv 1703.04730, equation 2; Grosse et al. 2023, arXiv 2308.03296.

    Examples
    --------
    >>> import fisherlab as fl
    >>> data = torch.rand(9, 3).double(), torch.arange(9) % 2
    >>> model = torch.nn.Linear(3, 2).double()
    >>> stats = fl.collect(model, data, fl.Categorical(), fl.Empirical())
    >>> Influence(0.1, stats, stats, top=3).name
    'influence'
    """

    damping: float
    queries: Statistics
    examples: Statistics
    top: int = 10

    name: ClassVar[str] = "influence"
    noise: ClassVar[str] = "queries"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure(
            "rank_correlation",
            "rank correlation of influences, median",
            1.0,
            meaning="Spearman correlation of g_qᵀ(F̂ + λI)⁻¹g_n over training examples n "
            "with that of the exact block, median over the queries q.",
        ),
        Measure(
            "top_overlap",
            "most influential examples in common, median",
            1.0,
            meaning="Share of the examples of largest influence that both name, median "
            "over the queries.",
        ),
        Measure(
            "self_rank_correlation",
            "rank correlation of self-influence",
            1.0,
            meaning="Spearman correlation of g_nᵀ(F̂ + λI)⁻¹g_n with the exact one.",
        ),
    )

    def __post_init__(self) -> None:
        """Refuse gradients that are none of losses."""
        object.__setattr__(self, "damping", tikhonov(self.damping, "Influence"))
        if not self.damping > 0 or self.top < 1:
            raise ValueError(
                f"Influence: damping={self.damping!r} and top={self.top!r} were given; "
                "positive numbers are expected."
            )
        for what, given in (("queries", self.queries), ("examples", self.examples)):
            if any(layer.samples.columns != 1 for layer in given.values()):
                raise DataError(
                    f"Influence: {what} hold several columns an example; the gradients "
                    "of losses are expected, from collect(..., fisher=fl.Empirical())."
                )

    def answers(self, layer: LayerStatistics, pair: Pair) -> Answers:
        """Return the influence of every example on every query, and on itself."""
        queries = self._samples(self.queries, "queries", layer)
        examples = self._samples(self.examples, "examples", layer)
        rows = [
            examples.project(self._solved(pair, queries, part))[:, 0]
            for part in chunks(queries.examples, solved_together(queries))
        ]
        own = [
            (examples.matrices(part)[0] * self._solved(pair, examples, part)).sum((-2, -1))
            for part in chunks(examples.examples, solved_together(examples))
        ]
        return {"influence": torch.cat(rows), "own": torch.cat(own)}

    @property
    def setting(self) -> str:
        """λ and the queries in words."""
        count = next(iter(self.queries.values())).count if self.queries else 0
        return f"λ = {self.damping:.3g}, {count:,} queries"

    def demand(self, layer: LayerStatistics) -> Demand:
        """Count a solve a query and a training example."""
        both = (of.get(layer.name) for of in (self.queries, self.examples))
        return Demand(weights=sum(one.samples.examples for one in both if one is not None))

    def _samples(self, given: Statistics, what: str, layer: LayerStatistics) -> Samples:
        return of_block("Influence", what, given, layer.name).samples.to(torch.float64)

    def _solved(self, pair: Pair, of: Samples, part: slice) -> Float[Tensor, "n o i"]:
        return pair.approx.solve(of.matrices(part)[0], self.damping)

    def joined(self, blocks: Sequence[Answers]) -> Answers:
        """Add the influences through the blocks."""
        return summed(blocks)

    def influences(self, exact: Answers, approx: Answers) -> Float[Tensor, " b"]:
        """Return medians over queries drawn anew from the queries, as deviations.

        Every method has the same draws, so that the norm of a difference is the paired
        bootstrap's standard error of a difference of medians. Nothing (0,) for fewer than
        six queries, which bound no median with 95 %.

        References
        ----------
        Efron 1979, Annals of Statistics 7, section 3 (the median).
        """
        ranks = spearmans(exact["influence"], approx["influence"])
        if len(ranks) < FEWEST:
            return torch.empty(0)
        draw = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(ranks), (DRAWS, len(ranks)), generator=draw, device="cpu")
        medians = ranks[drawn].quantile(0.5, dim=1)
        return (medians - medians.mean()) / (DRAWS - 1) ** 0.5

    def measure(self, exact: Answers, approx: Answers) -> dict[str, float]:
        """Return how alike the orders are."""
        both = list(zip(exact["influence"], approx["influence"], strict=True))
        count = min(self.top, exact["own"].numel())
        ranks = spearmans(exact["influence"], approx["influence"])
        shared = torch.tensor([overlap(*p, count) for p in both], dtype=torch.float64)
        return {
            "rank_correlation": float(ranks.quantile(0.5)),
            "top_overlap": float(shared.quantile(0.5)),
            "self_rank_correlation": spearman(exact["own"], approx["own"]),
        }
