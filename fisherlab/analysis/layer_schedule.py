"""Which layers of a model a comparison holds at once, counted before it begins."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from fisherlab.analysis.cost import Collection, Plan
from fisherlab.analysis.counts import room, space
from fisherlab.approximators.costs import result_numbers
from fisherlab.numerics.memory import readable
from fisherlab.samples import OuterSamples
from fisherlab.samples.base import CHUNK_BYTES

NUMBER = 8  # bytes
FORMED = 2**28  # matrices of samples that a solver may form, see `Rearranged`
KEPT = 3  # an approximation, its copy in float64, and its factorisation


@final
@dataclass(frozen=True, eq=False)
class Need:
    """Bytes that a layer takes: its statistics, and what measuring it adds for a while.

    Examples
    --------
    >>> Need(held=10, working=5).all
    15
    """

    held: int
    working: int

    @property
    def all(self) -> int:
        """Both."""
        return self.held + self.working

    def at_least(self, working: int) -> "Need":
        """Return the need of a layer whose work takes no less."""
        return Need(self.held, max(self.working, working))

    @classmethod
    def of(cls, plan: Plan, methods: Mapping[str, Any], limit: int, along: bool) -> "Need":
        """Return the need of a layer; methods that exceed the limit alone are not made."""
        s = plan.samples
        p = s.weight_shape[0] * s.weight_shape[1]
        chosen = [method for method in methods.values() if room(s, method) <= limit]
        made = KEPT * NUMBER * sum(result_numbers(method, s) or 0 for method in chosen)
        double = 0 if s.dtype == torch.float64 else NUMBER * s.nbytes // s.dtype.itemsize
        spaces = max((space(s, method) for method in chosen), default=0.0)
        matrices = NUMBER * s.total * p
        formed = 0 if isinstance(s, OuterSamples) else min(FORMED, matrices)
        gram = 2 * NUMBER * (s.total) ** 2
        exact = min(gram, 3 * NUMBER * p * p) + 2 * min(CHUNK_BYTES, matrices)
        directions = 4 * NUMBER * p if along else 0
        held = s.nbytes + (s.dtype.itemsize * p if along else 0)
        return cls(held, double + made + int(spaces) + formed + exact + directions)


@final
@dataclass(frozen=True, eq=False)
class Schedule:
    """Which layers are collected together, and which cannot be served.

    Parameters
    ----------
    groups
        Names of layers by pass over the data.
    refused
        Layers that exceed the budget by themselves, with the sentence of their status.
    peak
        Bytes foretold for the whole comparison.
    plans, collection
        What they were made from.
    """

    groups: tuple[tuple[str, ...], ...]
    refused: Mapping[str, str]
    peak: int
    plans: Mapping[str, Plan]
    collection: Collection

    @classmethod
    def of(
        cls,
        plans: Mapping[str, Plan],
        collection: Collection,
        methods: Mapping[str, Any],
        limit: int,
        along: bool,
    ) -> "Schedule":
        """Plan a comparison within a limit; `along` says that gradients are held too."""
        least = collection.bytes  # of a pass, which is over when layers are measured
        needs = {
            name: Need.of(p, methods, limit, along).at_least(least)
            for name, p in plans.items()
        }
        refused = {
            name: _sentence(need, collection, limit)
            for name, need in needs.items()
            if need.all > limit
        }
        served = {name: need for name, need in needs.items() if name not in refused}
        groups = tuple(_groups(served, limit))
        peaks = [
            sum(served[n].held for n in group) + max(served[n].working for n in group)
            for group in groups
        ]
        return cls(groups, refused, max(peaks, default=least), plans, collection)


def _groups(needs: Mapping[str, Need], room: int) -> Iterator[tuple[str, ...]]:
    """Put as many layers into a pass as fit beside the work on the dearest of them."""
    group: list[str] = []
    held = working = 0
    for name, need in needs.items():
        if group and held + need.held + max(working, need.working) > room:
            yield tuple(group)
            group, held, working = [], 0, 0
        group.append(name)
        held, working = held + need.held, max(working, need.working)
    if group:
        yield tuple(group)


def _sentence(need: Need, collection: Collection, limit: int) -> str:
    return (
        f"not served: needs {readable(need.all)} ({need.all} bytes: statistics "
        f"{readable(need.held)}, work on them {readable(need.working)}, of which "
        f"{readable(collection.bytes)} collects them), more than the budget of "
        f"{readable(limit)} ({limit} bytes). Raise the budget, or take "
        "fewer examples, columns or methods"
    )
