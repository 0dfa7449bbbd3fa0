"""The border from torch to xarray: labelled comparisons of approximations."""

from fisherlab.analysis.comparison import compare
from fisherlab.analysis.coverages import Coverage, coverage
from fisherlab.analysis.damping import RelativeDamping
from fisherlab.analysis.estimates import Estimate, estimate
from fisherlab.analysis.files import open, save
from fisherlab.analysis.inverses import inverse_blocks

__all__ = [
    "Coverage",
    "Estimate",
    "RelativeDamping",
    "compare",
    "coverage",
    "estimate",
    "inverse_blocks",
    "open",
    "save",
]
