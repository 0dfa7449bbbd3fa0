"""How much of a problem a report takes, so that it ends in its time and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
from torch import Tensor

import fisherlab as fl
from fisherlab.analysis.allowances import (
    RATE,
    Allowance,
    cut,
    duration,
    least,
    parse_time,
)
from fisherlab.analysis.cost import Collection, Plan, Probed
from fisherlab.analysis.counts import own, product
from fisherlab.analysis.purposes import exact_solve, in_closed_form
from fisherlab.approximators import Approximator
from fisherlab.catalogue import NEEDS
from fisherlab.numerics.devices import parse_budget, readable
from fisherlab.problems import Problem
from fisherlab.problems.problem import drawn
from fisherlab.report.config import ReportConfig
from fisherlab.report.judging import DEMANDS, HELD_OUT
from fisherlab.samples import Samples
from fisherlab.training.loop import CHUNK

FEW: Final = 32
"""Below so many examples that fit, labels are sampled instead (`--fisher auto`)."""
DRAWN: Final = 12
"""Layers whose inverse is drawn, at most, unless they are named."""
PICTURED: Final = 2000
"""Parameters up to which the inverse of a block is drawn unasked."""
WHOLE: Final = 1000
"""Rows up to which all eigenvalues of a block are drawn; above it those of quadrature."""
PROBES: Final = 2
STEPS: Final = 64
"""Sign vectors of the quadrature, and products with each."""
_SPECTRA: Final = 0.05
BATCH: Final = 64
"""Examples in a minibatch of the training, unless one step takes longer than `_STEP`."""
_STEP: Final = 10.0
_SMALLEST_BATCH: Final = 8
_FEW_AT_SEVERAL, _FEW_AT_ONE = 8, 2
"""Examples at least at several moments, and at one: two long sequences have many rows."""
_PASSES: Final = 5.0  # they move more memory than they multiply
_LOSSES: Final = 2000
_FEWEST_LOSSES: Final = 64
_LOSS_SHARE: Final = 0.1
# The rest is for losses, inverses that are drawn, and the page.
_COMPARISON: Final = 0.6
_PURPOSES: Final = 0.3
# Of a moment's time at least, for passes are counted with a margin.
_CELLS: Final = 1 / 3


@dataclass(frozen=True)
class Size:
    """What a report takes of a problem.

    Attributes
    ----------
    examples
        Training examples that make up the Fisher.
    fisher
        Which Fisher.
    moments
        Steps after which the network is analysed: the last of those asked for, where passes
        through the network leave no time for all.
    seconds
        Counted time of the comparison of each of them: the last one, which the page shows,
        has as much as all others.
    budget
        Bytes of one comparison's largest request.
    drawn
        Layers whose inverse is drawn.
    spectra
        Layers whose eigenvalues are drawn.
    judging
        Counted time of the purposes at the last moment.
    held_out
        Held-out examples whose predictive variances are compared.
    losses
        Random examples that losses and accuracies are taken over, at most.
    at_once
        How many of them are passed through together.
    batch
        Examples in a minibatch of the training.
    told
        What is left out, and how to ask for it, in sentences.
    """

    examples: int
    fisher: Any
    moments: tuple[int, ...]
    seconds: tuple[float, ...]
    budget: int
    drawn: tuple[str, ...]
    spectra: tuple[str, ...]
    judging: float
    held_out: int
    losses: int
    at_once: int
    batch: int
    told: tuple[str, ...]


def fitted(problem: Problem, config: ReportConfig) -> Size:
    """Choose examples, labels and drawn layers within `config.time` and `config.budget`.

    Counts flops and bytes from two examples and computes nothing else. Half of the budget
    is for statistics and half for what one cell forms; at most half of the time is for
    passes through the network and closed forms, the rest for the other cells. Training
    takes of that time what it counts, at most half.

    Examples
    --------
    >>> problem = fl.problems.load("digits", examples=50)
    >>> fitted(problem, ReportConfig(steps=3)).examples
    50
    """
    pair = drawn(problem.train, 2, config.seed)
    with fl.frozen(problem.model) as model:
        probed = Probed.of(model, pair, problem.likelihood)
    asked = config.analysed_steps
    most = min(config.examples, len(problem.train[0]))
    for dropped in range(len(asked)):
        moments = asked[dropped:]
        found, first = _chosen(probed, config, most, len(moments))
        shares = _shares(found, config, moments)
        if found.passes / RATE <= shares[-1] / 2:
            break
    batch = _batch(found, config)
    left = tuple(max(share - found.passes / RATE, _CELLS * share) for share in shares)
    judging, memory = _PURPOSES * parse_time(config.time), parse_budget(config.budget)
    samples = {name: plan.samples for name, plan in found.plans.items()}
    chosen = {name: fl.approximators()[name] for name in config.approximators}
    early, last = (
        cut(samples, chosen, tuple(NEEDS), allowed, len(config.dampings)).reasons
        for allowed in (Allowance.of(part, memory // 2) for part in (left[0], left[-1]))
    )
    layers = config.layers or _drawn(found.plans, last, memory // 8)
    spectra = _spectra(samples, chosen, last, _SPECTRA * parse_time(config.time) * RATE)
    losses = _losses(found.collection, shares[0])
    held_out = _held_out(found, judging)
    more = len(set(early) - set(last))
    sentences = (
        *_sizes_told(found, first, losses, config),
        *_moments_told(asked, moments),
        *told(last, samples),
        *([f"at the moments before the last, {more} more of these"] if more else []),
        *_predictive_told(problem, config, found.output.numel(), held_out),
        *_batch_told(batch, config),
        *_pictures_told(layers, spectra),
    )
    return Size(
        found.examples,
        found.fisher,
        moments,
        left,
        memory // 2,
        layers,
        spectra,
        judging,
        held_out,
        losses,
        max(1, min(CHUNK, memory // 16 // found.output.nbytes)),
        batch,
        sentences,
    )


def _step(found: _Trial, batch: int) -> float:
    """Count the seconds of one step of the training: three passes an example."""
    return 3 * _PASSES * batch * found.collection.forward / RATE


def _batch(found: _Trial, config: ReportConfig) -> int:
    """Return the examples in a minibatch: those asked for, or as many as are quick."""
    batch = config.batch_size or BATCH
    while not config.batch_size and batch > _SMALLEST_BATCH:
        logits = 4 * batch * found.output.nbytes  # their logarithms, and gradients of both
        if _step(found, batch) <= _STEP and logits <= found.room:
            break
        batch //= 2
    return batch


def _batch_told(batch: int, config: ReportConfig) -> Iterator[str]:
    if batch < (config.batch_size or BATCH) and config.training_steps:
        yield (
            f"minibatches of the training hold {batch} examples, not {BATCH}; ask with "
            "--batch-size"
        )


def _shares(found: _Trial, config: ReportConfig, moments: Sequence[int]) -> list[float]:
    """Give the last moment as much time as all others, of what training leaves."""
    whole = _COMPARISON * parse_time(config.time)
    training = config.training_steps * _step(found, _batch(found, config))
    whole -= min(training, whole / 2)
    if len(moments) == 1:
        return [whole]
    others = len(moments) - 1
    return [*[whole / 2 / others] * others, whole / 2]


def _held_out(found: _Trial, seconds: float) -> int:
    """Return how many held-out examples fit a quarter of the purposes' time.

    For each, a pass back for every output, and a solve of it with the exact block.
    """
    passes = _PASSES * (1 + 2 * found.output.numel()) * found.collection.forward
    solves = sum(exact_solve(plan.samples) for plan in found.plans.values())
    return int(seconds / 4 * RATE / (passes + found.output.numel() * solves))


def _predictive_told(
    problem: Problem, config: ReportConfig, outputs: int, held_out: int
) -> Iterator[str]:
    """Say that predictive variances are left out, where more time would give them."""
    x, y = problem.test
    wanted = "laplace" in config.purpose and len(x) > 0 and y.ndim == 1
    classes = isinstance(problem.likelihood, fl.Categorical) and outputs <= HELD_OUT
    if wanted and classes and not held_out:
        yield "predictive variances of the Laplace posterior; ask with --time"


def _pictures_told(inverses: Sequence[str], spectra: Sequence[str]) -> Iterator[str]:
    """Say which figures have no layer: their blocks are large, or lack numbers."""
    if not inverses:
        yield "the figure of inverses; ask with --layers and --time"
    if not spectra:
        yield "the figure of eigenvalues; ask with --time"


def _losses(collection: Collection, seconds: float) -> int:
    """Return how many examples of both sets pass through in a share of the time."""
    each = 2 * _PASSES * collection.forward
    fitting = int(_LOSS_SHARE * seconds * RATE / max(each, 1))
    return min(_LOSSES, max(_FEWEST_LOSSES, fitting))


@dataclass(frozen=True)
class _Trial:
    """Some examples under one Fisher, what they cost, and the output of one."""

    examples: int
    fisher: Any
    methods: Sequence[Any]
    plans: Mapping[str, Plan]
    collection: Collection
    output: Tensor
    flops: float
    room: float
    demands: Sequence[fl.purposes.Demand]
    judging: float

    @property
    def passes(self) -> float:
        """Multiply-adds of one collection."""
        return _PASSES * self.collection.flops

    @property
    def bytes(self) -> int:
        """Bytes of the statistics."""
        return sum(plan.statistics_bytes for plan in self.plans.values())

    @property
    def work(self) -> float:
        """Multiply-adds that no cell can be had without."""
        samples = (plan.samples for plan in self.plans.values())
        return self.passes + least(samples, self.methods)

    @property
    def fits(self) -> bool:
        """Whether statistics and passes fit their halves."""
        return self.bytes <= self.room and self.work <= self.flops

    @property
    def judged(self) -> float:
        """Multiply-adds of the purposes of methods in closed form, in every layer."""
        samples = (plan.samples for plan in self.plans.values())
        return in_closed_form(samples, self.methods, self.demands)

    @property
    def serves(self) -> bool:
        """Whether these fit the time of the purposes."""
        return self.judged <= self.judging


def _chosen(
    probed: Probed, config: ReportConfig, most: int, moments: int
) -> tuple[_Trial, _Trial]:
    """Return the trial that fits, or the last, beside the one with all examples."""
    tried = list(_tried(probed, config, most, moments))
    found = next((one for one in tried if one.fits), tried[-1])
    if config.fisher == "auto" and found.fisher == fl.Exact():
        sampled = [one for one in tried if one.fisher != fl.Exact() and one.fits]
        if sampled and found.examples < min(FEW, tried[0].examples):
            found = sampled[0]
        elif not found.fits:
            found = tried[-1]
    fewer = (one for one in tried if one.fisher == found.fisher and one.fits)
    enough = (one for one in fewer if one.examples >= min(FEW, found.examples))
    return next((one for one in enough if one.serves), found), tried[0]


def _tried(
    probed: Probed, config: ReportConfig, most: int, moments: int
) -> Iterator[_Trial]:
    """Yield sizes from the most examples to few, and then those with sampled labels."""
    memory = parse_budget(config.budget)
    flops = parse_time(config.time) * RATE / moments / 2
    methods = tuple(fl.approximators()[name] for name in config.approximators)
    output = max((p.output[0] for p in probed.probes.values()), key=Tensor.numel)
    fewest = _FEW_AT_SEVERAL if moments > 1 else _FEW_AT_ONE
    demands = [DEMANDS[name] for name in config.purpose if name in DEMANDS]
    judged = demands, _PURPOSES * parse_time(config.time) * RATE
    for fisher in config.fishers:
        count = most
        while True:
            planned, collection = probed.plans(fisher, memory // 4, examples=count)
            room = memory / 2
            one = _Trial(
                count, fisher, methods, planned, collection, output, flops, room, *judged
            )
            yield one
            if (one.fits and one.serves) or count <= fewest:
                break
            count = max(fewest, count // 2)


def _drawn(
    planned: Mapping[str, Plan], left_out: Mapping[Any, str], memory: float
) -> tuple[str, ...]:
    """Return small layers whose cells are all computed, spaced evenly, as many as fit."""
    missing = {layer for layer, _, _ in left_out}
    sizes = {name: prod(plan.weight_shape) for name, plan in planned.items()}
    small = [n for n, p in sizes.items() if p <= PICTURED and n not in missing]
    if not small:
        return ()
    largest = max(sizes[name] for name in small)
    return spread(small, max(1, int(memory / (64 * largest**2))))


def spread(layers: Sequence[str], most: int = DRAWN) -> tuple[str, ...]:
    """Return layers spaced evenly, at most so many.

    Examples
    --------
    >>> spread(["0", "1", "2"], 2)
    ('0', '2')
    """
    count = min(len(layers), DRAWN, most)
    places = np.linspace(0, len(layers) - 1, count).round().astype(int)
    return tuple(layers[place] for place in places)


def _spectra(
    samples: Mapping[str, Samples],
    methods: Mapping[str, Approximator],
    left_out: Mapping[Any, str],
    flops: float,
) -> tuple[str, ...]:
    """Return layers spaced evenly whose spectra fit together, the cheapest first."""
    missing = {layer for layer, _, part in left_out if part == "matrix"}
    few = spread([name for name in samples if name not in missing])
    price = {name: _spectrum(samples[name], methods) for name in few}
    cheapest = sorted(few, key=lambda name: price[name])
    fits = np.cumsum([price[name] for name in cheapest]) <= flops
    taken = [name for name, fit in zip(cheapest, fits, strict=True) if fit]
    return tuple(name for name in few if name in taken)


def _spectrum(s: Samples, methods: Mapping[str, Approximator]) -> float:
    """Count the methods once more, and their eigenvalues or the products of quadrature."""
    o, i = s.weight_shape
    each = float(o * i) ** 3 if o * i <= WHOLE else 2.0 * PROBES * STEPS * o * i * (o + i)
    exact = each if o * i <= WHOLE else PROBES * STEPS * product(s)
    built = sum(own(s, method, "matrix").flops for method in methods.values())
    return exact + built + len(methods) * each


def _moments_told(asked: tuple[int, ...], kept: tuple[int, ...]) -> Iterator[str]:
    if kept != asked:
        steps = ", ".join(map(str, asked[: -len(kept)]))
        yield f"the network after {steps} steps of training; ask with --time"


def _sizes_told(
    found: _Trial, asked: _Trial, losses: int, config: ReportConfig
) -> Iterator[str]:
    if losses < _LOSSES:
        yield f"losses are means over at most {losses} examples; ask with --time"
    if found.fisher != asked.fisher:
        yield (
            f"labels are sampled, {found.fisher!r}: the exact Fisher of {FEW} examples is "
            "out of reach; ask with --fisher exact and --budget, --time"
        )
    if found.examples < asked.examples:
        needs = f"{readable(asked.bytes)} of statistics"
        used = f" and {duration(asked.judged / RATE)} for the purposes" * (not asked.serves)
        yield (
            f"{found.examples} examples make up the Fisher, drawn at random, not "
            f"{asked.examples}, which take {needs}, {duration(asked.work / RATE)} a "
            f"moment{used} with {asked.fisher!r}; ask with --budget and --time "
            f"(now {config.budget}, {config.time})"
        )


def told(
    reasons: Mapping[tuple[str, str, str], str], order: Iterable[str]
) -> Iterator[str]:
    """Say in a line for each part how many cells of which methods are left out.

    Examples
    --------
    >>> list(told({("fc", "kfac", "damping"): "left out for size"}, ["conv", "fc"]))
    ['damped inverses: kfac in 1 layer (fc)']
    """
    places = {layer: place for place, layer in enumerate(order)}
    for part in NEEDS:
        found: dict[str, list[str]] = {}
        for layer, method, one in reasons:
            if one == part:
                found.setdefault(method, []).append(layer)
        groups: dict[tuple[str, ...], list[str]] = {}
        for method, listed in found.items():
            groups.setdefault(tuple(sorted(listed, key=places.__getitem__)), []).append(
                method
            )
        for layers, methods in groups.items():
            some = ", ".join(layers[:3]) + (", …" if len(layers) > 3 else "")
            count = f"{len(layers)} layer{'s' * (len(layers) > 1)}"
            yield f"{NEEDS[part]}: {', '.join(methods)} in {count} ({some})"
