"""Symmetric matrices over one weight, as immutable values."""

from fisherlab.operators.base import Operator, Provenance
from fisherlab.operators.dampings import Damping, Factored, RelativeDamping, Tikhonov
from fisherlab.operators.dense import Dense
from fisherlab.operators.eigenform import Eigenform
from fisherlab.operators.eigenforms import (
    Diagonal,
    KroneckerEigen,
    KroneckerLowRank,
    LowRank,
    RowwiseEigen,
    TensorEigen,
)
from fisherlab.operators.factored import FactoredFisher
from fisherlab.operators.factored_mini_blocks import FactoredMiniBlocks
from fisherlab.operators.gradient_roots import (
    OneSidedRoot,
    RotatedAdam,
    WhitenedRoot,
)
from fisherlab.operators.iterative import IterativeInverse, Stopping
from fisherlab.operators.kronecker import KroneckerSum
from fisherlab.operators.kronecker_congruence import KroneckerCongruence
from fisherlab.operators.kronecker_diagonal import KroneckerDiagonal
from fisherlab.operators.kronecker_samples import KroneckerSamples
from fisherlab.operators.mini_blocks import MiniBlocks
from fisherlab.operators.mode_products import ModeProducts
from fisherlab.operators.network import (
    BlockDiagonal,
    BlockTridiagonal,
    DirectSum,
    KroneckerBlocks,
    NetworkOperator,
    TwoLevel,
    WholeNetwork,
)
from fisherlab.operators.partition import Partition
from fisherlab.operators.quasi_diagonal import QuasiDiagonal, RootDiagonal
from fisherlab.operators.quasi_newton import InverseFactors, QuasiNewtonFactors
from fisherlab.operators.row_rank_one import RowRankOne
from fisherlab.operators.solved import SolvedByProducts
from fisherlab.operators.stacked import Stacked

__all__ = [
    "BlockDiagonal",
    "BlockTridiagonal",
    "Damping",
    "Dense",
    "Diagonal",
    "DirectSum",
    "Eigenform",
    "Factored",
    "FactoredFisher",
    "FactoredMiniBlocks",
    "InverseFactors",
    "IterativeInverse",
    "KroneckerBlocks",
    "KroneckerCongruence",
    "KroneckerDiagonal",
    "KroneckerEigen",
    "KroneckerLowRank",
    "KroneckerSamples",
    "KroneckerSum",
    "LowRank",
    "MiniBlocks",
    "ModeProducts",
    "NetworkOperator",
    "OneSidedRoot",
    "Operator",
    "Partition",
    "Provenance",
    "QuasiDiagonal",
    "QuasiNewtonFactors",
    "RelativeDamping",
    "RootDiagonal",
    "RotatedAdam",
    "RowRankOne",
    "RowwiseEigen",
    "SolvedByProducts",
    "Stacked",
    "Stopping",
    "TensorEigen",
    "Tikhonov",
    "TwoLevel",
    "WhitenedRoot",
    "WholeNetwork",
]
