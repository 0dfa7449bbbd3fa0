"""What each of several processes holds, sends and computes, before they are started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from math import isnan, nan
from typing import TYPE_CHECKING, Any, final

from fisherlab.analysis.cost import Collection, Plan
from fisherlab.analysis.wording import aligned
from fisherlab.approximators import ExactBlock
from fisherlab.approximators.costs import cost_of
from fisherlab.approximators.ranks import Sent
from fisherlab.approximators.streaming import sent, sent_in_step
from fisherlab.errors import NeedsSharedForm
from fisherlab.numerics.memory import readable

if TYPE_CHECKING:
    from fisherlab.samples import Samples

HEAD = ("layer", "approximator", "added", "gathered", "flops a rank")
COPIES = (
    4  # of what a rank hands over, on its way: raw, packed, and twice in the collective
)


@final
@dataclass(frozen=True)
class Share:
    """One approximation of one layer, on one of several ranks.

    Parameters
    ----------
    layer, approximator
        Names.
    added, gathered
        Bytes of tensors that the rank hands over: to sums, and for all others to hold.
    flops
        Multiply-adds of the rank: sums over its own examples, all else on every rank.
    note
        Why a number is missing.
    """

    layer: str
    approximator: str
    added: float
    gathered: float
    flops: float
    note: str = ""


@final
@dataclass(frozen=True, eq=False, repr=False)
class Shares:
    """The bill of one rank of several: that with the most examples.

    Bytes sent are those of `fisherlab.approximate`, and of a step of `NaturalGradient`
    that takes statistics. Names and shapes, some hundred bytes a block, are not counted.

    Parameters
    ----------
    ranks
        R.
    examples
        Of the rank, ⌈N/R⌉.
    rows
        A `Share` for every layer and approximator.
    sent
        By all of them together, where a tensor that several need is sent once.
    step
        For the matrices of a training step: of the method that hands over most.
    gradient_bytes
        What a training step adds besides: loss and gradients.
    bytes
        The most that the rank holds at once.
    flops
        Its multiply-adds, those of collecting among them.
    """

    ranks: int
    examples: int
    rows: tuple[Share, ...]
    sent: Sent
    step: Sent
    gradient_bytes: int
    bytes: int
    flops: float

    @property
    def step_bytes(self) -> int:
        """Bytes that the rank hands over in a training step."""
        return self.gradient_bytes + self.step.total

    @property
    def wire_bytes(self) -> float:
        """Bytes that leave the rank in a step, where sums go around a ring."""
        added, others = self.gradient_bytes + self.step.added, self.ranks - 1
        return 2 * others / self.ranks * added + others * self.step.gathered

    def __repr__(self) -> str:
        """Return a plain-text table with the totals on top."""
        return f"{self._summary}\n{aligned([HEAD, *map(_cells, self.rows)])}"

    @property
    def _summary(self) -> str:
        return (
            f"{self.ranks} ranks, {self.examples} examples each: {readable(self.bytes)} a "
            f"rank, which sends {readable(self.sent.added)} to sums and "
            f"{readable(self.sent.gathered)} to all; a step of training sends "
            f"{readable(self.step_bytes)} at most, {readable(self.gradient_bytes)} of them "
            f"of the gradient; {self.flops:.3g} multiply-adds a rank"
        )


def _cells(row: Share) -> list[str]:
    if isnan(row.added):
        return [row.layer, row.approximator, "-", "-", row.note]
    flops = "-" if isnan(row.flops) else f"{row.flops:.3g}"
    return [
        row.layer,
        row.approximator,
        readable(row.added),
        readable(row.gathered),
        flops,
    ]


def shares(
    methods: Mapping[str, Any],
    whole: Mapping[str, Plan],
    own: Mapping[str, Plan],
    collection: Collection,
    ranks: int,
    parameters: int,
) -> Shares:
    """Return the bill of one rank.

    Parameters
    ----------
    methods
        By name.
    whole, own
        Plans of all examples, and of the rank's.
    collection
        What collecting the rank's takes.
    ranks
        R.
    parameters
        Tensors that the blocks are made of.
    """
    rows = tuple(
        _share(whole[layer], plan, name, method, ranks)
        for layer, plan in own.items()
        for name, method in methods.items()
    )
    states = Sent()
    unknown = {(row.layer, row.approximator) for row in rows if isnan(row.added)}
    for layer, plan in own.items():
        some = {n: method for n, method in methods.items() if (layer, n) not in unknown}
        states += sent(some, {layer: plan.statistics}, ranks) if some else Sent()
    steps = [_step(n, method, own, unknown, ranks) for n, method in methods.items()]
    numbers = sum(p.weight_shape[0] * p.weight_shape[1] for p in own.values())
    size = next(iter(own.values())).statistics.dtype.itemsize
    flops = collection.flops + sum(row.flops for row in rows if not isnan(row.flops))
    return Shares(
        ranks,
        collection.examples,
        rows,
        states if ranks > 1 else Sent(),
        max(steps, key=lambda one: one.total) if ranks > 1 else Sent(),
        (1 + parameters + numbers) * size * (ranks > 1),
        _peak(methods, whole, own, collection, states, ranks),
        flops,
    )


def _step(
    name: str,
    method: Any,
    own: Mapping[str, Plan],
    unknown: Set[tuple[str, str]],
    ranks: int,
) -> Sent:
    """Return what a rank hands over for the matrices of one method in a training step."""
    taken = {n: plan.held for n, plan in own.items() if (n, name) not in unknown}
    return sent_in_step(method, taken, ranks)


def _share(whole: Plan, own: Plan, name: str, method: Any, ranks: int) -> Share:
    try:
        told = sent({name: method}, {own.layer: own.statistics}, ranks)
    except NeedsSharedForm:
        return Share(own.layer, name, nan, nan, nan, "needs the shared form")
    except (RuntimeError, NotImplementedError):
        return Share(own.layer, name, nan, nan, nan, "as many passes as the data take")
    samples = whole.samples if told.gathered else own.samples
    flops = _flops(method, samples, whole)
    told = told if ranks > 1 else Sent()
    return Share(own.layer, name, told.added, told.gathered, flops)


def _flops(method: Any, samples: Samples, whole: Plan) -> float:
    if isinstance(method, ExactBlock):
        return float(whole.gram_flops if whole.route == "Gram" else whole.dense_flops)
    cost = cost_of(method, samples)
    return nan if cost is None else float(cost.flops)


def _peak(
    methods: Mapping[str, Any],
    whole: Mapping[str, Plan],
    own: Mapping[str, Plan],
    collection: Collection,
    states: Sent,
    ranks: int,
) -> int:
    """Return the most bytes held at once: in the passes, while sending, or at the end.

    Sums are sent when the passes have let go of all but their last run.
    """
    results = sum(_results(method, p) for p in own.values() for method in methods.values())
    several = collection.run < collection.examples  # runs: those before and after too
    last = collection.run / collection.examples * _bytes(own.values())
    run = min((1 + 2 * several) * last, _bytes(own.values()))
    sending = (2 * ranks + COPIES) * states.gathered + 3 * states.added
    end = ranks * states.gathered + states.added + results
    most = max(sending, end) if ranks > 1 else end
    if states.gathered:
        return int(collection.bytes + max(states.gathered, run) + most)
    passing = collection.bytes + run + (1 + 2 * several) * states.added
    return int(max(passing, last + most + _largest(own.values())))


def _largest(plans: Iterable[Plan]) -> int:
    """Return the bytes of the largest square factor: what is made of it is one more."""
    sides = (max(plan.weight_shape) ** 2 * plan.samples.dtype.itemsize for plan in plans)
    return max(sides)


def _bytes(plans: Iterable[Plan]) -> int:
    return sum(plan.statistics_bytes for plan in plans)


def _results(method: Any, plan: Plan) -> int:
    cost = None if isinstance(method, ExactBlock) else cost_of(method, plan.samples)
    return 0 if cost is None else cost.numbers * plan.samples.dtype.itemsize
