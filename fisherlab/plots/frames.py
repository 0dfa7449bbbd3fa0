"""From a result to what a figure needs: one step, one damping, tidy rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from fisherlab.catalogue import FLOOR, below_floor, quantity
from fisherlab.showing import kind_of


def values(
    ds: xr.Dataset,
    metric: str,
    *,
    step: int | None = None,
    damping: float | str | None = None,
) -> xr.DataArray:
    """Pick a metric at one step and one damping, with dims layer and approximator.

    Without `step` the last one is taken, without `damping` the middle one.

    Raises
    ------
    ValueError
        If the metric, the step or the damping is not in the result.

    Examples
    --------
    >>> import xarray as xr
    >>> error = xr.DataArray([[[0.5]], [[0.4]]], dims=("step", "layer", "approximator"))
    >>> ds = xr.Dataset({"frobenius_error": error}, coords={"step": [0, 9]})
    >>> float(values(ds, "frobenius_error").item())
    0.4
    """
    require_label(ds, "damping", damping)
    return _with_dims(pick(at(ds, metric, "step", step), "damping", damping))


def interval(
    ds: xr.Dataset,
    metric: str,
    *,
    step: int | None = None,
    damping: float | str | None = None,
) -> tuple[xr.DataArray, xr.DataArray] | None:
    """Return the confidence interval of a metric's mean, None if there is none.

    Examples
    --------
    >>> import xarray as xr
    >>> ends = {f"a_{end}": (("layer", "approximator"), [[1.0]]) for end in ("low", "high")}
    >>> interval(xr.Dataset(ends), "a") is None, interval(xr.Dataset(), "a") is None
    (False, True)
    """
    ends = (f"{metric}_low", f"{metric}_high")
    if not all(end in ds.data_vars for end in ends):
        return None
    low, high = (values(ds, end, step=step, damping=damping) for end in ends)
    return low, high


def norms(ds: xr.Dataset, metric: str, step: int | None = None) -> xr.DataArray | None:
    """Return ‖F‖ of every layer where a metric is an error relative to it, else None.

    Examples
    --------
    >>> import xarray as xr
    >>> ds = xr.Dataset({"fisher_norm": ("layer", [2.0])})
    >>> norms(ds, "frobenius_error").item(), norms(ds, "inverse_error")
    (2.0, None)
    """
    if metric not in ("frobenius_error", "scale_optimal_error") or "fisher_norm" not in ds:
        return None
    found = pick(ds["fisher_norm"], "step", step)
    return found if "layer" in found.dims else found.expand_dims("layer")


def metric_of(ds: xr.Dataset, metric: str) -> xr.DataArray:
    """Return a variable of a result, or say which ones there are.

    Examples
    --------
    >>> import xarray as xr
    >>> metric_of(xr.Dataset(), "frobenius_error")
    Traceback (most recent call last):
        ...
    ValueError: the result has no variable 'frobenius_error'; it has: none
    """
    require_result(ds, xr.Dataset, "fl.compare")
    if metric not in ds.data_vars:
        known = ", ".join(str(name) for name in ds.data_vars) or "none"
        raise ValueError(f"the result has no variable {metric!r}; it has: {known}")
    return ds[metric]


def require_result(given: object, kind: type, maker: str) -> None:
    """Refuse what is no labelled result, such as the statistics it is made from.

    Examples
    --------
    >>> require_result({}, xr.DataTree, "fl.inverse_blocks")
    Traceback (most recent call last):
    TypeError: a figure is drawn from a DataTree, and a dict was given. \
Make one by fl.inverse_blocks.
    """
    if not isinstance(given, kind):
        raise TypeError(
            f"a figure is drawn from a {kind.__name__}, and a {type(given).__name__} was "
            f"given. Make one by {maker}."
        )


def nodes(
    tree: xr.DataTree, layers: Sequence[str] | None, what: str, *held: str
) -> dict[str, xr.Dataset]:
    """Return the layers of a tree that hold some variables, or say which there are.

    Examples
    --------
    >>> nodes(xr.DataTree(), None, "spectra", "eigenvalue")
    Traceback (most recent call last):
        ...
    ValueError: the tree holds no spectra; make it by fl.spectra
    """
    require_result(tree, xr.DataTree, f"fl.{what}")
    known = {str(name): child.to_dataset() for name, child in tree.children.items()}
    known = {name: ds for name, ds in known.items() if all(one in ds for one in held)}
    if not known:
        raise ValueError(
            f"the tree holds no {what.replace('_', ' ')}; make it by fl.{what}"
        )
    unknown = [name for name in layers or () if name not in known]
    if unknown:
        raise ValueError(f"no layer {unknown} in the tree; it has: {list(known)}")
    return {name: known[name] for name in (layers or known)}


def pick(
    data: xr.DataArray, dim: str, value: float | int | str | None = None
) -> xr.DataArray:
    """Take one value of a dim: the one named, else the last step, the middle damping.

    Examples
    --------
    >>> import xarray as xr
    >>> sweep = xr.DataArray([1.0, 2.0, 3.0], {"damping": [0.1, 1.0, 10.0]})
    >>> float(pick(sweep, "damping"))
    2.0
    """
    if dim not in data.dims:
        return data
    if value is None:
        index = data.sizes[dim] // 2 if dim == "damping" else -1
        return data.isel({dim: index})
    known = [item.item() for item in np.asarray(data[dim].values)]
    words = isinstance(value, str) or any(isinstance(item, str) for item in known)
    # Without an absolute tolerance: all dampings below it would be one.
    near = [
        (0.0 if words else abs(item - value), i)
        for i, item in enumerate(known)
        if (item == value if words else np.isclose(value, item, atol=0.0))
    ]
    if not near:
        raise ValueError(f"{dim} {value!r} is not in the result; it has: {known}")
    return data.isel({dim: min(near)[1]})


def at(
    ds: xr.Dataset, metric: str, dim: str, value: float | int | str | None = None
) -> xr.DataArray:
    """Pick a metric at one step or damping of a result, which must have the one named.

    Examples
    --------
    >>> import xarray as xr
    >>> at(xr.Dataset({"a": ("layer", [0.5])}), "a", "step").item()
    0.5
    """
    require_label(ds, dim, value)
    return pick(metric_of(ds, metric), dim, value)


def require_label(ds: xr.Dataset, dim: str, value: float | int | str | None) -> None:
    """Refuse a step or a damping that a result has not.

    Raises
    ------
    ValueError
        Naming what it has.

    Examples
    --------
    >>> import xarray as xr
    >>> require_label(xr.Dataset(coords={"step": 3}), "step", 3)
    """
    if value is None:
        return
    if dim not in ds.dims and dim not in ds.coords:
        raise ValueError(f"{dim} {value!r} is not in the result, which has no dim {dim!r}")
    labels = ds[dim]
    pick(labels if labels.dims else labels.expand_dims(dim), dim, value)


def _with_dims(data: xr.DataArray) -> xr.DataArray:
    # A user's `ds.sel(layer="0")` turns the dim into a scalar coordinate.
    missing = [dim for dim in ("layer", "approximator") if dim not in data.dims]
    return data.expand_dims(missing) if missing else data


def names(data: xr.DataArray | xr.Dataset, dim: str) -> list[str]:
    """Return the labels of a dim as text, [] where there is none.

    Examples
    --------
    >>> import xarray as xr
    >>> names(xr.DataArray([1.0], {"layer": ["fc"]}, dims="layer"), "layer")
    ['fc']
    """
    if dim in data.coords:
        return [str(label) for label in np.atleast_1d(data[dim].values)]
    return [str(i) for i in range(data.sizes.get(dim, 0))]


def kinds(data: xr.DataArray | xr.Dataset) -> dict[str, str]:
    """Return what stands behind the name of every layer, see `kind_of`; {} unknown.

    Examples
    --------
    >>> import xarray as xr
    >>> coords = {"layer": ["0"], "kind": ("layer", ["Linear 3→2"])}
    >>> kinds(xr.Dataset(coords=coords))
    {'0': ' · Linear 3→2'}
    """
    if "kind" not in data.coords:
        return {}
    told = map(str, np.atleast_1d(data["kind"].values))
    return {n: kind_of(n, kind) for n, kind in zip(names(data, "layer"), told, strict=True)}


def known_layers(data: xr.DataArray, layers: Sequence[str] | None) -> list[str]:
    """Return the layers that are asked for, all by default, or say which there are.

    Examples
    --------
    >>> import xarray as xr
    >>> known_layers(xr.DataArray([1.0], {"layer": ["fc"]}, dims="layer"), ["conv"])
    Traceback (most recent call last):
        ...
    ValueError: no layer ['conv'] in the result; it has: ['fc']
    """
    known = names(data, "layer")
    chosen = known if layers is None else list(layers)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"no layer {unknown} in the result; it has: {known}")
    return chosen


def drawn(data: xr.DataArray) -> list[str]:
    """Name the approximators worth drawing: those measured and not trivially exact.

    Examples
    --------
    >>> import xarray as xr
    >>> error = xr.DataArray(
    ...     [[0.0, 0.3, float("nan")]],
    ...     {"approximator": ["exact", "kfac", "ekfac"]},
    ...     dims=("layer", "approximator"),
    ...     name="frobenius_error",
    ... )
    >>> drawn(error)
    ['kfac']
    """
    shown = []
    for index, name in enumerate(names(data, "approximator")):
        column = np.asarray(data.isel(approximator=index).values, dtype=float)
        finite = column[np.isfinite(column)]
        if finite.size and not (name == "exact" and _perfect(data, finite)):
            shown.append(name)
    return shown


def _perfect(data: xr.DataArray, finite: NDArray[Any]) -> bool:
    perfect = quantity(str(data.name)).perfect
    return perfect is not None and below_floor(float(np.abs(finite - perfect).max()))


def tidy(data: xr.DataArray, approximators: Sequence[str]) -> pd.DataFrame:
    """Lay a metric out as rows: layer, approximator, other dims, value.

    Examples
    --------
    >>> import xarray as xr
    >>> coords = {"layer": ["0"], "approximator": ["kfac"]}
    >>> error = xr.DataArray([[0.3]], coords, name="frobenius_error")
    >>> tidy(error, ["kfac"])
      layer approximator  frobenius_error
    0     0         kfac              0.3
    """
    dims = [str(dim) for dim in data.dims]
    frame = data.to_series().rename(str(data.name)).reset_index()
    frame = frame[[*dims, str(data.name)]]
    for dim in ("layer", "approximator"):
        frame[dim] = [str(label) for label in frame[dim]]
    kept = frame[frame["approximator"].isin(list(approximators))]
    return kept.reset_index(drop=True)


def table(ds: xr.Dataset) -> pd.DataFrame:
    """Lay a whole result out as one tidy table, a row per cell and damping.

    Variables without approximations stay out, unless there are no others.

    Raises
    ------
    TypeError
        For what is no Dataset.
    ValueError
        For one without variables.

    Examples
    --------
    >>> import xarray as xr
    >>> dims = ("layer", "approximator")
    >>> ds = xr.Dataset(
    ...     {"frobenius_error": (dims, [[0.3]]), "status": (dims, [["ok"]])},
    ...     coords={"layer": ["0"], "approximator": ["kfac"]},
    ... )
    >>> table(ds).columns.tolist()
    ['layer', 'approximator', 'frobenius_error', 'status']
    """
    require_result(ds, xr.Dataset, "fl.compare")
    if not ds.data_vars:
        raise ValueError("table: the result has no variables; make one by fl.compare.")
    cells = [n for n in ds.data_vars if "approximator" in ds[n].dims]
    cells = cells or list(ds.data_vars)
    present = dict.fromkeys(str(dim) for name in cells for dim in ds[name].dims)
    order = ("seed", "step", "layer", "approximator", "damping")
    dims = [dim for dim in order if dim in present]
    dims += [dim for dim in present if dim not in order]
    frame = ds[cells].to_dataframe(dim_order=dims or None).reset_index()
    return frame[[*dims, *cells]]


def tree_table(tree: xr.DataTree) -> pd.DataFrame:
    """Lay the layers of a tree out as one tidy table.

    Examples
    --------
    >>> import xarray as xr
    >>> node = xr.Dataset({"eigenvalue": ("index", [2.0, 1.0])}, {"index": [1, 2]})
    >>> tree_table(xr.DataTree.from_dict({"fc": node})).values.tolist()
    [['fc', 1, 2.0], ['fc', 2, 1.0]]
    """
    frames = []
    for name, node in tree.children.items():
        rows = table(node.to_dataset())
        rows.insert(0, "layer", str(name))
        frames.append(rows)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def wants_log(data: xr.DataArray, approximators: Sequence[str]) -> bool:
    """Say whether the spread of a metric is read better on a log scale.

    Examples
    --------
    >>> import xarray as xr
    >>> coords = {"approximator": ["kfac", "mini-block"]}
    >>> error = xr.DataArray([1e-4, 0.5], coords, name="frobenius_error")
    >>> wants_log(error, ["kfac", "mini-block"]), wants_log(error, ["kfac"])
    (True, False)
    """
    if quantity(str(data.name)).best != "low":
        return False
    spread = np.asarray(data.sel(approximator=list(approximators)).values, dtype=float)
    measured = spread[np.isfinite(spread) & (spread > FLOOR)]
    return bool(measured.size) and float(measured.max() / measured.min()) > 30.0
