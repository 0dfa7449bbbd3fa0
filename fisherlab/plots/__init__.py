"""Figures from labelled results; importing it registers the accessor `.fisherlab`.

Axes-level functions take `ax=` and return the axes, faceted ones return a
`seaborn.FacetGrid`. Nothing is shown and no global setting is changed.
"""

from fisherlab.catalogue import QUANTITIES as QUANTITIES
from fisherlab.catalogue import Quantity as Quantity
from fisherlab.catalogue import quantity as quantity
from fisherlab.plots.accessor import DatasetAccessor as DatasetAccessor
from fisherlab.plots.accessor import TreeAccessor as TreeAccessor
from fisherlab.plots.costs import cost as cost
from fisherlab.plots.costs import pareto as pareto
from fisherlab.plots.curves import density as density
from fisherlab.plots.curves import rank_curve as rank_curve
from fisherlab.plots.curves import spectra as spectra
from fisherlab.plots.decomposition import decomposition as decomposition
from fisherlab.plots.decomposition import error_sources as error_sources
from fisherlab.plots.explorer import Explorer as Explorer
from fisherlab.plots.explorer import explore as explore
from fisherlab.plots.frames import table as table
from fisherlab.plots.matrices import heatmap as heatmap
from fisherlab.plots.matrices import inverse_heatmap as inverse_heatmap
from fisherlab.plots.matrices import kernels as kernels
from fisherlab.plots.profiles import direction_cosines as direction_cosines
from fisherlab.plots.profiles import errors as errors
from fisherlab.plots.purposes import own_dampings as own_dampings
from fisherlab.plots.purposes import purposes as purposes
from fisherlab.plots.saving import save as save
from fisherlab.plots.style import Style as Style
from fisherlab.plots.style import publication as publication
from fisherlab.plots.style import styles as styles
from fisherlab.plots.tables import coverage_map as coverage_map
from fisherlab.plots.tables import layer_table as layer_table
from fisherlab.plots.trajectories import Live as Live
from fisherlab.plots.trajectories import damping_sweep as damping_sweep
from fisherlab.plots.trajectories import losses as losses
from fisherlab.plots.trajectories import runs as runs
from fisherlab.plots.trajectories import trajectory as trajectory
