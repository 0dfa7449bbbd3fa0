"""Values along training, a small panel per layer, the losses, and a figure drawn again."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill, shorten
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from fisherlab.catalogue import FLOOR, Quantity, overall, quantity
from fisherlab.durable import write_durably
from fisherlab.plots import frames
from fisherlab.plots.profiles import say_empty
from fisherlab.plots.saving import picture
from fisherlab.plots.style import (
    Style,
    legend_above,
    new_axes,
    panels,
    publication,
    styles,
    text,
    tick_at,
)


def trajectory(
    ds: xr.Dataset,
    metric: str = "frobenius_error",
    *,
    layers: Sequence[str] | None = None,
    damping: float | str | None = None,
    col_wrap: int = 3,
) -> sns.FacetGrid:
    """Draw a metric along the steps of training, one panel per layer.

    Lines are means; where there are several seeds the band is their whole range.
    Steps whose gaps differ by more than a factor 10 are spaced by their logarithm.

    Raises
    ------
    ValueError
        If the result has no steps, or not that metric, layer or damping.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> error = xr.DataArray(
    ...     [[[0.2]], [[0.4]]],
    ...     {"step": [0, 10], "layer": ["0"], "approximator": ["kfac"]},
    ... )
    >>> grid = trajectory(xr.Dataset({"frobenius_error": error}))
    >>> [float(y) for y in grid.axes_dict["0"].lines[0].get_ydata()]
    [0.2, 0.4]
    >>> plt.close("all")
    """
    data = frames.at(ds, metric, "damping", damping)
    if "step" not in data.dims:
        raise ValueError(f"{metric!r} has no dim 'step': there is no trajectory")
    chosen = frames.known_layers(data, layers)
    return facets(data.sel(layer=chosen), "step", col_wrap)


def damping_sweep(
    ds: xr.Dataset,
    metric: str = "inverse_error",
    *,
    layers: Sequence[str] | None = None,
    step: int | None = None,
    col_wrap: int = 3,
) -> sns.FacetGrid:
    """Draw a metric against the damping, one panel per layer.

    Raises
    ------
    ValueError
        If the metric has no dim 'damping', or the result not that metric, layer or step.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> error = xr.DataArray(
    ...     [[[0.5, 0.1]]],
    ...     {"layer": ["0"], "approximator": ["kfac"], "damping": [1e-3, 1e-1]},
    ... )
    >>> grid = damping_sweep(xr.Dataset({"inverse_error": error}))
    >>> grid.axes_dict["0"].get_xscale()
    'log'
    >>> plt.close("all")
    """
    data = frames.at(ds, metric, "step", step)
    if "damping" not in data.dims:
        raise ValueError(f"{metric!r} has no dim 'damping': there is nothing to sweep")
    if data["damping"].dtype.kind not in "fiu":
        raise ValueError(
            "damping_sweep: the dampings are of several kinds "
            f"({', '.join(map(str, data['damping'].values))}) and have no common axis. "
            "Compare one kind at a time."
        )
    chosen = frames.known_layers(data, layers)
    return facets(data.sel(layer=chosen), "damping", col_wrap, _reasons(ds))


def _reasons(ds: xr.Dataset) -> dict[str, str]:
    """Say of every layer why numbers lack, in the words of the first method without."""
    if "status" not in ds:
        return {}
    status = ds["status"]
    status = status.isel({d: -1 for d in status.dims if d not in ("layer", "approximator")})
    rows = status.transpose("layer", "approximator").values
    told = (next((str(w) for w in row if str(w) != "ok"), "") for row in rows)
    return dict(zip(map(str, ds["layer"].values), told, strict=True))


def losses(
    ds: xr.Dataset | Mapping[str, xr.Dataset], ax: Axes | None = None, *, what: str = "loss"
) -> Axes:
    """Draw the training and test loss (or `what="accuracy"`) along the steps.

    Parameters
    ----------
    ds
        A result, or several runs by name, a colour each.
    ax
        Where to draw.
    what
        "loss" or "accuracy".

    Raises
    ------
    ValueError
        If a result holds neither of the two.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> ds = xr.Dataset({"train_loss": ("step", [2.3, 0.4])}, {"step": [0, 100]})
    >>> [line.get_label() for line in losses(ds).lines]
    ['training']
    >>> [line.get_label() for line in losses({"sgd": ds, "kfac": ds}).lines]
    ['sgd, training', 'kfac, training']
    >>> plt.close("all")
    """
    several = not isinstance(ds, xr.Dataset) and isinstance(ds, Mapping)
    given: Any = ds if several else {"": ds}
    runs: dict[str, xr.Dataset] = dict(given)
    if not runs:
        raise ValueError("losses: no run was given; {name: result} is expected.")
    looks = styles(list(runs)) if several else {"": _PLAIN}
    with publication():
        ax = new_axes(4.0, 2.8) if ax is None else ax
        for run, found in runs.items():
            for label, values in _losses(found, what, run).items():
                mean = values.mean("seed") if "seed" in values.dims else values
                look = looks[run].line() | {"linestyle": "-"}
                if label == "test":
                    look |= {"linestyle": (0, (4.0, 1.5)), "markerfacecolor": "white"}
                    look["markeredgecolor"] = looks[run].color
                name = f"{run}, {label}" if run else label
                ax.plot(mean["step"], mean, label=name, **look)
        ax.set_xlabel("training step")
        ax.set_ylabel(what)
        space_steps(
            ax, np.unique(np.concatenate([r["step"].values for r in runs.values()]))
        )
        ax.legend()
    return ax


_PLAIN: Final = Style("#444444", "o")  # no method's colour


def _losses(ds: xr.Dataset, what: str, run: str) -> dict[str, xr.DataArray]:
    frames.require_result(ds, xr.Dataset, "fl.follow")
    rows = {"training": f"train_{what}", "test": f"test_{what}"}
    known = {label: ds[name] for label, name in rows.items() if name in ds.data_vars}
    if not known:
        whose = f"the run {run!r}" if run else "the result"
        raise ValueError(f"{whose} has neither 'train_{what}' nor 'test_{what}'")
    return known


def facets(
    data: xr.DataArray, x: str, col_wrap: int, why: Mapping[str, str] | None = None
) -> sns.FacetGrid:
    """Draw a metric against `x`, one panel per layer, all on one scale.

    A panel without numbers says why, where `why` knows it. What is below the floor lies
    on the lower edge of a log scale, and its panel says so.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import xarray as xr
    >>> coords = {"layer": ["a", "b"], "approximator": ["kfac"], "step": [0, 5]}
    >>> error = xr.DataArray([[[1.0, 2.0]], [[3.0, 4.0]]], coords, name="error")
    >>> sorted(facets(error, "step", 2).axes_dict)
    ['a', 'b']
    >>> plt.close("all")
    """
    shown = frames.drawn(data)
    log = frames.wants_log(data, shown)
    edge = _edge(data.sel(approximator=shown)) if log else -np.inf
    frame = frames.tidy(data.clip(min=edge, keep_attrs=True) if log else data, shown)
    every = styles(frames.names(data, "approximator"))
    look = {name: every[name] for name in shown}
    with publication():
        grid, axes = panels(frames.names(data, "layer"), col_wrap, frames.kinds(data))
        for layer, ax in axes.items():
            rows = frame[frame["layer"] == layer]
            _panel(ax, rows, x, str(data.name), look, (why or {}).get(layer, ""))
            if edge > FLOOR and (rows[str(data.name)] <= edge).any():
                _say_floored(ax)
        # Only once all panels are drawn: they share their scales.
        for ax in grid.axes.flat:
            _scale(ax, data, x, log)
        _finish(grid, quantity(str(data.name), data), x, shown)
    return grid


def _edge(data: xr.DataArray) -> float:
    """Return where what is below the floor is drawn: a third of the least number above."""
    values = np.asarray(data.values, dtype=float)
    above = values > FLOOR * (1 + 1e-9)
    floored = np.isfinite(values) & ~above
    return float(values[above].min()) / 3 if floored.any() and above.any() else FLOOR


def _say_floored(ax: Axes) -> None:
    said = f"on the lower edge: below {FLOOR:g}"
    small: dict[str, Any] = {"fontsize": "x-small", "color": "0.35", "va": "bottom"}
    ax.text(0.03, 0.08, said, transform=ax.transAxes, parse_math=False, **small)


def _panel(
    ax: Axes,
    rows: pd.DataFrame,
    x: str,
    metric: str,
    look: dict[str, Style],
    why: str = "",
) -> None:
    if not len(rows) or rows[metric].isna().all():
        told = fill(shorten(why or "not measured", 110, placeholder=" …"), 28)
        middle: dict[str, Any] = {"ha": "center", "va": "center", "color": "0.35"}
        middle |= {"fontsize": "small", "parse_math": False}
        ax.text(0.5, 0.5, told, transform=ax.transAxes, **middle)
        return
    for name, style in look.items():
        series = rows[rows["approximator"] == name].dropna(subset=[metric])
        by_x = series.groupby(x)[metric].agg(["mean", "min", "max"])
        # Many marks would hide the line.
        size = 6.0 if len(by_x) <= 12 else 2.5
        ax.plot(by_x.index, by_x["mean"], label=name, **style.line(), markersize=size)
        if "seed" in rows:
            band: dict[str, Any] = {"color": style.color, "alpha": 0.18}
            ax.fill_between(by_x.index, by_x["min"], by_x["max"], linewidth=0, **band)


def _scale(ax: Axes, data: xr.DataArray, x: str, log: bool) -> None:
    positions = np.asarray(data[x].values, dtype=float)
    if x == "step":
        space_steps(ax, positions)
    elif (positions > 0).all():
        ax.set_xscale("log")
    else:
        ax.set_xscale("symlog", linthresh=positions[positions > 0].min())
    metric = quantity(str(data.name))
    if log:
        ax.set_yscale("log")
    elif metric.best == "low":
        ax.set_ylim(bottom=0)
    elif metric.best == "high" and float(data.min()) < -10:
        # At most 1, but without a lower bound: what lies near 1 must stay legible.
        ax.set_yscale("symlog", linthresh=1.0)


def _finish(grid: sns.FacetGrid, metric: Quantity, x: str, shown: list[str]) -> None:
    words = {"step": "training step", "damping": "damping"}
    grid.set_axis_labels(words[x], metric.title)
    if not shown:
        say_empty(grid.axes.flat[0], "")
        return
    legend_above(grid, shown)


def space_steps(ax: Axes, steps: NDArray[Any]) -> None:
    """Space the steps of training by their logarithm where their gaps grow, 0 kept.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import numpy as np
    >>> _, ax = plt.subplots()
    >>> space_steps(ax, np.array([0, 20, 200, 1000]))
    >>> ax.get_xscale()
    'symlog'
    >>> plt.close("all")
    """
    positive, gaps = steps[steps > 0], np.diff(np.sort(steps))
    if len(gaps) > 1 and gaps.min() > 0 and gaps.max() / gaps.min() > 10:
        ax.set_xscale("symlog", linthresh=float(positive.min()), linscale=0.5)
    if len(steps) <= 6:
        tick_at(ax.xaxis, steps)
    ax.xaxis.set_minor_formatter(NullFormatter())


def runs(
    ds: xr.Dataset,
    metric: str = "frobenius_error",
    *,
    layers: Sequence[str] | None = None,
    col_wrap: int = 3,
) -> sns.FacetGrid:
    """Draw a metric of every run, joined by a line per approximation, per layer.

    Raises
    ------
    ValueError
        If the metric is not in the result or has no dim 'run'.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> coords = {"run": ["a", "b"], "layer": ["fc"], "approximator": ["kfac"]}
    >>> error = xr.DataArray([[[0.4]], [[0.3]]], coords)
    >>> grid = runs(xr.Dataset({"frobenius_error": error}))
    >>> grid.axes_dict["fc"].lines[0].get_ydata().tolist()
    [0.4, 0.3]
    >>> plt.close("all")
    """
    data = frames.metric_of(ds, metric)
    if "run" not in data.dims:
        raise ValueError(f"{metric!r} has no dim 'run': there is only one")
    chosen = frames.known_layers(data, layers)
    shown = frames.drawn(data)
    log = frames.wants_log(data, shown)
    with publication():
        grid, axes = panels(chosen, col_wrap, frames.kinds(data))
        for layer, ax in axes.items():
            _runs_panel(ax, data.sel(layer=layer), shown, log)
        grid.set_axis_labels("", quantity(metric, data).title)
        legend_above(grid, shown)
    return grid


def _runs_panel(ax: Axes, data: xr.DataArray, shown: Sequence[str], log: bool) -> None:
    labels = [text(name, 14) for name in frames.names(data, "run")]
    look = styles(frames.names(data, "approximator"))
    for name in shown:
        values = data.sel(approximator=name).transpose("run").values.astype(float)
        values = np.maximum(values, FLOOR) if log else values
        ax.plot(range(len(labels)), values, label=name, **look[name].line())
    ax.set_xticks(range(len(labels)), labels)
    ax.set_xlim(-0.25, len(labels) - 0.75)
    if log:
        ax.set_yscale("log")
    elif quantity(str(data.name)).best == "low":
        ax.set_ylim(bottom=0)


_WIDTH, _HEIGHT = 3.9, 2.7  # inches of a panel
_METRIC: Final = "frobenius_error"


class Live:
    """Draw the losses and a metric while `fl.follow` trains, in a notebook or a file.

    `fl.follow(..., callback=fl.plots.Live())` redraws one figure after every moment: in the
    cell of a notebook, or in `file`, which is whole at any time. `figure` is the last one.

    Parameters
    ----------
    metric
        What is drawn beside the losses; `frobenius_error` by default, where a probe
        measures it.
    layer
        The layer it is drawn of; all together by default, √(Σ‖F − F̂‖² / Σ‖F‖²) of
        relative errors whose norms are known, else the median.
    file
        A PNG to draw into, for trainings outside of a notebook.

    Raises
    ------
    ValueError
        If there is neither a notebook nor a file; in the first call, if the results have
        no such metric or layer, or neither losses nor errors.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> live = Live(file=Path(tempfile.mkdtemp()) / "training.png")
    >>> live(xr.Dataset({"train_loss": ("step", [2.3, 0.4])}, {"step": [0, 100]}))
    >>> live.file.exists(), [ax.get_ylabel() for ax in live.figure.axes]
    (True, ['loss'])
    """

    def __init__(
        self,
        metric: str | None = None,
        *,
        layer: str | None = None,
        file: str | Path | None = None,
    ) -> None:
        if file is None and not _in_notebook():
            raise ValueError(
                "Live: there is no notebook to draw in; name a picture to draw into, such "
                "as Live(file='training.png')."
            )
        self.metric, self.layer = metric, layer
        self.file = None if file is None else Path(file).expanduser()
        self.figure: Figure | None = None
        self._place: Any = None

    def __call__(self, results: xr.Dataset) -> None:
        """Draw all results so far, over what was drawn before."""
        self.figure = self._draw(results)
        drawn = picture(self.figure)
        plt.close(self.figure)
        if self.file is not None:
            write_durably(self.file, lambda path: path.write_bytes(drawn))
        else:
            self._show(drawn)

    def _draw(self, results: xr.Dataset) -> Figure:
        metric = self.metric
        if metric is None and _METRIC in results:
            metric = _METRIC
        told = [w for w in ("train_loss", "test_loss") if w in results]
        panels = bool(told) + (metric is not None)
        if not panels:
            raise ValueError(
                "Live: the results have neither losses nor errors. Give follow the probes "
                "fl.probes.Losses() or fl.probes.Errors([...])."
            )
        course = None if metric is None else _course(results, metric, self.layer)
        with publication():
            size = (_WIDTH * panels, _HEIGHT)
            figure, grid = plt.subplots(
                1, panels, figsize=size, layout="constrained", squeeze=False
            )
            if told:
                losses(results, ax=grid[0, 0])
            if course is not None:
                _errors(grid[0, -1], course)
        return figure

    def _show(self, drawn: bytes) -> None:
        from IPython.display import Image, display

        words = "losses and errors so far"
        shown = Image(drawn, format="png", alt=words)  # type: ignore[no-untyped-call]
        if self._place is None:
            self._place = display(shown, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._place.update(shown)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return hasattr(shell, "kernel")


def _course(results: xr.Dataset, metric: str, layer: str | None) -> xr.DataArray:
    """Return a metric over step and approximator: of one layer, or of all together."""
    data = frames.pick(frames.metric_of(results, metric), "damping")
    if "approximator" not in data.dims or "step" not in data.dims:
        raise ValueError(f"Live: {metric!r} has no methods or no steps to be drawn along.")
    if "layer" not in data.dims:
        return data
    if layer is not None:
        frames.known_layers(data, [layer])
        return data.sel(layer=layer)
    data = data.transpose("step", "layer", "approximator")
    pooled = [
        _pooled(results, data.isel(step=i), metric, i) for i in range(data.sizes["step"])
    ]
    return data.isel(layer=0, drop=True).copy(data=np.array(pooled))


def _pooled(results: xr.Dataset, data: xr.DataArray, metric: str, step: int) -> list[float]:
    norms = frames.norms(results.isel(step=[step]), metric)
    known = None if norms is None else np.asarray(norms.values, dtype=float)
    return [overall(column, known) for column in np.asarray(data.values, dtype=float).T]


def _errors(ax: Axes, data: xr.DataArray) -> None:
    looks = styles(frames.names(data, "approximator"))
    for name in frames.drawn(data):
        one = data.sel(approximator=name).dropna("step")
        ax.plot(one["step"], one, label=text(name), **looks[name].line())
    known, where = quantity(str(data.name), data), data.coords.get("layer")
    of = "all layers" if where is None else f"layer {text(str(where.item()))}"
    ax.set(xlabel="training step", ylabel=f"{known.title}, {of}")
    space_steps(ax, np.asarray(data["step"].values))
    if known.best == "low":
        ax.set_ylim(bottom=0)
    if ax.lines:
        ax.legend()
