"""What approximators consume: per-example gradients, collected through torch.func."""

from fisherlab.statistics.collect import collect, stream
from fisherlab.statistics.fishers import (
    Empirical,
    Exact,
    Fisher,
    ImprovedEmpirical,
    MonteCarlo,
)
from fisherlab.statistics.mean import mean_gradient
from fisherlab.statistics.network import FullMatrix, cross_block, full_matrix
from fisherlab.statistics.values import LayerStatistics, MeanGradient, Statistics

__all__ = [
    "Empirical",
    "Exact",
    "Fisher",
    "FullMatrix",
    "ImprovedEmpirical",
    "LayerStatistics",
    "MeanGradient",
    "MonteCarlo",
    "Statistics",
    "collect",
    "cross_block",
    "full_matrix",
    "mean_gradient",
    "stream",
]
