"""Grids of settings, an optuna study of them on disk, and what all trials came to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xarray as xr
from filelock import FileLock

from fisherlab.analysis.files import last_step, read_parts
from fisherlab.errors import DataError, NumericalError
from fisherlab.settings import put_back

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
    with put_back(partial(optuna.logging.set_verbosity, optuna.logging.get_verbosity())):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        yield optuna


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
Found = dict[str, tuple[str, xr.Dataset]]  # key of a trial to status and results


@dataclass(frozen=True)
class Trial:
    """One setting of one optimiser with one seed."""

    optimizer: str
    setting: Setting
    seed: int

    @property
    def key(self) -> str:
        """A name for a folder."""
        values = "-".join(f"{name}-{value:g}" for name, value in self.setting.items())
        return f"{self.optimizer}-{values}-seed-{self.seed}"


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


def laid_out(
    found: Found,
    chosen: Mapping[str, Sequence[Setting]],
    seeds: list[int],
    objective: str,
) -> xr.Dataset:
    """Lay the results of all trials on one grid, and name the best of every optimiser."""
    whole = [results for _, results in found.values() if "step" in results.coords]
    if not whole:
        first, _ = next(iter(found.values()))
        raise NumericalError(f"tune: no trial came to its first moment; {first}")
    steps = sorted({int(step) for results in whole for step in results["step"].values})
    kept = {str(n): v.attrs for results in whole for n, v in results.data_vars.items()}
    kept.pop("probe_seconds", None)
    shape = len(chosen), max(map(len, chosen.values())), len(seeds)
    values = {name: np.full((*shape, len(steps)), np.nan) for name in kept}
    status = np.full(shape, "", dtype=object)
    for row, (name, settings) in enumerate(chosen.items()):
        for (k, setting), (column, seed) in product(enumerate(settings), enumerate(seeds)):
            place = row, k, column
            told, results = found[Trial(name, setting, seed).key]
            status[place] = told
            there = [steps.index(step) for step in results.coords.get("step", [])]
            for variable in sorted(set(kept) & set(map(str, results.data_vars))):
                values[variable][(*place, there)] = results[variable].values
    dims = ("optimizer", "setting", "seed")
    variables: dict[str, Any] = {
        name: ((*dims, "step"), array, kept[name]) for name, array in values.items()
    }
    variables["status"] = (dims, status.astype(str))
    coords = {"optimizer": list(chosen), "seed": seeds, "step": steps}
    ds = xr.Dataset(variables, {**coords, **_labels(chosen, shape[:2])})
    return _judged(ds, objective)


def _labels(
    chosen: Mapping[str, Sequence[Setting]], shape: tuple[int, int]
) -> dict[str, Any]:
    """Return the values of every setting, NaN where an optimiser does not have it."""
    names = dict.fromkeys(name for s in chosen.values() for one in s for name in one)
    labels = {name: np.full(shape, np.nan) for name in names}
    for row, settings in enumerate(chosen.values()):
        for k, setting in enumerate(settings):
            for name, value in setting.items():
                labels[name][row, k] = value
    return {name: (("optimizer", "setting"), v) for name, v in labels.items()}


def _judged(ds: xr.Dataset, objective: str) -> xr.Dataset:
    """Add how good every setting is, and which one is the best of its optimiser."""
    last = ds[objective].isel(step=-1).where(ds["status"] == "ok")
    mean = last.mean("seed", skipna=False)
    bounded = mean.where(np.isfinite(mean), np.inf)
    best = bounded.argmin("setting").where((bounded < np.inf).any("setting"), -1)
    mean.attrs = {"long_name": f"{objective} at the last step", "units": "nat"}
    best.attrs = {"long_name": "number of the best setting, -1 none", "units": "1"}
    told = {"analysis": "tune", "objective": objective}
    return ds.assign(objective=mean, best=best.astype(int)).assign_attrs(told)
