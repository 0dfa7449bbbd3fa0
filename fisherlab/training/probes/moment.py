"""What a probe is given, and what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import xarray as xr
from torch import nn

from fisherlab.problems.problem import Pair, Problem, drawn
from fisherlab.statistics import Fisher, MonteCarlo, Statistics, collect

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
