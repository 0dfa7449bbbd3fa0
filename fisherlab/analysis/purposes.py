"""Every approximation beside the exact block in every purpose, as one labelled Dataset.

What that costs cell by cell is counted before anything is computed. Straight from a model,
layers are collected, asked and freed in turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from fisherlab.analysis.allowances import Allowance, Schedule, chosen
from fisherlab.analysis.cells import (
    REFUSALS,
    Telling,
    attributes,
    layer_coordinates,
    located,
    reason,
    teller,
    watched,
)
from fisherlab.analysis.counts import Work, counted, norm, own, product, shared, traced
from fisherlab.analysis.layerwise import Source
from fisherlab.analysis.metric_table import solve_flops
from fisherlab.analysis.purpose_table import Answered, Key, table
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.base import facts, operator_of
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.errors import BudgetError
from fisherlab.metrics.pairs import Pair, paired
from fisherlab.numerics.devices import give_back
from fisherlab.numerics.linalg import decomposed_once
from fisherlab.operators import FactoredFisher, KroneckerSum, Operator
from fisherlab.operators.base import parsed
from fisherlab.purposes import Answers, Demand, Purpose
from fisherlab.purposes.base import solved_together
from fisherlab.purposes.laplace import drawn_examples
from fisherlab.samples import Samples
from fisherlab.statistics import LayerStatistics, Statistics


def judge(
    stats: Statistics,
    approximators: Chosen,
    purposes: Sequence[Purpose],
    allowance: Allowance | None = None,
    progress: Telling = False,
) -> xr.Dataset:
    """Hold every approximation against the exact block in what it is used for.

    Parameters
    ----------
    stats
        Statistics the approximations are made from.
    approximators
        Names, or a mapping of names to values; all named ones by default.
    purposes
        What the matrix is used for: `fl.Step`, `fl.Laplace`, `fl.Influence`,
        `fl.Pruning`, `fl.EWC`, `fl.Sharpness`, `fl.Matrix`, or a value of one's own.
    allowance
        What all may take, and each cell by itself; the dearest cells that exceed it are
        left out, and their status says so. Everything is computed by default.
    progress
        As for `compare`.

    Returns
    -------
    xarray.Dataset
        `value` over `layer`, `approximator` and `measure`, and `network` over
        `approximator` and `measure` for all layers together, block by block; the
        coordinate `purpose` of a measure says where it belongs, `best` what the exact
        block itself has, `assured` what is known beforehand and `settles` of
        whom; `setting` says at which λ a
        purpose is judged. NaN where a value is not to be had, with the reason in `status`
        (`layer`, `approximator`, `purpose`). `common` is as `network`, over the layers
        `common_layers` (`layer`, `purpose`): nine tenths of the parameters at least, where
        several methods have a number of the first measure. With `fl.Step`, `decrease` and
        `network_decrease` are the shares of the best decrease over `own_damping`, a
        method's own μ over the common λ, and `gradient_decrease` and
        `network_gradient_decrease` those of the gradient. `lead_error` (`layer`,
        `approximator`, `rival`, `purpose`), `network_lead_error` and `common_lead_error`
        are standard errors of how much nearer to `best` one method is than another in the
        first measure, the methods held as they are: over the examples of the exact block,
        or what the coordinate `lead_noise` names; NaN where a purpose does not tell, for
        the reason in `unheld` if it has one. `stored_numbers` and
        `solve_flops` are the costs, `exact_solve_flops` that of the exact block.

    Raises
    ------
    ValueError
        For unknown names, no purpose, or two of one name.

    Notes
    -----
    The exact block answers once a layer and purpose, every method once more.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> found = judge(stats, ["kfac"], [fl.purposes.Sharpness()])
    >>> found["measure"].values.tolist()
    ['sharpness.top_ratio', 'sharpness.trace_ratio', 'sharpness.rank_ratio']
    """
    by_purpose, methods = each_once(purposes), by_name(approximators)
    found = answered(stats, methods, by_purpose, allowance, progress)
    made = attributes(stats, methods, **told(by_purpose))
    return table(found, methods, by_purpose, layer_coordinates(stats), made)


def each_once(purposes: Iterable[Any]) -> dict[str, Purpose]:
    """Return purposes by name.

    Raises
    ------
    ValueError
        For none, or two of one name.
    TypeError
        For what is no purpose, such as a class or a name.
    """
    purposes = [purposes] if isinstance(purposes, str) else list(purposes)
    for one in purposes:
        if isinstance(one, type) or not callable(getattr(one, "answers", None)):
            raise TypeError(
                f"compare: purpose={one!r}: a value is expected, of fl.Step, fl.Laplace, "
                "fl.Influence, fl.Pruning, fl.EWC, fl.Sharpness or a class like them, such "
                "as fl.Laplace(1.0, data_size=200)."
            )
    by_purpose = {one.name: one for one in purposes}
    if not purposes or len(by_purpose) < len(purposes):
        raise ValueError(
            f"compare: purpose={[one.name for one in purposes]} was given; one purpose or "
            "more, each once, are expected."
        )
    return by_purpose


def told(purposes: Mapping[str, Purpose]) -> dict[str, str]:
    """Return what attributes say of the analysis."""
    return {"analysis": "purposes", "purposes": json.dumps(list(purposes))}


def answered(
    stats: Statistics,
    methods: Mapping[str, Approximator],
    purposes: Mapping[str, Purpose],
    allowance: Allowance | None,
    progress: Telling = False,
) -> Answered:
    """Ask every block and method for every purpose, within an allowance."""
    asked_for = list(purposes.values())
    skipped = {} if allowance is None else left_out(stats, methods, asked_for, allowance)
    told = Answered(reasons=dict(skipped))
    answers, reasons, costs = told.answers, told.reasons, told.costs
    for name in watched(stats, progress):
        layer = stats[name]
        exact = ExactBlock()(layer).to(torch.float64)
        asked = {
            method: [p for p in purposes if (name, method, p) not in skipped]
            for method in methods
        }
        with decomposed_once(*layer.rows):  # for all methods
            for method in ("", *methods) if any(asked.values()) else ():
                approximator = methods.get(method, ExactBlock())
                itself = isinstance(approximator, ExactBlock)
                if not (wanted := list(purposes) if itself else asked[method]):
                    continue
                try:  # what a pair keeps is let go before the next one
                    approx = exact if itself else operator_of(approximator, layer)
                    pair = paired("compare", exact, approx, mixed=False)
                except REFUSALS as error:
                    reasons.update({(name, method, p): reason(error) for p in wanted})
                    continue
                for p in wanted:
                    key, known = (name, method, p), answers.get((name, "", p))
                    if all((name, one, p) in skipped for one in methods):
                        continue
                    if pair.same and known is not None:  # the exact block has answered
                        answers[key] = known
                        reasons.pop(key, None)
                    elif method and known is None:  # nothing to be held against
                        reasons[key] = f"the exact block: {reasons[name, '', p]}"
                    else:
                        _answer(answers, reasons, key, layer, pair, purposes[p])
                for p in purposes:
                    if p in wanted:
                        continue
                    if why := _indefinite(pair, purposes[p]):
                        reasons[name, method, p] = why
                costs[name, method] = _cost(pair.source, exact, purposes.values())
        give_back()  # answers stay for all layers, what led to them does not
    return told


def _answer(
    answers: dict[Key, Answers],
    reasons: dict[Key, str],
    key: Key,
    layer: LayerStatistics,
    pair: Pair,
    purpose: Purpose,
) -> None:
    """Keep what one matrix answers, or the reason why a part or all of it lacks."""
    try:
        answers[key] = purpose.answers(layer, pair)
    except REFUSALS as error:
        reasons[key] = reason(error)
    else:
        if "why" in answers[key]:
            reasons[key] = reason(answers[key]["why"])


def _indefinite(pair: Pair, purpose: Purpose) -> str:
    """Say that a sum has no inverse at the λ of a purpose, where others found that out."""
    given, approx = getattr(purpose, "damping", None), pair.approx
    if given is None or "smallest_eigenvalue" not in vars(approx):
        return ""
    assert isinstance(approx, KroneckerSum)
    try:
        approx.require_positive(parsed(given, pair.exact).value)
    except REFUSALS as error:
        return reason(error)
    return ""


def _cost(
    approx: Operator, exact: Operator, purposes: Iterable[Purpose]
) -> tuple[float, float]:
    """Return stored numbers, and the flops of a solve where a purpose asks for solves."""
    given = next((d for p in purposes if (d := getattr(p, "damping", None))), None)
    if given is None:
        return approx.stored_numbers, np.nan
    try:
        damped = parsed(given, exact).value
        return approx.stored_numbers, solve_flops(approx, damped, formed=False)
    except REFUSALS:
        return approx.stored_numbers, np.nan


USUAL = Demand(traces=True)


def left_out(
    stats: Statistics,
    methods: Mapping[str, Approximator],
    purposes: Sequence[Purpose],
    allowance: Allowance,
) -> dict[tuple[str, str, str], str]:
    """Return (layer, approximator, purpose) to the reason why it exceeds the allowance.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> methods = {"kfac": fl.KFAC()}
    >>> left_out(stats, methods, [fl.Matrix()], Allowance(1e12, 1e9))
    {}
    >>> list(left_out(stats, methods, [fl.Matrix()], Allowance(10.0, 1e9)))
    [('weight', 'kfac', 'matrix')]
    """
    cells, common, built = {}, {}, {}
    for name, layer in stats.items():
        samples = ExactBlock()(layer).samples.counted_as
        for method, approximator in methods.items():
            built[name, method] = own(samples, approximator, "matrix")
        for purpose in purposes:
            asked = demand(purpose, layer)
            common[name, purpose.name] = _exact(samples, asked)
            for method, approximator in methods.items():
                cells[name, method, purpose.name] = _method(samples, approximator, asked)
    return dict(chosen(cells, common, len(methods), allowance, built).reasons)


def in_closed_form(
    samples: Iterable[Samples], methods: Iterable[Approximator], asked: Iterable[Demand]
) -> float:
    """Return the multiply-adds of demands on methods whose solves have a closed form.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> from fisherlab.samples import OuterSamples
    >>> samples = OuterSamples(torch.ones(9, 4), torch.ones(1, 9, 3))
    >>> in_closed_form([samples], [fl.Diagonal()], [Demand()]) > 0
    True
    """
    closed = [method for method in methods if _is_closed(method)]
    demands, total = list(asked), 0.0
    for s in samples:
        total += sum(own(s, method, "matrix").flops for method in closed)
        for one in demands:
            total += _exact(s, one).flops
            total += sum(_method(s, method, one).flops for method in closed)
    return total


def _is_closed(method: Approximator) -> bool:
    """Whether solves have a closed form: all but those of sums of several products."""
    result = facts(method).result
    one = result == "terms" and getattr(method, "terms", 0) == 1
    return one or result in ("factors", "entries", "blocks")


def demand(purpose: Purpose, layer: LayerStatistics) -> Demand:
    """Return what a purpose says it asks for, or what one is taken to ask for."""
    counted = getattr(purpose, "demand", None)
    return USUAL if counted is None else counted(layer)


def _exact(s: Samples, asked: Demand) -> Work:
    """Count the norm, one solve or inverse of the exact block, and its further solves."""
    work = shared(s, "matrix") + Work(asked.flops)
    if asked.groups:
        work = work + Work(2 * norm(s))  # all pairs of examples, not half of them
    if asked.traces:
        work = work + shared(s, "damping")
    elif asked.divergences:
        work = work + traced(s)
    elif asked.dampings or asked.weights:
        work = work + shared(s, "gradient")
    solved = asked.weights + _influences(s, asked) / 2  # these are not refined
    return work + Work(solved * exact_solve(s))


def _influences(s: Samples, asked: Demand) -> int:
    """Count the gradients of examples that are solved for."""
    if not asked.influences:
        return 0
    return s.columns * len(drawn_examples(FactoredFisher(s, s.examples)))


def exact_solve(s: Samples) -> float:
    """Count a solve with the exact block once it is factorised, refined and checked.

    Examples
    --------
    >>> import torch
    >>> from fisherlab.samples import OuterSamples
    >>> exact_solve(OuterSamples(torch.ones(9, 4), torch.ones(2, 9, 3)))
    576.0
    """
    p, m = s.weight_shape[0] * s.weight_shape[1], s.total
    formed = 1 + (s.positions - 1) / solved_together(s)  # formed once for all of these
    return 4.0 * min(p * p, 2 * p * m + m * m) * formed


def _method(s: Samples, method: Approximator, asked: Demand) -> Work:
    """Count what a purpose takes of a method once that is built."""
    work = Work((asked.products + asked.forms / 2) * product(s) + asked.flops)
    if facts(method).result == "exact":
        return work
    o, i = s.weight_shape
    work = work + Work(2.0 * _influences(s, asked) * o * i * (o + i))
    cell = counted(s, method)
    whole = asked.traces or asked.divergences
    if asked.dampings or asked.weights or whole:
        work = work + cell.prepared() + Work(asked.dampings * cell.one_more())
    if whole:
        work = work + (cell.against_inverse() if asked.traces else cell.divergences())
    return work + Work(asked.weights * cell.further(whole))


def judge_model(
    source: Source,
    methods: Mapping[str, Approximator],
    purposes: Sequence[Purpose],
    limit: int,
    progress: Telling = False,
) -> xr.Dataset:
    """Return the table of `judge` without the statistics of all layers at once.

    Parameters
    ----------
    source
        Model and data.
    methods, purposes
        As for `judge`.
    limit
        Bytes for statistics and what is formed of them; a layer that does not fit has the
        bytes in its status. What the layers answer is kept beside it.
    progress
        As for `compare`.
    """
    asked = each_once(purposes)
    plan = Schedule.of(*source.plans(limit), methods, limit, False)
    found, tell = Answered(), teller(progress, len(plan.plans))
    refused = dict(plan.refused)
    for group in plan.groups:
        for some, one in _answered(source, group, methods, asked, limit):
            if isinstance(one, Answered):
                found.add(one)
            else:
                refused |= dict.fromkeys(some, f"not served: {reason(one)}")
            for name in some:
                tell(name)
    for name, why in refused.items():
        found.reasons.update({(name, m, p): why for m in methods for p in asked})
    for name in plan.refused:
        tell(name)
    rows = {
        name: (*one.weight_shape, one.positions, one.kind)
        for name, one in plan.plans.items()
    }
    made = source.attributes(plan, methods, **told(asked)) | {"budget_bytes": limit}
    return table(found, methods, asked, located(rows), made)


def _answered(
    source: Source,
    group: Sequence[str],
    methods: Mapping[str, Approximator],
    purposes: Mapping[str, Purpose],
    limit: int,
) -> Iterator[tuple[Sequence[str], Answered | Exception]]:
    """Yield what layers answer, one by one where they do not fit together."""
    try:
        stats = source.collected(group, limit)
    except (BudgetError, MemoryError) as error:
        if len(group) == 1:
            yield group, error
            return
        for name in group:
            yield from _answered(source, [name], methods, purposes, limit)
    else:
        yield group, answered(stats, methods, purposes, Allowance.of(None, limit))
