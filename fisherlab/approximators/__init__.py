"""Approximations of a Fisher block: statistics in, an operator out."""

from fisherlab.approximators.base import Approximator, Streaming
from fisherlab.approximators.diagonal import Diagonal
from fisherlab.approximators.ekfac import EKFAC
from fisherlab.approximators.exact import ExactBlock
from fisherlab.approximators.kfac import KFAC
from fisherlab.approximators.kpsvd import KPSVD, Deflation, KFACCorrected
from fisherlab.approximators.mini_block import MiniBlock
from fisherlab.approximators.register import approximators, by_name
from fisherlab.approximators.solvers import (
    DenseSVD,
    Lanczos,
    Power,
    SampleGram,
    Subspace,
)
from fisherlab.approximators.streaming import approximate
from fisherlab.approximators.tkfac import TKFAC

__all__ = [
    "EKFAC",
    "KFAC",
    "KPSVD",
    "TKFAC",
    "Approximator",
    "Deflation",
    "DenseSVD",
    "Diagonal",
    "ExactBlock",
    "KFACCorrected",
    "Lanczos",
    "MiniBlock",
    "Power",
    "SampleGram",
    "Streaming",
    "Subspace",
    "approximate",
    "approximators",
    "by_name",
]
