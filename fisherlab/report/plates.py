"""A figure of a report: drawn, written into files, inlined, and dark with its page."""

import base64
import colorsys
import json
import re
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

PAPER: Final = (0x17, 0x18, 0x1A)
"""What stands behind everything in dark mode, as in `page.css`."""
_INK: Final = (0xE7, 0xE6, 0xE3)
_GREY: Final = 0.12  # spread of the channels up to which a colour is a grey
_CONTRAST: Final = 5.0  # of lines to the paper
_LIGHTER: Final = 0.05  # of the way to white, a step
Colour = tuple[float, ...]  # red, green, blue


def adaptive(svg: str) -> str:
    """Add to a drawing what its colours are where a reader prefers dark pages.

    Greys change places between paper and ink. Other colours stay where they stand out
    from the dark paper, and become lighter where they do not.

    Examples
    --------
    >>> found = adaptive('<svg><path style="fill: #ffffff; stroke: #0072b2"/></svg>')
    >>> "fill: #17181a" in found, "stroke: #0093e5" in found
    (True, True)
    """
    known = sorted(set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg)))
    rules = ["svg { fill: " + _hex(_INK) + " }"]  # what has no colour is black
    for colour in known:
        dark = in_the_dark(colour)
        rules += [
            f'[style*="{what}: {colour}"] {{ {what}: {dark} !important }}'
            for what in ("fill", "stroke")
            if f"{what}: {colour}" in svg
        ]
    media = "@media screen and (prefers-color-scheme: dark)"
    sheet = f"<style>{media} {{ {' '.join(rules)} }}</style>"
    return re.sub(r"<svg[^>]*>", lambda head: head[0] + sheet, svg, count=1)


def in_the_dark(colour: str) -> str:
    """Return what a colour on white paper becomes on dark paper.

    Examples
    --------
    >>> in_the_dark("#ffffff"), in_the_dark("#000000"), in_the_dark("#e69f00")
    ('#17181a', '#e7e6e3', '#e69f00')
    """
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    channels = red, green, blue
    if max(channels) - min(channels) <= _GREY:
        white = sum(channels) / 3
        mixed = (p * white + i * (1 - white) for p, i in zip(PAPER, _INK, strict=True))
        return _hex(tuple(mixed))
    hue, light, full = colorsys.rgb_to_hls(*channels)
    while contrast(channels) < _CONTRAST and light < 1:
        light = min(1.0, light + _LIGHTER)
        channels = colorsys.hls_to_rgb(hue, light, full)
    return _hex(tuple(255 * c for c in channels))


def contrast(channels: Colour) -> float:
    """Return how a colour (channels from 0 to 1) stands out from the dark paper.

    References
    ----------
    Web Content Accessibility Guidelines 2.2, "contrast ratio".

    Examples
    --------
    >>> round(contrast((1.0, 1.0, 1.0)))
    18
    """
    own, paper = (_luminance(one) for one in (channels, tuple(c / 255 for c in PAPER)))
    return (max(own, paper) + 0.05) / (min(own, paper) + 0.05)


def _luminance(channels: Colour) -> float:
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _hex(channels: Colour) -> str:
    return "#" + "".join(f"{round(c):02x}" for c in channels)


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
