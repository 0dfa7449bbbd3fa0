"""What a report is asked to do; light, so that the command line need not load torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from fisherlab.settings import numeric

DEFAULT_APPROXIMATORS: Final = (
    "exact",
    "kfac",
    "kpsvd",
    "kpsvd-2",
    "kfac-corrected",
    "mini-block",
    "diagonal",
)

LIKELIHOODS: Final = ("categorical", "bernoulli", "gaussian")
PURPOSES: Final = ("step", "laplace", "influence", "pruning", "sharpness", "matrix")
DEFAULT_PURPOSES: Final = ("step", "laplace")


@numeric
@dataclass(frozen=True)
class ReportConfig:
    """Say what to train, what to analyse and where to write the report.

    Attributes
    ----------
    problem
        Name of the problem, or `module:function` or `file.py:function` that returns one.
    model
        One's own model instead of a problem: `module:function` or `file.py:function`
        without arguments that returns a `torch.nn.Module` or a `Problem`; "" for none.
    data
        The data of the model: an `.npz` or `.pt` file with x and y (and, for the test
        losses, x_test and y_test), or `module:function` that returns (x, y).
    likelihood
        What the output of the model means: categorical, bernoulli or gaussian, or
        `module:function` or `file.py:function` that returns a `fl.Likelihood`.
    steps
        Number of training steps; None means 1000 for a problem and 0, the model as it
        is, for one's own.
    checkpoints
        Steps after which to analyse; empty means four, evenly spaced in logarithm.
    approximators
        Names of the approximations, in the order of the report.
    fisher
        Which Fisher: over the model's own distribution exactly, sampled from it, or
        with the labels of the data. "auto" is exact where enough examples fit the time
        and the budget, and else sampled.
    samples
        Labels drawn per example (`monte-carlo` only).
    purpose
        What the matrices are judged for at the last step: step, laplace, influence,
        pruning, sharpness, matrix. Errors of the matrix are part of every report.
    prior
        Prior precision of the Laplace posterior.
    damping, alpha, factored
        Dampings: λ beside the matrix, α relative to the mean eigenvalue tr F / p of each
        block, λ on the factors of Kronecker products; α = 2 if none is given. The first
        of `dampings` also damps the inverses that are drawn.
    examples
        At most so many training examples make up the Fisher, drawn at random by the
        seed; fewer where the time or the budget would not hold.
    batch_size, lr
        Minibatch size and learning rate of the training (SGD, momentum 0.9); by default
        64 examples, fewer where one step would take more than ten seconds, and 0.05
        divided by the labels of an example, over which its loss sums.
    layers
        Blocks whose inverse is drawn; empty means those with at most 2,000 parameters.
    seed
        Decides initial weights, order of the examples and sampled labels.
    device
        `cpu`, or what torch finds, such as `cuda`, `cuda:1`, `mps` or `xpu`.
    budget
        Memory of the analysis, e.g. "4 GiB": half for statistics, half for what is
        formed of them. What would exceed it is left out and named.
    time
        Time of the analysis, e.g. "3 min", counted in multiply-adds at the rate of two
        plain cores, so that a report is the same on every machine. The dearest cells
        that exceed it are left out and named.
    data_dir
        Where data files are, see `fisherlab.problems.load`.
    out
        Folder of the report; None means a new one, `reports/<problem>-<time>`.
    overwrite
        Replace an earlier report in `out`.
    quiet
        Show no progress and no table.

    Raises
    ------
    ValueError
        If a number lies outside of its range.

    Examples
    --------
    >>> ReportConfig(problem="digits", steps=20).analysed_steps
    (0, 3, 7, 20)
    >>> ReportConfig(examples=0)
    Traceback (most recent call last):
    ValueError: --examples must be at least 1, but is 0.
    """

    problem: str = "digits"
    model: str = ""
    data: str = ""
    likelihood: str = "categorical"
    steps: int | None = None
    checkpoints: tuple[int, ...] = ()
    approximators: tuple[str, ...] = DEFAULT_APPROXIMATORS
    fisher: Literal["auto", "exact", "monte-carlo", "empirical"] = "auto"
    samples: int = 1
    purpose: tuple[str, ...] = DEFAULT_PURPOSES
    prior: float = 1.0
    damping: tuple[float, ...] = ()
    alpha: tuple[float, ...] = ()
    factored: tuple[float, ...] = ()
    examples: int = 2000
    batch_size: int | None = None
    lr: float | None = None
    layers: tuple[str, ...] = ()
    seed: int = 0
    device: str = "cpu"
    budget: str = "4 GiB"
    time: str = "1 min"
    data_dir: Path | None = None
    out: Path | None = None
    overwrite: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "examples", "batch_size"):
            count = getattr(self, name)
            _require(count is None or count >= 1, name, "at least 1", count)
        least = 0 if self.model else 1
        _require(self.training_steps >= least, "steps", f"at least {least}", self.steps)
        if self.data and not self.model:
            raise ValueError("--data belongs to --model; a problem brings its own data.")
        if self.lr is not None:
            _require(0 < self.lr < math.inf, "lr", "positive", self.lr)
        _require(self.seed >= 0, "seed", "at least 0", self.seed)
        for name in ("damping", "alpha", "factored"):
            for size in getattr(self, name):
                _require(0 < size < math.inf, name, "positive", size)
        for step in self.checkpoints:
            limits = f"between 0 and --steps ({self.training_steps})"
            _require(0 <= step <= self.training_steps, "checkpoints", limits, step)
        _require(0 < self.prior < math.inf, "prior", "positive", self.prior)
        told = f"{', '.join(LIKELIHOODS)} or file.py:function"
        named = ":" in self.likelihood or self.likelihood in LIKELIHOODS
        _require(named, "likelihood", told, self.likelihood)
        for name in self.purpose:
            _require(name in PURPOSES, "purpose", f"among {', '.join(PURPOSES)}", name)
        given = bool(self.approximators)
        _require(given, "approximators", "given at least once", "empty")

    @property
    def training_steps(self) -> int:
        """Return the number of training steps, whether it was given or not."""
        if self.steps is not None:
            return self.steps
        return 0 if self.model else 1000

    @property
    def dampings(self) -> list[Any]:
        """Return the dampings: λ, then α, then factored ones.

        Examples
        --------
        >>> ReportConfig().dampings
        [RelativeDamping(alphas=(2.0,))]
        >>> ReportConfig(damping=(0.1,), factored=(0.2,)).dampings
        [0.1, Factored(value=0.2, pi=None, mode='clip', floor=0.1)]
        """
        from fisherlab.operators.base import Factored, RelativeDamping

        alphas = self.alpha or (() if self.damping or self.factored else (2.0,))
        relative = map(RelativeDamping, alphas)
        return [*self.damping, *relative, *map(Factored, self.factored)]

    @property
    def fishers(self) -> tuple[Any, ...]:
        """Return the Fisher that is asked for; for "auto" a sampled one if need be.

        Examples
        --------
        >>> ReportConfig().fishers
        (Exact(), MonteCarlo(samples=1, seed=0, step=0))
        """
        from fisherlab.statistics import Empirical, Exact, MonteCarlo

        exact, sampled = Exact(), MonteCarlo(self.samples, seed=self.seed)
        kinds = {"exact": (exact,), "monte-carlo": (sampled,), "empirical": (Empirical(),)}
        return (exact, sampled) if self.fisher == "auto" else kinds[self.fisher]

    @property
    def subject(self) -> str:
        """Return a name for what is analysed, fit for a folder."""
        return (self.model or self.problem).rpartition(":")[2]

    @property
    def analysed_steps(self) -> tuple[int, ...]:
        """Return the steps after which the network is analysed, in order."""
        return tuple(sorted(set(self.checkpoints))) or logarithmic(self.training_steps)


def logarithmic(steps: int, count: int = 4) -> tuple[int, ...]:
    """Return step 0 and `count − 1` steps up to `steps`, evenly spaced in logarithm.

    Step k is `steps^(k / (count − 1))`, rounded; equal steps are given once.

    Examples
    --------
    >>> logarithmic(1000)
    (0, 10, 100, 1000)
    """
    later = (round(steps ** (k / (count - 1))) for k in range(1, count))
    return tuple(sorted({0, *later}))


def _require(holds: bool, name: str, expected: str, given: object) -> None:
    if not holds:
        option = name.replace("_", "-")
        raise ValueError(f"--{option} must be {expected}, but is {given}.")
