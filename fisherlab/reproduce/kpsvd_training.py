r"""Koroko et al. 2022 (arXiv 2201.10285): the training loss of autoencoders over time.

SGD with momentum, Adam, KFAC, KPSVD, deflation and KFAC-corrected train the autoencoder
784-1000-500-250-30 and back on MNIST, in minibatches of 512, with T₁ = T₂ = 100, a quarter
of the batch for the statistics and one sampled label for each example. The paper trains
for 200 epochs on a GPU; here every optimiser has ten minutes in steps. Learning rate and
damping are the best of short runs over the paper's grid, thinned out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, final

import matplotlib.pyplot as plt
import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab.plots.style import publication, styles
from fisherlab.problems import load
from fisherlab.problems.problem import Problem
from fisherlab.reproduce.figure import Figure, Result
from fisherlab.training.following import follow
from fisherlab.training.grids import Grid
from fisherlab.training.probes import Losses
from fisherlab.training.register import optimizer
from fisherlab.training.schedules import LinearSteps
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
        Steps between two looks at the losses.
    folder
        Where all runs are stored, so that a stopped figure can be gone on with.
    """

    problem: Callable[[int], Problem]
    batch: int
    tuning_steps: int
    seconds: float
    moments: int
    folder: Path


def training(seed: int, quick: bool) -> xr.Dataset:
    """Return losses over the time in steps, for every optimiser at its best setting.

    Parameters
    ----------
    seed
        Of weights, batches and sampled labels.
    quick
        A small network on digits, seconds in all. The full figure needs MNIST, takes an
        hour for the training and half of one for the search on two cores, and keeps its
        runs in ``runs/kpsvd-training-<seed>``, from where a stopped figure goes on.

    Returns
    -------
    xarray.Dataset
        ``train_loss`` and ``test_loss`` (optimizer, seconds) on 5,000 examples of each
        set, interpolated between moments; ``steps`` taken by then, ``lr`` and ``damping``
        of the recipes (optimizer), the search's best.

    Raises
    ------
    DataError
        If MNIST is not at hand.
    """
    if quick:
        with TemporaryDirectory() as scratch:
            return _all(seed, Size(_small, 64, 4, 0.2, 5, Path(scratch)))
    folder = Path("runs") / f"kpsvd-training-{seed}"
    return _all(seed, Size(_autoencoder, 512, 300, 600.0, 100, folder))


def _autoencoder(seed: int) -> Problem:
    return load("mnist-autoencoder-koroko", seed=seed, dtype=torch.float32)


def _small(seed: int) -> Problem:
    return load("digits", seed=seed, dtype=torch.float32)


def _all(seed: int, size: Size) -> xr.Dataset:
    best = {name: searched(name, seed, size) for name in GRIDS}
    runs = [trained(name, best[name], seed, size) for name in GRIDS]
    return compared(list(GRIDS), runs, [best[name] for name in GRIDS], size)


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


def compared(
    names: Sequence[str],
    runs: Sequence[xr.Dataset],
    settings: Sequence[Mapping[str, float]],
    size: Size,
) -> xr.Dataset:
    """Lay runs on one axis of time."""
    seconds = np.linspace(0.0, size.seconds, GRID_POINTS + 1)
    rows = [_over_time(run, seconds) for run in runs]
    labelled = [row.expand_dims(optimizer=[n]) for n, row in zip(names, rows, strict=True)]
    joined: xr.Dataset = xr.concat(labelled, dim="optimizer")
    chosen = {
        key: ("optimizer", [one.get(key, np.nan) for one in settings])
        for key in ("lr", "damping")
    }
    notes = {"batch_size": size.batch, "seconds_each": size.seconds}
    return joined.assign_coords(chosen).assign_attrs(notes)


def _over_time(run: xr.Dataset, seconds: np.ndarray) -> xr.Dataset:
    found: dict[str, xr.DataArray] = {}
    for name in ("train_loss", "test_loss", "step"):
        values = np.interp(seconds, run["seconds"].values, run[name].values)
        found["steps" if name == "step" else name] = xr.DataArray(
            values, {"seconds": seconds}, ["seconds"], attrs=run[name].attrs
        )
    return xr.Dataset(found)


def draw(result: Result) -> Drawing:
    """Draw the losses over time, of both sets, the first seconds left out."""
    assert isinstance(result, xr.Dataset)
    labels = [str(n).removesuffix("-koroko") for n in result["optimizer"].values]
    looks = styles(STYLES.get(label, label) for label in labels)
    with publication():
        figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
        for ax, name in zip(axes, ("train_loss", "test_loss"), strict=True):
            later = result[name].isel(seconds=slice(1, None))
            for k, label in enumerate(labels):
                look = looks[STYLES.get(label, label)]
                line = {"color": look.color, "linestyle": look.linestyle, "lw": 1.2}
                row = later.isel(optimizer=k)
                ax.plot(row["seconds"], row, label=label, **line)
            ax.set_yscale("log")
            ax.set_xlabel("seconds in steps")
            ax.set_ylabel(f"{name.replace('_', ' ')} / nat")
        axes[1].legend(title="optimiser")
    return figure


FIGURES: Final = {
    "kpsvd-training": Figure(
        "kpsvd-training",
        "KPSVD, section 4: training losses over time beside KFAC, SGD and Adam.",
        training,
        draw,
    )
}
