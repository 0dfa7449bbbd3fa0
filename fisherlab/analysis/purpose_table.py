"""What blocks and methods answered to purposes, as one labelled Dataset."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from fisherlab.analysis.cells import REFUSALS, reason, tried
from fisherlab.analysis.contests import in_common
from fisherlab.approximators import Approximator
from fisherlab.purposes import Answers, Measure, Purpose, Step

DRAWS = 4000  # whose standard deviation is known to 1 %
Key = tuple[str, str, str]  # layer, approximator, purpose
Pairs = dict[str | None, tuple[Answers, Answers]]  # by layer, and of all


@dataclass(eq=False)
class Answered:
    """Answers of every block and method ("" the exact), why one lacks, and costs."""

    answers: dict[Key, Answers] = field(default_factory=dict)
    reasons: dict[Key, str] = field(default_factory=dict)
    costs: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def add(self, other: Answered) -> None:
        """Take over what other blocks answered."""
        self.answers |= other.answers
        self.reasons |= other.reasons
        self.costs |= other.costs


def table(
    found: Answered,
    methods: Mapping[str, Approximator],
    purposes: Mapping[str, Purpose],
    layers: Mapping[str, Any],
    made: Mapping[str, Any],
) -> xr.Dataset:
    """Return the measures of what all blocks answered, labelled."""
    answers, reasons, names = found.answers, found.reasons, list(layers["layer"])
    labels = [(p, m) for p, one in purposes.items() for m in one.measures]
    rows = [*names, None]
    values = np.full((len(rows), len(methods), len(labels)), np.nan)
    shared = _Shared.of(layers, len(methods), labels)
    more: dict[str, Any] = {}
    errors = np.full((len(rows), len(methods), len(methods), len(purposes)), np.nan)
    for k, (p, purpose) in enumerate(purposes.items()):
        exact = {name: answers[name, "", p] for name in names if (name, "", p) in answers}
        paired: dict[str, Pairs] = {}
        for column, method in enumerate(methods):
            own = {n: answers[n, method, p] for n in exact if (n, method, p) in answers}
            paired[method], failed = _paired_off(purpose, exact, own, names)
            measured = _measured(purpose, paired[method], names, failed)
            reasons |= {(name, method, p): why for name, why in failed.items()}
            for place, (of, one) in enumerate(labels):
                for row, name in enumerate(rows):
                    if of == p and name in measured:
                        values[row, column, place] = measured[name][one.name]
        shared.add(p, purpose, paired, values[:-1])
        first = next(k for k, (of, _) in enumerate(labels) if of == p)
        errors[..., k] = [
            lead_errors(purpose, paired, name, values[row, :, first])
            for row, name in enumerate(rows)
        ]
        if isinstance(purpose, Step):
            more = _by_damping(purpose, paired, rows)
    _note_missing(values, names, list(methods), labels, reasons)
    ds = _labelled(layers, list(methods), purposes, labels, values, reasons)
    more |= _costs(found.costs, names, list(methods)) | shared.variables(list(purposes))
    over = "approximator", "rival", "purpose"
    more |= {"lead_error": (("layer", *over), errors[:-1]), "rival": list(methods)}
    more |= {"network_lead_error": (over, errors[-1])}
    return ds.assign(more).assign_attrs(made)


@dataclass(eq=False)
class _Shared:
    """What methods measure over the layers that nearly all of them have."""

    names: Sequence[str]
    sizes: Any
    labels: Sequence[tuple[str, Measure]]
    values: Any
    layers: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, layers: Mapping[str, Any], methods: int, labels: Sequence[tuple[str, Measure]]
    ) -> _Shared:
        """Begin with nothing; layers as `layer_coordinates` gives them."""
        sizes = np.array(layers["d_out"][1], dtype=float) * layers["d_in"][1]
        values = np.full((methods, len(labels)), np.nan)
        return cls(list(layers["layer"]), sizes, labels, values)

    def add(
        self, name: str, purpose: Purpose, paired: Mapping[str, Pairs], values: Any
    ) -> None:
        """Measure over the layers where methods have a number, by the first measure."""
        places = [place for place, (of, _) in enumerate(self.labels) if of == name]
        known = np.isfinite(values[:, :, places[0]])
        rows = self.layers[name] = in_common(self.sizes, known)
        kept = [layer for layer, there in zip(self.names, rows, strict=True) if there]
        together: dict[str, Pairs] = {method: {} for method in paired}
        for column, (method, asked) in enumerate(paired.items()):
            if not kept or not known[rows, column].all():
                continue
            try:
                mine, other = (purpose.joined([asked[n][k] for n in kept]) for k in (0, 1))
                measured = purpose.measure(mine, other)
            except REFUSALS:
                continue  # the status of the cells says why there is none for all layers
            self.values[column, places] = [measured[self.labels[k][1].name] for k in places]
            together[method] = {None: (mine, other)}
        self.errors[name] = lead_errors(purpose, together, None, self.values[:, places[0]])

    def variables(self, purposes: Sequence[str]) -> dict[str, Any]:
        """Return the numbers, and over which layers they are."""
        marks = np.array([self.layers[name] for name in purposes]).T
        errors = np.stack([self.errors[name] for name in purposes], -1)
        return {
            "common": (("approximator", "measure"), self.values),
            "common_lead_error": (("approximator", "rival", "purpose"), errors),
            "common_layers": (("layer", "purpose"), marks.astype(np.int8)),
        }


def _paired_off(
    purpose: Purpose,
    exact: Mapping[str, Answers],
    own: Mapping[str, Answers],
    layers: Sequence[str],
) -> tuple[Pairs, dict[str, str]]:
    """Set answers beside the exact ones, layer by layer and joined (None)."""
    asked: Pairs = {n: (exact[n], own[n]) for n in own}
    try:
        if own and len(own) == len(layers):
            mine, other = (purpose.joined([a[n] for n in layers]) for a in (exact, own))
            asked[None] = mine, other
    except REFUSALS as error:
        return asked, dict.fromkeys(layers, reason(error))
    return asked, {}


def _measured(
    purpose: Purpose, asked: Pairs, layers: Sequence[str], failed: dict[str, str]
) -> dict[str | None, dict[str, float]]:
    """Return the measures of every layer, and of all, noting why there are none."""
    measured: dict[str | None, dict[str, float]] = {}
    for name, both in asked.items():
        try:
            measured[name] = purpose.measure(*both)
        except REFUSALS as error:
            where = layers if name is None else [name]
            failed |= dict.fromkeys(where, reason(error))
    return measured


def lead_errors(
    purpose: Purpose, paired: Mapping[str, Pairs], row: str | None, values: Any
) -> Any:
    """Return the standard errors of the leads of methods over each other, NaN unknown.

    The examples that the exact block is made of are taken for independent ones, the
    methods as they are: an error is the norm of the difference of what every example
    moves two methods' first measures by. Where these may lie on either side of the best, it
    is that of their distances from it, which noise folds, see `folded`.

    Parameters
    ----------
    purpose
        One with `influences`; of others, and where these fail, nothing is known.
    paired
        Answers of the exact block and of a method, by method.
    row
        A layer, or None for all together.
    values
        The first measure of every method there.
    """
    errors = np.full((len(paired), len(paired)), np.nan)
    tell, measure = getattr(purpose, "influences", None), purpose.measures[0]
    moved = {}
    for column, asked in enumerate(paired.values()):
        told = tried(tell, *asked[row])[0] if tell is not None and row in asked else None
        if told is not None:
            moved[column] = told
    for a, first in moved.items():
        for b, second in moved.items():
            if not len(first) or first.shape != second.shape:
                continue
            if getattr(measure, "both_sides", False):
                errors[a, b] = folded(first, second, values[[a, b]] - measure.best)
            else:
                errors[a, b] = float((first - second).norm())
    return errors


def folded(first: Tensor, second: Tensor, gaps: Any) -> float:
    """Return the standard deviation of |x| − |y| for normal x and y with means `gaps`.

    Parameters
    ----------
    first, second
        What every example moves x and y by: their covariances are inner products.
    gaps
        The means.

    Examples
    --------
    >>> import torch
    >>> ones = torch.ones(4)
    >>> round(folded(ones, 2 * ones, np.array([50.0, 90.0])), 1)
    2.0
    >>> round(folded(ones, 2 * ones, np.array([-50.0, 90.0])), 1)
    6.0
    """
    size = float(first.norm())
    along = float(first @ second) / size if size else 0.0
    rest = float((second - along / size * first).norm() if size else second.norm())
    drawn, other = np.random.default_rng(0).standard_normal((2, DRAWS))
    x, y = gaps[0] + size * drawn, gaps[1] + along * drawn + rest * other
    return float((np.abs(x) - np.abs(y)).std())


def _by_damping(
    step: Step, paired: Mapping[str, Pairs], rows: Sequence[str | None]
) -> dict[str, Any]:
    """Return what steps reach at dampings of their own, and what the gradient does."""
    shares = np.full((len(rows), len(paired), len(step.ratios)), np.nan)
    gradient = np.full(len(rows), np.nan)
    for column, asked in enumerate(paired.values()):
        for row, name in enumerate(rows):
            if name in asked:
                shares[row, column], gradient[row] = step.by_damping(*asked[name])
    over = "approximator", "own_damping"
    return {
        "decrease": (("layer", *over), shares[:-1]),
        "network_decrease": (over, shares[-1]),
        "gradient_decrease": ("layer", gradient[:-1]),
        "network_gradient_decrease": gradient[-1],
        "own_damping": step.ratios,
    }


_NONE = "no number for this form, size or scale:"


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
        known = reasons.setdefault(key, _NONE)
        if known.startswith(_NONE):
            reasons[key] = f"{known} {measure.name}"


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
    layers: Mapping[str, Any],
    methods: Sequence[str],
    by_purpose: Mapping[str, Purpose],
    labels: Sequence[tuple[str, Measure]],
    values: Any,
    reasons: Mapping[Key, str],
) -> xr.Dataset:
    """Return everything with its coordinates."""
    purposes = list(by_purpose)
    status = [
        [[reasons.get((name, m, p), "ok") for p in purposes] for m in methods]
        for name in layers["layer"]
    ]
    facts: dict[str, list[str | float]] = {
        "of_purpose": [p for p, _ in labels],
        "title": [one.title for _, one in labels],
        "unit": [one.unit for _, one in labels],
        "best": [one.best for _, one in labels],
        "assured": [one.assured for _, one in labels],
        "meaning": [getattr(one, "meaning", "") for _, one in labels],
        "settles": [" | ".join(getattr(one, "settles", ())) for _, one in labels],
    }
    coords = {
        **layers,
        "approximator": list(methods),
        "measure": [f"{p}.{one.name}" for p, one in labels],
        "purpose": purposes,
        **_said_of(by_purpose.values()),
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
    return xr.Dataset(variables, coords)


def _said_of(purposes: Collection[Purpose]) -> dict[str, tuple[str, list[str]]]:
    """Return what purposes say of themselves beside their measures."""
    told = {"setting": ("setting", ""), "unheld": ("unheld", "")}
    told["lead_noise"] = "noise", "examples"
    return {
        name: ("purpose", [str(getattr(one, *asked)) for one in purposes])
        for name, asked in told.items()
    }
