"""Approximate every block without holding its statistics."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.approximators.base import Approximator, Streaming
from fisherlab.approximators.register import by_name
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.memory import Budget, parse_budget, require
from fisherlab.operators import Operator
from fisherlab.statistics import Fisher, LayerStatistics, MonteCarlo, stream
from fisherlab.statistics.batches import Progress, Repeated


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
    first: int = 0,
) -> dict[str, dict[str, Operator]]:
    """Stream chunks of examples and columns through approximators.

    Methods that are sums over examples hold their sums alone; those that need every
    sample at the end (exact, mini-block) hold the samples. KPSVD, Deflation and
    KFACCorrected hold them up to 256 MiB a block and then go over to passes. Methods
    with several passes read the data again, so it must be re-iterable.

    Parameters
    ----------
    model, data, likelihood, fisher, layers, dtype, chunk_size, budget, progress, first
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
        For unknown names, methods that cannot stream, or data that change from pass to
        pass; else as `collect`.
    BudgetError
        If the numbers of the results alone exceed the budget.

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
    methods: dict[str, Any] = dict(chosen)
    states: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    done: dict[str, set[str]] = {name: set() for name in chosen}
    by_column = streams_by_column(methods.values())
    repeated = data
    if not isinstance(data, (tuple, Tensor)) and isinstance(data, Iterable):
        repeated = Repeated(data, ordered=isinstance(fisher, MonteCarlo))
    while any(_unfinished(states, done)):
        for pieces in stream(
            model,
            repeated,
            likelihood,
            fisher,
            layers=layers,
            dtype=dtype,
            chunk_size=chunk_size,
            budget=budget,
            progress=progress,
            first=first,
            by_column=by_column,
        ):
            if not all(states.values()):
                _require_room(methods, pieces, parse_budget(budget))
            _feed(methods, states, done, pieces)
        for name, method in methods.items():
            _begin_again(method, states[name], done[name])
    return {
        name: {block: methods[name].finish(state) for block, state in blocks.items()}
        for name, blocks in states.items()
    }


def _require_room(
    methods: Mapping[str, Approximator], pieces: Mapping[str, LayerStatistics], limit: int
) -> None:
    """Refuse, at the first pieces, sums that alone exceed the budget."""
    from fisherlab.approximators.costs import result_numbers  # knows every method

    needed = sum(
        (result_numbers(method, piece.samples) or 0) * piece.samples.dtype.itemsize
        for method in methods.values()
        for piece in pieces.values()
    )
    remedy = "Raise the budget, or use fewer layers or methods."
    require(needed, limit, f"approximate by {', '.join(methods)}", remedy)


def streams_by_column(methods: Iterable[Approximator]) -> bool:
    """Tell whether all methods take columns one by one at no more arithmetic."""
    return all(getattr(method, "by_column", False) for method in methods)


def _unfinished(
    states: Mapping[str, Mapping[str, Any]], done: Mapping[str, set[str]]
) -> Iterator[bool]:
    """Yield, method by method, whether a block of it waits for another pass."""
    return (not blocks or blocks.keys() > done[name] for name, blocks in states.items())


def _feed(
    methods: Mapping[str, Streaming],
    states: dict[str, dict[str, Any]],
    done: Mapping[str, set[str]],
    pieces: Mapping[str, LayerStatistics],
) -> None:
    for name, method in methods.items():
        for block, piece in pieces.items():
            if block not in done[name]:
                known = states[name].get(block)
                states[name][block] = method.accumulate(known, piece)


def _begin_again(method: Streaming, states: dict[str, Any], done: set[str]) -> None:
    """Move states to their next pass; note those that need none."""
    for block, state in states.items():
        if block in done:
            continue
        following = method.next_pass(state)
        if following is None:
            done.add(block)
        else:
            states[block] = following
