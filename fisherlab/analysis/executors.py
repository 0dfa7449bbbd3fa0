"""Cells of an analysis done by an executor, and kept in a folder, a file a cell."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, final, runtime_checkable

import xarray as xr

from fisherlab.analysis.cells import Telling, say_complete, teller
from fisherlab.analysis.files import merge, save
from fisherlab.analysis.files import open as opened
from fisherlab.codes import codes, described
from fisherlab.durable import PARTIAL, claimed, write_durably
from fisherlab.errors import DataError, ExecutorError, StoreError, lasting

T = TypeVar("T")


@runtime_checkable
class Executor(Protocol):
    """What calls functions elsewhere: of `concurrent.futures`, dask or submitit."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        """Return a future with `done()`, `result()` and `cancel()`."""


Workers = Executor | Callable[[], Executor] | None
PAUSE: Final = 0.02  # seconds between two looks at futures
TRIES: Final = 2  # rounds in which nothing may be done before cells are given up
_TURN: Final = threading.Lock()  # a model and torch's generators belong to a process
_RECORD: Final = "cells.json"
_LOCK: Final = "lock"


def filled(
    who: str, cells: Mapping[str, Callable[[], T]], executor: Workers
) -> Iterator[tuple[str, T]]:
    """Yield what cells give as they are done: here and in turn without an executor.

    Threads of one process take turns: only processes make it faster.

    Parameters
    ----------
    who
        The function that was called, for errors.
    cells
        By name, each a call without arguments that can be done again.
    executor
        Anything with ``submit``, or a function that begins one, such as
        ``partial(ProcessPoolExecutor, 4)``: then another one takes the place of one
        that broke, and the cell of a killed worker is done again.

    Raises
    ------
    Exception
        That of a cell, which a note names; the cells that wait are cancelled.
    ExecutorError
        If the executor gives nothing but failures of its own.

    Examples
    --------
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> cells = {"one": partial(int, "1"), "two": partial(int, "2")}
    >>> with ThreadPoolExecutor(2) as pool:
    ...     sorted(filled("it", cells, pool))
    [('one', 1), ('two', 2)]
    """
    if executor is None:
        for name, cell in cells.items():
            yield name, cell()
        return
    left, idle = dict(cells), 0
    while left:
        before, lost = len(left), None
        with _begun(who, executor) as live, closing(_finished(live, left)) as ending:
            for name, outcome in ending:
                if isinstance(outcome, Exception):
                    lost = outcome
                else:
                    del left[name]
                    yield name, _value(who, name, *outcome)
        idle = idle + 1 if len(left) == before else 0
        if idle == TRIES:
            raise ExecutorError(_lost(who, len(cells), len(left), lost)) from lost


@contextmanager
def _begun(who: str, executor: Executor | Callable[[], Executor]) -> Iterator[Executor]:
    """Give an executor, ended afterwards if it was begun here."""
    with ExitStack() as stack:
        made: Any = executor
        if not isinstance(executor, Executor) and callable(executor):
            made = executor()
            if hasattr(made, "__exit__"):
                stack.enter_context(made)
        if not isinstance(made, Executor):
            raise TypeError(
                f"{who}: executor={executor!r} has no submit(). Give an executor, e.g. "
                "concurrent.futures.ProcessPoolExecutor(4), or a function that begins one."
            )
        yield made


def _finished(
    executor: Executor, cells: Mapping[str, Callable[[], Any]]
) -> Generator[tuple[str, Any]]:
    """Yield the name of every cell and its `_kept`, or what the executor failed with."""
    waiting: dict[str, Any] = {}
    for name, cell in list(cells.items()):
        try:
            waiting[name] = executor.submit(_kept, _sent(executor, cell))
        except Exception as error:  # a broken pool, or what cannot be sent
            yield name, error
    try:
        while waiting:
            done = [name for name, future in waiting.items() if future.done()]
            if not done:
                time.sleep(PAUSE)
            for name in done:
                yield name, _result(waiting.pop(name))
    finally:
        for future in waiting.values():
            future.cancel()


def _result(future: Any) -> Any:
    try:
        return future.result()
    except Exception as error:
        return error


def _sent(executor: Executor, cell: Callable[[], T]) -> Callable[[], T]:
    """Return a cell as it is sent to workers."""
    if not isinstance(executor, ProcessPoolExecutor):
        return cell
    # As bytes: between processes torch would share every tensor by a file handle.
    return partial(_loaded, pickle.dumps(cell))


def _loaded(data: bytes) -> Any:
    return pickle.loads(data)()


def _kept(cell: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Do a cell on a worker; what it raises is told apart from failures of executors."""
    with _TURN:
        try:
            return cell(), None
        except Exception as error:
            return None, lasting(error)


def _value(who: str, name: str, value: Any, error: Exception | None) -> Any:
    if error is not None:
        error.add_note(f"{who}: this happened in the cell {name!r}, on a worker.")
        raise error
    return value


def _lost(who: str, cells: int, left: int, error: Exception | None) -> str:
    told = "without an error of its own"
    if error is not None:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return (
        f"{who}: the executor did {cells - left} of {cells} cells and failed at the rest "
        f"({told}). A worker that died, e.g. for memory, breaks a pool: call again, with "
        "the same store if there is one, and give a function that begins an executor, e.g. "
        "partial(ProcessPoolExecutor, 4), which is begun again. What is sent to other "
        "processes must be importable there: functions and classes of modules."
    )


def told(methods: Mapping[str, Any]) -> dict[str, str]:
    """Return what tells methods apart, for a `Folder`: names, settings and code."""
    shown = json.dumps({name: described(method) for name, method in methods.items()})
    return {"methods": shown, **codes(methods=[*methods.items()])}


@final
@dataclass(frozen=True)
class Folder:
    """Cells that are done, a netCDF file each, named by a hash of all that decides them.

    Several processes may fill one folder at a time: files are written whole or not at
    all, and a cell that two of them do has the same numbers.

    Parameters
    ----------
    path
        The folder; None keeps nothing.
    request
        What the cells are an answer to.
    """

    path: Path | None
    request: Mapping[str, str]

    @classmethod
    def of(
        cls,
        who: str,
        path: str | os.PathLike[str] | None,
        request: Callable[[], Mapping[str, str]],
        cells: Sequence[str],
        dim: str = "",
    ) -> Folder:
        """Open a folder, made where there is none.

        Parameters
        ----------
        request
            What all cells depend on.
        cells
            Their names, in order.
        dim
            Along which they stand side by side when the folder is opened; without it
            they complete each other.

        Raises
        ------
        StoreError
            If it is of another request; what differs is named.
        """
        if path is None:
            return cls(None, {})
        folder, asked = Path(path).expanduser(), dict(request())
        folder.mkdir(parents=True, exist_ok=True)
        taken = StoreError(f"{who}: another process begins in {folder} for a minute now.")
        with claimed(folder / _LOCK, taken, seconds=60):
            known = _record(folder) or {"request": asked, "cells": [], "along": dim}
            before = known["request"]
            both = sorted({*before, *asked})
            unlike = [name for name in both if before.get(name) != asked.get(name)]
            if unlike:
                raise StoreError(
                    f"{who}: {folder} holds cells of another request: {', '.join(unlike)} "
                    "differ. Name another folder, or ask for the same."
                )
            known["cells"] = list(dict.fromkeys([*known["cells"], *cells]))
            text = json.dumps(known, indent=2)
            write_durably(folder / _RECORD, lambda at: at.write_text(text))
        return cls(folder, asked)

    def file(self, folder: Path, name: str) -> Path:
        """Return where a cell is kept."""
        text = json.dumps([dict(self.request), name], sort_keys=True)
        return folder / f"cell-{hashlib.sha256(text.encode()).hexdigest()[:20]}.nc"

    def holds(self, name: str) -> bool:
        """Tell whether a cell is done."""
        return self.path is not None and self.file(self.path, name).exists()

    def held(self, name: str) -> xr.Dataset | None:
        """Return a cell that is done, or None.

        Raises
        ------
        DataError
            If its file is damaged.
        """
        if self.path is None or not self.holds(name):
            return None
        found = opened(self.file(self.path, name))
        assert isinstance(found, xr.Dataset)
        return found

    def filled(
        self,
        who: str,
        cells: Mapping[str, Callable[[], xr.Dataset]],
        executor: Workers,
        tell: Telling = False,
        unit: str = "layer",
    ) -> list[xr.Dataset]:
        """Return all cells in order; those that are there are not done again."""
        rows = {name: row for name in cells if (row := self.held(name)) is not None}
        told = teller(tell, len(cells), unit)
        for name in rows:
            told(name)
        if len(rows) == len(cells):
            say_complete(tell, who, f"{len(rows)} {unit}s in {self.path}")
        left = {name: cell for name, cell in cells.items() if name not in rows}
        for name, row in filled(who, left, executor):
            rows[name] = row
            if self.path is not None:
                save(row, self.file(self.path, name))
            told(name)
        return [rows[name] for name in cells]


def _record(folder: Path) -> dict[str, Any] | None:
    path = folder / _RECORD
    if path.exists():
        damaged = DataError(f"{path} is damaged. Put it back, or name another folder.")
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise damaged from error
        if not (isinstance(found, dict) and found.keys() >= {"request", "cells", "along"}):
            raise damaged
        return found
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith(PARTIAL))
    if others := [name for name in names if name != _LOCK]:
        raise DataError(
            f"The folder {folder} holds no cells but other files "
            f"({', '.join(others[:3])}). Name an empty or a new one."
        )
    return None


def is_folder_of_cells(path: Path) -> bool:
    """Tell whether a folder holds cells."""
    return (path / _RECORD).is_file()


def merged_cells(path: Path) -> xr.Dataset:
    """Return all cells of a folder that are done as one table.

    Raises
    ------
    DataError
        If there are none, or one is damaged.
    """
    known = _record(path) or {"request": {}, "cells": [], "along": ""}
    folder, dim = Folder(path, known["request"]), known["along"]
    rows = [row for name in known["cells"] if (row := folder.held(name)) is not None]
    if not rows:
        raise DataError(f"open: none of the cells in {path} is done yet.")
    if dim:  # a label that two cells have is of the same numbers
        each = {row[dim].item(): row.assign_attrs(rows[0].attrs) for row in rows}
        rows = list(each.values())
    found = merge(rows, dim or None)
    for name in ("merged_from", dim):
        found.attrs.pop(name, None)
    return found
