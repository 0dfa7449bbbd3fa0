"""How well the network does at an iterate, and how good the approximations are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, final

import xarray as xr
from torch import nn

from fisherlab.analysis import compare
from fisherlab.analysis.damping import Damping
from fisherlab.approximators.register import Chosen
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.memory import Budget
from fisherlab.problems.problem import Pair
from fisherlab.statistics import Exact, Fisher, MonteCarlo, collect, mean_gradient
from fisherlab.training.loop import performance
from fisherlab.training.probes.moment import Moment, Source

SETS: Final[tuple[Source, ...]] = ("train", "test")


@final
@dataclass(frozen=True)
class Losses:
    """Mean losses in nats, and accuracies of a classifier, on both sets.

    Gives `train_loss`, `test_loss` and, for `Categorical`, `train_accuracy` and
    `test_accuracy`.

    Parameters
    ----------
    examples
        At most so many random examples of each set; all by default.

    Examples
    --------
    >>> import fisherlab as fl
    >>> problem = fl.problems.load("digits")
    >>> fl.follow(problem, steps=1, probes=[fl.probes.Losses(100)]).train_loss.sizes
    Frozen({'step': 2})
    """

    examples: int | None = None

    def __call__(self, moment: Moment) -> xr.Dataset:
        """Evaluate the network."""
        sets = {str(name): moment.data(name, self.examples) for name in SETS}
        return xr.Dataset(measured(moment.model, moment.problem.likelihood, sets))


def measured(
    model: nn.Module, likelihood: Likelihood, sets: Mapping[str, Pair]
) -> dict[str, xr.DataArray]:
    """Return losses and accuracies on the sets by their names; on an empty one, none."""
    found = {}
    for name, data in sets.items():
        if not len(data[0]):
            continue  # one's own data may come without a test set
        done = performance(model, likelihood, data)
        made = {"long_name": f"mean {name} loss", "units": "nat"}
        found[f"{name}_loss"] = xr.DataArray(done.loss, attrs=made)
        if done.accuracy is not None:
            made = {"long_name": f"{name} accuracy", "units": "1"}
            found[f"{name}_accuracy"] = xr.DataArray(done.accuracy, attrs=made)
    return found


Approximators = Chosen


def at_step(fisher: Fisher, step: int) -> Fisher:
    """Return the same Fisher with labels drawn anew at this step, if it draws any.

    Examples
    --------
    >>> at_step(MonteCarlo(2), 7)
    MonteCarlo(samples=2, seed=0, step=7)
    """
    return replace(fisher, step=step) if isinstance(fisher, MonteCarlo) else fisher


@final
@dataclass(frozen=True)
class Errors:
    """What `fl.compare` says of the statistics at an iterate.

    Parameters
    ----------
    approximators
        Names, or a mapping of names to values; all named ones by default.
    fisher
        Which Fisher; `Exact()` by default. Sampled labels are drawn anew at each moment.
    metrics
        Names as in `fl.compare`; all that the arguments allow by default.
    damping
        λ, several, or `RelativeDamping`, for the metrics that need one; with it the
        gradient of the loss over the same examples is taken too.
    on, examples
        The first `examples` of "train" or "test", or the "batch" of the next step.
    layers
        Block names or prefixes; all by default.
    budget
        Bytes that dense forms may take.

    Examples
    --------
    >>> import fisherlab as fl
    >>> problem = fl.problems.load("digits")
    >>> probe = fl.probes.Errors(["kfac", "kpsvd"], examples=50, layers=["fc6"])
    >>> ds = fl.follow(problem, steps=1, probes=[probe])
    >>> dict(ds.frobenius_error.sizes)
    {'step': 2, 'layer': 1, 'approximator': 2}
    """

    approximators: Approximators = None
    fisher: Fisher = field(default_factory=Exact)
    metrics: Sequence[str] | None = None
    damping: Damping = None
    on: Source = "train"
    examples: int | None = 2000
    layers: Sequence[str] | None = None
    budget: Budget = None

    def __call__(self, moment: Moment) -> xr.Dataset:
        """Collect and compare."""
        data = moment.data(self.on, self.examples)
        model, likelihood = moment.model, moment.problem.likelihood
        fisher = at_step(self.fisher, moment.step)
        stats = collect(model, data, likelihood, fisher, layers=self.layers)
        gradient = None
        if self.damping is not None:
            gradient = mean_gradient(model, data, likelihood, layers=self.layers)
        return compare(
            stats,
            self.approximators,
            metrics=self.metrics,
            damping=self.damping,
            gradient=gradient,
            budget=self.budget,
        )
