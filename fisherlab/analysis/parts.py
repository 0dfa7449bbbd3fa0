"""A result along the steps of a training, as a folder of files that grows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import xarray as xr

from fisherlab.analysis.files import netcdf_file, read_netcdf
from fisherlab.durable import PARTIAL
from fisherlab.errors import DataError

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
