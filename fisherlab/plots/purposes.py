"""What approximations are worth in what they are used for: a row of panels a purpose."""

import re
from collections import Counter
from collections.abc import Sequence
from textwrap import shorten, wrap
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from fisherlab.plots.frames import drawn, kinds, known_layers, require_result
from fisherlab.plots.style import Style, legend_above, panels, publication, styles, text

COLUMNS: Final = 4
LETTERS: Final = 25  # of a line of a title
ROOM: Final = 22  # letters of all ticks
DECADES: Final = 5  # of a scale that zero stands on
TICKS: Final = 4
# Inches. Panels are placed by hand: a solved layout takes longer than all that is drawn.
WIDE, GAP, ROW, LINE, HEADER, FOOT = 1.62, 0.16, 0.2, 0.145, 0.36, 0.3
LETTER: Final = 0.082


def purposes(found: xr.Dataset, purpose: str | None = None) -> Figure:
    """Draw every measure of a purpose: layers as dots, all of them together as a bar.

    The line is what the exact block has. A cross at the left of a row says that a layer
    has no number there; what stands at the right of the first panels says why.

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
    ...         "title": ("measure", ["largest eigenvalue"]),
    ...         "unit": ("measure", ["1"]),
    ...         "best": ("measure", [1.0]),
    ...     },
    ... )
    >>> figure = purposes(found)
    >>> figure.axes[0].get_title(loc="left")
    'largest eigenvalue'
    >>> plt.close(figure)
    """
    require_result(found, xr.Dataset, "fl.compare(..., purpose=[...])")
    if "of_purpose" not in found.coords:
        raise ValueError(
            "purposes: the table holds none; fl.compare(..., purpose=[...]) makes one."
        )
    known = list(dict.fromkeys(found["of_purpose"].values.tolist()))
    if purpose is not None and purpose not in known:
        raise ValueError(
            f"purposes: purpose={purpose!r} was given; the table holds {', '.join(known)}."
        )
    shown = known if purpose is None else [purpose]
    methods = [str(n) for n in found["approximator"].values]
    named = [n for n in methods if n != "exact"] or methods
    tables = [
        found.sel(approximator=named).isel(measure=(found["of_purpose"] == one).values)
        for one in shown
    ]
    left = 0.15 + LETTER * max(len(text(name)) for name in named)
    columns = max(min(COLUMNS, table.sizes["measure"]) for table in tables)
    whole = left + columns * (WIDE + GAP)
    with publication():
        figure = plt.figure(figsize=(whole, sum(_height(one) for one in tables)))
        top = 0.0
        for one in tables:
            _section(figure, one, left, top)
            top += _height(one)
    return figure


WHOLE: Final = "all layers together"


def own_dampings(
    found: xr.Dataset, layers: Sequence[str] | None = None, *, col_wrap: int = 3
) -> sns.FacetGrid:
    """Draw what steps reach at dampings of their own, beside the gradient itself.

    The share of the exact step's decrease against the damping μ of a method over the
    common λ: a panel for all layers together and one per layer. A ring marks the best
    damping; the dashed line is the step along the gradient, below which a method is not
    worth its cost.

    Parameters
    ----------
    found
        What `fl.compare` returned with `purpose=fl.Step(...)`.
    layers
        Those with a panel of their own; all by default.
    col_wrap
        Panels in a row.

    Raises
    ------
    ValueError
        If the table holds no steps, or not those layers.

    Examples
    --------
    >>> import xarray as xr
    >>> over = ("approximator", "own_damping")
    >>> found = xr.Dataset(
    ...     {
    ...         "decrease": (("layer", *over), [[[0.5, 0.9]]]),
    ...         "network_decrease": (over, [[0.5, 0.9]]),
    ...         "gradient_decrease": ("layer", [0.4]),
    ...         "network_gradient_decrease": 0.4,
    ...     },
    ...     {"layer": ["0"], "approximator": ["kfac"], "own_damping": [1.0, 10.0]},
    ... )
    >>> list(own_dampings(found).axes_dict)
    ['all layers together', '0']
    >>> plt.close("all")
    """
    require_result(found, xr.Dataset, "fl.compare(..., purpose=fl.Step(...))")
    if "decrease" not in found:
        raise ValueError(
            "own_dampings: the table holds no steps at several dampings; "
            "fl.compare(..., purpose=fl.Step(...)) makes one."
        )
    chosen = known_layers(found["decrease"], layers)
    whole = found["network_decrease"].reset_coords(drop=True).expand_dims(layer=[WHOLE])
    each = found["decrease"].sel(layer=chosen).reset_coords(drop=True)
    shares = xr.concat([whole, each], "layer")
    plain = [float(found["network_gradient_decrease"])]
    plain += found["gradient_decrease"].sel(layer=chosen).values.tolist()
    shown = [n for n in drawn(shares) if n != "exact"]
    look = styles(map(str, found["approximator"].values))
    with publication():
        grid, axes = panels([WHOLE, *chosen], col_wrap, kinds(found))
        for ax, row, level in zip(axes.values(), shares, plain, strict=True):
            for name in shown:
                _own(ax, name, row.sel(approximator=name), look[name])
            ax.axhline(level, color="#555555", lw=1.2, ls=(0, (4, 2)), label=GRADIENT)
        axes[WHOLE].set_title(WHOLE)
        grid.set(xscale="log", ylim=(0, 1.03))
        grid.set_axis_labels("own damping μ / λ", "share of the decrease")
        legend_above(grid, [*shown, GRADIENT])
    return grid


GRADIENT: Final = "the gradient"


def _own(ax: Axes, name: str, shares: xr.DataArray, look: Style) -> None:
    x, y = shares["own_damping"].values, shares.values
    ax.plot(x, y, label=name, **look.line() | {"markersize": 3.5})
    if np.isfinite(y).any():
        best = int(np.nanargmax(y))
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": look.color}
        ax.scatter(x[best], y[best], 70, linewidths=1.3, zorder=4, **ring)


def _rows(table: xr.Dataset) -> list[list[int]]:
    """Deal the measures of a purpose out to rows of about as many panels each."""
    count = table.sizes["measure"]
    rows = -(-count // COLUMNS)
    return [part.tolist() for part in np.array_split(np.arange(count), rows)]


def _titles(table: xr.Dataset, places: Sequence[int]) -> list[str]:
    told = []
    for place in places:
        unit = str(table["unit"].values[place])
        whole = f"{table['title'].values[place]}{f' [{unit}]' if unit != '1' else ''}"
        told.append("\n".join(wrap(whole, LETTERS, break_on_hyphens=False)))
    return told


def _lines(table: xr.Dataset, places: Sequence[int]) -> int:
    return max(told.count("\n") + 1 for told in _titles(table, places))


def _height(table: xr.Dataset) -> float:
    methods = table.sizes["approximator"]
    return HEADER + sum(
        LINE * _lines(table, places) + ROW * methods + FOOT for places in _rows(table)
    )


def _section(figure: Any, table: xr.Dataset, left: float, top: float) -> None:
    """Draw a purpose: its name, its panels, and why there are crosses."""
    width, height = figure.get_size_inches()
    names = table["approximator"].values.tolist()
    purpose = str(table["of_purpose"].values[0])
    setting = ""
    if "setting" in table.coords:
        setting = str(table["setting"].sel(purpose=purpose).item())
    at = 1 - (top + 0.1) / height
    figure.text(0, at, purpose, weight="bold", size=10.5, va="top")
    start = (0.2 + 0.1 * len(purpose)) / width
    figure.text(start, at, setting, size=8.5, va="top", color="#555555")
    down, tall = top + HEADER, ROW * len(names)
    for n, places in enumerate(_rows(table)):
        down += LINE * _lines(table, places)
        for column, (place, told) in enumerate(
            zip(places, _titles(table, places), strict=True)
        ):
            corner = left + column * (WIDE + GAP), height - down - tall
            box = np.array([*corner, WIDE, tall]) / np.tile([width, height], 2)
            ax = figure.add_axes(tuple(box))
            _panel(ax, table.isel(measure=place), [] if column else names)
            ax.set_title(told, loc="left", size=8.5, pad=3)
            if n == 0 and place == places[-1]:
                _reasons(ax, table, purpose)
        down += tall + FOOT


def _panel(ax: Axes, one: xr.Dataset, labels: Sequence[str]) -> None:
    """Draw a measure, a row an approximation; the names stand where `labels` has them."""
    names, best = one["approximator"].values.tolist(), float(one["best"])
    look, rows = styles(names), np.arange(len(names))
    colors = np.array([look[name].color for name in names])
    values, whole = one["value"].transpose("approximator", "layer").values, one["network"]
    heights = rows[:, None] + _spread(values.shape[1])
    each = np.repeat(colors, values.shape[1])
    ax.axvline(best, color="#333333", linewidth=0.8, zorder=1)
    ax.hlines(rows[1:] - 0.5, 0, 1, "#EEEEEE", lw=0.6, transform=ax.get_yaxis_transform())
    ax.scatter(values, heights, 12, each, alpha=0.6, zorder=2, linewidths=0)
    ax.vlines(whole.values, rows - 0.38, rows + 0.38, colors.tolist(), lw=2.4, zorder=3)
    lacking = rows[~np.isfinite(values).all(1)]
    left = np.full(len(lacking), 0.02)
    foot: Any = {"marker": "x", "transform": ax.get_yaxis_transform(), "linewidths": 1}
    ax.scatter(left, lacking, 16, colors[lacking], **foot)
    _scale(ax, np.append(values, whole.values), best)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_yticks(rows if labels else (), [text(name) for name in labels])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")


def _spread(count: int) -> NDArray[Any]:
    return np.linspace(-0.25, 0.25, count) if count > 1 else np.zeros(1)


def _reasons(ax: Axes, table: xr.Dataset, purpose: str) -> None:
    """Say at the right of every row in how many layers numbers lack, and why: two lines."""
    if "status" not in table:
        return
    lacks = table["value"].isnull().any("measure")
    for y, name in enumerate(table["approximator"].values.tolist()):
        cells = table["status"].sel(purpose=purpose, approximator=name).values
        missing = cells[lacks.sel(approximator=name).values]
        counts = Counter(brief(str(cell)) for cell in missing)
        if counts:
            (why, n), *more = counts.most_common()
            rest = more[0][0] if len(more) == 1 else "other reasons"
            lines = [f"{why} ({n})"]
            lines += [f"{rest} ({sum(count for _, count in more)})"] if more else []
            told = ",\n".join(lines)
            ax.annotate(
                f"× {told}",
                (1.05, y),
                xycoords=ax.get_yaxis_transform(),
                va="center",
                size=7 if len(lines) == 1 else 6,  # two lines fit a row
                linespacing=0.9,
                color="#555555",
                annotation_clip=False,
            )


def brief(status: str) -> str:
    """Say in a word or two why a number is not there.

    Examples
    --------
    >>> brief("not positive definite (smallest eigenvalue -1, λ above 1 needed)")
    'indefinite'
    >>> brief("left out for size: step (3e+13 multiply-adds, about 1 h); ask with --time")
    'left out for size'
    """
    if "positive definite" in status:
        return "indefinite"
    return shorten(re.split(r":| \(", status, maxsplit=1)[0], 40, placeholder=" …")


def _scale(ax: Axes, values: NDArray[Any], best: float) -> None:
    """Take a logarithmic scale where numbers span more than a factor of 30."""
    values = values[np.isfinite(values)]
    ends = min([*values, best]), max([*values, best])
    sizes = np.abs(values[values != 0])
    if not len(sizes) or sizes.max() < 30 * sizes.min():
        _linear(ax, *ends, best)
    elif ends[0] > 0:
        ax.set_xscale("log")
        low, high = (int(end) for end in (np.ceil(_power(ends[0])), _power(ends[1])))
        step = -(-(high - low + 1) // TICKS)
        _ticked(ax, [10.0**k for k in range(high, low - 1, -step)], ends)
    else:
        high = int(np.floor(_power(sizes.max())))
        low = max(high - DECADES, int(np.floor(_power(np.quantile(sizes, 0.1)))))
        ax.set_xscale("symlog", linthresh=10.0**low)
        sides = [s for s in (-1, 1) if (s * values > 10.0**low).any()]
        step = max(1, -(-(high - low) * len(sides) // TICKS))
        powers = [s * 10.0**k for s in sides for k in range(high, low, -step)]
        _ticked(ax, [0.0, *(x for x in powers if ends[0] <= x <= ends[1])], ends)


def _power(x: float) -> float:
    return float(np.log10(x))


def _linear(ax: Axes, low: float, high: float, best: float) -> None:
    least = 1e-3 * max(abs(best), 1.0)  # what differs by less is drawn as equal
    if high - low < least:
        low, high = low - least, high + least
    base = 10.0 ** (np.floor(_power(high - low)) - 1)
    for step in (m * base for m in (1, 2, 5, 10, 20, 50)):
        first, last = int(np.ceil(low / step)), int(np.floor(high / step))
        places = [k * step for k in range(first, last + 1)]
        if sum(len(_written(x)) + 1 for x in places) <= ROOM:
            break
    _ticked(ax, places, (low, high))


def _ticked(ax: Axes, places: Sequence[float], ends: tuple[float, float]) -> None:
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = (ax.transData.transform((end, 0))[0] for end in ends)
    pad = 0.06 * (high - low)
    inverse = ax.transData.inverted()
    ax.set_xlim(*(inverse.transform((x, 0))[0] for x in (low - pad, high + pad)))
    kept = sorted(places if ax.get_xscale() == "linear" else _apart(ax, places))
    ax.set_xticks(kept, [_written(x) for x in kept])


def _apart(ax: Axes, places: Sequence[float]) -> list[float]:
    """Return the places whose words do not run into those of an earlier one."""
    kept: dict[float, tuple[float, float]] = {}
    for x in places:
        at = ax.transAxes.inverted().transform(ax.transData.transform((x, 0)))[0]
        half = (len(_written(x)) + 1) / (2 * ROOM)
        if all(at + half <= low or high <= at - half for low, high in kept.values()):
            kept[x] = at - half, at + half
    return list(kept)


def _written(x: float) -> str:
    """Write a tick without mathematics, whose setting takes most of a drawing's time.

    Examples
    --------
    >>> _written(0.5), _written(-1e4), _written(1e-3)
    ('0.5', '−10⁴', '0.001')
    """
    size = abs(x)
    if size and not 1e-3 <= size < 1e4:
        power = round(np.log10(size))
        if np.isclose(size, 10.0**power):
            raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
            return f"{'−' if x < 0 else ''}10{raised}"
    return f"{round(x, 12):g}".replace("-", "−")
