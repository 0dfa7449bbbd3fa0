"""Approximations made from statistics, with the reason where one cannot be had."""

from dataclasses import replace

from fisherlab.analysis.cells import REFUSALS, Cells, reason
from fisherlab.approximators import Approximator
from fisherlab.errors import NeedsSharedForm
from fisherlab.metrics.pairs import Pair, paired
from fisherlab.operators import FactoredFisher, FactoredMiniBlocks, Operator
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


def shared_pair(
    exact: FactoredFisher, double: FactoredFisher, approx: Operator, mixed: bool
) -> Pair:
    """Pair an approximation with the exact block, in float64 and on shared samples.

    What the samples keep (Gram matrices, inverses) then serves both.

    Parameters
    ----------
    exact
        The exact block in the precision of the statistics.
    double
        The same in float64.
    approx
        The approximation.
    mixed
        Whether two kinds of Fisher may be compared.
    """
    if isinstance(approx, FactoredFisher) and approx.samples is exact.samples:
        return Pair(double, double)
    if isinstance(approx, FactoredMiniBlocks) and approx.samples is exact.samples:
        approx = replace(approx, samples=double.samples)
    return paired("compare", double, approx, mixed)
