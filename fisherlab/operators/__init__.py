"""Symmetric matrices over one weight, as immutable values."""

from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.dampings import Damping, Factored, Tikhonov
from fisherlab.operators.dense import Dense
from fisherlab.operators.diagonal import Diagonal
from fisherlab.operators.factored import FactoredFisher
from fisherlab.operators.inverse_factors import InverseFactors
from fisherlab.operators.iterative import IterativeInverse, Stopping
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.operators.kronecker_congruence import KroneckerCongruence
from fisherlab.operators.kronecker_eigen import KroneckerEigen
from fisherlab.operators.kronecker_low_rank import KroneckerLowRank
from fisherlab.operators.kronecker_samples import KroneckerSamples
from fisherlab.operators.mini_blocks import FactoredMiniBlocks, MiniBlocks
from fisherlab.operators.partition import Partition
from fisherlab.operators.solved import SolvedByProducts

__all__ = [
    "Damping",
    "Dense",
    "Diagonal",
    "Factored",
    "FactoredFisher",
    "FactoredMiniBlocks",
    "InverseFactors",
    "IterativeInverse",
    "KroneckerCongruence",
    "KroneckerEigen",
    "KroneckerLowRank",
    "KroneckerSamples",
    "KroneckerSum",
    "MiniBlocks",
    "Operator",
    "Partition",
    "Provenance",
    "SolvedByProducts",
    "Stopping",
    "Tikhonov",
]
