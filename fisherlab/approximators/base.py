"""What an approximator is, says of itself, costs, and keeps of a stream."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, wraps
from typing import (
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
    cast,
    final,
    runtime_checkable,
)

import torch
from torch import Tensor

from fisherlab.errors import DataError
from fisherlab.numerics.packed import pair_count, symmetric_flops
from fisherlab.operators import Dense, Operator, Provenance, Stacked
from fisherlab.operators.network import NetworkOperator
from fisherlab.samples import OuterSamples, Samples, TokenSamples
from fisherlab.statistics import LayerStatistics
from fisherlab.statistics.network import Chunks

State = TypeVar("State")
Result = TypeVar("Result")
Takes = Literal["per_example", "mean_gradient", "network"]
Returned = Literal["factors", "terms", "blocks", "columns", "entries", "products", "exact"]
NetworkStatistics = Mapping[str, LayerStatistics]


@runtime_checkable
class Approximator(Protocol):
    """Statistics of one block in, an operator out.

    Any function of the statistics is one. What else it has to say stands in attributes
    (`Facts`), in a method ``cost`` (see `fisherlab.approximators.base`), and in the four
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
    >>> from fisherlab.approximators.base import Sums, add
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


EIGEN = 9  # multiply-adds of a symmetric eigendecomposition over d³, about
STEPS = 5  # power steps until convergence, about


class Cost(NamedTuple):
    """Multiply-adds to build an approximation, and numbers it holds beside the samples.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> stats = fl.collect(torch.nn.Linear(3, 2), (torch.ones(4, 3), None), fl.Gaussian())
    >>> fl.KFAC().cost(stats["weight"].samples).numbers
    20
    """

    flops: int
    numbers: int


def cost_of(method: Any, samples: Samples) -> Cost | None:
    """Return what an approximator says that it costs, None if it is not counted.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> samples = OuterSamples(torch.ones(10, 4), torch.ones(2, 10, 3))
    >>> cost_of(fl.KFAC(), samples)
    Cost(flops=340, numbers=25)
    """
    told = facts(method)
    if not hasattr(method, "cost"):
        return None
    parts = samples.counted_as.counted(
        needs_inputs=told.needs_inputs, entrywise=told.entrywise
    )
    known = [one for one in map(method.cost, parts) if one is not None]
    flops, numbers = (sum(one[k] for one in known) for k in range(2))
    return Cost(flops, numbers) if known else None


def building_flops(method: Any, samples: Samples) -> int | None:
    """Return the multiply-adds that build an approximation, None if not counted."""
    cost = cost_of(method, samples)
    return None if cost is None else cost.flops


def result_numbers(method: Any, samples: Samples) -> int | None:
    """Return the numbers an approximation holds besides the samples."""
    cost = cost_of(method, samples)
    return None if cost is None else cost.numbers


def held_numbers(method: Any, samples: Samples) -> int:
    """Return the numbers an approximation holds, the whole factors of a table included.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> net, words = torch.nn.Embedding(9, 2), torch.arange(5)
    >>> samples = fl.collect(net, (words, None), fl.Gaussian())["weight"].samples
    >>> [held_numbers(method, samples) for method in (fl.Diagonal(), fl.KPSVD())]
    [18, 85]
    """
    told = facts(method)
    formed = told.result == "terms" or not told.needs_inputs
    if isinstance(samples, TokenSamples) and formed and hasattr(method, "cost"):
        cost = method.cost(samples)  # flops of a table are others, the factors are not
        return cost.numbers if cost else 0
    return result_numbers(method, samples) or 0


def input_flops(s: Samples) -> int:
    """Count Σ a aᵀ, about half of it through symmetry."""
    return symmetric_flops(s.weight_shape[1], s.examples * s.positions)


def factor_flops(s: Samples) -> int:
    """Count Σ g gᵀ and Σ a aᵀ, about half of each through symmetry."""
    rows = s.total * s.positions
    return symmetric_flops(s.weight_shape[0], rows) + input_flops(s)


def rotation_flops(s: Samples) -> int:
    """Count gradients and inputs in another basis, and the squares there."""
    o, i = s.weight_shape
    rows = s.examples * s.positions
    return s.columns * rows * o * o + rows * i * i + s.square_flops()


def partial_trace_flops(s: Samples) -> int:
    """Count Σ D Dᵀ and Σ Dᵀ D."""
    return s.row_trace_flops() + s.column_trace_flops()


def alternation_flops(s: Samples) -> int:
    """Count the power steps of the leading product, by the cheaper space."""
    o, i = s.weight_shape
    if not isinstance(s, OuterSamples):
        return s.matrix_flops() + STEPS * s.total * o * i * (o + i)
    packed = s.examples * pair_count(o) * pair_count(i) + STEPS * (o * i) ** 2 // 2
    outputs = min(pair_count(o), s.columns**2 * o)
    grams = s.examples**2 * (i + outputs) // 2 + STEPS * 2 * s.examples**2
    return min(packed, grams)


def leading_flops(s: Samples) -> int:
    """Count the eigenvalues of the block by its cheaper space."""
    p, m = entry_count(s), s.total
    if m <= p:
        return s.gram_flops() + EIGEN * m**3
    return s.dense_flops() + EIGEN * p**3


def cubes(s: Samples) -> int:
    """Count d³ of both factors, in whose multiples they are factorised."""
    o, i = s.weight_shape
    return o**3 + i**3


def entry_count(s: Samples) -> int:
    """Count the entries of the weight."""
    return s.weight_shape[0] * s.weight_shape[1]


def pair_numbers(s: Samples) -> int:
    """Count the numbers of two factors, or of two bases."""
    return s.weight_shape[0] ** 2 + s.weight_shape[1] ** 2


@final
@dataclass(frozen=True, eq=False)
class Sums:
    """Tensors summed over examples and columns, with the examples they count.

    Parameters
    ----------
    tensors
        The sums, in the method's own order.
    count, positions
        Examples, and Σ_n T_n.
    weight_shape, provenance
        Of the block.
    turned
        Whether the rows of the weight belong to the inputs: an embedding, ``x @ W``.
    precision
        That of the statistics, where the sums are wider.
    """

    tensors: tuple[Tensor, ...]
    count: int
    positions: int
    weight_shape: tuple[int, int]
    provenance: Provenance
    turned: bool = False
    precision: torch.dtype | None = None

    @classmethod
    def of(cls, statistics: LayerStatistics, *tensors: Tensor) -> "Sums":
        """Begin with the sums of one chunk."""
        s = statistics
        return cls(
            tensors,
            s.count,
            s.positions,
            s.weight_shape,
            s.provenance,
            s.tokens is not None or s.turned,
        )

    def counting(self, count: int, positions: int) -> "Sums":
        """Count further examples, whose numbers the tensors have taken up in place."""
        count += self.count
        return replace(
            self,
            count=count,
            positions=self.positions + positions,
            provenance=replace(self.provenance, examples=count),
        )

    def __add__(self, other: "Sums") -> "Sums":
        """Add up two parts of the data."""
        pairs = zip(self.tensors, other.tensors, strict=True)
        added = replace(self, tensors=tuple(a + b for a, b in pairs))
        return added.counting(other.count, other.positions)


def add(state: Sums | None, more: Sums) -> Sums:
    """Add a chunk to a state that may not have begun."""
    return more if state is None else state + more


@runtime_checkable
class Within(Protocol):
    """A state whose sums are taken in something that stands, the same for all parts.

    Where several processes have it already, sums alone are sent.
    """

    @property
    def sums(self) -> Sums | None:
        """What has been added up, None where the pass has only begun."""

    def summing(self, sums: Sums | None) -> Any:
        """Return the state with other sums."""


@runtime_checkable
class Several(Protocol):
    """A state of several, each of which is added up by itself."""

    @property
    def open(self) -> Mapping[int, Any]:
        """The states that this pass adds to, by number."""

    def put(self, states: Mapping[int, Any]) -> Any:
        """Return the state with others in these places."""


Method = TypeVar("Method")


@final
@dataclass(frozen=True, eq=False)
class GroupStates:
    """The states of all groups.

    Parameters
    ----------
    states
        One for each group.
    done
        Which of them are ready for `finish` and see no further pass.
    """

    states: tuple[Any, ...]
    done: tuple[bool, ...]
    provenance: Provenance

    @property
    def open(self) -> Mapping[int, Any]:
        """The states that are not ready."""
        return {k: s for k, s in enumerate(self.states) if not self.done[k]}

    def put(self, states: Mapping[int, Any]) -> "GroupStates":
        """Return the same with other states in some places."""
        new = (states.get(k, state) for k, state in enumerate(self.states))
        return replace(self, states=tuple(new))


def by_group(cls: type[Method]) -> type[Method]:
    """Let an approximator take grouped layers: one state and one operator for each group.

    A class decorator. The class itself is written for one group; for statistics with
    several, calls and the four steps of a stream run over the groups, and the result is
    a `Stacked` operator: block-diagonal over the groups, as KFAC of each of them is.
    """
    for name, over in (
        ("__call__", _call),
        ("accumulate", _accumulate),
        ("merge", _merge),
        ("next_pass", _next_pass),
        ("finish", _finish),
    ):
        single = getattr(cls, name)
        setattr(cls, name, wraps(single)(over(single)))
    return cls


def _call(single: Callable[..., Operator]) -> Callable[..., Operator]:
    def call(
        self: Any, statistics: LayerStatistics, previous: Operator | None = None
    ) -> Operator:
        groups = statistics.by_group()
        if len(groups) == 1:
            return single(self, statistics, previous)
        warm: tuple[Operator | None, ...] = (None,) * len(groups)
        if isinstance(previous, Stacked) and len(previous.parts) == len(groups):
            warm = previous.parts
        parts = [single(self, g, old) for g, old in zip(groups, warm, strict=True)]
        return Stacked(tuple(parts), statistics.provenance.by(repr(self)))

    return call


def _accumulate(single: Callable[..., Any]) -> Callable[..., Any]:
    def accumulate(self: Any, state: Any, statistics: LayerStatistics) -> Any:
        groups = statistics.by_group()
        if len(groups) == 1:
            return single(self, state, statistics)
        none = (None,) * len(groups), (False,) * len(groups)
        states, done = (state.states, state.done) if state else none
        new = [
            old if ready else single(self, old, g)
            for old, ready, g in zip(states, done, groups, strict=True)
        ]
        return GroupStates(tuple(new), done, statistics.provenance)

    return accumulate


def _merge(single: Callable[..., Any]) -> Callable[..., Any]:
    def merge(self: Any, first: Any, second: Any) -> Any:
        if not isinstance(first, GroupStates):
            return single(self, first, second)
        other = second.open
        return first.put({k: single(self, s, other[k]) for k, s in first.open.items()})

    return merge


def _next_pass(single: Callable[..., Any]) -> Callable[..., Any]:
    def next_pass(self: Any, state: Any) -> Any:
        if not isinstance(state, GroupStates):
            return single(self, state)
        pairs = zip(state.states, state.done, strict=True)
        found = [None if ready else single(self, one) for one, ready in pairs]
        done = tuple(one is None for one in found)
        if all(done):
            return None
        both = zip(state.states, found, strict=True)
        new = tuple(old if one is None else one for old, one in both)
        return replace(state, states=new, done=done)

    return next_pass


def _finish(single: Callable[..., Operator]) -> Callable[..., Operator]:
    def finish(self: Any, state: Any) -> Operator:
        if not isinstance(state, GroupStates):
            return single(self, state)
        parts = tuple(single(self, one) for one in state.states)
        examples = parts[0].provenance.examples
        made = replace(state.provenance, examples=examples)
        return Stacked(parts, made.by(repr(self)))

    return finish
