"""The states of a stream over several processes: sums are added, kept samples gathered.

Methods know nothing of it: `Sums` are all-reduced, also those `Within` something that all
ranks have; any other state is gathered and put together by the method's own ``merge``, in
the order of the ranks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor, nn

from fisherlab.approximators.base import OfSums, OrPassed, Several, Streaming, Sums, Within
from fisherlab.codes import checksum
from fisherlab.errors import RankError
from fisherlab.numerics.devices import Budget, parse_budget, require
from fisherlab.numerics.ranks import Ranks, held_tensors
from fisherlab.operators import Operator
from fisherlab.statistics import (
    Empirical,
    Exact,
    Fisher,
    LayerStatistics,
    MeanGradient,
)
from fisherlab.statistics.batches import batches, is_empty
from fisherlab.statistics.model_view import require_whole_parameters
from fisherlab.statistics.network import Chunks, join_examples

Key = tuple[Any, ...]  # method and block, and the number of a state among several
States = Mapping[Key, Any]


def place(
    ranks: Ranks, model: nn.Module, data: Any, fisher: Fisher | None, first: int
) -> int:
    """Return the index of this rank's first example, where sampled labels depend on it.

    Parameters
    ----------
    first
        Index of the first example of all ranks.

    Raises
    ------
    ValueError
        If examples would have to be counted that can be read only once.
    RankError
        If the ranks have other weights.
    """
    require_same_weights(ranks, model)
    if fisher is None or isinstance(fisher, (Exact, Empirical)):
        return first
    return first + ranks.before(ranks.together(lambda: _count(data, model)))


def everyones(ranks: Ranks, data: Any) -> list[Any]:
    """Return the data of all ranks, a batch after the other, on the CPU.

    Raises
    ------
    ValueError
        If no rank has an example.
    """

    def own() -> list[Any]:
        single = isinstance(data, (tuple, Mapping))
        return [] if is_empty(data) else [data] if single else list(data)

    found = [item for part in ranks.gathered(ranks.together(own)) for item in part]
    if not found:
        raise _nothing(ranks)
    return found


def _nothing(ranks: Ranks) -> ValueError:
    return ValueError(f"data: none of the {ranks.size} ranks was given an example.")


def require_same_weights(ranks: Ranks, model: nn.Module) -> None:
    """Refuse ranks whose models have other parameters.

    Raises
    ------
    RankError
        If they have.
    UnsupportedModelError
        If the parameters are sharded.
    """
    require_whole_parameters(model)
    remedy = "Load or broadcast the same parameters on every rank first."
    ranks.require_same("The weights", checksum(*model.parameters()), remedy)


def _count(data: Any, model: nn.Module) -> int:
    if is_empty(data):
        return 0
    if isinstance(data, Iterator):
        raise ValueError(
            f"data: {type(data).__name__} can be read only once, but sampled labels over "
            "several processes need the examples counted first. Give a list or a "
            "DataLoader."
        )
    return sum(map(len, batches(data, torch.device("cpu"), None, model=model)))


@final
@dataclass(frozen=True, eq=False)
class _Outline:
    """What the other ranks know of a state before it is sent.

    Parameters
    ----------
    sums
        The state without its tensors, where it is `Sums`.
    shapes
        Of its tensors, with their precisions.
    nbytes
        Bytes of samples that it holds.
    within
        A checksum of what the sums are within.
    """

    sums: Sums | None
    shapes: tuple[tuple[torch.Size, torch.dtype], ...] = ()
    nbytes: int = 0
    within: str = ""

    @classmethod
    def of(cls, state: Any) -> "_Outline":
        """Outline a state."""
        sums = _sums(state)
        if sums is None:
            return cls(None, nbytes=state.nbytes if isinstance(state, Chunks) else 0)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in sums.tensors)
        standing = held_tensors(state.summing(None)) if isinstance(state, Within) else []
        return cls(replace(sums, tensors=()), shapes, within=checksum(*standing))

    def zeros(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the tensors of a rank that has seen no example."""
        return tuple(torch.zeros(s, dtype=d, device=device) for s, d in self.shapes)


def _sums(state: Any) -> Sums | None:
    """Return the sums that a state is, or has; None of any other."""
    found = state.sums if isinstance(state, Within) else state
    return found if isinstance(found, Sums) else None


def merged(
    methods: Mapping[str, Streaming],
    states: States,
    ranks: Ranks,
    device: torch.device,
    budget: Budget = None,
    begun: States = MappingProxyType({}),
) -> dict[Key, Any]:
    """Return the states of all data, the same bits on every rank.

    Parameters
    ----------
    methods
        By name.
    states
        Of this rank's part of the data; nothing where it has no example.
    device
        Where this rank computes.
    budget
        Bytes that gathered samples may take.
    begun
        What a further pass went on from, which all ranks have.

    Raises
    ------
    ValueError
        If no rank has an example.
    RankError
        If the ranks have other methods or blocks, or other bases from equal sums.
    BudgetError
        If the samples of all ranks exceed the budget.
    """
    states, told = _outlined(methods, states, ranks)
    own = _opened(states)
    seeing = [outlines for outlines in told if outlines]
    if not seeing:
        raise _nothing(ranks)
    keys = list(seeing[0])
    if any(list(outlines) != keys for outlines in seeing):
        raise RankError(
            "approximate: the ranks stream other methods or blocks. Give all of them the "
            "same model, layers and approximators."
        )
    held = sum(outline.nbytes for outlines in seeing for outline in outlines.values())
    limit = parse_budget(budget, device)
    remedy = "Methods that are sums hold none, nor does KPSVD(solver=Passes())."
    require(held, limit, "Samples gathered from all ranks", remedy)
    by_key = {key: [outlines[key] for outlines in seeing] for key in keys}
    everywhere, known = len(seeing) == len(told), _opened(begun)
    added = {
        key: outlines
        for key, outlines in by_key.items()
        if _alike(outlines) and (everywhere or not outlines[0].within or key in known)
    }
    totals = _added(added, own, ranks, device)
    found = {key: _within(own.get(key, known.get(key)), totals[key]) for key in added}
    rest = [key for key in keys if key not in added]
    if rest:
        few = {key: own[key] for key in rest if key in own}
        parts = [part for part in ranks.gathered(few, device) if part]
        for key in rest:
            found[key] = reduce(methods[key[0]].merge, [part[key] for part in parts])
    forms = {key[:2]: {**begun, **states}.get(key[:2]) for key in keys}
    if not everywhere and not begun:
        every = ranks.gathered({key: _emptied(state) for key, state in states.items()})
        forms = next(form for form in every if form)
    return {key: _closed(key, form, found) for key, form in forms.items()}


def _outlined(
    methods: Mapping[str, Streaming], states: States, ranks: Ranks
) -> tuple[States, list[dict[Key, _Outline]]]:
    """Outline the states of all ranks, of which large samples become a first pass.

    Samples that would be held by one process are passed by several, where those of all
    ranks are too many or some of the ranks have gone over.
    """
    own = _opened(states)
    told = ranks.gathered({key: _Outline.of(state) for key, state in own.items()})
    each: dict[Key, list[_Outline]] = {}
    for outlines in told:
        for key, outline in outlines.items():
            each.setdefault(key, []).append(outline)
    apart = {key[:n] for key in each for n in range(2, len(key))}  # elsewhere, if here
    over = {k for k, o in each.items() if k in apart or _passes(methods.get(k[0]), o)}
    if not over:
        return states, told
    states = _over(methods, states, over)
    own = _opened(states)
    return states, ranks.gathered({key: _Outline.of(state) for key, state in own.items()})


def _over(methods: Mapping[str, Streaming], states: States, keys: set[Key]) -> States:
    """Return states of which some hold samples no longer."""
    own = _opened(states)
    own |= {k: _passed(methods[k[0]], state) for k, state in own.items() if k in keys}
    return {key: _closed(key, state, own) for key, state in states.items()}


def _passes(method: Any, outlines: list[_Outline]) -> bool:
    """Tell whether samples that some ranks hold become passes: too many, or beside some."""
    held = sum(outline.nbytes for outline in outlines)
    if not held or not isinstance(method, OrPassed):
        return False
    return any(one.sums is not None for one in outlines) or not method.holds(held)


def _passed(method: Any, state: Any) -> Any:
    """Return the pass that a state of samples becomes, or the state that is one."""
    return method.passing(state) if isinstance(state, Chunks) else state


def _opened(states: States) -> dict[Key, Any]:
    """Return states with those that are several taken apart."""
    found: dict[Key, Any] = {}
    for key, state in states.items():
        if isinstance(state, Several):
            found |= _opened({(*key, k): part for k, part in state.open.items()})
        else:
            found[key] = state
    return found


def _closed(key: Key, form: Any, found: States) -> Any:
    """Return the state of a key, put together as `form` is."""
    if not isinstance(form, Several):
        return found[key]
    return form.put({k: _closed((*key, k), part, found) for k, part in form.open.items()})


def _emptied(state: Any) -> Any:
    """Return how a state is put together."""
    if not isinstance(state, Several):
        return None
    return state.put({k: _emptied(part) for k, part in state.open.items()})


@final
@dataclass(frozen=True)
class Sent:
    """Bytes of tensors that a rank hands over, as `counted` counts them.

    Examples
    --------
    >>> Sent(8, 2) + Sent(8, 0)
    Sent(added=16, gathered=2)
    """

    added: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.added + self.gathered

    def __add__(self, other: "Sent") -> "Sent":
        """Add up both."""
        return Sent(self.added + other.added, self.gathered + other.gathered)


def foreseen(
    methods: Mapping[str, Streaming], states: States, ranks: int
) -> tuple[Sent, dict[Key, Any]]:
    """Return what `merged` would send of states, and what it would give for equal parts.

    Tensors of the states may be without storage.
    """
    held = {key: s.nbytes for key, s in _opened(states).items() if isinstance(s, Chunks)}
    alike = {key: [_Outline(None, nbytes=n)] * ranks for key, n in held.items()}
    large = {key for key, told in alike.items() if _passes(methods[key[0]], told)}
    states = _over(methods, states, large)
    own = _opened(states)
    sums = {key: seen for key, state in own.items() if (seen := _sums(state))}
    rest = {key: state for key, state in own.items() if key not in sums}
    added = sum(tensor.nbytes for one in sums.values() for tensor in one.tensors)
    gathered = sum(tensor.nbytes for tensor in held_tensors(rest))
    whole_ = {k: reduce(methods[k[0]].merge, [s] * ranks) for k, s in rest.items()}
    found = {**own, **whole_}
    return Sent(added, gathered), {k: _closed(k, s, found) for k, s in states.items()}


def _alike(outlines: list[_Outline]) -> bool:
    """Tell whether all are sums of one shape, within the same.

    Raises
    ------
    RankError
        If what they are within differs.
    """
    first = outlines[0]
    if first.sums is None or any(one.shapes != first.shapes for one in outlines):
        return False
    if any(one.within != first.within for one in outlines):
        raise RankError(
            "approximate: the ranks found other bases from equal sums, so what they add "
            "up does not belong together. Start them on processors of one kind, with the "
            "same libraries."
        )
    return True


def _within(state: Any, total: Sums) -> Any:
    """Return a total where this rank's own sums were."""
    return state.summing(total) if isinstance(state, Within) else total


def _added(
    outlines: Mapping[Key, list[_Outline]],
    states: States,
    ranks: Ranks,
    device: torch.device,
) -> dict[Key, Any]:
    """Add up what is `Sums` on all ranks in one reduction; zeros where there are none."""
    own = {
        key: seen.tensors if (seen := _sums(states.get(key))) else told[0].zeros(device)
        for key, told in outlines.items()
    }
    flat = [tensor for tensors in own.values() for tensor in tensors]
    totals = iter(ranks.added(flat) if flat else [])
    found = {}
    for key, told in outlines.items():
        parts = [outline.sums for outline in told if outline.sums is not None]
        empty = reduce(Sums.__add__, parts)
        found[key] = replace(empty, tensors=tuple(next(totals) for _ in own[key]))
    return found


def whole(ranks: Ranks, statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Return statistics of the examples of all ranks from those of each one's own.

    Mean gradients are averaged by examples; per-example statistics are gathered.
    """
    layers = list(statistics.values())
    if layers and isinstance(layers[0], MeanGradient):
        counts = ranks.gathered(layers[0].count)
        share = counts[ranks.rank] / sum(counts)
        means = ranks.added([layer.gradient * share for layer in layers])
        return {
            name: replace(
                layer,
                gradient=mean,
                count=sum(counts),
                provenance=replace(layer.provenance, examples=sum(counts)),
            )
            for (name, layer), mean in zip(statistics.items(), means, strict=True)
        }
    device = layers[0].device if layers else None
    parts = ranks.gathered(dict(statistics), device)
    return {n: join_examples([part[n] for part in parts]) for n in statistics}


def begun(
    method: OfSums[Any, Any], statistics: LayerStatistics, previous: Operator | None
) -> Any:
    """Return the state of a method's first pass over this rank's examples."""
    return method.accumulate(method.begun(statistics, previous), statistics)


def called_by_all(
    ranks: Ranks,
    method: OfSums[Any, Any],
    states: Mapping[str, Any],
    statistics: Mapping[str, LayerStatistics],
) -> dict[str, Operator]:
    """Return the operators of blocks whose first pass has `begun` on every rank."""
    device = next((layer.device for layer in statistics.values()), torch.device("cpu"))
    passing, found = dict(states), {}
    while passing:
        keyed = {("", name): state for name, state in passing.items()}
        seen = merged({"": method}, keyed, ranks, device)
        passing = {}
        for (_, name), state in seen.items():
            following = method.next_pass(state)
            if following is None:
                found[name] = method.finish(state)
            else:
                passing[name] = method.accumulate(following, statistics[name])
    return {name: found[name] for name in states}
