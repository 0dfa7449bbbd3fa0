"""Read the formats of data files: IDX, MATLAB, and pickled arrays without running them."""

from __future__ import annotations

import gzip
import io
import math
import pickle
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

from fisherlab.errors import DataError

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
