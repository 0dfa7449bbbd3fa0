"""Approximations of the Fisher of a whole network: all statistics in, one operator out."""

from fisherlab.approximators.base import NetworkApproximator
from fisherlab.approximators.network.block_diagonal import PerBlock, block_diagonal
from fisherlab.approximators.network.kfac_tridiagonal import KFACTridiagonal
from fisherlab.approximators.network.khatri_rao import KhatriRao
from fisherlab.approximators.network.two_level_kfac import ExactNetwork, TwoLevelKFAC
from fisherlab.approximators.register import network_approximators, network_by_name

__all__ = [
    "ExactNetwork",
    "KFACTridiagonal",
    "KhatriRao",
    "NetworkApproximator",
    "PerBlock",
    "TwoLevelKFAC",
    "block_diagonal",
    "network_approximators",
    "network_by_name",
]
