"""What is asked of single weights: pruning them, and holding them where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from fisherlab.metrics.pairs import Pair
from fisherlab.purposes.base import (
    Answers,
    Demand,
    Measure,
    spearman,
    summed,
    weights_of,
)
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics


@shown
@final
@dataclass(frozen=True, eq=False)
class Pruning:
    r"""Pruning by saliency: which weights cost least to set to zero.

    .. math:: \mathrm{OBD}_i = ½ w_i^2 F̂_{ii}, \qquad
              \mathrm{OBS}_i = ½ w_i^2 / [(F̂ + λI)^{-1}]_{ii}

    The increase is what the quadratic model of the exact block says of setting the chosen
    weights to zero, ½ δᵀFδ, over that of the exact block's own choice.

    Parameters
    ----------
    weights
        Parameters by name, ``dict(model.named_parameters())``.
    damping
        λ of the inverse.
    share
        Of the weights of every block that go.

    References
    ----------
    LeCun et al. 1990 (OBD); Hassibi and Stork 1993 (OBS), equation 5.

    Examples
    --------
    >>> Pruning({}, share=0.5).measures[0].name
    'obd_overlap'
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    damping: float = 1e-2
    share: float = 0.5

    name: ClassVar[str] = "pruning"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("obd_overlap", "pruned weights in common (OBD)", 1.0),
        Measure("obs_overlap", "pruned weights in common (OBS)", 1.0),
        Measure("obd_rank_correlation", "rank correlation of OBD saliencies", 1.0),
        Measure("obs_rank_correlation", "rank correlation of OBS saliencies", 1.0),
        Measure("obd_increase", "predicted increase of the loss over the exact (OBD)", 1.0),
        Measure("obs_increase", "predicted increase of the loss over the exact (OBS)", 1.0),
    )

    def __post_init__(self) -> None:
        """Refuse a share that prunes nothing or all."""
        if not 0 < self.share < 1 or not self.damping > 0:
            raise ValueError(
                f"Pruning: share={self.share!r} and damping={self.damping!r} were given; "
                "a share between 0 and 1 and a positive damping are expected."
            )

    def answers(self, layer: LayerStatistics, pair: Pair) -> Answers:
        """Return both saliencies of every weight, and what pruning by them costs."""
        w = weights_of("Pruning", layer, self.weights)
        half = w.square() / 2
        diagonals = {
            "obd": pair.approx.diagonal(),
            "obs": pair.approx.inverse(self.damping).diagonal().reciprocal(),
        }
        found: dict[str, Tensor] = {}
        for name, diagonal in diagonals.items():
            saliency = (half * diagonal).flatten()
            gone = saliency.argsort()[: self._count(saliency)]
            delta = torch.zeros_like(saliency)
            delta[gone] = w.flatten()[gone]
            cost = pair.exact.quadratic_form(delta.view_as(w)) / 2
            found |= {
                name: saliency,
                f"{name}_pruned": torch.zeros_like(saliency).index_fill(0, gone, 1.0),
                f"{name}_cost": cost,
            }
        return found

    @property
    def setting(self) -> str:
        """Share and λ in words."""
        return f"{self.share:.0%} of the weights, λ = {self.damping:.3g}"

    def demand(self, layer: LayerStatistics) -> Demand:
        """Count the diagonal of the inverse, and two products."""
        return Demand(products=2, traces=True)

    def _count(self, saliency: Tensor) -> int:
        return max(1, round(self.share * saliency.numel()))

    def joined(self, blocks: Sequence[Answers]) -> Answers:
        """Put the weights one after the other and add the costs."""
        return summed(blocks, "obd", "obs", "obd_pruned", "obs_pruned")

    def measure(self, exact: Answers, approx: Answers) -> dict[str, float]:
        """Return how alike the choices are and what they cost."""
        found = {}
        for name in ("obd", "obs"):
            mine, other = exact[f"{name}_pruned"], approx[f"{name}_pruned"]
            cost = float(exact[f"{name}_cost"])
            found[f"{name}_overlap"] = float(mine @ other) / float(mine.sum())
            found[f"{name}_rank_correlation"] = spearman(exact[name], approx[name])
            ratio = float(approx[f"{name}_cost"]) / cost if cost > 0 else float("nan")
            found[f"{name}_increase"] = ratio
        return {one.name: found[one.name] for one in self.measures}


@shown
@final
@dataclass(frozen=True, eq=False)
class EWC:
    """Elastic weight consolidation: the penalty ½ δᵀF̂δ on a drift δ of the weights.

    Parameters
    ----------
    weights
        Parameters by name where the Fisher was taken.
    others
        Parameters by name after a drift, one or several of them.
    random
        Drifts in random directions, as long in every block as the first given one.
    seed
        Of the random drifts.

    References
    ----------
    Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3.

    Examples
    --------
    >>> EWC({}, [{}]).measures[0].name
    'penalty_ratio'
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    others: Sequence[Mapping[str, Tensor]] = field(repr=False)
    random: int = 32
    seed: int = 0

    name: ClassVar[str] = "ewc"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("penalty_ratio", "penalty over the exact one, mean over the drifts", 1.0),
        Measure("random_ratio", "penalty over the exact one, random drifts", 1.0),
        Measure("rank_correlation", "rank correlation of penalties over all drifts", 1.0),
    )

    def __post_init__(self) -> None:
        """Refuse to judge no drift."""
        if not self.others:
            raise ValueError(
                "EWC: others=[] was given; the parameters after one drift or more are "
                "expected, e.g. those of a later checkpoint."
            )

    def answers(self, layer: LayerStatistics, pair: Pair) -> Answers:
        """Return the penalties of the drifts given, then of the random ones."""
        here = weights_of("EWC", layer, self.weights)
        given = torch.stack([weights_of("EWC", layer, o) - here for o in self.others])
        draw = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(
            self.random, *here.shape, generator=draw, dtype=torch.float64, device="cpu"
        )
        noise = noise.to(here.device)
        length = given[0].norm() / noise.flatten(1).norm(dim=1)
        drifts = torch.cat([given, noise * length[:, None, None]])
        penalties = [pair.approx.quadratic_form(part) / 2 for part in drifts.split(16)]
        return {"penalties": torch.cat(penalties)}

    def demand(self, layer: LayerStatistics) -> Demand:
        """Count a product a drift."""
        return Demand(dampings=0, products=len(self.others) + self.random)

    def joined(self, blocks: Sequence[Answers]) -> Answers:
        """Add the penalties of the blocks."""
        return summed(blocks)

    def measure(self, exact: Answers, approx: Answers) -> dict[str, float]:
        """Return ratios and order of the penalties."""
        mine, own = exact["penalties"], approx["penalties"]
        ratios = own / mine
        given = len(self.others)
        return {
            "penalty_ratio": float(ratios[:given].mean()),
            "random_ratio": float(ratios[given:].mean()) if self.random else float("nan"),
            "rank_correlation": spearman(mine, own),
        }
