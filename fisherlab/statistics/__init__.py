"""What approximators consume: per-example gradients, collected through torch.func."""

from fisherlab.statistics.collect import collect, mean_gradient, stream
from fisherlab.statistics.fishers import Empirical, Exact, Fisher, MonteCarlo
from fisherlab.statistics.values import LayerStatistics, MeanGradient, Statistics

__all__ = [
    "Empirical",
    "Exact",
    "Fisher",
    "LayerStatistics",
    "MeanGradient",
    "MonteCarlo",
    "Statistics",
    "collect",
    "mean_gradient",
    "stream",
]
