"""Figures on disk: several formats and the numbers behind them, written whole."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherlab.plots import frames
from fisherlab.plots.style import publication

# Without a date in it the same figure is the same file.
_UNDATED: Final = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}


def save(
    figure: Figure | Axes | sns.FacetGrid,
    path: str | os.PathLike[str],
    data: pd.DataFrame | xr.Dataset | xr.DataArray | None = None,
    *,
    formats: Sequence[str] = ("png", "pdf"),
    dpi: int = 150,
) -> tuple[Path, ...]:
    """Write a figure as `path`.png, `path`.pdf, … and its numbers as `path`.csv.

    Every file is written under another name first and then moved, so a reader
    never meets half a file.

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
    stem = Path(path)
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{suffix}") for suffix in formats]
    with _settled(figure.figure):
        for file, suffix in zip(files, formats, strict=True):
            _atomic(file, partial(_render, figure, suffix, dpi))
    if data is not None:
        files.append(stem.with_name(f"{stem.name}.csv"))
        rows = _rows(data)
        _atomic(files[-1], lambda target: rows.to_csv(target, index=False))
    return tuple(files)


@contextmanager
def _settled(figure: Any) -> Iterator[None]:
    # The layout is solved once, not again for each format, which takes most of the time.
    engine = figure.get_layout_engine()
    with publication():
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    try:
        yield
    finally:
        figure.set_layout_engine(engine)


def _render(
    drawn: Figure | Axes | sns.FacetGrid, kind: str, dpi: int, target: Path
) -> None:
    figure: Any = drawn.figure
    with publication():
        figure.savefig(
            target,
            format=kind,
            dpi=dpi,
            bbox_inches="tight",
            pad_inches=0.05,
            metadata=_UNDATED.get(kind),
        )


def _rows(data: pd.DataFrame | xr.Dataset | xr.DataArray) -> pd.DataFrame:
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, xr.Dataset):
        return frames.table(data)
    return data.to_series().rename(str(data.name or "value")).reset_index()


def _atomic(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
