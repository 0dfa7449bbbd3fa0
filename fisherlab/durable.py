"""Files that are whole or not there, tell of damage, and have one writer at a time."""

import glob
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from fisherlab.errors import DataError

PARTIAL: Final = ".partial-"
_SEAL: Final = b"\nfisherlab sha256 "
_FOLDER_SEAL: Final = ".fisherlab-sha256"
_LENGTH: Final = len(_SEAL) + 64
_ABANDONED: Final = 3600.0  # seconds after which an unfinished file has lost its writer


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
    DataError
        If the path is there and is no file: a device or pipe would be replaced.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_durably(file, lambda path: path.write_text("done")).read_text()
    'done'
    """
    _require_place(path)
    _sweep(path)
    # Two processes that write one file do not write into one another.
    scratch = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        write(scratch)
        flush(scratch)
        os.replace(scratch, path)
        flush(path.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    return path


def _require_place(path: Path) -> None:
    if not path.name or (path.exists() and not path.is_file()):
        raise DataError(f"{str(path)!r} is no file: nothing is written there.")
    if not path.parent.is_dir():
        msg = f"{path.parent} is no folder that is there: make it, or give another path."
        raise FileNotFoundError(msg)


def _sweep(path: Path) -> None:
    """Remove what killed processes left of the same file an hour ago or earlier."""
    for scratch in path.parent.glob(f"{PARTIAL}*-{glob.escape(path.name)}"):
        with suppress(FileNotFoundError):
            if time.time() - scratch.stat().st_mtime > _ABANDONED:
                scratch.unlink()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk.

    Examples
    --------
    >>> flush(Path.cwd())
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(folder: Path) -> None:
    """Wait until all that a folder holds is on the disk.

    Examples
    --------
    >>> import tempfile
    >>> flush_tree(Path(tempfile.mkdtemp()))
    """
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            flush(path)


def write_sealed(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file as `write_durably` does, with a hash of its content at its end.

    HDF5 and zip files are read as before by any program: both end where they say.

    Raises
    ------
    OSError
        If the folder cannot be written; an existing file is left as it was.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.txt"
    >>> write_sealed(file, lambda path: path.write_text("done")).read_text().split()[:3]
    ['done', 'fisherlab', 'sha256']
    """

    def sealed(scratch: Path) -> None:
        write(scratch)
        seal = _SEAL + _digest(scratch, scratch.stat().st_size)
        with scratch.open("ab") as file:
            file.write(seal)

    return write_durably(path, sealed)


def check_seal(path: Path) -> bool:
    """Tell whether a file has a seal; files of others and of old versions have none.

    Raises
    ------
    DataError
        If the content is not what was sealed.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "a.txt"
    >>> check_seal(write_sealed(file, lambda path: path.write_text("done")))
    True
    >>> _ = file.write_bytes(file.read_bytes().replace(b"done", b"gone"))
    >>> check_seal(file)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    fisherlab.errors.DataError: ...a.txt is damaged: its content is not what was ...
    """
    size = path.stat().st_size - _LENGTH
    if size < 0:
        return False
    with path.open("rb") as file:
        file.seek(size)
        seal = file.read()
    if not seal.startswith(_SEAL):
        return False
    if seal != _SEAL + _digest(path, size):
        raise DataError(
            f"{path} is damaged: its content is not what was written into it. Take a "
            "copy of the file, or make it again."
        )
    return True


@contextmanager
def claimed(lock: Path, refusal: Exception, seconds: float = 0) -> Iterator[None]:
    """Keep other processes out by a lock file, which frees itself when its process dies.

    The block may remove the file.

    Raises
    ------
    Exception
        The refusal, if another process is in after so many seconds.
    DataError
        If the folder of the lock cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> lock = Path(tempfile.mkdtemp()) / "lock"
    >>> with claimed(lock, ValueError("taken")), claimed(lock, ValueError("taken")):
    ...     pass
    Traceback (most recent call last):
    ValueError: taken
    """
    holder = FileLock(lock, timeout=seconds, thread_local=False)
    try:
        holder.acquire()
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and not _creatable(lock):
            why = "" if isinstance(error, Timeout) else f" ({error.strerror})"
            msg = f"{lock.parent} cannot be written{why}: give a folder that can."
            raise DataError(msg) from error
        raise refusal from None  # held elsewhere, or in this thread
    try:
        yield
    finally:
        holder.release()


def _creatable(file: Path) -> bool:
    try:
        file.touch()
    except OSError:
        return False
    return True


def _digest(path: Path, size: int) -> bytes:
    """Return the SHA-256 of the first bytes of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (part := file.read(min(size, 2**24))):
            digest.update(part)
            size -= len(part)
    return digest.hexdigest().encode()


def seal_folder(folder: Path) -> None:
    """Write a hash of all files of a folder into it.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> seal_folder(folder)
    >>> check_folder(folder)
    True
    """
    (folder / _FOLDER_SEAL).write_text(_folder_digest(folder))


def check_folder(folder: Path) -> bool:
    """Tell whether a folder is sealed.

    Raises
    ------
    DataError
        If a file in it is not what was sealed, one is missing, or there is one more.
    """
    seal = folder / _FOLDER_SEAL
    if not seal.is_file():
        return False
    if seal.read_bytes() != _folder_digest(folder).encode():
        raise DataError(
            f"{folder} is damaged: its files are not what was written. Take a copy, or "
            f"remove {_FOLDER_SEAL} from it if you changed it yourself."
        )
    return True


def _folder_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _FOLDER_SEAL:
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(_digest(path, path.stat().st_size))
    return digest.hexdigest()
