"""Damping sweeps: every damped metric over decades, each operator decomposed once."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
import xarray as xr

from fisherlab.analysis.cells import Cells, attributes, layer_coordinates, reason
from fisherlab.analysis.damping import Damping, dampings
from fisherlab.analysis.metric_table import eigenbases, locate, mean_gradients, pairs_of
from fisherlab.approximators import ExactBlock
from fisherlab.approximators.register import Chosen, by_name
from fisherlab.errors import FisherlabError
from fisherlab.metrics.pairs import Pair
from fisherlab.metrics.sweeps import OF_DIRECTIONS, OF_MATRICES, curve
from fisherlab.operators import Eigenform, Operator
from fisherlab.operators.dampings import Factored, RelativeDamping
from fisherlab.statistics import Statistics

DECADES: Final = RelativeDamping([10.0**power for power in range(-6, 3)])


def sweep(
    stats: Statistics,
    approximators: Chosen = None,
    *,
    damping: Damping = DECADES,
    gradient: Mapping[str, Any] | None = None,
    metrics: Sequence[str] | None = None,
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

    Returns
    -------
    xarray.Dataset
        The schema of `compare` with dims `layer`, `approximator`, `damping`; NaN with a
        reason in `status` where a damped matrix is not positive definite or an operator
        has no eigenbasis at hand.

    Raises
    ------
    ValueError
        For unknown names, or directions without a gradient.

    Notes
    -----
    One eigendecomposition of each operator, whatever the number of dampings.

    Examples
    --------
    >>> import torch, fisherlab as fl
    >>> data = (torch.rand(20, 3).double(), None)
    >>> stats = fl.collect(torch.nn.Linear(3, 2).double(), data, fl.Categorical())
    >>> ds = fl.sweep(stats, ["kfac"])
    >>> dict(ds.sizes)
    {'layer': 1, 'approximator': 1, 'damping': 9}
    """
    chosen, levels = by_name(approximators), dampings(damping)
    directions = mean_gradients(gradient, stats)
    wanted = _wanted(metrics, bool(directions))
    cells = Cells(list(stats), list(chosen), levels)
    for metric in wanted:
        cells.begin(metric, "", 0)
    for layer in stats.values():
        exact = ExactBlock()(layer).to(torch.float64)
        locate(cells, layer.name, exact)
        pairs = pairs_of(cells, "sweep", layer, exact, chosen)
        _fill(cells, (layer.name, exact), pairs, directions.get(layer.name), wanted)
    made = attributes(stats, chosen, analysis="sweep", damping_kind=levels.kind)
    return cells.dataset(layer_coordinates(stats), made)


def _wanted(metrics: Sequence[str] | None, with_gradient: bool) -> tuple[str, ...]:
    possible = (*OF_MATRICES, *(OF_DIRECTIONS if with_gradient else ()))
    if metrics is None:
        return possible
    unknown = [name for name in metrics if name not in possible]
    if unknown:
        msg = (
            f"sweep: metrics {unknown} are not to be had; possible"
            f"{'' if with_gradient else ' without a gradient'}: {', '.join(possible)}."
        )
        raise ValueError(msg)
    return tuple(metrics)


def _fill(
    cells: Cells,
    reference: tuple[str, Operator],
    pairs: Mapping[str, Pair],
    gradient: torch.Tensor | None,
    wanted: Sequence[str],
) -> None:
    """Fill one row from eigenbases; a factored damping has one of its own."""
    name, exact = reference
    shifts, mine = cells.dampings.values(exact), None
    for method, pair in pairs.items():
        try:
            mine, other = eigenbases("sweep", pair, mine)
        except FisherlabError as error:
            cells.blame(name, method, reason(error))
            continue
        found = curve(mine, other, shifts, gradient)
        for level, damping in enumerate(cells.dampings.each):
            at, told = level, found
            if isinstance(damping, Factored):
                try:
                    damped = pair.damped(damping)
                    _, shifted = eigenbases("sweep", damped.pair, mine)
                except (FisherlabError, ValueError) as error:
                    cells.blame_damping(name, method, level, error)
                    continue
                at, told = 0, curve(mine, shifted, [damped.damping], gradient)
            for metric in wanted:
                cells.put(metric, told[metric][at], name, method, level)
        _blame_hidden(cells, (name, method), mine, other, shifts)


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
