"""Approximations made from statistics, with the reason where one cannot be had."""

from fisherlab.analysis.cells import REFUSALS, Cells, reason
from fisherlab.approximators import Approximator
from fisherlab.approximators.costs import result_numbers
from fisherlab.errors import NeedsSharedForm
from fisherlab.numerics.memory import require
from fisherlab.operators import Operator
from fisherlab.statistics import LayerStatistics


def build(
    cells: Cells,
    layer: LayerStatistics,
    method: str,
    approximator: Approximator,
    limit: int | None = None,
) -> Operator | None:
    """Return the approximation of a layer, or None with the reason noted.

    One that would hold more than `limit` bytes, in the float64 of the metrics, is not
    made at all.
    """
    if cells.leaves_out(layer.name, method, "matrix"):
        return None
    try:
        if limit is not None:
            require_room(layer, method, approximator, limit)
        return approximator(layer)
    except NeedsSharedForm:
        needed = "needs the inputs and output gradients of the layer"
        cells.blame(layer.name, method, needed)
    except REFUSALS as error:
        cells.blame(layer.name, method, f"{method} of {layer.name!r}: {reason(error)}")
    return None


def require_room(
    layer: LayerStatistics, method: str, approximator: Approximator, limit: int
) -> None:
    """Refuse an approximation whose numbers alone exceed a budget.

    Raises
    ------
    BudgetError
        Naming the bytes, the budget and the remedy.
    """
    numbers = result_numbers(approximator, layer.samples) or 0
    require(
        8 * numbers,
        limit,
        f"{method} of block {layer.name!r}",
        "Raise the budget, or leave the method or the layer out.",
    )
