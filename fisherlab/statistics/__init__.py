"""What approximators consume: per-example gradients, collected through torch.func."""

from fisherlab.statistics.collect import MeanGradient as MeanGradient
from fisherlab.statistics.collect import collect as collect
from fisherlab.statistics.collect import mean_gradient as mean_gradient
from fisherlab.statistics.collect import stream as stream
from fisherlab.statistics.fishers import Empirical as Empirical
from fisherlab.statistics.fishers import Exact as Exact
from fisherlab.statistics.fishers import Fisher as Fisher
from fisherlab.statistics.fishers import ImprovedEmpirical as ImprovedEmpirical
from fisherlab.statistics.fishers import MonteCarlo as MonteCarlo
from fisherlab.statistics.network import FullMatrix as FullMatrix
from fisherlab.statistics.network import Layers as Layers
from fisherlab.statistics.network import Statistics as Statistics
from fisherlab.statistics.network import cross_block as cross_block
from fisherlab.statistics.network import full_matrix as full_matrix
from fisherlab.statistics.values import LayerStatistics as LayerStatistics
