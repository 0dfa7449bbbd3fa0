"""Approximations of the Fisher of a whole network: all statistics in, one operator out."""

from fisherlab.approximators.base import NetworkApproximator as NetworkApproximator
from fisherlab.approximators.network.block_diagonal import PerBlock as PerBlock
from fisherlab.approximators.network.block_diagonal import block_diagonal as block_diagonal
from fisherlab.approximators.network.kfac_tridiagonal import (
    KFACTridiagonal as KFACTridiagonal,
)
from fisherlab.approximators.network.kfac_tridiagonal import KhatriRao as KhatriRao
from fisherlab.approximators.network.two_level_kfac import ExactNetwork as ExactNetwork
from fisherlab.approximators.network.two_level_kfac import TwoLevelKFAC as TwoLevelKFAC
from fisherlab.approximators.register import network_approximators as network_approximators
from fisherlab.approximators.register import network_by_name as network_by_name
