"""Data files: names, checksums, addresses; where they are found, fetched and kept."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

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
        The checksum of the published file; empty where none is known, so that only what
        is in the file can be checked.
    source
        The public address of the folder it can be downloaded from; empty if there is
        none.
    origin
        How the file came about, where it has no address.
    also
        Checksums of other files that hold the same numbers.

    Examples
    --------
    >>> DataFile("mnist", "a.gz", "00", "https://example.org/mnist").address
    'https://example.org/mnist/a.gz'
    """

    folder: str
    name: str
    sha256: str
    source: str
    origin: str = ""
    also: tuple[str, ...] = ()

    @property
    def address(self) -> str:
        """Return the address of the file, empty if it has none."""
        return f"{self.source}/{self.name}" if self.source else ""

    @property
    def remedy(self) -> str:
        """Say where to get the file and where to put it."""
        checksum = f"sha256 {self.sha256}" if self.sha256 else "no checksum is published"
        where = (
            f"Get it from {self.address} ({checksum})"
            if self.source
            else f"It has no public address ({checksum}): {self.origin}. Get it"
        )
        return (
            f"{where}, put it into a folder {self.folder!r}, and name the folder above "
            "with --data-dir (data_dir=) or $FISHERLAB_DATA."
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
    path = find(file, data_dir)
    if path is None:
        places = ", ".join(map(str, _folders(file, data_dir)))
        raise DataError(
            f"The data file {file.name} is missing: looked in {places}. {file.remedy}"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    found = hashlib.sha256(content).hexdigest()
    if file.sha256 and found not in (file.sha256, *file.also):
        raise DataError(
            f"{path} is not the published file: its sha256 is {found} over "
            f"{len(content)} bytes (damaged or cut short?). {file.remedy}"
        )
    return content


def find(file: DataFile, data_dir: str | Path | None = None) -> Path | None:
    """Return where a data file lies, or None; see `read_verified` for the places.

    Examples
    --------
    >>> file = DataFile("mnist", "a.gz", "00", "https://example.org/mnist")
    >>> find(file, "/nowhere") is None
    True
    """
    paths = (folder / file.name for folder in _folders(file, data_dir))
    return next((path for path in paths if path.exists()), None)


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


def _folders(file: DataFile, data_dir: str | Path | None) -> list[Path]:
    return [place for root in _roots(data_dir) for place in (root / file.folder, root)]


def _roots(data_dir: str | Path | None) -> list[Path]:
    """Return the places to search: a place that was named is not silently replaced."""
    if data_dir is not None:
        return [Path(data_dir).expanduser()]
    named = os.environ.get(_VARIABLE)
    return [*([Path(named).expanduser()] if named else []), cache_folder()]


def cached(
    name: str, shape: tuple[int, ...], make: Callable[[], NDArray[np.float32]]
) -> NDArray[np.float32]:
    """Return an array from the cache folder; make and keep it if it is not there.

    A damaged file is made anew. Where the folder cannot be written to, the array is
    made at every call.

    Parameters
    ----------
    name
        Identifies the array and everything it depends on.
    shape
        What the array's shape must be.
    make
        Makes the array.
    """
    path = cache_folder() / "surrogates" / f"{name}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        found: NDArray[np.float32] = np.load(path, allow_pickle=False)
        if found.shape == shape and found.dtype == np.float32:
            return found
    made = make()
    with contextlib.suppress(OSError):
        _write(path, made)
    return made


def _write(path: Path, values: NDArray[np.float32]) -> None:
    """Write all of the file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, values, allow_pickle=False)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def fetch(files: Iterable[DataFile], data_dir: str | Path | None = None) -> list[Path]:
    """Download what is missing, verify all of it, and return where each file lies.

    A file that is there already is not downloaded again. A new one goes into its own
    folder under `data_dir`, by default the cache folder of the platform, and appears
    there only when it is complete and its checksum is right.

    Raises
    ------
    DataError
        If pooch is not installed, a file has no public address, cannot be fetched, or
        differs from the published one.

    Examples
    --------
    >>> fetch([])
    []
    """
    return [_fetched(file, data_dir) for file in files]


def _fetched(file: DataFile, data_dir: str | Path | None) -> Path:
    if find(file, data_dir) is None:
        if not file.source:
            raise DataError(f"{file.name} cannot be downloaded. {file.remedy}")
        root = cache_folder() if data_dir is None else Path(data_dir).expanduser()
        _retrieve(file, root / file.folder)
    read_verified(file, data_dir)
    path = find(file, data_dir)
    assert path is not None
    return path


def _retrieve(file: DataFile, folder: Path) -> None:
    pooch = _pooch()
    try:
        pooch.retrieve(
            file.address,
            known_hash=f"sha256:{file.sha256}" if file.sha256 else None,
            fname=file.name,
            path=folder,
        )
    # The errors of the connection are those of requests, which pooch brings along.
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"Cannot download {file.address} to {folder}: {reason} {file.remedy}"
        ) from error


def _pooch() -> Any:
    try:
        return import_module("pooch")
    except ImportError as error:
        raise DataError(
            "Downloading needs pooch, which is not installed: "
            "pip install 'fisherlab[data]', or get the files by hand."
        ) from error


# In the order train images, train labels, test images, test labels.
_IDX_NAMES: Final = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _idx_files(
    folder: str, source: str, checksums: tuple[str, ...]
) -> tuple[DataFile, ...]:
    return tuple(
        DataFile(folder, name, checksum, source)
        for name, checksum in zip(_IDX_NAMES, checksums, strict=True)
    )


MNIST: Final = _idx_files(
    "mnist",
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
)
FASHION_MNIST: Final = _idx_files(
    "fashion-mnist",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
)

_TORONTO: Final = "https://www.cs.toronto.edu"

CIFAR10: Final = DataFile(
    "cifar10",
    "cifar-10-python.tar.gz",
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    f"{_TORONTO}/~kriz",
)
CIFAR100: Final = DataFile(
    "cifar100",
    "cifar-100-python.tar.gz",
    "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    f"{_TORONTO}/~kriz",
)
CIFAR10_SUBSET: Final = DataFile(
    "cifar10",
    "cifar10_small.npz",
    "ca8c45caf874dbfde3bb2da232f16c79da3d45599cdcb074afeb546a83e533a2",
    "",
    "3,000 images taken from the CIFAR-10 of Krizhevsky 2009, with their official "
    "positions",
)

_HOUSE_NUMBERS: Final = "http://ufldl.stanford.edu/housenumbers"
SVHN: Final = (
    DataFile(
        "svhn",
        "train_32x32.mat",
        "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        _HOUSE_NUMBERS,
    ),
    DataFile(
        "svhn",
        "test_32x32.mat",
        "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        _HOUSE_NUMBERS,
    ),
)

CURVES: Final = DataFile("curves", "digs3pts_1.mat", "", f"{_TORONTO}/~jmartens")
FACES: Final = DataFile("faces", "newfaces_rot_single.mat", "", f"{_TORONTO}/~jmartens")
# The same 400 photographs are in circulation in two containers.
OLIVETTI: Final = DataFile(
    "olivetti",
    "olivettifaces.mat",
    "b612fb967f2dc77c9c62d3e1266e0c73d5fca46a4b8906c18e454d41af987794",
    "https://cs.nyu.edu/~roweis/data",
    also=("b1988d02c72fe5b8ee82b5ef3bb7982eafc74f1e1ff0ae0ade35061ad0af534d",),
)

SHAKESPEARE: Final = DataFile(
    "shakespeare",
    "input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare",
)
