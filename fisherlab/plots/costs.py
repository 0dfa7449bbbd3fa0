"""What the accuracy costs: error against the numbers that are held."""

from typing import Any, Final

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation

from fisherlab.catalogue import FLOOR, overall, quantity
from fisherlab.plots import frames
from fisherlab.plots.profiles import say_empty
from fisherlab.plots.style import Style, new_axes, publication, styles


def cost(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    metric: str = "frobenius_error",
    step: int | None = None,
) -> Axes:
    """Draw the error against the stored numbers, as a share of the exact block's.

    Small marks are layers; the large mark of an approximation is all layers together:
    its share of all numbers, and √(Σ‖F − F̂‖² / Σ‖F‖²), or the median of the errors where
    the result has no norms. The grey line joins the approximations that none other
    beats in both.

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
        centres = [_cloud(ax, n, share, error, look[n], norms, whole) for n in shown]
        _front(ax, [centre for centre in centres if np.isfinite(centre).all()])
        _dress(ax, error, shown)
    return ax


def pareto(ds: xr.Dataset, ax: Axes | None = None, *, cost: str = "stored_bytes") -> Axes:
    """Draw the error against one cost of `fl.pareto`, and the front of the best.

    Small marks are layers; the large mark of an approximation has their total cost
    and the median of their errors. The grey line joins the approximations that none
    other beats in both.

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
    'flops of one solve (large marks: all layers together)'
    >>> plt.close("all")
    """
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
        centres = [_cloud(ax, n, price, error, look[n]) for n in shown]
        _front(ax, [centre for centre in centres if np.isfinite(centre).all()])
        _dress(ax, error, shown)
        words = COSTS.get(cost, cost.replace("_", " "))
        ax.set_xlabel(f"{words} (large marks: all layers together)")
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


def _cloud(
    ax: Axes,
    name: str,
    cost: xr.DataArray,
    error: xr.DataArray,
    look: Style,
    norms: xr.DataArray | None = None,
    whole: xr.DataArray | None = None,
) -> tuple[float, float]:
    """Draw layers and their centre: the total cost, a share of `whole` where given."""
    columns = [
        each.sel(approximator=name) if "approximator" in each.dims else each
        for each in (cost, error, *(each for each in (norms, whole) if each is not None))
    ]
    first, *rest = xr.broadcast(*columns)
    flat = [each.transpose(*first.dims).values.ravel() for each in (first, *rest)]
    flat = [each[np.isfinite(flat[:2]).all(axis=0)] for each in flat]
    if not flat[0].size:
        return float("nan"), float("nan")
    x, y = np.maximum(flat[0], FLOOR**2), np.maximum(flat[1], FLOOR)
    share = 1.0 if whole is None else flat[-1]
    total = float((x * share).sum() / (1.0 if whole is None else np.sum(share)))
    centre = total, overall(y, None if norms is None else flat[2])
    mark: dict[str, Any] = look.line() | {"linestyle": "none"}
    large = mark | {"markeredgecolor": "#222222", "markersize": 9, "zorder": 4}
    ax.plot(*centre, label=name, **large)
    small = {"markersize": 4.5, "alpha": 0.45, "markeredgewidth": 0.0}
    ax.plot(x, y, label="_layers", **mark | small)
    return centre


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


def _front(ax: Axes, points: list[tuple[float, float]]) -> None:
    if len(points) > 1:
        x, y = zip(*undominated(points), strict=True)
        ax.plot(x, y, color="#B0B0B0", linewidth=1.2, zorder=1, label="_front")


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
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0)
