"""The border from torch to xarray: labelled comparisons of approximations."""

from fisherlab.analysis.comparison import compare as compare
from fisherlab.analysis.comparison import compare_networks as compare_networks
from fisherlab.analysis.coverages import Coverage as Coverage
from fisherlab.analysis.coverages import coverage as coverage
from fisherlab.analysis.decomposition import decompose as decompose
from fisherlab.analysis.estimates import Estimate as Estimate
from fisherlab.analysis.estimates import estimate as estimate
from fisherlab.analysis.files import merge as merge
from fisherlab.analysis.files import open as open
from fisherlab.analysis.files import save as save
from fisherlab.analysis.intervals import uncertainty as uncertainty
from fisherlab.analysis.inverses import inverse_blocks as inverse_blocks
from fisherlab.analysis.pareto_front import front as front
from fisherlab.analysis.pareto_front import pareto as pareto
from fisherlab.analysis.spectra import density as density
from fisherlab.analysis.spectra import rank_curve as rank_curve
from fisherlab.analysis.spectra import spectra as spectra
from fisherlab.analysis.structures import structure as structure
from fisherlab.analysis.sweeps import sweep as sweep
from fisherlab.analysis.verdicts import verdict as verdict
from fisherlab.operators.base import RelativeDamping as RelativeDamping
