"""The figures of a report: which are drawn, and what their captions say."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from fisherlab import plots
from fisherlab.analysis.files import judged
from fisherlab.analysis.verdicts import best_dampings, titles
from fisherlab.plots import frames
from fisherlab.plots.matrices import typical_maximum
from fisherlab.report.plates import Drawing, Plate, closing, write_plate
from fisherlab.report.rankings import Moment, contest
from fisherlab.report.sizes import PICTURED, PROBES, WHOLE, spread
from fisherlab.report.summary import damping_words
from fisherlab.showing import layers as named
from fisherlab.showing import number

LARGEST: Final = 5
"""Layers with a panel of their own beside that of all together."""
_FRONT: Final = (
    "Approximations of the same cost stand side by side; hollow ones lack layers that "
    "others have; of the rest the grey line joins those that none other beats in both."
)
INVERSE: Final = "inverse_heatmap"
"""A picture of so many squares that vectors would be larger."""
Drawn = tuple[str, Any, pd.DataFrame]  # the caption, what was drawn, the numbers behind it
Recipe = Callable[[xr.Dataset, xr.DataTree | None, Moment], Drawn | None]


def write_figures(
    ds: xr.Dataset, tree: xr.DataTree | None, m: Moment, folder: Path
) -> tuple[Plate, ...]:
    """Draw what the result has data for, write the files, return the plates.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import xarray as xr
    >>> from fisherlab.report.rankings import moment
    >>> dims = ("layer", "approximator")
    >>> coords = {"layer": ["0"], "approximator": ["kfac"]}
    >>> ds = xr.Dataset({"frobenius_error": (dims, [[0.4]])}, coords)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [p.name for p in write_figures(ds, None, moment(ds), Path(folder))]
    ['errors']
    """
    plates = []
    for name, title, recipe in RECIPES:
        with closing():
            drawn = recipe(ds, tree, m)
            if drawn is not None:
                drawing = Drawing(name, title, *drawn, vector=name != INVERSE)
                plates.append(write_plate(drawing, folder))
    return tuple(plates)


def _has(ds: xr.Dataset, metric: str) -> bool:
    return metric in ds.data_vars and bool(np.isfinite(ds[metric]).any())


def _rows(data: xr.DataArray) -> pd.DataFrame:
    return frames.tidy(data, frames.names(data, "approximator"))


def _panels(ds: xr.Dataset) -> tuple[list[str], str]:
    return _few(frames.names(ds, "layer"), "the tables hold all")


def _few(layers: list[str], rest: str) -> tuple[list[str], str]:
    drawn = list(spread(layers))
    some = f" {len(drawn)} of {len(layers)} layers are drawn; {rest}."
    return drawn, some if len(drawn) < len(layers) else ""


def _lacking(ds: xr.Dataset, m: Moment, metric: str) -> str:
    """Say which marks a figure of a metric lacks, and why."""
    one = contest(ds, m, metric)
    told = "" if one is None else one.missing()
    return f" {told}" if told else ""


def _when(m: Moment) -> str:
    return "" if m.step is None else f" at step {m.step}"


def _errors(ds: xr.Dataset, _: xr.DataTree | None, m: Moment) -> Drawn | None:
    if "frobenius_error" not in ds:
        return None
    caption = (
        f"Relative Frobenius error ‖F − F̂‖ / ‖F‖ of every layer's block{_when(m)}; "
        "lower is closer, 0 is the exact block, 1 what the zero matrix has."
    )
    axes = plots.errors(ds)
    if any("×" in label.get_text() for label in axes.get_xticklabels()):
        caption += " Labels give the shape of the weight with its bias column."
    if "noise_floor" in ds:
        caption += (
            " Shaded: how far the exact block itself is from that of unlimited data, "
            "judged by random halves."
        )
    caption += _lacking(ds, m, "frobenius_error")
    return caption, axes, _rows(frames.values(ds, "frobenius_error"))


def _purposes(ds: xr.Dataset, _: xr.DataTree | None, m: Moment) -> Drawn | None:
    if "of_purpose" not in ds.coords:
        return None
    found = judged(ds)
    settings = dict(zip(found["purpose"].values, found["setting"].values, strict=True))
    caption = (
        f"What each approximation is worth in what it is used for{_when(m)}: dots are "
        "layers, bars all layers together, the line what the exact block has; a cross at "
        "the left where a layer has no number, with the reason and the number of layers "
        "beside the panels. "
        + "; ".join(f"{name}: {told}" for name, told in settings.items() if told)
        + "."
    )
    return caption, plots.purposes(found), found[["value"]].to_dataframe().reset_index()


def _own_dampings(ds: xr.Dataset, _: xr.DataTree | None, m: Moment) -> Drawn | None:
    found = judged(ds)
    if "network_decrease" not in found:
        return None
    sizes = (found["d_out"] * found["d_in"]).values
    largest = np.sort(np.argsort(-sizes, kind="stable")[:LARGEST])
    layers = [str(name) for name in found["layer"].values[largest]]
    some = f" and for the {len(layers)} largest" if len(layers) < len(sizes) else ""
    caption = (
        "The share of the exact step's decrease that each method reaches when it is damped "
        f"by μ instead of the common λ{_when(m)}, its length chosen best, for all layers "
        f"together{some}; rings mark the best μ, the dashed line is the gradient. "
        f"All layers together: {'; '.join(best_dampings(found))}."
    )
    rows = found[["decrease"]].to_dataframe().reset_index()
    figure = plots.own_dampings(found, layers)
    return caption, figure, rows[[*found["decrease"].dims, "decrease"]]


def _undrawn(ds: xr.Dataset, shown: Collection[str], why: str) -> str:
    """Name the layers without a panel."""
    names = frames.names(ds, "layer")
    absent = [title for n, title in zip(names, titles(ds), strict=True) if n not in shown]
    return f" Not drawn: {named(absent)}, {why}." if absent else ""


def _density(ds: xr.Dataset, tree: xr.DataTree | None, m: Moment) -> Drawn | None:
    nodes = {} if tree is None else {str(k): n.to_dataset() for k, n in tree.items()}
    nodes = {name: ds for name, ds in nodes.items() if "share" in ds}
    if tree is None or not nodes:
        return None
    damping = "; ".join(f"{n}: {number(ds.attrs['lambda'])}" for n, ds in nodes.items())
    caption = (
        f"Where the eigenvalues of each block lie{_when(m)}: their share per decade, over "
        "the mean eigenvalue of the exact block. Left of the damping λ, the dashed line, "
        "the damping decides and not the matrix; words in the panels tell which share of "
        "the exact block's eigenvalues is above λ (> λ), and of which matrix how many are "
        f"zero or below (≤ 0), which this axis cannot show. λ by layer: {damping}. Blocks "
        f"of more than {WHOLE:,} rows by {PROBES} sign vectors (`fl.density`)."
        f"{_undrawn(ds, nodes, 'which take too long')}"
    )
    rows = [ds[["eigenvalue", "share"]].to_dataframe().dropna() for ds in nodes.values()]
    frame = pd.concat(dict(zip(nodes, rows, strict=True)), names=["layer"]).reset_index()
    return caption, plots.density(tree), frame


def _trajectory(ds: xr.Dataset, _: xr.DataTree | None, __: Moment) -> Drawn | None:
    if not _has(ds, "frobenius_error") or ds.sizes.get("step", 1) < 2:
        return None
    layers, note = _panels(ds)
    band = " Bands are the range over the seeds." if "seed" in ds.dims else ""
    caption = (
        "Relative Frobenius error of each block at the moments of training that were "
        "examined; steps are spaced by their logarithm where their gaps grow."
        f"{band}{note}"
    )
    if not np.isfinite(ds["frobenius_error"].sel(layer=layers)).all():
        caption += (
            " Gaps were left out for size, or are not to be had: `status` says which."
        )
    return caption, plots.trajectory(ds, layers=layers), _rows(ds["frobenius_error"])


def _inverse(ds: xr.Dataset, tree: xr.DataTree | None, m: Moment) -> Drawn | None:
    known = [] if tree is None else _inverse_rows(tree)
    if tree is None or not known:
        return None
    layers, note = _few([row["layer"] for row in known], "`inverse_blocks.nc` holds all")
    rows = [row for row in known if row["layer"] in layers]
    scales = "; ".join(
        f"layer {row['layer']}: λ = {number(row['lambda'])}, up to {number(row['darkest'])}"
        for row in rows
    )
    caption = (
        f"Absolute entries of the damped inverse |(F̂ + λI)⁻¹|{_when(m)}, from 0, the "
        "background, on a linear scale per row to the 99.5th percentile of the exact one "
        f"({scales}). Squares are mini-blocks: the weights into one output neuron, or "
        f"of one kernel.{_masses(rows)}{note}"
    )
    small = f"of more than {PICTURED:,} parameters or without all their numbers"
    caption += _undrawn(ds, [row["layer"] for row in known], f"{small} (`--layers`)")
    caption += " Click on the picture to enlarge it."
    return caption, plots.inverse_heatmap(tree, layers), pd.DataFrame(known)


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


def _directions(ds: xr.Dataset, _: xr.DataTree | None, m: Moment) -> Drawn | None:
    if not _has(ds, "direction_cosine"):
        return None
    caption = (
        "Cosine between the exact damped natural gradient (F + λI)⁻¹g and the one of "
        f"each approximation, {damping_words(ds, m)}{_when(m).strip()}; 1 is the same "
        "direction. The vertical axis does not begin at 0."
        f"{_lacking(ds, m, 'direction_cosine')}"
    )
    return caption, plots.direction_cosines(ds), _rows(ds["direction_cosine"])


def _sweep(ds: xr.Dataset, _: xr.DataTree | None, m: Moment) -> Drawn | None:
    if not _has(ds, "inverse_error") or "damping" not in ds["inverse_error"].dims:
        return None
    if ds.sizes["damping"] < 2 or ds.attrs.get("damping_kind") == "mixed":
        return None  # no axis holds several kinds
    layers, note = _panels(ds)
    relative = ds.attrs.get("damping_kind") == "relative"
    what = "α (λ = α times the mean eigenvalue of the block)" if relative else "λ"
    caption = (
        "Relative error of the damped inverse, ‖(F + λI)⁻¹ − (F̂ + λI)⁻¹‖ / "
        f"‖(F + λI)⁻¹‖, against the damping {what}{_when(m)}. With much damping every "
        f"inverse tends to I/λ and the approximations become alike.{note}"
    )
    return caption, plots.damping_sweep(ds, layers=layers), _rows(ds["inverse_error"])


def _steps(ds: xr.Dataset, _: xr.DataTree | None, m: Moment) -> Drawn | None:
    if not _has(ds, "direction_cosine") or ds.sizes.get("damping", 1) < 2:
        return None
    if ds.attrs.get("damping_kind") == "mixed":
        return None
    layers, note = _panels(ds)
    caption = (
        "Cosine of the exact damped natural gradient and the approximate one, against "
        f"the damping{_when(m)}. With much damping every step is the gradient's.{note}"
    )
    return (
        caption,
        plots.damping_sweep(ds, "direction_cosine", layers=layers),
        _rows(ds["direction_cosine"]),
    )


def _cost(ds: xr.Dataset, _: xr.DataTree | None, m: Moment) -> Drawn | None:
    if not (_has(ds, "frobenius_error") and "stored_numbers" in ds):
        return None
    if not np.isfinite(m.grid("storage_share")).any():
        return None
    caption = (
        f"Error against the numbers held, as a share of the p(p + 1)/2 of the exact "
        f"block{_when(m)}. Marks have the share of all numbers and the error {m.average}; "
        f"lines reach from the lowest to the highest layer. {_FRONT}"
    )
    return caption, plots.cost(ds), frames.table(ds[["frobenius_error", "stored_numbers"]])


def _training(ds: xr.Dataset, _: xr.DataTree | None, __: Moment) -> Drawn | None:
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
        f"problem is a classification.{_counted(ds[names])}"
    )
    rows = ds[names].to_dataframe().reset_index()
    return caption, figure, rows


def _counted(losses: xr.Dataset) -> str:
    """Say over how many examples losses are means, where the result tells."""
    known = {
        str(name).partition("_")[0]: int(values.attrs["examples"])
        for name, values in losses.items()
        if "examples" in values.attrs
    }
    parts = {"train": "training", "test": "test"}
    told = [f"{count:,} {parts.get(n, n)} examples" for n, count in known.items()]
    return f" Over {' and '.join(told)}, drawn at random." if told else ""


def _network_parts(ds: xr.Dataset, _: xr.DataTree | None, __: Moment) -> Drawn | None:
    if not _has(ds, "network_squared_part"):
        return None
    caption = (
        "Squared error of the whole network's matrix, ‖F − F̂‖² / ‖F‖², in parts that "
        "add up: the blocks between layers that are dropped, and of the blocks kept "
        "what the best scaling could and could not repair. Numbers are the errors."
    )
    return caption, plots.decomposition(ds), frames.table(ds[["network_squared_part"]])


def _sources(ds: xr.Dataset, _: xr.DataTree | None, __: Moment) -> Drawn | None:
    if not _has(ds, "error") or "source" not in ds["error"].dims:
        return None
    layers, note = _panels(ds)
    caption = (
        "Relative error against the exact block with F̂ made from exact statistics, "
        "from sampled labels and from the labels of the data; dashed lines are what "
        f"those labels cost without an approximation.{note}"
    )
    return caption, plots.error_sources(ds, layers=layers), frames.table(ds[["error"]])


def _coupling(ds: xr.Dataset, _: xr.DataTree | None, __: Moment) -> Drawn | None:
    if not _has(ds, "coupling"):
        return None
    caption = (
        "Coupling of the layers, ‖F_ij‖ / √(‖F_ii‖ ‖F_jj‖): 1 on the diagonal, 0 where "
        "dropping the block between two layers loses nothing."
    )
    return caption, plots.layer_table(ds["coupling"]), frames.table(ds[["coupling"]])


def _price(ds: xr.Dataset, _: xr.DataTree | None, __: Moment) -> Drawn | None:
    if not (_has(ds, "cost_value") and _has(ds, "error")):
        return None
    known = ds["cost_value"].notnull().any(["layer", "approximator"])
    costs = [name for name in frames.names(ds, "cost") if bool(known.sel(cost=name))]
    with plots.publication():
        size = (6.6, 3.0 * len(costs))
        figure, axes = plt.subplots(len(costs), 1, figsize=size, squeeze=False)
        figure.set_layout_engine("constrained")
        for ax, name in zip(axes[:, 0], costs, strict=True):
            plots.pareto(ds, ax, cost=name)
    caption = (
        "Error against each cost. Marks have the total cost and the median of the errors; "
        f"lines reach from the lowest to the highest layer. {_FRONT}"
    )
    return caption, figure, frames.table(ds)


RECIPES: Final[tuple[tuple[str, str, Recipe], ...]] = (
    ("errors", "Error per layer", _errors),
    ("purposes", "Good for what", _purposes),
    ("own_dampings", "Which damping for which method", _own_dampings),
    ("density", "Eigenvalues, and the damping", _density),
    ("trajectory", "Error along training", _trajectory),
    ("direction_cosines", "Direction of the update", _directions),
    ("damping_sweep", "Inverse error against damping", _sweep),
    ("direction_sweep", "Direction against damping", _steps),
    ("cost", "What the accuracy costs", _cost),
    ("pareto", "Error against cost", _price),
    ("decomposition", "Where the error comes from", _network_parts),
    ("error_sources", "Error by statistics", _sources),
    ("coupling", "Coupling of the layers", _coupling),
    (INVERSE, "The inverse, exact and approximate", _inverse),
    ("training", "Training", _training),
)
