r"""At which damping a step is worth taking, in words: a line for every approximation.

The step p = (F̂ + λI)⁻¹v is held against the exact one in the quadratic model of
P = F + λI, its length chosen best, for all layers together:

.. math:: s(λ) = \frac{(\sum v^T p)^2}{\sum p^T P p \; \sum v^T P^{-1} v}

The gradient itself is p = v; where s is below its share, the step is worse than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from fisherlab.analysis.wording import percent, quoted

Grid = NDArray[Any]
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
