"""Approximations of the Fisher of a whole network: all statistics in, one operator out."""

from fisherlab.approximators.network.base import NetworkApproximator, NetworkStreaming
from fisherlab.approximators.network.block_diagonal import PerBlock, block_diagonal
from fisherlab.approximators.network.kfac_tridiagonal import KFACTridiagonal
from fisherlab.approximators.network.khatri_rao import KhatriRao
from fisherlab.approximators.network.register import (
    network_approximators,
    network_by_name,
)
from fisherlab.approximators.network.streaming import approximate_network
from fisherlab.approximators.network.two_level_kfac import ExactNetwork, TwoLevelKFAC

__all__ = [
    "ExactNetwork",
    "KFACTridiagonal",
    "KhatriRao",
    "NetworkApproximator",
    "NetworkStreaming",
    "PerBlock",
    "TwoLevelKFAC",
    "approximate_network",
    "block_diagonal",
    "network_approximators",
    "network_by_name",
]
