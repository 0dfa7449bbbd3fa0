"""Curves over an index, a panel per layer: spectra, their densities, errors by rank."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator
from numpy.typing import NDArray

from fisherlab.catalogue import FLOOR
from fisherlab.plots import frames
from fisherlab.plots.style import Style, legend_above, panels, publication, styles, tick_at
from fisherlab.showing import kind_of

SMALLEST: Final = 1e-14
"""Eigenvalues below this share of the largest are rounding and are not drawn."""
FAMILIES: Final = {
    "kronecker": ("Kronecker products", Style("#0072B2", "o")),
    "eigen": ("eigenvectors", Style("#D55E00", "s", (5.0, 1.5))),
}


def spectra(
    tree: xr.DataTree,
    *,
    layers: Sequence[str] | None = None,
    approximators: Sequence[str] | None = None,
    col_wrap: int = 3,
) -> sns.FacetGrid:
    """Draw the eigenvalues of the exact block and of its approximations, per layer.

    Eigenvalues are in descending order, on log scales, relative to the exact block's
    mean eigenvalue tr F / p, which the dotted line marks. Those that are zero or
    negative, or below rounding, are not drawn: a curve ends at the numerical rank.

    Raises
    ------
    ValueError
        If the tree has no spectra (make it by `fl.spectra`) or not those layers.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> node = xr.Dataset(
    ...     {"eigenvalue": (("approximator", "index"), [[4.0, 2.0, 0.0]])},
    ...     {"approximator": ["exact"], "index": [1, 2, 3]},
    ...     {"mean_eigenvalue": 2.0},
    ... )
    >>> grid = spectra(xr.DataTree.from_dict({"fc": node}))
    >>> grid.axes_dict["fc"].lines[0].get_ydata().tolist()
    [2.0, 1.0]
    >>> plt.close("all")
    """
    nodes = frames.nodes(tree, layers, "spectra", "eigenvalue", "index")
    names = list(dict.fromkeys(n for ds in nodes.values() for n in _methods(ds)))
    chosen = [n for n in names if approximators is None or n in approximators]
    look = styles(names)
    with publication():
        grid, axes = panels(list(nodes), col_wrap, _kinds(nodes), sharex=False)
        for layer, ax in axes.items():
            _spectrum(ax, nodes[layer], {name: look[name] for name in chosen})
        grid.set_axis_labels("index (descending)", "eigenvalue / mean eigenvalue")
        legend_above(grid, chosen)
    return grid


def _kinds(nodes: Mapping[str, xr.Dataset]) -> dict[str, str]:
    return {n: kind_of(n, str(ds.attrs.get("kind", ""))) for n, ds in nodes.items()}


def _methods(ds: xr.Dataset) -> list[str]:
    rows = np.asarray(ds["eigenvalue"].transpose("approximator", "index"), dtype=float)
    measured = np.isfinite(rows).any(axis=1)
    return [str(name) for name in ds["approximator"].values[measured]]


def _spectrum(ax: Axes, ds: xr.Dataset, looks: Mapping[str, Style]) -> None:
    values, unit = ds["eigenvalue"], _unit(ds)
    for name, look in looks.items():
        if name not in _methods(ds):
            continue
        curve = np.asarray(values.sel(approximator=name).values, dtype=float)
        known = np.where(np.isfinite(curve), curve, 0.0)
        kept = known > SMALLEST * max(known.max(), 0.0)
        width = 2.4 if name == "exact" else 1.2
        line: dict[str, Any] = look.line() | {"marker": "none", "linewidth": width}
        index = np.asarray(values["index"].values)
        if kept.any():
            ax.plot(index[kept], curve[kept] / unit, label=name, **line)
    if not ax.lines:
        ax.text(0.5, 0.5, "no numbers", transform=ax.transAxes, ha="center")
        return
    ax.axhline(1.0, color="#555555", linewidth=0.8, linestyle=":", label="_mean")
    ax.set(xscale="log", yscale="log")


def rank_curve(
    ds: xr.Dataset,
    *,
    x: Literal["rank", "stored_numbers"] = "rank",
    layers: Sequence[str] | None = None,
    col_wrap: int = 3,
) -> sns.FacetGrid:
    """Draw the best error that a sum of so many terms can have, a panel per layer.

    Terms are Kronecker products or eigenvectors, the two families of
    `fl.rank_curve`; `x="stored_numbers"` sets them against what they hold.

    Raises
    ------
    ValueError
        If the result has no ranks, or not those layers.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> coords = {"layer": ["fc"], "family": ["kronecker"], "rank": [1, 2]}
    >>> ds = xr.Dataset({"error": (("layer", "family", "rank"), [[[0.4, 0.2]]])}, coords)
    >>> rank_curve(ds).axes_dict["fc"].lines[0].get_ydata().tolist()
    [0.4, 0.2]
    >>> plt.close("all")
    """
    error = frames.metric_of(ds, "error")
    if not {"rank", "family"} <= set(error.dims):
        raise ValueError("the errors have no dims 'rank' and 'family'; see fl.rank_curve")
    chosen = frames.known_layers(error, layers)
    at = frames.metric_of(ds, x) if x != "rank" else error["rank"]
    at = at.broadcast_like(error)
    with publication():
        grid, axes = panels(chosen, col_wrap, frames.kinds(error))
        for layer, ax in axes.items():
            for family in frames.names(error, "family"):
                cell = {"layer": layer, "family": family}
                _by_rank(ax, family, at.sel(cell).values, error.sel(cell).values)
        words = {"rank": "terms", "stored_numbers": "numbers held"}
        grid.set_axis_labels(words[x], "smallest relative error")
        scales = {"yscale": "log"} if _wide(error) else {}
        grid.set(xscale="log", **scales)
        if not scales:
            grid.set(ylim=(0, None))
        for ax in grid.axes.flat:
            _tick_ranks(ax, error["rank"].values if x == "rank" else None)
        legend_above(grid, [_family(n)[0] for n in frames.names(error, "family")])
    return grid


def _family(name: str) -> tuple[str, Style]:
    return FAMILIES.get(name) or (name, styles([name])[name])


def _by_rank(ax: Axes, family: str, x: NDArray[Any], y: NDArray[Any]) -> None:
    name, look = _family(family)
    known = np.isfinite(x.astype(float)) & np.isfinite(y)
    if known.any():
        ax.plot(x[known], np.maximum(y[known], FLOOR), label=name, **look.line())


def _tick_ranks(ax: Axes, ranks: NDArray[Any] | None) -> None:
    ax.xaxis.set_minor_formatter(NullFormatter())
    if ranks is not None:
        # Every second one where they would run into each other.
        told = ranks[:: 1 + len(ranks) // 7]
        tick_at(ax.xaxis, told)


def _wide(error: xr.DataArray) -> bool:
    values = pd.Series(error.values.ravel()).dropna().clip(lower=FLOOR)
    return bool(len(values)) and float(values.max() / values.min()) > 30


DRAWN_FROM: Final = 1e-12
"""Eigenvalues up to this share of the largest count as zero."""
LINE: Final = 9.5  # points of a line of words in a panel, with what tightening takes
WIDTH: Final = 0.08  # decades: standard deviation of what each eigenvalue is drawn as
LETTERS: Final = 40  # of such a line
MEAN: Final = "mean of the exact block"


def density(
    tree: xr.DataTree,
    *,
    layers: Sequence[str] | None = None,
    approximators: Sequence[str] | None = None,
    col_wrap: int = 3,
) -> sns.FacetGrid:
    r"""Draw the density of eigenvalues of the exact block and of approximations, per layer.

    A curve is the share of the eigenvalues per decade, smoothed by a tenth of one, over
    the eigenvalue relative to the exact block's mean, the thin grey line. What a
    logarithm cannot show, zero and below, stands as its share in the panel. With a damping
    (`fl.density(..., damping=λ)`) the dashed line marks λ, and the panel says which share
    of the exact block's eigenvalues exceeds it: of the other directions the damping
    decides, and not the matrix.

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
    '≤ 0: exact 75 %'
    >>> plt.close("all")
    """
    nodes = frames.nodes(tree, layers, "density", "share", "eigenvalue")
    named = [str(m) for ds in nodes.values() for m in ds["approximator"].values]
    names = [n for n in dict.fromkeys(named) if approximators is None or n in approximators]
    with publication():
        grid, axes = panels(list(nodes), col_wrap, _kinds(nodes), sharex=False)
        for layer, ax in axes.items():
            _panel(ax, nodes[layer], names)
        grid.set_axis_labels("eigenvalue / mean eigenvalue", "share per decade")
        legend_above(grid, [*names, "λ", MEAN])
    return grid


def _wrapped(words: str) -> list[str]:
    kept = words.replace(" %", "\N{NO-BREAK SPACE}%")
    lines = wrap(kept, LETTERS, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _panel(ax: Axes, ds: xr.Dataset, names: Sequence[str]) -> None:
    look, unit = styles(map(str, ds["approximator"].values)), _unit(ds)
    nothing: list[str] = []
    above: list[str] = []
    damping = float(ds.attrs.get("lambda", np.nan))
    for name in names:
        if name not in look:
            continue
        row = ds.sel(approximator=name)
        values = np.asarray(row["eigenvalue"].values, dtype=float)
        known = np.isfinite(values)
        if not known.any():
            continue
        values, shares = values[known] / unit, np.asarray(row["share"].values)[known]
        if name == "exact" and np.isfinite(damping):
            more = float(shares[values * unit > damping].sum())
            above = [f"> λ: {name} {_percent(more)}"]
        kept = values > DRAWN_FROM * max(values.max(), 0.0)
        line: dict[str, Any] = look[name].line() | {"marker": "none", "markevery": 16}
        line["linewidth"] = 2.4 if name == "exact" else 1.2
        if kept.any():
            ax.plot(*_smoothed(values[kept], shares[kept]), label=name, **line)
        if float(shares[~kept].sum()) > 5e-4:
            nothing.append(f"{name} {_percent(float(shares[~kept].sum()))}")
    ax.axvline(1.0, color="#AAAAAA", linewidth=0.8, zorder=0.5, label=MEAN)
    told = above + (_wrapped(f"≤ 0: {', '.join(nothing)}") if nothing else [])
    low, top, high = _limits(ax, len(told))
    ax.set(xscale="log", yscale="log", ylim=(low, high))
    decades = np.arange(np.ceil(np.log10(low)), np.ceil(np.log10(top)) + 1)
    ax.set_yticks(10.0 ** decades[decades % 2 == 0])
    ax.yaxis.set_minor_locator(NullLocator())
    if np.isfinite(damping):
        ax.axvline(damping / unit, color="#B30000", lw=1.0, ls=(0, (5, 2)), label="λ")
    if told:
        place: dict[str, Any] = {"transform": ax.transAxes, "va": "top", "fontsize": 6}
        place["bbox"] = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1}
        ax.text(0.03, 0.97, "\n".join(told), **place)


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


def _limits(ax: Axes, lines: int) -> tuple[float, float, float]:
    """Show six decades of shares up to the top, with room above for lines of words."""
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in ax.lines]
    top = max((float(y.max()) for y in curves if y.size > 2), default=1.0)
    points = 72 * ax.bbox.height / ax.figure.dpi
    share = min((LINE * lines + LINE) / points, 0.65)
    return 1e-6 * top, top, 10 ** (6 * share / (1 - share)) * top
