"""Results on disk: netCDF through h5netcdf, or zarr, written whole or not at all."""

import os
from pathlib import Path
from typing import Any, Final

import xarray as xr

from fisherlab.analysis.zarrs import is_zarr, read_zarr, write_zarr
from fisherlab.durable import check_seal, write_sealed
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
        A file or zarr folder that `save` wrote, or a folder that `fl.follow` writes to.

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
        from fisherlab.analysis.parts import read_parts

        return read_parts(file)
    return _unwrapped(read_netcdf(file))


def _unwrapped(tree: xr.DataTree) -> xr.Dataset | xr.DataTree:
    if tree.children:
        return tree
    ds = tree.to_dataset()  # `sel(method=…)` of xarray means another thing
    return ds.rename(method="approximator") if "method" in ds.dims else ds
