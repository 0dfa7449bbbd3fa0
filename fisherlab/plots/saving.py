"""Figures on disk: several formats and the numbers behind them, written whole."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
    # longer than drawing.
    engine = figure.get_layout_engine()
    with publication():
        figure.draw_without_rendering()
        kept = figure.get_tightbbox().padded(_MARGIN)
    figure.set_layout_engine("none")
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
