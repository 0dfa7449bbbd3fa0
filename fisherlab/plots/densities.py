"""Spectral densities, a panel per layer."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import NDArray

from fisherlab.plots.style import publication, styles
from fisherlab.plots.trajectories import legend_above, panels

SMALLEST: Final = 1e-12
"""Eigenvalues up to this share of the largest count as zero."""
WIDTH: Final = 0.08  # decades: standard deviation of what each eigenvalue is drawn as


def density(
    tree: xr.DataTree,
    *,
    layers: Sequence[str] | None = None,
    approximators: Sequence[str] | None = None,
    col_wrap: int = 3,
) -> sns.FacetGrid:
    r"""Draw the density of eigenvalues of the exact block and of approximations, per layer.

    A curve is the share of the eigenvalues per decade, smoothed by a tenth of one, over
    the eigenvalue relative to the exact block's mean, which the dotted line marks. What a
    logarithm cannot show, zero and below, stands as its share in the panel.

    Raises
    ------
    ValueError
        If the tree has no densities (make it by `fl.density`) or not those layers.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> dims = ("approximator", "point")
    >>> node = xr.Dataset(
    ...     {"eigenvalue": (dims, [[4.0, 0.0]]), "share": (dims, [[0.25, 0.75]])},
    ...     {"approximator": ["exact"]},
    ...     {"mean_eigenvalue": 1.0},
    ... )
    >>> grid = density(xr.DataTree.from_dict({"fc": node}))
    >>> grid.axes_dict["fc"].texts[0].get_text()
    'zero or below\nexact 75 %'
    >>> plt.close("all")
    """
    nodes = {str(name): child.to_dataset() for name, child in tree.children.items()}
    nodes = {name: ds for name, ds in nodes.items() if {"share", "eigenvalue"} <= set(ds)}
    if not nodes:
        raise ValueError("the tree holds no densities; make it by fl.density")
    unknown = [name for name in layers or () if name not in nodes]
    if unknown:
        raise ValueError(f"no layer {unknown} in the tree; it has: {list(nodes)}")
    nodes = {name: nodes[name] for name in (layers or nodes)}
    named = [str(m) for ds in nodes.values() for m in ds["approximator"].values]
    names = [n for n in dict.fromkeys(named) if approximators is None or n in approximators]
    with publication():
        grid, axes = panels(list(nodes), col_wrap, sharex=False)
        for layer, ax in axes.items():
            _panel(ax, nodes[layer], names)
        grid.set_axis_labels("eigenvalue / mean eigenvalue", "share per decade")
        legend_above(grid, names)
    return grid


def _panel(ax: Axes, ds: xr.Dataset, names: Sequence[str]) -> None:
    look, unit = styles(map(str, ds["approximator"].values)), _unit(ds)
    nothing = ["zero or below"]
    for name in names:
        if name not in look:
            continue
        row = ds.sel(approximator=name)
        values = np.asarray(row["eigenvalue"].values, dtype=float)
        known = np.isfinite(values)
        if not known.any():
            continue
        values, shares = values[known] / unit, np.asarray(row["share"].values)[known]
        kept = values > SMALLEST * max(values.max(), 0.0)
        line: dict[str, Any] = look[name].line() | {"marker": "none"}
        line["linewidth"] = 2.4 if name == "exact" else 1.2
        if kept.any():
            ax.plot(*_smoothed(values[kept], shares[kept]), label=name, **line)
        if float(shares[~kept].sum()) > 5e-4:
            nothing.append(f"{name} {100 * float(shares[~kept].sum()):.3g} %")
    ax.axvline(1.0, color="#555555", linewidth=0.8, linestyle=":", label="_mean")
    ax.set(xscale="log", yscale="log", ylim=_limits(ax))
    if len(nothing) > 1:
        place: dict[str, Any] = {"transform": ax.transAxes, "va": "top", "fontsize": 6}
        ax.text(0.03, 0.97, "\n".join(nothing), **place)


def _unit(ds: xr.Dataset) -> float:
    unit = float(ds.attrs.get("mean_eigenvalue", np.nan))
    return unit if np.isfinite(unit) and unit > 0 else 1.0


def _smoothed(
    values: NDArray[Any], shares: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return shares per decade, every point spread over a small normal curve."""
    step, reach = WIDTH / 4, np.arange(-16, 17)
    places = np.log10(values)
    first, last = places.min() - 20 * step, places.max() + 20 * step
    grid = first + step * np.arange(round((last - first) / step) + 1)
    cells = np.rint((places - first) / step).astype(int)
    kernel = np.exp(-((reach / 4) ** 2) / 2)
    mass = np.bincount(cells, shares, len(grid))
    return 10**grid, np.convolve(mass, kernel / (kernel.sum() * step), mode="same")


def _limits(ax: Axes) -> tuple[float, float]:
    """Show six decades of shares, with room above for the words."""
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]
    top = max((float(y.max()) for y in curves if y.size > 2), default=1.0)
    return 1e-6 * top, 1e2 * top
