"""Matrices over the weights of several blocks, as immutable values."""

from fisherlab.operators.network.base import BlockDiagonal as BlockDiagonal
from fisherlab.operators.network.base import DirectSum as DirectSum
from fisherlab.operators.network.base import NetworkOperator as NetworkOperator
from fisherlab.operators.network.base import WholeNetwork as WholeNetwork
from fisherlab.operators.network.block_tridiagonal import (
    BlockTridiagonal as BlockTridiagonal,
)
from fisherlab.operators.network.block_tridiagonal import (
    BlockTridiagonalInverse as BlockTridiagonalInverse,
)
from fisherlab.operators.network.kronecker_blocks import KroneckerBlocks as KroneckerBlocks
from fisherlab.operators.network.two_level import (
    AdaptiveTwoLevelInverse as AdaptiveTwoLevelInverse,
)
from fisherlab.operators.network.two_level import TwoLevel as TwoLevel
from fisherlab.operators.network.two_level import TwoLevelInverse as TwoLevelInverse
