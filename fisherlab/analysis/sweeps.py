"""Damping sweeps: every damped metric over decades, each operator decomposed once."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final

import torch
import xarray as xr

from fisherlab.analysis.cells import (
    REFUSALS,
    Cells,
    Damping,
    Dampings,
    Telling,
    attributes,
    dampings,
    layer_coordinates,
    reason,
)
from fisherlab.analysis.executors import Folder, Workers, told
from fisherlab.analysis.layerwise import joined
from fisherlab.analysis.metric_table import locate, mean_gradients, pairs_of
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.codes import checksum, described
from fisherlab.errors import FisherlabError
from fisherlab.metrics.pairs import Pair, Step
from fisherlab.metrics.spectra import decomposed
from fisherlab.metrics.sweeps import (
    OF_DIRECTIONS,
    OF_MATRICES,
    OF_STEPS,
    curve,
    eigenbases,
    of_step,
)
from fisherlab.numerics.devices import tensors
from fisherlab.operators import Eigenform, Operator
from fisherlab.operators.base import Factored, RelativeDamping
from fisherlab.statistics import Layers, Statistics

DECADES: Final = RelativeDamping([10.0**power for power in range(-6, 3)])


def sweep(
    stats: Layers,
    approximators: Chosen = None,
    *,
    damping: Damping = DECADES,
    gradient: Mapping[str, Any] | None = None,
    metrics: Sequence[str] | None = None,
    executor: Workers = None,
    store: str | os.PathLike[str] | None = None,
    progress: Telling = False,
) -> xr.Dataset:
    """Hold damped approximations against the damped exact block over many dampings.

    No single λ tells how good an inverse is: a small one weighs directions that hold no
    data, a large one makes every method the identity.

    Parameters
    ----------
    stats
        Statistics of the layers.
    approximators
        Names, or a mapping of names to values; all named ones by default.
    damping
        λ, or fractions of the mean eigenvalue; 1e-6 to 1e2 by decades by default.
    gradient
        Block name to w (d_out, d_in) or `MeanGradient`, for the metrics of directions.
    metrics
        Names among those of `fisherlab.metrics.damping_curve`; all by default.
    executor
        What does the layers: anything with ``submit``, such as a `ProcessPoolExecutor` or
        a ``dask.distributed.Client``, or a function that begins one. The numbers are the
        same.
    store
        A folder that keeps every layer that is done; a sweep that was stopped goes on
        there, and `fl.open` reads it.
    progress
        Show a bar, or call a function with a `Done` after every layer.

    Returns
    -------
    xarray.Dataset
        The schema of `compare` with dims `layer`, `approximator`, `damping`; NaN with a
        reason in `status` where a damped matrix is not positive definite or an operator
        has no eigenbasis at hand. With a gradient v also `slope` vᵀp and `curvature`
        pᵀPp of the step p = (F̂ + λI)⁻¹v in P = F + λI, and beside them `exact_slope`
        vᵀP⁻¹v, `gradient_slope` vᵀv and `gradient_curvature` vᵀPv: they add up over
        layers, and `fl.analysis.verdict` says from them which λ serve a method.

    Raises
    ------
    ValueError
        For unknown names, or directions without a gradient.
    StoreError
        If the store holds another sweep.
    ExecutorError
        If the executor loses layers.

    Notes
    -----
    One eigendecomposition of each operator, whatever the number of dampings. Where one of
    two has none (several Kronecker terms, or all samples of a block, above p = 4000), the
    metrics of directions take a damped solve with each at every damping instead.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> ds = fl.sweep(stats, ["kfac"])
    >>> dict(ds.sizes)
    {'layer': 1, 'approximator': 1, 'damping': 9}
    """
    stats = Statistics.of(stats, "sweep")
    chosen, levels = by_name(approximators), dampings(damping)
    directions = mean_gradients(gradient, stats)
    wanted = _wanted(metrics, bool(directions))
    rows = {
        name: partial(
            _swept,
            Statistics({name: layer}, stats.provenance),
            chosen,
            levels,
            directions.get(name),
            wanted,
        )
        for name, layer in stats.items()
    }

    def request() -> dict[str, str]:
        asked = {"damping": described(levels), "metrics": described(wanted)}
        held = checksum(*(t for layer in stats.values() for t in tensors(layer)))
        asked |= {"statistics": held, "gradient": checksum(*directions.values())}
        return asked | told(chosen)

    kept = Folder.of("sweep", store, request, list(rows))
    return joined(kept.filled("sweep", rows, executor, progress))


def _swept(
    stats: Statistics,
    chosen: Mapping[str, Approximator],
    levels: Dampings,
    gradient: torch.Tensor | None,
    wanted: Sequence[str],
) -> xr.Dataset:
    """Return the row of one layer."""
    (layer,) = stats.values()
    cells = Cells(list(stats), list(chosen), levels)
    for metric in wanted:
        cells.begin(metric, "", 0)
    if "slope" in wanted:
        cells.begin("exact_slope", 0)
    exact = ExactBlock()(layer).to(torch.float64)
    pairs = pairs_of(cells, "sweep", layer, exact, chosen)
    along = None if gradient is None else gradient.double()
    shifts = tuple(one.value for one in cells.read(layer.name, exact))
    locate(cells, layer.name, exact, shifts)
    if shifts:
        _fill(cells, _Row(layer.name, exact, levels, shifts, along), pairs, wanted)
    made = attributes(stats, chosen, analysis="sweep", damping_kind=levels.kind)
    return cells.dataset(layer_coordinates(stats), made)


def _wanted(metrics: Sequence[str] | None, with_gradient: bool) -> tuple[str, ...]:
    steps = (*OF_DIRECTIONS, *OF_STEPS) if with_gradient else ()
    possible = (*OF_MATRICES, *steps)
    if metrics is None:
        return possible
    unknown = [name for name in metrics if name not in possible]
    if unknown:
        raise ValueError(
            f"sweep: metrics {unknown} are not to be had; possible"
            f"{'' if with_gradient else ' without a gradient'}: {', '.join(possible)}."
        )
    return tuple(metrics)


@dataclass(frozen=True, eq=False)
class _Row:
    """A layer's exact block at every damping, decomposed where that can be had."""

    name: str
    exact: Operator
    dampings: Dampings
    shifts: tuple[float, ...]
    gradient: torch.Tensor | None

    @cached_property
    def pair(self) -> Pair:
        """The block beside itself."""
        return Pair(self.exact, self.exact)

    @cached_property
    def basis(self) -> Eigenform | FisherlabError:
        """The eigenbasis, or why there is none."""
        try:
            return decomposed(self.exact, "sweep")
        except FisherlabError as error:
            return error

    @cached_property
    def steps(self) -> list[Step | Exception]:
        """The exact steps, by solves where there is no eigenbasis."""
        assert self.gradient is not None, "asked with a gradient only"
        form, found = self.basis, list[Step | Exception]()
        for shift in self.shifts:
            try:
                best = (
                    None
                    if isinstance(form, Exception)
                    else form.solve(self.gradient, shift)
                )
                found.append(self.pair.damped(shift).along(self.gradient, best))
            except REFUSALS as error:
                found.append(error)
        return found


def _fill(
    cells: Cells, row: _Row, pairs: Mapping[str, Pair], wanted: Sequence[str]
) -> None:
    """Fill one row from eigenbases, or the steps by solves where a matrix has none."""
    if row.gradient is not None and "slope" in wanted:
        _fill_best(cells, row)
    for method, pair in pairs.items():
        bases = None
        try:
            if isinstance(row.basis, FisherlabError):
                raise row.basis
            bases = eigenbases("sweep", pair, row.basis)
        except FisherlabError as error:
            cells.blame(row.name, method, reason(error))
        ask = _by_solves(row, pair) if bases is None else _by_bases(row, pair, *bases)
        for level in range(len(row.shifts)):
            try:
                found = ask(level)
            except REFUSALS as error:
                cells.blame_damping(row.name, method, level, error)
            else:
                for metric in [name for name in wanted if name in found]:
                    cells.put(metric, found[metric], row.name, method, level)
        if bases is not None:
            _blame_hidden(cells, (row.name, method), *bases, row.shifts)
        cells.blame_undefined(row.name, method)


def _fill_best(cells: Cells, row: _Row) -> None:
    """Keep what the exact step and the gradient itself reach, to be added over layers."""
    for level, step in enumerate(row.steps):
        if not isinstance(step, Exception):
            best = float((step.gradient * step.best).sum())
            cells.put("exact_slope", best, row.name, level)
            cells.put("gradient_curvature", step.plain_curvature, row.name, level)
            cells.put("gradient_slope", float(step.gradient.square().sum()), row.name)


Told = Callable[[int], Mapping[str, float]]  # metrics at one damping, or a refusal


def _by_solves(row: _Row, pair: Pair) -> Told:
    """Return the metrics of directions, each by one damped solve."""

    def told(level: int) -> Mapping[str, float]:
        if row.gradient is None:
            return {}
        exact = row.steps[level]
        if isinstance(exact, Exception):
            raise exact
        damped = pair.damped(row.dampings.each[level])
        return of_step(damped.along(exact.gradient, exact.best))

    return told


def _by_bases(row: _Row, pair: Pair, mine: Eigenform, other: Eigenform) -> Told:
    """Return every metric from two eigenbases; a factored damping has one of its own."""
    curves = curve(mine, other, row.shifts, row.gradient)

    def told(level: int) -> Mapping[str, float]:
        damping, at, found = row.dampings.each[level], level, curves
        if isinstance(damping, Factored):
            damped = pair.damped(damping)
            _, shifted = eigenbases("sweep", damped.pair, mine)
            at, found = 0, curve(mine, shifted, [damped.damping], row.gradient)
        return {metric: values[at] for metric, values in found.items()}

    return told


def _blame_hidden(
    cells: Cells,
    place: tuple[str, str],
    mine: Eigenform,
    other: Eigenform,
    shifts: Sequence[float],
) -> None:
    """Say from which λ down a damped matrix is indefinite, or its inverse unknown."""
    lowest = min(mine.smallest, other.smallest)
    if lowest + min(shifts) <= 0:
        cells.blame(*place, f"not positive definite where λ is at most {-lowest:.3g}")
    hidden = [v for v in shifts if not (mine.resolves(v) and other.resolves(v))]
    if hidden and lowest + max(hidden) > 0:
        told = f"rounding hides the inverses where λ is at most {max(hidden):.3g}"
        cells.blame(*place, told)
