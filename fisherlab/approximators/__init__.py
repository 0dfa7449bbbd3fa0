"""Approximations of a Fisher block: statistics in, an operator out."""

import sys
from types import ModuleType

# isort: off
# The methods in the order in which tables show them: each names itself as it is imported.
from fisherlab.approximators.blocks.exact import ExactBlock, LowRank
from fisherlab.approximators.kronecker.kfac import FOOF, KFAC
from fisherlab.approximators.kronecker.eigenvalues import EKFAC, SOAP, TEKFAC
from fisherlab.approximators.kronecker.partial_traces import TKFAC, Muon, Shampoo
from fisherlab.approximators.kronecker.kl_shampoo import KLShampoo
from fisherlab.approximators.kronecker.recurrent import RecurrentKFAC
from fisherlab.approximators.kronecker.cg_fac import CGFAC
from fisherlab.approximators.kpsvd.kpsvd import KPSVD
from fisherlab.approximators.kpsvd.deflation import Deflation
from fisherlab.approximators.kpsvd.kfac_corrected import KFACCorrected
from fisherlab.approximators.blocks.mini_block import ByInput, ByOutput, ByTile, MiniBlock
from fisherlab.approximators.blocks.mini_block import Diagonal, QuasiDiagonal
from fisherlab.approximators.network.block_diagonal import MethodByBlock
from fisherlab.approximators.mean_gradients import (
    AdamPreconditioner,
    ShampooPreconditioner,
    TNTPreconditioner,
)
from fisherlab.approximators.gradient_roots import (
    KLShampooPreconditioner,
    MuonPreconditioner,
    SOAPPreconditioner,
)
from fisherlab.approximators.online.k_bfgs import KBFGS, Observation
from fisherlab.approximators.online.b_kfac import BKFAC, Correction, RandomisedSVD
from fisherlab.approximators.online.singd import SINGD
from fisherlab.approximators.network.two_level_kfac import ExactNetwork, TwoLevelKFAC
from fisherlab.approximators.network.block_diagonal import PerBlock, block_diagonal
from fisherlab.approximators.network.kfac_tridiagonal import KFACTridiagonal
from fisherlab.approximators.network.khatri_rao import KhatriRao

# isort: on
from fisherlab.approximators.averages import average
from fisherlab.approximators.base import (
    Approximator,
    NetworkApproximator,
    OfSamples,
    OfSums,
    Streaming,
)
from fisherlab.approximators.costs import Cost
from fisherlab.approximators.kpsvd.direct_solvers import DenseSVD, SampleGram
from fisherlab.approximators.kpsvd.iterative_solvers import Lanczos, Power, Subspace
from fisherlab.approximators.kpsvd.passes import Passes
from fisherlab.approximators.kpsvd.solvers import Auto
from fisherlab.approximators.kronecker.kfra import kfra
from fisherlab.approximators.register import (
    approximators,
    by_name,
    network_approximators,
    preconditioners,
)
from fisherlab.approximators.streaming import approximate, approximate_network

__all__ = [
    "BKFAC",
    "CGFAC",
    "EKFAC",
    "FOOF",
    "KBFGS",
    "KFAC",
    "KPSVD",
    "SINGD",
    "SOAP",
    "TEKFAC",
    "TKFAC",
    "AdamPreconditioner",
    "Approximator",
    "Auto",
    "ByInput",
    "ByOutput",
    "ByTile",
    "Correction",
    "Cost",
    "Deflation",
    "DenseSVD",
    "Diagonal",
    "ExactBlock",
    "ExactNetwork",
    "KFACCorrected",
    "KFACTridiagonal",
    "KLShampoo",
    "KLShampooPreconditioner",
    "KhatriRao",
    "Lanczos",
    "LowRank",
    "MethodByBlock",
    "MiniBlock",
    "Muon",
    "MuonPreconditioner",
    "NetworkApproximator",
    "Observation",
    "OfSamples",
    "OfSums",
    "Passes",
    "PerBlock",
    "Power",
    "QuasiDiagonal",
    "RandomisedSVD",
    "RecurrentKFAC",
    "SOAPPreconditioner",
    "SampleGram",
    "Shampoo",
    "ShampooPreconditioner",
    "Streaming",
    "Subspace",
    "TNTPreconditioner",
    "TwoLevelKFAC",
    "approximate",
    "approximate_network",
    "approximators",
    "average",
    "block_diagonal",
    "by_name",
    "kfra",
    "network_approximators",
    "preconditioners",
]


class _Register(ModuleType):
    """Let ``fisherlab.approximators()`` be the register.

    The package and the function share a name; importing the one hides the other.
    """

    def __call__(self) -> dict[str, Approximator]:
        """Return all named approximators."""
        return approximators()


sys.modules[__name__].__class__ = _Register
