"""What a probe is; the loss at an iterate, and how good approximations are, old and new."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Protocol, final, runtime_checkable

import numpy as np
import torch
import xarray as xr
from torch import nn

from fisherlab import metrics
from fisherlab.analysis import compare
from fisherlab.analysis.cells import tried
from fisherlab.analysis.damping import Damping
from fisherlab.approximators import ExactBlock
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.memory import Budget
from fisherlab.problems.problem import Pair, Problem, drawn
from fisherlab.settings import numeric
from fisherlab.statistics import (
    Exact,
    Fisher,
    MonteCarlo,
    Statistics,
    collect,
    mean_gradient,
)
from fisherlab.training.loop import CHUNK, performance

Source = Literal["train", "test", "batch"]


@dataclass(frozen=True, eq=False)
class Moment:
    """One iterate of a training, looked at before the next step is taken.

    Attributes
    ----------
    problem
        Its model is the live one, in evaluation mode: look, do not touch.
    optimizer
        What trains it.
    step
        Steps taken so far.
    batch
        The minibatch that the next step will be taken with.
    seed
        The seed of the training.
    """

    problem: Problem
    optimizer: torch.optim.Optimizer
    step: int
    batch: Pair
    seed: int

    @property
    def model(self) -> nn.Module:
        """The network at this iterate."""
        return self.problem.model

    def data(self, source: Source, examples: int | None = None) -> Pair:
        """Return random examples of the training set, the test set or the batch.

        The same at every moment of a training, and for every method.

        Examples
        --------
        >>> import fisherlab as fl
        >>> p = fl.problems.load("digits")
        >>> sgd = torch.optim.SGD(p.model.parameters())
        >>> x, y = Moment(p, sgd, 0, p.train, seed=0).data("test", 10)
        >>> x.shape
        torch.Size([10, 256])
        """
        found: dict[str, Pair] = {
            "train": self.problem.train,
            "test": self.problem.test,
            "batch": self.batch,
        }
        return drawn(found[source], examples, self.seed)

    def statistics(
        self,
        fisher: Fisher,
        on: Source,
        examples: int | None = None,
        layers: Sequence[str] | None = None,
        compress: bool = True,
    ) -> Statistics:
        """Collect at this iterate, with labels drawn anew if the Fisher draws any."""
        return collect(
            self.model,
            self.data(on, examples),
            self.problem.likelihood,
            at_step(fisher, self.step),
            layers=layers,
            compress=compress,
        )


def at_step(fisher: Fisher, step: int) -> Fisher:
    """Return the same Fisher with labels drawn anew at this step, if it draws any.

    Examples
    --------
    >>> at_step(MonteCarlo(2), 7)
    MonteCarlo(samples=2, seed=0, step=7)
    """
    return replace(fisher, step=step) if isinstance(fisher, MonteCarlo) else fisher


@runtime_checkable
class Probe(Protocol):
    """A measurement of one moment: anything called with it that returns a Dataset.

    The Dataset gets a `step` coordinate and is joined with those of the other probes, so
    two probes may not give one variable.
    """

    def __call__(self, moment: Moment) -> xr.Dataset:
        """Measure."""


@runtime_checkable
class Tracker(Protocol):
    """A measurement with a memory, which sees every step and is read at chosen ones.

    The memory is a value: numbers, strings, tensors, operators, and dicts, lists and
    tuples of them, so that it can be saved and a training can go on from it.
    """

    def observe(self, memory: Any | None, moment: Moment) -> Any:
        """Return the memory after one more moment (None before the first)."""

    def measure(self, memory: Any, moment: Moment) -> xr.Dataset:
        """Measure; the memory has seen this moment."""


SETS: Final[tuple[Source, ...]] = ("train", "test")


@numeric
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
    model: nn.Module, likelihood: Likelihood, sets: Mapping[str, Pair], at_once: int = CHUNK
) -> dict[str, xr.DataArray]:
    """Return losses and accuracies on the sets by their names; on an empty one, none."""
    found = {}
    for name, data in sets.items():
        if not len(data[0]):
            continue  # one's own data may come without a test set
        done = performance(model, likelihood, data, at_once)
        count = {"examples": len(data[0])}
        made = {"long_name": f"mean {name} loss", "units": "nat", **count}
        found[f"{name}_loss"] = xr.DataArray(done.loss, attrs=made)
        if done.accuracy is not None:
            made = {"long_name": f"{name} accuracy", "units": "1", **count}
            found[f"{name}_accuracy"] = xr.DataArray(done.accuracy, attrs=made)
    return found


Approximators = Chosen


@numeric
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
        stats = moment.statistics(self.fisher, self.on, self.examples, self.layers)
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


@numeric
@final
@dataclass(frozen=True)
class Staleness:
    r"""Errors of factors that were made at most `refresh_every` steps ago.

    Gives `stale_error` and `fresh_error`, :math:`\|F - \hat F\| / \|F\|` with F at this
    iterate and F̂ from the last refresh or from now, over (layer, approximator), `age`,
    the steps since the refresh, and `stale_status(layer, approximator)`.

    Parameters
    ----------
    approximators
        Names, or a mapping of names to values.
    refresh_every
        Steps between two refreshes, the first at step 0.
    fisher, on, examples, layers
        As in `Errors`; the batch of the next step by default.

    Examples
    --------
    >>> import fisherlab as fl
    >>> probe = fl.probes.Staleness(["kfac"], refresh_every=2, layers=["fc6"])
    >>> ds = fl.follow(fl.problems.load("digits"), steps=3, every=1, probes=[probe])
    >>> ds.age.values.tolist()
    [0, 1, 0, 1]
    """

    approximators: Approximators = ("kfac",)
    refresh_every: int = 100
    fisher: Fisher = field(default_factory=Exact)
    on: Source = "batch"
    examples: int | None = 2000
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check the number of steps."""
        if self.refresh_every < 1:
            raise ValueError(f"{self!r}: refresh_every must be positive.")

    def observe(self, memory: Any | None, moment: Moment) -> Any:
        """Make the factors anew when it is time."""
        if memory is not None and moment.step % self.refresh_every:
            return memory
        stats = moment.statistics(self.fisher, self.on, self.examples, self.layers)
        made: dict[str, dict[str, Any]] = {}
        for name, method in by_name(self.approximators).items():
            tries = {layer: tried(method, one) for layer, one in stats.items()}
            made[name] = {n: told if op is None else op for n, (op, told) in tries.items()}
        return {"step": moment.step, "operators": made}

    def measure(self, memory: Any, moment: Moment) -> xr.Dataset:
        """Hold old and new factors against the exact blocks of now."""
        stats = moment.statistics(self.fisher, self.on, self.examples, self.layers)
        methods = by_name(self.approximators)
        shape = len(stats), len(methods)
        errors = {name: np.full(shape, np.nan) for name in ("stale", "fresh")}
        status = np.full(shape, "ok", dtype=object)
        for row, (layer, one) in enumerate(stats.items()):
            exact = ExactBlock()(one)
            for column, (name, method) in enumerate(methods.items()):
                held = memory["operators"][name][layer]
                made, told = tried(method, one)
                pair = {"stale": held, "fresh": told if made is None else made}
                for kind, op in pair.items():
                    if isinstance(op, str):
                        status[row, column] = op
                    else:
                        errors[kind][row, column] = metrics.frobenius_error(exact, op)
        dims = ("layer", "approximator")
        found: dict[str, Any] = {
            f"{kind}_error": (dims, e, {"long_name": f"{kind} error", "units": "1"})
            for kind, e in errors.items()
        }
        found["stale_status"] = (dims, status)
        age = moment.step - memory["step"]
        found["age"] = ((), age, {"long_name": "steps since the refresh", "units": "1"})
        return xr.Dataset(found, {"layer": list(stats), "approximator": list(methods)})
