"""Published grids of settings, and an optuna study on disk: what is done, what goes on."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import xarray as xr
from filelock import FileLock

from fisherlab.analysis.files import last_step, read_parts
from fisherlab.errors import DataError

if TYPE_CHECKING:
    import optuna

_JOURNAL: Final = "study.log"
_STATUS: Final = re.compile(r"ok|failed: .*|given up after step (\d+)", re.DOTALL)


@contextmanager
def quiet_optuna() -> Iterator[Any]:
    """Give optuna with its messages switched off; the switch is put back.

    Raises
    ------
    ImportError
        If optuna is not installed; the remedy is named.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "fl.tune needs optuna. Install it with `pip install 'fisherlab[tune]'`."
        ) from error
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield optuna
    finally:
        optuna.logging.set_verbosity(before)


def open_study(optuna: Any, name: str, folder: Path | None, prune: bool) -> optuna.Study:
    """Make a study, or load the one that a folder holds.

    A line that a killed process left unfinished is cut off, and trials that were running
    then are marked as failed. Only one process may search in a folder; its workers take
    `shared_study`.

    Raises
    ------
    DataError
        If the journal in the folder is damaged.
    """
    if folder is not None:
        _cut(folder / _JOURNAL)
    try:
        study = shared_study(optuna, name, folder, prune)
    except (ValueError, LookupError, TypeError) as error:
        if folder is None:
            raise
        raise DataError(
            f"{folder / _JOURNAL} is damaged: {' '.join(str(error).split())}. Remove it: "
            "the trials that are done are read from their own folders then."
        ) from error
    running = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    for trial in running:
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def shared_study(optuna: Any, name: str, folder: Path | None, prune: bool) -> optuna.Study:
    """Make or load a study that several processes may ask and tell at a time.

    Raises
    ------
    ValueError, LookupError, TypeError
        If the journal in the folder is damaged.
    """
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1)
    storage = None
    if folder is not None:
        journals = optuna.storages.journal
        lock = _Lock(folder / f"{_JOURNAL}.lock")
        file = journals.JournalFileBackend(str(folder / _JOURNAL), lock)
        storage = optuna.storages.JournalStorage(file)
    study: optuna.Study = optuna.create_study(
        study_name=name,
        direction="minimize",
        storage=storage,
        pruner=pruner if prune else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )
    return study


class _Lock:
    """A journal's lock that dies with its process, as those of optuna do not."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path)

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()


def _cut(path: Path) -> None:
    """Cut off a line that a killed process left unfinished."""
    written = path.read_bytes() if path.exists() else b""
    whole = written.rfind(b"\n") + 1
    if whole < len(written):
        with path.open("r+b") as journal:
            journal.truncate(whole)


def finished(study: optuna.Study, steps: int) -> dict[str, Mapping[str, Any]]:
    """Return what is told of the trials that ended with this number of steps, by key."""
    done: dict[str, Mapping[str, Any]] = {}
    for trial in study.get_trials(deepcopy=False):
        told = trial.user_attrs
        if "status" in told and told.get("steps") == steps:
            done[told["key"]] = {**told, "value": trial.value}
    return done


def last_value(results: xr.Dataset, objective: str) -> float:
    """Return what a trial came to, infinite where that is no number.

    Examples
    --------
    >>> last_value(xr.Dataset({"train_loss": ("step", [0.5, float("nan")])}), "train_loss")
    inf
    """
    value = float(results[objective][-1])
    return value if math.isfinite(value) else math.inf


def ended(
    folder: Path, told: Mapping[str, Any], wanted: Sequence[int], objective: str
) -> xr.Dataset | None:
    """Return the results of a trial that has ended, at the moments it came to.

    Parameters
    ----------
    folder
        Of the trial. If it is gone the result is None: the trial is to be run again.
    told
        What the study tells of it.
    wanted
        The moments of all trials.
    objective
        The loss that the value in the study is of.

    Raises
    ------
    DataError
        If the results are not what the study tells of.
    """
    failed = told["status"].startswith("failed")
    if not failed and not folder.exists():
        return None
    if failed and last_step(folder) is None:
        return xr.Dataset()  # before anything was measured
    try:
        results = _checked(read_parts(folder), told["status"], wanted)
        if told["status"] == "ok" and last_value(results, objective) != told["value"]:
            raise DataError("the study has another objective.")
    except DataError as error:
        raise DataError(
            f"tune: the results in {folder} are not what the search found: {error} Put "
            "the files back, or remove the folder and the trial is run again."
        ) from error
    return results


def _checked(results: xr.Dataset, status: str, wanted: Sequence[int]) -> xr.Dataset:
    """Return the results at the wanted moments that a trial of this status has."""
    known = _STATUS.fullmatch(status)
    if known is None:
        raise DataError(f"the study has the unknown status {status!r}.")
    found = set(results["step"].values.tolist())
    passed = [step for step in wanted if step <= int(known[1] or wanted[-1])]
    missing = [step for step in passed if step not in found]
    if missing and not status.startswith("failed"):
        raise DataError(f"the steps {missing[:5]} are missing.")
    return results.sel(step=[step for step in passed if step in found])


Grid = Mapping[str, Sequence[float]]
Setting = dict[str, float]


def _decades(first: int, last: int) -> tuple[float, ...]:
    """Return 1 and 3 in every power of ten from `first` to `last`."""
    return tuple(float(f"{digit}e{k}") for k in range(first, last + 1) for digit in (1, 3))


_FIRST_ORDER: Final = ("sgd-momentum", "sgd-nesterov", "adam")
_PRESETS: Final[dict[str, dict[str, Grid]]] = {
    "koroko": {
        "first-order": {"lr": _decades(-4, -1)},
        "second-order": {"lr": _decades(-3, -1), "damping": _decades(-4, -1)},
    },
    "bahamou": {
        "first-order": {"lr": _decades(-4, -2)},
        "second-order": {"lr": _decades(-6, -1), "damping": (*_decades(-4, 0), 10.0)},
    },
    "coarse": {
        "first-order": {"lr": (1e-3, 1e-2, 1e-1)},
        "second-order": {"lr": (1e-2, 1e-1, 1.0), "damping": (1e-2, 1e-1, 1.0)},
    },
}


def preset(name: str, optimizer: str) -> Grid:
    """Return the grid of a preset for an optimiser.

    Every preset has one and three in each power of ten, over ranges that hold all tuned
    values that its paper reports: `koroko` (Koroko et al. 2022), `bahamou` (Bahamou et
    al. 2022, Table of best settings); `coarse` is a short search of nine settings. SGD,
    Nesterov and Adam have no damping.

    Raises
    ------
    ValueError
        If there is no such preset.

    Notes
    -----
    The learning rates and dampings of Koroko et al. belong to losses that are means over
    C outputs. With the summed losses of fisherlab the same step is taken with s²λ and
    s·lr, s = C.

    Examples
    --------
    >>> preset("coarse", "kfac")["damping"]
    (0.01, 0.1, 1.0)
    >>> list(preset("koroko", "adam"))
    ['lr']
    """
    if name not in _PRESETS:
        known = ", ".join(_PRESETS)
        raise ValueError(f"tune: there is no grid {name!r}; the grids are {known}.")
    kind = "first-order" if optimizer in _FIRST_ORDER else "second-order"
    return _PRESETS[name][kind]


def settings_of(grid: Grid) -> list[Setting]:
    """Return all settings of a grid, the last name varying fastest.

    Raises
    ------
    ValueError
        If a name has no values.

    Examples
    --------
    >>> settings_of({"lr": [0.1, 0.2], "damping": [1.0]})
    [{'lr': 0.1, 'damping': 1.0}, {'lr': 0.2, 'damping': 1.0}]
    """
    empty = [name for name, values in grid.items() if not len(values)]
    if empty or not grid:
        raise ValueError(f"tune: the grid {dict(grid)} has no values for {empty}.")
    return [
        dict(zip(grid, map(float, values), strict=True))
        for values in product(*grid.values())
    ]
