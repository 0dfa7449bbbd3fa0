"""Every approximation beside the exact block, as one labelled Dataset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from fisherlab import metrics as formulas
from fisherlab.analysis.damping import Damping, Dampings, dampings
from fisherlab.analysis.provenance import attributes
from fisherlab.analysis.questions import DAMPED, LABELS, PLAIN, Question, question
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.register import by_name
from fisherlab.errors import (
    BudgetError,
    FisherlabError,
    IndefiniteError,
    NeedsSharedForm,
    NumericalError,
)
from fisherlab.numerics.memory import Budget, parse_budget, readable
from fisherlab.operators import FactoredFisher, KroneckerSum, Operator
from fisherlab.statistics import LayerStatistics, Statistics


@dataclass(eq=False)
class _Cells:
    """Arrays that are filled cell by cell."""

    layers: list[str]
    methods: list[str]
    dampings: int
    arrays: dict[str, Any] = field(default_factory=dict)

    def begin(self, name: str, *rest: str | int) -> None:
        """Make an array of NaN, unless it is there."""
        if name not in self.arrays:
            self.arrays[name] = np.full(self._shape(rest), np.nan)

    def put(self, name: str, value: float, layer: str, *rest: str | int) -> None:
        """Store one number of (layer[, approximator][, damping])."""
        place = [self.layers.index(layer)]
        place += [self.methods.index(r) if isinstance(r, str) else r for r in rest]
        self.begin(name, *rest)
        self.arrays[name][tuple(place)] = value

    def _shape(self, rest: Sequence[str | int]) -> list[int]:
        sizes = [len(self.methods) if isinstance(r, str) else self.dampings for r in rest]
        return [len(self.layers), *sizes]


def compare(
    stats: Statistics,
    approximators: Sequence[str] | Mapping[str, Approximator] | None = None,
    *,
    metrics: Sequence[str] | None = None,
    damping: Damping = None,
    gradient: Mapping[str, Any] | None = None,
    reference: Statistics | None = None,
    budget: Budget = None,
    progress: bool = False,
) -> xr.Dataset:
    """Hold every approximation of every layer against the exact block.

    Parameters
    ----------
    stats
        Statistics the approximations are made from.
    approximators
        Names, or a mapping of names to values; all named ones by default.
    metrics
        Names among `frobenius_error`, `cosine_similarity`, `trace_ratio`, and with
        `damping` `inverse_error`, with `gradient` too `direction_cosine`. All that the
        arguments allow by default.
    damping
        λ, a sequence of λ, or `RelativeDamping(α)`, a fraction of the mean eigenvalue.
    gradient
        Block name to w (d_out, d_in) or `MeanGradient`, for `direction_cosine`.
    reference
        Statistics of another Fisher to be called exact.
    budget
        Bytes one exact block may take where it has to be formed.
    progress
        Whether to show a bar.

    Returns
    -------
    xarray.Dataset
        Dims `layer`, `approximator` and, with damping, `damping`; NaN where a value is
        not to be had, with the reason in `status`; attributes tell how it was made.

    Raises
    ------
    ValueError
        For unknown names, a metric without what it needs, or a gradient that lacks
        a layer.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> ds = fl.compare(stats, ["kfac", "kpsvd"], damping=0.1)
    >>> dict(ds.sizes)
    {'layer': 1, 'approximator': 2, 'damping': 1}
    """
    chosen, levels = by_name(approximators), dampings(damping)
    asked = question(metrics, levels, gradient, stats, reference is not None)
    limit = parse_budget(budget)
    cells = _Cells(list(stats), list(chosen), len(levels.labels))
    _begin(cells, asked)
    status = np.full((len(stats), len(chosen)), "ok", dtype=object)
    for row, name in enumerate(_progress(stats, progress)):
        exact = ExactBlock()((reference or stats)[name])
        reasons = _fill_layer(cells, asked, stats[name], exact, chosen, limit)
        for column, found in enumerate(reasons.values()):
            if found:
                status[row, column] = "; ".join(dict.fromkeys(found))
    made = attributes(stats, chosen, damping_kind=levels.kind)
    if reference is not None:
        made["reference_fisher"] = reference.provenance.fisher
    return _dataset(cells, status, stats, levels, made)


def _begin(cells: _Cells, asked: Question) -> None:
    """Make every variable that was asked for, so that one without values is NaN."""
    if asked.dampings.labels:
        cells.begin("solve_flops", "")
    for name in ("stored_numbers", "converged", *asked.metrics):
        cells.begin(name, "", *([0] if name in DAMPED else []))


def _fill_layer(
    cells: _Cells,
    asked: Question,
    statistics: LayerStatistics,
    exact: FactoredFisher,
    chosen: Mapping[str, Approximator],
    limit: int,
) -> dict[str, list[str]]:
    """Fill the cells of one layer; return per method why values are missing.

    Dampings are the outer loop: the exact inverse of each serves every method.
    """
    name = statistics.name
    reasons: dict[str, list[str]] = {method: [] for method in chosen}
    built: dict[str, Operator] = {}
    _describe(cells, asked, name, exact)
    for method, approximator in chosen.items():
        try:
            built[method] = _build(approximator, statistics, exact)
        except NeedsSharedForm:
            reasons[method] = ["needs the inputs and output gradients of the layer"]
        except (BudgetError, NumericalError) as error:
            reasons[method] = [_reason(error)]
        else:
            reasons[method] = _fill_plain(
                cells, asked, (name, method), exact, built[method]
            )
    for level, damping in enumerate(asked.dampings.values(exact)):
        best: Tensor | None = None
        for method, approx in built.items():
            try:
                if best is None and "direction_cosine" in asked.metrics:
                    best = exact.to(torch.float64).solve(
                        asked.gradient[name].double(), damping
                    )
                cell = _DampedCell(name, method, level, damping, best)
                _fill_damped(cells, asked, cell, exact, approx, limit)
            except FisherlabError as error:
                label = asked.dampings.labels[level]
                reasons[method].append(f"damping {label:g}: {_reason(error)}")
    return reasons


def _build(
    approximator: Approximator, statistics: LayerStatistics, exact: FactoredFisher
) -> Operator:
    approx = approximator(statistics)
    if isinstance(approx, FactoredFisher) and approx.samples is exact.samples:
        return exact  # what it keeps (norm, inverse) serves both
    return approx


def _fill_plain(
    cells: _Cells,
    asked: Question,
    cell: tuple[str, str],
    exact: Operator,
    approx: Operator,
) -> list[str]:
    """Fill what needs no damping; return what is to be said of the cell."""
    cells.put("stored_numbers", approx.stored_numbers, *cell)
    cells.put("converged", _converged(approx), *cell)
    for metric in asked.metrics:
        if metric in PLAIN:
            value = PLAIN[metric][0](exact, approx, mixed=asked.mixed)
            cells.put(metric, value, *cell)
    if isinstance(approx, KroneckerSum) and not approx.converged:
        return [f"not converged (residual {approx.residual:.1g})"]
    return []


@dataclass(frozen=True, eq=False)
class _DampedCell:
    """One (layer, approximator, damping), and the exact direction if it is wanted."""

    layer: str
    method: str
    level: int
    damping: float
    best: Tensor | None


def _fill_damped(
    cells: _Cells,
    asked: Question,
    cell: _DampedCell,
    exact: Operator,
    approx: Operator,
    limit: int,
) -> None:
    place = cell.layer, cell.method
    if cell.level == 0:
        cells.put("solve_flops", approx.inverse(cell.damping).product_flops, *place)
    if cell.best is not None:
        value = formulas.direction_cosine(
            exact,
            approx,
            asked.gradient[cell.layer],
            cell.damping,
            best=cell.best,
            mixed=asked.mixed,
        )
        cells.put("direction_cosine", value, *place, cell.level)
    if "inverse_error" in asked.metrics:
        _require_room(exact, approx, limit)
        value = formulas.inverse_error(exact, approx, cell.damping, mixed=asked.mixed)
        cells.put("inverse_error", value, *place, cell.level)


def _require_room(exact: Operator, approx: Operator, limit: int) -> None:
    """Refuse dense inverses that exceed the budget, before they are formed."""
    several = isinstance(approx, KroneckerSum) and len(approx.terms) > 1
    needed = (6 if several else 3) * 8 * exact.shape[0] ** 2
    if needed > limit:
        raise BudgetError(
            f"inverse_error would form blocks of {readable(needed)}, more than the "
            f"budget of {readable(limit)}"
        )


def _describe(cells: _Cells, asked: Question, name: str, exact: Operator) -> None:
    cells.put("mean_eigenvalue", exact.trace() / max(exact.shape[0], 1), name)
    cells.put("fisher_norm", exact.frobenius_norm(), name)
    for level, damping in enumerate(asked.dampings.values(exact)):
        cells.put("lambda", damping, name, level)


def _converged(approx: Operator) -> float:
    if not isinstance(approx, KroneckerSum) or approx.iterations == 0:
        return -1.0
    return float(approx.converged)


def _reason(error: FisherlabError) -> str:
    if isinstance(error, IndefiniteError):
        return (
            f"not positive definite (smallest eigenvalue {error.smallest:.3g}, λ above "
            f"{error.sufficient:.3g} needed)"
        )
    return str(error).splitlines()[0]


def _dataset(
    cells: _Cells,
    status: Any,
    stats: Statistics,
    levels: Dampings,
    made: Mapping[str, str | int],
) -> xr.Dataset:
    dims = {
        1: ("layer",),
        2: ("layer", "approximator"),
        3: ("layer", "approximator", "damping"),
    }
    order = {name: place for place, name in enumerate(LABELS)}
    variables = {
        name: (("layer", "damping") if name == "lambda" else dims[array.ndim], array)
        for name, array in sorted(cells.arrays.items(), key=lambda item: order[item[0]])
    }
    variables["status"] = (dims[2], status)
    shapes = [stats[name].weight_shape for name in stats]
    coords: dict[str, Any] = {
        "layer": list(stats),
        "approximator": cells.methods,
        "d_out": ("layer", [shape[0] for shape in shapes]),
        "d_in": ("layer", [shape[1] for shape in shapes]),
        "positions": ("layer", [_positions(stats, name) for name in stats]),
    }
    if levels.labels:
        coords["damping"] = list(levels.labels)
    ds = xr.Dataset(variables, coords, dict(made))
    if "converged" in ds:
        ds["converged"] = ds["converged"].fillna(-1).astype("int8")
    for name in ds.data_vars:
        ds[name].attrs = {"long_name": LABELS[str(name)], "units": "1"}
    return ds


def _positions(stats: Statistics, name: str) -> int:
    return round(stats[name].positions / max(stats[name].count, 1))


def _progress(stats: Statistics, show: bool) -> Any:
    if not show:
        return stats
    from tqdm.auto import tqdm

    return tqdm(stats, desc="layers", unit="layer")
