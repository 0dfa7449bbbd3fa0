"""Every approximation beside the exact block, as one labelled Dataset."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from fisherlab import metrics as formulas
from fisherlab.analysis.damping import Damping, Dampings, dampings
from fisherlab.analysis.provenance import attributes
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
from fisherlab.statistics import MeanGradient, Statistics

PLAIN: dict[str, tuple[Callable[..., float], str]] = {
    "frobenius_error": (formulas.frobenius_error, "relative Frobenius error"),
    "cosine_similarity": (formulas.cosine_similarity, "matrix cosine"),
    "trace_ratio": (formulas.trace_ratio, "trace ratio"),
}
DAMPED = {
    "inverse_error": "relative error of the damped inverse",
    "direction_cosine": "cosine of the update directions",
}
LABELS = (
    {name: label for name, (_, label) in PLAIN.items()}
    | DAMPED
    | {
        "lambda": "damping λ",
        "mean_eigenvalue": "mean eigenvalue tr F / p",
        "fisher_norm": "Frobenius norm of the exact block",
        "stored_numbers": "numbers held by the approximation",
        "solve_flops": "multiply-adds of one preconditioning",
        "converged": "1 converged, 0 not, -1 no iteration",
        "status": "ok, or why a value is missing",
    }
)


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


@dataclass(frozen=True, eq=False)
class _Question:
    """What is asked of every cell."""

    metrics: tuple[str, ...]
    dampings: Dampings
    gradient: Mapping[str, Tensor]
    mixed: bool


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
    directions = _directions(gradient, stats)
    question = _Question(
        _metrics(metrics, levels, directions), levels, directions, reference is not None
    )
    limit = parse_budget(budget)
    cells = _Cells(list(stats), list(chosen), len(levels.labels))
    _begin(cells, question)
    status = np.full((len(stats), len(chosen)), "ok", dtype=object)
    for row, name in enumerate(_progress(stats, progress)):
        exact = ExactBlock()((reference or stats)[name])
        _describe(cells, question, name, exact)
        for column, (method, approximator) in enumerate(chosen.items()):
            reasons = _fill(
                cells, question, stats, (name, method), exact, approximator, limit
            )
            if reasons:
                status[row, column] = "; ".join(dict.fromkeys(reasons))
    made = attributes(stats, chosen, damping_kind=levels.kind)
    if reference is not None:
        made["reference_fisher"] = reference.provenance.fisher
    return _dataset(cells, status, stats, levels, made)


def _begin(cells: _Cells, question: _Question) -> None:
    """Make every variable that was asked for, so that one without values is NaN."""
    if question.dampings.labels:
        cells.begin("solve_flops", "")
    for name in ("stored_numbers", "converged", *question.metrics):
        cells.begin(name, "", *([0] if name in DAMPED else []))


def _fill(
    cells: _Cells,
    question: _Question,
    stats: Statistics,
    cell: tuple[str, str],
    exact: FactoredFisher,
    approximator: Approximator,
    limit: int,
) -> list[str]:
    """Fill one (layer, approximator) cell; return why values are missing."""
    name = cell[0]
    try:
        approx = approximator(stats[name])
    except NeedsSharedForm:
        return ["needs the inputs and output gradients of the layer"]
    except (BudgetError, NumericalError) as error:
        return [_reason(error)]
    if isinstance(approx, FactoredFisher) and approx.samples is exact.samples:
        approx = exact  # what it keeps (norm, inverse) serves both
    cells.put("stored_numbers", approx.stored_numbers, *cell)
    cells.put("converged", _converged(approx), *cell)
    reasons: list[str] = []
    for metric in question.metrics:
        if metric in PLAIN:
            value = PLAIN[metric][0](exact, approx, mixed=question.mixed)
            cells.put(metric, value, *cell)
    if isinstance(approx, KroneckerSum) and not approx.converged:
        reasons.append(f"not converged (residual {approx.residual:.1g})")
    for level, damping in enumerate(question.dampings.values(exact)):
        try:
            _fill_damped(cells, question, cell, level, damping, exact, approx, limit)
        except FisherlabError as error:
            label = question.dampings.labels[level]
            reasons.append(f"damping {label:g}: {_reason(error)}")
    return reasons


def _fill_damped(
    cells: _Cells,
    question: _Question,
    cell: tuple[str, str],
    level: int,
    damping: float,
    exact: Operator,
    approx: Operator,
    limit: int,
) -> None:
    if level == 0:
        cells.put("solve_flops", approx.inverse(damping).product_flops, *cell)
    if "direction_cosine" in question.metrics:
        value = formulas.direction_cosine(
            exact, approx, question.gradient[cell[0]], damping, mixed=question.mixed
        )
        cells.put("direction_cosine", value, *cell, level)
    if "inverse_error" in question.metrics:
        needed = 3 * 8 * exact.shape[0] ** 2
        if needed > limit:
            raise BudgetError(
                f"inverse_error would form blocks of {readable(needed)}, more than the "
                f"budget of {readable(limit)}"
            )
        value = formulas.inverse_error(exact, approx, damping, mixed=question.mixed)
        cells.put("inverse_error", value, *cell, level)


def _describe(cells: _Cells, question: _Question, name: str, exact: Operator) -> None:
    cells.put("mean_eigenvalue", exact.trace() / max(exact.shape[0], 1), name)
    cells.put("fisher_norm", exact.frobenius_norm(), name)
    for level, damping in enumerate(question.dampings.values(exact)):
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


def _metrics(
    wanted: Sequence[str] | None, levels: Dampings, gradient: Mapping[str, Tensor]
) -> tuple[str, ...]:
    possible = list(PLAIN)
    if levels.labels:
        possible += ["inverse_error"] + (["direction_cosine"] if gradient else [])
    if wanted is None:
        return tuple(possible)
    known = [*PLAIN, *DAMPED]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        msg = f"compare: metrics {unknown} are unknown; known: {', '.join(known)}."
        raise ValueError(msg)
    lacking = [name for name in wanted if name not in possible]
    if lacking:
        msg = (
            f"compare: {', '.join(lacking)} needs `damping`"
            f"{' and `gradient`' if 'direction_cosine' in lacking else ''}."
        )
        raise ValueError(msg)
    return tuple(wanted)


def _directions(gradient: Mapping[str, Any] | None, stats: Statistics) -> dict[str, Tensor]:
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
            msg = (
                f"compare: the gradient of {name!r} has shape {tuple(w.shape)}, "
                f"{stats[name].weight_shape} is expected."
            )
            raise ValueError(msg)
        found[name] = w
    return found


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
