"""Error against cost: what each approximation takes, and which ones nothing beats."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
import xarray as xr

from fisherlab.analysis.cells import (
    Damping,
    Telling,
    attributes,
    dampings,
    described,
    layer_coordinates,
    reason,
    require_room,
    watched,
)
from fisherlab.analysis.metric_table import require_inverses
from fisherlab.approximators import Approximator, ExactBlock
from fisherlab.approximators.base import building_flops, operator_of
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.catalogue import METRICS
from fisherlab.errors import FisherlabError
from fisherlab.metrics.pairs import paired
from fisherlab.metrics.register import entries
from fisherlab.numerics.devices import Budget, parse_budget, wait
from fisherlab.operators import Operator
from fisherlab.operators.base import Factored, RelativeDamping, Tikhonov
from fisherlab.settings import numeric
from fisherlab.statistics import Layers, LayerStatistics, Statistics

COSTS: Final = {
    "stored_bytes": "byte",
    "build_flops": "multiply-add",
    "solve_flops": "multiply-add",
    "build_seconds": "s",
    "inverse_seconds": "s",
    "solve_seconds": "s",
}
PLACES = {name: at for at, name in enumerate(COSTS)}
DAMPING: Final = RelativeDamping(1e-2)
_LABELS = {
    "error": "error",
    "cost_value": "what the approximation costs",
    "on_front": "1 if nothing is both cheaper and closer, 0 if something is, -1 unknown",
}


@numeric
def pareto(
    stats: Layers,
    approximators: Chosen = None,
    *,
    error: str = "frobenius_error",
    damping: Damping = DAMPING,
    repeats: int = 3,
    budget: Budget = None,
    progress: Telling = False,
) -> xr.Dataset:
    """Measure the error and the costs of every approximation, and mark the fronts.

    Parameters
    ----------
    stats
        Statistics of the layers.
    approximators
        Names, or a mapping of names to values; all named ones by default.
    error
        A metric whose low values are good, that needs at most a damping.
    damping
        One λ, or `RelativeDamping(α)`, of the inverse that is timed.
    repeats
        The best of so many timings counts.
    budget
        Bytes that one approximation, or the inverses of one error, may take; what takes
        more is left out, with the reason in `status`.
    progress
        Show a bar, or call a function with a `Done` after every layer.

    Returns
    -------
    xarray.Dataset
        `error(layer, approximator)`, `cost_value` and `on_front` over (layer,
        approximator, cost), `status`. The costs: `stored_bytes`, `build_flops` (NaN for a
        method that is not counted), `solve_flops` of one preconditioning, and the seconds
        of building, of inverting, and of one preconditioning with the inverse at hand.

    Raises
    ------
    ValueError
        For an unknown or unfit metric, several dampings, or no repeats.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> ds = fl.pareto(stats, ["kfac", "diagonal"], repeats=1)
    >>> ds.on_front.sel(cost="stored_bytes").values.tolist()
    [[1, 1]]
    """
    stats = Statistics.of(stats, "pareto")
    levels = dampings(damping)
    fit = [n for n, e in METRICS.items() if e.best == "low" and e.needs != "gradient"]
    if error not in fit:
        raise ValueError(f"pareto(error={error!r}): one of {', '.join(fit)} is expected.")
    if len(levels.labels) != 1 or repeats < 1:
        msg = f"pareto: one damping and repeats ≥ 1, not {levels.labels} and {repeats}."
        raise ValueError(msg)
    entry = entries()[error]
    chosen, limit = by_name(approximators), parse_budget(budget)
    shape = len(stats), len(chosen)
    errors, status = np.full(shape, np.nan), np.full(shape, "ok", dtype=object)
    costs = np.full((*shape, len(COSTS)), np.nan)
    for row, place in enumerate(watched(stats, progress)):
        layer = stats[place]
        exact = ExactBlock()(layer).to(torch.float64)
        for column, (name, method) in enumerate(chosen.items()):
            try:
                require_room(layer, name, method, limit)
                (value,) = levels.read(exact)
                approx = _building(costs[row, column], layer, method, repeats)
                pair = paired("pareto", exact, approx, mixed=False)
                if entry.needs != "matrix":
                    require_inverses("pareto", pair, limit)
                asked: Any = pair if entry.needs == "matrix" else pair.damped(value)
                errors[row, column] = entry.of(asked)
                _solving(costs[row, column], layer, method, value, repeats)
            except (FisherlabError, ValueError) as problem:
                status[row, column] = reason(problem)
    made: dict[str, Any] = {"metric": error, "damping": levels.labels[0]}
    made |= attributes(stats, chosen, analysis="pareto", damping_kind=levels.kind)
    return _labelled(stats, list(chosen), errors, costs, status, made)


def _building(
    out: np.ndarray, layer: LayerStatistics, method: Approximator, repeats: int
) -> Operator:
    """Write what one approximation costs to build and to hold, and return it."""
    flops = building_flops(method, layer.samples)
    out[PLACES["build_flops"]] = np.nan if flops is None else flops
    out[PLACES["build_seconds"]], approx = _timed(
        lambda: operator_of(method, layer), repeats
    )
    out[PLACES["stored_bytes"]] = approx.stored_numbers * approx.dtype.itemsize
    return approx


def _solving(
    out: np.ndarray,
    layer: LayerStatistics,
    method: Approximator,
    damping: Tikhonov | Factored,
    repeats: int,
) -> None:
    """Write what its damped inverse costs, where there is one."""
    seconds, inverse = _timed(lambda: operator_of(method, layer).inverse(damping), repeats)
    built = out[PLACES["build_seconds"]]
    out[PLACES["inverse_seconds"]] = max(seconds - built, 0.0)
    w = torch.ones(layer.weight_shape, dtype=inverse.dtype, device=inverse.device)
    out[PLACES["solve_flops"]] = inverse.product_flops
    out[PLACES["solve_seconds"]], _ = _timed(lambda: inverse @ w, repeats)


def _timed(action: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Return the best seconds of some calls, and what the last one returned."""
    best, result = float("inf"), None
    for _ in range(repeats):
        result = None  # freed before the next is made
        wait()
        start = time.perf_counter()
        result = action()
        wait()
        best = min(best, time.perf_counter() - start)
    return best, result


def _labelled(
    stats: Statistics,
    methods: list[str],
    errors: np.ndarray,
    costs: np.ndarray,
    status: np.ndarray,
    made: Mapping[str, Any],
) -> xr.Dataset:
    dims = ("layer", "approximator")
    coords = layer_coordinates(stats) | {"approximator": methods, "cost": list(COSTS)}
    coords["cost_units"] = ("cost", list(COSTS.values()))
    ds = xr.Dataset(
        {
            "error": (dims, errors),
            "cost_value": ((*dims, "cost"), costs),
            "status": (dims, status),
        },
        coords,
        dict(made),
    )
    ds["on_front"] = front(ds["error"], ds["cost_value"])
    return described(ds, _LABELS | {"error": METRICS[made["metric"]].attrs["long_name"]})


def front(
    error: xr.DataArray, cost: xr.DataArray, dim: str = "approximator"
) -> xr.DataArray:
    """Mark the entries of a dim that no other one beats in both error and cost.

    Parameters
    ----------
    error, cost
        Low is good in both; broadcast against each other. Infinite and NaN entries are
        unknown.
    dim
        The dim whose entries compete.

    Returns
    -------
    xarray.DataArray
        int8: 1 on the front, 0 beaten (another is at most as high in both and lower in
        one), -1 unknown.

    Raises
    ------
    ValueError
        If one of the two lacks the dim.

    Examples
    --------
    >>> names = {"approximator": ["a", "b", "c"]}
    >>> error = xr.DataArray([0.1, 0.5, 0.6], names)
    >>> front(error, xr.DataArray([9.0, 1.0, 2.0], names)).values.tolist()
    [1, 1, 0]
    """
    if dim not in error.dims or dim not in cost.dims:
        msg = f"front: both arrays need the dim {dim!r}; {error.dims} and {cost.dims}."
        raise ValueError(msg)
    error, cost = xr.broadcast(error, cost)
    known = np.isfinite(error) & np.isfinite(cost)
    twin = f"{dim}_rival"
    rivals = [one.where(known).rename({dim: twin}) for one in (error, cost)]
    no_worse = (rivals[0] <= error) & (rivals[1] <= cost)
    better = (rivals[0] < error) | (rivals[1] < cost)
    beaten = (no_worse & better).any(twin)
    return (~beaten).astype("int8").where(known, -1).transpose(*cost.dims)
