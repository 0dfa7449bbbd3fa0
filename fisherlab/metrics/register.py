"""A metric is one function of what it needs; here it gets its public form and its name.

What each needs, and which ones a comparison takes unasked, is in `fisherlab.catalogue`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, cast, final, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from fisherlab.catalogue import METRICS, Needs, Quantity
from fisherlab.metrics.pairs import Damped, Pair, paired
from fisherlab.operators import Operator
from fisherlab.operators.base import Damping
from fisherlab.settings import numeric

Measure = TypeVar("Measure", bound=Callable[..., float])
_MEASURES: dict[str, Callable[..., float]] = {}


@final
@dataclass(frozen=True)
class Entry:
    """One metric by name.

    Parameters
    ----------
    facts
        Its row of the catalogue.
    of
        The value, from what is needed: a `Pair` ("matrix"), a `Damped` pair ("damping")
        or a `Step` ("gradient").

    Examples
    --------
    >>> import fisherlab as fl
    >>> entry = fl.metrics.entries()["trace_ratio"]
    >>> entry.name, entry.needs
    ('trace_ratio', 'matrix')
    """

    facts: Quantity
    of: Callable[[Any], float]

    @property
    def name(self) -> str:
        """Of the variable in a Dataset and of the public function."""
        return self.facts.name

    @property
    def needs(self) -> Needs:
        """What the value is taken of."""
        return self.facts.needs or "matrix"


@numeric
def entries(k: int = 10) -> Mapping[str, Entry]:
    """Return every metric of two operators by name.

    Parameters
    ----------
    k
        The dimension of the subspaces of `subspace_overlap`.

    Examples
    --------
    >>> entries()["gaussian_kl"].needs
    'damping'
    """
    found = {name: Entry(facts, _MEASURES[name]) for name, facts in METRICS.items()}
    overlap = partial(_MEASURES["subspace_overlap"], k=k)
    return found | {"subspace_overlap": Entry(METRICS["subspace_overlap"], overlap)}


@runtime_checkable
class OfMatrices(Protocol):
    """A metric of two operators; `of` takes them paired."""

    of: Callable[[Pair], float]

    def __call__(self, exact: Operator, approx: Operator, *, mixed: bool = False) -> float:
        """Return the value."""


@runtime_checkable
class OfInverses(Protocol):
    """A metric of two damped operators; `of` takes them paired and damped."""

    of: Callable[[Damped], float]

    def __call__(
        self, exact: Operator, approx: Operator, damping: Damping, *, mixed: bool = False
    ) -> float:
        """Return the value."""


@runtime_checkable
class OfSteps(Protocol):
    """A metric of two update directions; `of` takes them together."""

    of: Callable[[Any], float]

    def __call__(
        self,
        exact: Operator,
        approx: Operator,
        gradient: Float[Tensor, "o i"],
        damping: Damping,
        *,
        best: Float[Tensor, "o i"] | None = None,
        mixed: bool = False,
    ) -> float:
        """Return the value."""


def named(name: str) -> Callable[[Measure], Measure]:
    """Register what a metric of the catalogue is computed by."""

    def keep(of: Measure) -> Measure:
        _MEASURES[name] = of
        return of

    return keep


def of_matrices(of: Callable[[Pair], float]) -> OfMatrices:
    """Make the public metric of two operators from a function of their pair."""

    def metric(exact: Operator, approx: Operator, *, mixed: bool = False) -> float:
        return of(paired(of.__name__, exact, approx, mixed))

    return cast(OfMatrices, _public(metric, of))


def of_inverses(of: Callable[[Damped], float]) -> OfInverses:
    """Make the public metric of two damped operators from a function of both."""

    def metric(
        exact: Operator, approx: Operator, damping: Damping, *, mixed: bool = False
    ) -> float:
        return of(paired(of.__name__, exact, approx, mixed).damped(damping))

    return cast(OfInverses, _public(metric, of))


def of_steps(of: Callable[[Any], float]) -> OfSteps:
    """Make the public metric of two update directions from a function of both."""

    def metric(
        exact: Operator,
        approx: Operator,
        gradient: Float[Tensor, "o i"],
        damping: Damping,
        *,
        best: Float[Tensor, "o i"] | None = None,
        mixed: bool = False,
    ) -> float:
        damped = paired(of.__name__, exact, approx, mixed).damped(damping)
        return of(damped.along(gradient, best))

    return cast(OfSteps, _public(metric, of))


def _public(metric: Any, of: Any) -> Any:
    """Give a public function the name, the text and the measure of a metric."""
    metric.__name__ = metric.__qualname__ = of.__name__
    metric.__module__, metric.__doc__ = of.__module__, of.__doc__
    metric.of = named(of.__name__)(of)
    return metric
