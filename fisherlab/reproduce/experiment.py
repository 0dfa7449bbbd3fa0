"""What is run for a figure, what a paper claims, and the verdict on what was measured.

A module of this folder that holds a tuple ``EXPERIMENTS`` of `Experiment` values
is found by `fisherlab.reproduce.catalogue`, as the ``ROWS`` of a paper are. A claim holds
published numbers by label, or bounds; an experiment's result gives numbers by the same
labels. The verdict follows from both and is written nowhere by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import isfinite, isnan
from pathlib import Path
from statistics import fmean
from typing import Any, Final, final

import xarray as xr
from matplotlib.figure import Figure as Drawing

from fisherlab import problems
from fisherlab.problems.problem import Problem
from fisherlab.showing import number

REPRODUCED: Final = "reproduced"
ORDERING: Final = "ordering only"
NOT: Final = "not"
UNMEASURED: Final = "not measured"
VERDICTS: Final = (REPRODUCED, ORDERING, NOT, UNMEASURED)  # in the order of counts
PUBLISHED: Final = "published"
PICTURE: Final = "bound for what a picture shows"
CONTROL: Final = "control of ours"


@final
@dataclass(frozen=True)
class Bound:
    """A published statement that a number lies on one side of another.

    Examples
    --------
    >>> str(Bound(at_most=0.5)), Bound(at_least=2.0).holds(3.0, 0.0)
    ('≤ 0.500', True)
    """

    at_most: float = float("inf")
    at_least: float = -float("inf")

    def holds(self, value: float, tolerance: float) -> bool:
        """Tell whether a number lies inside; a bound has no tolerance."""
        return self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        sides = []
        if isfinite(self.at_least):
            sides.append(f"≥ {number(self.at_least)}")
        if isfinite(self.at_most):
            sides.append(f"≤ {number(self.at_most)}")
        return " and ".join(sides)


@final
@dataclass(frozen=True)
class Claim:
    """One statement of a paper that can turn out false.

    Parameters
    ----------
    statement
        What is claimed, in words.
    published
        Numbers, or a `Bound`, by label: what the measured ones are held against.
    measure
        From the result of one seed to numbers by the same labels; NaN, or no label, where
        the run does not hold the number; infinity where what it should measure failed.
    how
        How it is measured, and where the published number was read.
    tolerance
        Relative, for published numbers.
    order
        Labels from the smallest to the largest as published. If the numbers miss their
        tolerance and this order holds, the verdict is "ordering only".
    basis
        `PUBLISHED`, or what the numbers are instead: `PICTURE`, `CONTROL`.
    reason
        Says from the result why the claim does not hold.

    Examples
    --------
    >>> half = Claim(
    ...     "Half.",
    ...     {"a": 0.5},
    ...     lambda ds: {"a": float(ds.a)},
    ...     tolerance=0.1,
    ...     reason=lambda ds: "It is more.",
    ... )
    >>> judged(half, [xr.Dataset({"a": 0.52}), xr.Dataset({"a": 0.54})]).verdict
    'reproduced'
    >>> judged(half, [xr.Dataset({"a": 0.6})]).verdict
    'not'
    """

    statement: str
    published: Mapping[str, float | Bound]
    measure: Callable[[xr.Dataset], Mapping[str, float]]
    how: str = ""
    tolerance: float = 0.2
    order: Sequence[str] = ()
    basis: str = PUBLISHED
    reason: Callable[[xr.Dataset], str] = field(kw_only=True)

    def holds(self, label: str, value: float) -> bool:
        """Tell whether a measured number is that which was published."""
        told = self.published[label]
        if isinstance(told, Bound):
            return told.holds(value, self.tolerance)
        return abs(value - told) <= self.tolerance * abs(told)

    @property
    def allowed(self) -> str:
        """The tolerance in words."""
        plain = any(not isinstance(told, Bound) for told in self.published.values())
        return f"± {100 * self.tolerance:.0f} %" if plain else "bound"


@final
@dataclass(frozen=True)
class Judged:
    """A claim with what was measured, seed by seed, and the verdict."""

    claim: Claim
    measured: Mapping[str, Sequence[float]]
    verdict: str
    reason: str = ""


def judged(claim: Claim, results: Sequence[xr.Dataset]) -> Judged:
    """Hold a claim against the results of one or several seeds; their mean decides."""
    found = [claim.measure(one) for one in results]
    measured = {
        label: [float(row.get(label, float("nan"))) for row in found]
        for label in claim.published
    }
    means = {label: fmean(values) for label, values in measured.items()}
    verdict = _verdict(claim, means)
    reason = ""
    if verdict != REPRODUCED:
        whose = "Of the first seed: " if len(results) > 1 else ""
        reason = f"{whose}{claim.reason(results[0])}"
    return Judged(claim, measured, verdict, reason)


def _verdict(claim: Claim, means: Mapping[str, float]) -> str:
    if any(isnan(value) for value in means.values()):
        return UNMEASURED
    if all(claim.holds(label, value) for label, value in means.items()):
        return REPRODUCED
    ranked = [means[label] for label in claim.order]
    if ranked and isfinite(ranked[-1]) and all(a < b for a, b in pairwise(ranked)):
        return ORDERING
    return NOT


@final
@dataclass(frozen=True)
class Row:
    """A figure, table, algorithm or theorem of a paper.

    Parameters
    ----------
    place
        Such as "Figure 3".
    shows
        What it shows, in a line.
    experiment
        The name of what computes it; None if there is no command.
    claims
        What is claimed there.
    missing
        Why there is no command, or what the command leaves out.
    paper
        First author and year: the name of the module that holds the row, by which the
        catalogue fills it in.

    Examples
    --------
    >>> Row("Figures 5, 6", "Inverses.", paper="martens2015").name
    'martens2015-figures-5-6'
    """

    place: str
    shows: str
    experiment: str | None = None
    claims: tuple[Claim, ...] = ()
    missing: str = ""
    paper: str = ""

    @property
    def name(self) -> str:
        """The row's id on the command line."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.place.lower()).strip("-")
        return f"{self.paper}-{slug}"


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
        Take a size that runs in minutes instead of the paper's.
    device
        Where networks are trained.
    data_dir
        The folder of the data files, as for `fl.problems.load`.
    runs
        Where trainings are stored, so that a stopped one goes on; None stores nothing.
    problem
        One of `Experiment.problems` in place of what the experiment takes otherwise.
    steps
        Of every training, in place of the quick number or the paper's, where
        `Experiment.trains`.

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
    problem: str | None = None
    steps: int | None = None

    def load(self, name: str, **options: Any) -> Problem:
        """Load a problem with the weights of this seed, on the device."""
        found = problems.load(name, data_dir=self.data_dir, seed=self.seed, **options)
        return found.to(self.device)

    @property
    def place(self) -> str:
        """What settings in words say of the device, if it is not the CPU."""
        return "" if self.device == "cpu" else f"; on {self.device}"

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
        Expected minutes of a seed on one core: quick, and the paper's size.
    problems
        Those that it can take instead, each of them alone.
    trains
        Whether `Setting.steps` says for how long.

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
    problems: tuple[str, ...] = ()
    trains: bool = False
