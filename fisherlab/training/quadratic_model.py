"""The quadratic model of the loss with the exact Fisher, through Jacobian products."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.ranks import Ranks
from fisherlab.statistics.batches import Batch
from fisherlab.statistics.model_view import ModelView

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
