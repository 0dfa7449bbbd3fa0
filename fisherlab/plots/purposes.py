"""What approximations are worth in what they are used for: a panel a measure."""

from __future__ import annotations

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherlab.plots.style import publication, styles, text

COLUMNS = 3
LABEL = 26  # characters of a line


def purposes(found: xr.Dataset, purpose: str | None = None) -> Figure:
    """Draw every measure of a purpose: layers as points, the network as a bar across.

    The line is what the exact block has. Approximations without a number in a layer have
    no bar, and a cross at the foot of the panel.

    Parameters
    ----------
    found
        What `fl.compare` returned with `purpose=`.
    purpose
        One of them; all by default.

    Raises
    ------
    ValueError
        If the table holds no such purpose.

    Examples
    --------
    >>> import xarray as xr
    >>> of = ("measure", ["sharpness"])
    >>> found = xr.Dataset(
    ...     {
    ...         "value": (("layer", "approximator", "measure"), [[[0.9]], [[1.2]]]),
    ...         "network": (("approximator", "measure"), [[1.1]]),
    ...     },
    ...     {
    ...         "layer": ["0", "2"],
    ...         "approximator": ["kfac"],
    ...         "measure": ["sharpness.top"],
    ...         "of_purpose": of,
    ...         "title": ("measure", ["largest eigenvalue over the exact one"]),
    ...         "unit": ("measure", ["1"]),
    ...         "best": ("measure", [1.0]),
    ...     },
    ... )
    >>> figure = purposes(found)
    >>> figure.axes[0].get_title(loc="left")
    'sharpness'
    >>> plt.close(figure)
    """
    if "of_purpose" not in found.coords:
        raise ValueError(
            "purposes: the table holds none; fl.compare(..., purpose=[...]) makes one."
        )
    known = list(dict.fromkeys(found["of_purpose"].values.tolist()))
    if purpose is not None and purpose not in known:
        raise ValueError(
            f"purposes: purpose={purpose!r} was given; the table holds {', '.join(known)}."
        )
    kept = found["of_purpose"].isin(known if purpose is None else [purpose])
    shown = found.isel(measure=kept.values)
    count = shown.sizes["measure"]
    rows = -(-count // COLUMNS)
    with publication():
        figure, grid = plt.subplots(
            rows,
            min(COLUMNS, count),
            figsize=(2.9 * min(COLUMNS, count), 2.5 * rows + 0.3),
            layout="constrained",
            squeeze=False,
        )
        for place, ax in enumerate(grid.flat):
            if place < count:
                _panel(ax, shown.isel(measure=place))
            else:
                ax.set_axis_off()
    return figure


def _panel(ax: Axes, one: xr.Dataset) -> None:
    names = one["approximator"].values.tolist()
    look = styles(names)
    best = float(one["best"])
    ax.axhline(best, color="#333333", linewidth=0.8, zorder=1)
    for x, name in enumerate(names):
        of_method: Any = one.sel(approximator=name)
        layers, network = of_method["value"].values, float(of_method["network"])
        color = look[name].color
        spread = np.linspace(-0.22, 0.22, len(layers)) if len(layers) > 1 else [0.0]
        ax.scatter(x + np.asarray(spread), layers, s=14, color=color, alpha=0.6, zorder=2)
        if np.isfinite(network):
            ax.hlines(network, x - 0.36, x + 0.36, color=color, linewidth=2.4, zorder=3)
        if not np.isfinite(layers).all():
            ax.plot(x, 0.02, marker="x", color=color, transform=ax.get_xaxis_transform())
    _scale(ax, one, best)
    ax.set_xticks(range(len(names)), [text(n) for n in names], rotation=30, ha="right")
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.grid(visible=False, axis="x")
    ax.set_title(str(one["of_purpose"].item()), loc="left", fontweight="bold")
    unit = str(one["unit"].item())
    label = "\n".join(textwrap.wrap(str(one["title"].item()), LABEL))
    ax.set_ylabel(f"{label} [{unit}]" if unit != "1" else label)


def _scale(ax: Axes, one: xr.Dataset, best: float) -> None:
    """Take a logarithmic scale where positive numbers span more than a factor of 30."""
    values = one["value"].values[np.isfinite(one["value"].values)]
    values = np.abs(values[values != 0])
    if not len(values) or values.max() < 30 * values.min():
        return
    if best > 0 and (one["value"] > 0).where(one["value"].notnull(), other=True).all():
        ax.set_yscale("log")
    else:
        ax.set_yscale("symlog", linthresh=float(np.quantile(values, 0.1)))
