"""Which way every method would go, beside the exact blocks, along one trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from fisherlab.analysis.cells import tried
from fisherlab.approximators import Approximator, ExactBlock, average
from fisherlab.approximators.base import called, facts
from fisherlab.approximators.network import NetworkApproximator, network_by_name
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.operators import InverseFactors, KroneckerLowRank, Operator
from fisherlab.operators.dampings import Damping, parsed
from fisherlab.operators.network import BlockDiagonal, NetworkOperator
from fisherlab.settings import numeric
from fisherlab.statistics import (
    Empirical,
    Fisher,
    LayerStatistics,
    MeanGradient,
    Statistics,
    mean_gradient,
)
from fisherlab.training.probes.errors import Approximators, Moment
from fisherlab.training.schedules import BiasCorrected

Told = tuple[Tensor | None, str]  # a direction, or why there is none
_GRADIENT: Final = "gradient"
_EXACT: Final = "exact"


@numeric
@final
@dataclass(frozen=True)
class Directions:
    r"""Cosines of every method's direction with that of the exact blocks.

    .. math:: \hat F_k = ρ_k \hat F_{k-1} + (1 - ρ_k) \hat F(\text{batch}_k), \quad
              m_k = μ\,m_{k-1} + \bar g_k, \quad
              d_k = (\hat F_k + λ I)^{-1} m_k

    Every method keeps averages of its own at the same iterate and batches; the exact
    blocks (BDF) are one of them. The first row, "gradient", is m itself (SGD with
    momentum). Gives `averaged_direction_cosine(layer, approximator)` and
    `direction_status(layer, approximator)`.

    Parameters
    ----------
    approximators
        Names, or a mapping of names to values.
    damping
        λ for all, or a mapping of names to dampings; "exact" stands for the rest.
        `RelativeDamping(α)` is relative to the averaged exact block. The cosines depend
        strongly on it.
    fisher
        Which Fisher; the published one is `Empirical()`.
    average, momentum
        ρ, debiased so that the first batch counts alone, and μ.
    layers
        Block names or prefixes; all by default.
    network
        Methods that couple layers, such as ``["kfac-tridiagonal", "two-level-kfac"]`` or
        a mapping of names to values. Their solve is one for all layers looked at; what it
        gives for a layer is compared with the exact block's direction there.

    Notes
    -----
    It sees every step: a pass for the statistics, one for the gradient, and what each
    method costs. The averaged exact blocks hold p² numbers each.

    References
    ----------
    Bahamou, Goldfarb & Ren 2022, arXiv 2202.04124, Algorithm 5 and Figure 6.

    Examples
    --------
    >>> import fisherlab as fl
    >>> probe = fl.probes.Directions(["kfac"], damping=0.1, layers=["fc4"])
    >>> ds = fl.follow(fl.problems.load("digits"), steps=2, every=2, probes=[probe])
    >>> [str(name) for name in ds.approximator.values]
    ['gradient', 'kfac']
    """

    approximators: Approximators = ("kfac", "mini-block")
    damping: Damping | Mapping[str, Damping] = 1e-2
    fisher: Fisher = field(default_factory=Empirical)
    average: float = 0.9
    momentum: float = 0.9
    layers: Sequence[str] | None = None
    network: Chosen = ()

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (0 <= self.average < 1 and 0 <= self.momentum < 1):
            raise ValueError(f"{self!r}: average and momentum must lie in [0, 1).")
        if isinstance(self.damping, Mapping) and _EXACT not in self.damping:
            raise ValueError(f"{self!r}: the dampings lack that of 'exact'.")

    def observe(self, memory: Any | None, moment: Moment) -> dict[str, Any]:
        """Average in the statistics and the gradient of the batch."""
        before = memory or {"count": 0, "momentum": {}, "operators": {}}
        model, likelihood = moment.model, moment.problem.likelihood
        stats = moment.statistics(
            self.fisher, "batch", None, self.layers, compress=not self.network
        )
        gradients = mean_gradient(model, moment.batch, likelihood, layers=self.layers)
        moved = {
            name: g.gradient + self.momentum * before["momentum"].get(name, 0.0)
            for name, g in gradients.items()
        }
        share = BiasCorrected(self.average).share(before["count"])
        methods = {_EXACT: ExactBlock(), **by_name(self.approximators)}
        operators = updated(before["operators"], methods, stats, gradients, share)
        networks = network_by_name(self.network) if self.network else {}
        coupled = before.get("networks", {})
        return {
            "count": before["count"] + 1,
            "momentum": moved,
            "operators": operators,
            "networks": updated_networks(coupled, networks, stats, share),
        }

    def measure(self, memory: Any, moment: Moment) -> xr.Dataset:
        """Solve with every method and compare the directions."""
        momentum: dict[str, Tensor] = memory["momentum"]
        operators: dict[str, dict[str, Operator]] = memory["operators"]
        exact = operators[_EXACT]
        found: dict[str, dict[str, Told]] = {}
        found[_GRADIENT] = {layer: (m, "ok") for layer, m in momentum.items()}
        for name, blocks in operators.items():
            if name != _EXACT:
                found[name] = {
                    layer: tried(self._solved, name, blocks[layer], exact[layer], m)
                    for layer, m in momentum.items()
                }
        for name, whole in memory["networks"].items():
            parts, told = tried(self._solved, name, whole, BlockDiagonal(exact), momentum)
            found[name] = {
                layer: (None if parts is None else parts[layer], told) for layer in momentum
            }
        names = list(found)
        cosines = np.full((len(momentum), len(names)), np.nan)
        status = np.full(cosines.shape, "ok", dtype=object)
        for row, layer in enumerate(momentum):
            damping = self._damping(_EXACT, exact[layer])
            best = exact[layer].solve(momentum[layer], damping)
            for column, name in enumerate(names):
                direction, status[row, column] = found[name][layer]
                if direction is not None:
                    cosines[row, column] = _cosine(direction, best)
        dims = ("layer", "approximator")
        made = {"long_name": "cosine with the exact blocks' direction", "units": "1"}
        return xr.Dataset(
            {
                "averaged_direction_cosine": (dims, cosines, made),
                "direction_status": (dims, status),
            },
            {"layer": list(momentum), "approximator": names},
        )

    def _solved(self, name: str, matrix: Operator, exact: Operator, m: Any) -> Any:
        return matrix.solve(m, self._damping(name, exact))

    def _damping(self, name: str, exact: Operator) -> Any:
        chosen: Any = self.damping
        if isinstance(chosen, Mapping):
            chosen = chosen.get(name, chosen[_EXACT])
        own = parsed(chosen, exact)
        return own.value if name == _EXACT else own


def _cosine(first: Tensor, second: Tensor) -> float:
    a, b = first.flatten().double(), second.flatten().double()
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


# Their methods average inside, from the operator of the step before.
_RECURSIVE = (InverseFactors, KroneckerLowRank)


def updated(
    operators: Mapping[str, Mapping[str, Operator]],
    approximators: Mapping[str, Approximator],
    stats: Statistics,
    gradients: Mapping[str, MeanGradient],
    weight: float,
) -> dict[str, dict[str, Operator]]:
    """Return the averaged operators of every method and block after one more batch.

    Parameters
    ----------
    operators
        ``{approximator: {block: operator}}`` so far; empty to begin.
    approximators
        By name. Those whose `takes` is "mean_gradient" are given the gradients.
    stats, gradients
        Of the batch.
    weight
        The share of the old operators.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model, data = torch.nn.Linear(3, 2), (torch.ones(4, 3), torch.ones(4, 2))
    >>> stats = fl.collect(model, data, fl.Gaussian())
    >>> found = updated({}, {"kfac": fl.KFAC()}, stats, {}, 0.0)
    >>> found["kfac"]["weight"].trace()
    8.0
    """
    found: dict[str, dict[str, Operator]] = {}
    for name, method in approximators.items():
        of_mean = facts(method).takes == "mean_gradient"
        given: Mapping[str, Any] = gradients if of_mean else stats
        old = operators.get(name, {})
        found[name] = {
            block: _one(method, given[block], old.get(block), weight) for block in stats
        }
    return found


def updated_networks(
    operators: Mapping[str, NetworkOperator],
    approximators: Mapping[str, NetworkApproximator],
    stats: Statistics,
    weight: float,
) -> dict[str, NetworkOperator]:
    """Return the averaged operators of methods that couple layers after one more batch."""
    found: dict[str, Any] = {}
    for name, method in approximators.items():
        new, old = method(stats), operators.get(name)
        found[name] = new if old is None else average(old, new, weight)
    return found


def _one(
    method: Any,
    statistics: LayerStatistics | MeanGradient,
    old: Operator | None,
    weight: float,
) -> Operator:
    new: Operator = called(method, statistics, old)
    if old is None or isinstance(new, _RECURSIVE):
        return new
    return average(old, new, weight)
