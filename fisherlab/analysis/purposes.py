"""Every approximation beside the exact block in every purpose, as one labelled Dataset."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from fisherlab.analysis.allowances import Allowance
from fisherlab.analysis.cells import REFUSALS, attributes, layer_coordinates, reason
from fisherlab.analysis.demands import left_out
from fisherlab.analysis.metric_table import solve_flops
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.metrics.pairs import Pair, paired
from fisherlab.operators import Operator
from fisherlab.operators.dampings import parsed
from fisherlab.purposes import Answers, Measure, Purpose
from fisherlab.statistics import LayerStatistics, Statistics

Key = tuple[str, str, str]  # layer, approximator, purpose


def judge(
    stats: Statistics,
    approximators: Chosen,
    purposes: Sequence[Purpose],
    allowance: Allowance | None = None,
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

    Returns
    -------
    xarray.Dataset
        `value` over `layer`, `approximator` and `measure`, and `network` over
        `approximator` and `measure` for all layers together, block by block; the
        coordinate `purpose` of a measure says where it belongs, `best` what the exact
        block itself has, `assured` what is known beforehand; `setting` says at which λ a
        purpose is judged. NaN where a value is not to be had, with the reason in `status`
        (`layer`, `approximator`, `purpose`). `stored_numbers` and `solve_flops` are the
        costs, `exact_solve_flops` that of the exact block.

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
    by_purpose = {one.name: one for one in purposes}
    if not purposes or len(by_purpose) < len(purposes):
        raise ValueError(
            f"compare: purpose={[one.name for one in purposes]} was given; one purpose or "
            "more, each once, are expected."
        )
    methods = by_name(approximators)
    skipped = {} if allowance is None else left_out(stats, methods, purposes, allowance)
    answers, reasons, costs = _answered(stats, methods, by_purpose, skipped)
    labels = [(p, m) for p, one in by_purpose.items() for m in one.measures]
    rows = [*stats, None]
    values = np.full((len(rows), len(methods), len(labels)), np.nan)
    for p, purpose in by_purpose.items():
        exact = {name: answers[name, "", p] for name in stats if (name, "", p) in answers}
        for column, method in enumerate(methods):
            own = {n: answers[n, method, p] for n in exact if (n, method, p) in answers}
            measured, failed = _measured(purpose, exact, own, list(stats))
            reasons |= {(name, method, p): why for name, why in failed.items()}
            for place, (of, one) in enumerate(labels):
                for row, name in enumerate(rows):
                    if of == p and name in measured:
                        values[row, column, place] = measured[name][one.name]
    _note_missing(values, list(stats), list(methods), labels, reasons)
    found = _labelled(stats, methods, by_purpose, labels, values, reasons)
    return found.assign(_costs(costs, list(stats), list(methods)))


def _measured(
    purpose: Purpose,
    exact: Mapping[str, Answers],
    own: Mapping[str, Answers],
    layers: Sequence[str],
) -> tuple[dict[str | None, dict[str, float]], dict[str, str]]:
    """Return the measures of every layer, and of all (None), or why there are none."""
    asked: dict[str | None, tuple[Answers, Answers]] = {n: (exact[n], own[n]) for n in own}
    measured: dict[str | None, dict[str, float]] = {}
    failed: dict[str, str] = {}
    try:
        if own and len(own) == len(layers):
            mine, other = (purpose.joined([a[n] for n in layers]) for a in (exact, own))
            asked[None] = mine, other
    except REFUSALS as error:
        failed |= {name: reason(error) for name in layers}
    for name, both in asked.items():
        try:
            measured[name] = purpose.measure(*both)
        except REFUSALS as error:
            where = layers if name is None else [name]
            failed |= {n: reason(error) for n in where}
    return measured, failed


def _note_missing(
    values: Any,
    layers: Sequence[str],
    methods: Sequence[str],
    labels: Sequence[tuple[str, Measure]],
    reasons: dict[Key, str],
) -> None:
    """Say which measures of an answered cell have no number."""
    for row, column, place in np.argwhere(np.isnan(values[:-1])):
        purpose, measure = labels[place]
        key = layers[row], methods[column], purpose
        known = reasons.setdefault(key, "not to be had for this form and size:")
        if known.startswith("not to be had"):
            reasons[key] = f"{known} {measure.name}"


def _answered(
    stats: Statistics,
    methods: Mapping[str, Approximator],
    purposes: Mapping[str, Purpose],
    skipped: Mapping[Key, str],
) -> tuple[dict[Key, Answers], dict[Key, str], dict[tuple[str, str], tuple[float, float]]]:
    """Return answers of every block and method ("" the exact), why one lacks, and costs."""
    answers: dict[Key, Answers] = {}
    reasons = dict(skipped)
    costs: dict[tuple[str, str], tuple[float, float]] = {}
    for name, layer in stats.items():
        exact = ExactBlock()(layer).to(torch.float64)
        asked = {
            method: [p for p in purposes if (name, method, p) not in skipped]
            for method in methods
        }
        pairs = {"": Pair(exact, exact)} if any(asked.values()) else {}
        for method, wanted in asked.items():
            try:
                if wanted:
                    pairs[method] = _paired(exact, methods[method], layer)
            except REFUSALS as error:
                reasons |= {(name, method, p): reason(error) for p in wanted}
        for p, purpose in purposes.items():
            if all((name, method, p) in skipped for method in methods):
                continue
            for method, pair in pairs.items():
                key, known = (name, method, p), answers.get((name, "", p))
                if pair.same and known is not None:  # the exact block has answered
                    answers[key] = known
                    reasons.pop(key, None)
                elif key not in skipped:
                    _answer(answers, reasons, key, layer, pair, purpose)
            if pairs and (name, "", p) not in answers:  # nothing to hold a method against
                why = f"the exact block: {reasons[name, '', p]}"
                reasons |= {(name, method, p): why for method in methods}
        for method, pair in pairs.items():
            costs[name, method] = _cost(pair.source, exact, purposes.values())
    return answers, reasons, costs


def _paired(exact: Operator, method: Approximator, layer: LayerStatistics) -> Pair:
    """Set a method beside the exact block, which stands for itself."""
    if isinstance(method, ExactBlock):
        return Pair(exact, exact)
    return paired("compare", exact, method(layer), mixed=False)


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


def _costs(
    costs: Mapping[tuple[str, str], tuple[float, float]],
    layers: Sequence[str],
    methods: Sequence[str],
) -> dict[str, Any]:
    unknown = np.nan, np.nan
    table = np.array(
        [[costs.get((name, m), unknown) for m in ("", *methods)] for name in layers]
    )
    cell = "layer", "approximator"
    return {
        "stored_numbers": (cell, table[:, 1:, 0]),
        "solve_flops": (cell, table[:, 1:, 1]),
        "exact_solve_flops": ("layer", table[:, 0, 1]),
    }


def _labelled(
    stats: Statistics,
    methods: Mapping[str, Approximator],
    by_purpose: Mapping[str, Purpose],
    labels: Sequence[tuple[str, Measure]],
    values: Any,
    reasons: Mapping[Key, str],
) -> xr.Dataset:
    """Return everything with its coordinates."""
    purposes = list(by_purpose)
    settings = [str(getattr(one, "setting", "")) for one in by_purpose.values()]
    status = [
        [[reasons.get((name, m, p), "ok") for p in purposes] for m in methods]
        for name in stats
    ]
    facts: dict[str, list[str | float]] = {
        "of_purpose": [p for p, _ in labels],
        "title": [one.title for _, one in labels],
        "unit": [one.unit for _, one in labels],
        "best": [one.best for _, one in labels],
        "assured": [one.assured for _, one in labels],
    }
    coords = {
        **layer_coordinates(stats),
        "approximator": list(methods),
        "measure": [f"{p}.{one.name}" for p, one in labels],
        "purpose": purposes,
        "setting": ("purpose", settings),
        **{name: ("measure", told) for name, told in facts.items()},
    }
    variables = {
        "value": (("layer", "approximator", "measure"), values[:-1]),
        "network": (("approximator", "measure"), values[-1]),
        "status": (
            ("layer", "approximator", "purpose"),
            np.array(status, dtype=object),
        ),
    }
    made = attributes(stats, methods, analysis="purposes", purposes=json.dumps(purposes))
    return xr.Dataset(variables, coords, made)
