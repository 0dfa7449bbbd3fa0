"""Make the page of a saved result again, without computing anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

import xarray as xr

import fisherlab as fl
from fisherlab.catalogue import QUANTITIES, TEXTS
from fisherlab.report.folder import in_reports, whole_folder
from fisherlab.report.page import EXPECTED, write_page

PAGE: Final = ("report.html", "figures")
_DIMS: Final = ("layer", "approximator", "step", "damping", "seed")
BESIDE: Final = ("inverse_blocks.nc", "run.json")


def rebuild(
    results: str | Path, out: str | Path | None = None, *, overwrite: bool = False
) -> Path:
    """Write the page of a saved result and return its path.

    In the folder of a report its page and figures are renewed. Of any other file, or
    with `out`, a new folder is made, which takes copies of the results along.

    Parameters
    ----------
    results
        A file of `fl.save`, or a folder that holds `results.nc`.
    out
        The folder of the page; by default the report's own, or a new one in `reports`.
    overwrite
        Replace an earlier report in `out`.

    Raises
    ------
    DataError
        If the file is missing or not readable.
    ValueError
        If it holds no table of layers and approximations, or `out` is not empty.

    Examples
    --------
    >>> rebuild("nowhere.nc")
    Traceback (most recent call last):
    fisherlab.errors.DataError: open: there is no file nowhere.nc.
    """
    file = located(Path(results))
    ds = load(file)
    run = read_run(file.parent)
    tree = _blocks(file.parent / BESIDE[0])
    own = out is None and (file.parent / PAGE[0]).exists()
    target = file.parent if own else out
    owned = PAGE if own else (*PAGE, "results.nc", *BESIDE)
    fallback = in_reports(file.stem)
    folder = whole_folder(target, fallback, overwrite=own or overwrite, owned=owned)
    with folder as (scratch, place):
        write_page(ds, tree, scratch, run)
        if not own:
            _take_along(file, scratch)
    return place / PAGE[0]


def located(path: Path) -> Path:
    """Return the file of results that a path means: itself, or that of a folder.

    Examples
    --------
    >>> located(Path("a.nc")).name
    'a.nc'
    """
    inside = path / "results.nc"
    return inside if path.is_dir() and inside.exists() else path


def load(file: Path) -> xr.Dataset:
    """Open a result that has layers and approximations, or say that it has none.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load(fl.save(xr.Dataset(), Path(folder) / "a.nc"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: .../a.nc holds no table of layers and approximations...
    """
    ds = fl.open(file)
    fault = _fault(ds) if isinstance(ds, xr.Dataset) else "it is a tree"
    if not isinstance(ds, xr.Dataset) or fault:
        raise ValueError(
            f"{file} holds no table of layers and approximations: {fault}. Name what "
            "fl.compare returned and fl.save wrote, e.g. the results.nc of a report."
        )
    return ds


def _fault(ds: xr.Dataset) -> str:
    """Say what in a result is not what a report is made of, "" if nothing is."""
    for dim in ("layer", "approximator"):
        if dim not in ds.dims or dim not in ds.indexes:
            return f"it has no labels along {dim}"
        labels = ds.indexes[dim]
        if labels.has_duplicates or not all(isinstance(one, str) for one in labels):
            return f"the labels along {dim} are not texts that differ"
    for dim, kinds in (("step", "iu"), ("damping", "iuf")):
        if dim in ds.dims and (not ds.sizes[dim] or ds[dim].dtype.kind not in kinds):
            return f"{dim} is no row of {'whole ' if dim == 'step' else ''}numbers"
    for name in map(str, ds.data_vars):
        if name in QUANTITIES and name not in TEXTS and ds[name].dtype.kind not in "iuf":
            return f"{name} is {ds[name].dtype}, no real number"
        lacking = {"layer", "approximator"} - set(ds[name].dims)
        more = set(map(str, ds[name].dims)) - set(_DIMS)
        if name in EXPECTED and (lacking or more):
            return f"{name} is over {', '.join(map(str, ds[name].dims))}"
    return ""


def read_run(folder: Path) -> dict[str, Any]:
    """Return what `run.json` of a folder says, {} without one.

    Examples
    --------
    >>> read_run(Path("nowhere"))
    {}
    """
    file = folder / BESIDE[1]
    if not file.is_file():
        return {}
    try:
        told = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged: {error}. Remove it, or put it back; the page only shows "
            "what it says."
        ) from error
    return told if isinstance(told, dict) else {}


def _blocks(file: Path) -> xr.DataTree | None:
    tree = fl.open(file) if file.is_file() else None
    return tree if isinstance(tree, xr.DataTree) else None


def _take_along(file: Path, folder: Path) -> None:
    copy = shutil.copytree if file.is_dir() else shutil.copy2
    copy(file, folder / ("results.zarr" if file.is_dir() else "results.nc"))
    for name in BESIDE:
        if (file.parent / name).is_file():
            shutil.copy2(file.parent / name, folder / name)
