"""Approximations made from statistics, with the reason where one cannot be had."""

from fisherlab.analysis.cells import REFUSALS, Cells, reason
from fisherlab.approximators import Approximator
from fisherlab.errors import NeedsSharedForm
from fisherlab.operators import Operator
from fisherlab.statistics import LayerStatistics


def build(
    cells: Cells, layer: LayerStatistics, method: str, approximator: Approximator
) -> Operator | None:
    """Return the approximation of a layer, or None with the reason noted."""
    if cells.leaves_out(layer.name, method, "matrix"):
        return None
    try:
        return approximator(layer)
    except NeedsSharedForm:
        needed = "needs the inputs and output gradients of the layer"
        cells.blame(layer.name, method, needed)
    except REFUSALS as error:
        cells.blame(layer.name, method, f"{method} of {layer.name!r}: {reason(error)}")
    return None
