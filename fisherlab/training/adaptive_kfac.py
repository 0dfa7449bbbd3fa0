"""The full K-FAC optimiser: no learning rate, no momentum to tune, damping that adapts.

Its steps minimise the quadratic model of the loss with the exact Fisher, which is taken
through Jacobian products.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from fisherlab.errors import NumericalError
from fisherlab.layers import frozen
from fisherlab.layers.blocks import exclusive
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.ranks import Ranks
from fisherlab.operators.base import Factored
from fisherlab.settings import numeric, put_back
from fisherlab.showing import shown
from fisherlab.statistics import Fisher, MonteCarlo
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import ModelView, view
from fisherlab.training.curvature import Fallback, Preconditioned, handler
from fisherlab.training.moves import Parameters
from fisherlab.training.schedules import Averaging, GreedySearch, Ramped, averaging, rule
from fisherlab.training.units import (
    Unit,
    averaged,
    current,
    inverted,
)

Direction = Mapping[str, Tensor]
SINGULAR = 4096  # roundings: below them sin²(Δ, δ₀), of the 2 × 2 system, is not known


class Rescaled(NamedTuple):
    """The best combination αΔ + μδ₀ and the change of the model that it promises."""

    alpha: float
    mu: float
    change: float


@final
@dataclass(frozen=True, eq=False)
class QuadraticModel:
    r"""The second-order model of h around the parameters, F never formed.

    .. math:: M(δ) = h + ∇h^T δ + \tfrac12 δ^T (F + sI) δ, \qquad
              u^T F v = \frac1N \sum_n (J_n u)^T H(z_n) (J_n v)

    Parameters
    ----------
    view, batch, likelihood
        The model in evaluation mode, and the examples of F.
    gradient
        ∇h by parameter name.
    shift
        s ≥ 0.
    ranks
        The processes that have examples of F, where there are several.

    Notes
    -----
    H(z) is the Hessian of the loss in the outputs, which is the output's Fisher for
    Categorical, Bernoulli and Gaussian. A product takes one forward-mode pass.

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671, sections 6.4 and 7.
    """

    view: ModelView
    batch: Batch
    likelihood: Likelihood
    gradient: Direction
    shift: float
    ranks: Ranks | None = None

    @cached_property
    def point(self) -> dict[str, Tensor]:
        """The parameters that the gradient belongs to."""
        return {name: self.view.parameters[name] for name in self.gradient}

    def pushed(self, direction: Direction) -> tuple[Tensor, Tensor]:
        """Return J u and H J u of a direction, each shaped like the output."""

        def outputs(chosen: dict[str, Tensor]) -> Tensor:
            return self.view(self.batch, chosen)

        tangent = {name: direction[name].detach() for name in self.gradient}
        with self.view.settings(), _quiet():
            done: Any = torch.func.jvp(outputs, (self.point,), (tangent,))
            output, moved = done
            return moved, self._curved(output.detach(), moved)

    def _curved(self, output: Tensor, moved: Tensor) -> Tensor:
        """Return H(z) t."""
        target = self.batch.y
        assert target is not None

        def slope(z: Tensor) -> Tensor:
            return self.likelihood.gradient(z, target)

        found: Any = torch.func.jvp(slope, (output,), (moved,))
        curved: Tensor = found[1]
        return curved

    def rescale(self, direction: Direction, last: Direction | None) -> Rescaled:
        """Minimise M over combinations of a direction and of the last step.

        Parameters
        ----------
        direction
            Δ, by parameter name.
        last
            δ₀, or None for none; where the two are parallel it is left out as well.

        Returns
        -------
        Rescaled
            α, μ and M(αΔ + μδ₀) − M(0) = ½ ∇hᵀ(αΔ + μδ₀).
        """
        pushed = self.pushed(direction)
        slope = _dot(self.gradient, direction)
        square = self._form(pushed, pushed) + self.shift * _dot(direction, direction)
        if last is not None:
            before = self.pushed(last)
            last_slope = _dot(self.gradient, last)
            cross = self._form(pushed, before) + self.shift * _dot(direction, last)
            last_square = self._form(before, before) + self.shift * _dot(last, last)
            determinant = square * last_square - cross * cross  # ** raises where * is inf
            known = SINGULAR * _rounding(direction) * square * last_square
            if determinant > known:
                alpha = -(last_square * slope - cross * last_slope) / determinant
                mu = -(square * last_slope - cross * slope) / determinant
                change = (alpha * slope + mu * last_slope) / 2
                return Rescaled(alpha, mu, change)
        if square <= 0:  # no curvature and no slope: stay
            return Rescaled(0.0, 0.0, 0.0)
        alpha = -slope / square
        return Rescaled(alpha, 0.0, alpha * slope / 2)

    def _form(self, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
        product = _inner(left[0], right[1])
        count = product.new_tensor(len(self.batch))
        if self.ranks is not None:
            counted = float(self.batch.counted)
            product, count = self.ranks.added([counted * product, counted * count])
        return float(product) / float(count)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch says of itself when forward mode is used for the first time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated")
        yield


def _dot(left: Direction, right: Direction) -> float:
    return float(torch.stack([_inner(left[n], right[n]) for n in left]).sum())


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ l·r in float64: products of float32 overflow at 1e38."""
    return (left.double() * right.double()).sum()


def _rounding(direction: Direction) -> float:
    return max(torch.finfo(part.dtype).eps for part in direction.values())


EARLY = 3  # steps that renew the inverses whatever their age


@shown
@numeric
@final
class AdaptiveKFAC(Preconditioned):
    r"""Martens and Grosse's K-FAC: step, momentum and damping from a quadratic model.

    .. math:: Δ = -\hat F_γ^{-1} ∇h, \qquad δ = αΔ + μδ_0, \qquad
              (α, μ) = \arg\min M(αΔ + μδ_0), \qquad θ \leftarrow θ + δ

    M holds the exact Fisher plus (λ + η) I and is minimised through Jacobian products.
    :math:`h = \text{loss} + \tfrac{η}{2} ‖θ‖^2`. λ follows the reduction ratio, γ a greedy
    search; :math:`\hat F_γ` has factored damping γ² (`Tikhonov` γ² where a method has no
    Kronecker terms), and no less than rounding leaves of the factors,

    .. math:: γ \ge ε \max(d_{out}, d_{in}) \sqrt{\mathrm{tr} \hat F / p}

    with ε of their precision: ε tr A of A, and ε tr G of G.

    Parameters
    ----------
    model, likelihood
        As for `NaturalGradient`. The model is run in evaluation mode, so that M is a
        model of one function.
    approximator
        "kfac" for the block-diagonal form, `KFACTridiagonal()` for the block-tridiagonal
        one; any other works.
    damping
        How λ begins and changes; a number is λ at the beginning, by default a hundredth
        of the first loss.
    search
        How γ changes; it begins at √(λ + η).
    l2
        η.
    inverse_every
        T₃; inverses are renewed also in the first three steps and in those of a search.
    fisher
        Labels of the factors.
    statistics_fraction, curvature_fraction
        τ₁ and τ₂: shares of the batch for the factors and for the exact Fisher of M.
    average
        Rule of the factors' average.
    parameter_average
        Rule of the average θ̄ of the iterates, see `averaged_parameters`.
    fallback
        As for `NaturalGradient`.
    momentum
        Whether δ has a part along the last step; without it δ = αΔ.
    lr
        Factor on δ, 1 as published; a setting of the group, so that schedulers of torch
        apply.
    group
        As for `NaturalGradient`; every rank takes the shares τ of its own part.

    Raises
    ------
    TypeError
        For a search or a momentum of another kind.
    ValueError
        For a damping of another kind, or numbers out of range.

    Notes
    -----
    A step costs that of `NaturalGradient`, two forward-mode passes on τ₂ of the batch,
    and a forward pass where λ is adapted. The defaults are published, those of T, τ and
    of the parameter average from memory; that of λ is ours. M knows the batch alone: the
    published batches have a thousand examples and more, and on a handful the minimum of M
    can raise the loss of all others many times over. `NaturalGradient` serves those.

    References
    ----------
    Martens & Grosse 2015, arXiv 1503.05671, Algorithm 2.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model = nn.Linear(3, 2)
    >>> optimiser = fl.AdaptiveKFAC(
    ...     model, fl.Gaussian(), damping=fl.LevenbergMarquardt(1.0)
    ... )
    >>> x, y = torch.eye(3).repeat(8, 1), torch.zeros(24, 2)
    >>> losses = [optimiser.step(batch=(x, y)).item() for _ in range(9)]
    >>> losses[8] < 0.1 * losses[0]
    True
    """

    key = "adaptive_kfac"
    kept = ("steps", "lam", "gamma", "ratio", "exceptions")
    fixed = ()

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        approximator: Any = "kfac",
        damping: Any = None,
        search: GreedySearch | None = None,
        l2: float = 1e-5,
        inverse_every: int = 20,
        fisher: Fisher | None = None,
        *,
        statistics_fraction: float = 1 / 8,
        curvature_fraction: float = 1 / 4,
        average: float | Averaging | None = None,
        parameter_average: float | Averaging | None = None,
        fallback: Fallback = None,
        momentum: bool = True,
        lr: float = 1.0,
        group: Any = None,
    ) -> None:
        self.damping = rule(damping)
        self.search = search or GreedySearch()
        self.l2, self.inverse_every, self.momentum = l2, inverse_every, momentum
        self.fractions = (statistics_fraction, curvature_fraction)
        if not isinstance(self.search, GreedySearch) or not isinstance(momentum, bool):
            raise TypeError(
                f"AdaptiveKFAC: search={search!r}, momentum={momentum!r}; GreedySearch() "
                "or None, and whether there is momentum, are expected."
            )
        self._check()
        self.average = averaging(Ramped(0.95) if average is None else average)
        kept = Ramped(0.99) if parameter_average is None else parameter_average
        self.parameter_average = averaging(kept)
        self._begin(float("nan"))  # a share of the loss is known with the first one
        self.ratio = float("nan")
        curvature, labels = handler(approximator, fallback), fisher or MonteCarlo(1)
        super().__init__(
            model, likelihood, curvature, labels, "per_example", None, {"lr": lr}, group
        )

    def _begin(self, loss: float) -> None:
        self.lam = self.damping.first(loss)
        self.gamma = (self.lam + self.l2) ** 0.5

    def _check(self) -> None:
        if self.l2 < 0 or self.inverse_every < 1:
            raise ValueError(
                f"AdaptiveKFAC: l2={self.l2}, inverse_every={self.inverse_every}; at least "
                "0 and at least 1 are expected."
            )
        if not all(0 < fraction <= 1 for fraction in self.fractions):
            msg = f"AdaptiveKFAC: the fractions {self.fractions} must lie in (0, 1]."
            raise ValueError(msg)

    @torch.no_grad()
    def step(self, closure: Any = None, *, batch: Any = None) -> Tensor:  # type: ignore[override]
        """Take one step on a batch (x, y) and return the loss before it, without η.

        Parameters
        ----------
        closure
            Not taken: the quadratic model needs the batch itself.
        batch
            (x, y).

        Raises
        ------
        ValueError
            If there is no batch, or a closure.
        NumericalError
            If a damped matrix is not positive definite or the step not finite; no
            parameter has changed then.
        """
        if closure is not None or batch is None:
            msg = "AdaptiveKFAC.step: a batch (x, y) is expected, and no closure."
            raise ValueError(msg)
        self._ready()
        with exclusive(self.model), frozen(self.model):
            read = self._passes.replicas.together(partial(self._passes.batch, batch))
            placed = self._passes.replicas.placed(read)
            assert placed is not None
            return self._step(placed)

    def _step(self, batch: Batch) -> Tensor:
        k = self.steps + 1
        parameters = self._parameters()
        shared = partial(self._passes.replicas.first_part, batch)
        few, some = map(shared, self.fractions)
        passed = self._passes.run(batch, parameters.blocks, k, observe=few)
        assert passed.statistics is not None
        if not self.steps and math.isnan(self.lam):
            self._begin(float(passed.loss))
        before, holding, _ = current(self.units, self._owners, parameters)
        ranks = self._passes.replicas.ranks
        statistics = self.curvature.whole(ranks, passed.statistics)
        assert statistics is not None
        fresh, exceptions = self.curvature.fresh(statistics, before, ranks)
        exceptions |= self._passes.left(few, parameters.blocks)
        units = averaged(before, fresh, lambda unit: self.average.share(unit.updates))
        gradient = {
            name: g + self.l2 * parameters.named[name].detach()
            for name, g in passed.gradients.items()
        }
        shift, seen = self.lam + self.l2, view(self.model, None)
        model = QuadraticModel(seen, some, self.likelihood, gradient, shift, ranks)
        gamma, units, (scales, step) = self._best(parameters, model, units, k)
        rate = float(self.param_groups[0].get("lr", 1))
        if rate != 1:  # M(ηδ) at the minimiser δ, where it is linear as M(δ) is twice
            step = {name: rate * part for name, part in step.items()}
            scales = scales._replace(change=rate * (2 - rate) * scales.change)
        self._move(parameters, step)
        if k % self.damping.every == 0:
            self._adapt(batch, parameters, passed.loss, step, scales)
        self.gamma, self.units, self.exceptions = gamma, units, exceptions
        self._owners = holding
        self.steps = k
        self._average(parameters)
        return passed.loss

    def _best(
        self,
        parameters: Parameters,
        model: QuadraticModel,
        units: Mapping[str, Unit],
        k: int,
    ) -> tuple[float, dict[str, Unit], tuple[Rescaled, dict[str, Tensor]]]:
        """Return γ, the units with its inverses, and the step with the smallest M."""
        candidates = self.search.candidates(self.gamma, k)
        missing = any(unit.inverse is None for unit in units.values())
        due = k % self.inverse_every == 0 or k <= EARLY or len(candidates) > 1 or missing
        packed = parameters.pack(model.gradient)
        last = self._last(parameters, model.gradient)
        found = []
        for gamma in candidates:
            tried = _damped(units, gamma) if due else dict(units)
            directions = parameters.unpack(self.curvature.directions(tried, packed))
            descent = {n: -d for n, d in directions.items() if n in model.gradient}
            scales = model.rescale(descent, last)
            found.append((gamma, tried, (scales, _combined(descent, last, scales))))
        best = min(found, key=lambda entry: _finite(entry[2][0].change))
        if not all(bool(s.isfinite().all()) for s in best[2][1].values()):
            raise NumericalError(
                f"AdaptiveKFAC step {k}: the step is not finite (λ = {self.lam:g}, "
                f"γ = {self.gamma:g}). No parameter was changed."
            )
        return best

    def _last(
        self, parameters: Parameters, gradient: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """Return the last step δ₀, or None in the first one and without momentum."""
        if not self.momentum:
            return None
        held = {name: self.state[parameters.named[name]] for name in gradient}
        if not all("last" in state for state in held.values()):
            return None
        return {name: state["last"] for name, state in held.items()}

    def _move(self, parameters: Parameters, step: Mapping[str, Tensor]) -> None:
        for name, part in step.items():
            parameter = parameters.named[name]
            parameter.add_(part)
            self.state[parameter]["last"] = part.contiguous()

    def _adapt(
        self,
        batch: Batch,
        parameters: Parameters,
        before: Tensor,
        step: Mapping[str, Tensor],
        scales: Rescaled,
    ) -> None:
        """Compare the change of h on the batch with that of M, and adapt λ."""
        change = float(self._passes.loss_at(batch)) - float(before)
        for name, part in step.items():  # η/2 (‖θ + δ‖² − ‖θ‖²) from θ + δ and δ
            here = parameters.named[name].detach()
            change += self.l2 * float((part * (here - part / 2)).sum())
        self.ratio = change / scales.change if scales.change else float("nan")
        self.lam = self.damping.adapted(self.lam, self.ratio)

    def _average(self, parameters: Parameters) -> None:
        share = self.parameter_average.share(self.steps - 1)
        for group in parameters.groups:
            for p in group["params"]:
                kept = self.state[p].get("average")
                self.state[p]["average"] = (
                    p.detach().clone() if kept is None else kept.lerp_(p, 1 - share)
                )

    @contextmanager
    def averaged_parameters(self) -> Iterator[nn.Module]:
        """Give the model the average θ̄ of its iterates, for a while.

        Raises
        ------
        ValueError
            If no step was taken yet.
        """
        if not self.steps:
            raise ValueError("averaged_parameters: no step was taken yet.")
        held = [p for group in self.param_groups for p in group["params"]]
        kept = [p.detach().clone() for p in held]
        averages = (self.state[p]["average"] for p in held)
        with put_back(partial(_copy, held, kept)):
            _copy(held, averages)
            yield self.model


def _copy(into: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for p, value in zip(into, values, strict=True):
        p.detach().copy_(value)


def _finite(change: float) -> float:
    return math.inf if math.isnan(change) else change


def _damped(units: Mapping[str, Unit], gamma: float) -> dict[str, Unit]:
    """Renew the inverses with factored damping γ², Tikhonov's where there are no terms."""
    plain = {n: "" for n, u in units.items() if not hasattr(u.operator, "damped")}
    floors = {n: 0.0 if n in plain else _unknown(u.operator) for n, u in units.items()}
    known = {n: Factored(max(gamma**2, floor)) for n, floor in floors.items()}
    return inverted(units, known, plain)


def _unknown(operator: Any) -> float:
    """Return γ² below which damped factors may be what rounding makes of them.

    A sum of squares is known to ε times its trace. πγ ≥ ε tr A and γ/π ≥ ε tr G are one
    bound, for π is the root of the ratio of their mean eigenvalues.
    """
    names = getattr(operator, "weight_shapes", None)
    parts = [operator] if names is None else [operator.diagonal_block(n) for n in names]
    eps = torch.finfo(operator.dtype).eps
    found = ((eps * max(p.weight_shape)) ** 2 * p.trace() / p.shape[0] for p in parts)
    return max((floor for floor in found if math.isfinite(floor)), default=0.0)


def _combined(
    direction: Mapping[str, Tensor], last: Mapping[str, Tensor] | None, scales: Rescaled
) -> dict[str, Tensor]:
    """Return αΔ + μδ₀."""
    if last is None:
        return {name: scales.alpha * d for name, d in direction.items()}
    return {
        name: scales.alpha * d + scales.mu * last[name] for name, d in direction.items()
    }
