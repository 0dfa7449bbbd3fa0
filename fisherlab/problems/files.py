"""Data files: names, checksums, addresses, formats; where they are found and kept."""

import contextlib
import gzip
import hashlib
import io
import math
import os
import pickle
import struct
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

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


_reconstruct: Final = np.zeros(0).__reduce__()[0]

# All that a pickled array of numbers needs, under the names of numpy 1 and 2.
_ALLOWED: Final[dict[tuple[str, str], Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _Guarded(pickle.Unpickler):
    """Build containers, strings, numbers and arrays of them, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what an array needs; refuse every other name."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return _ALLOWED[module, name]


def decode_pickle(content: bytes, name: str) -> Any:
    """Unpickle numbers, strings, arrays and containers of them; refuse all else.

    Byte strings of Python 2 become text (latin-1), as its pickled arrays need.

    Parameters
    ----------
    content
        The pickle.
    name
        What to call it in an error.

    Raises
    ------
    DataError
        If the pickle is damaged, or names a class or function that an array of numbers
        does not need. Nothing it names is imported or called.

    Examples
    --------
    >>> import pickle
    >>> decode_pickle(pickle.dumps({"labels": [3, 1]}), "batch")
    {'labels': [3, 1]}
    >>> decode_pickle(pickle.dumps(print), "batch")
    Traceback (most recent call last):
    fisherlab.errors.DataError: batch cannot be unpickled: it asks for builtins.print, ...
    """
    try:
        return _Guarded(io.BytesIO(content), encoding="latin1").load()
    # Damaged pickles raise errors of a dozen kinds.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} cannot be unpickled: {reason}.") from error


def members(content: bytes, name: str, wanted: Sequence[str]) -> list[bytes]:
    """Return files of a gzipped tar archive, which is not unpacked to disk.

    Parameters
    ----------
    content
        The archive.
    name
        What to call it in an error.
    wanted
        Paths within the archive.

    Raises
    ------
    DataError
        If the archive is damaged, holds a path that leaves its folder or anything else
        than files and folders, or lacks a wanted file.
    """
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                _require_harmless(member, name)
                file = archive.extractfile(member) if member.name in wanted else None
                if file is not None:
                    found[member.name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{name} cannot be unpacked: {error}.") from error
    missing = [path for path in wanted if path not in found]
    if missing:
        raise DataError(f"{name} lacks {', '.join(missing)}.")
    return [found[path] for path in wanted]


def _require_harmless(member: tarfile.TarInfo, name: str) -> None:
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{name} holds the path {member.name!r}, which leaves its folder.")
    if not (member.isfile() or member.isdir()):
        raise DataError(f"{name} holds {member.name!r}, which is neither file nor folder.")


def decode_npz(content: bytes, name: str, wanted: Sequence[str]) -> list[NDArray[Any]]:
    """Return arrays of an `.npz` file; pickled ones are refused.

    Parameters
    ----------
    content
        The file.
    name
        What to call it in an error.
    wanted
        Names of the arrays.

    Raises
    ------
    DataError
        If the file is damaged, lacks an array, or has it pickled.

    Examples
    --------
    >>> import io
    >>> file = io.BytesIO()
    >>> np.savez(file, y=np.arange(3))
    >>> decode_npz(file.getvalue(), "a.npz", ["y"])
    [array([0, 1, 2])]
    """
    try:
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with loaded as file:
            missing = [key for key in wanted if key not in file]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}")
            return [file[key] for key in wanted]
    # Damaged archives raise errors of several modules.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} cannot be read as .npz: {reason}.") from error


_UNSIGNED_BYTES: Final = 0x08


def decode_idx(packed: bytes, name: str, axes: int) -> UInt8[Tensor, "*sizes"]:
    """Decode a gzipped IDX file of unsigned bytes.

    The format is two zero bytes, the type, the number of axes, one big-endian 32-bit
    size per axis, and the values in row-major order.

    Parameters
    ----------
    packed
        Content of the gzipped file.
    name
        What to call the file in an error.
    axes
        The number of axes it must have (3 for images, 1 for labels).

    Raises
    ------
    DataError
        If the file is not gzipped, is of another kind, or is cut short.

    References
    ----------
    LeCun, Cortes & Burges, "The MNIST database", section "File formats".

    Examples
    --------
    >>> import gzip
    >>> decode_idx(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7])), "labels", 1)
    tensor([5, 7], dtype=torch.uint8)
    """
    try:
        raw = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} cannot be unpacked: {error}.") from error
    expected = bytes([0, 0, _UNSIGNED_BYTES, axes])
    if raw[:4] != expected:
        raise DataError(
            f"{name} begins with the bytes {raw[:4].hex(' ')}, but an IDX file with "
            f"{axes} axes of unsigned bytes begins with {expected.hex(' ')}."
        )
    header = 4 + 4 * axes
    sizes = _sizes(raw[4:header], name, axes)
    if len(raw) - header != math.prod(sizes):
        raise DataError(
            f"{name} holds {len(raw) - header} values, but its header promises "
            f"{' x '.join(map(str, sizes))}."
        )
    # A bytearray, because torch warns about memory that it cannot write to.
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return values[header:].reshape(sizes)


def _sizes(header: bytes, name: str, axes: int) -> tuple[int, ...]:
    try:
        return struct.unpack(f">{axes}I", header)
    except struct.error as error:
        raise DataError(f"{name} ends inside its header.") from error


_HDF5: Final = b"\x89HDF\r\n\x1a\n"
# MATLAB 7.3 puts its own header before the HDF5 file.
_OFFSETS: Final = (0, 512)


def decode_mat(
    content: bytes, name: str, axes: Mapping[str, int]
) -> dict[str, NDArray[Any]]:
    """Read numeric variables of a `.mat` file, in MATLAB's order of the axes.

    Versions 5 to 7.2 are read by scipy, version 7.3 (which is HDF5 and lists the axes
    backwards) by h5py. Nothing else than arrays of numbers is taken from the file, and
    no other file is followed from within it.

    Parameters
    ----------
    content
        The file.
    name
        What to call it in an error.
    axes
        The variables to read, and how many axes each must have.

    Raises
    ------
    DataError
        If the file cannot be read, or a variable is missing or of another kind.

    Examples
    --------
    >>> import io, scipy.io
    >>> file = io.BytesIO()
    >>> scipy.io.savemat(file, {"y": [[1, 2]]})
    >>> decode_mat(file.getvalue(), "labels.mat", {"y": 2})["y"]
    array([[1, 2]])
    """
    hdf5 = any(content[at : at + len(_HDF5)] == _HDF5 for at in _OFFSETS)
    read = _version_7 if hdf5 else _version_5
    try:
        found = read(content, tuple(axes))
    # Damaged files make the readers raise errors of a dozen kinds.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name} cannot be read as a MATLAB file: {reason}") from error
    for variable, count in axes.items():
        _check(found.get(variable), name, variable, count)
    return found


def _check(values: Any, name: str, variable: str, axes: int) -> None:
    if values is None:
        raise DataError(f"{name} has no variable {variable!r}.")
    if values.dtype.kind not in "uif" or values.ndim != axes:
        raise DataError(
            f"The variable {variable!r} of {name} is of type {values.dtype} and shape "
            f"{values.shape}; numbers with {axes} axes are expected."
        )


def _version_5(content: bytes, variables: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    import scipy.io

    file: Any = io.BytesIO(content)  # the stubs of scipy know paths only
    found = scipy.io.loadmat(file, variable_names=variables)
    return {name: found[name] for name in variables if name in found}


def _version_7(content: bytes, variables: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    import h5py  # type: ignore[import-untyped]

    found = {}
    with h5py.File(io.BytesIO(content), "r") as file:
        for name in variables:
            link = file.get(name, getlink=True)
            if link is not None:
                found[name] = _stored(file, name, isinstance(link, h5py.HardLink))
    return found


def _stored(file: Any, name: str, hard: bool) -> NDArray[Any]:
    """Return a variable that lies in the file itself; other links are not followed."""
    import h5py

    if not (hard and isinstance(file[name], h5py.Dataset)):
        raise ValueError(f"{name!r} is no array of the file itself")
    if file[name].external or file[name].is_virtual:
        raise ValueError(f"the numbers of {name!r} are not in the file itself")
    return np.asarray(file[name]).transpose()
