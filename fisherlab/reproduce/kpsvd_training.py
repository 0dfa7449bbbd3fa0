r"""Koroko et al. 2022 (arXiv 2201.10285): the training loss of autoencoders over time.

SGD with momentum, Adam, KFAC, KPSVD, deflation and KFAC-corrected train the autoencoder
784-1000-500-250-30 and back on MNIST, in minibatches of 512, with T₁ = T₂ = 100, a quarter
of the batch for the statistics and one sampled label for each example. The paper trains
for 200 epochs on a GPU; here every optimiser has ten minutes in steps. Learning rate and
damping are the best of short runs over the paper's grid, thinned out.

A machine may be slower in one hour than in the next. So the time of a curve is its number
of steps times what a step takes when all optimisers take turns.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, final

import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab.plots.style import publication, styles
from fisherlab.problems.problem import Problem
from fisherlab.reproduce.experiment import Experiment, Setting
from fisherlab.training.following import follow
from fisherlab.training.loop import take_step
from fisherlab.training.probes import Losses
from fisherlab.training.register import optimizer
from fisherlab.training.schedules import LinearSteps, Order
from fisherlab.training.studies import Grid
from fisherlab.training.tuning import best_runs, tune

FIRST_ORDER: Final[Grid] = {"lr": (1e-4, 3e-4, 1e-3, 3e-3)}
SECOND_ORDER: Final[Grid] = {
    "lr": (3e-3, 1e-2, 3e-2, 1e-1),
    "damping": (1e-4, 1e-3, 1e-2, 1e-1),
}
GRIDS: Final[Mapping[str, Grid]] = {
    "sgd-momentum": FIRST_ORDER,
    "adam": FIRST_ORDER,
    "kfac-koroko": SECOND_ORDER,
    "kpsvd-koroko": SECOND_ORDER,
    "deflation-koroko": SECOND_ORDER,
    "kfac-corrected-koroko": SECOND_ORDER,
}
GRID_POINTS: Final = 200  # of the common time axis
TURNS: Final = 3  # of every optimiser when steps are timed
STYLES: Final = {"sgd-momentum": "diagonal", "adam": "mini-block"}


@final
@dataclass(frozen=True)
class Size:
    """How much is trained.

    Parameters
    ----------
    problem
        From a seed to a problem.
    batch
        Examples in a minibatch.
    tuning_steps
        Steps of every setting of the grid.
    seconds
        Time in steps of every optimiser.
    moments
        Steps between two looks at the losses, and of a turn when steps are timed: new
        statistics and inverses fall into every turn.
    folder
        Where all runs are stored, so that a stopped figure can be gone on with.
    """

    problem: Callable[[int], Problem]
    batch: int
    tuning_steps: int
    seconds: float
    moments: int
    folder: Path


def training(setting: Setting) -> xr.Dataset:
    """Return losses over the time in steps, for every optimiser at its best setting.

    Quick: a small network on digits, two seconds each. The full figure needs MNIST, takes
    an hour for the training and half of one for the search on two cores, and keeps its
    runs, from where a stopped figure goes on.

    Returns
    -------
    xarray.Dataset
        ``train_loss`` and ``test_loss`` (optimizer, seconds) on 5,000 examples of each
        set, interpolated between moments, NaN after the last; ``steps`` taken by then;
        ``step_seconds``, ``lr`` and ``damping`` (optimizer), the search's best.

    Raises
    ------
    DataError
        If MNIST is not at hand.
    """
    if setting.quick:
        with TemporaryDirectory() as scratch:
            small = Size(partial(_small, setting), 64, 4, 2.0, 10, Path(scratch))
            return _all(setting.seed, small)
    folder = setting.store("kpsvd-training") or Path("runs") / "kpsvd-training"
    size = Size(partial(_autoencoder, setting), 512, 300, 600.0, 100, folder)
    return _all(setting.seed, size)


def _autoencoder(setting: Setting, seed: int) -> Problem:
    return setting.seeded(seed).load("mnist-autoencoder-koroko", dtype=torch.float32)


def _small(setting: Setting, seed: int) -> Problem:
    return setting.seeded(seed).load("digits", dtype=torch.float32)


def _all(seed: int, size: Size) -> xr.Dataset:
    best = {name: searched(name, seed, size) for name in GRIDS}
    runs = {name: trained(name, best[name], seed, size) for name in GRIDS}
    found = compared(runs, best, step_seconds(best, seed, size), size)
    told = (
        f"{size.problem(seed).name}, batch {size.batch}, float32; {size.seconds:g} s of "
        f"steps each, (lr, λ) the best of {size.tuning_steps} steps over a thinned grid"
    )
    return found.assign_attrs(settings=told)


def searched(name: str, seed: int, size: Size) -> dict[str, float]:
    """Return the best setting of an optimiser after short runs over its grid."""
    tuned = tune(
        size.problem,
        name,
        {name: GRIDS[name]},
        steps=size.tuning_steps,
        seeds=(seed,),
        every=LinearSteps(5),
        batch_size=size.batch,
        store=size.folder / f"search-{name}",
        progress=True,
    )
    best = best_runs(tuned).isel(optimizer=0)
    return {setting: float(best[setting]) for setting in GRIDS[name]}


def trained(name: str, setting: Mapping[str, float], seed: int, size: Size) -> xr.Dataset:
    """Train with a setting for the time of a size, and return the run."""
    return follow(
        size.problem(seed),
        lambda problem: optimizer(name, problem, **setting),
        steps=10**6,
        seconds=size.seconds,
        probes=[Losses(5000)],
        every=size.moments,
        batch_size=size.batch,
        seed=seed,
        store=size.folder / name,
        progress=True,
    )


def step_seconds(
    settings: Mapping[str, Mapping[str, float]], seed: int, size: Size
) -> dict[str, float]:
    """Return the seconds of a step of every optimiser, the best of turns taken in turn."""
    turns = {
        name: _turn(size.problem(seed), name, setting, seed, size)
        for name, setting in settings.items()
    }
    best = dict.fromkeys(turns, float("inf"))
    for _ in range(TURNS):
        for name, turn in turns.items():
            best[name] = min(best[name], turn())
    return best


def _turn(
    problem: Problem, name: str, setting: Mapping[str, float], seed: int, size: Size
) -> Callable[[], float]:
    """Return what takes so many steps as there are between moments, and times them."""
    made = optimizer(name, problem, **setting)
    order, (x, y) = Order(len(problem.train[0]), size.batch, seed), problem.train
    numbers = itertools.count()

    def turn() -> float:
        started = time.perf_counter()
        for _ in range(size.moments):
            step = next(numbers)
            here = order.indices(step)
            take_step(problem, made, (x[here], y[here]), step)
        return (time.perf_counter() - started) / size.moments

    return turn


def compared(
    runs: Mapping[str, xr.Dataset],
    settings: Mapping[str, Mapping[str, float]],
    timed: Mapping[str, float],
    size: Size,
) -> xr.Dataset:
    """Lay runs on one axis of time: steps times the seconds of a step."""
    seconds = np.linspace(0.0, size.seconds, GRID_POINTS + 1)
    rows = [
        _over_time(run, timed[name], seconds).expand_dims(optimizer=[name])
        for name, run in runs.items()
    ]
    joined: xr.Dataset = xr.concat(rows, dim="optimizer")
    chosen = {
        key: ("optimizer", [settings[name].get(key, np.nan) for name in runs])
        for key in ("lr", "damping")
    }
    times = ("optimizer", [timed[name] for name in runs], {"units": "s"})
    notes = {"batch_size": size.batch, "seconds_each": size.seconds}
    return joined.assign(step_seconds=times).assign_coords(chosen).assign_attrs(notes)


def _over_time(run: xr.Dataset, each: float, seconds: np.ndarray) -> xr.Dataset:
    found: dict[str, xr.DataArray] = {}
    for name in ("train_loss", "test_loss", "step"):
        values = np.interp(seconds, run["step"] * each, run[name].values, right=np.nan)
        found["steps" if name == "step" else name] = xr.DataArray(
            values, {"seconds": seconds}, ["seconds"], attrs=run[name].attrs
        )
    return xr.Dataset(found)


def draw(result: xr.Dataset) -> Drawing:
    """Draw the losses over time, of both sets; of several seeds the mean."""
    if "seed" in result.dims:
        result = result[["train_loss", "test_loss"]].mean("seed")
    labels = [str(n).removesuffix("-koroko") for n in result["optimizer"].values]
    looks = styles(STYLES.get(label, label) for label in labels)
    with publication():
        figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.0), layout="constrained")
        for ax, name in zip(axes, ("train_loss", "test_loss"), strict=True):
            later = result[name].isel(seconds=slice(1, None))
            for k, label in enumerate(labels):
                look = looks[STYLES.get(label, label)]
                line = {"color": look.color, "linestyle": look.linestyle, "lw": 1.2}
                row = later.isel(optimizer=k)
                ax.plot(row["seconds"], row, label=label, **line)
            ax.set(yscale="log", xlabel="seconds of steps")
            ax.set_ylabel(f"{name.replace('_', ' ')} / nat")
        shown = axes[1].get_legend_handles_labels()
        figure.legend(*shown, title="optimiser", loc="outside right center")
    return figure


EXPERIMENTS: Final = (
    Experiment(
        "kpsvd-training",
        "KPSVD, section 4: training losses over time beside KFAC, SGD and Adam.",
        training,
        draw,
        ("mnist-autoencoder-koroko",),
        minutes=(0.8, 90.0),
    ),
)
