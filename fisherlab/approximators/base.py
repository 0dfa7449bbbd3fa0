"""What an approximator is: a small value, called on statistics, returning an operator."""

import inspect
from typing import Any, Protocol, TypeVar, runtime_checkable

from fisherlab.operators import Operator
from fisherlab.statistics import LayerStatistics

State = TypeVar("State")


@runtime_checkable
class Approximator(Protocol):
    """Statistics of one block in, an operator out.

    An approximator may say which statistics an optimiser gives it by an attribute
    ``takes``: "per_example" for `LayerStatistics` (also where there is none),
    "mean_gradient" for `MeanGradient`, "network" for those of all blocks at once (see
    `NetworkApproximator`).
    """

    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        """Approximate one block; `previous` warm-starts what iterates."""


def called(approximator: Any, statistics: Any, previous: Any) -> Any:
    """Call a method, or a function of one's own that takes statistics alone.

    Examples
    --------
    >>> called(lambda statistics: statistics, "statistics", previous="an operator")
    'statistics'
    """
    if "previous" in inspect.signature(approximator).parameters:
        return approximator(statistics, previous=previous)
    return approximator(statistics)


@runtime_checkable
class Streaming(Protocol):
    """An approximator that can be fed chunk by chunk; calling it does all of it.

    `next_pass` returns the state to begin another pass over the data with, or None when
    the state is ready for `finish`. An approximator to which columns may come one by one
    at no more arithmetic says so by an attribute ``by_column = True``, one that holds
    every sample to the end by ``holds_samples = True``.
    """

    def accumulate(self, state: Any | None, statistics: LayerStatistics) -> Any:
        """Add a chunk of examples or columns to the state (None to begin).

        The state may grow in place: go on with what is returned.
        """

    def merge(self, first: Any, second: Any) -> Any:
        """Add up the states of two parts of the data."""

    def next_pass(self, state: Any) -> Any | None:
        """Return the state that begins another pass, or None."""

    def finish(self, state: Any) -> Operator:
        """Turn the state into the operator."""
