"""Moving averages of every method along a trajectory that is not its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fisherlab.approximators import Approximator, average
from fisherlab.approximators.base import called, facts
from fisherlab.approximators.network import NetworkApproximator
from fisherlab.operators import InverseFactors, KroneckerLowRank, Operator
from fisherlab.operators.network import NetworkOperator
from fisherlab.statistics import LayerStatistics, MeanGradient, Statistics

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
