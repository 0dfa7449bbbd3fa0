"""What is measured along a trajectory: small values, or any function of a moment.

>>> import fisherlab as fl
>>> fl.probes.Errors(["kfac"], examples=100).examples
100
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Protocol, final, runtime_checkable

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from fisherlab import metrics
from fisherlab.analysis import compare, inverse_blocks
from fisherlab.analysis.cells import Damping, tried
from fisherlab.approximators import Approximator, ExactBlock, average
from fisherlab.approximators.base import NetworkApproximator, called, facts
from fisherlab.approximators.register import Chosen, by_name, network_by_name
from fisherlab.likelihoods import Likelihood
from fisherlab.numerics.devices import Budget
from fisherlab.operators import InverseFactors, KroneckerLowRank, Operator
from fisherlab.operators.base import Damping as OneDamping
from fisherlab.operators.base import RelativeDamping, parsed
from fisherlab.operators.network import BlockDiagonal, NetworkOperator
from fisherlab.problems.problem import Pair, Problem, drawn
from fisherlab.settings import numeric
from fisherlab.statistics import (
    Empirical,
    Exact,
    Fisher,
    LayerStatistics,
    MeanGradient,
    MonteCarlo,
    Statistics,
    collect,
    mean_gradient,
)
from fisherlab.training.loop import CHUNK, performance
from fisherlab.training.schedules import BiasCorrected

__all__ = [
    "Directions",
    "Errors",
    "InverseBlocks",
    "Losses",
    "Moment",
    "Probe",
    "Spectra",
    "Staleness",
    "Tracker",
]
Source = Literal["train", "test", "batch"]


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


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
                    error, why = tried(_error, exact, op)
                    if error is None:
                        status[row, column] = why
                    else:
                        errors[kind][row, column] = error
        dims = ("layer", "approximator")
        found: dict[str, Any] = {
            f"{kind}_error": (dims, e, {"long_name": f"{kind} error", "units": "1"})
            for kind, e in errors.items()
        }
        found["stale_status"] = (dims, status)
        age = moment.step - memory["step"]
        found["age"] = ((), age, {"long_name": "steps since the refresh", "units": "1"})
        return xr.Dataset(found, {"layer": list(stats), "approximator": list(methods)})


def _error(exact: Operator, approx: Operator | str) -> float:
    if isinstance(approx, str):
        raise ValueError(approx)
    return metrics.frobenius_error(exact, approx)


@numeric
@final
@dataclass(frozen=True)
class Spectra:
    """The largest eigenvalues of the exact block and of approximations.

    Gives `eigenvalue(layer, approximator, index)`, descending from index 1, NaN beyond
    the size of a block, and `spectrum_status(layer, approximator)`.

    Parameters
    ----------
    approximators
        Names, or a mapping of names to values; the exact block always comes first.
    count
        How many eigenvalues.
    fisher, on, examples, layers
        As in `Errors`.

    Examples
    --------
    >>> import fisherlab as fl
    >>> probe = fl.probes.Spectra(["kfac"], count=3, examples=20, layers=["fc6"])
    >>> ds = fl.follow(fl.problems.load("digits"), steps=1, probes=[probe])
    >>> dict(ds.eigenvalue.sizes)
    {'step': 2, 'layer': 1, 'approximator': 2, 'index': 3}
    """

    approximators: Approximators = ()
    count: int = 50
    fisher: Fisher = field(default_factory=Exact)
    on: Source = "train"
    examples: int | None = 2000
    layers: Sequence[str] | None = None

    def __call__(self, moment: Moment) -> xr.Dataset:
        """Take the largest eigenvalues of every block."""
        stats = moment.statistics(self.fisher, self.on, self.examples, self.layers)
        chosen = {"exact": ExactBlock(), **by_name(self.approximators)}
        values = np.full((len(stats), len(chosen), self.count), np.nan)
        status = np.full(values.shape[:2], "ok", dtype=object)
        for row, layer in enumerate(stats.values()):
            for column, method in enumerate(chosen.values()):
                found, status[row, column] = tried(_largest, method, layer, self.count)
                if found is not None:
                    values[row, column, : len(found)] = found
        dims = ("layer", "approximator", "index")
        return xr.Dataset(
            {
                "eigenvalue": (dims, values, {"long_name": "eigenvalue", "units": "1"}),
                "spectrum_status": (dims[:2], status),
            },
            {
                "layer": list(stats),
                "approximator": list(chosen),
                "index": np.arange(1, self.count + 1),
            },
        )


def _largest(method: Approximator, layer: LayerStatistics, count: int) -> np.ndarray:
    wide: Operator = method(layer).to(torch.float64)
    found = wide.top_eigenvalues(min(count, wide.shape[0]))
    return np.asarray(found.detach().cpu().numpy())


@numeric
@final
@dataclass(frozen=True)
class InverseBlocks:
    """The damped inverses of blocks, entry by entry.

    Gives for every layer `inverse_<layer>(approximator, row_<layer>, col_<layer>)`, rows
    in the order of ``vec(w)`` by rows, since layers differ in size. A block of p
    parameters takes 8p² bytes for each approximation and moment.

    Parameters
    ----------
    approximators
        Names, or a mapping of names to values; the exact block always comes first.
    damping
        One λ, or `RelativeDamping(α)`.
    layers
        Block names; by default those with at most 2,000 parameters.
    fisher, on, examples
        As in `Errors`.

    Examples
    --------
    >>> import fisherlab as fl
    >>> probe = fl.probes.InverseBlocks(["kfac"], 0.1, layers=["fc6"], examples=20)
    >>> ds = fl.follow(fl.problems.load("digits"), steps=1, probes=[probe])
    >>> ds.inverse_fc6.shape
    (2, 2, 210, 210)
    """

    approximators: Approximators = ()
    damping: OneDamping = field(default_factory=lambda: RelativeDamping(1.0))
    layers: Sequence[str] | None = None
    fisher: Fisher = field(default_factory=Exact)
    on: Source = "train"
    examples: int | None = 2000

    def __call__(self, moment: Moment) -> xr.Dataset:
        """Invert."""
        stats = moment.statistics(self.fisher, self.on, self.examples, self.layers)
        chosen = by_name(self.approximators)
        tree = inverse_blocks(stats, chosen, self.damping, layers=self.layers)
        nodes = []
        for name, node in tree.children.items():
            both = {"row": f"row_{name}", "col": f"col_{name}"}
            inverse = node.to_dataset()["inverse"].rename(both)
            nodes.append(inverse.rename(f"inverse_{name}").to_dataset())
        return xr.merge(nodes, join="exact", combine_attrs="drop_conflicts")


Told = tuple[Tensor | None, str]  # a direction, or why there is none
_GRADIENT: Final = "gradient"
_EXACT: Final = "exact"


@numeric
@final
@dataclass(frozen=True)
class Directions:
    r"""Cosines of every method's direction with that of the exact blocks.

    .. math:: \hat F_k = ρ_k \hat F_{k-1} + (1 - ρ_k) \hat F(\text{batch}_k), \quad
              m_k = μ\,m_{k-1} + \bar g_k, \quad
              d_k = (\hat F_k + λ I)^{-1} m_k

    Every method keeps averages of its own at the same iterate and batches; the exact
    blocks (BDF) are one of them. The first row, "gradient", is m itself (SGD with
    momentum). Gives `averaged_direction_cosine(layer, approximator)` and
    `direction_status(layer, approximator)`.

    Parameters
    ----------
    approximators
        Names, or a mapping of names to values.
    damping
        λ for all, or a mapping of names to dampings; "exact" stands for the rest.
        `RelativeDamping(α)` is relative to the averaged exact block. The cosines depend
        strongly on it.
    fisher
        Which Fisher; the published one is `Empirical()`.
    average, momentum
        ρ, debiased so that the first batch counts alone, and μ.
    layers
        Block names or prefixes; all by default.
    network
        Methods that couple layers, such as ``["kfac-tridiagonal", "two-level-kfac"]`` or
        a mapping of names to values. Their solve is one for all layers looked at; what it
        gives for a layer is compared with the exact block's direction there.

    Notes
    -----
    It sees every step: a pass for the statistics, one for the gradient, and what each
    method costs. The averaged exact blocks hold p² numbers each.

    References
    ----------
    Bahamou, Goldfarb & Ren 2022, arXiv 2202.04124, Algorithm 5 and Figure 6.

    Examples
    --------
    >>> import fisherlab as fl
    >>> probe = fl.probes.Directions(["kfac"], damping=0.1, layers=["fc4"])
    >>> ds = fl.follow(fl.problems.load("digits"), steps=2, every=2, probes=[probe])
    >>> [str(name) for name in ds.approximator.values]
    ['gradient', 'kfac']
    """

    approximators: Approximators = ("kfac", "mini-block")
    damping: OneDamping | Mapping[str, OneDamping] = 1e-2
    fisher: Fisher = field(default_factory=Empirical)
    average: float = 0.9
    momentum: float = 0.9
    layers: Sequence[str] | None = None
    network: Chosen = ()

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not (0 <= self.average < 1 and 0 <= self.momentum < 1):
            raise ValueError(f"{self!r}: average and momentum must lie in [0, 1).")
        if isinstance(self.damping, Mapping) and _EXACT not in self.damping:
            raise ValueError(f"{self!r}: the dampings lack that of 'exact'.")

    def observe(self, memory: Any | None, moment: Moment) -> dict[str, Any]:
        """Average in the statistics and the gradient of the batch."""
        before = memory or {"count": 0, "momentum": {}, "operators": {}}
        model, likelihood = moment.model, moment.problem.likelihood
        stats = moment.statistics(
            self.fisher, "batch", None, self.layers, compress=not self.network
        )
        gradients = mean_gradient(model, moment.batch, likelihood, layers=self.layers)
        moved = {
            name: g.gradient + self.momentum * before["momentum"].get(name, 0.0)
            for name, g in gradients.items()
        }
        share = BiasCorrected(self.average).share(before["count"])
        methods = {_EXACT: ExactBlock(), **by_name(self.approximators)}
        operators = updated(before["operators"], methods, stats, gradients, share)
        networks = network_by_name(self.network) if self.network else {}
        coupled = before.get("networks", {})
        return {
            "count": before["count"] + 1,
            "momentum": moved,
            "operators": operators,
            "networks": updated_networks(coupled, networks, stats, share),
        }

    def measure(self, memory: Any, moment: Moment) -> xr.Dataset:
        """Solve with every method and compare the directions."""
        momentum: dict[str, Tensor] = memory["momentum"]
        operators: dict[str, dict[str, Operator]] = memory["operators"]
        exact = operators[_EXACT]
        found: dict[str, dict[str, Told]] = {}
        found[_GRADIENT] = {layer: (m, "ok") for layer, m in momentum.items()}
        for name, blocks in operators.items():
            if name != _EXACT:
                found[name] = {
                    layer: tried(self._solved, name, blocks[layer], exact[layer], m)
                    for layer, m in momentum.items()
                }
        for name, whole in memory["networks"].items():
            parts, told = tried(self._solved, name, whole, BlockDiagonal(exact), momentum)
            found[name] = {
                layer: (None if parts is None else parts[layer], told) for layer in momentum
            }
        names = list(found)
        cosines = np.full((len(momentum), len(names)), np.nan)
        status = np.full(cosines.shape, "ok", dtype=object)
        for row, layer in enumerate(momentum):
            block = exact[layer]
            best, why = tried(self._solved, _EXACT, block, block, momentum[layer])
            for column, name in enumerate(names):
                direction, status[row, column] = found[name][layer]
                if best is None:
                    status[row, column] = f"the exact block: {why}"
                elif direction is not None:
                    cosines[row, column] = _cosine(direction, best)
        dims = ("layer", "approximator")
        made = {"long_name": "cosine with the exact blocks' direction", "units": "1"}
        return xr.Dataset(
            {
                "averaged_direction_cosine": (dims, cosines, made),
                "direction_status": (dims, status),
            },
            {"layer": list(momentum), "approximator": names},
        )

    def _solved(self, name: str, matrix: Operator | str, exact: Operator, m: Any) -> Any:
        if isinstance(matrix, str):
            raise ValueError(matrix)
        return matrix.solve(m, self._damping(name, exact))

    def _damping(self, name: str, exact: Operator) -> Any:
        chosen: Any = self.damping
        if isinstance(chosen, Mapping):
            chosen = chosen.get(name, chosen[_EXACT])
        own = parsed(chosen, exact)
        return own.value if name == _EXACT else own


def _cosine(first: Tensor, second: Tensor) -> float:
    a, b = first.flatten().double(), second.flatten().double()
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


# Their methods average inside, from the operator of the step before.
_RECURSIVE = (InverseFactors, KroneckerLowRank)


def updated(
    operators: Mapping[str, Mapping[str, Operator | str]],
    approximators: Mapping[str, Approximator],
    stats: Statistics,
    gradients: Mapping[str, MeanGradient],
    weight: float,
) -> dict[str, dict[str, Operator | str]]:
    """Return the averaged operators of every method and block after one more batch.

    One that is refused once stays the reason why.

    Parameters
    ----------
    operators
        ``{approximator: {block: operator}}`` so far; empty to begin.
    approximators
        By name. Those whose `takes` is "mean_gradient" are given the gradients.
    stats, gradients
        Of the batch.
    weight
        The share of the old operators.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> model, data = torch.nn.Linear(3, 2), (torch.ones(4, 3), torch.ones(4, 2))
    >>> stats = fl.collect(model, data, fl.Gaussian())
    >>> found = updated({}, {"kfac": fl.KFAC()}, stats, {}, 0.0)
    >>> found["kfac"]["weight"].trace()
    8.0
    """
    found: dict[str, dict[str, Operator | str]] = {}
    for name, method in approximators.items():
        of_mean = facts(method).takes == "mean_gradient"
        given: Mapping[str, Any] = gradients if of_mean else stats
        old = operators.get(name, {})
        found[name] = {
            block: _kept(method, given[block], old.get(block), weight) for block in stats
        }
    return found


def updated_networks(
    operators: Mapping[str, NetworkOperator],
    approximators: Mapping[str, NetworkApproximator],
    stats: Statistics,
    weight: float,
) -> dict[str, NetworkOperator]:
    """Return the averaged operators of methods that couple layers after one more batch."""
    found: dict[str, Any] = {}
    for name, method in approximators.items():
        new, old = method(stats), operators.get(name)
        found[name] = new if old is None else average(old, new, weight)
    return found


def _kept(
    method: Any,
    statistics: LayerStatistics | MeanGradient,
    old: Operator | str | None,
    weight: float,
) -> Operator | str:
    if isinstance(old, str):
        return old
    made, why = tried(_one, method, statistics, old, weight)
    return why if made is None else made


def _one(
    method: Any,
    statistics: LayerStatistics | MeanGradient,
    old: Operator | None,
    weight: float,
) -> Operator:
    new: Operator = called(method, statistics, old)
    if old is None or isinstance(new, _RECURSIVE):
        return new
    return average(old, new, weight)
