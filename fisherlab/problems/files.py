"""Where data files are looked for, and how they are checked."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fisherlab.errors import DataError


@dataclass(frozen=True)
class DataFile:
    """Name a data file of a publication and how to recognise it.

    Attributes
    ----------
    folder
        The folder it belongs into, such as `mnist`.
    name
        The file's name as published.
    sha256
        The checksum of the published file.
    source
        The public address of the folder it can be downloaded from.

    Examples
    --------
    >>> DataFile("mnist", "a.gz", "00", "https://example.org/mnist").address
    'https://example.org/mnist/a.gz'
    """

    folder: str
    name: str
    sha256: str
    source: str

    @property
    def address(self) -> str:
        """Return the address of the file."""
        return f"{self.source}/{self.name}"

    @property
    def remedy(self) -> str:
        """Say where to get the file and where to put it."""
        return (
            f"Get it from {self.address} (sha256 {self.sha256}), put it into a folder "
            f"{self.folder!r}, and name the folder above with --data-dir (data_dir=) "
            "or $FISHERLAB_DATA."
        )


def read_verified(file: DataFile, data_dir: str | Path | None = None) -> bytes:
    """Read a data file and verify its checksum.

    A given `data_dir` is the only place searched; without it these are
    `$FISHERLAB_DATA` and the cache folder. In each, the file may lie in its own folder
    or directly.

    Raises
    ------
    DataError
        If the file is missing, cannot be read, or differs from the published one.

    Examples
    --------
    >>> file = DataFile("mnist", "a.gz", "00", "https://example.org/mnist")
    >>> read_verified(file, "/nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fisherlab.errors.DataError: The data file a.gz is missing: looked in ...
    """
    path = _find(file, data_dir)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise DataError(
            f"{path} is not the published file: its sha256 is {found} over "
            f"{len(content)} bytes (damaged or cut short?). {file.remedy}"
        )
    return content


def cache_folder() -> Path:
    """Return the folder where this platform keeps the caches of fisherlab.

    Examples
    --------
    >>> cache_folder().name
    'fisherlab'
    """
    return Path(_caches()).expanduser() / "fisherlab"


def _caches() -> str:
    if sys.platform == "win32":
        return os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    if sys.platform == "darwin":
        return "~/Library/Caches"
    return os.environ.get("XDG_CACHE_HOME") or "~/.cache"


_VARIABLE: Final = "FISHERLAB_DATA"


def _find(file: DataFile, data_dir: str | Path | None) -> Path:
    folders = [folder for root in _roots(data_dir) for folder in (root / file.folder, root)]
    for folder in folders:
        if (folder / file.name).exists():
            return folder / file.name
    places = ", ".join(map(str, folders))
    raise DataError(
        f"The data file {file.name} is missing: looked in {places}. {file.remedy}"
    )


def _roots(data_dir: str | Path | None) -> list[Path]:
    """Return the places to search: a place that was named is not silently replaced."""
    if data_dir is not None:
        return [Path(data_dir).expanduser()]
    named = os.environ.get(_VARIABLE)
    return [*([Path(named).expanduser()] if named else []), cache_folder()]
