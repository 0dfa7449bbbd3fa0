"""Every approximation beside the exact block in every purpose, as one labelled Dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from fisherlab.analysis.cells import REFUSALS, layer_coordinates, reason
from fisherlab.analysis.provenance import attributes
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.register import by_name
from fisherlab.metrics.pairs import Pair, paired
from fisherlab.purposes import Answers, Measure, Purpose
from fisherlab.statistics import Statistics

Key = tuple[str, str, str]  # layer, approximator, purpose


def judge(
    stats: Statistics,
    approximators: Sequence[str] | Mapping[str, Approximator] | None,
    purposes: Sequence[Purpose],
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

    Returns
    -------
    xarray.Dataset
        `value` over `layer`, `approximator` and `measure`, and `network` over
        `approximator` and `measure` for all layers together, block by block; the
        coordinate `purpose` of a measure says where it belongs, `best` what the exact
        block itself has, `assured` what is known beforehand. NaN where a value is not to
        be had, with the reason in `status` (`layer`, `approximator`, `purpose`).

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
    answers, reasons = _answered(stats, methods, by_purpose)
    labels = [(p, m) for p, one in by_purpose.items() for m in one.measures]
    rows = [*stats, None]
    values = np.full((len(rows), len(methods), len(labels)), np.nan)
    for p, purpose in by_purpose.items():
        exact = {name: answers[name, "", p] for name in stats if (name, "", p) in answers}
        for column, method in enumerate(methods):
            own = {n: answers[n, method, p] for n in exact if (n, method, p) in answers}
            measured: dict[str | None, dict[str, float]] = {
                n: purpose.measure(exact[n], own[n]) for n in own
            }
            if own and len(own) == len(stats):
                both = (purpose.joined([a[n] for n in stats]) for a in (exact, own))
                measured[None] = purpose.measure(*both)
            for place, (of, one) in enumerate(labels):
                for row, name in enumerate(rows):
                    if of == p and name in measured:
                        values[row, column, place] = measured[name][one.name]
    return _labelled(stats, methods, labels, values, reasons)


def _answered(
    stats: Statistics,
    methods: Mapping[str, Approximator],
    purposes: Mapping[str, Purpose],
) -> tuple[dict[Key, Answers], dict[Key, str]]:
    """Return the answers of every block and method ("" the exact), or why there is none."""
    answers: dict[Key, Answers] = {}
    reasons: dict[Key, str] = {}
    for name, layer in stats.items():
        exact = ExactBlock()(layer).to(torch.float64)
        pairs = {"": Pair(exact, exact)}
        for method, approximator in methods.items():
            try:
                pairs[method] = paired("compare", exact, approximator(layer), mixed=False)
            except REFUSALS as error:
                reasons |= {(name, method, p): reason(error) for p in purposes}
        for p, purpose in purposes.items():
            for method, pair in pairs.items():
                try:
                    answers[name, method, p] = purpose.answers(layer, pair)
                except REFUSALS as error:
                    reasons[name, method, p] = reason(error)
            if (name, "", p) in reasons:  # nothing to hold a method against
                why = f"the exact block: {reasons[name, '', p]}"
                reasons |= {(name, method, p): why for method in methods}
    return answers, reasons


def _labelled(
    stats: Statistics,
    methods: Mapping[str, Approximator],
    labels: Sequence[tuple[str, Measure]],
    values: Any,
    reasons: Mapping[Key, str],
) -> xr.Dataset:
    """Return everything with its coordinates."""
    purposes = list(dict.fromkeys(p for p, _ in labels))
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
