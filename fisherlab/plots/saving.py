"""Figures on disk: written in several formats, with the words of every mark."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator
from matplotlib.transforms import Bbox
from PIL import Image

from fisherlab.durable import write_durably
from fisherlab.plots import frames
from fisherlab.plots.style import publication

# Without a date in it the same figure is the same file.
_UNDATED: Final = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
_PIXELS: Final = 2**15  # along a side at most: renderers end at 2¹⁶
_MARGIN: Final = 0.1  # inches around what is drawn; widths of text depend on the dpi

Drawn: TypeAlias = Figure | Axes | sns.FacetGrid
Numbers: TypeAlias = pd.DataFrame | xr.Dataset | xr.DataArray | xr.DataTree


def save(
    figure: Drawn,
    path: str | os.PathLike[str],
    data: Numbers | None = None,
    *,
    formats: Sequence[str] = ("png", "pdf"),
    dpi: int = 150,
) -> tuple[Path, ...]:
    """Write a figure as `path`.png, `path`.pdf, … and its numbers as `path`.csv.

    Every file is written under another name first and then moved, so a reader
    never meets half a file. A figure of more than 32,768 pixels along a side is
    written with fewer dots per inch.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import matplotlib.pyplot as plt
    >>> from fisherlab.plots.style import new_axes
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [file.name for file in save(new_axes(), Path(folder) / "empty")]
    ['empty.png', 'empty.pdf']
    >>> plt.close("all")
    """
    files, _ = write(figure, path, data, formats=formats, dpi=dpi)
    return files


def write(
    figure: Drawn,
    path: str | os.PathLike[str],
    data: Numbers | None = None,
    *,
    formats: Sequence[str] = ("png", "pdf"),
    dpi: int = 150,
    colours: int | None = None,
) -> tuple[tuple[Path, ...], Bbox]:
    """Do what `save` does, and tell which part of the figure (in inches) is kept.

    `colours` limits the PNG to a palette: pictures of matrices then take half the
    space.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import matplotlib.pyplot as plt
    >>> from fisherlab.plots.style import new_axes
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _, kept = write(new_axes(4.0, 3.0), Path(folder) / "empty")
    >>> bool(3.5 < kept.width < 4.5)
    True
    >>> plt.close("all")
    """
    stem = Path(path)
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in formats]
    with _settled(figure.figure) as kept:
        dpi = max(1, min(dpi, int(_PIXELS / max(kept.width, kept.height))))
        for file, suffix in zip(files, formats, strict=True):
            write_durably(file, partial(_render, figure.figure, suffix, dpi, kept))
            if colours is not None and suffix == "png":
                write_durably(file, partial(_reduce, file, colours))
    if data is not None:
        files.append(stem.with_name(f"{stem.name}.csv"))
        rows = _rows(data)
        write_durably(files[-1], lambda target: rows.to_csv(target, index=False))
    return tuple(files), kept


@contextmanager
def _settled(figure: Any) -> Iterator[Bbox]:
    # The layout is solved and measured once, not again for each format: both take
    # longer than drawing. With any engine, even "none", each format draws twice.
    engine = figure.get_layout_engine()
    with publication():
        figure.draw_without_rendering()
        kept = figure.get_tightbbox().padded(_MARGIN)
    with plt.rc_context():
        plt.rcParams["figure.autolayout"] = False
        plt.rcParams["figure.constrained_layout.use"] = False
        figure.set_layout_engine(None)
    try:
        yield kept
    finally:
        figure.set_layout_engine(engine)


def _render(figure: Any, kind: str, dpi: int, kept: Bbox, target: Path) -> None:
    with publication():
        figure.savefig(
            target,
            format=kind,
            dpi=dpi,
            bbox_inches=kept,
            metadata=_UNDATED.get(kind),
        )


def _reduce(source: Path, colours: int, target: Path) -> None:
    with Image.open(io.BytesIO(source.read_bytes())) as picture:
        few = picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    few.save(target)


def _rows(data: Numbers) -> pd.DataFrame:
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, xr.Dataset):
        return frames.table(data)
    if isinstance(data, xr.DataTree):
        return frames.tree_table(data)
    return data.to_series().rename(str(data.name or "value")).reset_index()


def picture(figure: Figure, dpi: int = 110) -> bytes:
    """Return a figure as the bytes of a PNG, cut to what is drawn.

    Examples
    --------
    >>> from fisherlab.plots.style import new_axes
    >>> ax = new_axes()
    >>> picture(ax.figure)[1:4]
    b'PNG'
    >>> plt.close(ax.figure)
    """
    written = io.BytesIO()
    with publication():
        figure.savefig(written, format="png", dpi=dpi, bbox_inches="tight")
    return written.getvalue()


MOST: Final = 3000
"""Marks a picture tells of at most; more would outweigh the picture itself."""


@dataclass(frozen=True)
class Mark:
    """One mark: `x` from the left and `y` from the top, as shares of the picture.

    Examples
    --------
    >>> Mark(0.5, 0.25, "kfac · layer 0 · 0.4").text
    'kfac · layer 0 · 0.4'
    """

    x: float
    y: float
    text: str


def marks(figure: Figure, kept: Bbox) -> tuple[Mark, ...]:
    """List the marks of a figure: labelled points of its lines, and its bars.

    `kept` is the part of the figure that the picture shows, in inches, as
    `saving.write` returns it. Marks outside of their axes are left out, and beyond
    3,000 marks every k-th is told.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> figure, ax = plt.subplots()
    >>> _ = ax.plot([0.0, 1.0], [2.0, 4.0], label="kfac")
    >>> [mark.text for mark in marks(figure, Bbox([[0, 0], [6.4, 4.8]]))]
    ['kfac · 0 · 2', 'kfac · 1 · 4']
    >>> plt.close(figure)
    """
    found = [mark for ax in figure.axes for mark in _of_axes(ax, kept)]
    return tuple(found[:: -(-len(found) // MOST) or 1])


def _of_axes(ax: Axes, kept: Bbox) -> Iterator[Mark]:
    ax.get_xlim()  # matplotlib brings the limits up to date when they are asked for
    title = ax.get_title()
    for name, x, y in _series(ax):
        for at, value in zip(x, y, strict=True):
            place = _place(ax, at, value, kept)
            if place is not None:
                words = (name, title, _position(ax, at), f"{value:.4g}")
                yield Mark(*place, " · ".join(word for word in words if word))


def _series(ax: Axes) -> Iterator[tuple[str, Any, Any]]:
    """Give (name, x, y) of whatever the legend names."""
    for line in ax.lines:
        if not str(line.get_label()).startswith("_"):
            yield str(line.get_label()), *_data(line)
    for group in ax.containers:
        if isinstance(group, ErrorbarContainer):
            yield str(group.get_label()), *_data(group.lines[0])
        elif isinstance(group, BarContainer):
            tops = [bar.get_y() + bar.get_height() for bar in group.patches]
            middles = [bar.get_x() + bar.get_width() / 2 for bar in group.patches]
            yield str(group.get_label()), middles, tops


def _data(line: Line2D) -> tuple[Any, Any]:
    every = line.get_markevery()
    told = slice(None, None, every if isinstance(every, int) else None)
    x, y = (np.asarray(d, dtype=float)[told] for d in (line.get_xdata(), line.get_ydata()))
    return x, y


def _place(ax: Axes, x: float, y: float, kept: Bbox) -> tuple[float, float] | None:
    point = ax.transData.transform((x, y))
    if not np.isfinite(point).all() or not ax.bbox.padded(2).contains(*point):
        return None
    inches = point / ax.figure.dpi
    right, up = (inches - kept.min) / kept.size
    return round(float(right), 4), round(1 - float(up), 4)


def _position(ax: Axes, x: float) -> str:
    """Write a horizontal position: the nearest tick's own words where ticks are set."""
    axis = ax.xaxis
    if not isinstance(axis.get_major_locator(), FixedLocator):
        return f"{x:.4g}"
    places = np.asarray(axis.get_majorticklocs(), dtype=float)
    nearest = int(np.abs(places - x).argmin())
    words = axis.get_major_formatter().format_ticks(list(places))[nearest]
    return words.replace("\n", " ").replace("\\$", "$")
