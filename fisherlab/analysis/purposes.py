"""Every approximation beside the exact block in every purpose, as one labelled Dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from fisherlab.analysis.cells import REFUSALS, attributes, layer_coordinates, reason
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.metrics.pairs import Pair, paired
from fisherlab.purposes import Answers, Measure, Purpose
from fisherlab.statistics import Statistics

Key = tuple[str, str, str]  # layer, approximator, purpose
TIED = 1e-6  # distances from the best that differ by less are called equal


def judge(
    stats: Statistics,
    approximators: Chosen,
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
            measured, failed = _measured(purpose, exact, own, list(stats))
            reasons |= {(name, method, p): why for name, why in failed.items()}
            for place, (of, one) in enumerate(labels):
                for row, name in enumerate(rows):
                    if of == p and name in measured:
                        values[row, column, place] = measured[name][one.name]
    _note_missing(values, list(stats), list(methods), labels, reasons)
    return _labelled(stats, methods, labels, values, reasons)


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


def verdict(found: xr.Dataset) -> list[str]:
    """Say for every purpose which approximation serves it best, and which not at all.

    Ranked by the first measure of a purpose for all layers together, by how far it is
    from what the exact block has. Approximations without a number in some layer are not
    ranked: the sentence names the layers and the share of the parameters in them.

    Parameters
    ----------
    found
        What `compare` returned with `purpose=`.

    Returns
    -------
    list of str
        One sentence or more a purpose.

    Raises
    ------
    ValueError
        If the table holds no purposes.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> found = fl.compare(stats, ["kfac", "diagonal"], purpose=fl.Matrix())
    >>> verdict(found)[0].split(",")[0]
    'matrix: kfac is the closest to the exact block'
    """
    if "of_purpose" not in found.coords:
        raise ValueError(
            "verdict: the table holds no purposes; compare(..., purpose=[...]) makes one."
        )
    return [_verdict(found, str(purpose)) for purpose in found["purpose"].values]


def _verdict(found: xr.Dataset, purpose: str) -> str:
    mine = found.isel(measure=(found["of_purpose"] == purpose).values)
    first = mine.isel(measure=0)
    methods = [m for m in first["approximator"].values.tolist() if not _exact(first, m)]
    numbers = {m: float(first["network"].sel(approximator=m)) for m in methods}
    best, title = float(first["best"]), str(first["title"].item())
    usable = [m for m in methods if np.isfinite(numbers[m])]
    usable.sort(key=lambda m: abs(numbers[m] - best))
    said = [_ranked(usable, numbers, best, title)]
    said += [_unusable(found, purpose, m) for m in methods if m not in usable]
    return f"{purpose}: " + "; ".join(said) + "."


def _exact(first: xr.Dataset, method: str) -> bool:
    made = json.loads(first.attrs["approximators"])
    return str(made[method]).startswith("ExactBlock")


def _ranked(
    usable: Sequence[str], numbers: Mapping[str, float], best: float, title: str
) -> str:
    """Say who is closest to the best, and who is next."""
    if not usable:
        return "no approximation has a number in every layer"
    gaps = {m: abs(numbers[m] - best) for m in usable}
    tied = [m for m in usable if gaps[m] <= gaps[usable[0]] + TIED]
    who = " and ".join(tied)
    verb = "are" if len(tied) > 1 else "is"
    said = f"{who} {verb} the closest to the exact block, {title} {numbers[tied[0]]:.3g}"
    rest = usable[len(tied) :]
    return f"{said}, then {rest[0]} with {numbers[rest[0]]:.3g}" if rest else said


def _unusable(found: xr.Dataset, purpose: str, method: str) -> str:
    """Say where a method has no number, why, and how much of the network that is."""
    status = found["status"].sel(approximator=method, purpose=purpose)
    failed = status["layer"].values[(status != "ok").values].tolist()
    sizes = found["d_out"] * found["d_in"]
    share = float(sizes.sel(layer=failed).sum() / sizes.sum())
    where = ", ".join(map(str, failed[:3])) + (", …" if len(failed) > 3 else "")
    why = str(status.sel(layer=failed[0]).item()) if failed else "no number for the network"
    why = why.removesuffix(".")
    return f"{method} has none in {where} ({share:.0%} of the parameters): {why}"
