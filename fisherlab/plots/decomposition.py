"""Where an error comes from: stacked parts that add up, and the ladder of sources."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes

from fisherlab.plots import frames
from fisherlab.plots.profiles import say_empty
from fisherlab.plots.style import legend_above, new_axes, panels, publication, text

# Dark to light, so that grey prints keep the order; the hatch tells them apart.
PARTS: Final = {
    "off_diagonal": ("dropped blocks between layers", "#332288", ""),
    "shape": ("shape of the blocks", "#D55E00", "////"),
    "scale": ("scale of the blocks", "#F0C27B", ""),
}
SOURCES: Final = {
    "exact": ("exact statistics", "#1A1A1A", ""),
    "sampled": ("sampled labels", "#0072B2", "////"),
    "empirical": ("labels of the data", "#A6CEE3", ""),
}


def decomposition(
    ds: xr.Dataset, ax: Axes | None = None, *, layer: str | None = None
) -> Axes:
    """Draw the parts of each approximation's squared error, stacked; they add up.

    Without `layer` the parts of the whole network's error, relative to ‖F‖² of the
    network: the dropped blocks between layers, and shape and scale of the blocks
    kept. With `layer` those of its block. Numbers above are the errors, √ of the sum.

    Raises
    ------
    ValueError
        If the result has no such parts (make it by `fl.decompose`) or not that layer.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> coords = {"approximator": ["kfac"], "network_part": ["off_diagonal", "shape"]}
    >>> part = xr.DataArray([[0.09, 0.16]], coords, ("approximator", "network_part"))
    >>> ax = decomposition(xr.Dataset({"network_squared_part": part}))
    >>> ax.texts[0].get_text()
    '0.500'
    >>> plt.close("all")
    """
    name, dim = (
        ("network_squared_part", "network_part")
        if layer is None
        else ("squared_part", "part")
    )
    data = frames.metric_of(ds, name)
    if layer is not None:
        data = data.sel(layer=frames.known_layers(data, [layer])[0])
    data = data.transpose("approximator", dim)
    data = data.isel(approximator=data.notnull().any(dim).values)
    with publication():
        ax = new_axes(6.0, 3.4) if ax is None else ax
        bottom = np.zeros(data.sizes["approximator"])
        for part in frames.names(data, dim):
            bottom = _stack(ax, data.sel({dim: part}).values, bottom, part)
        _label_bars(ax, data, bottom)
        whole = "the network" if layer is None else f"layer {text(layer)}"
        ax.set_ylabel(f"squared relative error of {whole}")
    return ax


def _stack(ax: Axes, heights: Any, bottom: Any, part: str) -> Any:
    words, colour, hatch = PARTS.get(part, (part.replace("_", " "), "#888888", ""))
    heights = np.nan_to_num(np.asarray(heights, dtype=float))
    ax.bar(range(len(heights)), heights, 0.62, bottom, label=words, **_look(colour, hatch))
    return bottom + heights


def _look(colour: str, hatch: str) -> dict[str, Any]:
    return {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.6}


def _label_bars(ax: Axes, data: xr.DataArray, tops: Any) -> None:
    names = [text(name) for name in frames.names(data, "approximator")]
    crowded = sum(map(len, names)) > 30
    ax.set_xticks(range(len(names)), names, **(_SLANTED if crowded else {}))
    ax.grid(axis="x", visible=False)
    if not names:
        say_empty(ax, "no approximation was measured here")
        return
    for place, top in enumerate(tops):
        ax.annotate(f"{top**0.5:.3f}", (place, top), (0, 2), **_ABOVE)
    ax.set_ylim(0, max(float(tops.max()), 1e-12) * 1.12)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), borderaxespad=0)


_ABOVE: Final[dict[str, Any]] = {
    "textcoords": "offset points",
    "ha": "center",
    "va": "bottom",
    "fontsize": 8,
}


def error_sources(
    ds: xr.Dataset, *, layers: Sequence[str] | None = None, col_wrap: int = 3
) -> sns.FacetGrid:
    """Draw each approximation's error when made from other statistics, per layer.

    Bars are ‖F − F̂‖ / ‖F‖ with F̂ made from the exact Fisher's statistics, from
    sampled labels and from the labels of the data; dashed lines are what the latter
    two cost without any approximation. These errors do not add up.

    Raises
    ------
    ValueError
        If the result has no 'error' by source (make it by `fl.decompose`).

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> coords = {"layer": ["fc"], "approximator": ["kfac"], "source": ["exact"]}
    >>> error = xr.DataArray([[[0.4]]], coords, ("layer", "approximator", "source"))
    >>> grid = error_sources(xr.Dataset({"error": error}))
    >>> [float(bar.get_height()) for bar in grid.axes_dict["fc"].patches]
    [0.4]
    >>> plt.close("all")
    """
    error = frames.metric_of(ds, "error")
    if "source" not in error.dims:
        raise ValueError("the errors have no dim 'source'; make them by fl.decompose")
    chosen = frames.known_layers(error, layers)
    error = error.transpose("layer", "approximator", "source")
    error = error.isel(approximator=error.notnull().any(["layer", "source"]).values)
    names = frames.names(error, "approximator")
    with publication():
        grid, axes = panels(chosen, col_wrap, frames.kinds(ds))
        for layer, ax in axes.items():
            _ladder(ax, error.sel(layer=layer), _alone(ds, layer))
            ax.set_xticks(range(len(names)), [text(name) for name in names], **_SLANTED)
            ax.grid(axis="x", visible=False)
        grid.set_axis_labels("", "relative error")
        entries = [SOURCES.get(s, (s,))[0] for s in frames.names(error, "source")]
        legend_above(grid, entries)
    return grid


_SLANTED: Final[dict[str, Any]] = {
    "rotation": 40,
    "ha": "right",
    "rotation_mode": "anchor",
    "fontsize": 7.5,
}


def _alone(ds: xr.Dataset, layer: str) -> Mapping[str, float]:
    if "source_error" not in ds:
        return {}
    row = ds["source_error"].sel(layer=layer)
    return {name: float(row.sel(source=name)) for name in frames.names(row, "source")}


def _ladder(ax: Axes, error: xr.DataArray, alone: Mapping[str, float]) -> None:
    sources = frames.names(error, "source")
    width = 0.8 / max(len(sources), 1)
    for place, source in enumerate(sources):
        words, colour, hatch = SOURCES.get(source, (source, "#888888", ""))
        shift = (place - (len(sources) - 1) / 2) * width
        heights = np.nan_to_num(error.sel(source=source).values)
        at = np.arange(len(heights)) + shift
        ax.bar(at, heights, width, label=words, **_look(colour, hatch))
        value = alone.get(source, float("nan"))
        if np.isfinite(value) and value > 0:
            line: dict[str, Any] = {"linestyle": "--", "linewidth": 1.0, "zorder": 0.5}
            ax.axhline(value, color=colour, label="_alone", **line)
