"""What is asked of single weights: another value, pruning, holding them where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fisherlab.errors import BudgetError, DataError, NumericalError
from fisherlab.layers import frozen
from fisherlab.likelihoods import Likelihood
from fisherlab.metrics.pairs import Pair
from fisherlab.operators import FactoredFisher
from fisherlab.operators.base import tikhonov
from fisherlab.purposes.base import (
    EXAMPLES,
    Answers,
    Demand,
    Measure,
    spearman,
    summed,
    weights_of,
)
from fisherlab.settings import numeric
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics
from fisherlab.statistics.batches import Batch, batches
from fisherlab.statistics.model_view import plain_attributes_kept, swapped


@final
@dataclass(frozen=True, eq=False)
class Trial:
    """Mean loss over examples, in nats, of a model of which some parameters are replaced.

    The model is run in evaluation mode and left as it was found.

    Parameters
    ----------
    model, likelihood
        As in `fl.collect`.
    data
        (x, y), or an iterable of such pairs that can be gone through again.

    Raises
    ------
    DataError
        If labels are missing.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model, data = torch.nn.Linear(3, 2), (torch.ones(5, 3), torch.ones(5, 2))
    >>> loss = Trial(model, data, fl.Gaussian())
    >>> loss({"weight": torch.zeros(2, 3), "bias": torch.ones(2)})
    0.0
    """

    model: nn.Module = field(repr=False)
    data: Any = field(repr=False)
    likelihood: Likelihood

    def __call__(self, weights: Mapping[str, Tensor]) -> float:
        """Return (1/N) Σ loss with some parameters, by name, in the place of the own."""
        own = dict(self.model.named_parameters())
        given = {name: value.to(own[name]) for name, value in weights.items()}
        total, count = 0.0, 0
        with self._at_rest(), swapped(self.model, given):
            for batch in self._batches():
                if batch.y is None:
                    raise DataError(
                        "Trial: data without labels were given; (x, y) expected."
                    )
                losses = self.likelihood.loss(self._output(batch), batch.y)
                total += float(losses.sum(dtype=torch.float64))
                count += len(batch)
        return total / count

    @cached_property
    def flops(self) -> float:
        """Multiply-adds of one call, counted on one example."""
        count, one = 0, None
        for batch in self._batches():
            one = batch.part(slice(0, 1)) if one is None else one
            count += len(batch)
        assert one is not None, "data without examples are refused"
        with self._at_rest(), FlopCounterMode(display=False) as counter:
            self._output(one)
        return counter.get_total_flops() / 2 * count

    def _at_rest(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(frozen(self.model))
        stack.enter_context(plain_attributes_kept(self.model))
        return stack

    def _batches(self) -> Iterator[Batch]:
        first = next(self.model.parameters())
        return batches(self.data, first.device, first.dtype, model=self.model)

    def _output(self, batch: Batch) -> Tensor:
        output: Tensor = batch.through(self.model)
        return output


KINDS: Final = ("obd", "obs")
RATIOS: Final = {
    "overlap": (
        "pruned weights in common",
        "Share of the weights that go which the exact block removes, too; saliencies are "
        "½w²F̂ᵢᵢ (OBD) and ½w²/[(F̂ + λI)⁻¹]ᵢᵢ (OBS).",
    ),
    "rank_correlation": (
        "rank correlation of saliencies",
        "Spearman correlation with those of the exact block.",
    ),
    "increase": (
        "predicted increase of the loss over the exact",
        "½δᵀFδ of the weights that the method removes, over that of the exact block's.",
    ),
}
MEASURED: Final = {
    "predicted": "½δᵀFδ of both choices, subtracted.",
    "realised": "The mean loss without the weights of both choices, subtracted.",
}

PER_EXAMPLE: Final = "MiniBlock(statistic='per_example', spatial_average=False"
OF_DIAGONAL: Final[Mapping[str, Any]] = {
    "assured": "what keeps the exact block's diagonal prunes by OBD as it does",
    "settles": ("Diagonal(", PER_EXAMPLE, "QuasiDiagonal("),
}


@shown
@numeric
@final
@dataclass(frozen=True, eq=False)
class Pruning:
    r"""Pruning by saliency: which weights cost least to set to zero.

    .. math:: \mathrm{OBD}_i = ½ w_i^2 F̂_{ii}, \qquad
              \mathrm{OBS}_i = ½ w_i^2 / [(F̂ + λI)^{-1}]_{ii}

    The predicted increase is what the quadratic model of the exact block says of setting
    the chosen weights to zero, ½ δᵀFδ. The realised one is measured: the loss without
    these weights. Both are told beside those of the exact block's own choice.

    Parameters
    ----------
    weights
        Parameters by name, ``dict(model.named_parameters())``.
    damping
        λ of the inverse.
    share
        Of the weights of every block that go.
    shares
        Further shares at which the increases are told.
    loss
        From parameters by name, in the place of the model's own, to the mean loss in
        nats; `Pruning.of` makes it from a model and data. Without it nothing is measured.

    Raises
    ------
    ValueError
        For shares outside of (0, 1) or given twice, or a damping that is not positive.

    Notes
    -----
    Leads are not held against noise: a choice has no derivative by the examples, and what
    two choices have in common falls with every change of one of them, so that examples
    drawn anew show how much is lost and not how much is noise.

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
    shares: Sequence[float] = ()
    loss: Callable[[Mapping[str, Tensor]], float] | None = field(default=None, repr=False)

    name: ClassVar[str] = "pruning"
    unheld: ClassVar[str] = "choices of weights jump with the examples"

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Any,
        likelihood: Likelihood,
        damping: float = 1e-2,
        share: float = 0.5,
        shares: Sequence[float] = (),
    ) -> Pruning:
        """Measure the loss of a model, too, after removing what each method would.

        The model is left as it was found. Costs a pass over the data for every method,
        block, kind of saliency and share, and two for every method and all blocks.

        Examples
        --------
        >>> import fisherlab as fl
        >>> model, data = torch.nn.Linear(3, 2), (torch.ones(5, 3), torch.ones(5, 2))
        >>> Pruning.of(model, data, fl.Gaussian()).measures[-1].name
        'obs_realised'
        """
        weights = {name: p.detach() for name, p in model.named_parameters()}
        return cls(weights, damping, share, shares, Trial(model, data, likelihood))

    def __post_init__(self) -> None:
        """Refuse a share that prunes nothing or all."""
        object.__setattr__(self, "damping", tikhonov(self.damping, "Pruning"))
        once = len({f"{share:.3g}" for share in self._shares}) == len(self._shares)
        inside = all(0 < share < 1 for share in self._shares)
        if not (once and inside and self.damping > 0):
            raise ValueError(
                f"Pruning: share={self.share!r}, shares={list(self.shares)!r} and damping="
                f"{self.damping!r} were given; different shares between 0 and 1 and a "
                "positive damping are expected."
            )

    @property
    def _shares(self) -> tuple[float, ...]:
        return self.share, *self.shares

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Choices and orders; the increases of every share that was asked for."""
        found = [
            Measure(
                f"{kind}_{name}", f"{title} ({kind.upper()})", 1.0, meaning=meaning, **known
            )
            for name, (title, meaning) in RATIOS.items()
            for kind, known in (("obd", OF_DIAGONAL), ("obs", {}))
        ]
        told = ["predicted"] * (self.loss is not None or bool(self.shares))
        told += ["realised"] * (self.loss is not None)
        for share in self._shares:
            for kind in KINDS:
                at = f"{kind.upper()}, {share:.3g}" if self.shares else kind.upper()
                found += [
                    Measure(
                        _increase(kind, what, share, self.share),
                        f"{what} increase of the loss minus the exact one ({at})",
                        0.0,
                        "nat",
                        meaning=MEASURED[what],
                    )
                    for what in told
                ]
        return tuple(found)

    def answers(self, layer: LayerStatistics, pair: Pair) -> Answers:
        """Return both saliencies of every weight, and what pruning by them costs.

        Of a matrix that cannot be inverted, those of OBD alone, and why.
        """
        w = weights_of("Pruning", layer, self.weights)
        half = w.square() / 2
        diagonals = {"obd": pair.approx.diagonal()}
        found: dict[str, Any] = {"blocks": [layer.block]}
        try:
            diagonals["obs"] = pair.approx.inverse(self.damping).diagonal().reciprocal()
        except (NumericalError, BudgetError) as error:
            found["why"] = error
        for kind, diagonal in diagonals.items():
            saliency = (half * diagonal).flatten()
            gone = torch.stack([_smallest(saliency, share) for share in self._shares])
            deltas = (gone * w.flatten()).unflatten(1, w.shape)
            found |= {
                kind: saliency,
                f"{kind}_pruned": gone,
                f"{kind}_cost": pair.exact.quadratic_form(deltas) / 2,
            }
        return found | self._losses([found])

    @property
    def setting(self) -> str:
        """Share and λ in words."""
        return f"{self.share:.0%} of the weights, λ = {self.damping:.3g}"

    def demand(self, layer: LayerStatistics) -> Demand:
        """Count the diagonal of the inverse, products, and passes for realised losses."""
        asked = 2 * len(self._shares)
        once = float(getattr(self.loss, "flops", 0.0))
        return Demand(products=asked, traces=True, flops=2 * asked * once)

    def _losses(self, blocks: Sequence[Answers]) -> dict[str, Tensor]:
        """Return the loss, by share, without the weights that each kind would remove."""
        if self.loss is None:
            return {}
        found = {}
        for kind in _kinds(blocks):
            losses = []
            for row in range(len(self._shares)):
                left: dict[str, Tensor] = {}
                for one in blocks:
                    (block,) = one["blocks"]
                    kept = 1 - one[f"{kind}_pruned"][row].view(block.weight_shape)
                    left |= {n: self.weights[n] * m for n, m in block.unpack(kept).items()}
                losses.append(self.loss(left))
            found[f"{kind}_loss"] = torch.tensor(losses, dtype=torch.float64)
        return found

    def joined(self, blocks: Sequence[Answers]) -> Answers:
        """Put the weights one after the other, add the predictions, and measure anew."""
        kinds = _kinds(blocks)
        parts = [
            {
                name: value.T if name.endswith("pruned") else value
                for name, value in one.items()
                if name.partition("_")[0] in kinds
            }
            for one in blocks
        ]
        whole = dict(summed(parts, *kinds, *(f"{kind}_pruned" for kind in kinds)))
        turned = {n: v.T for n, v in whole.items() if n.endswith("pruned")}
        return whole | turned | self._losses(blocks)

    def measure(self, exact: Answers, approx: Answers) -> dict[str, float]:
        """Return how alike the choices are and what they cost; NaN where there is none."""
        found = {}
        for kind in _kinds([exact, approx]):
            mine, other = exact[f"{kind}_pruned"][0], approx[f"{kind}_pruned"][0]
            found[f"{kind}_overlap"] = float(mine @ other) / float(mine.sum())
            found[f"{kind}_rank_correlation"] = spearman(exact[kind], approx[kind])
            costs = exact[f"{kind}_cost"], approx[f"{kind}_cost"]
            cost = float(costs[0][0])
            ratio = float(costs[1][0]) / cost if cost > 0 else float("nan")
            found[f"{kind}_increase"] = ratio
            increases = {"predicted": costs[1] - costs[0]}
            if self.loss is not None:
                increases["realised"] = approx[f"{kind}_loss"] - exact[f"{kind}_loss"]
            for what, values in increases.items():
                for share, value in zip(self._shares, values.tolist(), strict=True):
                    found[_increase(kind, what, share, self.share)] = value
        return {one.name: found.get(one.name, float("nan")) for one in self.measures}


def _kinds(blocks: Sequence[Answers]) -> list[str]:
    """Return the kinds of saliency that all of several answers have."""
    return [kind for kind in KINDS if all(kind in one for one in blocks)]


def _increase(kind: str, what: str, share: float, first: float) -> str:
    return f"{kind}_{what}" + ("" if share == first else f"_{share:.3g}")


def _smallest(saliency: Tensor, share: float) -> Tensor:
    """Return 1 for the share of entries that is smallest, at least one, and 0 else."""
    count = max(1, round(share * saliency.numel()))
    return torch.zeros_like(saliency).index_fill(0, saliency.argsort()[:count], 1.0)


@shown
@numeric
@final
@dataclass(frozen=True, eq=False)
class EWC:
    """Elastic weight consolidation: the penalty ½ δᵀF̂δ on a drift δ of the weights.

    A drift that the exact matrix does not see, δᵀFδ = 0 to rounding, has no ratio: it is
    left out of the means, which are NaN where there is no other.

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

    Raises
    ------
    ValueError
        For no drifts.

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
        Measure(
            "penalty_ratio",
            "penalty over the exact one, mean over the drifts",
            1.0,
            meaning="½δᵀF̂δ / ½δᵀFδ for the drifts δ to the parameters that were given.",
            both_sides=True,
        ),
        Measure(
            "random_ratio",
            "penalty over the exact one, random drifts",
            1.0,
            meaning="The same for random drifts as long as the first of them.",
        ),
        Measure(
            "rank_correlation",
            "rank correlation of penalties over all drifts",
            1.0,
            meaning="Spearman correlation of both penalties over given and random drifts.",
        ),
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
        most = pair.approx.trace() * drifts.flatten(1).square().sum(1) / 2
        eps = torch.finfo(pair.approx.dtype).eps
        found = {"penalties": torch.cat(penalties), "rounding": 8 * eps * most}
        if pair.same and isinstance(pair.exact, FactoredFisher):
            parts = [pair.exact.forms_by_example(part) / 2 for part in given.split(16)]
            added = torch.cat(parts)
            found[EXAMPLES] = added - added.mean(1, keepdim=True)
        return found

    def demand(self, layer: LayerStatistics) -> Demand:
        """Count a product a drift."""
        return Demand(dampings=0, products=len(self.others) + self.random)

    def joined(self, blocks: Sequence[Answers]) -> Answers:
        """Add the penalties of the blocks."""
        return summed(blocks)

    def influences(self, exact: Answers, approx: Answers) -> Tensor:
        r"""Return what examples move the mean ratio of given drifts by, (N,).

        .. math:: -\mathrm{mean}_δ \; \frac{δ^T F̂ δ}{δ^T F δ} \,
                  \frac{δ^T F_n δ}{δ^T F δ}

        where an example adds F_n to F, and F̂ is held as it is.
        """
        added = exact[EXAMPLES]
        mine, ratios = (part[: len(added)] for part in _ratios(exact, approx))
        return -(ratios / mine)[mine > 0] @ added[mine > 0] / int((mine > 0).sum())

    def measure(self, exact: Answers, approx: Answers) -> dict[str, float]:
        """Return ratios and order of the penalties."""
        own, given = approx["penalties"], len(self.others)
        mine, ratios = _ratios(exact, approx)
        return {
            "penalty_ratio": float(ratios[:given].nanmean()),
            "random_ratio": float(ratios[given:].nanmean()),
            "rank_correlation": spearman(mine, own),
        }


def _ratios(exact: Answers, approx: Answers) -> tuple[Tensor, Tensor]:
    """Return penalties of F, 0 where they are rounding, and those of F̂ over them."""
    mine = torch.where(exact["penalties"] > exact["rounding"], exact["penalties"], 0)
    return mine, torch.where(mine > 0, approx["penalties"] / mine, torch.nan)
