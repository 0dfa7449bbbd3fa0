"""Bytes and flops of a request, counted before anything large is allocated.

Layers are described by tensors without storage, so the counts are those of the samples
themselves. Flops are multiply-adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from math import isnan, nan
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from fisherlab.analysis.cost import Collection, Plan, Probed, route
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.base import cost_of, facts
from fisherlab.approximators.ranks import Sent
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.approximators.streaming import (
    sent,
    sent_in_step,
    streaming,
    streams_by_column,
)
from fisherlab.errors import NeedsSharedForm
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.devices import Budget, parse_budget, readable
from fisherlab.operators.factored import Form
from fisherlab.samples import MatrixSamples
from fisherlab.settings import numeric
from fisherlab.showing import aligned, html_table
from fisherlab.statistics import Fisher

if TYPE_CHECKING:
    from fisherlab.samples import Samples


RANKS_HEAD = ("layer", "approximator", "added", "gathered", "flops a rank")
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
        return f"{self._summary}\n{aligned([RANKS_HEAD, *map(_cells, self.rows)])}"

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


HEAD = (
    "layer",
    "approximator",
    "weight",
    "V",
    "T",
    "statistics",
    "result",
    "flops",
    "form",
)


@final
@dataclass(frozen=True)
class Cost:
    """One approximation of one layer.

    Parameters
    ----------
    layer, approximator
        Names.
    result_bytes, flops
        Bytes the operator holds besides the statistics, and multiply-adds to build it;
        NaN where it is not counted.
    note
        Why a number is missing, or the route of the exact block.
    """

    layer: str
    approximator: str
    result_bytes: float
    flops: float
    note: str


@final
@dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    """The bill of a request, layer by layer.

    Parameters
    ----------
    collection
        What the forward and backward passes take.
    plans
        Block name to its `Plan`.
    rows
        A `Cost` for every layer and approximator.
    forms
        Forms of the exact block among them, whose matrix has to be formed.
    held
        Whether a method beside the exact block holds every sample, also in a stream.
    dense
        Whether every operator is also formed as a dense matrix and kept.
    budget
        Bytes allowed.
    shares
        What one of several ranks takes, where `ranks` was given.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = torch.ones(4, 3), None
    >>> told = fl.estimate(torch.nn.Linear(3, 2), data, fl.Gaussian(), ["kfac"])
    >>> told.examples, told.statistics_bytes, told.fits
    (4, 128, True)
    """

    collection: Collection
    plans: Mapping[str, Plan]
    rows: tuple[Cost, ...]
    forms: frozenset[Form]
    held: bool
    dense: bool
    budget: int
    shares: Shares | None = None

    @property
    def examples(self) -> int:
        """N."""
        return self.collection.examples

    @property
    def statistics_bytes(self) -> int:
        """Bytes of all statistics."""
        return sum(plan.statistics_bytes for plan in self.plans.values())

    @property
    def result_bytes(self) -> int:
        """Bytes of all approximations that are counted."""
        counted = (row.result_bytes for row in self.rows)
        return int(sum(size for size in counted if not isnan(size)))

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense matrices of all rows, 0 unless they were asked for."""
        return sum(self.plans[row.layer].dense_bytes for row in self.rows) * self.dense

    @property
    def peak_bytes(self) -> int:
        """Everything held and the largest matrix or workspace that is needed beside it.

        The allocator keeps what collecting took, so it counts to the end.
        """
        kept = self.statistics_bytes + self.result_bytes + self.dense_bytes
        return kept + self.collection.bytes + self._working_bytes

    @property
    def _working_bytes(self) -> int:
        plans = self.plans.values()
        if self.dense:
            return max(plan.workspace_bytes for plan in plans)
        needed = (plan.working_bytes(form) for plan in plans for form in self.forms)
        return max(needed, default=0)

    @property
    def streamed_bytes(self) -> int:
        """The peak of `fisherlab.approximate`: a run of statistics beside the next.

        Methods that hold every sample count all statistics.
        """
        return self.streamed(held=self.held or bool(self.forms))

    def streamed(self, *, held: bool) -> int:
        """Return the peak of a stream whose samples are held, or go by."""
        share = 1.0 if held else min(1.0, 2 * self.collection.run / self.examples)
        alone = sum(plan.column_bytes for plan in self.plans.values())
        each = alone if self.collection.by_column else self.statistics_bytes
        return int(each * share) + self.result_bytes + self.collection.bytes

    @property
    def flops(self) -> float:
        """Multiply-adds of collecting and of all rows that are counted."""
        counted = sum(row.flops for row in self.rows if not isnan(row.flops))
        return self.collection.flops + counted

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget."""
        return self.peak_bytes <= self.budget

    @property
    def advice(self) -> str:
        """What would fit, in one sentence or two; empty where the request fits."""
        return "" if self.fits else _advice(self)

    def __repr__(self) -> str:
        """Return a plain-text table with the totals on top."""
        table = aligned([HEAD, *map(self._cells, self.rows)])
        shares = "" if self.shares is None else f"\n{self.shares!r}"
        return f"{self._summary}\n{table}\n{self.advice}".rstrip() + shares

    def _repr_html_(self) -> str:
        """Return a folding table for notebooks."""
        shown = {
            f"{row.layer} · {row.approximator}": " · ".join(self._cells(row)[2:])
            for row in self.rows
        }
        return html_table(self._summary, shown)

    @property
    def _summary(self) -> str:
        return (
            f"N={self.examples}: statistics {readable(self.statistics_bytes)}, results "
            f"{readable(self.result_bytes)}, peak {readable(self.peak_bytes)} of "
            f"{readable(self.budget)}; {self.flops:.3g} multiply-adds"
        )

    def _cells(self, row: Cost) -> list[str]:
        plan = self.plans[row.layer]
        o, i = plan.weight_shape
        counted = not isnan(row.result_bytes)
        return [
            row.layer,
            row.approximator,
            f"{o}×{i}",
            str(plan.samples.columns),
            str(plan.positions),
            readable(plan.statistics_bytes),
            readable(row.result_bytes) if counted else "-",
            f"{row.flops:.3g}" if counted else "-",
            row.note,
        ]


@numeric
def estimate(
    model: nn.Module,
    batch: Any,
    likelihood: Likelihood,
    approximators: Chosen = None,
    fisher: Fisher | None = None,
    budget: Budget = None,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    dense: bool = False,
    ranks: int | None = None,
) -> Estimate:
    """Count bytes and flops of a request from two examples; nothing large is allocated.

    Parameters
    ----------
    model, likelihood, fisher, layers, dtype
        As in `collect`.
    batch
        The data of `collect`: (x, y) or an iterable of pairs.
    approximators
        Names, or a mapping of names to values; all named ones by default.
    budget
        Bytes for everything, a number or "4 GiB"; half of the free memory by default.
    dense
        Whether `to_dense()` of every operator is to be held as well.
    ranks
        Processes that share the batch out: `shares` has what one of them holds, sends
        and computes.

    Returns
    -------
    Estimate
        With `rows`, `plans`, totals, and a table as its repr. Where the budget is too
        small, `fits` is False and `advice` names what would fit.

    Raises
    ------
    ValueError, UnsupportedModelError
        As `collect`; for `ranks` that are no whole number from 1 to N.

    Examples
    --------
    >>> from fisherlab.likelihoods import Categorical
    >>> data = (torch.zeros(100, 4), None)
    >>> found = estimate(nn.Linear(4, 3), data, Categorical(), ["exact", "kfac"])
    >>> found.plans["weight"].route, found.statistics_bytes
    ('packed GEMM', 4400)
    """
    chosen = by_name(approximators)
    limit = parse_budget(budget, next(model.parameters(), torch.empty(0)).device)
    alone = streams_by_column(chosen.values())
    probed = Probed.of(model, batch, likelihood, layers, dtype)
    planned, collection = probed.plans(fisher, limit, by_column=alone)
    rows = tuple(
        _cost(plan, name, method)
        for plan in planned.values()
        for name, method in chosen.items()
    )
    blocks = [method for method in chosen.values() if isinstance(method, ExactBlock)]
    others = [m for m in chosen.values() if not isinstance(m, ExactBlock)]
    held = any(facts(streaming(method)).holds_samples for method in others)
    forms = frozenset(method.form for method in blocks)
    told = None
    if ranks is not None:
        part = _part(collection.examples, ranks)
        own, alone_ = probed.plans(fisher, limit, by_column=alone, examples=part)
        tensors = sum(len(block.parameters) for block in probed.found.values())
        told = shares(chosen, planned, own, alone_, ranks, tensors)
    return Estimate(collection, planned, rows, forms, held, dense, limit, told)


def _part(examples: int, ranks: int) -> int:
    """Return the most examples that one of some ranks has."""
    if not (isinstance(ranks, int) and 1 <= ranks <= examples):
        raise ValueError(
            f"estimate: ranks={ranks!r} share {examples} examples: a whole number from 1 "
            "to the number of examples is expected. Give more examples, or fewer ranks."
        )
    return -(-examples // ranks)


def _cost(plan: Plan, name: str, method: Approximator) -> Cost:
    if isinstance(method, ExactBlock):
        way = route(plan.samples, method.form)
        flops = plan.gram_flops if way == "Gram" else plan.dense_flops
        return Cost(plan.layer, name, 0.0, float(flops), way)
    told = cost_of(method, plan.samples)
    if told is None:
        lacking = isinstance(plan.samples, MatrixSamples) and facts(method).needs_inputs
        note = "needs the shared form" if lacking else "not counted"
        return Cost(plan.layer, name, nan, nan, note)
    size = float(told.numbers * plan.samples.dtype.itemsize)
    return Cost(plan.layer, name, size, float(told.flops), "")


def _advice(found: Estimate) -> str:
    """Say what does not fit and what would."""
    fits = [f"{what} ({readable(size)})" for what, size in _smaller(found)]
    remedy = f"These would fit: {'; '.join(fits)}." if fits else "Use fewer examples."
    return (
        f"The request needs {readable(found.peak_bytes)} ({found.peak_bytes} bytes), more "
        f"than the budget of {readable(found.budget)} ({found.budget} bytes): statistics "
        f"{readable(found.statistics_bytes)}, results {readable(found.result_bytes)}. "
        f"{remedy} collect(..., store=folder) keeps the statistics on a disk, "
        f"{readable(found.statistics_bytes)} there."
    )


def _smaller(found: Estimate) -> list[tuple[str, int]]:
    """Return forms of the request that fit, with their bytes."""
    plans = found.plans.values()
    base = found.statistics_bytes + found.result_bytes + found.collection.bytes
    columns = max(plan.samples.columns for plan in plans)
    single = sum(plan.column_bytes for plan in plans)
    forms = {
        "the exact block in dense form": base
        + max(p.working_bytes("dense") for p in plans),
        "the exact block in gram form": base + max(p.working_bytes("gram") for p in plans),
        "products with the factored exact block": base,
        "fisherlab.approximate without the exact block": found.streamed(held=found.held),
    }
    if columns > 1:
        forms["about that much with MonteCarlo(1)"] = (
            single + found.result_bytes + found.collection.bytes
        )
    return [(what, size) for what, size in forms.items() if size <= found.budget]
