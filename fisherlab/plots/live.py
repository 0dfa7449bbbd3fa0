"""A figure that is drawn again at every moment of a training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherlab.catalogue import overall, quantity
from fisherlab.durable import write_durably
from fisherlab.plots import frames
from fisherlab.plots.saving import picture
from fisherlab.plots.style import publication, styles, text
from fisherlab.plots.trajectories import losses, space_steps

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
