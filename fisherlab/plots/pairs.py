"""Two or more runs beside one another, a panel per layer."""

from collections.abc import Sequence

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes

from fisherlab.catalogue import FLOOR, quantity
from fisherlab.plots import frames
from fisherlab.plots.style import publication, styles, text
from fisherlab.plots.trajectories import legend_above, panels


def runs(
    ds: xr.Dataset,
    metric: str = "frobenius_error",
    *,
    layers: Sequence[str] | None = None,
    col_wrap: int = 3,
) -> sns.FacetGrid:
    """Draw a metric of every run, joined by a line per approximation, per layer.

    Raises
    ------
    ValueError
        If the metric is not in the result or has no dim 'run'.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> coords = {"run": ["a", "b"], "layer": ["fc"], "approximator": ["kfac"]}
    >>> error = xr.DataArray([[[0.4]], [[0.3]]], coords)
    >>> grid = runs(xr.Dataset({"frobenius_error": error}))
    >>> grid.axes_dict["fc"].lines[0].get_ydata().tolist()
    [0.4, 0.3]
    >>> plt.close("all")
    """
    data = frames.metric_of(ds, metric)
    if "run" not in data.dims:
        raise ValueError(f"{metric!r} has no dim 'run': there is only one")
    chosen = frames.known_layers(data, layers)
    shown = frames.drawn(data)
    log = frames.wants_log(data, shown)
    with publication():
        grid, axes = panels(chosen, col_wrap)
        for layer, ax in axes.items():
            _panel(ax, data.sel(layer=layer), shown, log)
        grid.set_axis_labels("", quantity(metric, data).title)
        legend_above(grid, shown)
    return grid


def _panel(ax: Axes, data: xr.DataArray, shown: Sequence[str], log: bool) -> None:
    labels = [text(name, 14) for name in frames.names(data, "run")]
    look = styles(frames.names(data, "approximator"))
    for name in shown:
        values = data.sel(approximator=name).transpose("run").values.astype(float)
        values = np.maximum(values, FLOOR) if log else values
        ax.plot(range(len(labels)), values, label=name, **look[name].line())
    ax.set_xticks(range(len(labels)), labels)
    ax.set_xlim(-0.25, len(labels) - 0.75)
    if log:
        ax.set_yscale("log")
    elif quantity(str(data.name)).best == "low":
        ax.set_ylim(bottom=0)
