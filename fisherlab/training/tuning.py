"""Search a grid of settings for the best of every optimiser."""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import xarray as xr

from fisherlab.analysis.cells import say_complete
from fisherlab.analysis.executors import Workers, filled
from fisherlab.analysis.files import save
from fisherlab.codes import described
from fisherlab.errors import NumericalError
from fisherlab.problems import load
from fisherlab.problems.problem import Problem
from fisherlab.settings import is_number, numeric
from fisherlab.training.following import follow
from fisherlab.training.one_graph import require_one_process
from fisherlab.training.probes import Losses
from fisherlab.training.register import optimizer as by_name
from fisherlab.training.schedules import Every, LinearSteps, moments
from fisherlab.training.store import Store, described_problem, differences, session
from fisherlab.training.studies import (
    Found,
    Grid,
    Setting,
    Trial,
    ended,
    finished,
    laid_out,
    last_value,
    open_study,
    preset,
    quiet_optuna,
    settings_of,
    shared_study,
)

Make = Callable[..., torch.optim.Optimizer]
Problems = str | Problem | Callable[[int], Problem]
_MOMENTS: Final = LinearSteps(11)


@dataclass(frozen=True, eq=False)
class _Search:
    """What stays the same from trial to trial."""

    problem: Callable[[int], Problem]
    makers: Mapping[str, Make]
    options: Mapping[str, Any]  # of `follow`
    objective: str
    folder: Path | None
    progress: bool


@numeric
def tune(
    problem: Problems,
    optimizer: str | Sequence[str] | Mapping[str, Make],
    grid: str | Grid | Mapping[str, Grid] = "coarse",
    *,
    steps: int = 200,
    seeds: Sequence[int] = (0,),
    trials: int | None = None,
    every: Every = _MOMENTS,
    batch_size: int = 64,
    objective: str = "train_loss",
    examples: int | None = 2000,
    prune: bool = True,
    store: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    executor: Workers = None,
) -> xr.Dataset:
    """Train with every setting of a grid and find the best of every optimiser.

    Parameters
    ----------
    problem
        A name, a function from a seed to a problem (its weights should depend on it), or
        a problem, whose model is copied for every trial and left as it is.
    optimizer
        Names (see `fl.optimizers()`), or a mapping of names to functions that are called
        with the problem and the setting as keywords, and return an optimiser.
    grid
        Values of every setting, `{"lr": [...], "damping": [...]}`; such a grid for each
        optimiser; or a preset: "coarse", "koroko", "bahamou".
    steps, every, batch_size
        As in `fl.follow`; the moments are where a trial may be given up.
    seeds
        Of weights and batches. A setting is as good as its mean over them.
    trials
        At most so many settings of each optimiser, drawn at random; all by default.
    objective
        A loss that `Losses` gives; its value at the last step counts.
    examples
        At most so many examples of each set make up the losses.
    prune
        Whether to give up trials that do worse than the median of those before them.
    store
        A folder for the study and all runs. A search that was stopped or killed goes on
        there, in the middle of a training; what is done is not done again, and more
        settings, seeds or optimisers may be asked for. The result is in `results.nc`.
    seed
        Draws the settings.
    progress
        Whether to show a bar.
    executor
        What does the trials: anything with ``submit``, such as a `ProcessPoolExecutor` or
        a ``dask.distributed.Client``, or a function that begins one. Runs are the same;
        which of them are given up depends on what is done before, so that needs a store
        that all workers see.

    Returns
    -------
    xarray.Dataset
        The losses over (optimizer, setting, seed, step), NaN after a trial was given up;
        the settings as coordinates over (optimizer, setting), NaN where an optimiser has
        none; `objective(optimizer, setting)`, `best(optimizer)`, the number of the best
        setting or -1, and `status(optimizer, setting, seed)`. `fl.training.best_runs`
        takes the curves of the best.

    Raises
    ------
    ImportError
        If optuna is not installed.
    ValueError
        For unknown names, an empty grid, or a store of another search; for an executor
        without a store, unless ``prune=False``.
    ExecutorError
        If the executor loses trials.
    KeyboardInterrupt
        After Ctrl-C, with everything saved.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> def sgd(problem, lr):
    ...     return torch.optim.SGD(problem.model.parameters(), lr=lr)
    >>> ds = fl.tune("digits", {"sgd": sgd}, {"lr": [1e-4, 0.1]}, steps=10)
    >>> float(fl.training.best_runs(ds).lr[0])
    0.1
    """
    require_one_process("tune")
    makers = _makers(optimizer)
    if objective not in ("train_loss", "test_loss"):
        raise ValueError(f"tune: objective={objective!r}; train_loss or test_loss.")
    if is_number(seeds):
        raise ValueError(f"tune: seeds={seeds!r}; a list of seeds is expected.")
    if not seeds or (trials is not None and trials < 1):
        raise ValueError("tune: at least one seed and one trial are expected.")
    if executor is not None and prune and store is None:
        raise ValueError(
            "tune: with executor=, trials are given up by a study that its workers share: "
            "name a store=, or let all trials end by prune=False."
        )
    chosen = {name: _settings(grid, name, trials, seed) for name in makers}
    folder = None if store is None else Path(store).expanduser()
    options = {
        "steps": steps,
        "every": every,
        "batch_size": batch_size,
        "probes": [Losses(examples)],
    }
    search = _Search(_problems(problem), makers, options, objective, folder, progress)
    order = [
        Trial(name, setting, one)
        for name, settings in chosen.items()
        for setting in settings
        for one in seeds
    ]
    with ExitStack() as stack:
        optuna = stack.enter_context(quiet_optuna())
        if folder is not None:
            stack.enter_context(Store(folder).opened())
            _record(search, Store(folder), seeds[0], prune)
        found = _searched(optuna, search, order, prune, executor)
        tuned = laid_out(found, chosen, list(seeds), objective)
        if folder is not None:
            save(tuned, folder / "results.nc")
    return tuned


def best_runs(tuned: xr.Dataset) -> xr.Dataset:
    """Return the losses of every optimiser's best setting, over (optimizer, seed, step).

    Optimisers of which no setting was finished are left out.

    Examples
    --------
    >>> dims = ("optimizer", "setting", "seed", "step")
    >>> loss = xr.DataArray([[[[2.0]], [[1.0]]]], dims=dims)
    >>> best = xr.DataArray([1], dims="optimizer")
    >>> best_runs(xr.Dataset({"train_loss": loss, "best": best})).train_loss.values
    array([[[1.]]])
    """
    known = tuned.isel(optimizer=np.flatnonzero(tuned["best"].values >= 0))
    return known.isel(setting=known["best"]).drop_vars("best")


def _makers(optimizer: str | Sequence[str] | Mapping[str, Make]) -> dict[str, Make]:
    if not optimizer:
        raise ValueError("tune: no optimizer was given; names of fl.optimizers() are.")
    if isinstance(optimizer, Mapping):
        return dict(optimizer)
    names = [optimizer] if isinstance(optimizer, str) else list(optimizer)
    return {name: partial(by_name, name) for name in names}


def _problems(problem: Problems) -> Callable[[int], Problem]:
    if isinstance(problem, str):
        return partial(_loaded, problem)
    if not callable(problem):
        Problem.require(problem, "tune")
    return partial(_copied, problem) if isinstance(problem, Problem) else problem


def _loaded(name: str, seed: int) -> Problem:
    return load(name, seed=seed)


def _copied(fixed: Problem, seed: int) -> Problem:
    return replace(fixed, model=copy.deepcopy(fixed.model))


def _settings(
    grid: str | Grid | Mapping[str, Grid], name: str, trials: int | None, seed: int
) -> list[Setting]:
    if isinstance(grid, str):
        mine: Any = preset(grid, name)
    elif all(isinstance(values, Mapping) for values in grid.values()):
        if name not in grid:
            raise ValueError(f"tune: there is no grid for {name!r}; for {list(grid)}.")
        mine = grid[name]
    else:
        mine = grid
    every = settings_of(mine)
    if trials is None or trials >= len(every):
        return every
    drawn = random.Random(seed).sample(range(len(every)), trials)
    return [every[k] for k in sorted(drawn)]


def _record(search: _Search, store: Store, seed: int, prune: bool) -> None:
    """Write down what the trials have in common, or refuse a store of other ones.

    Raises
    ------
    ValueError
        If the store is of another search; what differs is named.
    """
    problem, options = search.problem(seed), search.options
    common = {
        **described_problem(problem),
        "batch_size": described(options["batch_size"]),
        "every": described(options["every"]),
        "losses": described(options["probes"]),
        "objective": search.objective,
        "prune": prune,
    }
    record = store.record()
    if record is None:
        store.write_record({"settings": common, "sessions": [session(0)]})
        return
    unlike = differences(record["settings"], common)
    if unlike:
        raise ValueError(
            f"tune: the store {store.folder} is of another search: {'; '.join(unlike)}. "
            "Name another folder, or give the same settings."
        )


def _searched(
    optuna: Any,
    search: _Search,
    order: Sequence[Trial],
    prune: bool,
    executor: Workers,
) -> Found:
    from tqdm.auto import tqdm

    found: Found = {}
    left: dict[str, Callable[[], tuple[str, xr.Dataset]]] = {}
    for name in search.makers:
        study = open_study(optuna, name, search.folder, prune)
        done = finished(study, search.options["steps"])
        for trial in (t for t in order if t.optimizer == name):
            before = _before(search, trial, done.get(trial.key))
            if before is not None:
                found[trial.key] = before
            elif executor is None:
                left[trial.key] = partial(_tried, optuna, study, search, trial)
            else:
                left[trial.key] = partial(_tried_elsewhere, search, trial, prune)
    there, hidden = len(found), not (search.progress and left)
    if not left:
        say_complete(search.progress, "tune", f"{there} trials in {search.folder}")
    with tqdm(total=len(order), initial=there, unit="trial", disable=hidden) as bar:
        for key, outcome in filled("tune", left, executor):
            found[key] = outcome
            bar.set_postfix_str(key)
            bar.update()
    return found


def _tried_elsewhere(search: _Search, trial: Trial, prune: bool) -> tuple[str, xr.Dataset]:
    """Run one trial by the study in the folder, which other workers write, too."""
    with quiet_optuna() as optuna:
        study = shared_study(optuna, trial.optimizer, search.folder, prune)
        return _tried(optuna, study, search, trial)


def _tried(
    optuna: Any, study: Any, search: _Search, trial: Trial
) -> tuple[str, xr.Dataset]:
    """Run one trial and tell the study how it ended."""
    asked = study.ask()
    asked.set_user_attr("key", trial.key)
    asked.set_user_attr("steps", search.options["steps"])
    asked.set_user_attr("setting", trial.setting)
    latest = xr.Dataset()

    def watch(results: xr.Dataset) -> None:
        nonlocal latest
        latest = results
        asked.report(last_value(results, search.objective), results.sizes["step"] - 1)
        if asked.should_prune():
            raise optuna.TrialPruned

    state = optuna.trial.TrialState
    try:
        latest = _trained(search, trial, watch)
        value = last_value(latest, search.objective)
        status, ended = "ok", state.COMPLETE
    except optuna.TrialPruned:
        status, ended = f"given up after step {int(latest.step[-1])}", state.PRUNED
    except NumericalError as error:
        status, ended = f"failed: {error}", state.PRUNED
    asked.set_user_attr("status", status)
    study.tell(asked, value if ended == state.COMPLETE else None, state=ended)
    return status, latest


def _trained(
    search: _Search, trial: Trial, watch: Callable[[xr.Dataset], None]
) -> xr.Dataset:
    problem = search.problem(trial.seed)
    optimizer = search.makers[trial.optimizer](problem, **trial.setting)
    place = None if search.folder is None else search.folder / trial.key
    return follow(
        problem, optimizer, seed=trial.seed, store=place, callback=watch, **search.options
    )


def _before(
    search: _Search, trial: Trial, told: Mapping[str, Any] | None
) -> tuple[str, xr.Dataset] | None:
    """Return how a trial ended in an earlier session, None if it is to be run."""
    if told is None or search.folder is None:
        return None
    wanted = moments(search.options["every"], search.options["steps"])
    results = ended(search.folder / trial.key, told, wanted, search.objective)
    return None if results is None else (told["status"], results)
