"""An optuna study on disk: which settings are done, which are worth going on with."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import xarray as xr

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
    then are marked as failed. Only one process may work in a folder.

    Raises
    ------
    DataError
        If the journal in the folder is damaged.
    """
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1)
    try:
        study: optuna.Study = optuna.create_study(
            study_name=name,
            direction="minimize",
            storage=None if folder is None else _storage(optuna, folder),
            pruner=pruner if prune else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
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


class _Held:
    """Optuna's lock, always held: the folder has a lock that dies with its process."""

    def acquire(self) -> bool:
        """Tell that the lock is held."""
        return True

    def release(self) -> None:
        """Keep it."""


def _storage(optuna: Any, folder: Path) -> Any:
    path = folder / _JOURNAL
    if path.exists():
        written = path.read_bytes()
        whole = written.rfind(b"\n") + 1
        if whole < len(written):
            with path.open("r+b") as journal:
                journal.truncate(whole)
    journals = optuna.storages.journal
    return optuna.storages.JournalStorage(journals.JournalFileBackend(str(path), _Held()))


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
