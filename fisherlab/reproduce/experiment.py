"""What is run for a figure: data from a setting, and a drawing of the data.

A module of this folder that holds a dict ``EXPERIMENTS`` of names to `Experiment` values
is found by `fisherlab.reproduce.catalogue`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab import problems
from fisherlab.problems.problem import Problem

Result = xr.Dataset | xr.DataTree


@final
@dataclass(frozen=True)
class Setting:
    """What one run of an experiment depends on.

    Parameters
    ----------
    seed
        Decides everything random.
    quick
        Take a size that runs in minutes on two cores instead of the paper's.
    device
        Where networks are trained.
    data_dir
        The folder of the data files, as for `fl.problems.load`.
    runs
        Where trainings are stored, so that a stopped one goes on; None stores nothing.

    Examples
    --------
    >>> Setting(quick=True).load("digits")
    Problem('digits', Categorical, train=1438, test=359, float64, cpu)
    """

    seed: int = 0
    quick: bool = False
    device: str = "cpu"
    data_dir: Path | None = None
    runs: Path | None = None

    def load(self, name: str, **options: Any) -> Problem:
        """Load a problem with the weights of this seed, on the device."""
        found = problems.load(name, data_dir=self.data_dir, seed=self.seed, **options)
        return found.to(self.device)

    def store(self, *names: str) -> Path | None:
        """Return the folder of a training, if any is to be kept."""
        if self.runs is None:
            return None
        return self.runs.joinpath(*names, f"seed-{self.seed}")

    def seeded(self, seed: int) -> Setting:
        """Return the same setting with another seed."""
        return replace(self, seed=seed)


@final
@dataclass(frozen=True)
class Experiment:
    """One computation behind figures or tables of a paper.

    Parameters
    ----------
    name
        Short and lower case; also the stem of the files it is saved under.
    summary
        One line: the paper, the figure's number, what it shows.
    compute
        From a `Setting` to labelled data; ``attrs["settings"]`` says in words what was
        trained on which data. The same setting gives the same data.
    draw
        Draws what `compute` returned, also where a dimension `seed` was added; shows and
        saves nothing.
    data
        The problems it loads.
    minutes
        Expected minutes of a seed on two cores: quick, and the paper's size.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> dot = Experiment("dot", "A dot.", lambda _: xr.Dataset(), lambda _: plt.figure())
    >>> dot.compute(Setting()).sizes
    Frozen({})
    """

    name: str
    summary: str
    compute: Callable[[Setting], Result]
    draw: Callable[[Any], Drawing]
    data: tuple[str, ...] = ("digits",)
    minutes: tuple[float, float] = (1.0, 1.0)
