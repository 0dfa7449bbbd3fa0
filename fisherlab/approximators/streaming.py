"""Approximate every block without holding its statistics."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fisherlab.approximators.base import Approximator, Streaming
from fisherlab.approximators.register import by_name
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.memory import Budget
from fisherlab.operators import Operator
from fisherlab.statistics import Fisher, stream
from fisherlab.statistics.collect import Progress


def approximate(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    approximators: Sequence[str] | Mapping[str, Approximator],
    fisher: Fisher | None = None,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    budget: Budget = None,
    progress: Progress = False,
) -> dict[str, dict[str, Operator]]:
    """Stream chunks of examples and columns through approximators.

    Methods that are sums over examples hold their sums alone; those that need every
    sample at the end (exact, mini-block, KPSVD) hold the samples. Methods with several
    passes read the data again, so it must be re-iterable.

    Parameters
    ----------
    model, data, likelihood, fisher, layers, dtype, chunk_size, budget, progress
        As in `collect`.
    approximators
        Names, or a mapping of names to values.

    Returns
    -------
    dict
        ``{approximator: {block: operator}}``.

    Raises
    ------
    ValueError
        For unknown names or methods that cannot stream; else as `collect`.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.ones(5, 4), None)
    >>> found = fl.approximate(nn.Linear(4, 2), data, fl.Gaussian(), ["kfac"])
    >>> found["kfac"]["weight"].weight_shape
    (2, 5)
    """
    chosen = by_name(approximators)
    deaf = [name for name, method in chosen.items() if not isinstance(method, Streaming)]
    if deaf:
        msg = f"approximate: {', '.join(deaf)} cannot be streamed; use collect."
        raise ValueError(msg)
    pending: dict[str, Any] = dict(chosen)
    states: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    while pending:
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
        ):
            _feed(pending, states, pieces)
        pending = {
            name: method
            for name, method in pending.items()
            if _begin_again(method, states[name])
        }
    methods: dict[str, Any] = dict(chosen)
    return {
        name: {block: methods[name].finish(state) for block, state in blocks.items()}
        for name, blocks in states.items()
    }


def _feed(
    pending: Mapping[str, Streaming], states: dict[str, dict[str, Any]], pieces: Any
) -> None:
    for name, method in pending.items():
        for block, piece in pieces.items():
            known = states[name].get(block)
            states[name][block] = method.accumulate(known, piece)


def _begin_again(method: Streaming, states: dict[str, Any]) -> bool:
    """Move states to their next pass where there is one."""
    following = {block: method.next_pass(state) for block, state in states.items()}
    again = {block: state for block, state in following.items() if state is not None}
    states.update(again)
    return bool(again)
