"""Tables as pictures: layer by layer, and where every parameter of a model goes."""

from itertools import pairwise
from typing import Any, Final

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Patch

from fisherlab.plots import frames
from fisherlab.plots.profiles import say_empty
from fisherlab.plots.style import as_vectors, new_axes, publication, text

NUMBERED: Final = 16
"""Layers up to which a table writes its numbers; above, they would not be legible."""
FORMS: Final = {
    "shared": ("inputs and output gradients (all methods)", "#0072B2", ""),
    "per-example": ("gradients per example (some methods)", "#E69F00", "////"),
    "frozen": ("frozen", "#C8C8C8", ""),
    "unsupported": ("not covered", "#D55E00", "xxxx"),
}


def layer_table(
    da: xr.DataArray, ax: Axes | None = None, *, vmax: float | None = None
) -> Axes:
    """Draw a layer × layer table, e.g. the coupling of `fl.decompose`.

    Colours run from 0 to `vmax` (default: the largest entry); up to 16 layers the
    numbers are written too.

    Raises
    ------
    ValueError
        If the table is not square, with layers on both sides.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> coords = {"layer": ["a", "b"], "other_layer": ["a", "b"]}
    >>> ax = layer_table(xr.DataArray([[1.0, 0.1], [0.1, 1.0]], coords))
    >>> [t.get_text() for t in ax.texts]
    ['1.00', '0.10', '0.10', '1.00']
    >>> plt.close("all")
    """
    frames.require_result(da, xr.DataArray, 'fl.decompose(...)["coupling"]')
    if da.ndim != 2 or da.shape[0] != da.shape[1]:
        raise ValueError(f"layer_table draws layer × layer, got {dict(da.sizes)}")
    values = np.asarray(da.values, dtype=float)
    known = values[np.isfinite(values)]
    top = vmax or (float(known.max()) if known.size and known.max() > 0 else 1.0)
    rows, columns = ([text(n) for n in frames.names(da, str(dim))] for dim in da.dims)
    with publication():
        ax = _table_axes(len(rows)) if ax is None else ax
        image = ax.imshow(values, cmap="Greys", norm=Normalize(0, top))
        ax.grid(visible=False)
        ax.set_yticks(range(len(rows)), rows)
        slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        ax.set_xticks(range(len(columns)), columns, **slanted)  # type: ignore[arg-type]
        ax.tick_params(length=0)
        if len(rows) <= NUMBERED:
            _write_numbers(ax, values, top)
        label = str(da.attrs.get("long_name", da.name or "")).replace("_", " ")
        as_vectors(ax.figure.colorbar(image, ax=ax, label=label, shrink=0.8))
    return ax


def _table_axes(rows: int) -> Axes:
    side = float(np.clip(0.46 * rows + 1.4, 3.0, 9.0))
    return new_axes(side + 0.9, side)


def _write_numbers(ax: Axes, values: Any, top: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        words = f"{value:.2f}" if np.isfinite(value) else "–"
        ink = "white" if np.isfinite(value) and value > 0.55 * top else "#1a1a1a"
        middle: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5}
        ax.text(column, row, words, color=ink, **middle)


def coverage_map(coverage: Any, ax: Axes | None = None) -> Axes:
    """Draw every parameter of a model: its size, its block, and how it is covered.

    A row is a parameter, in the order of the model; bars are its entries on a log
    scale. Parameters of one block touch; a block begins with a rule.

    Parameters
    ----------
    coverage
        What `fl.coverage` returned, or its `.table()`.
    ax
        Where to draw; new axes by default.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> rows = [["fc.weight", "fc", 12, "shared", ""], ["s", "", 1, "frozen", "asked"]]
    >>> columns = ["parameter", "block", "numbers", "form", "reason"]
    >>> ax = coverage_map(pd.DataFrame(rows, columns=columns))
    >>> [t.get_text() for t in ax.get_yticklabels()]
    ['fc.weight', 's']
    >>> plt.close("all")
    """
    rows = coverage if isinstance(coverage, pd.DataFrame) else _table_of(coverage)
    with publication():
        ax = (
            new_axes(7.6, float(np.clip(0.19 * len(rows) + 1.0, 2.0, 40.0)))
            if ax is None
            else ax
        )
        if not len(rows):
            say_empty(ax, "the model has no parameters")
            return ax
        _rows_of_parameters(ax, rows)
        _rules_between_blocks(ax, list(rows["block"]))
        ax.set_xscale("log")
        ax.set_xlim(0.7, 3.0 * max(float(rows["numbers"].max()), 1.0))
        ax.set_xlabel("entries of the parameter")
        _legend_of_forms(ax, rows)
    return ax


def _table_of(coverage: Any) -> pd.DataFrame:
    if not callable(getattr(coverage, "table", None)):
        frames.require_result(coverage, pd.DataFrame, "fl.coverage(model).table()")
    rows: pd.DataFrame = coverage.table()
    return rows


def _rows_of_parameters(ax: Axes, rows: pd.DataFrame) -> None:
    sizes = [int(size) for size in rows["numbers"]]
    for place, (form, numbers) in enumerate(zip(rows["form"], sizes, strict=True)):
        _, colour, hatch = FORMS.get(str(form), ("", "#888888", ""))
        size = max(float(numbers), 0.7)
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white"}
        ax.barh(place, size, 0.92, linewidth=0.4, **look)
        words = f"{numbers:,}" if numbers else "tied"
        aside: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
        ax.annotate(words, (size, place), (3, 0), fontsize=7, **aside)
    labels = [text(str(name), 34) for name in rows["parameter"]]
    ax.set_yticks(range(len(labels)), labels, fontsize=7.5)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)


def _rules_between_blocks(ax: Axes, blocks: list[str]) -> None:
    for place, (before, after) in enumerate(pairwise(blocks)):
        if before != after:
            ax.axhline(place + 0.5, color="#999999", linewidth=0.5, zorder=0.5)


def _legend_of_forms(ax: Axes, rows: pd.DataFrame) -> None:
    entries = []
    for form, (words, colour, hatch) in FORMS.items():
        count = int(rows.loc[rows["form"] == form, "numbers"].sum())
        if (rows["form"] == form).any():
            look: dict[str, Any] = {"facecolor": colour, "hatch": hatch}
            label = f"{words}: {count:,}"
            entries.append(Patch(label=label, edgecolor="white", **look))
    ax.legend(handles=entries, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
