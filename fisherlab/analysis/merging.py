"""Results of separate runs put together, with every conflict named."""

import json
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import xarray as xr

IDENTITY = (  # what must be the same for numbers to stand side by side
    "fisher",
    "reference_fisher",
    "likelihood",
    "conventions",
    "damping_kind",
    "analysis",
)
_FILLED: dict[str, Any] = {"status": "not measured", "floored": "", "converged": -1}


def merge(
    datasets: Sequence[xr.Dataset],
    dim: str | None = None,
    labels: Sequence[Any] | None = None,
) -> xr.Dataset:
    """Put results of separate runs into one Dataset.

    Parameters
    ----------
    datasets
        Results of one kind of analysis.
    dim
        A dim along which the runs stand side by side, e.g. "seed" or "step". Without it
        the runs complete each other: other layers, approximations, dampings or metrics.
    labels
        The labels along `dim`; taken from the runs where they have that coordinate or
        attribute, else 0, 1, ….

    Returns
    -------
    xarray.Dataset
        NaN where no run has a value (`status` says "not measured"). Attributes that all
        runs share are kept; the others are listed in `merged_from`.

    Raises
    ------
    ValueError
        If there are no runs, the runs are of different kinds (Fisher, likelihood,
        damping, …), labels do not fit, or two runs give different numbers for one cell.

    Examples
    --------
    >>> def run(name, value):
    ...     dims = ("layer", "approximator")
    ...     coords = {"layer": ["0"], "approximator": [name]}
    ...     return xr.Dataset({"frobenius_error": (dims, [[value]])}, coords)
    >>> both = merge([run("kfac", 0.5), run("ekfac", 0.4)])
    >>> both.frobenius_error.sel(approximator=["kfac", "ekfac"]).values.tolist()
    [[0.5, 0.4]]
    >>> merge([run("kfac", 0.5), run("kfac", 0.4)], dim="seed").seed.values.tolist()
    [0, 1]
    """
    if not datasets:
        raise ValueError("merge: no results were given.")
    _require_kind(datasets)
    if dim is None:
        if labels is not None:
            raise ValueError("merge: labels need a dim.")
        joined = _completed(datasets)
    else:
        joined = _stacked(datasets, dim, _labels(datasets, dim, labels))
    joined.attrs = _attributes(datasets)
    return joined


def _require_kind(datasets: Sequence[xr.Dataset]) -> None:
    for name in IDENTITY:
        values = {str(ds.attrs.get(name, "")) for ds in datasets}
        if len(values) > 1:
            told = ", ".join(repr(value) for value in sorted(values))
            raise ValueError(f"merge: the runs differ in {name!r}: {told}.")


def _labels(
    datasets: Sequence[xr.Dataset], dim: str, labels: Sequence[Any] | None
) -> list[Any]:
    if labels is not None:
        if len(labels) != len(datasets) or len(set(labels)) != len(labels):
            msg = f"merge: {len(datasets)} runs, labels {list(labels)}; one each, all new."
            raise ValueError(msg)
        return list(labels)
    found = [
        ds[dim].item() if dim in ds.coords and not ds[dim].ndim else ds.attrs.get(dim)
        for ds in datasets
    ]
    if None in found or len(set(found)) != len(found):
        return list(range(len(datasets)))
    return found


def _stacked(datasets: Sequence[xr.Dataset], dim: str, labels: list[Any]) -> xr.Dataset:
    """Put the runs along a new dim, or behind each other along one they have."""
    if all(dim in ds.dims for ds in datasets):
        known = np.concatenate([np.atleast_1d(ds[dim].values) for ds in datasets])
        if len(set(known.tolist())) != len(known):
            msg = f"merge: the runs share labels along {dim!r}: {known.tolist()}."
            raise ValueError(msg)
        pieces = list(datasets)
    else:
        pieces = [
            ds.drop_vars(dim, errors="ignore").expand_dims({dim: [label]})
            for ds, label in zip(datasets, labels, strict=True)
        ]
    found = xr.concat(
        pieces,
        dim,
        data_vars="all",
        coords="minimal",
        compat="override",
        join="outer",
        combine_attrs="override",
    )
    return _filled(_in_order(found, datasets, dim), datasets)


def _completed(datasets: Sequence[xr.Dataset]) -> xr.Dataset:
    beside = [name for name, at in datasets[0].coords.items() if name not in at.dims]
    datasets = [ds.reset_coords([c for c in beside if c in ds.coords]) for ds in datasets]
    found = datasets[0]
    for ds in datasets[1:]:
        _require_agreement(found, ds)
        texts = {
            name: _told(found[name], ds[name], str(name))
            for name in found.data_vars
            if name in ds and _is_text(found[name])
        }
        found = found.drop_vars(texts).combine_first(ds.drop_vars(texts)).assign(texts)
    return _filled(_in_order(found, datasets, ""), datasets).set_coords(beside)


def _is_text(values: xr.DataArray) -> bool:
    return values.dtype.kind in "OUST"


def _told(first: xr.DataArray, second: xr.DataArray, name: str) -> xr.DataArray:
    """Join what two runs say of a cell: the reasons of both, or that all is well."""
    fine = "ok" if name == "status" else ""
    a, b = xr.align(first.astype(object), second.astype(object), join="outer")

    def joined(one: Any, other: Any) -> str:
        known = [t for t in (one, other) if isinstance(t, str)]
        said = list(dict.fromkeys(text for text in known if text != fine))
        return "; ".join(said) or (fine if known else _FILLED.get(name, ""))

    both = np.vectorize(joined, otypes=[object])(a.values, b.values)
    return xr.DataArray(both, a.coords, a.dims)


def _require_agreement(first: xr.Dataset, second: xr.Dataset) -> None:
    """Refuse two values for one cell, by the name of the cell."""
    for name in first.data_vars:
        if name not in second.data_vars or _is_text(first[name]):
            continue
        if first[name].dims != second[name].dims:
            dims = f"{first[name].dims} and {second[name].dims}"
            raise ValueError(f"merge: {name!r} has the dims {dims}.")
        a, b = xr.align(first[name], second[name], join="inner")
        known = np.isfinite(a.values) & np.isfinite(b.values)
        differs = known & ~np.isclose(a.values, b.values, rtol=1e-12, atol=0.0)
        if np.any(differs):
            place = tuple(int(at[0]) for at in np.nonzero(differs))
            spot = ", ".join(
                f"{dim}={a[dim].values[at]!s}"
                for dim, at in zip(a.dims, place, strict=True)
            )
            msg = (
                f"merge: {name}[{spot}] is {a.values[place]!s} in one run and "
                f"{b.values[place]!s} in another. Give a `dim` to keep both."
            )
            raise ValueError(msg)


def _in_order(found: xr.Dataset, datasets: Sequence[xr.Dataset], left: str) -> xr.Dataset:
    """Put labels in the order in which the runs name them: alignment sorts them."""
    for dim in found.dims:
        if dim == left or dim not in found.coords:
            continue
        known = [v for ds in datasets if dim in ds.coords for v in np.atleast_1d(ds[dim])]
        labels = list(dict.fromkeys(np.asarray(v).item() for v in known))
        if found[dim].dtype.kind in "fi":
            labels.sort()
        found = found.sel({dim: labels})
    return found


def _filled(found: xr.Dataset, datasets: Sequence[xr.Dataset]) -> xr.Dataset:
    """Say of texts and marks that no run has that they are missing."""
    for name in found.data_vars:
        kinds = [ds[name].dtype for ds in datasets if name in ds]
        if kinds[0].kind in "OUST":
            text = found[name].astype(object)
            empty = text.isnull()
            found[name] = text.where(~empty, _FILLED.get(str(name), ""))
        elif kinds[0].kind == "i":
            found[name] = found[name].fillna(-1).astype(kinds[0])
        for ds in datasets:
            if name in ds:
                found[name].attrs = ds[name].attrs
                break
    return found


def _attributes(datasets: Sequence[xr.Dataset]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for ds in datasets for name in ds.attrs))
    shared: dict[str, Any] = {}
    other: list[dict[str, Any]] = [{} for _ in datasets]
    for name in names:
        values = [ds.attrs.get(name) for ds in datasets]
        if all(str(value) == str(values[0]) for value in values):
            shared[name] = values[0]
        else:
            for told, value in zip(other, values, strict=True):
                told[name] = value
    methods: dict[str, str] = {}
    for ds in datasets:
        methods |= json.loads(str(ds.attrs.get("approximators", "{}")))
    if methods:
        shared["approximators"] = json.dumps(methods)
    return shared | {"merged_from": json.dumps(other, default=str)}


PREFIX: Final = "purpose_"
TABLE: Final = (
    "value",
    "network",
    "common",
    "common_layers",
    "common_lead_error",
    "lead_error",
    "network_lead_error",
    "status",
    "decrease",
    "network_decrease",
    "gradient_decrease",
    "network_gradient_decrease",
)


def beside(ds: xr.Dataset, found: xr.Dataset) -> xr.Dataset:
    """Put the table of purposes into a result of metrics of the same methods."""
    kept = found[[name for name in TABLE if name in found]]
    kept = kept.rename({str(name): f"{PREFIX}{name}" for name in kept.data_vars})
    given = ds.assign_coords(kept.drop_vars(["layer", "approximator"]).coords)
    return given.assign(kept.data_vars)


def judged(ds: xr.Dataset) -> xr.Dataset:
    """Return the table of purposes of a result, as `compare` gives it."""
    own = {PREFIX + name: name for name in TABLE if PREFIX + name in ds}
    return ds.drop_vars([n for n in own.values() if n in ds]).rename(own) if own else ds
