"""Symmetric matrices over one weight, as immutable values."""

from fisherlab.operators.base import Damping as Damping
from fisherlab.operators.base import Factored as Factored
from fisherlab.operators.base import Operator as Operator
from fisherlab.operators.base import Provenance as Provenance
from fisherlab.operators.base import RelativeDamping as RelativeDamping
from fisherlab.operators.base import Tikhonov as Tikhonov
from fisherlab.operators.dense import Dense as Dense
from fisherlab.operators.eigenform import Diagonal as Diagonal
from fisherlab.operators.eigenform import Eigenform as Eigenform
from fisherlab.operators.eigenform import KroneckerEigen as KroneckerEigen
from fisherlab.operators.eigenform import KroneckerLowRank as KroneckerLowRank
from fisherlab.operators.eigenform import LowRank as LowRank
from fisherlab.operators.eigenform import RowwiseEigen as RowwiseEigen
from fisherlab.operators.eigenform import TensorEigen as TensorEigen
from fisherlab.operators.factored import FactoredFisher as FactoredFisher
from fisherlab.operators.factored_mini_blocks import (
    FactoredMiniBlocks as FactoredMiniBlocks,
)
from fisherlab.operators.gradient_roots import ModeProducts as ModeProducts
from fisherlab.operators.gradient_roots import OneSidedRoot as OneSidedRoot
from fisherlab.operators.gradient_roots import QuasiDiagonal as QuasiDiagonal
from fisherlab.operators.gradient_roots import RootDiagonal as RootDiagonal
from fisherlab.operators.gradient_roots import RotatedAdam as RotatedAdam
from fisherlab.operators.gradient_roots import RowRankOne as RowRankOne
from fisherlab.operators.gradient_roots import WhitenedRoot as WhitenedRoot
from fisherlab.operators.iterative import IterativeInverse as IterativeInverse
from fisherlab.operators.iterative import SolvedByProducts as SolvedByProducts
from fisherlab.operators.iterative import Stopping as Stopping
from fisherlab.operators.kronecker import KroneckerSamples as KroneckerSamples
from fisherlab.operators.kronecker import KroneckerSum as KroneckerSum
from fisherlab.operators.kronecker_congruence import (
    KroneckerCongruence as KroneckerCongruence,
)
from fisherlab.operators.kronecker_diagonal import KroneckerDiagonal as KroneckerDiagonal
from fisherlab.operators.mini_blocks import MiniBlocks as MiniBlocks
from fisherlab.operators.mini_blocks import Partition as Partition
from fisherlab.operators.network import BlockDiagonal as BlockDiagonal
from fisherlab.operators.network import BlockTridiagonal as BlockTridiagonal
from fisherlab.operators.network import DirectSum as DirectSum
from fisherlab.operators.network import KroneckerBlocks as KroneckerBlocks
from fisherlab.operators.network import NetworkOperator as NetworkOperator
from fisherlab.operators.network import TwoLevel as TwoLevel
from fisherlab.operators.network import WholeNetwork as WholeNetwork
from fisherlab.operators.quasi_newton import InverseFactors as InverseFactors
from fisherlab.operators.quasi_newton import QuasiNewtonFactors as QuasiNewtonFactors
from fisherlab.operators.stacked import Stacked as Stacked
