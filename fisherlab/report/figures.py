"""The figures of a report: which are drawn, what they show, where they lie."""

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fisherlab import plots
from fisherlab.plots import frames
from fisherlab.plots.matrices import typical_maximum
from fisherlab.report.moments import Moment
from fisherlab.report.summary import damping_words
from fisherlab.report.words import number

PANELS: Final = 12
"""Panels a faceted figure has at most; the tables hold every layer."""


@dataclass(frozen=True)
class Plate:
    """A figure of the page: its caption, its picture inlined, and its files.

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
    wide: bool = False


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


def write_figures(
    ds: xr.Dataset, tree: xr.DataTree | None, m: Moment, folder: Path
) -> tuple[Plate, ...]:
    """Draw what the result has data for, write the files, return the plates.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import xarray as xr
    >>> from fisherlab.report.moments import moment
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac"]}
    >>> ds = xr.Dataset({"frobenius_error": (dims, [[0.4]])}, coords)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [p.name for p in write_figures(ds, None, moment(ds), Path(folder))]
    ['errors']
    """
    plates = []
    for recipe in RECIPES:
        with _closing():
            drawing = recipe(ds, tree, m)
            if drawing is not None:
                plates.append(_write(drawing, folder))
    return tuple(plates)


@contextmanager
def _closing() -> Iterator[None]:
    # A figure is closed even if drawing it fails; those of the caller stay open.
    before = set(plt.get_fignums())
    try:
        yield
    finally:
        for opened in set(plt.get_fignums()) - before:
            plt.close(opened)


def _write(drawing: Drawing, folder: Path) -> Plate:
    kinds = ("png", "pdf", "svg") if drawing.vector else ("png", "pdf")
    files = plots.save(
        drawing.drawn,
        folder / drawing.name,
        drawing.rows,
        formats=kinds,
        dpi=150 if drawing.vector else 200,
    )
    shown = files[kinds.index("svg")] if drawing.vector else files[0]
    return Plate(
        drawing.name,
        drawing.title,
        drawing.caption,
        _inline(shown),
        tuple(file.name for file in files),
        wide=not drawing.vector,
    )


def _inline(path: Path) -> str:
    kind = {"svg": "svg+xml", "png": "png"}[path.suffix[1:]]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _has(ds: xr.Dataset, metric: str) -> bool:
    return metric in ds.data_vars and bool(np.isfinite(ds[metric]).any())


def _rows(data: xr.DataArray) -> pd.DataFrame:
    return frames.tidy(data, frames.names(data, "approximator"))


def _panels(ds: xr.Dataset) -> tuple[list[str], str]:
    layers = frames.names(ds, "layer")
    if len(layers) <= PANELS:
        return layers, ""
    chosen = np.linspace(0, len(layers) - 1, PANELS).round().astype(int)
    note = f" {PANELS} of {len(layers)} layers are drawn; the tables hold all."
    return [layers[i] for i in chosen], note


def _when(m: Moment) -> str:
    return "" if m.step is None else f" at step {m.step}"


def _errors(ds: xr.Dataset, _: xr.DataTree | None, m: Moment) -> Drawing | None:
    if "frobenius_error" not in ds:
        return None
    caption = (
        f"Relative Frobenius error ‖F − F̂‖ / ‖F‖ of every layer's block{_when(m)}; "
        "lower is closer, 0 is the exact block, 1 what the zero matrix has. "
        "Labels give the shape of the weight with its bias column."
    )
    return Drawing(
        "errors",
        "Error per layer",
        caption,
        plots.errors(ds),
        _rows(frames.values(ds, "frobenius_error")),
    )


def _trajectory(ds: xr.Dataset, _: xr.DataTree | None, __: Moment) -> Drawing | None:
    if not _has(ds, "frobenius_error") or ds.sizes.get("step", 1) < 2:
        return None
    layers, note = _panels(ds)
    band = " Bands are the range over the seeds." if "seed" in ds.dims else ""
    caption = (
        "Relative Frobenius error of each block at the moments of training that were "
        "examined; steps are spaced by their logarithm where their gaps grow."
        f"{band}{note}"
    )
    return Drawing(
        "trajectory",
        "Error along training",
        caption,
        plots.trajectory(ds, layers=layers),
        _rows(ds["frobenius_error"]),
    )


def _inverse(_: xr.Dataset, tree: xr.DataTree | None, m: Moment) -> Drawing | None:
    rows = [] if tree is None else _inverse_rows(tree)
    if tree is None or not rows:
        return None
    scales = "; ".join(
        f"layer {row['layer']}: λ = {number(row['lambda'])}, darkest at "
        f"{number(row['darkest'])}"
        for row in rows
    )
    caption = (
        f"Absolute entries of the damped inverse |(F̂ + λI)⁻¹|{_when(m)}, white 0, one "
        "linear scale per row that ends at the 99.5th percentile of the exact inverse "
        f"({scales}). Squares are mini-blocks: the weights into one output neuron, or "
        f"of one kernel.{_masses(rows)}"
    )
    figure = plots.inverse_heatmap(tree)
    name, title = "inverse_heatmap", "The inverse, exact and approximate"
    return Drawing(name, title, caption, figure, pd.DataFrame(rows), vector=False)


def _inverse_rows(tree: xr.DataTree) -> list[dict[str, Any]]:
    nodes = {str(name): node for name, node in tree.children.items()}
    return [
        {
            "layer": name,
            "lambda": float(node.attrs.get("lambda", np.nan)),
            "darkest": typical_maximum(_exact_inverse(node)),
            "mini_block_mass": float(node.attrs.get("mini_block_mass", np.nan)),
        }
        for name, node in nodes.items()
        if "inverse" in node
    ]


def _exact_inverse(node: xr.DataTree) -> NDArray[Any]:
    return np.asarray(node.to_dataset()["inverse"].isel(approximator=0).values)


def _masses(rows: Sequence[dict[str, Any]]) -> str:
    known = [row for row in rows if np.isfinite(row["mini_block_mass"])]
    if not known:
        return ""
    told = ", ".join(f"{row['layer']}: {row['mini_block_mass']:.2f}" for row in known)
    return f" Share of the exact inverse's mass inside them: {told}."


def _directions(ds: xr.Dataset, _: xr.DataTree | None, m: Moment) -> Drawing | None:
    if not _has(ds, "direction_cosine"):
        return None
    caption = (
        "Cosine between the exact damped natural gradient (F + λI)⁻¹g and the one of "
        f"each approximation, {damping_words(ds, m)}{_when(m).strip()}; 1 is the same "
        "direction. The vertical axis does not begin at 0."
    )
    return Drawing(
        "direction_cosines",
        "Direction of the update",
        caption,
        plots.direction_cosines(ds),
        _rows(ds["direction_cosine"]),
    )


def _sweep(ds: xr.Dataset, _: xr.DataTree | None, m: Moment) -> Drawing | None:
    if not _has(ds, "inverse_error") or ds.sizes.get("damping", 1) < 2:
        return None
    layers, note = _panels(ds)
    relative = ds.attrs.get("damping_kind") == "relative"
    what = "α (λ = α times the mean eigenvalue of the block)" if relative else "λ"
    caption = (
        "Relative error of the damped inverse, ‖(F + λI)⁻¹ − (F̂ + λI)⁻¹‖ / "
        f"‖(F + λI)⁻¹‖, against the damping {what}{_when(m)}. With much damping every "
        f"inverse tends to I/λ and the approximations become alike.{note}"
    )
    return Drawing(
        "damping_sweep",
        "Inverse error against damping",
        caption,
        plots.damping_sweep(ds, layers=layers),
        _rows(ds["inverse_error"]),
    )


def _cost(ds: xr.Dataset, _: xr.DataTree | None, m: Moment) -> Drawing | None:
    if not (_has(ds, "frobenius_error") and "stored_numbers" in ds):
        return None
    if not np.isfinite(m.grid("storage_share")).any():
        return None
    caption = (
        f"Error against the numbers held, as a share of the p(p + 1)/2 of the exact "
        f"block{_when(m)}. Small marks are layers, large marks their geometric means; "
        "the grey line joins the approximations that none other beats in both."
    )
    return Drawing(
        "cost",
        "What the accuracy costs",
        caption,
        plots.cost(ds),
        frames.table(ds[["frobenius_error", "stored_numbers"]]),
    )


def _training(ds: xr.Dataset, _: xr.DataTree | None, __: Moment) -> Drawing | None:
    kinds = [
        what
        for what in ("loss", "accuracy")
        if any(f"{part}_{what}" in ds for part in ("train", "test"))
    ]
    if not kinds or ds.sizes.get("step", 1) < 2:
        return None
    with plots.publication():
        figure, axes = plt.subplots(
            1, len(kinds), figsize=(4.1 * len(kinds), 2.7), squeeze=False
        )
        figure.set_layout_engine("constrained")
        for ax, what in zip(axes[0], kinds, strict=True):
            plots.losses(ds, ax, what=what)
    names = [n for n in ds.data_vars if str(n).startswith(("train_", "test_"))]
    caption = (
        "The network's own progress at the moments examined: mean negative "
        "log-likelihood of an example, and the share classified correctly where the "
        "problem is a classification."
    )
    rows = ds[names].to_dataframe().reset_index()
    return Drawing("training", "Training", caption, figure, rows)


RECIPES: Final[
    tuple[Callable[[xr.Dataset, xr.DataTree | None, Moment], Drawing | None], ...]
] = (_errors, _trajectory, _directions, _sweep, _cost, _inverse, _training)
