"""Symmetric matrices over one weight, as immutable values."""

from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.dense import Dense
from fisherlab.operators.diagonal import Diagonal
from fisherlab.operators.factored import FactoredFisher
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.operators.kronecker_eigen import KroneckerEigen
from fisherlab.operators.mini_blocks import FactoredMiniBlocks, MiniBlocks, Partition

__all__ = [
    "Dense",
    "Diagonal",
    "FactoredFisher",
    "FactoredMiniBlocks",
    "KroneckerEigen",
    "KroneckerSum",
    "MiniBlocks",
    "Operator",
    "Partition",
    "Provenance",
]
