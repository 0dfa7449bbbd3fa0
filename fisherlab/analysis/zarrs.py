"""Results as zarr folders, written whole or not at all."""

import shutil
import tempfile
from pathlib import Path
from typing import Final

import xarray as xr

from fisherlab.durable import check_folder, flush, flush_tree, seal_folder
from fisherlab.errors import DataError

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
        msg = f"open: {folder} is not a readable zarr folder: {error}"
        raise DataError(msg) from error
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
