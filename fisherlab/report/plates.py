"""A figure of a report: drawn, written into files, and inlined into the page."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherlab.plots import saving
from fisherlab.report.dark import adaptive

COLOURS: Final = 128
"""Colours of a picture without vectors: greys, and the blue of the outlines."""


@dataclass(frozen=True)
class Plate:
    """A figure of the page: caption, inlined picture, files, and what its marks say.

    `marks` is JSON: [share of the width, share of the height, words] for each mark;
    `width` is that of the drawing in inches.

    Examples
    --------
    >>> Plate("errors", "Error", "What one sees.", "data:,", ("errors.png",)).wide
    False
    """

    name: str
    title: str
    caption: str
    source: str
    files: tuple[str, ...]
    marks: str = "[]"
    wide: bool = False
    width: float = 8.2


@dataclass(frozen=True)
class Drawing:
    """A figure before it is written: what was drawn and the numbers behind it.

    Examples
    --------
    >>> import pandas as pd
    >>> from matplotlib.figure import Figure
    >>> Drawing("a", "A", "What one sees.", Figure(), pd.DataFrame()).vector
    True
    """

    name: str
    title: str
    caption: str
    drawn: Figure | Axes | sns.FacetGrid
    rows: pd.DataFrame
    vector: bool = True


@contextmanager
def closing() -> Iterator[None]:
    """Close the figures opened in the block, even if it fails; others stay open.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> with closing():
    ...     figure = plt.figure()
    >>> plt.fignum_exists(figure.number)
    False
    """
    before = set(plt.get_fignums())
    try:
        yield
    finally:
        for opened in sorted(set(plt.get_fignums()) - before):
            plt.close(opened)


def write_plate(drawing: Drawing, folder: Path) -> Plate:
    """Write a figure's files into a folder and return what the page shows of it.

    Examples
    --------
    >>> import tempfile
    >>> with closing(), tempfile.TemporaryDirectory() as folder:
    ...     rows = pd.DataFrame({"y": [1.0]})
    ...     drawing = Drawing("a", "A", "What one sees.", plt.figure(), rows)
    ...     write_plate(drawing, Path(folder)).files
    ('a.png', 'a.pdf', 'a.svg', 'a.csv')
    """
    kinds = ("png", "pdf", "svg") if drawing.vector else ("png", "pdf")
    files, kept = saving.write(
        drawing.drawn,
        folder / drawing.name,
        drawing.rows,
        formats=kinds,
        dpi=150 if drawing.vector else 200,
        colours=None if drawing.vector else COLOURS,
    )
    shown = files[kinds.index("svg")] if drawing.vector else files[0]
    figure: Any = drawing.drawn.figure
    found = saving.marks(figure, kept) if drawing.vector else ()
    return Plate(
        drawing.name,
        drawing.title,
        drawing.caption,
        _inline(shown),
        tuple(file.name for file in files),
        json.dumps([[mark.x, mark.y, mark.text] for mark in found], ensure_ascii=False),
        wide=not drawing.vector,
        width=float(kept.width),
    )


def _inline(path: Path) -> str:
    """Return a picture as the page holds it; of vectors it turns dark with the page."""
    content, kind = path.read_bytes(), path.suffix[1:]
    if kind == "svg":
        content, kind = adaptive(content.decode()).encode(), "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
