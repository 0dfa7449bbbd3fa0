"""One value per layer and approximation: profiles over the depth of the network."""

from typing import Any, Final

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from fisherlab.catalogue import FLOOR, quantity
from fisherlab.plots import frames
from fisherlab.plots.style import Style, new_axes, publication, styles, text

LABELLED: Final = 10
"""Layers up to which labels give shapes, if they need no slant."""
MOST_LABELS: Final = 32
"""Layers named under an axis; of more, every second, third, … is, so as to be legible."""


def errors(
    ds: xr.Dataset,
    metric: str = "frobenius_error",
    ax: Axes | None = None,
    *,
    step: int | None = None,
    damping: float | str | None = None,
) -> Axes:
    """Draw a metric per layer, one line with markers per approximation.

    With several steps the last is drawn (or `step`), with several dampings the
    middle one (or `damping`); with several seeds the mean and the whole range, or
    the confidence interval where the result holds it (`fl.uncertainty`). Its noise
    floor is shaded: below it the reference itself is not known. The scale is
    logarithmic where the values span more than a factor 30.

    Raises
    ------
    ValueError
        If the metric, the step or the damping is not in the result.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> dims = ("layer", "approximator")
    >>> ds = xr.Dataset(
    ...     {"frobenius_error": (dims, [[0.4, 0.9], [0.3, 0.8]])},
    ...     coords={"layer": ["0", "2"], "approximator": ["kfac", "diagonal"]},
    ... )
    >>> [line.get_label() for line in errors(ds).lines]
    ['kfac', 'diagonal']
    >>> plt.close("all")
    """
    data = frames.values(ds, metric, step=step, damping=damping)
    with publication():
        ax = new_axes() if ax is None else ax
        _profiles(data, ax, frames.interval(ds, metric, step=step, damping=damping))
        if metric == "frobenius_error" and "noise_floor" in ds:
            _shade(ax, frames.pick(ds["noise_floor"], "step", step))
    return ax


def direction_cosines(
    ds: xr.Dataset,
    ax: Axes | None = None,
    *,
    step: int | None = None,
    damping: float | str | None = None,
) -> Axes:
    """Draw per layer how well each damped natural gradient points the exact way.

    cos((F + λI)⁻¹g, (F̂ + λI)⁻¹g) at one damping: the middle one, or `damping`.

    Raises
    ------
    ValueError
        If the result has no direction cosines, or not that step or damping.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> dims = ("layer", "approximator")
    >>> ds = xr.Dataset(
    ...     {"direction_cosine": (dims, [[0.9]])},
    ...     coords={"layer": ["0"], "approximator": ["kfac"]},
    ... )
    >>> bool(direction_cosines(ds).get_ylim()[1] > 1)
    True
    >>> plt.close("all")
    """
    ax = errors(ds, "direction_cosine", ax, step=step, damping=damping)
    top = 1 + 0.02 * (1 - min(ax.get_ylim()[0], 0.9))
    ax.set_ylim(top=top)
    ax.axhline(1, color="#333333", linewidth=0.7, zorder=1, label="_exact")
    return ax


Interval = tuple[xr.DataArray, xr.DataArray] | None


def _profiles(data: xr.DataArray, ax: Axes, interval: Interval) -> None:
    shown = frames.drawn(data)
    log = frames.wants_log(data, shown)
    look = styles(frames.names(data, "approximator"))
    shifts = np.linspace(-0.16, 0.16, len(shown)) if len(shown) > 1 else [0.0] * len(shown)
    for name, shift in zip(shown, shifts, strict=True):
        column = data.sel(approximator=name)
        ends = _ends(column, interval, name)
        _profile(ax, name, column, float(shift), look[name], ends, log=log)
    _dress(ax, data, shown, log)


def _ends(column: xr.DataArray, interval: Interval, name: str) -> Interval:
    if "seed" not in column.dims:
        return None
    if interval is None:
        return column.min("seed"), column.max("seed")
    low, high = (end.sel(approximator=name) for end in interval)
    return low, high


def _profile(
    ax: Axes,
    name: str,
    column: xr.DataArray,
    shift: float,
    look: Style,
    ends: Interval,
    *,
    log: bool,
) -> None:
    floor = FLOOR if log else None
    x = np.arange(column.sizes["layer"]) + shift
    if ends is None:
        ax.plot(x, column.clip(min=floor).values, label=name, **look.line())
        return
    middle = column.mean("seed").clip(min=floor)
    low, high = (end.clip(min=floor) for end in ends)
    reach = np.stack([middle - low, high - middle])
    ax.errorbar(x, middle, np.maximum(reach, 0), label=name, capsize=2, **look.line())


def _shade(ax: Axes, noise: xr.DataArray) -> None:
    levels = np.atleast_1d(noise.values).astype(float)
    edges = np.arange(len(levels) + 1) - 0.5
    low, high = ax.get_ylim()
    shade: dict[str, Any] = {"color": "#BBBBBB", "alpha": 0.45, "zorder": 0.4}
    ax.stairs(levels, edges, baseline=low, fill=True, label="within noise", **shade)
    ax.set_ylim(low, max(high, 1.05 * float(np.nanmax(levels, initial=low))))
    if ax.get_legend():
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0)


def _dress(ax: Axes, data: xr.DataArray, shown: list[str], log: bool) -> None:
    metric = quantity(str(data.name), data)
    ax.set_ylabel(f"{metric.title}\n{metric.symbol}" if metric.symbol else metric.title)
    ax.set_xlabel("layer (in the order of the network)")
    label_layers(ax, data)
    ax.grid(axis="x", visible=False)
    if not shown:
        say_empty(ax, "no approximation was measured here")
        return
    if log:
        ax.set_yscale("log")
    elif metric.best == "low":
        ax.set_ylim(bottom=0)
    if metric.floor and log and ax.get_ylim()[0] <= FLOOR:
        ax.axhline(FLOOR, color="#555555", linewidth=0.8, linestyle=":")
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0)


def label_layers(ax: Axes, data: xr.DataArray) -> None:
    """Write the layers under the horizontal axis, with kind and shape where known.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> _, ax = plt.subplots()
    >>> label_layers(ax, xr.DataArray([1.0], {"layer": ["fc"]}))
    >>> ax.get_xticklabels()[0].get_text()
    'fc'
    >>> plt.close("all")
    """
    layers, kinds = frames.names(data, "layer"), frames.kinds(data)
    labels = [text(name) + kinds.get(name, "") for name in layers]
    apart = [label.replace(" · ", "\n") for label in labels]
    if not (tilt := _tilt(apart)):
        labels = apart
        if {"d_out", "d_in"} <= set(data.coords) and len(layers) <= LABELLED:
            d_out, d_in = (np.atleast_1d(data[c].values) for c in ("d_out", "d_in"))
            labels = [
                f"{label}\n{int(o)}×{int(i)}"
                for label, o, i in zip(labels, d_out, d_in, strict=True)
            ]
    ax.set_xticks(range(len(layers)), labels, **tilt)
    for place, label in enumerate(ax.get_xticklabels()):  # their words stay for marks
        label.set_visible(place % -(-len(labels) // MOST_LABELS) == 0)
    ax.set_xlim(-0.5, max(len(layers), 1) - 0.5)


def _tilt(labels: list[str]) -> dict[str, Any]:
    lines = (line for label in labels for line in label.split("\n"))
    longest = max(map(len, lines), default=0)
    if len(labels) * longest <= 90:
        return {}
    return {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "fontsize": 7}


def say_empty(ax: Axes, why: str) -> None:
    """Write into empty axes why there is nothing to see.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> _, ax = plt.subplots()
    >>> say_empty(ax, "nothing measured")
    >>> ax.texts[0].get_text()
    'nothing measured'
    >>> plt.close("all")
    """
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", color="#555555")
    ax.set_yticks([])
