"""One look for every figure: a fixed colour, marker and dash per approximator."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import (
    FixedFormatter,
    FixedLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)
from numpy.typing import NDArray

from fisherlab.settings import put_back


@dataclass(frozen=True)
class Style:
    """How one approximator is drawn, in colour and in grey.

    Examples
    --------
    >>> Style("#0072B2", "o").linestyle
    'solid'
    """

    color: str
    marker: str
    dash: tuple[float, ...] = ()

    @property
    def linestyle(self) -> Any:
        """Return the dash in matplotlib's form."""
        return (0, self.dash) if self.dash else "solid"

    def line(self) -> dict[str, Any]:
        """Return the keywords of a line with markers."""
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": self.linestyle,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
        }


# Okabe & Ito's palette first (safe for colour-blind readers), Tol's muted after.
KNOWN: Final = {
    "exact": Style("#000000", "*"),
    "kfac": Style("#0072B2", "o"),
    "kpsvd": Style("#D55E00", "s", (5.0, 1.5)),
    "kpsvd-2": Style("#E69F00", "D"),
    "kfac-corrected": Style("#009E73", "^", (5.0, 1.5, 1.0, 1.5)),
    "mini-block": Style("#CC79A7", "P", (3.0, 1.0)),
    "diagonal": Style("#7A7A7A", "X", (1.0, 1.0)),
    "ekfac": Style("#56B4E9", "v", (2.0, 1.0, 2.0, 1.0)),
    "tkfac": Style("#882255", "<", (4.0, 2.0)),
    "deflation": Style("#332288", ">", (6.0, 1.0)),
    "lanczos-2": Style("#999933", "p", (3.0, 1.0, 1.0, 1.0)),
    "lanczos-paper": Style("#44AA99", "h", (1.0, 2.0)),
    "soap": Style("#EE3377", "d", (6.0, 1.0, 2.0, 1.0)),
    "kl-shampoo": Style("#225555", "H", (3.0, 2.0)),
    "muon": Style("#BBCC33", "8", (2.0, 1.0)),
}
SPARE: Final = (
    Style("#AA4499", "d", (5.0, 2.0)),
    Style("#117733", "H", (2.0, 2.0)),
    Style("#661100", "8", (4.0, 1.0, 1.0, 1.0)),
    Style("#6699CC", "p", (1.0, 1.5)),
    Style("#888888", "h", (6.0, 2.0)),
)
PUBLICATION: Final[dict[Any, Any]] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "normal",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.edgecolor": "#333333",
    "axes.grid": True,
    "axes.grid.which": "major",
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 6.0,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "fisherlab",
    "pdf.fonttype": 42,
}


@contextmanager
def publication() -> Iterator[None]:
    """Draw in fisherlab's look within the context and leave the settings alone.

    Examples
    --------
    >>> import matplotlib as mpl
    >>> before = mpl.rcParams["font.size"]
    >>> with publication():
    ...     mpl.rcParams["font.size"]
    9.0
    >>> mpl.rcParams["font.size"] == before
    True
    """
    before = {name: mpl.rcParams[name] for name in PUBLICATION}
    # Not `rc_context`, which puts everything back: a notebook's backend becomes
    # interactive with the first figure, and would show no second one.
    with put_back(lambda: mpl.rcParams.update(before)):
        mpl.rcParams.update(PUBLICATION)
        yield


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Give every approximator its style: known names always the same one.

    Names that fisherlab does not know take the spare styles in their order.

    Examples
    --------
    >>> styles(["kfac", "mine"])["kfac"] == styles(["other", "kfac"])["kfac"]
    True
    """
    listed = list(dict.fromkeys(names))
    strangers = [name for name in listed if name not in KNOWN]
    spare = {name: SPARE[i % len(SPARE)] for i, name in enumerate(strangers)}
    return {name: KNOWN.get(name) or spare[name] for name in listed}


FEW: Final = 30  # times the lower end: less than two powers of ten may lie between


def new_axes(width: float = 8.2, height: float = 3.6) -> Axes:
    """Open a figure with one pair of axes, `width` by `height` inches.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> ax = new_axes(4.0, 3.0)
    >>> [float(edge) for edge in ax.figure.get_size_inches()]
    [4.0, 3.0]
    >>> plt.close(ax.figure)
    """
    _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    return ax


def label_powers(axis: Axis) -> None:
    """Label the powers of ten of a logarithmic axis; where there are few, round numbers.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> ax = new_axes()
    >>> ax.set(yscale="log", ylim=(0.2, 0.7))[1]
    (0.2, 0.7)
    >>> label_powers(ax.yaxis)
    >>> [label.get_text() for label in ax.get_yticklabels()][:3]
    ['0.2', '0.3', '0.4']
    >>> plt.close(ax.figure)
    """
    low, high = axis.get_view_interval()
    axis.set_minor_formatter(NullFormatter())
    if high < FEW * low:
        axis.set_major_locator(MaxNLocator(5))
        axis.set_major_formatter("{x:g}")


def text(name: str, limit: int = 18) -> str:
    r"""Make a name fit for a figure: short, without mathematics, drawable.

    Of long names the parts between dots are abbreviated, numbers kept; what is
    still too long loses its middle. Characters that matplotlib's own font lacks
    are written as escapes instead of empty boxes.

    Examples
    --------
    >>> text("encoder.layers.11.attention.out_proj")
    'e.l.11.a.out_proj'
    >>> text("x" * 30)
    'xxxxxxxx…xxxxxxxxx'
    >>> text("a$b$")
    'a\\$b\\$'
    """
    drawn = "".join(_drawable(c) for c in unicodedata.normalize("NFC", name))
    drawn = _abbreviated(drawn, limit)
    if len(drawn) > limit:
        head = (limit - 1) // 2
        drawn = drawn[:head] + "…" + drawn[head + 1 - limit :]
    return drawn.replace("$", r"\$")


def _abbreviated(name: str, limit: int) -> str:
    *path, last = name.split(".")
    for letters in (3, 2, 1):
        if len(name) > limit:
            kept = [part if part.isdigit() else part[:letters] for part in path]
            name = ".".join([*kept, last])
    return name


def _drawable(character: str) -> str:
    if character.isprintable() and ord(character) in _charmap():
        return character
    return character.encode("unicode_escape").decode("ascii")


@cache
def _charmap() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def as_vectors(bar: Any) -> None:
    """Draw the colours of a colour bar as vectors.

    As pixels they make a PDF hold a picture of the size of the whole figure for every
    bar until it is written.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> figure, ax = plt.subplots()
    >>> bar = figure.colorbar(ax.imshow([[0.0, 1.0]]))
    >>> as_vectors(bar)
    >>> bool(bar.solids.get_rasterized())
    False
    >>> plt.close("all")
    """
    bar.solids.set(rasterized=False, edgecolor="face")


def panels(
    layers: list[str],
    col_wrap: int,
    kinds: Mapping[str, str] | None = None,
    *,
    sharex: bool = True,
) -> tuple[sns.FacetGrid, dict[str, Axes]]:
    """Open a grid of one small panel per layer, and give the axes by layer.

    What `kinds` knows of a layer stands behind its name.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> grid, axes = panels(["fc1", "fc2"], col_wrap=3)
    >>> axes["fc2"].get_title()
    'layer fc2'
    >>> plt.close("all")
    """
    titles = _titles(layers)
    wrap = min(col_wrap, len(layers))
    grid = sns.FacetGrid(
        pd.DataFrame({"layer": list(titles.values())}),
        col="layer",
        col_order=list(titles.values()),
        col_wrap=wrap,
        height=2.2 if wrap > 1 else 3.0,
        aspect={1: 1.7, 2: 1.45}.get(wrap, 1.18),
        sharex=sharex,
    )
    axes = dict(zip(layers, grid.axes.flat, strict=True))
    for layer, ax in axes.items():
        ax.set_title(f"layer {text(layer, 20)}{(kinds or {}).get(layer, '')}")
    return grid, axes


def _titles(layers: list[str]) -> dict[str, str]:
    # seaborn writes them into figures, so they must be drawable, and stay distinct.
    short = [text(name, 40) for name in layers]
    if len(set(short)) < len(layers):
        short = [f"{i}: {name}" for i, name in enumerate(short)]
    return dict(zip(layers, short, strict=True))


def legend_above(grid: sns.FacetGrid, shown: Sequence[str]) -> None:
    """Settle the layout and put one legend above the panels, entries in this order.

    The figure grows by the height of the legend, which has as many columns as fit.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> grid, axes = panels(["fc"], col_wrap=1)
    >>> _ = axes["fc"].plot([1, 2], label="kfac")
    >>> legend_above(grid, ["kfac", "not drawn"])
    >>> [entry.get_text() for entry in grid.figure.legends[0].get_texts()]
    ['kfac']
    >>> plt.close("all")
    """
    handles: dict[str, Any] = {}
    for ax in grid.axes.flat:
        handles |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    grid.tight_layout()
    named = [name for name in shown if name in handles]
    if not named:
        return
    figure = grid.figure
    width, height = figure.get_size_inches()
    rows = -(-len(named) // (6 if len(grid.axes.flat) > 2 else 3))
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 1.0)}
    for columns in range(-(-len(named) // rows), 0, -1):
        look = [handles[name] for name in named], [text(name, 40) for name in named]
        legend = figure.legend(*look, ncols=columns, **place)
        box = legend.get_window_extent()
        if columns == 1 or box.width <= width * figure.dpi:
            break
        legend.remove()
    room = box.height / figure.dpi
    edges, shrink = figure.subplotpars, height / (height + room)
    figure.set_size_inches(width, height + room)
    figure.subplots_adjust(top=edges.top * shrink, bottom=edges.bottom * shrink)


def tick_at(axis: Axis, places: Iterable[float] | NDArray[Any]) -> None:
    """Write these numbers at an axis, and no other tick.

    Examples
    --------
    >>> _, ax = plt.subplots()
    >>> tick_at(ax.xaxis, [0, 20])
    >>> [tick.get_text() for tick in ax.get_xticklabels()]
    ['0', '20']
    >>> plt.close("all")
    """
    known = list(places)
    axis.set_major_locator(FixedLocator([float(place) for place in known]))
    axis.set_major_formatter(FixedFormatter([f"{place:g}" for place in known]))
    axis.set_minor_locator(NullLocator())
