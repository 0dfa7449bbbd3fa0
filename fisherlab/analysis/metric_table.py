"""Metrics of operator pairs, put into a table: what is asked, and one row at a time."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isnan
from typing import Any

from torch import Tensor

from fisherlab.analysis.cells import REFUSALS, Cells, Dampings, build, reason
from fisherlab.approximators import Approximator
from fisherlab.catalogue import quantity
from fisherlab.errors import BudgetError, IndefiniteError, meant
from fisherlab.metrics.pairs import BelowFloor, Damped, Pair, paired
from fisherlab.metrics.register import Entry, entries
from fisherlab.metrics.sweeps import OF_DIRECTIONS, OF_MATRICES, curve, eigenbases
from fisherlab.numerics.devices import readable
from fisherlab.operators import (
    Eigenform,
    Factored,
    FactoredFisher,
    FactoredMiniBlocks,
    KroneckerSum,
    Operator,
    Stacked,
)
from fisherlab.statistics import LayerStatistics, MeanGradient, Statistics

Metrics = Sequence[str | Callable[..., Any]] | Mapping[str, Callable[..., Any]]
# Names in a table that no metric of one's own can have.
TAKEN = {"layer", "approximator", "damping", "damping_kind", "d_out", "d_in", "positions"}
TAKEN |= {"kind", "status", "floored", "converged", "stored_numbers", "mean_eigenvalue"}
TAKEN |= {"fisher_norm", "lambda", "exact_slope", "gradient_curvature", "solve_flops"}


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of every cell."""

    metrics: tuple[Entry, ...]
    dampings: Dampings
    gradient: Mapping[str, Tensor]
    mixed: bool

    @cached_property
    def _by_need(self) -> dict[str, list[Entry]]:
        found: dict[str, list[Entry]] = {}
        for entry in self.metrics:
            found.setdefault(entry.needs, []).append(entry)
        return found

    def of(self, need: str) -> Sequence[Entry]:
        """Return the metrics that need one thing, in order."""
        return self._by_need.get(need, ())

    def lacks(self, known: Container[str]) -> bool:
        """Tell whether a metric along the gradient is not known."""
        return any(entry.name not in known for entry in self.of("gradient"))


def question(
    wanted: Metrics | None,
    levels: Dampings,
    gradient: Mapping[str, Any] | None,
    stats: Statistics,
    mixed: bool,
    k: int = 10,
    joined: Mapping[str, Tensor] | None = None,
) -> Question:
    """Check what is asked and make it complete.

    `joined` are gradients that are checked already, in place of those of the layers.

    Raises
    ------
    ValueError
        For unknown metrics, metrics without what they need, or unfit gradients.
    """
    directions = mean_gradients(gradient, stats) if joined is None else joined
    known, damped = dict(entries(k)), bool(levels.labels)
    given = {"matrix": True, "damping": damped, "gradient": damped and bool(directions)}
    if wanted is None:
        usual = tuple(e for e in known.values() if e.facts.default and given[e.needs])
        return Question(usual, levels, directions, mixed)
    named = _named(wanted)
    known |= {name: _own(name, metric) for name, metric in named.items() if metric}
    unknown = [name for name in named if name not in known]
    if unknown:
        msg = f"compare: metrics {unknown} are unknown; known: {', '.join(known)}."
        msg += meant(str(unknown[0]), known)
        raise ValueError(msg)
    lacking = [name for name in named if not given[known[name].needs]]
    if lacking:
        along = any(known[name].needs == "gradient" for name in lacking)
        raise ValueError(
            f"compare: {', '.join(lacking)} needs `damping`"
            f"{' and `gradient`' if along else ''}."
        )
    chosen = tuple(known[name] for name in named)
    return Question(chosen, levels, directions, mixed)


def _named(wanted: Metrics) -> dict[str, Callable[..., Any] | None]:
    """Return names in order, with the functions of one's own among them."""
    if isinstance(wanted, Mapping):
        found: dict[Any, Any] = dict(wanted)
    else:
        listed = [wanted] if isinstance(wanted, str) or callable(wanted) else list(wanted)
        found = {
            one if isinstance(one, str) else getattr(one, "__name__", repr(one)): (
                None if isinstance(one, str) else one
            )
            for one in listed
        }
    for name, own in found.items():
        if not isinstance(name, str) or not (own is None or callable(own)):
            raise TypeError(
                f"compare: metrics={wanted!r}: names, functions of F and F̂, or a mapping "
                "from names to such functions are expected."
            )
        if own is not None and (name in TAKEN or not name or "/" in name):
            raise ValueError(
                f"compare: a metric of one's own cannot be called {name!r}: that is a name "
                "of the table's own, empty or with a slash. Choose another name."
            )
    return found


def _own(name: str, metric: Callable[..., Any]) -> Entry:
    """Return the entry of a function of F and F̂; its errors are refusals."""

    def value(pair: Pair) -> float:
        try:
            return float(metric(pair.exact, pair.approx))
        except REFUSALS:
            raise
        except Exception as error:
            raise ValueError(f"{name}: {type(error).__name__}: {error}") from error

    return Entry(replace(quantity(name), needs="matrix"), value)


def mean_gradients(
    gradient: Mapping[str, Any] | None, stats: Statistics
) -> dict[str, Tensor]:
    """Return the gradient of every layer as w (d_out, d_in).

    Raises
    ------
    ValueError
        If a layer is missing or a gradient has another shape than its weight.
    """
    if gradient is None:
        return {}
    missing = [name for name in stats if name not in gradient]
    if missing:
        msg = f"compare: gradient lacks the layers {missing}; see fl.mean_gradient."
        raise ValueError(msg)
    found = {}
    for name in stats:
        one = gradient[name]
        w = one.gradient if isinstance(one, MeanGradient) else one
        if tuple(w.shape) != stats[name].weight_shape:
            raise ValueError(
                f"compare: the gradient of {name!r} has shape {tuple(w.shape)}, "
                f"{stats[name].weight_shape} is expected."
            )
        found[name] = w
    return found


SEVERAL = 3  # dampings from which on eigenbases are cheaper than inverses


def begin(cells: Cells, asked: Question) -> None:
    """Make every variable that was asked for, so that one without values is NaN."""
    if asked.dampings.labels:
        cells.begin("solve_flops", "")
    for name in ("stored_numbers", "converged"):
        cells.begin(name, "")
    for entry in asked.metrics:
        cells.begin(entry.name, "", *([] if entry.needs == "matrix" else [0]))


def pairs_of(
    cells: Cells,
    call: str,
    layer: LayerStatistics,
    exact: Operator,
    chosen: Mapping[str, Approximator],
    *,
    mixed: bool = False,
    limit: int | None = None,
) -> dict[str, Pair]:
    """Return every approximation of a layer that can be had beside the exact block."""
    pairs: dict[str, Pair] = {}
    for method, approximator in chosen.items():
        approx = build(cells, layer, method, approximator, limit)
        if approx is not None:
            pairs[method] = paired(call, exact, approx, mixed)
    return pairs


def fill(
    cells: Cells,
    asked: Question,
    reference: tuple[str, Operator],
    pairs: Mapping[str, Pair],
    limit: int,
) -> None:
    """Fill the cells of one row: every approximation beside one exact matrix.

    Dampings are the outer loop: the exact inverse of each serves every method.

    Parameters
    ----------
    cells
        What is filled.
    asked
        The metrics, dampings and gradients.
    reference
        The name of the row and its exact matrix, in float64.
    pairs
        The exact matrix beside each approximation.
    limit
        Bytes that inverses may take.
    """
    name, exact = reference
    levels = cells.read(name, exact)
    shifts = [one.value for one in levels]
    locate(cells, name, exact, shifts)
    cells.put("fisher_norm", exact.frobenius_norm(), name)
    for method, pair in pairs.items():
        _fill_plain(cells, asked, (name, method), pair)
    curves: dict[str, dict[str, list[float]]] = {}
    if len(levels) >= SEVERAL:
        kept = {m: p for m, p in pairs.items() if not cells.leaves_out(name, m, "damping")}
        curves = _curves(asked, name, kept, shifts, limit)
    for level, damping in enumerate(levels):
        best: Tensor | None = None
        for method, pair in pairs.items():
            shifted = isinstance(damping, Factored)  # a matrix of its own
            told = {} if shifted else curves.get(method, {})
            here = {key: values[level] for key, values in told.items()}
            known = {
                key: value
                for key, value in here.items()
                if not (isnan(value) or isinstance(value, BelowFloor))
            }
            along = asked.of("gradient") and not cells.leaves_out(name, method, "gradient")
            try:
                if best is None and along and asked.lacks(known):
                    best = exact.solve(asked.gradient[name].double(), damping.value)
                taken, cell = best if along else None, (name, method, level)
                _fill_damped(cells, asked, cell, known, pair.damped(damping), taken, limit)
            except REFUSALS as error:
                cells.blame_damping(name, method, level, error)
    for method in pairs:
        cells.blame_undefined(name, method)


def _curves(
    asked: Question,
    name: str,
    pairs: Mapping[str, Pair],
    levels: Sequence[float],
    limit: int,
) -> dict[str, dict[str, list[float]]]:
    """Return what eigenbases tell about several dampings at once, method by method.

    One decomposition of each matrix serves all dampings, where there is one; what it
    does not tell (NaN, or a bound) is asked of the damped inverses themselves.
    """
    wanted = [e.name for e in asked.metrics if e.name in OF_MATRICES + OF_DIRECTIONS]
    if not wanted:
        return {}
    found: dict[str, dict[str, list[float]]] = {}
    gradient = asked.gradient[name] if asked.of("gradient") else None
    mine: Eigenform | None = None
    for method, pair in pairs.items():
        try:
            require_inverses("compare", pair, limit)
            mine, other = eigenbases("compare", pair, mine)
            found[method] = curve(mine, other, levels, gradient)
        except REFUSALS:
            continue  # the metric itself says why
    return found


def _fill_plain(cells: Cells, asked: Question, cell: tuple[str, str], pair: Pair) -> None:
    """Fill what needs no damping."""
    approx = pair.source
    cells.put("stored_numbers", approx.stored_numbers, *cell)
    converged = -1.0
    if isinstance(approx, (KroneckerSum, Stacked)) and approx.iterations:
        converged = float(approx.converged)
    cells.put("converged", converged, *cell)
    for entry in asked.of("matrix"):
        try:
            cells.put(entry.name, entry.of(pair), *cell)
        except REFUSALS as error:
            cells.blame(*cell, reason(error, entry.name))
    if isinstance(approx, (KroneckerSum, Stacked)) and not approx.converged:
        cells.blame(*cell, f"not converged (residual {approx.residual:.1g})")


def _fill_damped(
    cells: Cells,
    asked: Question,
    cell: tuple[str, str, int],
    known: Mapping[str, float],
    damped: Damped,
    best: Tensor | None,
    limit: int,
) -> None:
    """Fill what needs a damping; an indefinite matrix ends it, other refusals do not.

    What eigenbases tell is `known`.
    """
    layer, method, _ = cell
    place = layer, method
    inverts = not cells.leaves_out(*place, "damping")
    if cells.lacks("solve_flops", *place) and (inverts or best is not None):
        source = damped.pair.source
        formed = inverts and _blocks_bytes(source) <= limit
        cells.put("solve_flops", solve_flops(source, damped.damping, formed), *place)
    for entry in asked.metrics:
        if entry.name in known:
            cells.put(entry.name, known[entry.name], *cell)
    if best is not None and asked.lacks(known):
        step = damped.along(asked.gradient[layer], best)
        for entry in asked.of("gradient"):
            cells.put(entry.name, entry.of(step), *cell)
    left = [entry for entry in asked.of("damping") if entry.name not in known]
    for entry in left if inverts else ():
        try:
            require_inverses(entry.name, damped.pair, limit)
            cells.put(entry.name, entry.of(damped), *cell)
        except IndefiniteError:
            raise
        except REFUSALS as error:
            cells.blame_damping(*cell, error, entry.name)


def _blocks_bytes(approx: Operator) -> int:
    """Return what mini-blocks, their factors and their inverses take in float64."""
    if not isinstance(approx, FactoredMiniBlocks):
        return 0
    return 3 * 8 * sum(count * size**2 for count, size in approx.partition.sizes)


def solve_flops(approx: Operator, damping: float, formed: bool) -> float:
    """Return what one preconditioning costs, forming no large inverse only to count it."""
    if isinstance(approx, FactoredMiniBlocks) and (damping > 0 or not formed):
        return approx.product_flops  # as many as of the inverse blocks
    if not formed and isinstance(approx, FactoredFisher):
        samples = approx.samples.total
        return min(approx.product_flops + samples**2, approx.shape[0] ** 2)
    return approx.inverse(damping).product_flops


def require_inverses(metric: str, pair: Pair, limit: int) -> None:
    """Refuse inverses that exceed the budget, before they are formed."""
    approx, p = pair.approx, pair.rows
    several = isinstance(approx, KroneckerSum) and len(approx.terms) > 1
    needed = (6 if several else 3) * 8 * p**2
    if isinstance(pair.exact, FactoredFisher) and pair.exact.uses_gram and not several:
        samples = pair.exact.samples
        needed = min(needed, 3 * 8 * samples.total * p)
    needed = max(needed, _blocks_bytes(pair.source))
    if needed > limit:
        raise BudgetError(
            f"{metric} would form blocks of {readable(needed)}, more than the budget of "
            f"{readable(limit)}"
        )


def locate(cells: Cells, name: str, exact: Operator, shifts: Sequence[float]) -> None:
    """Fill the scale of a row: its mean eigenvalue, and every damping as a λ."""
    cells.put("mean_eigenvalue", exact.trace() / max(exact.shape[0], 1), name)
    for level, damping in enumerate(shifts):
        cells.put("lambda", damping, name, level)
