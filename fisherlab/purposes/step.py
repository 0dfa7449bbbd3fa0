"""Natural-gradient steps: how much of the exact step's decrease a method reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fisherlab.errors import FisherlabError, IndefiniteError
from fisherlab.metrics.pairs import Damped, Pair
from fisherlab.operators import FactoredFisher, Operator
from fisherlab.operators.base import Damping, Factored, RelativeDamping, parsed
from fisherlab.operators.stacked import has_factors
from fisherlab.purposes.base import EXAMPLES, Answers, Demand, Measure, of_block, summed
from fisherlab.showing import shown
from fisherlab.statistics import LayerStatistics, MeanGradient

_BEST: WeakKeyDictionary[Operator, tuple[float, Any, Tensor]] = WeakKeyDictionary()
GRID: Final = tuple(10.0 ** (k / 2) for k in range(-6, 7))  # own dampings over the common


@shown
@final
@dataclass(frozen=True, eq=False)
class Step:
    r"""Natural gradient: the step −(F̂ + μI)⁻¹v in the quadratic model of F + λI.

    .. math:: M(Δ) = ½ Δ^T (F + λI) Δ - v^T Δ, \qquad
              \cos_P^2 = \frac{(v^T Δ)^2}{(Δ^T P Δ)(v^T P^{-1} v)}

    A method is judged at the common μ = λ and at the μ of a grid that serves it best: an
    approximation whose scale is wrong may need a damping of its own.

    Parameters
    ----------
    gradient
        v by block, from `fl.mean_gradient`.
    damping
        λ; `RelativeDamping(α)` is λ = α·tr F/p of every block. With `Factored(λ)` methods
        with Kronecker factors are damped by `Factored(μ)`, and F and the others beside
        the matrix.
    grid
        μ/λ that are tried.

    Raises
    ------
    ValueError
        For a damping, or one of the grid, that is not positive.

    Notes
    -----
    A method that is indefinite at λ is judged at those μ where it is not.

    References
    ----------
    Martens and Grosse 2015, arXiv 1503.05671, section 6 (the quadratic model and damping).

    Examples
    --------
    >>> import fisherlab as fl
    >>> model, data = torch.nn.Linear(3, 2).double(), (torch.rand(9, 3).double(), None)
    >>> stats = fl.collect(model, data, fl.Categorical())
    >>> gradient = {"weight+bias": torch.ones(2, 4).double()}
    >>> [one.name for one in Step(gradient, 0.1).measures][:2]
    ['best_f_cosine_squared', 'f_cosine_squared']
    """

    gradient: Mapping[str, Any] = field(repr=False)
    damping: Damping = 1e-2
    grid: Sequence[float] = GRID

    name: ClassVar[str] = "step"
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure(
            "best_f_cosine_squared",
            "share of the exact decrease at its best damping and length",
            1.0,
            assured="at most 1; at least that at the common damping",
            meaning="The decrease of the quadratic model ½ΔᵀPΔ − vᵀΔ, P = F + λI, along "
            "the method's step −(F̂ + μI)⁻¹v, with the length that suits it and the best μ "
            "of a grid, over that of the exact step.",
        ),
        Measure(
            "f_cosine_squared",
            "share of the exact decrease at its best length",
            1.0,
            assured="at most 1",
            meaning="The same at μ = λ: the step is as long as suits it best.",
        ),
        Measure(
            "decrease",
            "share of the exact decrease at its own length",
            1.0,
            assured="at most 1",
            meaning="The same at μ = λ for the step as it comes; negative where it is so "
            "long that the model grows.",
        ),
        Measure(
            "direction_cosine",
            "cosine of the directions",
            1.0,
            meaning="Between the exact damped natural gradient and that of the method.",
        ),
        Measure(
            "best_damping",
            "its best damping over the common one",
            1.0,
            meaning="The μ/λ of the first measure.",
        ),
    )

    def __post_init__(self) -> None:
        """Refuse dampings that are none."""
        relative = isinstance(self.damping, RelativeDamping)
        value = 1.0 if relative else parsed(self.damping, None).value
        if not value > 0 or not all(mu > 0 for mu in self.grid):
            raise ValueError(
                f"Step: damping={self.damping!r} with grid {list(self.grid)!r} was given; "
                "positive numbers are expected."
            )

    @property
    def setting(self) -> str:
        """The common λ in words."""
        if isinstance(self.damping, RelativeDamping):
            return f"λ = {self.damping.single():g} times the mean eigenvalue of each block"
        name = "factored λ" if isinstance(self.damping, Factored) else "λ"
        return f"{name} = {parsed(self.damping, None).value:.3g}"

    def demand(self, layer: LayerStatistics) -> Demand:
        """Count a solve and a quadratic form at λ and at every μ."""
        tried = 1 + len(self.grid)
        return Demand(dampings=tried, products=0, forms=tried)

    def answers(self, layer: LayerStatistics, pair: Pair) -> Answers:
        """Return slopes vᵀΔ and curvatures ΔᵀPΔ at λ and on the grid, and ΔᵀΔ* at λ."""
        given = of_block("Step", "gradient", self.gradient, layer.name)
        v = given.gradient if isinstance(given, MeanGradient) else given
        v = v.to(torch.float64)
        common = parsed(self.damping, pair.exact).value
        damped = pair.damped(common)
        found: dict[str, Any] = {}
        try:
            taken = self._solved(pair, v, common)
        except IndefiniteError as error:
            taken = torch.full_like(v, torch.nan)
            found["why"] = error
        best = self._best(pair, v, common, taken)
        found |= {"along": _dot(best, taken), "squares": _dot(taken, taken)}
        reached = [_reached(damped, v, taken)]
        del taken, best  # a step may be a gigabyte
        for ratio in () if pair.same else self.grid:
            reached.append(_reached(damped, v, self._tried(pair, v, ratio * common)))
        slopes, curvatures, added = map(torch.stack, zip(*reached, strict=True))
        found |= {"slopes": slopes, "curvatures": curvatures}
        if "why" in found and slopes.isnan().all():
            raise found["why"]
        if pair.same:
            found["gradient"] = torch.stack(_reached(damped, v, v)[:2])
        if added.shape[1]:
            found[EXAMPLES] = added - added.mean(1, keepdim=True)
        return found

    def _best(self, pair: Pair, v: Tensor, common: float, taken: Tensor) -> Tensor:
        """Return the exact step Δ*, which is solved for once for all methods."""
        at, gradient, best = _BEST.get(pair.exact, (None, None, taken))
        if at != common or gradient is not self.gradient:
            best = taken if pair.same else pair.exact.solve(v, common)
            _BEST[pair.exact] = common, self.gradient, best
        return best

    def _tried(self, pair: Pair, v: Tensor, mu: float) -> Tensor:
        """Return the step at a μ; NaN where the method has none."""
        try:
            return self._solved(pair, v, mu)
        except FisherlabError:
            return torch.full_like(v, torch.nan)

    def _solved(self, pair: Pair, v: Tensor, mu: float) -> Tensor:
        if (
            isinstance(self.damping, Factored)
            and not pair.same
            and has_factors(pair.source)
        ):
            return pair.source.solve(v, replace(self.damping, value=mu))
        return pair.approx.solve(v, mu)

    def joined(self, blocks: Sequence[Answers]) -> Answers:
        """Add everything up."""
        return summed(blocks)

    def measure(self, exact: Answers, approx: Answers) -> dict[str, float]:
        """Return the shares of the exact decrease at λ and at the best μ."""
        goal = float(exact["slopes"][0])  # vᵀP⁻¹v
        if goal <= 0:  # at a stationary point every direction is as good
            return {one.name: float("nan") for one in self.measures}
        slopes, curvatures = approx["slopes"], approx["curvatures"]
        shares = _shares(approx, goal)
        best = int(shares.nan_to_num(-1.0).argmax())
        lengths = (exact["squares"] * approx["squares"]).sqrt()
        ratios = (1.0, *self.grid)
        return {
            "best_f_cosine_squared": float(shares[best]),
            "f_cosine_squared": float(shares[0]),
            "decrease": float(2 * slopes[0] - curvatures[0]) / goal,
            "direction_cosine": float(approx["along"] / lengths),
            "best_damping": ratios[best],
        }

    def influences(self, exact: Answers, approx: Answers) -> Tensor:
        r"""Return what examples move the share at the best damping by, (N,).

        .. math:: c \left(\frac{\mathrm{d}g}{g} - \frac{\mathrm{d}q}{q}\right), \qquad
                  g = v^T P^{-1} v, \quad q = Δ^T P Δ

        for the share c, where an example moves g by −Δ*ᵀF_nΔ* and q by ΔᵀF_nΔ, the
        steps held as they are; nothing (0,) where examples are not known.
        """
        if EXAMPLES not in exact or EXAMPLES not in approx:
            return torch.empty(0)
        shares = _shares(approx, float(exact["slopes"][0]))
        best = int(shares.nan_to_num(-1.0).argmax())
        goal = exact[EXAMPLES][0] / exact["slopes"][0]
        own = approx[EXAMPLES][best] / approx["curvatures"][best]
        return shares[best] * (goal - own)

    @property
    def ratios(self) -> list[float]:
        """The μ/λ that were tried, the common one among them, ascending."""
        return sorted({1.0, *self.grid})

    def by_damping(self, exact: Answers, approx: Answers) -> tuple[list[float], float]:
        """Return the shares of the best decrease at `ratios`, and the gradient's own."""
        goal = float(exact["slopes"][0])
        if goal <= 0:
            return [float("nan")] * len(self.ratios), float("nan")
        tried = dict(zip((1.0, *self.grid), _shares(approx, goal).tolist(), strict=False))
        shares = [tried.get(ratio, float("nan")) for ratio in self.ratios]
        slope, curvature = exact["gradient"]
        return shares, float(slope.square() / (curvature * goal))


def _shares(approx: Answers, goal: float) -> Tensor:
    return Tensor(approx["slopes"].square() / (approx["curvatures"] * goal))


def _reached(damped: Damped, v: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return vᵀΔ, ΔᵀPΔ and what every example adds to that, where they are known."""
    exact = damped.pair.exact
    if isinstance(exact, FactoredFisher):
        added = exact.forms_by_example(step[None])[0]
        inside = added.sum()
    else:
        added, inside = step.new_empty(0), exact.quadratic_form(step)
    return _dot(v, step), inside + damped.damping * _dot(step, step), added


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())  # without their product, entry by entry
