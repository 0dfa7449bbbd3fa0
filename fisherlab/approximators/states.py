"""What a stream has seen: sums that grow, and states by group."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor

from fisherlab.operators import Operator, Provenance, Stacked
from fisherlab.statistics import LayerStatistics


@final
@dataclass(frozen=True, eq=False)
class Sums:
    """Tensors summed over examples and columns, with the examples they count.

    Parameters
    ----------
    tensors
        The sums, in the method's own order.
    count, positions
        Examples, and Σ_n T_n.
    weight_shape, provenance
        Of the block.
    turned
        Whether the rows of the weight belong to the inputs: an embedding, ``x @ W``.
    precision
        That of the statistics, where the sums are wider.
    """

    tensors: tuple[Tensor, ...]
    count: int
    positions: int
    weight_shape: tuple[int, int]
    provenance: Provenance
    turned: bool = False
    precision: torch.dtype | None = None

    @classmethod
    def of(cls, statistics: LayerStatistics, *tensors: Tensor) -> "Sums":
        """Begin with the sums of one chunk."""
        s = statistics
        return cls(
            tensors,
            s.count,
            s.positions,
            s.weight_shape,
            s.provenance,
            s.tokens is not None or s.turned,
        )

    def counting(self, count: int, positions: int) -> "Sums":
        """Count further examples, whose numbers the tensors have taken up in place."""
        count += self.count
        return replace(
            self,
            count=count,
            positions=self.positions + positions,
            provenance=replace(self.provenance, examples=count),
        )

    def __add__(self, other: "Sums") -> "Sums":
        """Add up two parts of the data."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        added = replace(self, tensors=tuple(a + b for a, b in pairs))
        return added.counting(other.count, other.positions)


def add(state: Sums | None, more: Sums) -> Sums:
    """Add a chunk to a state that may not have begun."""
    return more if state is None else state + more


@runtime_checkable
class Within(Protocol):
    """A state whose sums are taken in something that stands, the same for all parts.

    Where several processes have it already, sums alone are sent.
    """

    @property
    def sums(self) -> Sums | None:
        """What has been added up, None where the pass has only begun."""

    def summing(self, sums: Sums | None) -> Any:
        """Return the state with other sums."""


@runtime_checkable
class Several(Protocol):
    """A state of several, each of which is added up by itself."""

    @property
    def open(self) -> Mapping[int, Any]:
        """The states that this pass adds to, by number."""

    def put(self, states: Mapping[int, Any]) -> Any:
        """Return the state with others in these places."""


Method = TypeVar("Method")


@final
@dataclass(frozen=True, eq=False)
class GroupStates:
    """The states of all groups.

    Parameters
    ----------
    states
        One for each group.
    done
        Which of them are ready for `finish` and see no further pass.
    """

    states: tuple[Any, ...]
    done: tuple[bool, ...]
    provenance: Provenance

    @property
    def open(self) -> Mapping[int, Any]:
        """The states that are not ready."""
        return {k: s for k, s in enumerate(self.states) if not self.done[k]}

    def put(self, states: Mapping[int, Any]) -> "GroupStates":
        """Return the same with other states in some places."""
        new = (states.get(k, state) for k, state in enumerate(self.states))
        return replace(self, states=tuple(new))


def by_group(cls: type[Method]) -> type[Method]:
    """Let an approximator take grouped layers: one state and one operator for each group.

    A class decorator. The class itself is written for one group; for statistics with
    several, calls and the four steps of a stream run over the groups, and the result is
    a `Stacked` operator: block-diagonal over the groups, as KFAC of each of them is.
    """
    for name, over in (
        ("__call__", _call),
        ("accumulate", _accumulate),
        ("merge", _merge),
        ("next_pass", _next_pass),
        ("finish", _finish),
    ):
        single = getattr(cls, name)
        setattr(cls, name, wraps(single)(over(single)))
    return cls


def _call(single: Callable[..., Operator]) -> Callable[..., Operator]:
    def call(
        self: Any, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        groups = statistics.by_group()
        if len(groups) == 1:
            return single(self, statistics, previous)
        warm: tuple[Operator | None, ...] = (None,) * len(groups)
        if isinstance(previous, Stacked) and len(previous.parts) == len(groups):
            warm = previous.parts
        parts = [single(self, g, old) for g, old in zip(groups, warm, strict=True)]
        return Stacked(tuple(parts), statistics.provenance.by(repr(self)))

    return call


def _accumulate(single: Callable[..., Any]) -> Callable[..., Any]:
    def accumulate(self: Any, state: Any, statistics: LayerStatistics) -> Any:
        groups = statistics.by_group()
        if len(groups) == 1:
            return single(self, state, statistics)
        none = (None,) * len(groups), (False,) * len(groups)
        states, done = (state.states, state.done) if state else none
        new = [
            old if ready else single(self, old, g)
            for old, ready, g in zip(states, done, groups, strict=True)
        ]
        return GroupStates(tuple(new), done, statistics.provenance)

    return accumulate


def _merge(single: Callable[..., Any]) -> Callable[..., Any]:
    def merge(self: Any, first: Any, second: Any) -> Any:
        if not isinstance(first, GroupStates):
            return single(self, first, second)
        other = second.open
        return first.put({k: single(self, s, other[k]) for k, s in first.open.items()})

    return merge


def _next_pass(single: Callable[..., Any]) -> Callable[..., Any]:
    def next_pass(self: Any, state: Any) -> Any:
        if not isinstance(state, GroupStates):
            return single(self, state)
        pairs = zip(state.states, state.done, strict=True)
        found = [None if ready else single(self, one) for one, ready in pairs]
        done = tuple(one is None for one in found)
        if all(done):
            return None
        both = zip(state.states, found, strict=True)
        new = tuple(old if one is None else one for old, one in both)
        return replace(state, states=new, done=done)

    return next_pass


def _finish(single: Callable[..., Operator]) -> Callable[..., Operator]:
    def finish(self: Any, state: Any) -> Operator:
        if not isinstance(state, GroupStates):
            return single(self, state)
        parts = tuple(single(self, one) for one in state.states)
        examples = parts[0].provenance.examples
        made = replace(state.provenance, examples=examples)
        return Stacked(parts, made.by(repr(self)))

    return finish
