r"""What a table says in words: who serves a purpose, at what cost, and at which damping.

The step p = (F̂ + λI)⁻¹v is held against the exact one in the quadratic model of
P = F + λI, its length chosen best, for all layers together:

.. math:: s(λ) = \frac{(\sum v^T p)^2}{\sum p^T P p \; \sum v^T P^{-1} v}

The gradient itself is p = v; where s is below its share, the step is worse than that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr

from fisherlab.analysis.contests import HELD, SOLVE, Contest, Grid, LeadErrors
from fisherlab.analysis.files import judged
from fisherlab.showing import kind_of, percent, quoted

SERVES: Final = 0.9  # share of the exact decrease from which on a step is called good
NEEDED: Final = (
    "slope",
    "curvature",
    "exact_slope",
    "gradient_slope",
    "gradient_curvature",
)
TIED: Final = 1e-6  # shares that differ by less are called equal
SYMBOLS: Final = {"absolute": "λ", "relative": "α", "factored": "factored λ", "own": "μ/λ"}


@dataclass(frozen=True, eq=False)
class Range:
    """What the steps of one approximation reach at every damping.

    Parameters
    ----------
    layers
        Whether it has a step there at some damping; the sums run over these.
    share, gradient
        Of the exact decrease, by the step and by the gradient (dampings); NaN where a
        layer has no step.
    lacking
        Whether a layer has no step (layers, dampings).
    """

    layers: Grid
    share: Grid
    gradient: Grid
    lacking: Grid


def ranges(found: xr.Dataset) -> dict[str, Range]:
    """Return the shares of every approximation of a sweep; {} without a gradient.

    Examples
    --------
    >>> ranges(xr.Dataset())
    {}
    """
    if not set(NEEDED) <= set(found.data_vars):
        return {}
    best, plain, bent = (
        found[name].values
        for name in ("exact_slope", "gradient_slope", "gradient_curvature")
    )
    told = {}
    for method in map(str, found["approximator"].values):
        part = found[["slope", "curvature"]].sel(approximator=method)
        slope, curvature = (
            part[name].transpose("layer", "damping").values
            for name in ("slope", "curvature")
        )
        there = np.isfinite(slope) & np.isfinite(best)
        rows = there.any(axis=1)
        goal = best[rows].sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = slope[rows].sum(0) ** 2 / (curvature[rows].sum(0) * goal)
            gradient = plain[rows].sum() ** 2 / (bent[rows].sum(0) * goal)
        told[method] = Range(rows, share, gradient, ~there & rows[:, None])
    return told


def damping_verdict(found: xr.Dataset) -> list[str]:
    """Say at which dampings the step of every approximation serves, and where not.

    Parameters
    ----------
    found
        What `sweep` returned with a gradient.

    Returns
    -------
    list of str
        A line for the gradient and one for every approximation; [] without a gradient.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model, data = torch.nn.Linear(3, 2).double(), (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(model, data, fl.Categorical())
    >>> v = {"weight": torch.ones(2, 4).double()}
    >>> found = fl.sweep(stats, ["exact"], damping=[0.1, 1.0], gradient=v)
    >>> damping_verdict(found)[1]
    '`exact` reaches 90 % of it at every λ; nowhere worse than the gradient.'
    """
    if not ranges(found):
        return []
    if found["damping"].dtype.kind in "iuf":
        found = found.sortby("damping")
    told = ranges(found)
    if not (found["exact_slope"] > 0).any():
        return ["The gradient is zero: no step is better than another."]
    words = _Words.of(found)
    whole = next((one for one in told.values() if one.layers.all()), None)
    lines = []
    if whole is not None:
        at = words.where(whole.gradient >= SERVES)
        reach = (
            f"reaches {percent(SERVES)} of the exact step's decrease {at}"
            if at
            else (
                f"reaches at most {percent(float(np.nanmax(whole.gradient)))} of the exact "
                "step's decrease"
            )
        )
        lines.append(f"The gradient itself {reach}.")
    return lines + [words.line(name, one) for name, one in told.items()]


def best_dampings(table: xr.Dataset) -> list[str]:
    """Say which damping of its own serves the step of a method best, and which harm.

    Parameters
    ----------
    table
        What `compare` returned with `purpose=fl.Step(...)`.

    Returns
    -------
    list of str
        A line an approximation, one for all without a best μ; [] without steps.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model, data = torch.nn.Linear(3, 2).double(), (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(model, data, fl.Categorical())
    >>> step = fl.Step({"weight": torch.ones(2, 4).double()}, 0.1, grid=[0.1, 10.0])
    >>> best_dampings(fl.compare(stats, ["kfac"], purpose=step))[0].partition(" at ")[0]
    '`kfac` is best'
    """
    if "network_decrease" not in table:
        return []
    ratios = table["own_damping"].values
    words = _Words((), np.ones(0), [f"{ratio:.3g}" for ratio in ratios], "own")
    plain = float(table["network_gradient_decrease"])
    lines, without = [], []
    for name in [str(n) for n in table["approximator"].values if n != "exact"]:
        share = table["network_decrease"].sel(approximator=name).values
        if not np.isfinite(share).any():
            without.append(name)
            continue
        best = int(np.nanargmax(share))
        better = words.where(share > plain + TIED)
        lines.append(
            f"`{name}` is best at μ = {_over(ratios[best])} ({share[best]:.3g}), "
            + (f"better than the gradient {better}" if better else "nowhere better")
        )
    if without:
        verb = "have" if len(without) > 1 else "has"
        lines.append(f"{quoted(without)} {verb} no μ with a step in every layer")
    return lines


def _over(ratio: float) -> str:
    return "λ" if ratio == 1 else f"{ratio:.3g} λ"


@dataclass(frozen=True, eq=False)
class _Words:
    layers: Sequence[str]
    sizes: Grid
    labels: Sequence[str]
    kind: str

    @classmethod
    def of(cls, found: xr.Dataset) -> _Words:
        labels = [
            one if isinstance(one, str) else f"{one:.3g}"
            for one in found["damping"].values.tolist()
        ]
        sizes = found["d_out"].values * found["d_in"].values
        kind = str(found.attrs.get("damping_kind", "absolute"))
        kind = kind if found["damping"].dtype.kind in "iuf" else "mixed"
        return cls([str(n) for n in found["layer"].values], sizes, labels, kind)

    def line(self, name: str, one: Range) -> str:
        """Say of an approximation where it serves, where it harms, and where it is not."""
        if not np.isfinite(one.share).any():
            lacking = one.lacking.all(axis=1) | ~one.layers
            at = "any layer" if lacking.all() else "all layers at once"
            return f"`{name}` has at no damping of the sweep a step in {at}."
        told = [f"`{name}` {self._reach(one)}"]
        if not one.layers.all():
            share = percent(float(self.sizes[one.layers].sum() / self.sizes.sum()))
            told[0] += (
                f" (of {one.layers.sum()} of {len(self.layers)} layers, {share} of the "
                "parameters; it has none of the others)"
            )
        worse = self.where(one.share < one.gradient - TIED)
        told.append(
            f"worse than the gradient {worse}"
            if worse
            else "nowhere worse than the gradient"
        )
        if none := self.where(one.lacking.any(axis=0)):
            rows = np.flatnonzero(one.lacking.any(axis=1))
            told.append(
                f"no step {none} (in {', '.join(self.layers[i] for i in rows.tolist())})"
            )
        return "; ".join(told) + "."

    def _reach(self, one: Range) -> str:
        if at := self.where(one.share >= SERVES):
            return f"reaches {percent(SERVES)} of it {at}"
        best = int(np.nanargmax(one.share))
        return f"reaches at most {percent(float(one.share[best]))} of it, {self._at(best)}"

    def _at(self, level: int) -> str:
        symbol = SYMBOLS.get(self.kind)
        return (
            f"at {symbol} = {self.labels[level]}" if symbol else f"at {self.labels[level]}"
        )

    def where(self, holds: Any) -> str:
        """Name the dampings where something holds: "" for none, runs of neighbours."""
        levels, last = np.flatnonzero(holds), len(self.labels) - 1
        symbol = SYMBOLS.get(self.kind)
        if not len(levels):
            return ""
        if len(levels) == last + 1:
            return f"at every {symbol or 'damping'}"
        if symbol is None:
            return "at " + ", ".join(self.labels[i] for i in levels.tolist())
        runs = np.split(levels, np.flatnonzero(np.diff(levels) > 1) + 1)
        return " and ".join(self._run(symbol, int(r[0]), int(r[-1])) for r in runs)

    def _run(self, symbol: str, first: int, end: int) -> str:
        low, high = self.labels[first], self.labels[end]
        if end == len(self.labels) - 1:
            return f"from {symbol} = {low} on" if first < end else f"at {symbol} = {low}"
        if first == 0:
            return f"up to {symbol} = {high}" if first < end else f"at {symbol} = {low}"
        return f"at {symbol} = {low}" if first == end else f"at {symbol} = {low} to {high}"


def verdict(found: xr.Dataset) -> list[str]:
    """Say for every purpose which approximation serves it best, and which not at all.

    Ranked by the first measure of a purpose, for all layers together, by how far it is
    from what the exact block has; or layer by layer, where approximations have numbers
    in some layers only. Who is indefinite or left out is named, with the layers and the
    share of the parameters in them. Of a sweep: at which dampings the step of a method
    serves, and where it is worse than the gradient.

    Parameters
    ----------
    found
        What `compare` returned with `purpose=`, `sweep` with a gradient, or the result of
        a report.

    Returns
    -------
    list of str
        A line a purpose; of a sweep a line a method.

    Raises
    ------
    ValueError
        If the table holds neither.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> found = fl.compare(stats, ["kfac", "diagonal"], purpose=fl.Matrix())
    >>> verdict(found)[0].split(" by ")[0]
    'matrix: `kfac` is the closest to the exact block'
    """
    told = [f"{purpose}: {one.told()}" for purpose, one in contests(found).items()]
    told += damping_verdict(found)
    if not told:
        raise ValueError(
            "verdict: the table holds neither purposes nor steps at several dampings; "
            "compare(..., purpose=[...]) and sweep(..., gradient=...) make them."
        )
    return told


def contests(found: xr.Dataset) -> dict[str, Contest]:
    """Return the contest of every purpose, by its first measure; {} without purposes."""
    if "of_purpose" not in found.coords:
        return {}
    table = judged(found)
    return {str(p): _contest(table, str(p)) for p in table["purpose"].values}


def _contest(table: xr.Dataset, purpose: str) -> Contest:
    first = table.isel(measure=int(np.flatnonzero(table["of_purpose"] == purpose)[0]))
    first, made = first.sel(purpose=purpose), _made(table)
    every = [str(name) for name in table["approximator"].values]
    methods = [n for n in every if not str(made.get(n, n)).startswith("ExactBlock")]
    kept = first.sel(approximator=[n for n in methods if n != "exact"])
    names = tuple(map(str, kept["approximator"].values))
    cell, whom = ("layer", "approximator"), _word(first, "settles")
    return Contest(
        _word(first, "title"),
        float(first["best"]),
        titles(table),
        names,
        _sizes(table),
        kept["value"].transpose(*cell).values,
        kept["status"].transpose(*cell).values,
        kept["network"].values,
        costs(table, names),
        known=settled(table, _word(first, "assured"), whom.split(" | ") if whom else ()),
        setting=_word(first, "setting"),
        common=_common(kept),
        errors=_lead_errors(kept, names),
        sampled=_word(first, "lead_noise") or "examples",
        unheld=_word(first, "unheld"),
    )


def _common(first: xr.Dataset) -> tuple[Grid, Grid] | None:
    if "common" not in first:
        return None
    return first["common_layers"].values.astype(bool), first["common"].values


def _lead_errors(first: xr.Dataset, methods: Sequence[str]) -> LeadErrors | None:
    if "lead_error" not in first:
        return None
    known = first.reindex(rival=list(methods))  # results put together may lack some
    over = "approximator", "rival"
    return LeadErrors(
        known["lead_error"].transpose("layer", *over).values,
        known["network_lead_error"].transpose(*over).values,
        known["common_lead_error"].transpose(*over).values,
    )


def _word(found: xr.Dataset, name: str) -> str:
    return str(found[name].item()) if name in found else ""


def settled(table: xr.Dataset, assured: str, whom: Sequence[str]) -> dict[str, str]:
    """Return what is known beforehand, by each method whose `repr` begins like one of whom.

    Examples
    --------
    >>> table = xr.Dataset(attrs={"approximators": '{"diagonal": "Diagonal()"}'})
    >>> settled(table, "it is one", ["Diagonal("])
    {'diagonal': 'that it is one follows from the definition'}
    """
    said = f"that {assured} follows from the definition"
    return {
        n: said for n, made in _made(table).items() if str(made).startswith(tuple(whom))
    }


def titles(table: xr.Dataset) -> tuple[str, ...]:
    """Return the layers as sentences name them: of a number with its kind."""
    names = list(map(str, np.atleast_1d(table["layer"].values)))
    if "kind" not in table.coords:
        return tuple(names)
    kinds = np.atleast_1d(table["kind"].values)
    return tuple(n + kind_of(n, str(kind)) for n, kind in zip(names, kinds, strict=True))


def _sizes(table: xr.Dataset) -> Grid:
    if not {"d_out", "d_in"} <= set(table.coords):
        return np.ones(table.sizes["layer"])
    return np.asarray(table["d_out"].values * table["d_in"].values, dtype=float)


def costs(table: xr.Dataset, methods: Sequence[str]) -> dict[str, tuple[Grid, Grid]]:
    """Return what methods hold and what a solve with them takes, and the exact block."""
    found = {}
    p = _sizes(table)
    held = _amounts(table, "stored_numbers", methods)
    if held is not None and {"d_out", "d_in"} <= set(table.coords):
        found[HELD] = held, p * (p + 1) / 2
    solve = _amounts(table, "solve_flops", methods)
    if solve is not None and "exact_solve_flops" in table:
        found[SOLVE] = solve, np.asarray(table["exact_solve_flops"])
    elif solve is not None and "exact" in table["approximator"].values:
        exact = _amounts(table, "solve_flops", ["exact"])
        assert exact is not None, "the methods have it"
        found[SOLVE] = solve, exact[:, 0]
    return found


def _amounts(table: xr.Dataset, name: str, methods: Sequence[str]) -> Grid | None:
    if name not in table:
        return None
    amounts = table[name].sel(approximator=list(methods))
    amounts = amounts.isel({d: -1 for d in ("step", "seed") if d in amounts.dims})
    return np.asarray(amounts.transpose("layer", "approximator").values, dtype=float)


def _made(table: xr.Dataset) -> dict[str, Any]:
    """Return the values that methods were made by, where the result tells."""
    try:
        told = json.loads(str(table.attrs.get("approximators", "{}")))
    except json.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}
