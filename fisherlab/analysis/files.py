"""Results on disk, whole or not at all, as netCDF, zarr or a folder; and merged results."""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr

from fisherlab.durable import (
    PARTIAL,
    check_folder,
    check_seal,
    flush,
    flush_tree,
    seal_folder,
    write_sealed,
)
from fisherlab.errors import DataError

_ENGINE: Final = "h5netcdf"


def save(result: xr.Dataset | xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a result as one netCDF file, or a zarr folder, atomically.

    Parameters
    ----------
    result
        What `compare` or `inverse_blocks` returned.
    path
        The file; its folder must exist. An existing file is replaced. A path that ends
        in ``.zarr`` becomes a zarr folder (needs the package zarr).

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    OSError
        If the folder cannot be written; an existing file is left as it was.
    TypeError
        If it is no Dataset and no DataTree.
    DataError
        If zarr is asked for and not installed.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> save(xr.Dataset({"a": ("x", [1.0])}), folder / "a.nc").name
    'a.nc'
    """
    if not isinstance(result, xr.Dataset | xr.DataTree):
        raise TypeError(
            f"save: {type(result).__name__} was given; a result of an analysis is "
            "expected, an xarray Dataset or DataTree. Statistics are kept by "
            "collect(..., store=folder), models and optimisers by torch.save."
        )
    target = Path(path)
    if is_zarr(target):
        return write_zarr(result, target)
    return netcdf_file(result, target)


def netcdf_file(result: xr.Dataset | xr.DataTree, target: Path) -> Path:
    """Write a result as one sealed netCDF file, whole or not at all.

    Raises
    ------
    OSError
        If the folder cannot be written; an existing file is left as it was.
    """
    # In memory first: HDF5 does not survive a disk that is full.
    if isinstance(result, xr.DataTree):
        content = bytes(result.to_netcdf(engine=_ENGINE, encoding=_compressed(result)))
    else:
        content = bytes(result.to_netcdf(engine=_ENGINE))
    return write_sealed(target, lambda scratch: scratch.write_bytes(content))


def read_netcdf(path: Path) -> xr.DataTree:
    """Load a netCDF file into memory, if it is what was written.

    Raises
    ------
    DataError
        If it is damaged, or no netCDF file.
    """
    try:
        check_seal(path)
        return xr.load_datatree(path, engine=_ENGINE)
    except DataError:
        raise
    except Exception as error:  # HDF5 raises anything where nothing is sealed
        raise DataError(f"{path} is not a readable netCDF file: {error}") from error


def _compressed(tree: xr.DataTree) -> Any:
    deflate = {"zlib": True, "complevel": 4}
    return {
        node.path: {"inverse": dict(deflate)}
        for node in tree.subtree
        if "inverse" in node.data_vars
    }


def open(path: str | os.PathLike[str]) -> xr.Dataset | xr.DataTree:
    """Load a saved result into memory and register the `.fisherlab` accessor.

    Parameters
    ----------
    path
        A file or zarr folder that `save` wrote, or a folder that `fl.follow` or an
        analysis with ``store=`` writes to: all that is done.

    Returns
    -------
    xarray.Dataset or xarray.DataTree
        A tree if the file has groups.

    Raises
    ------
    DataError
        If the file is missing, damaged, or no netCDF file.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> file = save(xr.Dataset({"a": ("x", [1.0])}), folder / "a.nc")
    >>> float(open(file)["a"][0])
    1.0
    """
    file = Path(path)
    if not file.exists():
        raise DataError(f"open: there is no file {file}.")
    import importlib

    importlib.import_module("fisherlab.plots")  # registers the accessor
    if file.is_dir() and is_zarr(file):
        return _unwrapped(read_zarr(file))
    if file.is_dir():
        from fisherlab.analysis.executors import is_folder_of_cells, merged_cells

        return merged_cells(file) if is_folder_of_cells(file) else read_parts(file)
    return _unwrapped(read_netcdf(file))


def _unwrapped(tree: xr.DataTree) -> xr.Dataset | xr.DataTree:
    if tree.children:
        return tree
    ds = tree.to_dataset()  # `sel(method=…)` of xarray means another thing
    return ds.rename(method="approximator") if "method" in ds.dims else ds


FORMAT: Final = 2  # version 3 has no stable form of text yet
_MARKS: Final = (".zgroup", "zarr.json")


def is_zarr(path: Path) -> bool:
    """Tell whether a path is, or is meant to be, a zarr folder.

    Examples
    --------
    >>> is_zarr(Path("results.zarr")), is_zarr(Path("results.nc"))
    (True, False)
    """
    return path.suffix == ".zarr" or any((path / mark).is_file() for mark in _MARKS)


def write_zarr(result: xr.Dataset | xr.DataTree, target: Path) -> Path:
    """Write a result beside the target and put it there in one move.

    Raises
    ------
    DataError
        If zarr is not installed.
    OSError
        If the folder cannot be written; an existing result is left as it was.
    """
    _require_zarr("save", target)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix="."))
    fresh, old = folder / "new", folder / "old"
    try:
        result.to_zarr(fresh, zarr_format=FORMAT, consolidated=True)
        seal_folder(fresh)
        flush_tree(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        flush(target.parent)
    except BaseException:  # Ctrl-C too may come between the two moves
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return target


def read_zarr(folder: Path) -> xr.DataTree:
    """Load a zarr folder into memory.

    Raises
    ------
    DataError
        If zarr is not installed, or the folder is damaged or holds no zarr result.
    """
    _require_zarr("open", folder)
    try:
        check_folder(folder)
        tree: xr.DataTree = xr.load_datatree(folder, engine="zarr")
    except DataError:
        raise
    except Exception as error:  # zarr raises anything where nothing is sealed
        raise DataError(f"open: {folder} is not a readable zarr folder: {error}") from error
    return xr.DataTree.from_dict(
        {node.path: _plain_texts(node.to_dataset(inherit=False)) for node in tree.subtree}
    )


def _plain_texts(ds: xr.Dataset) -> xr.Dataset:
    """Return texts as Python strings, as they were saved."""
    texts = {name: ds[name].astype(object) for name in ds if ds[name].dtype.kind == "T"}
    return ds.assign(texts)


def _require_zarr(call: str, path: Path) -> None:
    try:
        import zarr  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"{call}: {path} needs the package zarr, which is not installed. Use a path "
            "that ends in .nc, or `pip install 'fisherlab[zarr]'`."
        ) from error


_AFTER: Final = "after_step"  # the last step of the part before, by which a lost one shows
_NONE: Final = -1
_PART: Final = re.compile(r"results-(\d+)-(\d+)\.nc")


def write_part(rows: xr.Dataset, folder: Path) -> Path:
    """Write some steps of a result into a file of its own, durably.

    Raises
    ------
    OSError
        If the folder cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> rows = xr.Dataset({"loss": ("step", [0.2, 0.1])}, {"step": [3, 5]})
    >>> write_part(rows, Path(tempfile.mkdtemp())).name
    'results-000000003-000000005.nc'
    """
    first, last = (int(rows["step"].values[i]) for i in (0, -1))
    before = max((end for _, _, end in _parts(folder) if end < first), default=_NONE)
    name = f"results-{first:09d}-{last:09d}.nc"
    return netcdf_file(rows.assign_attrs({_AFTER: before}), folder / name)


def _parts(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Give the files of a result in order, with the first and the last step of each."""
    for path in sorted(folder.glob("results-*")):
        if found := _PART.fullmatch(path.name):
            yield path, int(found[1]), int(found[2])


def drop_parts(folder: Path, after: int) -> None:
    """Remove the files whose steps come after a step, and what unfinished writes left.

    Examples
    --------
    >>> import tempfile
    >>> rows = xr.Dataset({"loss": ("step", [0.2])}, {"step": [3]})
    >>> folder = write_part(rows, Path(tempfile.mkdtemp())).parent
    >>> drop_parts(folder, after=2)
    >>> list(folder.iterdir())
    []
    """
    for path in folder.glob(f"{PARTIAL}*"):
        path.unlink()
    for path, first, _ in _parts(folder):
        if first > after:
            path.unlink()


def last_step(folder: Path) -> int | None:
    """Return the last step of which there are results, None without any.

    Examples
    --------
    >>> import tempfile
    >>> last_step(Path(tempfile.mkdtemp())) is None
    True
    """
    return max((last for _, _, last in _parts(folder)), default=None)


def read_parts(folder: Path, last: float = math.inf) -> xr.Dataset:
    """Load all steps of a result into memory, or those up to the last one asked for.

    Raises
    ------
    DataError
        If the folder holds no parts, or a damaged one, or one before another is missing.

    Examples
    --------
    >>> import tempfile
    >>> rows = xr.Dataset({"loss": ("step", [0.2])}, {"step": [3]})
    >>> folder = write_part(rows, Path(tempfile.mkdtemp())).parent
    >>> read_parts(folder).step.values.tolist()
    [3]
    """
    found: list[xr.Dataset] = []
    end = _NONE
    for path, first, last_here in _parts(folder):
        if first > last:
            break
        part = read_netcdf(path).to_dataset()
        if (before := part.attrs.pop(_AFTER, end)) != end:
            raise DataError(
                f"{folder} does not hold the results up to step {before}, which "
                f"{path.name} follows. Put that file back, or open the others one by one."
            )
        found.append(part)
        end = last_here
    if not found:
        raise DataError(f"{folder} holds no results of a training.")
    return join_steps(found)


def join_steps(rows: Sequence[xr.Dataset]) -> xr.Dataset:
    """Join results of successive steps; attributes that differ are left out.

    Examples
    --------
    >>> one = xr.Dataset({"loss": ("step", [0.2])}, {"step": [3]})
    >>> join_steps([one, one.assign_coords(step=[4])]).step.values.tolist()
    [3, 4]
    """
    return xr.concat(
        rows,
        dim="step",
        data_vars="all",
        coords="minimal",
        compat="override",
        join="outer",
        combine_attrs="drop_conflicts",
    )


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
            raise ValueError(
                f"merge: {name}[{spot}] is {a.values[place]!s} in one run and "
                f"{b.values[place]!s} in another. Give a `dim` to keep both."
            )


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
