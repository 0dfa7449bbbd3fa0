"""Approximate every block, or a whole network, without holding its statistics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, final

import torch
from torch import Tensor, nn

from fisherlab.approximators.base import (
    OfSamples,
    OfSums,
    Streaming,
    adds,
    called,
    facts,
    learns,
    result_numbers,
)
from fisherlab.approximators.ranks import Key, Sent, foreseen, merged, place
from fisherlab.approximators.register import Chosen, by_name, network_by_name
from fisherlab.errors import NeedsSharedForm
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.devices import Budget, parse_budget, require
from fisherlab.numerics.ranks import held_tensors, live
from fisherlab.operators import Operator
from fisherlab.operators.network import NetworkOperator
from fisherlab.settings import numeric
from fisherlab.statistics import Fisher, LayerStatistics, MonteCarlo, stream
from fisherlab.statistics.batches import Progress, Repeated, is_empty
from fisherlab.statistics.network import Chunks

NETWORK = "network"  # the one unit of a method that couples layers


@final
@dataclass(frozen=True)
class Kept(OfSamples[Any]):
    """A method of blocks without steps of its own: called with all samples of a stream."""

    method: Callable[..., Any]

    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Any:
        """Call the method."""
        return called(self.method, statistics, previous)


@final
@dataclass(frozen=True)
class KeptNetwork:
    """A method of the network without steps of its own: called with all samples."""

    method: Callable[..., Any]

    def accumulate(self, state: Any, statistics: Mapping[str, LayerStatistics]) -> Any:
        """Keep the chunk of every block."""
        held = state or dict.fromkeys(statistics, Chunks())
        return {name: held[name].add(piece) for name, piece in statistics.items()}

    def merge(self, first: Any, second: Any) -> Any:
        """Keep both parts."""
        return {name: held + second[name] for name, held in first.items()}

    def next_pass(self, state: Any) -> None:
        """Return None: one pass is enough."""

    def finish(self, state: Any) -> Any:
        """Call the method."""
        return self.method({name: held.joined() for name, held in state.items()})


def streaming(method: Any) -> Streaming:
    """Return a method that streams: itself, or one that keeps all samples for its call.

    Examples
    --------
    >>> streaming(repr)
    Kept(method=<built-in function repr>)
    """
    if isinstance(method, Streaming):
        return method
    return KeptNetwork(method) if facts(method).couples else Kept(method)


@numeric
def approximate(
    model: nn.Module,
    data: Any,
    likelihood: Likelihood,
    approximators: Chosen,
    fisher: Fisher | None = None,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    budget: Budget = None,
    progress: Progress = False,
    first: int = 0,
    group: Any = None,
) -> dict[str, Any]:
    """Stream chunks of examples and columns through approximators.

    Where a process group of ``torch.distributed`` is live, `data` are this rank's part of
    the whole, which is the parts in the order of the ranks; parts may be uneven or empty.
    Every rank returns the same operators, those of one process with the whole.

    Methods that are sums over examples hold their sums alone; those that need every
    sample at the end (exact, mini-block, functions of one's own) hold the samples.
    KPSVD, Deflation and KFACCorrected hold them up to 256 MiB a block and then go over to
    passes. Methods with several passes read the data again, so it must be re-iterable.

    Parameters
    ----------
    model, data, likelihood, fisher, layers, dtype, chunk_size, budget, progress, first
        As in `collect`; `first` is the index of the whole's first example.
    approximators
        Names, values or functions, or a mapping of names to them; of blocks or networks.
    group
        The process group whose ranks have the data; the default one, if one is live.

    Returns
    -------
    dict
        ``{approximator: {block: operator}}``; of a method that couples layers
        ``{approximator: operator}``.

    Raises
    ------
    ValueError
        For unknown names, or data that change from pass to pass; else as `collect`.
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
    chosen, ranks = by_name(approximators, "any"), live(group)
    repeated = data
    if not isinstance(data, (tuple, Tensor)) and isinstance(data, Iterable):
        repeated = Repeated(data, ordered=isinstance(fisher, MonteCarlo))
    if ranks is not None:
        first = place(ranks, model, data, fisher, first)
    passes = _Passes(chosen, {name: streaming(m) for name, m in chosen.items()})

    def read() -> dict[Key, Any]:
        """Take a pass over this process's data, and return the states that saw it."""
        seen: dict[Key, Any] = {}
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
            by_column=streams_by_column(chosen.values()),
        ):
            if not (passes.states or seen):
                _require_room(chosen, pieces, parse_budget(budget))
            passes.feed(seen, pieces)
        return seen

    while passes.unfinished:
        if ranks is None:
            passes.close(read())
        else:
            seen = ranks.together(lambda: {} if is_empty(repeated) else read())
            device, begun = next(model.parameters()).device, passes.states
            passes.close(merged(passes.methods, seen, ranks, device, budget, begun))
    return passes.finished()


def sent(
    methods: Mapping[str, Any], pieces: Mapping[str, LayerStatistics], ranks: int
) -> Sent:
    """Return the bytes that a rank hands over in `approximate`.

    Parameters
    ----------
    methods
        By name.
    pieces
        Statistics of the rank's part of the data; their tensors may have no storage.
    ranks
        How many have such a part.

    Raises
    ------
    RuntimeError
        If a method decides by numbers, which those without storage do not have, how many
        passes it takes.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.ones(4, 3), None
    >>> stats = fl.collect(torch.nn.Linear(3, 2), data, fl.Gaussian())
    >>> sent({"kfac": fl.KFAC()}, stats, 8), 4 * (4**2 + 2**2)
    (Sent(added=80, gathered=0), 80)
    """
    passes = _Passes(methods, {n: streaming(m) for n, m in methods.items()})
    return _sent(passes, pieces, ranks)


def _sent(passes: "_Passes", pieces: Mapping[str, LayerStatistics], ranks: int) -> Sent:
    total = Sent()
    while passes.unfinished:
        seen: dict[Key, Any] = {}
        passes.feed(seen, pieces)
        more, joined = foreseen(passes.methods, seen, ranks)
        total += more
        passes.close(joined)
    return total


def sent_in_step(
    method: Any, pieces: Mapping[str, LayerStatistics], ranks: int, *, later: bool = False
) -> Sent:
    """Return the bytes that a rank hands over for a method's matrices in a training step.

    Sums are added, also mean gradients; else the statistics are gathered, twice where a
    method learns from the step.

    Parameters
    ----------
    method
        One method.
    pieces, ranks
        As in `sent`.
    later
        Whether the step has matrices to go on from.

    Raises
    ------
    RuntimeError
        As `sent`.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.ones(4, 3), None
    >>> stats = fl.collect(torch.nn.Linear(3, 2), data, fl.Gaussian())
    >>> [sent_in_step(method, stats, 8) for method in (fl.KFAC(), fl.KBFGS())]
    [Sent(added=80, gathered=0), Sent(added=0, gathered=256)]
    """
    if facts(method).takes == "mean_gradient":
        return Sent(sum(prod(p.weight_shape) * p.dtype.itemsize for p in pieces.values()))
    if not adds(method):
        return _gathered(pieces) + (_gathered(pieces) if learns(method) else Sent())
    total = Sent()
    for name, piece in pieces.items():
        one = {name: piece}
        try:
            apart = len(piece.by_group()) > 1  # their states are not added in a step
            total += _gathered(one) if apart else _added(method, one, ranks, later)
        except NeedsSharedForm:
            total += _gathered(one)
    return total


def _added(
    method: OfSums[Any, Any], one: Mapping[str, LayerStatistics], ranks: int, later: bool
) -> Sent:
    """Return the bytes of the sums of one block."""
    ((name, piece),) = one.items()
    goes_on = later and type(method).begun is not OfSums.begun
    state = method.begun(piece, method(piece)) if goes_on else None
    states = {} if state is None else {("", name): state}
    return _sent(_Passes({"": method}, {"": method}, states), one, ranks)


def _gathered(pieces: Mapping[str, LayerStatistics]) -> Sent:
    return Sent(0, sum(tensor.nbytes for tensor in held_tensors(dict(pieces))))


@final
@dataclass(frozen=True, eq=False)
class _Passes:
    """Passes of several methods over the same data: their states, and which are ready."""

    chosen: Mapping[str, Any]
    methods: Mapping[str, Streaming]
    states: dict[Key, Any] = field(default_factory=dict)
    done: set[Key] = field(default_factory=set)

    @property
    def unfinished(self) -> bool:
        """Whether a method waits for another pass."""
        return not self.states or len(self.done) < len(self.states)

    def feed(self, seen: dict[Key, Any], pieces: Mapping[str, LayerStatistics]) -> None:
        """Add a chunk to the states of this pass."""
        for name, method in self.methods.items():
            coupled = facts(self.chosen[name]).couples
            units = {NETWORK: pieces} if coupled else pieces
            for unit, piece in units.items():
                key = name, unit
                if key not in self.done:
                    before = seen.get(key, self.states.get(key))
                    seen[key] = method.accumulate(before, piece)

    def close(self, seen: Mapping[Key, Any]) -> None:
        """Go over to the next pass with what this one has seen."""
        for key, state in seen.items():
            following = self.methods[key[0]].next_pass(state)
            self.states[key] = state if following is None else following
            if following is None:
                self.done.add(key)

    def finished(self) -> dict[str, Any]:
        """Return the operators by method and block."""
        found: dict[str, Any] = {name: {} for name in self.methods}
        for (name, unit), state in self.states.items():
            found[name][unit] = self.methods[name].finish(state)
        return {
            name: operators[NETWORK] if facts(self.chosen[name]).couples else operators
            for name, operators in found.items()
        }


def approximate_network(
    model: nn.Module, data: Any, likelihood: Likelihood, approximators: Chosen, **how: Any
) -> dict[str, NetworkOperator]:
    """Stream chunks of examples and columns through approximators of the whole network.

    Parameters
    ----------
    model, data, likelihood, how
        As in `approximate`, which takes such methods beside others.
    approximators
        Names, or a mapping of names to values. KhatriRao and KFACTridiagonal hold their
        sums alone, others the samples.

    Returns
    -------
    dict
        ``{approximator: operator}``.

    Raises
    ------
    ValueError
        For unknown names; else as `collect`.

    Examples
    --------
    >>> import fisherlab as fl
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    >>> data = (torch.ones(5, 3), None)
    >>> found = approximate_network(model, data, fl.Gaussian(), ["khatri-rao"])
    >>> found["khatri-rao"].shape
    (20, 20)
    """
    return approximate(model, data, likelihood, network_by_name(approximators), **how)


def _require_room(
    methods: Mapping[str, Any], pieces: Mapping[str, LayerStatistics], limit: int
) -> None:
    """Refuse, at the first pieces, sums that alone exceed the budget."""
    needed = sum(
        (result_numbers(method, piece.samples) or 0) * piece.samples.dtype.itemsize
        for method in methods.values()
        for piece in pieces.values()
    )
    remedy = "Raise the budget, or use fewer layers or methods."
    require(needed, limit, f"approximate by {', '.join(methods)}", remedy)


def streams_by_column(methods: Iterable[Any]) -> bool:
    """Tell whether all methods take columns one by one at no more arithmetic."""
    return all(facts(method).by_column for method in methods)
