"""Results on disk: netCDF through h5netcdf, or zarr, written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import xarray as xr

from fisherlab.analysis.zarrs import is_zarr, read_zarr, write_zarr
from fisherlab.errors import DataError

ENGINE: Final = "h5netcdf"
PARTIAL: Final = ".partial-"


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
    DataError
        If zarr is asked for and not installed.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> save(xr.Dataset({"a": ("x", [1.0])}), folder / "a.nc").name
    'a.nc'
    """
    target = Path(path)
    if is_zarr(target):
        return write_zarr(result, target)
    # In memory first: HDF5 does not survive a disk that is full.
    if isinstance(result, xr.DataTree):
        content = bytes(result.to_netcdf(engine=ENGINE, encoding=_compressed(result)))
    else:
        content = bytes(result.to_netcdf(engine=ENGINE))
    return write_durably(target, lambda scratch: scratch.write_bytes(content))


def write_durably(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file so that it is there in full, or as it was before, whatever happens.

    Parameters
    ----------
    path
        The file.
    write
        Writes to the path it is given, a temporary one in the same folder.

    Raises
    ------
    OSError
        If the folder cannot be written; an existing file is left as it was.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_durably(file, lambda path: path.write_text("done")).read_text()
    'done'
    """
    scratch = path.with_name(PARTIAL + path.name)
    try:
        write(scratch)
        _flush(scratch)
        os.replace(scratch, path)
        _flush(path.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    return path


def _flush(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        A file or zarr folder that `save` wrote, or a folder that `fl.follow` writes to.

    Returns
    -------
    xarray.Dataset or xarray.DataTree
        A tree if the file has groups.

    Raises
    ------
    DataError
        If the file is missing or is no netCDF file.

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
        from fisherlab.analysis.parts import read_parts

        return read_parts(file)
    try:
        tree: xr.DataTree = xr.load_datatree(file, engine=ENGINE)
    except (OSError, ValueError) as error:
        raise DataError(f"open: {file} is not a readable netCDF file: {error}") from error
    return _unwrapped(tree)


def _unwrapped(tree: xr.DataTree) -> xr.Dataset | xr.DataTree:
    return tree if tree.children else tree.to_dataset()
