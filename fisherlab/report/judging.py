"""What a report asks of the purposes: made from a moment of training, within a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import xarray as xr
from torch import nn

import fisherlab as fl
from fisherlab.likelihoods import Likelihood
from fisherlab.operators.base import RelativeDamping, parsed
from fisherlab.purposes import Demand, Purpose
from fisherlab.purposes.step import GRID
from fisherlab.statistics import Statistics

HELD_OUT: Final = 500
"""Outputs of held-out examples whose variances are compared, at most."""
QUERIES: Final = 20
"""Held-out examples whose influences are compared, at most."""


TRIED: Final = 1 + len(GRID)
DEMANDS: Final = {
    "step": Demand(dampings=TRIED, products=0, forms=TRIED),
    "laplace": Demand(influences=True, divergences=True),
}
"""What purposes ask of every matrix whatever the moment, as it decides on examples."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A moment of training, and what its Fisher may be used for.

    Attributes
    ----------
    stats, gradient
        Of the training examples that make up the Fisher.
    model, likelihood
        The network as it is at that moment.
    train, held_out
        (x, y) the Fisher is taken over, and of other examples, None without.
    damping
        Of steps, influences and pruning.
    prior, size
        Prior precision, and the number of examples in the posterior.
    predicted
        Held-out examples whose predictive variances are compared, at most.
    """

    stats: Statistics
    gradient: Mapping[str, Any]
    model: nn.Module
    likelihood: Likelihood
    train: tuple[Any, Any]
    held_out: tuple[Any, Any] | None
    damping: Any
    prior: float
    size: int
    predicted: int = HELD_OUT

    @property
    def level(self) -> float:
        """λ for all blocks: a relative damping is α times the network's mean eigenvalue."""
        if not isinstance(self.damping, RelativeDamping):
            return parsed(self.damping, None).value
        blocks = [fl.ExactBlock()(layer) for layer in self.stats.values()]
        mean = sum(b.trace() for b in blocks) / sum(b.shape[0] for b in blocks)
        return self.damping.single() * mean


def purposes(names: tuple[str, ...], asked: Asked) -> list[Purpose]:
    """Return the purposes of some names, for one moment."""
    return [NAMED[name](asked) for name in names]


def _held_out(asked: Asked) -> fl.HeldOut | None:
    """Return a few held-out examples of a classifier, whose predictive has a form."""
    if asked.held_out is None or not isinstance(asked.likelihood, fl.Categorical):
        return None
    x, y = asked.held_out
    known = y != asked.likelihood.ignore_index
    x, y = (x, y) if known.all() else (x[known], y[known])
    with torch.no_grad():
        outputs = asked.model(x[:1])
    if outputs.ndim != 2 or y.ndim != 1 or outputs.shape[1] > HELD_OUT:
        return None
    count = min(HELD_OUT // outputs.shape[1], asked.predicted)
    if not count:
        return None
    return fl.HeldOut.of(asked.model, (x[:count], y[:count]), list(asked.stats))


def _influence(asked: Asked) -> Purpose:
    """Take held-out examples as queries; training examples where there are none."""
    x, y = asked.held_out or asked.train
    queries, examples = (
        fl.collect(asked.model, data, asked.likelihood, fl.Empirical())
        for data in ((x[:QUERIES], y[:QUERIES]), asked.train)
    )
    return fl.Influence(asked.level, queries, examples)


def _pruning(asked: Asked) -> Purpose:
    if asked.train[1] is None:  # no loss to measure
        return fl.Pruning(dict(asked.model.named_parameters()), asked.level)
    return fl.Pruning.of(asked.model, asked.train, asked.likelihood, asked.level)


NAMED: Final[Mapping[str, Callable[[Asked], Purpose]]] = {
    "step": lambda asked: fl.Step(asked.gradient, asked.damping),
    "laplace": lambda asked: fl.Laplace(asked.prior, asked.size, _held_out(asked)),
    "influence": _influence,
    "pruning": _pruning,
    "sharpness": lambda _: fl.Sharpness(),
    "matrix": lambda _: fl.Matrix(),
}
"""The purposes that the command line knows, each made from a moment."""


def judged(
    names: tuple[str, ...],
    asked: Asked,
    approximators: Any,
    budget: int | str | None = None,
    seconds: float | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Return the table of some purposes at one moment.

    Examples
    --------
    >>> model = torch.nn.Linear(3, 2).double()
    >>> data = torch.rand(20, 3).double(), torch.arange(20) % 2
    >>> stats = fl.collect(model, data, fl.Categorical())
    >>> gradient = fl.mean_gradient(model, data, fl.Categorical())
    >>> asked = Asked(
    ...     stats, gradient, model, fl.Categorical(), data, data, 0.1, 1.0, 20
    ... )
    >>> judged(("step", "influence"), asked, ["kfac"])["purpose"].values.tolist()
    ['step', 'influence']
    """
    return fl.compare(
        asked.stats,
        approximators,
        purpose=purposes(names, asked),
        budget=budget,
        time=seconds,
        progress=progress,
    )
