"""How the matrices of the K-FAC paper's figures are drawn; of several seeds the first."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from fisherlab.plots import heatmap, publication


def first(ds: xr.Dataset) -> xr.Dataset:
    """Return the result of the first seed."""
    return ds.isel(seed=0) if "seed" in ds.dims else ds


def draw_factorisation(result: xr.Dataset) -> Drawing:
    """Draw Figure 2, one grey scale."""
    ds = first(result)
    names = [str(name) for name in ds["matrix"].values]
    with publication():
        figure, grid = _draw_grid(ds, [names], [_typical(ds, names[0])] * len(names))
        figure.colorbar(grid[0, 0].images[0], ax=grid, label="|entry|", shrink=0.8)
    return figure


def draw_inverse(result: xr.Dataset) -> Drawing:
    """Draw Figure 3: three inverses, the means of the first by layers, and all over λ."""
    ds = first(result)
    names = [str(name) for name in ds["matrix"].values]
    with publication():
        figure, grid = plt.subplots(2, 3, figsize=(10.4, 6.6), layout="constrained")
        for ax, name in zip(grid[0], names, strict=True):
            top = _typical(ds, name)
            one = ds["entry"].sel(matrix=name)
            heatmap(one, ax, vmax=top, outlines=_outlines(ds), colorbar=False)
            figure.colorbar(ax.images[0], ax=ax, label="|entry|", shrink=0.8)
            ax.set_title(f"|{name}|")
        _draw_means(grid[1, 0], ds["mean_entry"].sel(matrix=names[0]))
        falls = result["distance"].to_dataframe().reset_index()
        for ax, apart in zip(grid[1, 1:], (1, 3), strict=True):
            sns.lineplot(
                falls[falls["apart"] == apart],
                x="damping",
                y="distance",
                hue="of",
                style="of",
                markers=True,
                errorbar=("pi", 100),
                ax=ax,
                legend=apart == 3,
            )
            ax.set(xscale="log", ylim=(0, None), xlabel="damping λ (factored: γ²)")
            ax.set_title(f"inverse, layers {apart} apart")
            ax.set_ylabel("mean |entry| / that within a layer")
        shown = grid[1, 2].get_legend_handles_labels()
        grid[1, 2].get_legend().remove()
        figure.legend(*shown, loc="outside right center")  # no room beside the panels above
    return figure


def _draw_means(ax: Axes, table: xr.DataArray) -> None:
    top = float(table.max())
    heatmap(table, ax, vmax=top, colorbar=False)
    for (row, column), value in np.ndenumerate(table.values):
        shade = "white" if value > 0.5 * top else "black"
        where = (column + 0.5, row + 0.5)
        ax.annotate(
            f"{value:.2g}", where, ha="center", va="center", color=shade, fontsize=7
        )
    names = [str(layer) for layer in table["layer"].values]
    middles = [k + 0.5 for k in range(len(names))]
    ax.set_xticks(middles, names)
    ax.set_yticks(middles, names)
    ax.set_title("mean |entry| of the first")


def draw_structures(result: xr.Dataset) -> Drawing:
    """Draw Figure 5 or 6: the block diagonal above, the chain below.

    The differences have a scale of their own: on that of the matrices those of the
    inverses cannot be seen.
    """
    ds = first(result)
    tilde, breve, hat, one, two = (str(name) for name in ds["matrix"].values)
    tops = [_typical(ds, tilde)] * 2 + [_typical(ds, one)]
    with publication():
        figure, grid = _draw_grid(ds, [[tilde, breve, one], [tilde, hat, two]], tops)
        figure.colorbar(grid[0, 0].images[0], ax=grid[:, :2], label="|entry|", shrink=0.7)
        figure.colorbar(grid[0, 2].images[0], ax=grid[:, 2], label="|entry|", shrink=0.7)
    return figure


def draw_over_damping(result: xr.Dataset) -> Drawing:
    """Draw the three distances over the damping, a line a matrix and structure."""
    titles = {
        "error": "‖M − ·‖ / ‖M‖",
        "inverse_error": "‖M⁻¹ − ·⁻¹‖ / ‖M⁻¹‖",
        "divergence": "KL(M ‖ ·), nats",
    }
    rows = result.to_dataframe().reset_index().rename(columns={"of": "M"})
    with publication():
        figure, grid = plt.subplots(1, 3, figsize=(10.4, 3.2), layout="constrained")
        for ax, (name, title) in zip(grid, titles.items(), strict=True):
            sns.lineplot(
                rows,
                x="damping",
                y=name,
                hue="M",
                style="structure",
                markers=True,
                errorbar=("pi", 100),
                ax=ax,
                legend=name == "divergence",
            )
            ax.set(xscale="log", yscale="log", xlabel="damping λ (factored: γ²)")
            ax.set(ylabel="", title=title)
        sns.move_legend(grid[2], "center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _outlines(ds: xr.Dataset) -> dict[str, tuple[int, int]]:
    edges = zip(ds["layer"].values, ds["start"].values, ds["stop"].values, strict=True)
    return {str(name): (int(a), int(b)) for name, a, b in edges}


def _typical(ds: xr.Dataset, name: str) -> float:
    return float(np.percentile(np.abs(ds["entry"].sel(matrix=name)), 99.5))


def _draw_grid(
    ds: xr.Dataset, rows: Sequence[Sequence[str]], tops: Sequence[float]
) -> tuple[Drawing, Any]:
    """Draw |entries| of matrices, each column of the grid on a scale of its own."""
    shape = len(rows), len(tops)
    size = (3.3 * shape[1] + 1.0, 3.1 * shape[0])
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for axes, names in zip(grid, rows, strict=True):
        for ax, name, top in zip(axes, names, tops, strict=True):
            one = ds["entry"].sel(matrix=name)
            heatmap(one, ax, vmax=top, outlines=_outlines(ds), colorbar=False)
            ax.set_title(_title(name))
    return figure, grid


def _title(name: str) -> str:
    plain = name.replace("⁻¹", "")
    words = {"F": "exact", "F̃": "all pairs", "F̆": "block diagonal", "F̂": "tridiagonal"}
    said = f", {words[plain]}" if plain in words else ""
    return f"|{name}|{said}"
