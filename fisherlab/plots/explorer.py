"""Controls of a result in a notebook, and the figure that they draw."""

from __future__ import annotations

import html
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from fisherlab.plots import costs, curves, frames, matrices, profiles, trajectories
from fisherlab.plots.purposes import purposes
from fisherlab.plots.saving import Drawn, picture

_METHOD: Final = "approximator"
_DIMS: Final = {"layer", _METHOD, "step", "damping", "seed"}
_MAKERS: Final = (
    "fl.compare, fl.sweep, fl.follow, fl.inverse_blocks, fl.spectra, fl.density"
)

Chosen = Mapping[str, Any]
Choices = dict[str, list[Any]]


def explore(result: xr.Dataset | xr.DataTree) -> Explorer:
    """Choose figure, quantity, layers, methods, damping, step or purpose of a result.

    In a notebook the last line of a cell `fl.explore(ds)` shows the controls and the
    figure that `fl.plots` draws from them; a control is there where the result leaves a
    choice. Needs ipywidgets (`pip install 'fisherlab[lab]'`).

    Parameters
    ----------
    result
        A Dataset of `fl.compare`, `fl.sweep` or `fl.follow`, of one or several purposes,
        or a tree of `fl.inverse_blocks`, `fl.spectra` or `fl.density`.

    Raises
    ------
    TypeError
        If `result` is no labelled result.
    ValueError
        If it holds nothing that is drawn by layer and method.
    ImportError
        If ipywidgets is not installed.

    Examples
    --------
    >>> import xarray as xr
    >>> coords = {"layer": ["0", "2"], "approximator": ["kfac"], "damping": [0.1, 1.0]}
    >>> error = xr.DataArray([[[0.5, 0.2]], [[0.4, 0.1]]], coords)
    >>> explorer = explore(xr.Dataset({"inverse_error": error}))
    >>> sorted(explorer.controls)
    ['damping', 'figure', 'layers']
    >>> explorer.controls["damping"].value = 0.1
    >>> explorer.figure.axes[0].lines[0].get_ydata().tolist()
    [0.5, 0.4]
    """
    kind = xr.DataTree if isinstance(result, xr.DataTree) else xr.Dataset
    frames.require_result(result, kind, "fl.compare")
    found = {name: view.choices(result) for name, view in VIEWS.items()}
    found = {name: choices for name, choices in found.items() if choices}
    if not found:
        raise ValueError(
            f"explore: the result holds nothing to draw by layer and method, only "
            f"{', '.join(_held(result)) or 'no variables'}. Give one of {_MAKERS}."
        )
    return Explorer(result, found)


def _held(result: xr.Dataset | xr.DataTree) -> list[str]:
    return [str(name) for name in (*result.data_vars, *getattr(result, "children", ()))]


class Explorer:
    """Controls and the figure they draw; a notebook shows both, `fl.explore` makes it.

    `controls` are the widgets by name, `figure` is the Figure that is drawn now (None where
    nothing can be), `widget` the box that holds all of it, to be put into others.

    Examples
    --------
    >>> error = xr.DataArray([[0.5]], {"layer": ["0"], "approximator": ["kfac"]})
    >>> explorer = explore(xr.Dataset({"inverse_error": error}))
    >>> explorer.figure.axes[0].get_xlabel()
    'layer (in the order of the network)'
    """

    def __init__(self, result: xr.Dataset | xr.DataTree, found: dict[str, Choices]) -> None:
        widgets = _ipywidgets()
        self._result, self._found = result, found
        self._made: dict[Any, Any] = {}
        self._views = widgets.Dropdown(options=list(found), description="figure")
        self._views.observe(self._draw, "value")
        self._row = widgets.HBox(layout=widgets.Layout(flex_flow="row wrap"))
        self._place = widgets.HTML()
        self.figure: Any = None
        self.controls: dict[str, Any] = {}
        self.widget = widgets.VBox([self._row, self._place])
        self._draw()

    def _draw(self, change: object = None) -> None:
        """Show the controls of the chosen view, and its figure or why there is none."""
        view, choices = self._views.value, self._found[self._views.value]
        made = {name: self._control(name, options) for name, options in choices.items()}
        chosen = {name: control.value for name, control in made.items()}
        free = {name: made[name] for name, options in choices.items() if len(options) > 1}
        self.controls = {"figure": self._views} | free
        self._row.children = tuple(self.controls.values())
        self._set_disabled(chosen)
        try:
            self.figure = VIEWS[view].draw(self._result, _required(chosen)).figure
        except ValueError as error:
            self.figure, self._place.value = None, f"<p>{html.escape(str(error))}</p>"
            return
        plt.close(self.figure)
        words = html.escape(repr(self), quote=True)
        source = f"data:image/png;base64,{self._encoded()}"
        self._place.value = f'<img alt="{words}" style="max-width: 100%" src="{source}">'

    def _encoded(self) -> str:
        return "" if self.figure is None else b64encode(picture(self.figure)).decode()

    def _control(self, name: str, options: list[Any]) -> Any:
        """Make a control once: views with the same choice share it."""
        key = name, tuple(options)
        if key not in self._made:
            self._made[key] = _widget(name, options)
            self._made[key].observe(self._draw, "value")
        return self._made[key]

    def _set_disabled(self, chosen: Chosen) -> None:
        """Let nobody move what the chosen quantity does not depend on."""
        if "quantity" in chosen:
            dims = self._result[chosen["quantity"]].dims
            for name in ("step", "damping"):
                if name in self.controls:
                    self.controls[name].disabled = name not in dims

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """Give a live notebook the controls, and one that was saved the picture."""
        bundle = self.widget._repr_mimebundle_(**options) or {}
        bundle["text/plain"] = repr(self)
        if self.figure is not None:
            bundle["image/png"] = self._encoded()
        return dict(bundle)

    def __repr__(self) -> str:
        words = (f"{name}={control.value!r}" for name, control in self.controls.items())
        return f"Explorer({', '.join(words)})"


def _ipywidgets() -> Any:
    try:
        import ipywidgets
    except ImportError as error:
        raise ImportError(
            "fl.explore needs ipywidgets. Install it with `pip install 'fisherlab[lab]'`."
        ) from error
    return ipywidgets


def _widget(name: str, options: list[Any]) -> Any:
    widgets = _ipywidgets()
    if name in {"layers", "methods"}:
        rows = min(len(options), 6)
        return widgets.SelectMultiple(
            options=options, value=tuple(options), rows=rows, description=name
        )
    told = [(f"{v:.3g}" if isinstance(v, float) else str(v), v) for v in options]
    if name in {"step", "damping"}:
        value = frames.pick(xr.DataArray(options, {name: options}), name).item()
        return widgets.SelectionSlider(
            options=told, value=value, description=name, continuous_update=False
        )
    return widgets.Dropdown(options=told, description=name)


def _required(chosen: Chosen) -> Chosen:
    for name in ("layers", "methods"):
        if chosen.get(name) == ():
            raise ValueError(f"Choose at least one of the {name}.")
    return chosen


# --- what can be drawn of a result --------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A kind of figure: the choices a result leaves it ({} for none), and its drawing.

    Examples
    --------
    >>> VIEWS["losses"].choices(xr.Dataset({"test_loss": ("step", [2.0, 1.0])}))
    {'what': ['loss']}
    """

    choices: Callable[[Any], Choices]
    draw: Callable[[Any, Chosen], Drawn]


def _cells(result: Any, along: str | None = None) -> Choices:
    """Offer the quantities by layer and method, which vary along a dim if one is named."""
    if not isinstance(result, xr.Dataset):
        return {}
    named = [str(name) for name, values in result.items() if _is_cell(values, along)]
    choices: Choices = {"quantity": named} if named else {}
    dims = {dim for name in named for dim in result[name].dims}
    for dim, word in {"layer": "layers", _METHOD: "methods"}.items():
        if dim in dims:
            choices[word] = frames.names(result, dim)
    for dim in ("step", "damping"):
        if dim in dims and dim != along:
            labels = next(result[name][dim] for name in named if dim in result[name].dims)
            choices[dim] = [value.item() for value in np.asarray(labels.values)]
    return choices


def _is_cell(values: xr.DataArray, along: str | None) -> bool:
    dims = {str(dim) for dim in values.dims}
    return (
        values.dtype.kind == "f"
        and bool(np.isfinite(values).any())
        and dims <= _DIMS
        and {"layer", _METHOD} <= {*dims, *map(str, values.coords)}
        and (along is None or values.sizes.get(along, 0) > 1)
        and not str(values.name).endswith(("_low", "_high"))  # ends of an interval
    )


def _swept(result: Any) -> Choices:
    numbers = isinstance(result, xr.Dataset) and "damping" in result.coords
    return _cells(result, "damping") if numbers and _kind(result) in "fiu" else {}


def _kind(result: xr.Dataset) -> str:
    return result["damping"].dtype.kind


def _priced(result: Any) -> Choices:
    found = _cells(result)
    if not {"stored_numbers", "frobenius_error"} <= set(getattr(result, "data_vars", ())):
        return {}
    # All layers stay, as large marks are all of them together.
    return {name: found[name] for name in ("methods", "step") if name in found}


def _lossy(result: Any) -> Choices:
    items = getattr(result, "data_vars", {}).items()
    held = {name for name, values in items if "step" in values.dims}
    told = [w for w in ("loss", "accuracy") if {f"train_{w}", f"test_{w}"} & held]
    return {"what": told} if told else {}


def _purposeful(result: Any) -> Choices:
    if "of_purpose" not in getattr(result, "coords", ()):
        return {}
    known = dict.fromkeys(map(str, result["of_purpose"].values))
    methods = frames.names(result, "approximator")
    return {"purpose": list(known), "methods": methods}


def _leaves(result: Any, needed: str, without: str = "") -> Choices:
    if not isinstance(result, xr.DataTree):
        return {}
    nodes = {str(name): child.to_dataset() for name, child in result.children.items()}
    nodes = {n: ds for n, ds in nodes.items() if needed in ds and without not in ds}
    methods = dict.fromkeys(m for ds in nodes.values() for m in frames.names(ds, _METHOD))
    return {"layers": list(nodes), "methods": list(methods)} if nodes else {}


def _kept(ds: xr.Dataset, chosen: Chosen) -> xr.Dataset:
    """Keep the chosen layers, and no numbers of other methods, whose colours stay."""
    if "layers" in chosen:
        ds = ds.isel(layer=_places(ds, "layer", chosen["layers"]))
    if "methods" in chosen:
        kept = [name in chosen["methods"] for name in frames.names(ds, _METHOD)]
        by_method = xr.DataArray(kept, dims=_METHOD)
        cells = [n for n, v in ds.items() if _METHOD in v.dims and v.dtype.kind == "f"]
        ds = ds.assign({name: ds[name].where(by_method) for name in cells})
    # Figures in panels want the dims that a user's `ds.sel(layer="0")` took.
    return ds.expand_dims([dim for dim in ("layer", _METHOD) if dim not in ds.dims])


def _places(ds: xr.Dataset, dim: str, chosen: Sequence[str]) -> list[int]:
    labels = frames.names(ds, dim)
    return [labels.index(name) for name in chosen]


def _by_layer(ds: xr.Dataset, chosen: Chosen) -> Drawn:
    at = {name: chosen.get(name) for name in ("step", "damping")}
    return profiles.errors(_kept(ds, chosen), chosen["quantity"], **at)


def _along_training(ds: xr.Dataset, chosen: Chosen) -> Drawn:
    damping = chosen.get("damping")
    return trajectories.trajectory(_kept(ds, chosen), chosen["quantity"], damping=damping)


def _against_damping(ds: xr.Dataset, chosen: Chosen) -> Drawn:
    step = chosen.get("step")
    return trajectories.damping_sweep(_kept(ds, chosen), chosen["quantity"], step=step)


def _by_purpose(ds: xr.Dataset, chosen: Chosen) -> Drawn:
    methods = ds.isel(approximator=_places(ds, _METHOD, chosen["methods"]))
    return purposes(methods, chosen["purpose"])


def _branches(draw: Callable[..., Drawn], tree: xr.DataTree, chosen: Chosen) -> Drawn:
    return draw(tree, layers=chosen["layers"], approximators=chosen["methods"])


VIEWS: Final = {
    "purposes": View(_purposeful, _by_purpose),
    "by layer": View(_cells, _by_layer),
    "along training": View(partial(_cells, along="step"), _along_training),
    "against damping": View(_swept, _against_damping),
    "cost": View(_priced, lambda ds, c: costs.cost(_kept(ds, c), step=c.get("step"))),
    "losses": View(_lossy, lambda ds, c: trajectories.losses(ds, what=c["what"])),
    "inverse": View(
        partial(_leaves, needed="inverse"), partial(_branches, matrices.inverse_heatmap)
    ),
    "spectra": View(
        partial(_leaves, needed="eigenvalue", without="share"),
        partial(_branches, curves.spectra),
    ),
    "density": View(partial(_leaves, needed="share"), partial(_branches, curves.density)),
}
