"""What an approximator is, what it says of itself, and how it goes through a stream."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import (
    Any,
    ClassVar,
    Generic,
    Literal,
    Protocol,
    TypeVar,
    cast,
    final,
    runtime_checkable,
)

import torch
from torch import Tensor

from fisherlab.errors import DataError
from fisherlab.operators import Dense, Operator
from fisherlab.operators.network import NetworkOperator
from fisherlab.statistics import LayerStatistics
from fisherlab.statistics.gathered import Chunks

State = TypeVar("State")
Result = TypeVar("Result")
Takes = Literal["per_example", "mean_gradient", "network"]
Returned = Literal["factors", "terms", "blocks", "columns", "entries", "products", "exact"]
NetworkStatistics = Mapping[str, LayerStatistics]


@runtime_checkable
class Approximator(Protocol):
    """Statistics of one block in, an operator out.

    Any function of the statistics is one. What else it has to say stands in attributes
    (`Facts`), in a method ``cost`` (see `fisherlab.approximators.costs`), and in the four
    steps of `Streaming`; `fisherlab.approximators.register.add` gives it a name.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> isinstance(fl.KFAC(), fl.approximators.Approximator)
    True
    >>> fl.compare(stats, {"mine": lambda s: fl.Diagonal()(s)}).approximator.item()
    'mine'
    """

    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        """Approximate one block; `previous` warm-starts what iterates."""


@runtime_checkable
class NetworkApproximator(Protocol):
    """Statistics of all blocks in, one operator over all of them out.

    It says so by an attribute ``takes = "network"``.

    Examples
    --------
    >>> import fisherlab as fl
    >>> fl.ExactNetwork().takes, fl.KFACTridiagonal().takes
    ('network', 'network')
    """

    def __call__(self, statistics: NetworkStatistics) -> NetworkOperator:
        """Approximate the Fisher of the network."""


@final
@dataclass(frozen=True)
class Facts:
    """What an approximator says of itself, by attributes of these names.

    Parameters
    ----------
    takes
        Which statistics it is given: "per_example" for the `LayerStatistics` of a block,
        "mean_gradient" for its `MeanGradient`, "network" for the statistics of all blocks
        at once.
    holds_samples
        Whether its result, or its stream, keeps every sample.
    by_column
        Whether columns may come one by one at no more arithmetic.
    needs_inputs
        Whether it needs the inputs and output gradients of the layer.
    entrywise
        Whether it treats every entry of the weight alone, also those of an embedding.
    decomposes
        Whether factors are factorised while it is made, in the span of few samples.
    inverts
        Whether they are inverted whole instead, however few samples there are.
    result
        What it returns, by which solves and inner products are counted: a product of
        "factors" or what is diagonal in their bases, the sum of several "terms", "blocks"
        of rows, a few "columns", "entries", "products" alone, or the "exact" block.
    """

    takes: Takes = "per_example"
    holds_samples: bool = False
    by_column: bool = False
    needs_inputs: bool = False
    entrywise: bool = False
    decomposes: bool = False
    inverts: bool = False
    result: Returned = "factors"

    @property
    def couples(self) -> bool:
        """Whether it takes the statistics of all blocks at once."""
        return self.takes == "network"


def facts(approximator: Any) -> Facts:
    """Return what an approximator says of itself; a plain function says nothing.

    Examples
    --------
    >>> facts(lambda statistics: None).takes
    'per_example'
    """
    known = fields(Facts)
    told: dict[str, Any] = {f.name: getattr(approximator, f.name, f.default) for f in known}
    return Facts(**told)


def operator_of(approximator: Any, layer: LayerStatistics) -> Operator:
    """Return what a method makes of a layer; a matrix in the place of an operator is dense.

    Raises
    ------
    DataError
        Naming what came back, if it is neither an operator nor symmetric (p, p).

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(9, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> operator_of(lambda layer: torch.eye(8).double(), stats["weight"]).trace()
    8.0
    """
    made: Any = approximator(layer)
    if hasattr(made, "weight_shape"):
        return cast(Operator, made)
    p, given = layer.weight_shape[0] * layer.weight_shape[1], f"a {type(made).__name__}"
    if isinstance(made, Tensor):
        given = f"a tensor of shape {tuple(made.shape)}"
        if made.shape == (p, p) and not torch.isfinite(made).all():
            given += " that holds NaN or infinity"
        elif made.shape == (p, p):
            if torch.allclose(made, made.T, rtol=1e-4, atol=1e-6 * float(made.abs().max())):
                return Dense(made, layer.weight_shape, layer.provenance)
            given += " that is not symmetric"
    name = getattr(approximator, "__name__", repr(approximator))
    raise DataError(
        f"{name} of block {layer.name!r} returned {given}; an operator, or a symmetric "
        f"tensor of shape {(p, p)}, is expected."
    )


def called(approximator: Any, statistics: Any, previous: Any) -> Any:
    """Call a method, or a function of one's own that takes statistics alone.

    Examples
    --------
    >>> called(lambda statistics: statistics, "statistics", previous="an operator")
    'statistics'
    """
    known = is_dataclass(approximator)
    kind: Any = type(approximator)
    if _follows(kind) if known else _takes_previous(approximator):
        return approximator(statistics, previous=previous)
    return approximator(statistics)


@cache
def _follows(kind: Any) -> bool:
    """Tell it of a class of methods, once: every step asks."""
    return _takes_previous(kind.__call__)


def _takes_previous(call: Any) -> bool:
    return "previous" in inspect.signature(call).parameters


@runtime_checkable
class Streaming(Protocol):
    """An approximator that is fed chunk by chunk; calling it does all of it.

    `OfSums` and `OfSamples` have these steps for most methods. A method without them is
    called at the end, with all samples of the stream.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> method, state = fl.KFAC(), None
    >>> for _ in range(2):  # two chunks, here the same one
    ...     state = method.accumulate(state, stats["weight"])
    >>> method.next_pass(state) is None, method.finish(state).provenance.examples
    (True, 8)
    """

    def accumulate(self, state: Any | None, statistics: Any) -> Any:
        """Add a chunk of examples or columns to the state (None to begin).

        The state may grow in place: go on with what is returned.
        """

    def merge(self, first: Any, second: Any) -> Any:
        """Add up the states of two parts of the data."""

    def next_pass(self, state: Any) -> Any | None:
        """Return the state that begins another pass, or None if it is ready to finish."""

    def finish(self, state: Any) -> Any:
        """Turn the state into the operator."""


def pieces(statistics: Any) -> Iterator[Any]:
    """Yield statistics of a block, or of all blocks, part by part where they are stored.

    Examples
    --------
    >>> list(pieces("the gradient of a mean"))
    ['the gradient of a mean']
    """
    if isinstance(statistics, LayerStatistics):
        yield from statistics.pieces()
    elif isinstance(statistics, Mapping) and statistics:
        parts = [layer.pieces() for layer in statistics.values()]
        for beside in zip(*parts, strict=True):
            yield dict(zip(statistics, beside, strict=True))
    else:
        yield statistics


@runtime_checkable
class OrPassed(Protocol):
    """A streaming approximator that holds samples while they are few."""

    def holds(self, nbytes: int) -> bool:
        """Tell whether samples of so many bytes are held."""

    def passing(self, held: Chunks) -> Any:
        """Return the first of the passes that are made else."""


class OfSums(ABC, Generic[State, Result]):
    """The default of a method that adds up over its stream: a call is a stream of one.

    Its own are `accumulate` and `finish`, and `next_pass` where one pass is not enough.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> from fisherlab.approximators.states import Sums, add
    >>> class Traces(OfSums):
    ...     def accumulate(self, state, statistics):
    ...         trace = statistics.samples.squared_norms().sum()
    ...         return add(state, Sums.of(statistics, trace))
    ...     def finish(self, state):
    ...         return float(state.tensors[0]) / state.count
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> Traces()(stats["weight"])
    8.0
    """

    @abstractmethod
    def accumulate(self, state: State | None, statistics: Any) -> State:
        """Add a chunk, in place or not: go on with what is returned."""

    @abstractmethod
    def finish(self, state: State) -> Result:
        """Turn the sums into the operator."""

    def __call__(self, statistics: Any, previous: Operator | None = None) -> Result:
        """Return the approximation; `accumulate` tells what it refuses."""
        state = self.through(self.begun(statistics, previous), statistics)
        while (following := self.next_pass(state)) is not None:
            state = self.through(following, statistics)
        return self.finish(state)

    def through(self, state: State | None, statistics: Any) -> State:
        """Return the state after all of the statistics, which may lie in parts."""
        for piece in pieces(statistics):
            state = self.accumulate(state, piece)
        assert state is not None
        return state

    def begun(self, statistics: Any, previous: Operator | None) -> State | None:
        """Return what a call goes on from; most methods begin anew."""
        return None

    def merge(self, first: State, second: State) -> State:
        """Add up two parts of the same pass."""
        added: State = first + second  # type: ignore[operator]
        return added

    def next_pass(self, state: State) -> State | None:
        """Return None: one pass is enough."""
        return None


class OfSamples(ABC, Generic[Result]):
    """The default of a method that needs every sample: it keeps the stream.

    Its own is the call.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> class Grams(OfSamples):
    ...     def __call__(self, statistics, previous=None):
    ...         return statistics.samples.gram()
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> Grams()(stats["weight"]).shape
    torch.Size([8, 8])
    """

    holds_samples: ClassVar[bool] = True

    @abstractmethod
    def __call__(
        self, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Result:
        """Return the approximation of one block."""

    def accumulate(self, state: Chunks | None, statistics: LayerStatistics) -> Chunks:
        """Keep the chunk."""
        return (state or Chunks()).add(statistics)

    def merge(self, first: Chunks, second: Chunks) -> Chunks:
        """Keep both parts."""
        return first + second

    def next_pass(self, state: Chunks) -> None:
        """Return None: one pass is enough."""

    def finish(self, state: Chunks) -> Result:
        """Return the approximation of all that was kept."""
        return self(state.joined())


def learns(approximator: Any) -> bool:
    """Tell whether a method is shown the batch before and after a step (K-BFGS).

    Examples
    --------
    >>> learns(lambda statistics: None)
    False
    """
    return hasattr(approximator, "observe")


def adds(approximator: Any) -> bool:
    """Tell whether processes that train add up the sums of a method, not its samples.

    Examples
    --------
    >>> adds(lambda statistics: None)
    False
    """
    kept = facts(approximator).couples or learns(approximator)
    return isinstance(approximator, OfSums) and not kept
