"""The border from torch to xarray: labelled comparisons of approximations."""

from fisherlab.analysis.comparison import compare, compare_networks
from fisherlab.analysis.coverages import Coverage, coverage
from fisherlab.analysis.decomposition import decompose
from fisherlab.analysis.densities import density
from fisherlab.analysis.estimates import Estimate, estimate
from fisherlab.analysis.files import open, save
from fisherlab.analysis.intervals import uncertainty
from fisherlab.analysis.inverses import inverse_blocks
from fisherlab.analysis.merging import merge
from fisherlab.analysis.pareto_front import front, pareto
from fisherlab.analysis.spectrum import rank_curve, spectra
from fisherlab.analysis.structures import structure
from fisherlab.analysis.sweeps import sweep
from fisherlab.analysis.verdicts import verdict
from fisherlab.operators.dampings import RelativeDamping

__all__ = [
    "Coverage",
    "Estimate",
    "RelativeDamping",
    "compare",
    "compare_networks",
    "coverage",
    "decompose",
    "density",
    "estimate",
    "front",
    "inverse_blocks",
    "merge",
    "open",
    "pareto",
    "rank_curve",
    "save",
    "spectra",
    "structure",
    "sweep",
    "uncertainty",
    "verdict",
]
