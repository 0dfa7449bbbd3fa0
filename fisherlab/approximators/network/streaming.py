"""Approximate a whole network without holding its statistics."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fisherlab.approximators.network.base import NetworkApproximator, NetworkStreaming
from fisherlab.approximators.network.register import network_by_name
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.memory import Budget
from fisherlab.operators.network import NetworkOperator
from fisherlab.statistics import Fisher, stream
from fisherlab.statistics.batches import Progress


def approximate_network(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    approximators: Sequence[str] | Mapping[str, NetworkApproximator],
    fisher: Fisher | None = None,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    budget: Budget = None,
    progress: Progress = False,
    first: int = 0,
) -> dict[str, NetworkOperator]:
    """Stream chunks of examples and columns through network approximators, in one pass.

    Parameters
    ----------
    model, data, likelihood, fisher, layers, dtype, chunk_size, budget, progress, first
        As in `collect`.
    approximators
        Names, or a mapping of names to values, that are sums over examples: KhatriRao and
        KFACTridiagonal.

    Returns
    -------
    dict
        ``{approximator: operator}``.

    Raises
    ------
    ValueError
        For unknown names or methods that cannot stream; else as `collect`.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    >>> data = (torch.ones(5, 3), None)
    >>> found = approximate_network(model, data, fl.Gaussian(), ["khatri-rao"])
    >>> found["khatri-rao"].shape
    (20, 20)
    """
    chosen = network_by_name(approximators)
    deaf = [name for name, one in chosen.items() if not isinstance(one, NetworkStreaming)]
    if deaf:
        msg = f"approximate_network: {', '.join(deaf)} cannot be streamed; use collect."
        raise ValueError(msg)
    methods: dict[str, Any] = dict(chosen)
    states: dict[str, Any] = dict.fromkeys(methods)
    for pieces in stream(
        model,
        data,
        likelihood,
        fisher,
        layers=layers,
        dtype=dtype,
        chunk_size=chunk_size,
        budget=budget,
        progress=progress,
        first=first,
    ):
        for name, method in methods.items():
            states[name] = method.accumulate(states[name], pieces)
    return {name: method.finish(states[name]) for name, method in methods.items()}
