"""What the accuracy costs: error against the numbers that are held."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    NullFormatter,
)
from matplotlib.transforms import ScaledTranslation

from fisherlab.catalogue import FLOOR, overall, quantity
from fisherlab.plots import frames
from fisherlab.plots.profiles import say_empty
from fisherlab.plots.style import Style, new_axes, publication, styles

NEAR: Final = 0.03  # of the width, in which marks stand side by side
SIDE: Final = 8.0  # points between them


def cost(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    metric: str = "frobenius_error",
    step: int | None = None,
) -> Axes:
    """Draw the error against the stored numbers, as a share of the exact block's.

    The mark of an approximation is all layers together: its share of all numbers, and
    √(Σ‖F − F̂‖² / Σ‖F‖²), or the median of the errors where the result has no norms. The
    line through it reaches from its lowest to its highest layer; those that cost the same
    stand side by side. It is hollow where others have more layers; of the rest the grey
    line joins those that none other beats in both.

    Raises
    ------
    ValueError
        If the result has no such metric or no 'stored_numbers'.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> dims, coords = ("layer", "approximator"), {"approximator": ["exact", "kfac"]}
    >>> variables = {
    ...     "frobenius_error": (dims, [[0.0, 0.4]]),
    ...     "stored_numbers": (dims, [[210.0, 42.0]]),
    ... }
    >>> ax = cost(xr.Dataset(variables, {"layer": ["0"], **coords}))
    >>> [round(float(x), 3) for x in ax.lines[0].get_xdata()]
    [0.2]
    >>> plt.close("all")
    """
    error = frames.values(ds, metric, step=step)
    share = storage_share(ds, step)
    whole = frames.values(ds, "stored_numbers", step=step) / share.where(share > 0)
    norms = frames.norms(ds, metric, step)
    shown = [name for name in frames.drawn(error) if name in _measured(share)]
    with publication():
        ax = new_axes() if ax is None else ax
        look = styles(frames.names(error, "approximator"))
        points = {n: _together(n, share, error, norms, whole) for n in shown}
        _draw(ax, points, look)
        _dress(ax, error, shown)
    return ax


def pareto(ds: xr.Dataset, ax: Axes | None = None, *, cost: str = "stored_bytes") -> Axes:
    """Draw the error against one cost of `fl.pareto`, and the front of the best.

    The mark of an approximation has the total cost of its layers and the median of their
    errors, the line through it reaches from the lowest to the highest; those that cost
    the same stand side by side. It is hollow where others have more layers; of the rest
    the grey line joins those that none other beats in both.

    Raises
    ------
    ValueError
        If the result has no such cost.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> coords = {"layer": ["0"], "approximator": ["kfac"], "cost": ["solve_flops"]}
    >>> error = xr.DataArray([[0.4]], dims=("layer", "approximator"))
    >>> price = (100 * error).expand_dims(cost=1)
    >>> ds = xr.Dataset({"error": error, "cost_value": price}, coords)
    >>> ax = pareto(ds, cost="solve_flops")
    >>> ax.get_xlabel()
    'flops of one solve of all layers together'
    >>> plt.close("all")
    """
    frames.require_result(ds, xr.Dataset, "fl.pareto")
    known = frames.names(ds, "cost")
    if cost not in known or "error" not in ds:
        raise ValueError(f"the result has no errors at cost {cost!r}; it has: {known}")
    error = frames.values(ds, "error")
    error = error.rename(str(ds.attrs.get("metric", "error")))
    price = frames.values(ds.assign(price=ds["cost_value"].sel(cost=cost)), "price")
    shown = [name for name in frames.drawn(error) if name in _measured(price)]
    with publication():
        ax = new_axes() if ax is None else ax
        look = styles(frames.names(error, "approximator"))
        _draw(ax, {n: _together(n, price, error) for n in shown}, look)
        _dress(ax, error, shown)
        words = COSTS.get(cost, cost.replace("_", " "))
        ax.set_xlabel(f"{words} of all layers together")
        ax.xaxis.set_major_formatter(LogFormatterSciNotation())
    return ax


COSTS: Final = {
    "stored_bytes": "bytes held",
    "build_flops": "flops to build it",
    "solve_flops": "flops of one solve",
    "build_seconds": "seconds to build it",
    "solve_seconds": "seconds of one solve",
}
"""The costs of `fl.pareto` in words."""


def storage_share(ds: xr.Dataset, step: int | None = None) -> xr.DataArray:
    """Divide the stored numbers by p(p+1)/2, those of the exact symmetric block.

    Examples
    --------
    >>> import xarray as xr
    >>> dims, coords = ("layer", "approximator"), {"approximator": ["exact", "kfac"]}
    >>> ds = xr.Dataset({"stored_numbers": (dims, [[210.0, 42.0]])}, coords)
    >>> storage_share(ds).values.tolist()
    [[1.0, 0.2]]
    """
    stored = frames.values(ds, "stored_numbers", step=step)
    if {"d_out", "d_in"} <= set(stored.coords):
        parameters = stored["d_out"] * stored["d_in"]
        return stored / (parameters * (parameters + 1) / 2)
    if "exact" in frames.names(stored, "approximator"):
        return stored / stored.sel(approximator="exact", drop=True)
    return stored * np.nan


def _measured(share: xr.DataArray) -> list[str]:
    return [
        name
        for name in frames.names(share, "approximator")
        if np.isfinite(share.sel(approximator=name).values).any()
    ]


@dataclass(frozen=True)
class _Point:
    """The layers of an approximation: how many, their cost and error, and its range."""

    layers: int
    cost: float
    error: float
    lowest: float
    highest: float


def _together(
    name: str,
    cost: xr.DataArray,
    error: xr.DataArray,
    norms: xr.DataArray | None = None,
    whole: xr.DataArray | None = None,
) -> _Point | None:
    """Put the layers of an approximation together: cost as a share of `whole`, if given."""
    columns = [
        each.sel(approximator=name) if "approximator" in each.dims else each
        for each in (cost, error, *(each for each in (norms, whole) if each is not None))
    ]
    first, *rest = xr.broadcast(*columns)
    flat = [each.transpose(*first.dims).values.ravel() for each in (first, *rest)]
    flat = [each[np.isfinite(flat[:2]).all(axis=0)] for each in flat]
    if not flat[0].size:
        return None
    x, y = np.maximum(flat[0], FLOOR**2), np.maximum(flat[1], FLOOR)
    share = 1.0 if whole is None else flat[-1]
    total = float((x * share).sum() / (1.0 if whole is None else np.sum(share)))
    at = overall(y, None if norms is None else flat[2])
    return _Point(x.size, total, at, float(y.min()), float(y.max()))


def side_by_side(costs: Sequence[float]) -> list[float]:
    """Return shifts, in points, that set marks of nearly the same cost side by side.

    Examples
    --------
    >>> side_by_side([0.5, 100.0, 0.5])
    [-4.0, 0.0, 4.0]
    """
    shifts = [0.0] * len(costs)
    known = [i for i in np.argsort(costs, kind="stable") if np.isfinite(costs[i])]
    if not known:
        return shifts
    near = (costs[known[-1]] / costs[known[0]]) ** NEAR
    groups = [[known[0]]]
    for before, i in pairwise(known):
        if costs[i] <= near * costs[before]:
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in groups:
        for place, i in enumerate(group):
            shifts[i] = SIDE * (place - (len(group) - 1) / 2)
    return shifts


def _draw(ax: Axes, points: Mapping[str, _Point | None], look: Mapping[str, Style]) -> None:
    """Draw a mark for all layers together, and a line from the lowest to the highest."""
    known = {name: point for name, point in points.items() if point is not None}
    every = max((point.layers for point in known.values()), default=0)
    shifts = side_by_side([point.cost for point in known.values()])
    whole: Any = ax.get_figure(root=True)
    for (name, point), shift in zip(known.items(), shifts, strict=True):
        aside = ScaledTranslation(shift / 72, 0, whole.dpi_scale_trans)
        beside: dict[str, Any] = {"transform": ax.transData + aside}
        mark = look[name].line() | {"linestyle": "none", "markersize": 8, "zorder": 4}
        mark |= {"markeredgecolor": "#222222"}
        if point.layers < every:
            mark |= {"markerfacecolor": "white", "markeredgecolor": look[name].color}
        ax.plot([point.cost], [point.error], label=name, **mark, **beside)
        ends = [point.lowest, point.highest]
        line: dict[str, Any] = {"color": look[name].color, "lw": 1.6, "alpha": 0.5}
        ax.plot([point.cost] * 2, ends, label="_layers", **line, **beside)
        ax.update_datalim([(point.cost, end) for end in ends])  # unseen with a shift
    ax.autoscale_view()
    complete = [(p.cost, p.error) for p in known.values() if p.layers == every]
    if len(complete) > 1:
        x, y = zip(*undominated(complete), strict=True)
        ax.plot(x, y, color="#B0B0B0", linewidth=1.2, zorder=1, label="_front")


def undominated(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the points that no other one beats in both coordinates (small is good).

    Examples
    --------
    >>> undominated([(1.0, 5.0), (2.0, 6.0), (3.0, 1.0)])
    [(1.0, 5.0), (3.0, 1.0)]
    """
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _dress(ax: Axes, error: xr.DataArray, shown: list[str]) -> None:
    ax.set_xlabel("stored numbers, share of the exact block")
    ax.set_ylabel(quantity(str(error.name), error).label)
    if not shown:
        say_empty(ax, "no approximation has both an error and a cost")
        return
    ax.set_xscale("log")
    if frames.wants_log(error, shown):
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0)
