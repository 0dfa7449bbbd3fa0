"""The border from torch to xarray: labelled comparisons of approximations."""

from fisherlab.analysis.comparison import compare
from fisherlab.analysis.damping import RelativeDamping
from fisherlab.analysis.files import open, save
from fisherlab.analysis.inverses import inverse_blocks

__all__ = ["RelativeDamping", "compare", "inverse_blocks", "open", "save"]
