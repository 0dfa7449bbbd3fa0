"""What a comparison costs cell by cell, and what is left out to stay within a limit.

Counts, no clock: the same request is cut alike on every machine. Flops are multiply-adds.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import final

from fisherlab.analysis.counts import Work, norm, own, shared
from fisherlab.approximators import Approximator
from fisherlab.approximators.base import facts
from fisherlab.catalogue import NEEDS, Needs
from fisherlab.numerics.memory import readable
from fisherlab.samples import Samples

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


def chosen(
    cells: Mapping[tuple[str, str, str], Work],
    shared: Mapping[tuple[str, str], Work],
    methods: int,
    allowance: Allowance,
) -> Cut:
    """Take the cheapest cells first; `shared` is paid once by the methods of a layer."""

    def price(key: tuple[str, str, str]) -> float:
        layer, _, part = key
        flops = cells[key].flops + shared[layer, part].flops / max(methods, 1)
        return _WEIGHTS.get(part, 1) * flops

    spent, paid, reasons = 0.0, set[tuple[str, str]](), {}
    for key in sorted(cells, key=price):
        layer, method, part = key
        common = Work(0) if (layer, part) in paid else shared[layer, part]
        work = cells[key] + common
        without = part != "matrix" and (layer, method, "matrix") in reasons
        heavy = max(work.bytes, shared[layer, part].bytes) > allowance.bytes
        late = spent + work.flops > allowance.flops
        if heavy or late or without:
            reasons[key] = _reason(part, work, heavy, late)
            continue
        spent += work.flops
        paid.add((layer, part))
    for layer, method, part in cells:  # nothing is asked of what is not built
        if part != "matrix" and (layer, method, "matrix") in reasons:
            reasons[layer, method, part] = reasons[layer, method, "matrix"]
    return Cut(reasons, spent)


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
    need = [f"{work.flops:.1g} multiply-adds", _duration(work.flops / RATE)]
    need += [readable(work.bytes)] if heavy else []
    ask = ["--budget"] * heavy + ["--time"] * late
    return (
        f"left out for size: {_WORDS.get(part, part)} ({', '.join(need)}); ask with "
        f"{' and '.join(ask) or '--time'}"
    )


def _duration(seconds: float) -> str:
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
