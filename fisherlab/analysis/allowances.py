"""What a comparison costs cell by cell, what is left out, and which layers are held.

Counts, no clock: the same request is cut alike on every machine. Flops are multiply-adds.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, final

import torch

from fisherlab.analysis.cost import Collection, Plan
from fisherlab.analysis.counts import Work, norm, own, room, shared, space
from fisherlab.approximators import Approximator
from fisherlab.approximators.base import facts, result_numbers
from fisherlab.catalogue import NEEDS, Needs
from fisherlab.numerics.devices import readable
from fisherlab.samples import OuterSamples, Samples
from fisherlab.samples.base import CHUNK_BYTES
from fisherlab.settings import require_number

Key = tuple[str, str, str]  # layer, method, part

LONG = 60.0  # seconds from which on a comparison without progress says so beforehand
CUBES = 200  # multiply-adds of a large cell over (p + M + T)³, at most
RATE = 2e10  # multiply-adds a second that two plain cores do in float64, about

# What is read first is computed first, at the same price.
_WORDS = {str(part): words for part, words in NEEDS.items()}
_WEIGHTS: dict[str, float] = {"matrix": 1, "gradient": 3, "damping": 10}
_UNITS = {"": 1, "s": 1, "min": 60, "m": 60, "h": 3600}


@final
@dataclass(frozen=True)
class Allowance:
    """Multiply-adds and bytes that a comparison may take.

    Examples
    --------
    >>> Allowance.of("2 min", 2**30).flops
    2400000000000.0
    """

    flops: float
    bytes: float

    @classmethod
    def of(cls, time: float | str | None, limit: float) -> "Allowance":
        """Return what a time, counted at `RATE`, and a number of bytes allow."""
        return cls(inf if time is None else parse_time(time) * RATE, limit)


def parse_time(time: float | str) -> float:
    """Turn a time into seconds: a number, or a text such as "5 min".

    Raises
    ------
    ValueError
        If it cannot be read or is not positive.

    Examples
    --------
    >>> parse_time("1.5 min")
    90.0
    """
    if isinstance(time, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", time)
        unit = None if match is None else _UNITS.get(match[2])
        if match is None or unit is None or match[1].count(".") > 1 or match[1] == ".":
            raise ValueError(f"time={time!r} is not understood; write e.g. '5 min'.")
        time = float(match[1]) * unit
    require_number(f"time={time!r}", time)
    if not time > 0:
        raise ValueError(f"time={time!r} must be positive.")
    return float(time)


@final
@dataclass(frozen=True)
class Cut:
    """Which parts of which cells are left out, and what the rest costs.

    Parameters
    ----------
    reasons
        (layer, approximator, part) to the sentence that its status shall hold.
    flops
        Multiply-adds of what is kept.
    """

    reasons: Mapping[tuple[str, str, str], str]
    flops: float


def cut(
    layers: Mapping[str, Samples],
    methods: Mapping[str, Approximator],
    parts: Sequence[Needs],
    allowance: Allowance,
    levels: int = 1,
) -> Cut:
    """Choose what a comparison computes, cheapest cells first, until the allowance ends.

    Parameters
    ----------
    layers
        The samples of every layer, with or without storage.
    methods
        The approximations by name.
    parts
        What is asked of them.
    allowance
        What all may take together (flops), and each cell by itself (bytes).
    levels
        How many dampings.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.approximators import KFAC
    >>> from fisherlab.samples import OuterSamples
    >>> samples = OuterSamples(torch.ones(9, 40), torch.ones(2, 9, 30))
    >>> found = cut({"fc": samples}, {"kfac": KFAC()}, ["matrix"], Allowance(1e4, 1e9))
    >>> [key for key in found.reasons]
    [('fc', 'kfac', 'matrix')]
    """
    cells: dict[tuple[str, str, str], Work] = {}
    common: dict[tuple[str, str], Work] = {}
    for layer, samples in layers.items():
        for part in parts:
            times = 1 if part == "matrix" else levels
            common[layer, part] = _scaled(shared(samples, part), times)
            for name, method in methods.items():
                each = own(samples, method, part)
                cells[layer, name, part] = _scaled(each, times)
    return chosen(cells, common, len(methods), allowance)


def _scaled(work: Work, times: int) -> Work:
    return Work(times * work.flops, work.bytes)


@dataclass(frozen=True)
class _Request:
    """Cells, what they share, and what of them is taken so far."""

    cells: Mapping[Key, Work]
    shared: Mapping[tuple[str, str], Work]
    built: Mapping[tuple[str, str], Work]
    methods: int
    taken: set[Key] = field(default_factory=set)
    paid: set[Key] = field(default_factory=set)

    def price(self, keys: Sequence[Key]) -> tuple[bool, float, bool]:
        """Return what cells cost, no less than that without which they are not asked.

        What costs nothing of its own, the exact block, comes last: it is there where
        others are.
        """
        first = [one for key in keys if (one := _matrix(key)) in self.cells]
        free = not any(self.cells[key].flops for key in keys)
        price = max(self._weighted(keys), self._weighted(first))
        return free, price, keys[0][2] != "matrix"

    def _weighted(self, keys: Sequence[Key]) -> float:
        own = sum(self.cells[key].flops for key in keys)
        common = sum(self.shared[layer, part].flops for layer, _, part in keys)
        making = sum(self._making(key).flops for key in keys)
        weight = max((_WEIGHTS.get(part, 1) for _, _, part in keys), default=1)
        return weight * (own + common / max(self.methods, 1) + making)

    def _making(self, key: Key) -> Work:
        return self.built.get(key[:2], Work(0))

    def due(self, keys: Sequence[Key]) -> Work:
        """Return what cells take beside what is paid: `bytes` those of the largest."""
        once = {(layer, "", part): self.shared[layer, part] for layer, _, part in keys}
        once |= {(*key[:2], ""): self._making(key) for key in keys}
        work = sum((self.cells[key] for key in keys), Work(0))
        held = max(self.shared[layer, part].bytes for layer, _, part in keys)
        unpaid = sum(one.flops for key, one in once.items() if key not in self.paid)
        return work + Work(unpaid, max(held, *(one.bytes for one in once.values())))

    def open(self, key: Key) -> bool:
        """Say whether a cell has what it needs: nothing is asked of what is not built."""
        return (
            _matrix(key) not in self.cells
            or key[2] == "matrix"
            or (_matrix(key) in self.taken)
        )

    def take(self, keys: Sequence[Key]) -> float:
        """Take cells, and return what that costs."""
        flops = self.due(keys).flops
        self.taken.update(keys)
        self.paid.update((layer, "", part) for layer, _, part in keys)
        self.paid.update((layer, method, "") for layer, method, _ in keys)
        return flops


def _matrix(key: Key) -> Key:
    return (*key[:2], "matrix")


def chosen(
    cells: Mapping[Key, Work],
    shared: Mapping[tuple[str, str], Work],
    methods: int,
    allowance: Allowance,
    built: Mapping[tuple[str, str], Work] | None = None,
) -> Cut:
    """Take what fits in every layer, the cheapest first, and then the cheapest cells.

    Methods can be held together over a network only where they have numbers in all
    layers. `shared` is paid once by the methods of a layer and part, `built` once by the
    parts of a layer and method.
    """
    asked = _Request(cells, shared, built or {}, methods)
    columns: dict[tuple[str, str], list[Key]] = {}
    for key in cells:
        columns.setdefault(key[1:], []).append(key)
    whole = sorted(columns.values(), key=asked.price)
    single = sorted(([key] for key in cells), key=asked.price)
    spent, reasons = 0.0, dict[Key, str]()
    for keys in (*whole, *single):
        if asked.taken.issuperset(keys):
            continue
        work = asked.due(keys)
        heavy, late = work.bytes > allowance.bytes, spent + work.flops > allowance.flops
        if not (heavy or late) and all(map(asked.open, keys)):
            spent += asked.take(keys)
        elif len(keys) == 1:
            (key,) = keys
            why = reasons.get(_matrix(key))
            reasons[key] = why or _reason(key[2], work, heavy, late)
    return Cut({key: why for key, why in reasons.items() if key not in asked.taken}, spent)


def may_be_long(layers: Mapping[str, Samples], cells: int) -> bool:
    """Tell from sizes alone whether `cut` may count more than a minute.

    Parameters
    ----------
    layers
        Samples of the exact blocks.
    cells
        Approximations times dampings.
    """
    sizes = (
        s.weight_shape[0] * s.weight_shape[1] + s.total + s.positions
        for s in layers.values()
    )
    return CUBES * cells * sum(size**3 for size in sizes) > LONG * RATE


def _reason(part: str, work: Work, heavy: bool, late: bool) -> str:
    need = [f"{work.flops:.1g} multiply-adds", duration(work.flops / RATE)]
    need += [readable(work.bytes)] if heavy else []
    ask = ["--budget"] * heavy + ["--time"] * late
    return (
        f"left out for size: {_WORDS.get(part, part)} ({', '.join(need)}); ask with "
        f"{' and '.join(ask) or '--time'}"
    )


def duration(seconds: float) -> str:
    """Say about how long something takes.

    Examples
    --------
    >>> duration(0.2), duration(40.0), duration(1517.0), duration(5e7)
    ('less than 1 s', 'about 40 s', 'about 25 min', 'more than 1,000 h')
    """
    if seconds < 1:
        return "less than 1 s"
    if seconds < 100:
        return f"about {seconds:.0f} s"
    if seconds < 6000:
        return f"about {seconds / 60:.0f} min"
    if seconds < 3.6e6:
        return f"about {seconds / 3600:.0f} h"
    return "more than 1,000 h"


def least(samples: Iterable[Samples], methods: Iterable[Approximator]) -> float:
    """Return the multiply-adds of exact norms and of the errors in closed form.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.approximators import Diagonal
    >>> from fisherlab.samples import OuterSamples
    >>> least([OuterSamples(torch.ones(10, 4), torch.ones(1, 10, 3))], [Diagonal()])
    6235.0
    """
    closed = [method for method in methods if facts(method).result != "terms"]
    return sum(
        norm(s) + sum(own(s, method, "matrix").flops for method in closed) for s in samples
    )


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
